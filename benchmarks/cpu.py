"""A small ViT-MAE on this machine's CPU, against transformers' ViTMAE on PyTorch with the same shapes.

  python -m benchmarks.cpu

A training step (forward, backward, AdamW) and feature extraction, once on one core and once on all. Each side has its own
process, with the allocator settings that the demo uses. The sides take turns, so that other load affects both, and ratios are
medians over the rounds. On a shared machine compare images per CPU second on one core. Figures for all cores need an idle
machine: PyTorch's threads wait by spinning, and under other load it loses up to nine tenths of its rate.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.mae_step import Side, Spec, check_same_model, need_torch
from curia_common import cli
from curia_jax import config as configs
from curia_jax import demo

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.py"
# The shape of the figures in docs/performance.md; the demo's own model is smaller.
MODEL = (
    "--config.model.width=128", "--config.model.depth=6", "--config.model.heads=4", "--config.model.mlp_width=512",
    "--config.model.decoder_width=64", "--config.model.decoder_depth=2",
)  # fmt: skip


def compare(
    model: dict[str, Any], task: str, *,
    batch: int, rounds: int, steps: int, cores: int, others: list[str], compiled: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per side: median images per second and per CPU second, and this project's rate divided by the side's.

    Args:
      cores: number of cores that each side uses; 0 for all.
    """
    environment = {**os.environ, **demo.ENVIRONMENT}
    names, sides = ["jax", *others], []
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    try:
        for name in names:
            spec = Spec(name, task, model, batch, compiled=compiled and name != "jax", cores=cores)
            sides.append(Side(spec, environment))
        for number in range(rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                took = side.run(steps)
                found[side.spec.side].append((steps * batch / took["seconds"], steps * batch / took["cpu_seconds"]))
        facts = {side.spec.side: side.facts for side in sides}
    finally:
        for side in sides:
            side.close()
    check_same_model({name: facts[name]["parameters"] for name in names})
    return [
        {
            "task": task, "side": name, "version": facts[name]["version"], "batch": batch, "cores": cores,
            "parameters": facts[name]["parameters"],
            "images_per_second": statistics.median(a for a, _ in found[name]),
            "images_per_cpu_second": statistics.median(b for _, b in found[name]),
            "ratio": statistics.median(a[0] / b[0] for a, b in zip(found["jax"], found[name], strict=True)),
            "ratio_per_cpu_second": statistics.median(a[1] / b[1] for a, b in zip(found["jax"], found[name], strict=True)),
        }
        for name in names
    ]  # fmt: skip


def parser() -> cli.Parser:
    made = cli.parser(
        "python -m benchmarks.cpu", __doc__, examples="python -m benchmarks.cpu --cores=1", overrides=True
    )
    made.add_argument("--tasks", default="train,features", metavar="NAME,…")
    made.add_argument("--batch", type=int, help="images (the config's)")
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--steps", type=int, default=10, help="in a round")
    made.add_argument(
        "--cores", default="1,0", metavar="N,…", help="of each side, and PyTorch's threads; 0 for all (%(default)s)"
    )
    made.add_argument("--others", default="transformers", metavar="NAME,…", help="transformers, timm")
    made.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    cli.add_json(made, "the figures")
    return made


def run(args: argparse.Namespace) -> None:
    need_torch()
    config: Any = configs.load(str(CONFIG), [*MODEL, *args.overrides])
    model = json.loads(config.model.to_json())
    rows = []
    print("| task | cores | side | images/s | images per CPU second | JAX is x times, wall | per CPU second |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for cores in map(int, args.cores.split(",")):
        for task in args.tasks.split(","):
            for row in compare(
                model, task, batch=args.batch or config.batch_size, rounds=args.rounds, steps=args.steps, cores=cores,
                others=args.others.split(","), compiled=args.compile,
            ):  # fmt: skip
                rows.append(row)
                print(
                    f"| {task}, batch {row['batch']} | {cores or f'all {os.cpu_count()}'} | {row['side']} ({row['version']}) | "
                    f"{row['images_per_second']:,.0f} | {row['images_per_cpu_second']:,.0f} | {row['ratio']:.2f} | "
                    f"{row['ratio_per_cpu_second']:.2f} |",
                    flush=True,
                )
    cli.write_json(args.json, rows)


def main(argv: list[str] | None = None) -> int:
    return cli.run(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
