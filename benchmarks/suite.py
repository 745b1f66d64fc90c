"""The tasks of CuriaBench on their phantom, and the same with shuffled labels, where every task has to score at chance.

Writes the phantom of data_pipeline.phantom --suite=curiabench, scores a backbone and all floors on it by both protocols, and runs the
same command again, which has nothing to do. Then it gives the targets of each split to other patients (to other rows where rows of a
patient differ), several times, and scores each of these copies. Prints the tables of docs/evaluate.md, with wall-clock and CPU seconds;
exits with 1 if a task failed, or if shuffled labels score better or worse than chance. Rerun it to resume.

Chance is known exactly: the predictions stay, and the targets of the test cases are given to others again, DRAWS times. What is
compared is the mean over the shuffles. p-values are corrected for the number of figures (Holm).
"""

import argparse
import collections
import dataclasses
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import scipy.stats
from jaxtyping import Float, Int, Shaped

from benchmarks.real_data import command
from curia_jax.evaluate import official_protocol, statistics, tasks
from curia_jax.evaluate.results import FAILED, FLOORS, NOT_RUN, RESULTS, Score, predictions_path, read, read_rows
from curia_jax.evaluate.targets import Times
from curia_jax.report import comparison

JUDGED = ("auroc", "c_index", "r2")  # the metrics of classes, times and values whose chance is looked at
SIGNIFICANT = 0.01  # corrected p-value below which a figure is not at chance: one sound pipeline in a hundred has one
DRAWS = 20_000
TOGETHER = 2_000  # draws at a time
ALL = "all tasks"


def shuffle(source: Path, target: Path, seed: int) -> None:
    """Copies a folder of tasks, with the columns target and event of every split in another order.

    Does nothing where the copy exists.
    """
    if target.exists():
        return
    made = target.parent / f".{target.name}-{secrets.token_hex(4)}"
    shutil.copytree(source, made, ignore=shutil.ignore_patterns("*.parquet"))
    for path in sorted(source.rglob("*.parquet")):
        table = pq.read_table(path)
        moved = [name for name in ("target", "event") if name in table.column_names]
        own = pa.table({name: table.column(name) for name in moved})
        patients, targets = (np.array(table.column(name).to_pylist()) for name in ("patient_id", "target"))
        r = np.random.default_rng([seed, *path.relative_to(source).as_posix().encode()])
        (order,) = orders(patients, targets, 1, r)
        for name in moved:
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(name), own.column(name).take(pa.array(order)))
        pq.write_table(table, made / path.relative_to(source), compression="zstd", row_group_size=128)
    os.rename(made, target)


def orders(
    patients: Shaped[np.ndarray, " n"], targets: Shaped[np.ndarray, " n"], count: int, r: np.random.Generator
) -> Int[np.ndarray, "count n"]:
    """From which case every case gets its target: all cases of a patient from one other patient, if each patient has one target."""
    names, first, of = np.unique(patients, return_index=True, return_inverse=True)
    if (targets == targets[first][of]).all():
        return first[r.permuted(np.tile(np.arange(len(names)), (count, 1)), axis=1)][:, of]
    return r.permuted(np.tile(np.arange(len(targets)), (count, 1)), axis=1)


# ---- chance


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What the chosen head of a backbone predicted for the test cases of one shuffled copy.

    Attributes:
      targets: class numbers, values or times.
      scores: of each class; or the value, or the log risk.
    """

    task: str
    backbone: str
    head: str
    metric: str
    patients: Shaped[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"] | Float[np.ndarray, " n"] | Times
    scores: Float[np.ndarray, "n outputs"]

    @property
    def keys(self) -> Shaped[np.ndarray, " n"]:
        """What `orders` takes for targets."""
        if isinstance(self.targets, Times):
            return np.unique(np.stack([self.targets.time, self.targets.event]), axis=1, return_inverse=True)[1]
        return self.targets

    def values(self, order: Int[np.ndarray, "draws n"]) -> Float[np.ndarray, " draws"]:
        """The metric, as curia_jax.evaluate.metrics defines it, if the cases had the targets of these others."""
        parts = [order[start : start + TOGETHER] for start in range(0, len(order), TOGETHER)]
        of = {"auroc": self._auroc, "c_index": self._concordance, "r2": self._r2}[self.metric]
        return np.concatenate([of(part) for part in parts])

    def _auroc(self, order: Int[np.ndarray, "draws n"]) -> Float[np.ndarray, " draws"]:
        assert not isinstance(self.targets, Times)
        (draws, n), classes = order.shape, self.scores.shape[1]
        scores = self.scores - self.scores[:, ::-1] if classes == 2 else self.scores
        ranks, labels = scipy.stats.rankdata(scores, axis=0), self.targets[order]
        cells = (labels + classes * np.arange(draws)[:, None]).ravel()
        sums = np.bincount(cells, ranks[np.arange(n), labels].ravel(), draws * classes).reshape(draws, classes)
        counts = np.bincount(cells, minlength=draws * classes).reshape(draws, classes)
        pairs = counts * (n - counts)
        areas = np.divide(sums - counts * (counts + 1) / 2, pairs, out=np.full(sums.shape, np.nan), where=pairs > 0)
        return np.nanmean(areas, axis=1)

    def _concordance(self, order: Int[np.ndarray, "draws n"]) -> Float[np.ndarray, " draws"]:
        assert isinstance(self.targets, Times)
        time, event, risk = self.targets.time[order], self.targets.event[order], self.scores[:, 0]
        known, right = np.zeros(len(order)), np.zeros(len(order))
        for case in range(order.shape[1]):
            own = time[:, case, None]
            later = event[:, case, None] & ((time > own) | ((time == own) & ~event))
            known += later.sum(axis=1)
            right += later @ (0.5 * (risk[case] > risk) + 0.5 * (risk[case] >= risk))
        return right / known

    def _r2(self, order: Int[np.ndarray, "draws n"]) -> Float[np.ndarray, " draws"]:
        assert not isinstance(self.targets, Times)
        values = self.targets[order]
        return 1 - np.square(values - self.scores[:, 0]).sum(axis=1) / (len(self.targets) * values.var(axis=1))


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of shuffled labels and what chance gives.

    Attributes:
      metric: "auroc", "c_index" or "r2"; "z" of all tasks together, the sum of their figures in deviations from chance, over the
        root of their number.
      value: mean over the shuffles.
      low, high: 2.5 and 97.5 percentile of chance.
      p: two-sided, that chance gives a value as far off.
      p_holm: corrected for all figures.
    """

    task: str
    backbone: str
    metric: str
    value: float
    low: float
    high: float
    p: float
    p_holm: float = float("nan")

    @classmethod
    def of(cls, task: str, backbone: str, metric: str, values: Float[np.ndarray, " one_and_draws"]) -> "Figure":
        """Of the observed value, followed by those of chance."""
        low, high = np.percentile(values[1:], [2.5, 97.5])
        # A permutation test: the observed value is one of the draws (Phipson and Smyth 2010, doi 10.2202/1544-6115.1585).
        tail = min((values <= values[0]).sum(), (values >= values[0]).sum())
        return cls(task, backbone, metric, float(values[0]), float(low), float(high), min(1.0, 2 * tail / len(values)))

    @property
    def text(self) -> str:
        return f"{self.metric} {self.value:.3f}, chance [{self.low:.3f}, {self.high:.3f}]"


def judge(shuffles: Sequence[Sequence[Predicted]], draws: int = DRAWS) -> list[Figure]:
    """The figures of every task and backbone, then of all tasks of every backbone together."""
    by_figure: dict[tuple[str, str, str], list[Float[np.ndarray, " one_and_draws"]]] = collections.defaultdict(list)
    for seed, predictions in enumerate(shuffles):
        for one in predictions:
            # The same for all backbones of a task.
            r = np.random.default_rng([seed, *one.task.encode()])
            drawn = orders(one.patients, one.keys, draws, r)
            order = np.concatenate([np.arange(len(one.scores))[None], drawn])
            by_figure[one.task, one.backbone, one.metric].append(one.values(order))
    means = {key: np.mean(values, axis=0) for key, values in by_figure.items()}
    found = [Figure.of(*key, values) for key, values in means.items()]
    for backbone in dict.fromkeys(backbone for _, backbone, _ in means):
        own = [values for (_, name, _), values in means.items() if name == backbone and values[1:].std() > 0]
        if len(own) > 1:
            deviations = [(values - values[1:].mean()) / values[1:].std() for values in own]
            found.append(Figure.of(ALL, backbone, "z", np.sum(deviations, axis=0) / len(own) ** 0.5))
    corrected = statistics.holm([figure.p for figure in found])
    return [dataclasses.replace(figure, p_holm=p) for figure, p in zip(found, corrected, strict=True)]


def predictions(folder: Path) -> Iterator[Predicted]:
    """Of each task and backbone of an output folder, the head with the smallest loss on the held-out cases."""
    scores = [score for score in read(folder / RESULTS) if score.against is None and score.metric in JUDGED]
    for title in dict.fromkeys(score.study.title for score in scores):
        own = [score for score in scores if score.study.title == title]
        study = own[0].study
        table = pq.read_table(predictions_path(folder, study))
        if study.trained_on is not None:  # a direction of a task across modalities
            inside = (pc.field("trained_on") == study.trained_on) & (pc.field("tested_on") == study.tested_on)
            table = table.filter(inside)
        for backbone in dict.fromkeys(score.backbone for score in own if score.head != "none"):
            head = comparison.chosen_head(own, backbone)
            (score,) = (score for score in own if (score.backbone, score.head) == (backbone, head))
            rows = table.filter((pc.field("backbone") == backbone) & (pc.field("head") == head))
            yield Predicted(
                title, backbone, score.head, score.metric, np.array(rows.column("patient").to_pylist()),
                _targets(rows.column("target").to_pylist(), score), np.array(rows.column("scores").to_pylist()),
            )  # fmt: skip


def _targets(texts: Sequence[str], score: Score) -> Int[np.ndarray, " n"] | Float[np.ndarray, " n"] | Times:
    """As `scoring.table` writes them."""
    if score.metric == "c_index":
        times = np.array([float(text.removesuffix("+")) for text in texts])
        return Times(times, np.array([not text.endswith("+") for text in texts]))
    if score.study.classes:
        return np.array([score.study.classes.index(text) for text in texts])
    return np.array([float(text) for text in texts])


# ---- the command


def markdown(scores: Sequence[Score], backbone: str) -> str:
    """All tasks by each protocol, the backbone and its floors."""
    lines = []
    for found in comparison.compare(scores):
        lines += [
            f"| protocol `{found.protocol}` | metric | encoder | {' | '.join(FLOORS)} |",
            "|---|---|---|" + "---|" * len(FLOORS),
        ]
        for line in found.lines:
            cells = [line.scores.get(name) for name in (backbone, *FLOORS)]
            shown = [f"{score.value_text} {score.interval_text}" if score else "" for score in cells]
            lines.append(f"| {line.title} | {line.metric} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def control_markdown(figures: Sequence[Figure], backbone: str) -> str:
    """The figures of the backbone and its floors with shuffled labels."""
    names = (backbone, *FLOORS)
    lines = [f"| shuffled labels | encoder | {' | '.join(FLOORS)} |", "|---|---|" + "---|" * len(FLOORS)]
    for task in dict.fromkeys(figure.task for figure in figures):
        own = {figure.backbone: figure.text for figure in figures if figure.task == task}
        lines.append(f"| {task} | {' | '.join(own.get(name, '') for name in names)} |")
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--shuffles", type=int, default=3, help="copies with shuffled labels (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    phantom = args.output / "phantom"
    if not (phantom / "README.md").exists():
        sizes = [f"--{name}={getattr(args, name)}" for name in ("tasks", "patients", "size") if getattr(args, name)]
        command("data_pipeline.phantom", "--suite=curiabench", f"--output={phantom}", *sizes)
    which = f"--tasks={args.tasks}" if args.tasks else "--suite=curiabench"
    words = (which, f"--backbones={args.backbone}", f"--cache={args.output / 'cache'}")
    results = args.output / "results"
    first, again = (
        command("curia_jax.evaluate", *words, f"--data={phantom}", f"--output={results}", f"--protocol={args.protocol}")
        for _ in range(2)
    )
    # The features of the first run are in the cache under the names of all of them.
    official = () if args.protocol == "ours" else map(str, official_protocol.READOUTS)
    readouts = ",".join(dict.fromkeys(("cls", "mean", "mean+std", *official)))
    mixed, controls = [args.output / f"shuffled/{seed}" for seed in range(args.shuffles)], []
    for seed, folder in enumerate(mixed):
        shuffle(phantom, folder, seed)
        output = f"--output={args.output / f'control/{seed}'}"
        chosen = (f"--heads={args.control_heads}", f"--features={readouts}")
        controls.append(command("curia_jax.evaluate", *words, f"--data={folder}", output, *chosen))
    figures = judge([list(predictions(args.output / f"control/{seed}")) for seed in range(args.shuffles)])

    scores, rows = read(results / RESULTS), read_rows(results / RESULTS)
    print(markdown(scores, args.backbone))
    print(control_markdown(figures, args.backbone))
    scored = {score.study.task for score in scores}
    without = sorted({row["task"] for row in rows if row["status"] == NOT_RUN} - scored)
    print(f"{len(scored)} tasks with figures, of {len(tasks.CURIABENCH)}; not run: {', '.join(without) or 'none'}")
    of_control = (sum(wall for wall, _ in controls), sum(cpu for _, cpu in controls))
    names = ("first run", "the same again", f"{args.shuffles} copies with shuffled labels")
    for name, (wall, cpu) in zip(names, (first, again, of_control), strict=True):
        print(f"{name}: {wall:.0f} s, {cpu:.0f} CPU seconds")
    outside = sum(not figure.low <= figure.value <= figure.high for figure in figures)
    wrong = [figure for figure in figures if figure.p_holm < SIGNIFICANT]
    print(
        f"shuffled labels: {len(figures)} figures, {outside} outside the range of chance of 95 % ({outside / len(figures):.1%}); "
        f"the smallest p-value, corrected for their number, is {min(figure.p_holm for figure in figures):.3f}"
    )
    for figure in wrong:
        print(f"  not at chance: {figure.task}, {figure.backbone}: {figure.text}, p = {figure.p_holm:.4f}")
    failed = any(row["status"] == FAILED for row in rows)
    return int(failed or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
