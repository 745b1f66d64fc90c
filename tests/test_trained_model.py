"""A checkpoint as the model it holds."""

import jax
import ml_collections
import numpy as np
import pytest

from curia_common.errors import DataError
from curia_jax import config, trained_model
from curia_jax.models import mae
from tests import checkpoints

MODEL = {"size": "Ti", "image_size": 16, "patch_size": 8, "width": 16, "depth": 3, "heads": 2,
         "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "dtype": "bfloat16"}  # fmt: skip
# As older checkpoints have it: nothing on random views.
PREPARATION = {"hu_window": [-1000.0, 1000.0], "resample": "bicubic", "image_mean": 0.3, "image_std": 0.25}


@pytest.fixture(scope="module")
def params() -> dict:
    return jax.tree.map(np.asarray, mae.init(mae.config(**MODEL), jax.random.key(0)))


def test_load_reads_model_settings_and_provenance(params, tmp_path) -> None:
    plain = {"model": {**MODEL, "attention": "kernel"}, "augment": PREPARATION, "seed": 5}
    checkpoints.save(tmp_path / "run", {7: {"params": params}}, config=plain)
    found = trained_model.load(tmp_path / "run")
    assert (found.step, found.examples_seen, found.seed, found.run_name) == (7, 56, 5, "run")
    assert (found.augment.image_mean, found.augment.hu_window, found.augment.flip) == (0.3, (-1000.0, 1000.0), False)
    assert (found.config.encoder.dtype, found.config.encoder.attention) == ("float32", "pallas")
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    copied = tmp_path / "copied"
    (tmp_path / "run/checkpoints/7").rename(copied.with_name("7"))
    assert trained_model.load(tmp_path / "7").run_name is None


@pytest.mark.parametrize("missing", PREPARATION)
def test_load_rejects_config_without_preprocessing(params, missing: str, tmp_path) -> None:
    settings = {name: value for name, value in PREPARATION.items() if name != missing}
    plain = {"model": MODEL, "augment": settings, "seed": 5}
    checkpoints.save(tmp_path / "run", {7: {"params": params}}, config=plain)
    with pytest.raises(DataError, match=f"has no augment.{missing}; .* the version that trained it"):
        trained_model.load(tmp_path / "run")


def test_load_rejects_config_without_augment(params, tmp_path) -> None:
    checkpoints.save(tmp_path / "run", {7: {"params": params}}, config={"model": MODEL, "seed": 5})
    with pytest.raises(DataError, match="has no augment"):
        trained_model.load(tmp_path / "run")


@pytest.mark.parametrize(("change", "message"), [({"width": 48}, "wanted"), ({"size": "XXL"}, "size is 'XXL'")])
def test_model_config_rejects_weights_of_another_model(params, change: dict, message: str) -> None:
    with pytest.raises(DataError, match=f"does not hold the model of its config: .*{message}"):
        trained_model.model_config(ml_collections.ConfigDict({**MODEL, **change}), params)


def test_digest_changes_with_any_weight(params) -> None:
    same = jax.tree.map(np.copy, params)
    assert trained_model.digest(params) == trained_model.digest(same)
    same["encoder"]["norm"]["bias"][0] += 1e-7
    assert trained_model.digest(params) != trained_model.digest(same)


def test_demo_config_is_that_of_a_checkpoint_it_saved() -> None:
    plain = config.load("demo").to_dict()
    assert config.from_checkpoint(plain).model.to_dict() == plain["model"]
