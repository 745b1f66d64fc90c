"""The dataset card: what is in a dataset and what was left out, for programs (card.json) and people (index.html).

Neither holds a path, a pseudonym or any other identifier. No example slice shows a face: slices that are not axial are
shown only of body parts that are known and do not include the head or neck.
"""

import base64
import collections
import hashlib
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from PIL import Image

from curia_common import __version__
from data_pipeline.format import records, shards
from data_pipeline.format.files import Json
from data_pipeline.format.shards import ShardRow
from data_pipeline.sources.dicom_header import FACES
from data_pipeline.stages import contact_sheet, pseudonyms

COUNTED = ("split", "modality", "units", "plane", "body_part", "manufacturer")
FATES = ("kept", "excluded", "duplicate", "quarantined")
# Of the histograms of intensities. Values that are no HU: 0 is the series' 0.5 percentile, 1 its 99.5 percentile.
EDGES = {"HU": np.arange(-1024, 3073, 32, dtype=np.float64), "relative": np.round(np.linspace(-0.25, 1.5, 71), 6)}
SPACING_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0)  # mm
SIDE_EDGES = (0.0, 64.0, 128.0, 192.0, 256.0, 320.0, 384.0, 512.0, 768.0, 1024.0)  # px
TILE = 160  # px
Card = Json  # the content of card.json


class Holdout(NamedTuple):
    """What became of --holdout.

    Attributes:
      lines: lines of the file.
      matched: of them, how many name a patient of these inputs.
      unmatched_lines: numbers of the others.
      files: input files that were left out.
    """

    lines: int
    matched: int
    unmatched_lines: Sequence[int]
    files: int


class Example(NamedTuple):
    """Where a slice to show is."""

    shard: str
    record: int
    slot: int


def intensities(
    histogram: Int[np.ndarray, "levels"], slope: float, intercept: float, percentiles: Sequence[float], *, hu: bool
) -> Int[np.ndarray, "bins"]:
    """Pixels per bin of EDGES; values outside count for the outermost bins.

    Args:
      histogram: counts of the stored values 0, 1, 2, …
      percentiles: p0.5, p50, p99.5 of the series, real values.
    """
    # In single precision, as records have them, so that a slice that is taken out later is in the same bins.
    slope, intercept, *percentiles = (
        np.asarray([slope, intercept, *percentiles], np.float32).astype(np.float64).tolist()
    )
    stored = np.flatnonzero(histogram)
    real = stored * slope + intercept
    edges = EDGES["HU" if hu else "relative"]
    if not hu:
        low, high = percentiles[0], percentiles[2]
        real = (real - low) / (high - low if high > low else 1.0)
    bins = np.clip(np.searchsorted(edges, real, side="right") - 1, 0, len(edges) - 2)
    return np.bincount(bins, weights=histogram[stored], minlength=len(edges) - 1).astype(np.int64)


class Counts:
    """What the rows of an index add up to, and which slices to show; takes the index part by part.

    Args:
      examples: how many slices to show.
      held_out: pseudonyms of patients of whom there must be none.

    Attributes:
      slices, held_out: all rows, and those of held-out patients.
      by: rows by value, for each column of COUNTED.
      patients: pseudonyms by split.
      series: patient and split by pseudonym.
      near: series that look like another one, with that one.
      spacing, sides: rows by bin.
    """

    def __init__(self, examples: int, held_out: frozenset[str] = frozenset()) -> None:
        self.slices = self.held_out = 0
        self.by: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in COUNTED}
        self.patients: dict[str, set[str]] = {split: set() for split in pseudonyms.SPLITS}
        self.series: dict[str, tuple[str, str]] = {}
        self.near: dict[str, str] = {}
        self.spacing: dict[str, collections.Counter[str]] = {
            "within a slice": collections.Counter(), "between slices": collections.Counter(),
        }  # fmt: skip
        self.sides: collections.Counter[str] = collections.Counter()
        self._count, self._held_out = examples, held_out
        self._groups: dict[tuple[str, str, str], dict[str, Example]] = collections.defaultdict(dict)

    def add(self, rows: pa.Table) -> None:
        """Counts rows of index.parquet."""
        if not len(rows):
            return
        self.slices += len(rows)
        for name, counts in self.by.items():
            counts.update({str(v["values"]): v["counts"] for v in rows[name].value_counts().to_pylist()})
        who = rows.group_by(["patient", "split", "series", "near_duplicate_of"])
        for row in who.aggregate([([], "count_all")]).to_pylist():
            self.patients[row["split"]].add(row["patient"])
            self.series[row["series"]] = (row["patient"], row["split"])
            if row["near_duplicate_of"]:
                self.near[row["series"]] = row["near_duplicate_of"]
            if row["patient"] in self._held_out:
                self.held_out += row["count_all"]
        within = np.maximum(rows["spacing_rows"].to_numpy(), rows["spacing_columns"].to_numpy())
        self.spacing["within a slice"].update(_binned(within, SPACING_EDGES))
        self.spacing["between slices"].update(_binned(rows["spacing_slices"].to_numpy(), SPACING_EDGES))
        self.sides.update(_binned(np.maximum(rows["height"].to_numpy(), rows["width"].to_numpy()), SIDE_EDGES))
        if self._count:
            self._gather(rows)

    def _gather(self, rows: pa.Table) -> None:
        columns = ("modality", "plane", "body_part", "series")
        places: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
        for number, key in enumerate(zip(*(rows[name].to_pylist() for name in columns), strict=True)):
            places[key].append(number)
        for (modality, plane, part, series), numbers in places.items():
            if plane != "axial" and (not part or part in FACES):
                continue
            group = self._groups[modality, plane, part]
            if series not in group:
                (row,) = rows.select(list(Example._fields)).take([numbers[len(numbers) // 2]]).to_pylist()
                group[series] = Example(**row)
            # Pseudonyms are keyed hashes: their order is random and always the same.
            for other in sorted(group)[self._count :]:
                del group[other]

    def examples(self) -> list[Example]:
        """The slices to show: one modality, plane and body part after the other, from the middles of series.

        The choice depends on the rows alone.
        """
        queues = [[row for _, row in sorted(self._groups[group].items())] for group in sorted(self._groups)]
        chosen: list[Example] = []
        for turn in range(max((len(queue) for queue in queues), default=0)):
            chosen += [queue[turn] for queue in queues if turn < len(queue)]
        return chosen[: self._count]

    def near_duplicates(self) -> dict[str, int]:
        """How many series look like another one, and how many of those are of another patient or in another split."""
        pairs = [(self.series[a], self.series[b]) for a, b in self.near.items() if b in self.series]
        return {
            "series": len(self.near), "of another patient": sum(a[0] != b[0] for a, b in pairs),
            "in another split": sum(a[1] != b[1] for a, b in pairs),
        }  # fmt: skip


def make(
    *, name: str, settings: Mapping[str, str | int | float | bool | None], codec: str, counts: Counts,
    shard_rows: Sequence[ShardRow], files: Mapping[str, Mapping[str, int]], intensity: Mapping[str, Sequence[int]],
    left_out: Mapping[str, int], holdout: Holdout | None, additions: int,
) -> Card:  # fmt: skip
    """The card as plain JSON values.

    Args:
      files: number of files by fate and reason.
      intensity: pixels per bin, of "HU" and "relative".
      left_out: slices of readable files by the rule that left them out.
    """
    card: Card = {
        "version": __version__, "name": name, "slices": counts.slices, "series": len(counts.series),
        "patients": len(set().union(*counts.patients.values())), "bytes": sum(shard.bytes for shard in shard_rows),
        "codec": codec, "additions": additions,
        "slices_by": {column: dict(sorted(found.items())) for column, found in counts.by.items()},
        "patients_by_split": {split: len(found) for split, found in counts.patients.items()},
        "spacing_mm": {where: _in_order(found, SPACING_EDGES) for where, found in counts.spacing.items()},
        "longer_side_px": _in_order(counts.sides, SIDE_EDGES),
        "intensity": {
            kind: {"edges": EDGES[kind].tolist(), "pixels": list(bins)} for kind, bins in intensity.items() if any(bins)
        },
        "files": {fate: sum(files.get(fate, {}).values()) for fate in FATES},
        "reasons": {
            fate: {reason: n for reason, n in most_first(files.get(fate, {})).items() if reason} for fate in FATES
        },
        "slices_left_out": most_first(left_out),
        "near_duplicates": counts.near_duplicates(),
        "settings": dict(settings),
        "shards": [
            {key: getattr(shard, key) for key in ("file", "split", "records", "slices", "bytes", "sha256")} for shard in shard_rows
        ],
    }  # fmt: skip
    if holdout is not None:
        card["held_out"] = holdout._asdict() | {"slices_found": counts.held_out}
    return card


def most_first(counts: Mapping[str, int]) -> dict[str, int]:
    """The largest count first; equal ones by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _binned(values: np.ndarray, edges: Sequence[float]) -> dict[str, int]:
    """Counts by bin, named by its edges; 0 stands for unknown."""
    known = values[values > 0]
    counts = np.bincount(np.searchsorted(edges, known, side="left"), minlength=len(edges) + 1)
    found = {name: int(n) for name, n in zip(_names(edges), counts[1:], strict=True) if n}
    return found | ({"unknown": len(values) - len(known)} if len(known) < len(values) else {})


def _names(edges: Sequence[float]) -> list[str]:
    return [f"{low:g} to {high:g}" for low, high in zip(edges, edges[1:], strict=False)] + [f"over {edges[-1]:g}"]


def _in_order(counts: Mapping[str, int], edges: Sequence[float]) -> dict[str, int]:
    return {name: counts[name] for name in (*_names(edges), "unknown") if counts.get(name)}


def examples(folder: Path, chosen: Sequence[Example]) -> list[tuple[bytes, str]]:
    """JPEG tiles and captions of slices of the dataset in `folder`."""
    found = []
    for example in chosen:
        data = shards.read_record(folder / example.shard, example.record)
        one = records.parse_slice(data, example.slot)
        view = contact_sheet.view_of(one)
        file = io.BytesIO()
        Image.fromarray(contact_sheet.tile(one, view, TILE)).save(file, "JPEG", quality=85)
        what = " ".join(text for text in (one.modality, one.plane, one.body_part) if text)
        found.append((file.getvalue(), f"{what}, {view.text}"))
    return found


# ---- page

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2530; --dim: #5c6875; --line: #d7dde3; --bar: #2f6f9f; --ground: #fff; --card: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --dim: #98a4b0; --line: #36414c; --bar: #6aa9d8; --ground: #14191e; --card: #1d242b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption, .dim { color: var(--dim); } p { max-width: 44rem; }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; padding: 0; margin: 1rem 0; }
.key div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; } .key dt { color: var(--dim); font-size: .85rem; }
.key dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; } details { margin: 1rem 0; } th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; padding-right: 0; padding-left: .6rem; }
td.bar { width: 40%; min-width: 4rem; vertical-align: middle; } td.bar div { background: var(--bar); height: .7rem; border-radius: .2rem; min-width: 2px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; background: #000; border-radius: .3rem; } figcaption { font-size: .78rem; line-height: 1.3; padding-top: .25rem; }
svg { width: 100%; height: auto; } svg rect { fill: var(--bar); } svg line { stroke: var(--line); } svg text { fill: var(--dim); font-size: 12px; }
code { font-size: .85rem; overflow-wrap: anywhere; } summary { cursor: pointer; }
"""


def page(card: Card, tiles: Sequence[tuple[bytes, str]]) -> str:
    """index.html: complete in itself, and well-formed XML."""
    parts = [_key_figures(card), _splits_table(card)]
    if tiles:
        figures = "".join(
            f'<figure><img src="data:image/jpeg;base64,{base64.b64encode(data).decode()}" width="{TILE}" height="{TILE}" '
            f'alt="{_text(caption)}" /><figcaption>{_text(caption)}</figcaption></figure>'
            for data, caption in tiles
        )
        parts.append(
            "<h2>Examples</h2><p>From the middle of a series each; windows are centre/width, values that are no HU go from "
            f'the slice\'s 0.5 to its 99.5 percentile.</p><div class="sheet">{figures}</div>'
        )
    titles = {
        "modality": "Modality", "plane": "Plane", "body_part": "Body part", "manufacturer": "Vendor", "units": "Units",
    }  # fmt: skip
    bars = [_bars(title, card["slices_by"][name]) for name, title in titles.items()]
    bars += [_bars(f"Spacing {name}, mm", counts, ordered=True) for name, counts in card["spacing_mm"].items()]
    bars.append(_bars("Longer side, px", card["longer_side_px"], ordered=True))
    parts.append(f'<h2>Slices</h2><div class="grid">{"".join(bars)}</div>')
    parts.append(_intensity_part(card["intensity"]))
    parts += [_files_part(card), _holdout_part(card), _making_part(card)]
    return (
        '<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8" />'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />'
        f"<title>{_text(card['name'])}: dataset card</title><style>{_STYLE}</style></head><body>"
        f"<h1>{_text(card['name'])}</h1>" + "\n".join(part for part in parts if part) + "</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _size(count: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def _key_figures(card: Card) -> str:
    figures = {
        "slices": f"{card['slices']:,}", "series": f"{card['series']:,}", "patients": f"{card['patients']:,}",
        "in shards": _size(card["bytes"]), "bytes per slice": f"{card['bytes'] / max(card['slices'], 1):,.0f}",
    }  # fmt: skip
    return '<dl class="key">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in figures.items()) + "</dl>"


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


def _splits_table(card: Card) -> str:
    shards_of = collections.Counter(shard["split"] for shard in card["shards"])
    rows = [
        (split, f"{card['patients_by_split'][split]:,}", f"{n:,}", f"{shards_of[split]:,}")
        for split in pseudonyms.SPLITS
        if (n := card["slices_by"]["split"].get(split, 0))
    ]
    return "<h2>Splits</h2>" + _table("", ("split",), ("patients", "slices", "shards"), rows)


def _bars(title: str, counts: Mapping[str, int], *, ordered: bool = False) -> str:
    largest = max(counts.values(), default=1)
    rows = "".join(
        f'<tr><td>{_text(name or "unknown")}</td><td class="bar"><div style="width:{100 * n / largest:.1f}%"></div></td>'
        f'<td class="n">{n:,}</td></tr>'
        for name, n in (counts if ordered else most_first(counts)).items()
    )
    return f'<div class="scroll"><table><caption>{_text(title)}</caption><tbody>{rows}</tbody></table></div>'


def _intensity_part(intensity: Json) -> str:
    captions = {
        "HU": "Pixels by HU, logarithmic",
        "relative": "Pixels of other values, logarithmic; 0 is the series' 0.5 percentile, 1 its 99.5 percentile",
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


def _files_part(card: Card) -> str:
    total = sum(card["files"].values())
    rows = [(fate, _text(reason), f"{n:,}") for fate in FATES for reason, n in card["reasons"][fate].items()]
    counts = ", ".join(f"{n:,} {fate}" for fate, n in card["files"].items() if n)
    slices = [(_text(rule), f"{n:,}") for rule, n in card["slices_left_out"].items()]
    near = card["near_duplicates"]
    return (
        f"<h2>Files</h2><p>{total:,} input files: {counts}. A kept file with a reason is flagged and in the dataset.</p>"
        + (_table("", ("fate", "rule or reason"), ("files",), rows) if rows else "")
        + (_table("Slices left out of files that could be read", ("rule",), ("slices",), slices) if slices else "")
        + f"<p>Series that look like another one (reported, kept): {near['series']:,}, of which {near['of another patient']:,} like "
        f"one of another patient and {near['in another split']:,} like one in another split.</p>"
    )


def _holdout_part(card: Card) -> str:
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


def _making_part(card: Card) -> str:
    settings = [
        (_text(name.replace("_", " ")), _text(_SAID.get(v, v) if v is None or isinstance(v, bool) else v))
        for name, v in card["settings"].items()
    ]
    settings.append(("codec", _text(card["codec"])))
    rows = [
        (f"<code>{_text(s['file'])}</code>", f"{s['slices']:,}", _size(s["bytes"]), f"<code>{s['sha256'][:16]}</code>")
        for s in card["shards"]
    ]
    shown = rows[:1000]
    more = f"<p>and {len(rows) - len(shown):,} more, see card.json</p>" if len(rows) > len(shown) else ""
    digest = hashlib.sha256("".join(s["sha256"] for s in card["shards"]).encode()).hexdigest()[:16]
    return (
        "<h2>How it was made</h2>" + _table("", ("setting", "value"), (), settings)
        + f"<details><summary>{len(rows):,} shards, together {digest}</summary>"
        + _table("", ("file",), ("slices", "size", "SHA-256"), shown) + more + "</details>"
        + "<p>Identities are replaced by keyed hashes; neither this page nor the shards hold a name, a date or a path. "
        "Heads can be recognised by their faces, so keep the dataset as private as the exams.</p>"
    )  # fmt: skip
