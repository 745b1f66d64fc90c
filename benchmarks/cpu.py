"""The demo's own model on this machine's CPU, against transformers' ViTMAE on PyTorch with the same shapes.

  python -m benchmarks.cpu

A training step (forward, backward, AdamW) and feature extraction. Each side has its own process, with the allocator settings
that the demo uses, and all cores; they take turns, so that what else runs on the machine meets both, and the ratio is the
median over the rounds. Exit codes: 0 done, 2 wrong usage or torch is missing.
"""

import argparse
import json
import os
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.mae_step import Side, Spec
from curia_jax import config as configs
from curia_jax import demo
from data_pipeline.errors import UserError

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.py"


def compare(
    model: dict[str, Any],
    task: str,
    *,
    batch: int,
    rounds: int,
    steps: int,
    threads: int,
    others: list[str],
    compiled: bool,
) -> list[dict[str, Any]]:
    """A row per side: median images/s, per second and per CPU second, and how many times that rate this project has."""
    environment = {**os.environ, **demo.ENVIRONMENT}
    names, sides = ["jax", *others], []
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    try:
        for name in names:
            spec = Spec(name, task, model, batch, compiled=compiled and name != "jax", threads=threads)
            sides.append(Side(spec, environment))
        for number in range(rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                took = side.run(steps)
                found[side.spec.side].append((steps * batch / took["seconds"], steps * batch / took["cpu_seconds"]))
        parameters = {side.spec.side: side.facts["parameters"] for side in sides}
        versions = {side.spec.side: side.facts["version"] for side in sides}
    finally:
        for side in sides:
            side.close()
    if len(set(parameters.values())) > 1:
        raise UserError(f"the sides have different models: {parameters} parameters")
    return [
        {
            "task": task, "side": name, "version": versions[name], "batch": batch, "parameters": parameters[name],
            "images_per_second": statistics.median(a for a, _ in found[name]),
            "images_per_cpu_second": statistics.median(b for _, b in found[name]),
            "ratio": statistics.median(a[0] / b[0] for a, b in zip(found["jax"], found[name], strict=True)),
            "ratio_per_cpu_second": statistics.median(a[1] / b[1] for a, b in zip(found["jax"], found[name], strict=True)),
        }
        for name in names
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default="train,features", metavar="NAME,…")
    parser.add_argument("--batch", type=int, help="images (the config's)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch (%(default)s)")
    parser.add_argument("--others", default="transformers", metavar="NAME,…", help="transformers, timm")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args, overrides = parser.parse_known_args(argv)
    try:
        if not find_spec("torch") or not find_spec("transformers"):
            raise UserError(
                "there is nothing to compare with: torch or transformers is not installed; pip install 'curia-jax[torch]'"
            )
        config = configs.load(str(CONFIG), overrides)
        model = json.loads(config.model.to_json())
        rows = []
        print("| task | side | images/s | images per CPU second | JAX is x times, wall | per CPU second |")
        print("|---|---|---|---|---|---|", flush=True)
        for task in args.tasks.split(","):
            for row in compare(
                model, task, batch=args.batch or config.batch_size, rounds=args.rounds, steps=args.steps,
                threads=args.threads, others=args.others.split(","), compiled=args.compile,
            ):  # fmt: skip
                rows.append(row)
                print(
                    f"| {task}, batch {row['batch']} | {row['side']} ({row['version']}) | {row['images_per_second']:,.0f} | "
                    f"{row['images_per_cpu_second']:,.0f} | {row['ratio']:.2f} | {row['ratio_per_cpu_second']:.2f} |",
                    flush=True,
                )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
