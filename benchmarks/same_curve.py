"""Compares the losses of the fast and the plain train step on the same shards, step by step.

Three runs from the same seed, with the same batches, views and masks: the plain step (benchmarks/plain_step.py) with 16 decoder
heads of 32 and exact GELU; the project's step with the same model; and the project's step as the named configs have it, with 4
decoder heads of 128 and tanh GELU. The first two compute the same function and should differ by rounding alone; the third is
another model and should learn as well. Matmuls are in bfloat16, as in the named configs.

Usage: python benchmarks/same_curve.py --shards=FOLDER [--steps=300] [--batch=32] [--size=Ti] [--depth=4] [--json=FILE].
Makes phantom shards if none are given. On a CPU a step of the default model takes about a second.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RUNS = {
    "plain, 16 heads of 32, exact GELU": ("plain", {"decoder_heads": 16, "activation": "gelu"}),
    "fast, the same model": ("fast", {"decoder_heads": 16, "activation": "gelu"}),
    "fast, 4 heads of 128, tanh GELU": ("fast", {"decoder_heads": 4, "activation": "gelu_tanh"}),
}


def phantom(folder: Path) -> Path:
    """Shards of phantom patients, made in `folder`."""
    for command in (
        ["data_pipeline.phantom", f"--output={folder}/exams", "--patients=24", "--size=64", "--slices=12"],
        ["data_pipeline.build", "--input", f"{folder}/exams/dicom", f"--output={folder}/shards"],
    ):
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    return folder / "shards"


def curve(kind: str, model: dict[str, Any], shards: Path, args: argparse.Namespace) -> list[float]:
    """The loss of every step of a run on one device."""
    import jax
    import plain_step  # beside this file

    from curia_jax import config as configs
    from curia_jax import data, sharding
    from curia_jax.objectives import mae
    from data_pipeline.format.shards import SliceSource

    config = configs.load("base")
    sections: Any = config.unlock()
    sections.batch_size = args.batch
    sections.model.update({"size": args.size, "depth": args.depth, "image_size": (64, 64), "patch_size": (8, 8)})
    sections.model.update({"decoder_depth": 2, "attention": "xla", "unroll": 1} | model)
    sections.optimizer.base_learning_rate = 4e-3
    source = SliceSource(str(shards), "train")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    make = mae.make if kind == "fast" else plain_step.objective_of
    canvas = data.canvas_size(source.largest, None)
    objective = make(config, mesh, canvas=canvas, warmup_steps=max(1, args.steps // 10), total_steps=args.steps)
    state, step = objective.initial_state(0), objective.compile()
    batches = data.training_batches(
        source, batch_size=args.batch, canvas=canvas, seed=0, threads=1, prefetch=args.batch, workers=0
    )
    losses = []
    for _, batch in zip(range(args.steps), batches, strict=False):
        state, metrics = step(state, data.to_devices(batch, sharding.batch_sharding(mesh)))
        losses.append(float(metrics["loss"]))
        if len(losses) % 20 == 0:
            print(f"  step {len(losses)}: {losses[-1]:.4f}", file=sys.stderr, flush=True)
    return losses


def last(losses: Sequence[float]) -> float:
    """Mean over the last tenth."""
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="folder of data_pipeline.build; phantom shards unless given")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", default="Ti")
    parser.add_argument("--depth", type=int, default=4, help="encoder blocks")
    parser.add_argument("--json", metavar="FILE", help="write all losses here")
    args = parser.parse_args()
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = args.shards or phantom(Path(folder))
        for name, (kind, model) in RUNS.items():
            print(name, file=sys.stderr, flush=True)
            curves[name] = curve(kind, model, shards, args)
    reference = np.array(next(iter(curves.values())))
    print(
        f"| run | loss, first step | middle | last tenth | largest difference from the first run in {args.steps} steps |"
    )
    print("|---|---|---|---|---|")
    for name, losses in curves.items():
        far = np.abs(np.array(losses) / reference - 1).max()
        print(f"| {name} | {losses[0]:.4f} | {losses[len(losses) // 2]:.4f} | {last(losses):.4f} | {far:.2%} |")
    if args.json:
        Path(args.json).write_text(json.dumps(curves) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
