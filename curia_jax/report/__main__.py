"""Writes one self-contained report.html of a run: loss, reconstructed slices, scores, throughput, artefacts.

The pictures are embedded, and lie as PNG beside the report in <name>_pictures/. Nothing is loaded from a network, and
neither file names, paths of exams, patients nor series are shown.
"""

import argparse
import base64
import datetime
import html
import io
import json
import math
import platform
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

SPLITS = ("train", "validation", "test")
METRICS = {"auroc": "AUROC", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
BACKBONES = {"checkpoint": "checkpoint", "random": "random encoder", "pixels": "pixels", "none": "no image"}
MODALITIES = {
    "CT": "each slice in the window named below it (centre/width in HU).",
    "MR": "each slice between its own 0.5 and 99.5 percentile.",
}
LAYOUTS = {
    "vit_mae": "ViTMAEForPreTraining of transformers", "vit": "ViTModel of transformers",
    "dinov2": "Dinov2Model of transformers", "timm": "timm",
}  # fmt: skip
_PACKAGES = ("curia-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scikit-learn")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m curia_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""example:
  python -m curia_jax.report --run=demo/run --shards=demo/shards --results=demo/results.json --output=report.html""",
    )
    parser.add_argument("--run", required=True, help="work directory of curia_jax.pretrain")
    parser.add_argument("--shards", required=True, help="folder that data_pipeline.build wrote")
    parser.add_argument("--results", required=True, help="rows that curia_jax.evaluate --json wrote")
    parser.add_argument("--weights", help="folder with the layouts that curia_jax.convert wrote")
    parser.add_argument("--timeline", help="what was run and how long it took, as curia_jax.demo writes it (JSON)")
    parser.add_argument("--title", default="A masked autoencoder of CT and MR slices", help="headline")
    parser.add_argument("--output", required=True, help="HTML file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    from curia_common.errors import UserError

    try:
        build_report(
            run=args.run, shards=args.shards, results=args.results, output=args.output,
            weights=args.weights, timeline=args.timeline, title=args.title,
        )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {args.output}", file=sys.stderr)
    return 0


def build_report(
    *,
    run: str,
    shards: str,
    results: str,
    output: str,
    weights: str | None = None,
    timeline: str | None = None,
    title: str = "A masked autoencoder of CT and MR slices",
) -> Path:
    """Writes the report and its pictures.

    Args:
      run, shards, results, weights, timeline: what other commands wrote; see `parse`.
      output: HTML file.

    Returns:
      The HTML file.

    Raises:
      UserError: the run has no log or checkpoint, or a file is missing or is no JSON.
    """
    import ml_collections
    import pyarrow.parquet as pq

    from curia_jax import checkpoint
    from curia_jax.evaluate import features, labels
    from curia_jax.report import pictures
    from data_pipeline.format.shards import SliceSource

    # ---- what there is
    lines, events = _json_lines(Path(run, "metrics.jsonl")), _json_lines(Path(run, "events.jsonl"))
    rows, story = _json(results), _json(timeline) if timeline else {}
    index = labels.read_index(shards)
    manifest = pq.read_table(Path(shards, "manifest.parquet"))
    loaded = checkpoint.load(run)
    model = features.model(loaded.config["model"], loaded.params)
    settings = ml_collections.ConfigDict(loaded.config["augment"])

    # ---- pictures
    file = Path(output)
    folder = file.with_name(f"{file.stem}_pictures")
    folder.mkdir(parents=True, exist_ok=True)
    stops = [int(event["examples_seen"]) for event in events if event["event"] == "resumed"]
    drawn = {"loss": pictures.loss_curve(lines, stops), "throughput": pictures.throughput(lines, stops)}
    # Slices that no training has seen, if there are any.
    splits = set(index.column("split").to_pylist())
    split = next(name for name in reversed(SPLITS) if name in splits)
    source = SliceSource(shards, split)
    for modality in MODALITIES:
        chosen = pictures.choose_slices(source, modality, 3)
        if len(chosen):
            examples = pictures.reconstruct(source, chosen, model, loaded.params, settings)
            drawn[modality] = pictures.reconstructions(examples)
    if any(row["metric"] == "auroc" for row in rows):
        drawn["scores"] = pictures.forest(rows, "auroc")
    images = {name: _save(figure, folder / f"{name.lower()}.png") for name, figure in drawn.items()}

    # ---- text
    started = next(event for event in events if event["event"] == "started")
    artefacts = [
        (Path(shards), "slice shards (a TFDS dataset over ArrayRecord), index.parquet, manifest.parquet"),
        (Path(run), "work directory: checkpoints, metrics.jsonl, events.jsonl, TensorBoard events, config.json"),
        *((path, f"safetensors for {LAYOUTS.get(path.name, path.name)}") for path in _folders(weights)),
        (Path(results), "scores"),
        (folder, "the pictures of this page"),
        (file, "this page"),
    ]
    parts = [
        _key_figures(lines, rows, index, started, story),
        _reconstruction_part(images, loaded.config, split),
        _loss_part(images["loss"], lines[-1], loaded.config["model"], started),
        _score_part(images.get("scores"), rows, story.get("not_probed", {})),
        _data_part(index, manifest),
        _run_part(images["throughput"], lines, events, started),
        _time_part(story),
        _artefact_part(artefacts),
        _next_part(story.get("next", ())),
    ]
    file.write_text(_page(title, parts, lines, loaded.step), encoding="utf-8")
    return file


def _folders(parent: str | None) -> list[Path]:
    return sorted(path for path in Path(parent).iterdir() if path.is_dir()) if parent else []


def _json_lines(path: Path) -> list[dict[str, Any]]:
    from curia_common.errors import UserError

    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}; --run takes the work directory of curia_jax.pretrain")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    if not lines:
        raise UserError(f"{path} is empty: the run has not taken a step yet")
    return lines


def _json(path: str) -> Any:
    from curia_common.errors import UserError

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON file: {error}") from None


def _save(figure: Any, path: Path) -> str:
    """Writes a figure as PNG and returns it as an <img> source."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=190, metadata={"Software": None})
    path.write_bytes(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# ---- parts of the page, in their order


def _key_figures(lines: Sequence[Row], rows: Sequence[Row], index: Any, started: Row, story: Row) -> str:
    last = lines[-1]
    patients = len(set(index.column("patient").to_pylist()))
    cards = [
        (f"{index.num_rows:,}", f"slices of {_count(patients, 'patient')}"),
        (f"{int(last['examples_seen']):,}", f"examples seen in {int(last['step']):,} steps"),
        (f"{last['loss']:.3f}", f"loss; predicting each patch's mean gives {last['baseline_loss']:.3f}"),
    ]
    cards += [
        (f"{row['value']:.3f}", f"AUROC {_interval(row)} for {row['task']}, {row['head']} probe")
        for row in _headline_rows(rows)[:2]
    ]
    if rate := _rate(lines):
        cards.append((f"{rate:,.0f}/s", f"images trained on, {_device(started)}"))
    if story:
        seconds = sum(stage["seconds"] for stage in story["stages"].values())
        cards.append((_duration(seconds), f"for everything on this page, on {story['cores']} CPU cores"))
    items = "".join(f"<li><b>{_text(value)}</b><span>{_text(label)}</span></li>" for value, label in cards)
    return f'<ul class="figures">{items}</ul>'


def _headline_rows(rows: Sequence[Row]) -> list[Row]:
    """For each task, the checkpoint's AUROC with the head that was best on the validation cases."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["metric"] != "auroc" or row["backbone"] != "checkpoint" or row["value"] is None:
            continue
        held = best.get(row["task"])
        if held is None or (row["selection_auroc"] or 0) > (held["selection_auroc"] or 0):
            best[row["task"]] = row
    return list(best.values())


def _reconstruction_part(images: Mapping[str, str], config: Mapping[str, Any], split: str) -> str:
    shown = [modality for modality in MODALITIES if modality in images]
    if not shown:
        return ""
    model = config["model"]
    whose = f"slices of {split} patients, whom no training has seen" if split != "train" else "slices it was trained on"
    text = f"The encoder sees {1 - model['mask_ratio']:.0%} of the patches, chosen at random, and the decoder fills in "
    text += f"the rest. Shown are {whose}."
    note = "De-normalised for display: predictions are turned back from the normalised scale into real units."
    if model["norm_pix"]:
        note = (
            "De-normalised for display: the model predicts each patch with its mean and contrast taken out (norm_pix), "
            "and both are put back from the original patch. Judge edges and texture; a patch's grey level is not "
            "predicted."
        )
    figures = [
        _figure(images[name], f"{name}: {MODALITIES[name]} {note}", f"{name} slices: input, masked, reconstructed")
        for name in shown
    ]
    return f"<h2>What the model fills in</h2><p>{_text(text)}</p>{''.join(figures)}"


def _loss_part(image: str, last: Row, model: Mapping[str, Any], started: Mapping[str, Any]) -> str:
    size, patch = ("×".join(map(str, model[name])) for name in ("image_size", "patch_size"))
    below = 1 - last["loss"] / last["baseline_loss"]
    against = f"{below:.0%} below" if below > 0 else "no better than"
    text = (
        f"ViT-{model['size']}, {started['parameters'] / 1e6:.1f} M parameters with the decoder, patches of {patch} px "
        f"on images of {size} px. The loss, the mean squared error over masked patches, ends at {last['loss']:.3f}, "
        f"{against} the {last['baseline_loss']:.3f} of predicting each patch's mean."
    )
    return f"<h2>Loss</h2><p>{_text(text)}</p>{_figure(image, '', 'loss over examples seen')}"


def _score_part(image: str | None, rows: Sequence[Row], not_probed: Mapping[str, str]) -> str:
    parts = ["<h2>What the features know</h2>"]
    if rows:
        first = rows[0]
        text = (
            "Frozen features of the encoder, of the same encoder with random weights, and of the pixels, each under "
            "the same probes. Settings were chosen on validation patients, or by cross-validation over patients where "
            "those do not cover every class; the test patients were scored once. Intervals: "
            f"{first['interval']}, {first['draws']:,} draws, seed {first['seed']}. Differences are paired: both models "
            "meet the same resampled patients."
        )
        parts.append(f"<p>{_text(text)}</p>")
    else:
        parts.append("<p>No label of these shards could be probed.</p>")
    parts += [f"<p>Not probed: {_text(name)}, because {_text(why)}.</p>" for name, why in not_probed.items()]
    if image:
        caption = "Points with 95 % intervals by task; on the right, the checkpoint minus the others."
        parts.append(_figure(image, caption, "AUROC with intervals"))
    for task in dict.fromkeys(row["task"] for row in rows):
        parts.append(_score_table([row for row in rows if row["task"] == task]))
    return "".join(parts)


def _score_table(rows: Sequence[Row]) -> str:
    first = rows[0]
    classes = first["classes"] if len(first["classes"]) <= 12 else [*first["classes"][:12], "…"]
    learned = f"{first['train_n']:,} slices of {_count(first['train_patients'], 'patient')}"
    units = "slices" if first["unit"] == "slice" else "series"
    caption = (
        f"{first['task']}: {len(first['classes'])} classes ({', '.join(classes)}). Learned from {learned}, tested on "
    )
    caption += f"{first['n']:,} {units} of {_count(first['patients'], 'patient')}."
    undefined = max(row["degenerate_draws"] for row in rows)
    if undefined:
        caption += f" Up to {undefined:,} of {first['draws']:,} draws held a single class and are left out."
    if first["classes_not_learned"]:
        caption += f" Only in the test, counted as wrong: {', '.join(first['classes_not_learned'])}."

    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        name = f"{row['backbone']} − {row['against']}" if row.get("against") else BACKBONES[row["backbone"]]
        lines.setdefault((name, row["head"]), {})[row["metric"].removesuffix("_difference")] = row
    body, previous = [], None
    for (name, head), by_metric in lines.items():
        style = ("ours " if name == BACKBONES["checkpoint"] else "") + ("first" if name != previous else "")
        previous = name
        cells = [_number(f"{_value(row)} <small>{_interval(row)}</small>") for row in by_metric.values()]
        body.append(f'<tr class="{style}">{_cell(name)}{_cell(head)}{"".join(cells)}</tr>')
    columns = [METRICS[metric] for metric in next(iter(lines.values()))]
    return _table(caption, ["features", "probe"], columns, body)


def _value(row: Row) -> str:
    sign = "+" if row["metric"].endswith("_difference") else ""
    return "undefined" if row["value"] is None else format(row["value"], f"{sign}.3f")


def _interval(row: Row) -> str:
    if row["low"] is None:
        return "[no interval]"
    sign = "+" if row["metric"].endswith("_difference") else ""
    return "[" + ", ".join(format(row[end], f"{sign}.3f") for end in ("low", "high")) + "]"


def _data_part(index: Any, manifest: Any) -> str:
    columns = {name: index.column(name).to_pylist() for name in ("split", "modality", "patient", "series")}
    body = []
    for split in dict.fromkeys([*(s for s in SPLITS if s in columns["split"]), *sorted(columns["split"])]):
        rows = [i for i, name in enumerate(columns["split"]) if name == split]
        numbers = [len({columns[name][i] for i in rows}) for name in ("patient", "series")] + [len(rows)]
        kinds = Counter(columns["modality"][i] for i in rows)
        modalities = ", ".join(f"{name} {number:,}" for name, number in sorted(kinds.items()))
        body.append(f"<tr>{_cell(split)}{_cell(modalities)}{''.join(_number(f'{n:,}') for n in numbers)}</tr>")
    splits = _table("Split by patient.", ["split", "slices by modality"], ["patients", "series", "slices"], body)

    fates = Counter(zip(manifest.column("fate").to_pylist(), manifest.column("reason").to_pylist(), strict=True))
    order = sorted(fates.items(), key=lambda item: (item[0][0] != "kept", item[0][0], -item[1]))
    shown, rest = order[:20], sum(number for _, number in order[20:])
    if rest:
        shown.append((("other", "see manifest.parquet"), rest))
    body = [f"<tr>{_cell(fate)}{_cell(reason or '')}{_number(f'{n:,}')}</tr>" for (fate, reason), n in shown]
    caption = f"What became of each of the {manifest.num_rows:,} input files."
    return f"<h2>From exams to shards</h2>{splits}{_table(caption, ['fate', 'why'], ['files'], body)}"


def _run_part(image: str, lines: Sequence[Row], events: Sequence[Row], started: Mapping[str, Any]) -> str:
    parts = ["<h2>The run</h2>"]
    stop = None
    for event in events:
        if event["event"] == "preempted":
            stop = event
        elif event["event"] == "resumed" and stop is not None:
            before, after = int(stop["examples_seen"]), int(event["examples_seen"])
            text = (
                f"A signal interrupted the run at step {int(stop['step']):,}; its state was saved with {before:,} "
                f"examples seen. Started again with the same command {_duration(event['time'] - stop['time'])} later, "
                f"it restored that step and took example number {after:,} next (they are numbered from 0):"
            )
            good = '<span class="good">the very next example.</span>'
            parts.append(f"<p>{_text(text)} {good if before == after else f'not the very next one, {before:,}.'}</p>")
            stop = None
    rate, mfu = _rate(lines), [line["mfu"] for line in lines if "mfu" in line]
    if rate:
        mesh = " × ".join(f"{name} {size}" for name, size in started["mesh"].items())
        text = (
            f"{rate:,.0f} images per second (median) on {_device(started)}, mesh {mesh}: {statistics.median(mfu):.0%} "
            f"model FLOPs utilisation of {started['peak_flops'] / 1e12:,.2f} TFLOP/s ({started['peak_source']})."
        )
        parts.append(f"<p>{_text(text)}</p>{_figure(image, '', 'images per second over examples seen')}")
    return "".join(parts)


def _device(started: Mapping[str, Any]) -> str:
    count, kind = math.prod(started["mesh"].values()), started["device"]
    if kind == "cpu":
        return f"{_count(count, 'simulated CPU device')}"
    return f"{count} × {kind}"


def _time_part(story: Mapping[str, Any]) -> str:
    if not story:
        return ""
    body = []
    for stage in story["stages"].values():
        # The folder of the user's exams may be named after somebody.
        commands = [c.replace(shlex.quote(story["data"]), "FOLDER") if story["data"] else c for c in stage["commands"]]
        code = "<br>".join(f"<code>{_text(command)}</code>" for command in commands)
        seconds = _duration(stage["seconds"]) if stage["done"] else ""
        body.append(f"<tr>{_cell(stage['title'])}<td>{code}</td>{_number(seconds)}</tr>")
    caption = f"On {story['cores']} CPU cores; the largest process took {story['peak_bytes'] / 1e9:.1f} GB of memory."
    return f"<h2>What was run, and what it cost</h2>{_table(caption, ['stage', 'commands'], ['time'], body)}"


def _artefact_part(what: Sequence[tuple[Path, str]]) -> str:
    body = [
        f"<tr><td><code>{_text(str(path))}</code></td>{_cell(text)}{_number(_size(path))}</tr>" for path, text in what
    ]
    return f"<h2>Where everything is</h2>{_table('', ['path', 'what'], ['size'], body)}"


def _next_part(commands: Sequence[Sequence[Any]]) -> str:
    """`commands` are pairs of a purpose and the words to type."""
    if not commands:
        return ""
    items = [
        f"<li>{_text(why[:1].upper() + why[1:])}.<pre>{_text(shlex.join(words))}</pre></li>" for why, words in commands
    ]
    return f'<h2>What to type next</h2><ol class="commands">{"".join(items)}</ol>'


# ---- the page


def _page(title: str, parts: Sequence[str], lines: Sequence[Row], step: int) -> str:
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    now = datetime.datetime.now().astimezone()
    trained = [datetime.datetime.fromtimestamp(line["time"]).astimezone() for line in (lines[0], lines[-1])]
    days = " to ".join(dict.fromkeys(day.strftime("%-d %B %Y") for day in trained))
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES if _version(name))
    lead = f"Trained {days}; step {step:,}; written {now.strftime('%-d %B %Y, %H:%M %Z')}."
    footer = (
        f"Python {platform.python_version()}, {versions}. Made by python -m curia_jax.report. "
        "For research; not a medical device, and no figure here supports a clinical decision."
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
<p class="lead">{_text(lead)}</p>
{"".join(f"<section>{part}</section>" for part in parts if part)}
<footer>{_text(footer)}</footer>
</main>
</body>
</html>
"""


def _figure(source: str, caption: str, alternative: str) -> str:
    text = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{source}" alt="{_text(alternative)}">{text}</figure>'


def _table(caption: str, words: Sequence[str], numbers: Sequence[str], body: Sequence[str]) -> str:
    """A table with columns of words, then columns of numbers."""
    head = "".join(f"<th>{_text(name)}</th>" for name in words)
    head += "".join(f'<th class="number">{_text(name)}</th>' for name in numbers)
    # Above the table, not in it: a wide table scrolls on a phone, its caption should not.
    text = f'<p class="note">{_text(caption)}</p>' if caption else ""
    rows = "".join(body)
    return f'{text}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(text: str) -> str:
    return f"<td>{_text(text)}</td>"


def _number(markup: str) -> str:
    return f'<td class="number">{markup}</td>'


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _rate(lines: Sequence[Row]) -> float | None:
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return statistics.median(rates) if rates else None


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _size(path: Path) -> str:
    if not path.exists():
        return ""
    size = float(
        sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
    )
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
