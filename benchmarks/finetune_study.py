"""Fine-tunes the encoder of benchmarks/real_data.py on two labelled sets, against training from scratch: the tables of docs/finetune.md.

It runs the commands that a user types, on the folder of public files that docs/results.md describes:

  1  python -m data_pipeline.build   the sets tumor and covid: published test splits, a fifth of the other patients for validation
  2  python -m curia_jax.finetune    from scratch, full fine-tuning, LoRA and the head alone, at equal steps. Of each, the learning rate with
                                     the smallest validation loss of the first seed, then all seeds with that rate
  3  python -m curia_jax.evaluate    the best head on frozen features, on the same splits
  4  the tables, in Markdown, on standard output, and a plot in --output

Rerun the command to resume after an interruption.
"""

import argparse
import csv
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, Shaped

from benchmarks import real_data
from curia_jax import telemetry
from curia_jax import workdir as workdirs
from curia_jax.evaluate import finetuned, metrics
from curia_jax.evaluate import results as evaluate_results
from curia_jax.evaluate.results import PIXELS, RESULTS, SHARDS

TASKS = ("tumor", "covid")
COLUMNS: tuple[str, ...] = ("file", "split", "patient", "modality", *TASKS)
SEEDS = (0, 1, 2)
SCRATCH, FROZEN = "scratch", "frozen"
PREDICTIONS = "ours-predictions.parquet"  # of curia_jax.evaluate, in the folder of a task
VALIDATION = 0.2  # of the patients outside the test split
# Equal for all: the model of configs/real_data.py, of smaller slices to save time, and the batches. Steps are scarcer than cases.
SETTINGS = (
    "--config.batch_size=8", "--config.duration=480 steps", "--config.save_every=25 %", "--config.log_every=20 steps",
    "--config.model.size=Ti", "--config.model.image_size=(64,64)", "--config.model.patch_size=(8,8)", "--config.model.unroll=1",
    "--config.model.activation=gelu", "--config.model.dtype=float32", "--config.model.attention=xla",
    "--config.finetune.pooling=mean", "--config.augment.flip=true", "--config.data.threads=1",
    "--config.devices.platform=cpu", "--config.devices.cpu_count=1", "--config.mesh.fsdp=1",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
      title: in the tables.
      words: of the command line.
      rates: base learning rates that are tried.
    """

    title: str
    words: tuple[str, ...]
    rates: tuple[float, ...]


# Layer decay keeps what the first blocks have learned; random ones have nothing to keep.
WAYS = {
    SCRATCH: Way("from scratch", ("--config.finetune.train=full", "--config.finetune.layer_decay=1.0"), (1e-2, 4e-2)),
    "full": Way("full fine-tuning", ("--config.finetune.train=full", "--config.finetune.layer_decay=0.75"), (1e-2, 4e-2)),
    "lora": Way("LoRA", ("--config.finetune.train=lora",), (4e-2, 1.6e-1)),
    "head": Way("head alone", ("--config.finetune.train=head",), (1.6e-1, 6.4e-1)),
}  # fmt: skip


def label_table(data: Path) -> list[dict[str, str | Path]]:
    """The rows of real_data.label_table with a label of TASKS, a share VALIDATION of the training patients for validation."""
    rows: list[dict[str, str | Path]] = []
    for row in real_data.label_table(data):
        if not any(row.get(task) for task in TASKS):
            continue
        patient = str(row.get("patient") or Path(row["file"]).relative_to(data).as_posix())
        held_out = row["split"] == "train" and real_data.point(patient) < VALIDATION
        rows.append({**row, "split": "validation"} if held_out else row)
    return rows


# ---- commands


def build(data: Path, output: Path) -> Path:
    """The shards of the two sets."""
    folders = [data / "labelled" / name for name in ("mr_brain_tumor", "ct_covid")]
    table, unused, key = (output / name for name in ("labels.csv", "unused.txt", "key"))
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "file": os.path.relpath(row["file"], output)} for row in label_table(data))
    left_out = [path for path in real_data.left_out(data) if set(folders) & set(path.parents)]
    unused.write_text("".join(f"{path}\n" for path in left_out), encoding="utf-8")
    key.write_text("these files are public, their pseudonyms have no secret\n", encoding="utf-8")
    shards = output / "shards"
    real_data.command(
        "data_pipeline.build", "--input", *map(str, folders), f"--output={shards}", f"--labels={table}", f"--holdout={unused}",
        "--label-columns", *TASKS, "--split-column=split", "--patient-column=patient", "--modality-column=modality",
        f"--key-file={key}", "--size=256", "--examples=0",
    )  # fmt: skip
    return shards


def finetune(
    task: str, name: str, rate: float, seed: int, *, run: Path, shards: Path, output: Path, overrides: Sequence[str]
) -> None:
    """Fine-tunes once; a run that has finished stays as it is."""
    workdir = place(output, task, name, rate, seed)
    if workdirs.selected(workdir):
        return
    words = ["--from=none"]
    if name != SCRATCH:
        words = [f"--from={run}", f"--against={place(output, task, SCRATCH, chosen_rate(output, task, SCRATCH), seed)}"]
    real_data.command(
        "curia_jax.finetune", "--config=finetune_vit", *words, f"--task={SHARDS}{task}", f"--data={shards}",
        f"--workdir={workdir}", *SETTINGS, *WAYS[name].words, f"--config.optimizer.base_learning_rate={rate}",
        f"--config.seed={seed}", *overrides,
    )  # fmt: skip


def place(output: Path, task: str, name: str, rate: float, seed: int) -> Path:
    """The work directory of a run."""
    return output / task / name / f"rate-{rate:g}" / f"seed-{seed}"


def chosen_rate(output: Path, task: str, name: str) -> float:
    """The learning rate whose run of the first seed has the smallest validation loss."""

    def loss(rate: float) -> float:
        selected = workdirs.selected(place(output, task, name, rate, SEEDS[0]))
        assert selected is not None
        return selected.validation_loss

    return min(WAYS[name].rates, key=loss)


def train(tasks: Sequence[str], *, run: Path, shards: Path, output: Path, overrides: Sequence[str]) -> None:
    """All runs. Training from scratch comes first, because the others are compared with it."""
    for name in WAYS:
        if name != SCRATCH and telemetry.events(str(run))[-1].get("event") != "finished":
            sys.exit(f"{run} has not finished; rerun this command when it has")
        for task in tasks:
            for rate in WAYS[name].rates:
                finetune(task, name, rate, SEEDS[0], run=run, shards=shards, output=output, overrides=overrides)
            for seed in SEEDS[1:]:
                rate = chosen_rate(output, task, name)
                finetune(task, name, rate, seed, run=run, shards=shards, output=output, overrides=overrides)


def probe(tasks: Sequence[str], *, run: Path, shards: Path, output: Path) -> None:
    """Scores heads on frozen features, at the image size of the pretraining."""
    real_data.command(
        "curia_jax.evaluate", f"--tasks={','.join(SHARDS + task for task in tasks)}", f"--data={shards}", f"--backbones={run}",
        f"--heads={','.join(real_data.HEADS)}", f"--features={real_data.FEATURES}", f"--floors={PIXELS}",
        f"--output={output / FROZEN}",
    )  # fmt: skip


# ---- what they found

Scores = Float[np.ndarray, "n classes"]


@dataclasses.dataclass(frozen=True)
class Found:
    """The test cases of a set by one way to learn it.

    Attributes:
      title: in the tables.
      setting: the learning rate, or the head, that was chosen.
      losses: on the validation split, of each seed.
      scores: probabilities of the classes, of each seed.
    """

    title: str
    setting: str
    losses: tuple[float, ...]
    scores: tuple[Scores, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A set, and every way to learn it; training from scratch is the first.

    Attributes:
      groups: what counts as a patient.
    """

    task: str
    groups: str
    targets: Int[np.ndarray, " n"]
    bootstrap: metrics.Bootstrap
    found: tuple[Found, ...]

    def estimate(
        self, metric: metrics.Metric, of: Sequence[Scores], against: Sequence[Scores] = ()
    ) -> metrics.Estimate:
        """The mean of a metric over seeds, or its difference to that of other scores, all on the same draws of patients."""

        def mean(scores: Sequence[Scores]) -> Float[np.ndarray, " draws_and_one"]:
            return np.mean([self.bootstrap.values(metric, self.targets, one) for one in scores], axis=0)

        return self.bootstrap.interval(self.targets, mean(of), mean(against) if against else None)


def compare(task: str, *, run: Path, output: Path) -> Comparison:
    """Reads what the commands wrote of a set."""
    found: list[Found] = []
    cases: pa.Table | None = None
    for name, way in WAYS.items():
        rate = chosen_rate(output, task, name)
        finished = [finetuned.read(str(place(output, task, name, rate, seed))) for seed in SEEDS]
        tables = [one.tables[SHARDS + task][0] for one in finished]
        cases = tables[0] if cases is None else cases
        losses = [evaluate_results.Score.from_row(one.own[0]).fit for one in finished]
        found.append(
            Found(
                way.title, f"{rate:g}", tuple(fit.selection_loss or 0.0 for fit in losses if fit),
                tuple(_aligned(table, cases) for table in tables),
            )
        )  # fmt: skip
    assert cases is not None
    heads = [
        score
        for score in evaluate_results.read(output / FROZEN / RESULTS)
        if (score.study.title, score.backbone, score.metric, score.against) == (task, str(run), "auroc", None)
    ]
    best = min(heads, key=lambda score: score.fit.selection_loss if score.fit and score.fit.selection_loss else np.inf)
    table = pq.read_table(output / FROZEN / SHARDS / task / PREDICTIONS)
    own = [
        of == (str(run), best.head)
        for of in zip(table.column("backbone").to_pylist(), table.column("head").to_pylist(), strict=True)
    ]
    assert best.fit is not None and best.fit.selection_loss is not None
    found.append(
        Found(
            "frozen, best head", best.head, (best.fit.selection_loss,), (_aligned(table.filter(pa.array(own)), cases),)
        )
    )
    names = list(best.study.classes)
    targets = np.array([names.index(name) for name in cases.column("target").to_pylist()], np.int64)
    patients: Shaped[np.ndarray, " n"] = np.array(cases.column("patient").to_pylist())
    return Comparison(task, best.study.groups, targets, metrics.Bootstrap.over(patients), tuple(found))


def _aligned(table: pa.Table, cases: pa.Table) -> Scores:
    """The scores of a table in the order of the cases."""
    rows = zip(table.column("series").to_pylist(), table.column("slice").to_pylist(), strict=True)
    row_of = {case: row for row, case in enumerate(rows)}
    wanted = zip(cases.column("series").to_pylist(), cases.column("slice").to_pylist(), strict=True)
    scores = np.stack(table.column("scores").to_pylist()).astype(np.float64)
    return scores[[row_of[case] for case in wanted]]


def markdown(comparisons: Sequence[Comparison]) -> str:
    """The tables of docs/finetune.md."""
    lines: list[str] = []
    for name in ("auroc", "accuracy"):
        metric = metrics.METRICS[name]
        title = name.upper() if name == "auroc" else name
        lines += [
            f"| {title} | training | chosen | validation loss | mean over seeds | - from scratch | of each seed | test cases |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for one in comparisons:
            scratch = one.found[0]
            for way in one.found:
                value = one.estimate(metric, way.scores)
                cells = [one.task, way.title, way.setting, f"{np.mean(way.losses):.3f}", _text(value, "")]
                compared = _text(one.estimate(metric, way.scores, scratch.scores), "+") if way is not scratch else ""
                each = ""
                if way is not scratch and len(way.scores) == len(scratch.scores):
                    pairs = zip(way.scores, scratch.scores, strict=True)
                    each = ", ".join(f"{one.estimate(metric, [own], [other]).value:+.3f}" for own, other in pairs)
                cells += [compared, each]
                lines.append(f"| {' | '.join(cells)} | {len(one.targets)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _text(estimate: metrics.Estimate, sign: str) -> str:
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def draw(comparisons: Sequence[Comparison], path: Path) -> None:
    """AUROC of every seed as a point, and of the mean over seeds its 95 % interval."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    from curia_jax.report.style import INK, OURS, STYLE, WIDTH

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(comparisons), figsize=(WIDTH, 2.6), sharey=True, squeeze=False)
        for ax, one in zip(axes[0], comparisons, strict=True):
            titles = [way.title for way in one.found]
            for row, way in enumerate(one.found):
                mean = one.estimate(metrics.auroc, way.scores)
                ax.plot([mean.low, mean.high], [row, row], color=INK, linewidth=1.2)
                values = [one.estimate(metrics.auroc, [scores]).value for scores in way.scores]
                ax.plot(values, [row] * len(values), "o", color=OURS, markersize=5, alpha=0.8)
            ax.set(title=one.task, xlabel="AUROC", yticks=range(len(titles)), yticklabels=titles)
            ax.set_ylim(len(titles) - 0.5, -0.5)
        figure.savefig(path, dpi=150, bbox_inches="tight")
        pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m benchmarks.finetune_study --run=runs/real_data/run
  python -m benchmarks.finetune_study --run=runs/real_data/run --output=runs/longer --config.duration='1000 steps'""",
    )
    data = Path(os.environ.get("CURIA_DATA", real_data.ROOT.parent / "shared" / "data"))
    parser.add_argument("--run", type=Path, default=Path("runs/real_data/run"), help="pretraining run (%(default)s)")
    parser.add_argument("--data", type=Path, default=data, help="or the variable CURIA_DATA (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_study"), help="(%(default)s)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of the sets, with commas (%(default)s)")
    args, overrides = parser.parse_known_args(argv)
    for word in overrides:
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word}")
    tasks = args.tasks.split(",")
    args.output.mkdir(parents=True, exist_ok=True)
    shards = build(args.data, args.output)
    train(tasks, run=args.run, shards=shards, output=args.output, overrides=overrides)
    probe(tasks, run=args.run, shards=shards, output=args.output)
    comparisons = [compare(task, run=args.run, output=args.output) for task in tasks]
    print(markdown(comparisons))
    draw(comparisons, args.output / "finetune_study.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
