"""The tasks of CuriaBench on their phantom, and the same with shuffled labels, where every task has to score at chance.

Writes the phantom of data_pipeline.phantom --suite=curiabench, scores a backbone and all floors on it by both protocols, and runs the
same command again, which has nothing to do. Then it gives the targets of each split to other patients (to other rows where rows of a
patient differ) and scores that. Prints the tables of docs/evaluate.md, with wall-clock and CPU seconds; exits with 1 if a task
failed, or if shuffled labels score better or worse than chance. Rerun it to resume.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.real_data import command
from curia_jax.evaluate import tasks
from curia_jax.evaluate.results import FAILED, FLOORS, NOT_RUN, RESULTS, Score, read, read_rows
from curia_jax.report import comparison

# What a head scores that knows nothing. A forecast worse than the mean has an R2 below 0, which is chance, too.
CHANCE = {"auroc": 0.5, "c_index": 0.5, "r2": 0.0}
FAMILY = 0.05  # probability that one of all tasks is outside its interval by chance
NORMAL = statistics.NormalDist()
SEED = 0  # of the shuffle


def shuffle(source: Path, target: Path, seed: int = SEED) -> None:
    """Copies the Parquet files of a folder of tasks, with the columns target and event of every split in another order."""
    for path in sorted(source.rglob("*.parquet")):
        table = pq.read_table(path)
        moved = [name for name in ("target", "event") if name in table.column_names]
        own = pa.table({name: table.column(name) for name in moved})
        patients = np.array(table.column("patient_id").to_pylist())
        r = np.random.default_rng([seed, *path.relative_to(source).as_posix().encode()])
        order = _order(patients, np.array(own.column("target").to_pylist()), r)
        for name in moved:
            place = table.column_names.index(name)
            table = table.set_column(place, name, own.column(name).take(pa.array(order)))
        into = target / path.relative_to(source)
        into.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, into, compression="zstd", row_group_size=128)


def _order(patients: np.ndarray, targets: np.ndarray, r: np.random.Generator) -> np.ndarray:
    """From which row every row gets its target: all rows of a patient from one other patient, if a patient has one target."""
    names, first, of = np.unique(patients, return_index=True, return_inverse=True)
    if (targets == targets[first][of]).all():
        return first[r.permutation(len(names))][of]
    return r.permutation(len(targets))


def excess(score: Score, tests: int) -> bool:
    """Whether a score differs from chance by more than its interval, widened for so many tests (Bonferroni).

    Of `tests` intervals at 95 %, one in twenty misses chance by itself.
    """
    assert score.value is not None and score.low is not None and score.high is not None
    chance, wider = CHANCE[score.metric], NORMAL.inv_cdf(1 - FAMILY / 2 / tests) / NORMAL.inv_cdf(0.975)
    below = chance - score.value > wider * (score.high - score.value) and score.metric != "r2"
    return below or score.value - chance > wider * (score.value - score.low)


def outside(score: Score) -> bool:
    """Whether chance is not in the 95 % interval."""
    assert score.low is not None and score.high is not None
    return score.low > CHANCE[score.metric] or (score.high < CHANCE[score.metric] and score.metric != "r2")


def at_chance(scores: Sequence[Score]) -> list[Score]:
    """Those that have a chance level and an interval: values of heads, not of the class frequencies."""
    return [s for s in scores if s.against is None and s.metric in CHANCE and s.head != "none" and s.low is not None]


def chosen(scores: Sequence[Score]) -> list[Score]:
    """Of each task, protocol and backbone, the head with the smallest loss on the held-out cases."""
    found = {}
    for score in at_chance(scores):
        of = (score.study.task, score.study.protocol, score.backbone)
        own = [s for s in scores if (s.study.task, s.study.protocol, s.backbone) == of]
        if score.head == comparison.chosen_head(own, score.backbone):
            found[of] = score
    return list(found.values())


def markdown(scores: Sequence[Score], shuffled: Sequence[Score], backbone: str) -> str:
    """All tasks by the protocol, the backbone, its floors, and the backbone with shuffled labels."""
    control = {(s.study.task, s.study.protocol): s for s in chosen(shuffled) if s.backbone == backbone}
    lines = []
    for found in comparison.compare(scores):
        lines += [
            f"| protocol `{found.protocol}` | metric | encoder | {' | '.join(FLOORS)} | shuffled labels, encoder |",
            "|---|---|---|" + "---|" * (len(FLOORS) + 1),
        ]
        for line in found.lines:
            cells = [line.scores.get(name) for name in (backbone, *FLOORS)]
            shown = [f"{score.value_text} {score.interval_text}" if score else "" for score in cells]
            other = control.get((line.title, found.protocol))
            last = f"{other.metric} {other.value_text} {other.interval_text}" if other else ""
            lines.append(f"| {line.title} | {line.metric} | {' | '.join(shown)} | {last} |")
        lines.append("")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m benchmarks.suite --backbone=demo/run",
    )  # fmt: skip
    parser.add_argument(
        "--backbone", default="demo/run", help="as in curia_jax.evaluate; make demo makes the default (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/suite"), help="(%(default)s)")
    parser.add_argument("--tasks", help="of the suite, with commas (default: all)")
    parser.add_argument("--patients", type=int, help="test patients of a task (default: that of data_pipeline.phantom)")
    parser.add_argument("--size", type=int, help="px of the images (default: that of data_pipeline.phantom)")
    parser.add_argument("--protocol", default="both", choices=("ours", "official", "both"), help="(%(default)s)")
    parser.add_argument(
        "--control-heads", default="knn,ridge,cox", help="that learn from shuffled labels, by the protocol ours (%(default)s)"
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    phantom, mixed = args.output / "phantom", args.output / "shuffled"
    if not (phantom / "README.md").exists():
        sizes = [f"--{name}={getattr(args, name)}" for name in ("tasks", "patients", "size") if getattr(args, name)]
        command("data_pipeline.phantom", "--suite=curiabench", f"--output={phantom}", *sizes)
    shuffle(phantom, mixed)

    which = f"--tasks={args.tasks}" if args.tasks else "--suite=curiabench"
    words = (which, f"--backbones={args.backbone}")
    results, control = args.output / "results", args.output / "control"
    times = [
        command("curia_jax.evaluate", *words, f"--data={phantom}", f"--output={results}", f"--protocol={args.protocol}")
        for _ in range(2)
    ]
    times.append(
        command("curia_jax.evaluate", *words, f"--data={mixed}", f"--output={control}", f"--heads={args.control_heads}")
    )

    scores, shuffled = read(results / RESULTS), read(control / RESULTS)
    print(markdown(scores, shuffled, args.backbone))
    statuses = [row["status"] for row in read_rows(results / RESULTS)]
    scored = len({score.study.task for score in scores})
    without = sorted(
        {row["task"] for row in read_rows(results / RESULTS) if row["status"] == NOT_RUN}
        - {s.study.task for s in scores}
    )
    print(f"{scored} tasks with figures, of {len(tasks.CURIABENCH)}; not run: {', '.join(without) or 'none'}")
    for name, (wall, cpu) in zip(("first run", "the same again", "shuffled labels"), times, strict=True):
        print(f"{name}: {wall:.0f} s, {cpu:.0f} CPU seconds")
    every, best = at_chance(shuffled), chosen(shuffled)
    missed, wrong = sum(map(outside, every)), [score for score in best if excess(score, len(best))]
    print(
        f"shuffled labels: chance is outside the 95 % interval of {missed} of {len(every)} figures ({missed / len(every):.1%}), and of "
        f"{sum(map(outside, best))} of the {len(best)} of the chosen heads; outside the interval for {len(best)} tests: {len(wrong)}"
    )
    for score in wrong:
        print(
            f"  {score.study.task}, {score.backbone}, {score.head}: {score.metric} {score.value_text} {score.interval_text}"
        )
    return int(FAILED in statuses or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
