"""Exports of every layout read back as models of ours."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from curia_common.errors import DataError
from curia_jax import trained_model
from curia_jax.convert import __main__ as convert
from curia_jax.convert import reading
from curia_jax.evaluate import backbones, features
from tests.evaluate.test_command import save_checkpoint
from tests.evaluate.test_features import Slices

pytestmark = pytest.mark.long
LAYOUTS = ("vit", "vit_mae", "dinov2", "timm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """run/ and a folder of each layout."""
    made = tmp_path_factory.mktemp("exports")
    save_checkpoint(made / "run", activation="gelu_tanh")
    for layout in LAYOUTS:
        words = [f"--checkpoint={made / 'run'}", f"--output={made / layout}", f"--layout={layout}"]
        assert convert.main(words) == 0
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_is_the_encoder_of_its_checkpoint(folder, layout: str) -> None:
    trained, export = trained_model.load(folder / "run"), reading.read(folder / layout)
    wanted = jax.tree.map(np.asarray, trained.params["encoder"])
    jax.tree.map(np.testing.assert_array_equal, export.params, wanted)
    assert export.config == trained.config.encoder and export.step == 7
    assert export.augment(trained.augment) == trained.augment


def test_export_has_the_features_of_its_run(folder) -> None:
    readouts = [features.Readout.parse("mean")]
    run, export = backbones.open_backbones([str(folder / "run"), str(folder / "dinov2")], [], readouts=readouts)
    (batch,) = features.ShardImages(Slices(8)).batches(np.arange(8), 8)
    np.testing.assert_array_equal(run.features(batch)["mean"], export.features(batch)["mean"])
    assert run.digest == export.digest  # so that they share a cache


def test_changed_export_is_refused(folder, tmp_path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / "vit" / name).read_bytes())
    with pytest.raises(DataError, match="cannot be read .*convert the checkpoint again"):
        reading.read(tmp_path)
    tensors = safetensors.numpy.load_file(folder / "vit/model.safetensors")
    tensors["layernorm.weight"] = tensors["layernorm.weight"] + 1
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="are not those that were written: digest"):
        reading.read(tmp_path)
    tensors["layernorm.weight"] = np.ones(3, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="layernorm.weight has 3 values, the model 16"):
        reading.read(tmp_path)


def test_other_folders_are_no_exports(tmp_path) -> None:
    assert not reading.is_export(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert not reading.is_export(tmp_path)
