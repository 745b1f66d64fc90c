"""A checkpoint as the model it holds."""

import dataclasses
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from curia_common.errors import DataError
from curia_jax import config, trained_model
from curia_jax.models import head as heads
from curia_jax.models import lora, mae, vit
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


# ---- after fine-tuning

ENCODER = {name: value for name, value in MODEL.items() if not name.startswith("decoder")}
HEAD = heads.HeadConfig("linear", "cls_mean", "classes", ("no", "yes"))
FINETUNE = {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": "qkv+fc2"}


def fine_tuned(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and config of a run that trained adapters and a head."""
    encoder = vit.init(vit.config(**ENCODER), jax.random.key(0))
    adapters = lora.init(lora.LoRAConfig(2, 4.0, ("qkv", "fc2")), encoder, jax.random.key(1))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    params = {"encoder": encoder, "head": heads.init(HEAD, 16, jax.random.key(2)), "lora": adapters}
    plain = {
        "model": ENCODER, "augment": PREPARATION, "seed": 5, "finetune": FINETUNE, "head": dataclasses.asdict(HEAD),
        "task": {"name": "ich", "masked": False, "slices": 1},
    }  # fmt: skip
    return jax.tree.map(np.asarray, params), plain | changes


def test_fine_tuned_run_has_averaged_weights_with_adapters_merged(tmp_path) -> None:
    params, plain = fine_tuned()
    average = {name: jax.tree.map(lambda leaf: leaf * 2, params[name]) for name in ("head", "lora")}
    checkpoints.save(tmp_path / "run", {7: {"params": params, "average": average}}, config=plain)
    found = trained_model.load(tmp_path / "run")
    assert (found.head, found.task["name"], found.config.encoder.depth) == (HEAD, "ich", 3)
    assert found.head_params is not None and found.adapters is not None
    assert set(found.params) == {"encoder"}
    np.testing.assert_array_equal(found.head_params["kernel"], average["head"]["kernel"])
    before, adapter = params["encoder"]["blocks"]["attn"]["qkv"]["kernel"], average["lora"]["blocks"]["attn"]["qkv"]
    wanted = before + 2 * np.einsum("dir,dro->dio", adapter["a"], adapter["b"])
    np.testing.assert_allclose(found.params["encoder"]["blocks"]["attn"]["qkv"]["kernel"], wanted, atol=1e-6)
    np.testing.assert_array_equal(found.adapters.base_encoder["blocks"]["attn"]["qkv"]["kernel"], before)
    assert found.adapters.config == lora.LoRAConfig(2, 4.0, ("qkv", "fc2"))


def test_fine_tuned_run_without_average_or_adapters_is_as_it_was_saved(tmp_path) -> None:
    params, plain = fine_tuned()
    del params["lora"]
    checkpoints.save(tmp_path / "run", {7: {"params": params}}, config=plain)
    found = trained_model.load(tmp_path / "run")
    assert found.adapters is None
    jax.tree.map(np.testing.assert_array_equal, {**found.params, "head": found.head_params}, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {**dataclasses.asdict(HEAD), "names": ["a", "b", "c"]}}, "the head of its config: .*bias is"),
        ({"head": {**dataclasses.asdict(HEAD), "kind": "mlp"}}, "the head of its config: kind is 'mlp'"),
        ({"head": {"kind": "linear"}}, "the head of its config: it has no field pooling"),
        ({"head": 3}, "the head of its config"),
        ({"finetune": {**FINETUNE, "lora_rank": 3}}, "the adapters of its config: its adapters have other shapes"),
        ({"finetune": {}}, "the adapters of its config"),
        ({"model": {**ENCODER, "width": 48}}, "the model of its config"),
    ],
)  # fmt: skip
def test_fine_tuned_run_that_does_not_fit_its_config_is_refused(changes: dict, message: str, tmp_path) -> None:
    params, plain = fine_tuned(**changes)
    checkpoints.save(tmp_path / "run", {7: {"params": params}}, config=plain)
    with pytest.raises(DataError, match=message):
        trained_model.load(tmp_path / "run")
