"""The table of docs/performance.md: every named run on every topology there, as `python -m curia_jax.plan` plans them.

Usage: python benchmarks/plans.py [--config=FILE ...] [--topology=v5e:16x16 ...] [--json=FILE]. The compiler's answers are kept; what
has not been asked before takes minutes each, and everything hours.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from curia_jax.plan import topology as topologies

NAMED = [f"configs/pretrain_vit_{size}16_{px}.py" for px in (224, 512) for size in "blh"]
# Words for the named runs, which are written for v5e:16x16.
TOPOLOGIES: dict[str, tuple[int, list[str]]] = {
    "v5e:16x16": (1, []),
    # Over one torus dimension and a part of the other: three links instead of two, and the chip is too fast for two.
    "v6e:16x16": (1, ["--config.mesh.fsdp=32"]),
    "v5p:8x8x8": (1, []),
    "2 x v5e:16x16": (2, ["--config.mesh.replica=2", "--config.mesh.fsdp=32"]),
    "v5e:8x8": (1, ["--config.batch_size=4096"]),
}
# For runs of one size. Over 64 chips 1,024 rows of a kernel stay whole tiles of 8, 768 and 1,280 do not.
OF_SIZE = {("2 x v5e:16x16", "l16"): ["--config.mesh.fsdp=64"]}


def plan(file: str, name: str) -> dict[str, Any]:
    """One cell's plan."""
    from curia_jax import config as configs
    from curia_jax.plan import __main__ as command
    from curia_jax.plan import search
    from curia_jax.plan.estimator import estimate

    slices, words = TOPOLOGIES[name]
    words = words + OF_SIZE.get((name, Path(file).stem.split("_")[2]), [])
    config = configs.load(file, words)
    topology = topologies.parse(name.split()[-1], slices)
    planner = search.Planner(topology, command.input_facts(config, None), estimate.PRICES)
    return {"config": file, "overrides": words} | planner.plan(config)


def line(file: str, found: dict[str, Any], name: str) -> str:
    """A row of the table, in Markdown; `name` of the TPU slice, empty below its first row."""
    size, px = Path(file).stem.removeprefix("pretrain_vit_").split("_")
    head = f"| {name} | {size.upper().replace('16', '/16')}, {px} px | {found['batch_per_chip']:g}"
    memory = f"{found['hbm_bytes_per_chip'] / 2**30:.1f}"
    if not found["fits"]:
        return f"{head} | does not fit | | | {memory} | | |"
    return (
        f"{head} | {found['estimated_step_seconds'] * 1e3:.1f} | {found['estimated_mfu']:.3f} | "
        f"{found['images_per_second_per_chip']:,.0f} | {memory} | {found['exposed_collective_fraction'] * 100:.1f} % | "
        f"{found['unestimated_fraction'] * 100:.1f} % |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", action="append", metavar="FILE", help="may be repeated; the six named runs if absent"
    )
    parser.add_argument("--topology", action="append", choices=TOPOLOGIES, help="may be repeated; all if absent")
    parser.add_argument("--json", metavar="FILE", help="write the plans here")
    args = parser.parse_args()
    topologies.prepare_environment()
    rows = []
    print(
        "| TPU slice | run | images per chip | step ms | MFU | images/s/chip | GiB per chip | exposed communication | "
        "rests on the kernel's charge |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in args.topology or TOPOLOGIES:
        for number, file in enumerate(args.config or NAMED):
            rows.append(plan(file, name))
            print(line(file, rows[-1], "" if number else name), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["fits"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
