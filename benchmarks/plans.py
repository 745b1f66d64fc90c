"""Plans every named run on every topology of docs/performance.md and prints its table.

Each cell is what `python -m curia_jax.plan` says. A cell takes minutes, all of them hours; the compiler's answers are cached.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from curia_common import cli
from curia_common.exit_codes import ExitCode

if TYPE_CHECKING:
    from curia_jax.plan.planner import Plan

NAMED = [f"configs/pretrain_vit_{size}16_{px}.py" for px in (224, 512) for size in "blh"]
# TPU slices, and overrides for the named runs, whose configs are written for v5e:16x16.
TOPOLOGIES: dict[str, tuple[int, list[str]]] = {
    "v5e:16x16": (1, []),
    # fsdp over one torus dimension and a part of the other: three links per chip instead of two.
    "v6e:16x16": (1, ["--config.mesh.fsdp=32"]),
    "v5p:8x8x8": (1, []),
    "2 x v5e:16x16": (2, ["--config.mesh.replica=2", "--config.mesh.fsdp=32"]),
    "v5e:8x8": (1, ["--config.batch_size=4096"]),
}
# Overrides for one size. Over 64 chips 1,024 rows of a weight stay whole tiles of 8 rows; 768 and 1,280 do not.
OF_SIZE = {("2 x v5e:16x16", "l16"): ["--config.mesh.fsdp=64"]}


def overrides_of(file: str, name: str) -> list[str]:
    """Overrides of a run on a topology of the table."""
    return [*TOPOLOGIES[name][1], *OF_SIZE.get((name, Path(file).stem.split("_")[2]), [])]


def plan(file: str, name: str) -> "Plan":
    """Plans one cell of the table."""
    from curia_jax import config as configs
    from curia_jax.plan import inputs, prices, topologies
    from curia_jax.plan.planner import Planner

    config = configs.load(file, overrides_of(file, name))
    topology = topologies.parse(name.split()[-1], TOPOLOGIES[name][0])
    return Planner(topology, inputs.input_facts(config, None), prices.PRICES).plan(config)


def line(file: str, found: "Plan", name: str) -> str:
    """A row of the table, in Markdown; `name` is empty below a topology's first row."""
    size, px = Path(file).stem.removeprefix("pretrain_vit_").split("_")
    per_chip = found.batch_size / found.topology.chips
    head = f"| {name} | {size.upper().replace('16', '/16')}, {px} px | {per_chip:g}"
    memory, step = f"{found.memory.total / 2**30:.1f}", found.step
    if step is None:
        return f"{head} | {'not estimated' if found.fits else 'does not fit'} | | | {memory} | | |"
    return (
        f"{head} | {step.estimated_step_seconds * 1e3:.1f} | {step.estimated_mfu:.3f} | "
        f"{step.images_per_second_per_chip:,.0f} | {memory} | {step.exposed_collective_fraction * 100:.1f} % | "
        f"{step.unestimated_fraction * 100:.1f} % |"
    )


def parser() -> argparse.ArgumentParser:
    made = cli.parser(
        "python benchmarks/plans.py",
        __doc__,
        examples="python benchmarks/plans.py --config=configs/pretrain_vit_b16_224.py --topology=v5e:16x16",
        codes=(ExitCode.DOES_NOT_FIT,),
    )
    made.add_argument("--config", action="append", metavar="FILE", help="may be repeated; the six named runs if absent")
    made.add_argument("--topology", action="append", choices=TOPOLOGIES, help="may be repeated; all if absent")
    cli.add_json(made, "the plans")
    return made


def run(args: argparse.Namespace) -> ExitCode:
    from curia_jax.plan import topologies

    topologies.prepare_environment()
    rows, fits = [], True
    print(
        "| TPU slice | run | images per chip | step ms | MFU | images/s/chip | GiB per chip | exposed communication | "
        "charged by roofline |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in args.topology or TOPOLOGIES:
        for number, file in enumerate(args.config or NAMED):
            found = plan(file, name)
            print(line(file, found, "" if number else name), flush=True)
            rows.append({"config": file, "overrides": overrides_of(file, name), **found.to_json()})
            fits = fits and found.fits
    cli.write_json(args.json, rows)
    return ExitCode.DONE if fits else ExitCode.DOES_NOT_FIT


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
