"""index.html, the dataset card for people: complete in itself, without scripts, and well-formed XML."""

import base64
import collections
import hashlib
import html
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipeline.format.files import Json
from data_pipeline.stages import advice, pseudonyms
from data_pipeline.stages.card import Card, most_first
from data_pipeline.stages.card_examples import SIDE, vendor

CLASSES_SHOWN = 40  # of a label
NUMBERS_SHOWN = 12  # of a label of numbers; of one with more the range is shown
REASONS_SHOWN = 100
SHARDS_SHOWN = 1000
UNITS = {"HU": "Hounsfield units", "arbitrary": "units of its own"}
MODALITIES = {"OT": "modality not known"}
EVIDENCE_IN_WORDS = {
    "proved": "the pixels agree with it", "declared": "the header says so, the pixels neither agree nor disagree",
    "guessed": "modality or unit is inferred from the values",
}  # fmt: skip

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2530; --dim: #5c6875; --line: #d7dde3; --bar: #2f6f9f; --ground: #fff; --card: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --dim: #98a4b0; --line: #36414c; --bar: #6aa9d8; --ground: #14191e; --card: #1d242b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); }
h1 { font-size: 1.6rem; margin: .5rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption, .dim { color: var(--dim); } p { max-width: 44rem; margin: .5rem 0; }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; padding: 0; margin: 1rem 0; }
.key div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; } .key dt { color: var(--dim); font-size: .85rem; }
.key dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem 2rem; }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; } details { margin: 1rem 0; } th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding-right: 0; padding-left: .6rem; }
td.bar { width: 40%; min-width: 4rem; vertical-align: middle; } td.bar div { background: var(--bar); height: .7rem; border-radius: .2rem; min-width: 2px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; }
figure { margin: 0; } figcaption { font-size: .78rem; line-height: 1.3; padding-top: .25rem; }
.zoom { display: block; cursor: zoom-in; } .zoom input { position: absolute; opacity: 0; } .zoom img { width: 100%; height: auto; display: block; background: #000; border-radius: .3rem; }
.zoom input:focus-visible + img { outline: 3px solid var(--bar); }
.zoom input:checked + img { position: fixed; inset: 0; z-index: 1; width: 100vw; height: 100vh; object-fit: contain; border-radius: 0; cursor: zoom-out; }
svg { width: 100%; height: auto; } svg rect { fill: var(--bar); } svg line { stroke: var(--line); } svg text { fill: var(--dim); font-size: 12px; }
code { font-size: .85rem; overflow-wrap: anywhere; } summary { cursor: pointer; }
"""


def page(card: Card, examples: Sequence[tuple[bytes, str]]) -> str:
    """The page.

    Args:
      examples: JPEG files with their captions.
    """
    parts = [
        _title(card), _key_figures(card), _kinds(card), _splits(card), _labels(card), _examples(examples), _slices(card),
        _intensities(card["intensity"]), _files(card), _held_out(card), _making(card),
    ]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8" />'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />'
        f"<title>{_text(card['name'])}: dataset card</title><style>{_STYLE}</style></head><body>"
        + "\n".join(part for part in parts if part) + "</body></html>\n"
    )  # fmt: skip


# ---- building blocks


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _size(count: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def _table(caption: str, head: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns first, then numbers; cells are markup."""
    top = "".join(f"<th>{h}</th>" for h in head) + "".join(f'<th class="n">{h}</th>' for h in numbers)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{c}</td>" if n < len(head) else f'<td class="n">{c}</td>' for n, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    title = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _bars(title: str, counts: Mapping[str, int], *, ordered: bool = False) -> str:
    largest = max(counts.values(), default=1)
    rows = "".join(
        f'<tr><td>{_text(name or "unknown")}</td><td class="bar"><div style="width:{100 * n / largest:.1f}%"></div></td>'
        f'<td class="n">{n:,}</td></tr>'
        for name, n in (counts if ordered else most_first(counts)).items()
    )
    return f'<div class="scroll"><table><caption>{_text(title)}</caption><tbody>{rows}</tbody></table></div>'


# ---- parts of the page


def _title(card: Card) -> str:
    sources = ", ".join(card["sources"])
    return (
        f"<h1>{_text(card['name'])}</h1><p>Slices of CT and MR exams for pretraining. Built on {_text(card['built'])} by Curia JAX "
        f"{_text(card['version'])}{_text(f' from {sources}') if sources else ''}.</p>"
    )


def without_patient(card: Card) -> str:
    """Studies, series and files that name no patient, in words; "" if there are none."""
    words = {"study": ("study", "studies"), "series": ("series", "series"), "file": ("file", "files")}
    counts = {name: card["patients_from"].get(name, 0) for name in words}
    said = " and ".join(f"{n:,} {words[name][n > 1]}" for name, n in counts.items() if n)
    return f"no patient is named for {said}; each counts as a patient of its own" if said else ""


def _key_figures(card: Card) -> str:
    figures = {
        "slices": f"{card['slices']:,}", "series": f"{card['series']:,}", "patients": f"{card['patients']:,}",
        "in shards": _size(card["bytes"]), "bytes per slice": f"{card['bytes'] / max(card['slices'], 1):,.0f}",
    }  # fmt: skip
    said = without_patient(card)
    note = f"<p>Patients are not known everywhere: {said}.</p>" if said else ""
    cells = "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in figures.items())
    return f'<dl class="key">{cells}</dl>{note}'


def _kinds(card: Card) -> str:
    rows = []
    for kind in card["kinds"]:
        evidence = ", ".join(f"{name} {n:,}" for name, n in kind["series_by_units_evidence"].items())
        inferred = f"{kind['modality_inferred']:,}" if kind["modality_inferred"] else "none"
        rows.append((
            _text(MODALITIES.get(kind["modality"], kind["modality"])), _text(UNITS.get(kind["units"], kind["units"])),
            _text(evidence), f"{kind['slices']:,}", f"{kind['series']:,}", inferred,
        ))  # fmt: skip
    found = {name for kind in card["kinds"] for name, n in kind["series_by_units_evidence"].items() if n}
    meaning = "; ".join(f"{name}: {words}" for name, words in EVIDENCE_IN_WORDS.items() if name in found)
    head = ("modality", "values are in", "how the unit is known (series)")
    return "<h2>What the values mean</h2>" + _table("", head, ("slices", "series", "slices whose modality is guessed"), rows) + (
        f"<p>{_text(meaning[:1].upper() + meaning[1:])}.</p>" if meaning else ""
    ) + (f"<p>Left out because the pixels contradict the unit: {_text(said)}.</p>" if (said := refused_units(card)) else "")  # fmt: skip


def refused_units(card: Card) -> str:
    """What was left out because its values are not in the unit that its header says, in words; "" if nothing was."""
    series, slices = card["units_refused"]["series"], card["units_refused"]["slices"]
    whole = f", {series:,} whole series among them" if series else ""
    return f"{slices:,} slice{'s' if slices != 1 else ''}{whole}" if slices else ""


def _splits(card: Card) -> str:
    shards_of = collections.Counter(shard["split"] for shard in card["shards"])
    rows = [
        (split, f"{card['patients_by_split'][split]:,}", f"{n:,}", f"{shards_of[split]:,}")
        for split in pseudonyms.SPLITS
        if (n := card["slices_by"]["split"].get(split, 0))
    ]
    return "<h2>Splits</h2>" + _table("", ("split",), ("patients", "slices", "shards"), rows)


def _labels(card: Card) -> str:
    """The classes of every label, in slices by split."""
    found = []
    splits = [split for split in pseudonyms.SPLITS if card["slices_by"]["split"].get(split)]
    for name, label in card["labels"].items():
        total = sum(label["slices"].values())
        low, high = label.get("range", (None, None))
        if low is not None and len(label.get("classes", ())) not in range(1, NUMBERS_SHOWN + 1):
            by_split = ", ".join(f"{n:,} in {split}" for split, n in label["slices"].items())
            found.append(f"<p><b>{_text(name)}</b>: numbers from {low:g} to {high:g}; slices: {by_split}.</p>")
            continue
        if "classes" not in label:
            found.append(f"<p><b>{_text(name)}</b>: more values than classes have, for {total:,} slices.</p>")
            continue
        rows = [
            (_text(value), *(f"{slices.get(split, 0):,}" for split in splits))
            for value, slices in label["classes"].items()
        ]
        more = (
            f"<p>and {len(rows) - CLASSES_SHOWN:,} more classes, see card.json</p>" if len(rows) > CLASSES_SHOWN else ""
        )
        none = f"{card['slices'] - total:,}" if total < card["slices"] else "no"
        found.append(
            f"<div>{_table(_text(name), ('class',), splits, rows[:CLASSES_SHOWN])}{more}<p>{none} slices without a label.</p></div>"
        )
    return f'<h2>Labels</h2><div class="wide grid">{"".join(found)}</div>' if found else ""


def _examples(examples: Sequence[tuple[bytes, str]]) -> str:
    if not examples:
        return ""
    figures = "".join(
        f'<figure><label class="zoom"><input type="checkbox" aria-label="enlarge" /><img src="data:image/jpeg;base64,'
        f'{base64.b64encode(data).decode()}" width="{SIDE}" height="{SIDE}" alt="{_text(caption)}" /></label>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
        for data, caption in examples
    )
    return (
        "<h2>Examples</h2><p>The middle slice of a series each, of different patients and scanners where there are several. "
        f'A click enlarges one, another click closes it.</p><div class="sheet">{figures}</div>'
    )


def _slices(card: Card) -> str:
    """Bars by property; a property with a single value is a sentence."""
    titles = {"plane": "Plane", "body_part": "Body part", "manufacturer": "Vendor"}
    by = card["slices_by"]
    by = by | {"manufacturer": {vendor(name) or name: count for name, count in by["manufacturer"].items()}}
    parts = [(title, by[name], False) for name, title in titles.items()]
    parts += [(f"Spacing {name}, mm", counts, True) for name, counts in card["spacing_mm"].items()]
    parts.append(("Longer side, px", card["longer_side_px"], True))
    single = [f"{title}: {next(iter(counts)) or 'unknown'}" for title, counts, _ in parts if len(counts) == 1]
    sentence = (
        f"<p>Of all slices: {_text('; '.join(one[:1].lower() + one[1:] for one in single))}.</p>" if single else ""
    )
    bars = [_bars(title, counts, ordered=ordered) for title, counts, ordered in parts if len(counts) > 1]
    return f'<h2>Slices</h2>{sentence}<div class="grid">{"".join(bars)}</div>'


def _intensities(intensity: Json) -> str:
    captions = {
        "HU": "Pixels by HU, logarithmic",
        "relative": "Pixels of values in other units, logarithmic; 0 is the series' 0.5 percentile, 1 its 99.5 percentile",
    }
    ticks = {"HU": (0, 1000, 2000), "relative": (0.0, 0.5, 1.0)}
    charts = []
    for kind, histogram in intensity.items():
        edges, counts = histogram["edges"], np.asarray(histogram["pixels"], np.float64)
        heights = np.log10(1 + counts)
        heights = 120 * heights / heights.max()
        width = 480 / len(counts)
        rects = "".join(
            f'<rect x="{n * width:.2f}" y="{130 - h:.2f}" width="{width * 0.9:.2f}" height="{h:.2f}" />'
            for n, h in enumerate(heights)
            if h > 0
        )
        labels = "".join(
            f'<text x="{480 * (tick - edges[0]) / (edges[-1] - edges[0]):.1f}" y="146" text-anchor="middle">{tick:g}</text>'
            for tick in ticks[kind]
        )
        charts.append(
            f'<figure><svg viewBox="0 0 480 150" role="img" aria-label="{_text(captions[kind])}">{rects}<line x1="0" y1="130" '
            f'x2="480" y2="130" />{labels}</svg><figcaption>{_text(captions[kind])}</figcaption></figure>'
        )
    return f'<h2>Intensities</h2><div class="grid">{"".join(charts)}</div>' if charts else ""


def _files(card: Card) -> str:
    total = sum(card["files"].values())
    rows = [("kept", _text(reason), "", f"{n:,}") for reason, n in card["reasons"]["kept"].items()]
    for one in advice.commonest(card["reasons"], REASONS_SHOWN):
        rows.append((one.fate, _text(one.reason), _text(one.what), f"{one.files:,}"))
    counts = ", ".join(f"{n:,} {fate}" for fate, n in card["files"].items() if n)
    slices = [(_text(rule), f"{n:,}") for rule, n in card["slices_left_out"].items()]
    near = card["near_duplicates"]
    alike = (
        f"<p>Series that look like another one (reported, kept): {near['series']:,}, of which {near['of another patient']:,} like "
        f"one of another patient and {near['in another split']:,} like one in another split.</p>"
        if near["series"] else "<p>No series looks like another one.</p>"
    )  # fmt: skip
    return (
        f"<h2>Files</h2><p>{total:,} input files: {counts}. A kept file with a reason is flagged and in the dataset.</p>"
        + (_table("", ("fate", "reason", "what to do"), ("files",), rows) if rows else "")
        + (_table("Slices left out of files that could be read", ("rule",), ("slices",), slices) if slices else "")
        + alike
    )


def _held_out(card: Card) -> str:
    held = card.get("held_out")
    if not held:
        return ""
    unmatched = ", ".join(str(n) for n in held["unmatched_lines"][:20]) + (
        " …" if len(held["unmatched_lines"]) > 20 else ""
    )
    return (
        f"<h2>Held out</h2><p>{held['lines']:,} lines name patients or folders to keep out; {held['matched']:,} of them match "
        f"these inputs, {held['files']:,} files were left out for it."
        + (f" Lines that match nothing: {unmatched}." if unmatched else "")
        + f" Slices of held-out patients in the dataset: {held['slices_found']:,}.</p>"
    )


_SAID = {None: "as acquired", False: "no", True: "yes"}


def _making(card: Card) -> str:
    settings = [
        (_text(name.replace("_", " ")), _text(_SAID.get(v, v) if v is None or isinstance(v, bool) else v))
        for name, v in card["settings"].items()
    ]
    settings.append(("codec", _text(card["codec"])))
    rows = [
        (f"<code>{_text(s['file'])}</code>", f"{s['slices']:,}", _size(s["bytes"]), f"<code>{s['sha256'][:16]}</code>")
        for s in card["shards"]
    ]
    shown = rows[:SHARDS_SHOWN]
    more = f"<p>and {len(rows) - len(shown):,} more, see card.json</p>" if len(rows) > len(shown) else ""
    digest = hashlib.sha256("".join(s["sha256"] for s in card["shards"]).encode()).hexdigest()[:16]
    return (
        "<h2>How it was made</h2>" + _table("", ("setting", "value"), (), settings)
        + f"<details><summary>{len(rows):,} shards, together {digest}</summary>"
        + _table("", ("file",), ("slices", "size", "SHA-256"), shown) + more + "</details>"
        + "<p>Identities are replaced by keyed hashes; neither this page nor the shards hold a name or a date of the exams. "
        "Heads can be recognised by their faces, so keep the dataset as private as the exams.</p>"
    )  # fmt: skip
