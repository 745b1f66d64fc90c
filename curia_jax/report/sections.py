"""The sections of a run's report, in their order on the page; each returns HTML, empty where there is nothing to show.

Neither file names, paths of exams, patients nor series are shown.
"""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from etils import epath

from curia_jax.evaluate import labels
from curia_jax.evaluate.results import CLINICAL, HISTOGRAM, MAJORITY, PIXELS, RANDOM, Score
from curia_jax.models import mae
from curia_jax.report import findings, page
from curia_jax.report.run_log import RunLog
from curia_jax.report.timeline import Timeline

SPLITS = ("train", "validation", "test")
METRICS = {
    "auroc": "AUROC", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "brier": "Brier score",
    "rmse": "RMSE", "mae": "MAE", "r2": "R²", "c_index": "C index",
}  # fmt: skip
BACKBONES = {
    RANDOM: "random encoder",
    PIXELS: "pixels",
    HISTOGRAM: "histogram of the pixels",
    MAJORITY: "no image",
    CLINICAL: "clinical variables",
}
MODALITIES = {
    "CT": "each slice in the window named below it (centre/width in HU).",
    "MR": "each slice between its own 0.5 and 99.5 percentile.",
}
MOST_CLASSES, MOST_FATES = 12, 20  # that are listed


def key_figures(log: RunLog, found: Mapping[str, findings.Finding], index: pa.Table, timeline: Timeline | None) -> str:
    """Tiles: the first finding with its comparisons, then what the training took."""
    cards = []
    if found:
        first = next(iter(found.values()))
        score = first.score
        cards.append(
            (
                score.value_text,
                f"AUROC {score.interval_text} for {score.study.title}, {score.study.patients:,} test {score.study.groups}",
            )
        )
        cards += [
            (
                other.value_text,
                f"{other.interval_text} against {findings.OTHERS.get(other.against or '', other.against)}",
            )
            for other in first.differences
        ]
    last, patients = log.metrics[-1], len(set(index.column("patient").to_pylist()))
    cards += [
        (f"{last.loss:.3f}", f"loss; predicting each patch's mean gives {last.baseline_loss:.3f}"),
        (f"{last.examples_seen:,}", f"examples trained on in {last.step:,} steps"),
        (f"{index.num_rows:,}", f"slices of {_people(patients, index)}"),
    ]
    if rate := log.images_per_second:
        cards.append((f"{rate:,.0f}/s", f"images trained on, {_devices(log)}"))
    if timeline:
        cards.append((page.duration(timeline.seconds), f"for everything on this page, on {timeline.cores} CPU cores"))
    return page.key_figures(cards)


def _people(count: int, index: pa.Table) -> str:
    groups = labels.groups(index)
    return page.count(count, "patient") if groups == "patients" else f"{count:,} {groups}"


def reconstructions(images: Mapping[str, str], model: mae.MAEConfig, split: str) -> str:
    """`images` are sources by modality, `split` that of the slices."""
    shown = [modality for modality in MODALITIES if modality in images]
    if not shown:
        return ""
    seen = f"slices of {split} patients, whom no training has seen" if split != "train" else "slices it was trained on"
    text = (
        f"The encoder sees {1 - model.mask_ratio:.0%} of the patches, chosen at random, and the decoder predicts the rest. "
        f"Shown are {seen}. The reconstruction keeps the visible patches."
    )
    note = "Predictions are converted to real units."
    if model.norm_pix:
        note = (
            "The model predicts each patch with its mean and contrast removed (norm_pix), and both are restored from the "
            "original patch. Judge edges and texture; the grey level of a patch is not predicted."
        )
    figures = [
        page.figure(
            images[name], f"{name}: {MODALITIES[name]} {note}", f"{name} slices: input, visible patches, reconstructed"
        )
        for name in shown
    ]
    return f"<h2>What the model fills in</h2>{page.paragraph(text)}{''.join(figures)}"


def loss(image: str, log: RunLog, model: mae.MAEConfig) -> str:
    last, size = log.metrics[-1], "×".join(map(str, model.encoder.image_size))
    below = 1 - last.loss / last.baseline_loss
    against = f"{below:.0%} below" if below > 0 else "no better than"
    text = (
        f"{model.encoder.describe()}, {log.setup.parameters / 1e6:.1f} M parameters with the decoder, on images of {size} px. "
        f"The loss, the mean squared error over masked patches, ends at {last.loss:.3f}, {against} the "
        f"{last.baseline_loss:.3f} of predicting each patch's mean."
    )
    return f"<h2>Loss</h2>{page.paragraph(text)}{page.figure(image, '', 'loss over examples seen')}"


def scores(
    image: str | None,
    scores: Sequence[Score],
    found: Mapping[str, findings.Finding],
    not_probed: Mapping[str, str],
    about: str = "",
    control: str = "",
) -> str:
    """What the scores show, then the scores.

    Args:
      about: what the tasks are.
      control: what the probes make of shuffled labels.
    """
    parts = ["<h2>What pretraining brought</h2>", *([page.paragraph(about)] if about else [])]
    parts += [page.paragraph(finding.sentence) for finding in found.values()]
    parts += [page.paragraph(control)] if control else []
    if image:
        caption = "AUROC with 95 % intervals by task; on the right, the first backbone minus the others."
        parts.append(page.figure(image, caption, "AUROC with intervals"))
    if scores:
        study = scores[0].study
        intervals = "; ".join(dict.fromkeys(score.study.interval for score in scores))
        parts.append(
            page.paragraph(
                "Method: frozen features of the encoder, of the same encoder with random weights, the pixels and their histogram, "
                "each with the same probes. Settings were chosen on the validation split, or by cross-validation where that lacks a class; "
                f"the test split was scored once. Intervals: {intervals}, {study.draws:,} draws, seed {study.seed}. "
                "Differences are paired: both models are scored on the same draws."
            )
        )
    else:
        parts.append("<p>No label of these shards could be probed.</p>")
    parts += [page.paragraph(f"Not probed: {name}, because {reason}.") for name, reason in not_probed.items()]
    for title in dict.fromkeys(score.study.title for score in scores):
        parts.append(score_table([score for score in scores if score.study.title == title]))
    return "".join(parts)


def score_table(scores: Sequence[Score]) -> str:
    """All heads and backbones of a task or of one of its directions, and their differences."""
    scores = [score for score in scores if not score.is_across]
    study = scores[0].study
    classes = [*study.classes[:MOST_CLASSES], *(["…"] if len(study.classes) > MOST_CLASSES else [])]
    units = "slices" if study.unit == "slice" else "series"
    kind = f"{len(study.classes)} classes ({', '.join(classes)})" if classes else "a value"
    caption = (
        f"{study.title}: {kind}. Learned from {study.train_n:,} slices of "
        f"{study.count_groups(study.train_patients)}, tested on {study.n:,} {units} of "
        f"{study.count_groups(study.patients)}."
    )
    if undefined := max(score.degenerate_draws for score in scores):
        caption += f" Up to {undefined:,} of {study.draws:,} draws held a single class and are left out."
    if study.classes_not_learned:
        caption += f" Only in the test, counted as wrong: {', '.join(study.classes_not_learned)}."

    if study.in_corpus is not None:
        first = f": {', '.join(study.in_corpus_first)}{' …' if study.in_corpus > len(study.in_corpus_first) else ''}"
        caption += (
            f" {page.count(study.in_corpus, 'test image')} in the pretraining corpus{first if study.in_corpus else ''}."
        )

    lines: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        own = BACKBONES.get(score.backbone, score.backbone)
        name = f"{own} − {BACKBONES.get(score.against, score.against)}" if score.against else own
        lines.setdefault((name, score.head), {})[score.metric] = score
    rows, previous, ours = [], None, findings.first_backbone(scores)
    for (name, head), by_metric in lines.items():
        style = ("ours " if name == ours else "") + ("first" if name != previous else "")
        previous = name
        cells = [page.number(score.value_text, score.interval_text) for score in by_metric.values()]
        rows.append(page.row(page.cell(name), page.cell(head), *cells, style=style))
    columns = [METRICS[metric] for metric in next(iter(lines.values()))]
    return page.table(caption, ["features", "probe"], columns, rows)


def dataset(index: pa.Table, manifest: pa.Table) -> str:
    columns = {name: index.column(name).to_pylist() for name in ("split", "modality", "patient", "series")}
    rows = []
    for split in dict.fromkeys([*(s for s in SPLITS if s in columns["split"]), *sorted(columns["split"])]):
        own = [i for i, name in enumerate(columns["split"]) if name == split]
        numbers = [len({columns[name][i] for i in own}) for name in ("patient", "series")] + [len(own)]
        kinds = Counter(columns["modality"][i] for i in own)
        modalities = ", ".join(f"{name} {number:,}" for name, number in sorted(kinds.items()))
        rows.append(page.row(page.cell(split), page.cell(modalities), *(page.number(f"{n:,}") for n in numbers)))
    groups = labels.groups(index)
    by = "patient" if groups == "patients" else groups
    splits = page.table(
        f"Split by {by}.", ["split", "slices by modality"], [groups.split(" (")[0], "series", "slices"], rows
    )

    fates = Counter(zip(manifest.column("fate").to_pylist(), manifest.column("reason").to_pylist(), strict=True))
    order = sorted(fates.items(), key=lambda item: (item[0][0] != "kept", item[0][0], -item[1]))
    shown, rest = order[:MOST_FATES], sum(number for _, number in order[MOST_FATES:])
    if rest:
        shown.append((("other", "see manifest.parquet"), rest))
    rows = [page.row(page.cell(fate), page.cell(reason or ""), page.number(f"{n:,}")) for (fate, reason), n in shown]
    caption = f"What became of each of the {manifest.num_rows:,} input files."
    return f"<h2>From exams to shards</h2>{splits}{page.table(caption, ['fate', 'why'], ['files'], rows)}"


def run(image: str, log: RunLog) -> str:
    parts, stop = ["<h2>The run</h2>"], None
    for event in log.events:
        if event.event == "preempted":
            stop = event
        elif event.event == "resumed" and stop is not None:
            text = (
                f"A signal interrupted the run at step {stop.step:,}; its state was saved with {stop.examples_seen:,} "
                f"examples seen. Restarted with the same command {page.duration(event.time - stop.time)} later, it "
                f"restored that step and took example number {event.examples_seen:,} next (numbered from 0):"
            )
            verdict = '<span class="good">the very next example.</span>'
            if event.examples_seen != stop.examples_seen:
                verdict = f"not the next one, {stop.examples_seen:,}."
            parts.append(f"<p>{page.escape(text)} {verdict}</p>")
            stop = None
    if (rate := log.images_per_second) and (mfu := log.mfu) is not None:
        mesh = " × ".join(f"{name} {size}" for name, size in log.setup.mesh.items())
        text = (
            f"{rate:,.0f} images per second (median) on {_devices(log)}, mesh {mesh}: {mfu:.0%} model FLOPs utilisation of "
            f"{log.setup.peak_flops / 1e12:,.2f} TFLOP/s ({log.setup.peak_source})."
        )
        parts.append(f"{page.paragraph(text)}{page.figure(image, '', 'images per second over examples seen')}")
    return "".join(parts)


def _devices(log: RunLog) -> str:
    if log.setup.device == "cpu":
        return page.count(log.devices, "simulated CPU device")
    return f"{log.devices} × {log.setup.device}"


def stages(timeline: Timeline | None) -> str:
    """What was run, and how long it took."""
    if timeline is None:
        return ""
    rows = []
    for stage in timeline.stages.values():
        # The folder of the user's exams may contain a name.
        data = shlex.quote(timeline.data) if timeline.data else None
        commands = [command.replace(data, "FOLDER") if data else command for command in stage.commands]
        seconds = page.duration(stage.seconds) if stage.done else ""
        rows.append(page.row(page.cell(stage.title), page.code(*commands), page.number(seconds)))
    caption = f"On {timeline.cores} CPU cores; the largest process took {timeline.peak_bytes / 1e9:.1f} GB of memory."
    return f"<h2>What was run, and what it cost</h2>{page.table(caption, ['stage', 'commands'], ['time'], rows)}"


def artefacts(files: Sequence[tuple[Path | epath.Path, str]]) -> str:
    """`files` are paths, each with what it holds."""
    rows = [page.row(page.code(str(path)), page.cell(what), page.number(page.file_size(path))) for path, what in files]
    return f"<h2>Where everything is</h2>{page.table('', ['path', 'what'], ['size'], rows)}"


def next_commands(timeline: Timeline | None) -> str:
    if timeline is None or not timeline.next:
        return ""
    items = [
        f"<li>{page.escape(purpose[:1].upper() + purpose[1:])}.<pre>{page.escape(shlex.join(words))}</pre></li>"
        for purpose, words in timeline.next
    ]
    return f'<h2>What to type next</h2><ol class="commands">{"".join(items)}</ol>'
