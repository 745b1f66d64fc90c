"""The step that the CPU and GPU benchmarks time: it trains, on every side, and a side that cannot run is one line."""

import json
import os

import pytest

from benchmarks import mae_step
from benchmarks.cpu import CONFIG
from benchmarks.mae_step import Side, Spec
from curia_common.errors import UserError
from curia_jax import config as configs
from tests.benchmarks.test_cpu import TINY


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["jax", *(pytest.param(name, marks=pytest.mark.torch) for name in ("transformers", "timm"))]
)
def test_loss_of_every_side_falls(name: str) -> None:
    """120 steps on 2 fixed images: each side's loss falls, so its step trains."""
    model = json.loads(configs.load(str(CONFIG), TINY).model.to_json())
    side = Side(Spec(name, "train", model, batch=2, cores=1), os.environ)
    try:
        losses = [side.run(120)["value"] for _ in range(2)]
        assert losses[-1] < 0.98 * side.facts["value"], (side.facts, losses)
    finally:
        side.close()


def test_side_that_fails_is_refused_and_its_process_ends() -> None:
    model = json.loads(configs.load(str(CONFIG), TINY).model.to_json())
    with pytest.raises(UserError, match="the step of jax failed; its message is above"):
        Side(Spec("jax", "train", model | {"heads": 3}, batch=2, cores=1), os.environ)


def test_sides_of_different_size_are_refused() -> None:
    mae_step.check_same_model({"jax": 10, "timm": 10})
    with pytest.raises(UserError, match=r"different models: \{'jax': 10, 'timm': 11\} parameters"):
        mae_step.check_same_model({"jax": 10, "timm": 11})
