"""Work directories of fine-tuned runs, with random weights: the kernel of a new head would be too near zero to see a difference."""

import atexit
import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from curia_jax import config as configs
from curia_jax.models import head, lora, mae
from curia_jax.models.head import HeadConfig
from tests import checkpoints
from tests.convert.cases import CASES
from tests.models import make_references as reference

RANK, ALPHA = 3, 6.0
CLASSES = HeadConfig("linear", "cls", "classes", ("no tear", "partial", "complete"))
ENCODER = {name: value for name, value in CASES["square"].items() if not name.startswith("decoder")}


@functools.cache
def run(config: HeadConfig, targets: tuple[str, ...] = (), *, slices: int = 1, masked: bool = False) -> Path:
    """A work directory; see `params_of`."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    demo = json.loads(configs.load("demo").to_json_best_effort())
    plain = demo | {
        "model": json.loads(json.dumps(ENCODER)), "head": dataclasses.asdict(config),
        "finetune": {"lora_rank": RANK if targets else 0, "lora_alpha": ALPHA, "lora_targets": "+".join(targets or ("qkv",))},
        "task": {"name": "ich", "target": config.target, "data_sha256": "0" * 64, "masked": masked, "slices": slices},
    }  # fmt: skip
    checkpoints.save(Path(folder, "ich"), {7: {"params": params_of(config, targets)}}, config=plain)
    return Path(folder, "ich")


def params_of(config: HeadConfig, targets: tuple[str, ...] = ()) -> dict[str, Any]:
    """Parameters: encoder, head, and lora where adapters have `targets`."""
    model, random = mae.config(**CASES["square"]), np.random.default_rng(3)
    shapes = jax.eval_shape(lambda: head.init(config, model.encoder.width, jax.random.key(0)))
    made = {
        "encoder": reference.random_params(model, seed=1)["encoder"],
        "head": jax.tree.map(lambda leaf: random.normal(0, 0.5, leaf.shape).astype(np.float32), dict(shapes)),
    }
    blocks: dict[str, dict[str, Any]] = {}
    for name in targets:
        part = lora.TARGETS[name]
        depth, inputs, outputs = made["encoder"]["blocks"][part][name]["kernel"].shape
        blocks.setdefault(part, {})[name] = {
            "a": random.normal(0, 0.3, (depth, inputs, RANK)).astype(np.float32),
            "b": random.normal(0, 0.3, (depth, RANK, outputs)).astype(np.float32),
        }
    return made | ({"lora": {"blocks": blocks}} if targets else {})
