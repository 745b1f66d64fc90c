"""The report of `python -m curia_jax.evaluate`: one HTML page that loads nothing, and a LaTeX table beside it.

Neither paths of exams, patients nor series are shown.
"""

import dataclasses
import datetime
import functools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

import curia_common
from curia_common import source
from curia_common.errors import DataError
from curia_jax.evaluate import runner
from curia_jax.evaluate.preparation import Preparation
from curia_jax.evaluate.results import (
    ALL_LABELS,
    MAJORITY,
    OK,
    SHARDS,
    Provenance,
    Row,
    Score,
    Study,
    file_stem,
    predictions_path,
)
from curia_jax.report import across, comparison, curves, examples, few_labels, page
from curia_jax.report.comparison import LOWER_IS_BETTER, Comparison, Line
from curia_jax.report.sections import BACKBONES, METRICS, score_table

REPORT, LATEX, PICTURES = "report.html", "table.tex", "report_pictures"  # in the output folder


def write(output: Path, rows: Sequence[Row], command: str, images: Mapping[str, examples.Images]) -> None:
    """Writes report.html, its pictures and table.tex.

    Args:
      output: has a folder for each task with its predictions; see runner.py.
      rows: of results.json.
      command: that made them.
      images: of tasks, by name; without them no cases are shown.

    Raises:
      DataError: predictions that cannot be read.
    """
    everything = [Score.from_row(row) for row in rows if row["status"] == OK]
    scores = [score for score in everything if score.study.subgroup is None]
    not_scored = [row for row in rows if row["status"] != OK]
    comparisons = comparison.compare(scores)
    (output / PICTURES).mkdir(exist_ok=True)
    parts = [_tables(found) for found in comparisons]
    parts.append(_not_scored(not_scored))
    studies = dict.fromkeys((s.study.task, s.study.protocol, s.study.across) for s in scores)
    for task, protocol, column in studies:
        of_task = [
            s for s in everything if (s.study.task, s.study.protocol, s.study.across) == (task, protocol, column)
        ]
        if crossing := across.crossing(of_task):
            parts.append(_across(output, crossing))
        for title in dict.fromkeys(score.study.title for score in of_task):
            own = [s for s in of_task if s.study.title == title and not s.study.subgroup]
            parts.append(_task(own, _pictures(output, own, images.get(task))))
            parts.append(_subgroups(own, [s for s in of_task if s.study.title == title and s.study.subgroup]))
    parts.append(_provenance(scores, command))
    now = datetime.datetime.now().astimezone()
    tasks = page.count(len({task for task, *_ in studies}), "task")
    lead = f"{tasks} scored; {now.strftime('%-d %B %Y, %H:%M %Z')}."
    footer = (
        f"Curia JAX {curia_common.__version__}, python -m curia_jax.evaluate. For research; not a medical device, and no figure here "
        "supports a clinical decision."
    )
    (output / REPORT).write_text(page.page("Frozen features, task by task", lead, parts, footer), encoding="utf-8")
    (output / LATEX).write_text(comparison.latex(comparisons), encoding="utf-8")


def _pictures(output: Path, scores: Sequence[Score], images: examples.Images | None) -> dict[str, str]:
    """The sources of the pictures of a task by one protocol; those whose results have not changed are not drawn again."""
    study = scores[0].study
    name = _file_name(study)
    made_from = runner.key_of(output, study)
    key = f"{made_from} {source.describe()} {images is not None}" if made_from else ""
    found = {}

    def draw(kind: str, suffix: str, figure: Callable[[], Figure]) -> None:
        found[kind] = page.draw_once(output / PICTURES / f"{name}{suffix}.png", key, figure)

    @functools.cache
    def predictions() -> Mapping[str, curves.Predictions]:
        return _predictions(output, scores)

    if study.classes:
        draw("curves", "", lambda: curves.task_figure(predictions()))
        if images is not None:
            draw(
                "examples",
                "-examples",
                lambda: examples.figure(examples.choose(next(iter(predictions().values())), images)),
            )
    if few := few_labels.curve(scores):
        draw("few labels", "-few-labels", lambda: few_labels.figure(few, METRICS.get(few.metric, few.metric)))
    return found


def _file_name(study: Study, *more: str) -> str:
    """Of a picture: letters, digits, dots and dashes."""
    direction = () if study.trained_on is None else (study.trained_on, "to", str(study.tested_on))
    return re.sub(r"[^\w.-]+", "-", "-".join((study.task, file_stem(study.protocol, study.across), *direction, *more)))


def _across(output: Path, found: across.Crossing) -> str:
    """What is lost from one value of a column to another: a picture, and its figures."""
    metric = METRICS.get(found.metric, found.metric)
    name = f"{_file_name(dataclasses.replace(found.study, trained_on=None))}.png"
    key = runner.key_of(output, found.study)
    image = page.draw_once(
        output / PICTURES / name, f"{key} {source.describe()}" if key else "", lambda: across.figure(found, metric)
    )
    rows, previous = [], None
    for (trained, tested), by_backbone in found.directions.items():
        for backbone, one in by_backbone.items():
            shown = [one.within, one.crossed, one.trained, one.tested]
            cells = [page.number(s.value_text, s.interval_text + ("?" if s.doubt else "")) for s in shown]
            direction = f"{trained} to {tested}"
            rows.append(
                page.row(
                    page.cell(direction), page.cell(BACKBONES.get(backbone, backbone)), page.cell(one.crossed.head), *cells,
                    style="first" if direction != previous else "",
                )
            )  # fmt: skip
            previous = direction
    title = f"{found.study.task.removeprefix(SHARDS)}, protocol {found.study.protocol}: what is lost across {found.study.across}"
    caption = (
        "Across: heads that learned from the first and were tested on the second. Within: heads that learned from the second, on the same cases. Lost: "
        "across minus within. Every backbone with the head that had the smallest mean loss on the held-out cases of all directions. Bars are 95 % intervals."
    )
    lost = (
        f"{metric}. Across minus within: on the same cases. Across minus own: minus the same head on the test cases of what it learned from. Intervals: "
        f"{found.study.interval}; with a question mark they mean little."
    )
    columns = ["within", "across", "across − within", "across − own"]
    return (
        f"<h2>{page.escape(title)}</h2>{page.figure(image, caption, f'losses across, {found.study.task}')}"
        f"{page.table(lost, ['direction', 'features', 'probe'], columns, rows)}"
    )


def _tables(found: Comparison) -> str:
    """All tasks by all backbones."""
    rows = []
    for line in found.lines:
        cells = [_cell(line, backbone) for backbone in found.backbones]
        rows.append(page.row(page.cell(line.title), page.cell(METRICS.get(line.metric, line.metric)), *cells))
    ranks = [found.mean_rank(backbone) for backbone in found.backbones]
    shown = [page.number("" if rank is None else f"{rank:.2f}") for rank in ranks]
    rows.append(page.row(page.cell("mean rank"), page.cell(""), *shown, style="first"))
    lower = [line.metric for line in found.lines if line.metric in LOWER_IS_BETTER]
    caption = (
        "Each backbone with the head that had the smallest loss on the held-out cases; the interval is the 95 % interval, #1 the best of the task. "
        + (f"Lower is better for {', '.join(dict.fromkeys(lower))}. " if lower else "")
        + "The mean rank is over the tasks in which every backbone that sees the image has a value; values of different metrics have no mean."
        + (
            " The directions of a task count as one."
            if len({line.task for line in found.lines}) < len(found.lines)
            else ""
        )
    )
    names = [BACKBONES.get(backbone, backbone) for backbone in found.backbones]
    return f"<h2>All tasks, protocol {page.escape(found.protocol)}</h2>" + page.table(
        caption, ["task", "metric"], names, rows
    )


def _cell(line: Line, backbone: str) -> str:
    score = line.scores.get(backbone)
    if score is None:
        return page.number("")
    rank = f" #{line.ranks[backbone]}" if backbone in line.ranks else ""
    return page.number(score.value_text, f"{score.interval_text}{rank}")


def _not_scored(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [
        page.row(*(page.cell(str(row[name])) for name in ("task", "protocol", "status", "reason"))) for row in rows
    ]
    return "<h2>Without a score</h2>" + page.table("", ["task", "protocol", "status", "reason"], [], lines)


def _task(scores: Sequence[Score], images: Mapping[str, str]) -> str:
    """`images` are the sources of the pictures that there are: curves, examples, few labels."""
    study = scores[0].study
    parts = [f"<h2>{page.escape(study.title)}, protocol {page.escape(study.protocol)}</h2>"]
    if "curves" in images:
        caption = (
            "Test cases. Each backbone with the head that was best on the held-out cases; the confusion is that of the first, coloured "
            "by the share of the true class."
        )
        parts.append(page.figure(images["curves"], caption, f"ROC, reliability and confusion of {study.title}"))
    if "examples" in images:
        caption = (
            "Test cases that the first backbone got right and wrong: those it was surest of, one of each patient, with the outline of the mask. "
            "CT in a reading window, other slices between their 0.5 and 99.5 percentile."
        )
        parts.append(page.figure(images["examples"], caption, f"right and wrong cases of {study.title}"))
    # Of heads that learned from few labels, seed by seed, results.json has the rows.
    whole = [score for score in scores if score.study.labels == ALL_LABELS]
    if whole:
        parts.append(score_table(whole))
    if "few labels" in images:
        caption = (
            "Heads that learned from few labels: mean over the seeds, each with a subset of its own that is the same for every backbone, and a band from the "
            "smallest to the largest value. Every backbone with the head that was chosen with all labels."
        )
        parts.append(page.figure(images["few labels"], caption, f"few labels of {study.title}"))
    if few := few_labels.curve(scores):
        parts.append(_few_labels(few))
    return "".join(parts)


def _few_labels(found: few_labels.Curve) -> str:
    """The values of the picture."""
    names = list(dict.fromkeys(name for level in found.levels for name in level.values))
    rows = []
    for level in found.levels:
        cells = []
        for name in names:
            values = level.values.get(name, ())
            spread = f"[{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
            cells.append(page.number(f"{statistics.fmean(values):.3f}" if values else "", spread))
        seeds = max(map(len, level.values.values()))
        rows.append(
            page.row(page.cell(level.labels), page.number(f"{level.patients:,.0f}"), page.number(f"{seeds}"), *cells)
        )
    caption = f"{METRICS.get(found.metric, found.metric)} by labels: mean over the seeds [smallest, largest]."
    return page.table(caption, ["labels"], ["patients", "seeds", *(BACKBONES.get(name, name) for name in names)], rows)


def _subgroups(scores: Sequence[Score], groups: Sequence[Score]) -> str:
    """The metric that ranks the backbones, in every subgroup of the test cases; `scores` are those of all of them."""
    if not groups:
        return ""
    found = comparison.line(scores)
    names = [name for name in found.scores if name != MAJORITY]
    heads = {name: score.head for name, score in found.scores.items()}
    shown = [s for s in groups if s.metric == found.metric and heads.get(s.backbone) == s.head]
    rows, previous = [], None
    for subgroup in dict.fromkeys(score.study.subgroup for score in shown):
        column, _, value = (subgroup or "").partition("=")
        by_backbone = {score.backbone: score for score in shown if score.study.subgroup == subgroup}
        study = next(iter(by_backbone.values())).study
        events = "" if study.events is None else f"{study.events:,}"
        cells = [
            page.number(
                by_backbone[name].value_text, by_backbone[name].interval_text + ("?" if by_backbone[name].doubt else "")
            )
            for name in names
        ]
        rows.append(
            page.row(
                page.cell(column), page.cell(value), page.number(f"{study.n:,}"), page.number(f"{study.patients:,}"), page.number(events),
                *cells, style="first" if column != previous else "",
            )
        )  # fmt: skip
        previous = column
    caption = (
        f"{METRICS.get(found.metric, found.metric)} in subgroups of the test cases, with the head of the first table. An interval with a "
        "question mark means little: the group is small or lacks a class."
    )
    numbers = ["n", "patients", "events", *(BACKBONES.get(name, name) for name in names)]
    return page.table(caption, ["column", "group"], numbers, rows)


def _provenance(scores: Sequence[Score], command: str) -> str:
    """Where every number comes from."""
    rows = []
    of_backbones = {(s.study.task, s.study.protocol, s.backbone): s for s in scores if s.provenance}
    for (task, *_), score in of_backbones.items():
        made = score.provenance
        assert made is not None
        step = "" if made.step is None else f"{made.step:,}"
        rows.append(
            page.row(
                page.cell(task.removeprefix(SHARDS)), page.cell(BACKBONES.get(score.backbone, score.backbone)), page.code(made.weights_sha256[:16]),
                page.code(score.study.data_sha256[:16]), page.cell(_preparation(made)), page.number(step), page.number(str(score.study.seed)),
            )
        )  # fmt: skip
    table = page.table(
        f"Curia JAX {curia_common.__version__}, {source.describe()}. Digests are the first 16 digits of SHA-256; results.json has all of them, and the "
        "settings of every head.",
        ["task", "backbone", "weights", "data", "pixels"], ["step", "seed"], rows,
    )  # fmt: skip
    return f"<h2>Where the numbers come from</h2><pre>{page.escape(command)}</pre>{table}"


def _preparation(made: Provenance) -> str:
    """In words; that of a function is its own matter."""
    return str(Preparation.from_json(made.preparation)) if made.preparation else "by the function"


def _predictions(output: Path, scores: Sequence[Score]) -> Mapping[str, curves.Predictions]:
    """Of every backbone of a task of classes, with the head that was chosen; empty for other tasks."""
    study = scores[0].study
    if not study.classes:
        return {}
    path = predictions_path(output, study)
    try:
        columns = ["backbone", "head", "labels", "target", "scores", "patient", "slice"]
        direction = {name: getattr(study, name) for name in ("trained_on", "tested_on") if study.trained_on is not None}
        table = pq.read_table(
            path, columns=columns, filters=[(name, "==", value) for name, value in direction.items()] or None
        )
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read; delete the folder of the task and rerun the same command") from error
    numbers = {name: number for number, name in enumerate(study.classes)}
    lines = table.to_pylist()
    found = {}
    for backbone in dict.fromkeys(score.backbone for score in scores if score.backbone != MAJORITY):
        head = comparison.chosen_head(scores, backbone)
        own = [
            line for line in lines if (line["backbone"], line["head"], line["labels"]) == (backbone, head, ALL_LABELS)
        ]
        if own:
            targets = np.array([numbers.get(line["target"], len(numbers)) for line in own])
            found[backbone] = curves.Predictions(
                study.classes, targets, np.array([line["scores"] for line in own], float),
                np.array([line["patient"] for line in own]), np.array([line["slice"] for line in own]),
            )  # fmt: skip
    return found
