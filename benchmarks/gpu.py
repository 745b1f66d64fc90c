"""This project's MAE step on an NVIDIA GPU, against PyTorch on the same card in one run.

  python -m benchmarks.gpu                                     B/16 and L/16 at 224 and 512 px
  python -m benchmarks.gpu --config=configs/pretrain_vit_b16_224.py
  python -m benchmarks.gpu --batch=512,256,128,32              one known batch per config: 6 minutes on an H200
  python -m benchmarks.gpu --platform=cpu --tiny               smoke test on any machine; its figures mean nothing

Forward, backward and AdamW, matmuls in bfloat16, of the named configs' models: jax, this project; transformers, its ViTMAE
with SDPA; timm, a MAE of timm's blocks with SDPA; both of these with torch.compile and fused AdamW. First each side's batch is
doubled until memory is full, and the fastest batch is used. Then the sides take turns at their best batches; the ratio is to the
faster PyTorch side, the median over the rounds. Every measurement has its own process and the card to itself. With --batch the
sides of a model start together, compile at the same time and stay in memory, and one of them runs at a time.

MFU counts the matmuls of the model, three forward passes a step, over the card's bf16 peak.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.mae_step import Side, Spec, check_same_model, need_torch
from curia_common import cli
from curia_common.errors import UserError
from curia_jax import config as configs
from curia_jax import telemetry
from curia_jax.models import mae

ROOT = Path(__file__).resolve().parents[1]
NAMED = [f"configs/pretrain_vit_{size}16_{px}.py" for px in (224, 512) for size in "bl"]
SIDES = ("jax", "transformers", "timm")
TINY = {
    "width": 16, "depth": 1, "heads": 2, "mlp_width": 32, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2,
    "image_size": (32, 32), "unroll": 1,
}  # fmt: skip


def check_gpu() -> str:
    """Name of the card.

    Raises:
      UserError: there is none, or JAX or torch cannot use it.
    """
    if not shutil.which("nvidia-smi"):
        raise UserError(
            "no NVIDIA GPU found (there is no nvidia-smi); run this on a machine with one, or with --platform=cpu --tiny"
        )
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True)
    if found.returncode or not found.stdout.strip():
        raise UserError(f"no NVIDIA GPU found: {(found.stderr or found.stdout).strip() or 'nvidia-smi names none'}")
    # In separate processes: a library that has used the card keeps some of its memory.
    for code, remedy in (
        ("import jax; assert jax.default_backend() == 'gpu'", "JAX does not see it; pip install 'curia-jax[cuda]'"),
        ("import torch; assert torch.cuda.is_available()", "PyTorch does not see it; install torch with CUDA"),
    ):
        if subprocess.run([sys.executable, "-c", code], capture_output=True).returncode:
            raise UserError(f"there is a {found.stdout.splitlines()[0]}, but {remedy}")
    return found.stdout.splitlines()[0]


def start(spec: Spec, *, alone: bool) -> Side | None:
    """A step in its own process, ready to run; None if the card's memory is too small.

    Args:
      alone: JAX may preallocate nearly all of the card's memory; otherwise it allocates as needed.
    """
    environment = {**os.environ, "JAX_PLATFORMS": spec.platform}
    if alone:
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    else:
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    side = Side(spec, environment)
    if "error" in side.facts:
        side.close()
        return None
    return side


def rate(side: Side, seconds: float) -> float | None:
    """Images/s, measured over at least `seconds`; None if memory is too small."""
    steps = 1
    while True:
        took = side.run(steps)
        if "error" in took:
            return None
        if took["seconds"] >= seconds:
            return steps * side.spec.batch / took["seconds"]
        steps = max(2 * steps, min(10 * steps, int(1.2 * seconds / took["seconds"] * steps)))


def measure(spec: Spec, seconds: float) -> dict[str, Any] | None:
    """A side's facts and images/s from a new process; None if memory is too small."""
    side = start(spec, alone=True)
    if side is None:
        return None
    try:
        found = rate(side, seconds)
        return None if found is None else side.facts | {"images_per_second": found}
    finally:
        side.close()


def best_batch(make: Any, *, first: int, most: int, seconds: float) -> tuple[int, dict[str, Any]]:
    """Doubles the batch until memory is full or the rate has fallen by a tenth.

    Args:
      make: batch -> Spec.

    Raises:
      UserError: not even the first fits.
    """
    found: dict[int, dict[str, Any]] = {}
    batch = first
    while batch <= most:
        result = measure(make(batch), seconds)
        if result is None:
            break
        found[batch] = result
        print(
            f"  {make(batch).side}: batch {batch}, {result['images_per_second']:,.0f} images/s",
            file=sys.stderr,
            flush=True,
        )
        if result["images_per_second"] < 0.9 * max(r["images_per_second"] for r in found.values()):
            break
        batch *= 2
    if not found:
        raise UserError(f"{make(first).side} does not fit with a batch of {first}; choose a smaller --first-batch")
    best = max(found, key=lambda b: found[b]["images_per_second"])
    return best, found[best]


def at_best_batches(
    make: Any, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, int], dict[str, list[float]]]:
    """Facts, best batch and rates of every side, each measurement in a process of its own.

    Args:
      make: (side, batch) -> Spec.
    """
    best = {
        side: best_batch(functools.partial(make, side), first=args.first_batch, most=args.most, seconds=args.seconds)
        for side in args.sides
    }
    rates: dict[str, list[float]] = {side: [] for side in args.sides}
    for number in range(args.rounds):
        for side in args.sides if number % 2 == 0 else args.sides[::-1]:
            result = measure(make(side, best[side][0]), args.seconds)
            if result is None:
                raise UserError(
                    f"{side} ran out of memory with batch {best[side][0]}, which fitted before; is the card shared?"
                )
            rates[side].append(result["images_per_second"])
    return {side: facts for side, (_, facts) in best.items()}, {side: batch for side, (batch, _) in best.items()}, rates


def at_one_batch(
    make: Any, batch: int, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, int], dict[str, list[float]]]:
    """As `at_best_batches`, with one given batch for all sides, which start at once."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(args.sides)) as pool:

        def begin(name: str) -> Side | None:
            side = start(make(name, batch), alone=False)
            if side is not None:
                stack.callback(side.close)  # also if another side fails
            return side

        started: dict[str, Side] = {}
        missing = []
        for name, side in zip(args.sides, pool.map(begin, args.sides), strict=True):
            if side is None:
                missing.append(name)
            else:
                started[name] = side
        if missing:
            raise UserError(
                f"{missing[0]} does not fit beside the others with a batch of {batch}; choose a smaller --batch"
            )
        rates: dict[str, list[float]] = {side: [] for side in args.sides}
        for number in range(args.rounds):
            for name in args.sides if number % 2 == 0 else args.sides[::-1]:
                found = rate(started[name], args.seconds)
                if found is None:
                    raise UserError(f"{name} ran out of memory with a batch of {batch}; choose a smaller --batch")
                rates[name].append(found)
        return {name: side.facts for name, side in started.items()}, dict.fromkeys(args.sides, batch), rates


def compare(name: str, model: dict[str, Any], batch: int | None, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per side for one model; `batch` as in --batch."""

    def make(side: str, batch: int) -> Spec:
        cores = 1 if args.platform == "cpu" else 0
        return Spec(side, "train", model, batch, args.platform, compiled=args.compile and side != "jax", cores=cores)

    facts, batches, rates = at_best_batches(make, args) if batch is None else at_one_batch(make, batch, args)
    check_same_model({side: facts[side]["parameters"] for side in args.sides})
    flops = 3 * mae.flops(mae.config(**model))
    medians = {side: statistics.median(values) for side, values in rates.items()}
    torch_sides = [side for side in args.sides if side != "jax"]
    rival = max(torch_sides, key=lambda side: medians[side], default=None)
    rows = []
    for side in args.sides:
        peak = telemetry.PEAK_FLOPS.get(facts[side]["device"])
        rows.append({
            "config": name, "side": side, "version": facts[side]["version"], "device": facts[side]["device"],
            "batch": batches[side], "parameters": facts[side]["parameters"], "images_per_second": medians[side],
            "mfu": medians[side] * flops / peak if peak else None,
            "ratio_to_torch": statistics.median(a / b for a, b in zip(rates[side], rates[rival], strict=True))
            if rival else None,
        })  # fmt: skip
    return rows


def parser() -> cli.Parser:
    made = cli.parser("python -m benchmarks.gpu", __doc__, examples="python -m benchmarks.gpu --batch=512,256,128,32")
    made.add_argument(
        "--config", action="append", metavar="FILE", help="may be repeated; B/16, L/16 at 224, 512 px if absent"
    )
    made.add_argument("--platform", choices=["cuda", "cpu"], default="cuda")
    made.add_argument("--tiny", action="store_true", help="a model of two small blocks, batches of at most 2")
    made.add_argument("--sides", default=",".join(SIDES), metavar="NAME,…")
    made.add_argument("--batch", metavar="N,…", help="no search: one for each config, in their order")
    made.add_argument("--first-batch", type=int, default=32)
    made.add_argument("--most", type=int, default=4096, help="largest batch tried (%(default)s)")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--seconds", type=float, default=5.0, help="of a measurement, at least (%(default)s)")
    made.add_argument("--no-compile", dest="compile", action="store_false", help="PyTorch without torch.compile")
    cli.add_json(made, "the figures")
    return made


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """The options as they follow from one another.

    Raises:
      UserError: they contradict each other.
    """
    args = argparse.Namespace(**{**vars(args), "sides": args.sides.split(",")})
    if unknown := [side for side in args.sides if side not in SIDES]:
        raise UserError(f"no side {unknown[0]!r}; there are {', '.join(SIDES)}")
    if args.platform == "cpu" and not args.tiny:
        raise UserError("--platform=cpu goes with --tiny; benchmarks.cpu compares on CPUs")
    if args.tiny:
        args.first_batch, args.most, args.rounds, args.seconds = 1, 2, 1, 0.01
        args.config = args.config or NAMED[:1]
    args.config = args.config or NAMED
    if args.platform == "cpu":
        args.compile = False
    if args.batch is not None:
        numbers = args.batch.split(",")
        if len(numbers) != len(args.config) or not all(n.isdecimal() and int(n) for n in numbers):
            raise UserError(f"--batch={args.batch} has to name one batch for each of {len(args.config)} configs")
        args.batch = [int(n) for n in numbers]
    return args


def run(args: argparse.Namespace) -> None:
    args = settled(args)
    if args.platform == "cuda":
        check_gpu()
    if any(side != "jax" for side in args.sides):
        need_torch()
    rows: list[dict[str, Any]] = []
    print("| config | side | batch | images/s | MFU | times the faster PyTorch | card |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for file, batch in zip(args.config, args.batch or [None] * len(args.config), strict=True):
        config: Any = configs.load(str(ROOT / file))
        model = json.loads(config.model.to_json()) | (TINY if args.tiny else {})
        for row in compare(Path(file).stem, model, batch, args):
            rows.append(row)
            mfu = f"{row['mfu']:.3f}" if row["mfu"] is not None else "peak unknown"
            ratio = f"{row['ratio_to_torch']:.2f}" if row["ratio_to_torch"] is not None else "-"
            print(
                f"| {row['config']} | {row['side']} ({row['version']}) | {row['batch']} | {row['images_per_second']:,.0f} | "
                f"{mfu} | {ratio} | {row['device']} |",
                flush=True,
            )
    cli.write_json(args.json, rows)


def main(argv: list[str] | None = None) -> int:
    return cli.run(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
