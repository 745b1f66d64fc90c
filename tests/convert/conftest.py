"""Tiny checkpoints as a run writes them, and the folders that the command converts them to."""

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from curia_jax import config as configs
from curia_jax import optimizer
from curia_jax.convert import __main__ as convert
from curia_jax.models import mae
from tests import checkpoints
from tests.convert.cases import CASES, HAS_TORCH
from tests.models import make_references as reference

if not HAS_TORCH:
    warnings.warn(
        "PyTorch or transformers is not installed: exported weights are tested against the frozen references in "
        f"{reference.FOLDER} only",
        stacklevel=1,
    )


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(arguments of mae.config, steps) -> a work directory with checkpoints of these steps, weights as in the references."""

    def make(model: dict[str, Any], steps: tuple[int, ...] = (7,)) -> Path:
        workdir = tmp_path_factory.mktemp("runs") / "ward-seven"
        demo = configs.load("demo")
        transform, _ = optimizer.make(demo.optimizer, batch_size=8, warmup_steps=1, total_steps=10)
        params = jax.tree.map(jnp.asarray, reference.random_params(mae.config(**model), seed=1))
        states = {}
        for step in steps:
            states[step] = {"step": jnp.int32(step), "params": params, "opt_state": transform.init(params)}
            params = jax.tree.map(lambda leaf: leaf * 0.5, params)
        config = {**json.loads(demo.to_json_best_effort()), "model": json.loads(json.dumps(model))}
        checkpoints.save(workdir, states, config=config)
        return workdir

    return make


@pytest.fixture(scope="session")
def runs(save: Callable[..., Path]) -> Callable[[str], Path]:
    """Name of a case -> its work directory."""
    return functools.cache(lambda name: save(CASES[name]))


@pytest.fixture(scope="session")
def converted(
    runs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Path, dict[str, Any]]]:
    """(name of a case, layout) -> the folder that the command wrote, and the content of --json."""

    @functools.cache
    def make(name: str, layout: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("weights")
        words = [f"--checkpoint={runs(name)}", f"--output={folder / layout}", f"--layout={layout}"]
        assert convert.main([*words, f"--json={folder / 'result.json'}"]) == 0
        return folder / layout, json.loads((folder / "result.json").read_text())

    return make
