"""What the rules for units say of real CT and MR, and of the same exams with faults: how often they are wrong.

Prints a table. Every CT and MR below --data is read by the readers of the build; a series is a DICOM series UID or a volume file.
"""

import argparse
import collections
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from data_pipeline.sources import dicom_header, hu, readers, volumes
from data_pipeline.sources.base import ReadError, ReadRequest
from data_pipeline.stages import exclusion, units
from data_pipeline.stages.units import SliceValues

FOLDERS = ("dicom", "nifti", "registration", "labelled/ct_luad_contrast")
# Headers that say CT over values that are not HU: 8-bit values with the intercept of a CT, and an MR; SOURCES.md names them.
NOT_HU = ("gantrytilting_001", "notavolume_001", "sliceincrement_001", "mislabelled_modality_ct_but_mr")
RESCALED = (1.0, -1024.0)


class Series(NamedTuple):
    """Slices of one modality; `real` has their values, `known` what the build knows of each."""

    name: str
    modality: str
    volume: bool
    known: list[SliceValues]
    real: list[Float64[np.ndarray, "rows columns"]]


class Row(NamedTuple):
    """Outcome of the series and slices of one kind of input; `wanted` is the expected one."""

    kind: str
    wanted: str
    series: int
    slices: int
    proved: int
    declared: int
    left_out: int
    slices_left_out: int


def read(folder: Path) -> list[Series]:
    """Every CT and MR series below a folder that no header rule excludes."""
    found: dict[tuple[str, str], Series] = {}
    for path in sorted(path for part in FOLDERS for path in (folder / part).rglob("*") if path.is_file()):
        try:
            for kind, name, request, lossy in _requests(path):
                with readers.open_source(kind, request) as source:
                    if source.excluded or source.facts.modality not in ("CT", "MR"):
                        continue
                    slices = list(source.slices())
                key = (source.facts.modality, name)
                series = found.setdefault(key, Series(path.parent.name, key[0], kind == "volume", [], []))
                for one in slices:
                    histogram = np.bincount(one.pixels.ravel())
                    series.known.append(units.slice_values(one, histogram, lossy=lossy))
                    series.real.append(one.pixels * float(one.slope) + one.intercept)
        except (ReadError, OSError):
            continue
    return [series for series in found.values() if series.known]


def _requests(path: Path) -> Iterator[tuple[str, str, ReadRequest, bool]]:
    scratch = str(path.parent)
    if path.name.endswith(volumes.SUFFIXES):
        yield "volume", str(path), ReadRequest(str(path), "CT" if "ct_" in str(path).lower() else "MR", scratch), False
        return
    with path.open("rb") as file:
        if not dicom_header.is_dicom(file):
            return
        header = dicom_header.read_header(file)
    if exclusion.exclude_header(header) is None and not header.quantity:
        frames = tuple((number, 0.0) for number in range(header.frames))
        # Files of one encoder's test set share a series UID, and some of them are lossy.
        name = f"{header.series_uid}/{header.lossy}"
        yield "dicom", name, ReadRequest(str(path), header.modality, scratch, frames), header.lossy


def measured(series: list[Series]) -> list[Row]:
    """A row for each kind of input."""
    ct = [one for one in series if one.modality == "CT" and one.name not in NOT_HU]
    wrong = [one for one in series if one.modality == "CT" and one.name in NOT_HU]
    mr = [one for one in series if one.modality == "MR"]
    return [
        _row("CT", "kept", ct),
        _row("CT, each slice a series of its own", "kept", [
            one._replace(known=[known], real=[real]) for one in ct for known, real in zip(one.known, one.real, strict=True)
        ]),
        _row("CT, the middle half of each slice, mostly without air around", "kept", _changed(ct, _middle)),
        _row("CT header over 8-bit values or an MR", "left out", wrong),
        _row("CT without its rescale (values + 1024)", "left out", _changed(ct, lambda real: real + 1024)),
        _row("CT with the intercept applied twice (values - 1024)", "left out", _changed(ct, lambda real: real - 1024)),
        _row("CT of which every third slice lost its rescale", "that third left out", [
            one._replace(known=[
                _values(real + 1024, None) if number % 3 == 1 else known
                for number, (known, real) in enumerate(zip(one.known, one.real, strict=True))
            ]) for one in ct if len(one.known) >= 4
        ]),
        _row("MR with the header of a CT", "left out", _changed(mr, lambda real: real)),
        _row("MR scaled to -4096…4094 like phase, with the header of a CT", "left out", _changed(mr, _phase)),
        _row("CT with the header of an MR", "left out", [one._replace(modality="MR") for one in ct]),
        _row("MR", "kept", mr),
    ]  # fmt: skip


def inferred(series: list[Series]) -> collections.Counter[tuple[str, bool]]:
    """For volumes, which name no modality: by what they are, how many are taken for CT."""
    found: collections.Counter[tuple[str, bool]] = collections.Counter()
    for one in series:
        if one.volume:
            values = np.unique(np.concatenate([real.ravel() for real in one.real]), return_counts=True)
            found[one.modality, hu.is_ct(*values)] += 1
    return found


def _row(kind: str, wanted: str, series: list[Series]) -> Row:
    proved = declared = left_out = slices = 0
    for one in series:
        judge = units.judge_ct if one.modality == "CT" else units.judge_mr
        judgement = judge(one.known, inferred=False)
        gone = sum(reason is not None for reason in judgement.reasons)
        slices += gone
        if gone == len(one.known):
            left_out += 1
        elif judgement.evidence == "proved":
            proved += 1
        else:
            declared += 1
    return Row(kind, wanted, len(series), sum(len(one.known) for one in series), proved, declared, left_out, slices)


def _changed(series: list[Series], change: Callable[[np.ndarray], np.ndarray]) -> list[Series]:
    return [one._replace(modality="CT", known=[_values(change(real), RESCALED) for real in one.real]) for one in series]


def _values(real: Float64[np.ndarray, "rows columns"], rescale: tuple[float, float] | None) -> SliceValues:
    return SliceValues(hu.profile(*np.unique(real, return_counts=True)), rescale)


def _middle(real: np.ndarray) -> np.ndarray:
    rows, columns = real.shape
    return real[rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4]


def _phase(real: np.ndarray) -> np.ndarray:
    low, high = real.min(), real.max()
    return np.rint((real - low) / max(high - low, 1) * 8190 - 4096)


def main(argv: list[str] | None = None) -> int:
    data = Path(os.environ.get("CURIA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.units", description=__doc__)
    parser.add_argument("--data", type=Path, default=data, help="or the variable CURIA_DATA (%(default)s)")
    series = read(parser.parse_args(argv).data)
    print(
        "| Input | Wanted | Series | proved | declared | left out | Slices | left out |\n|---|---|---|---|---|---|---|---|"
    )
    for row in measured(series):
        counts = (row.series, row.proved, row.declared, row.left_out, row.slices, row.slices_left_out)
        print(f"| {row.kind} | {row.wanted} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    print("\n| Volumes without modality | taken for CT | taken for MR |\n|---|---|---|")
    found = inferred(series)
    for modality in ("CT", "MR"):
        print(f"| {modality} | {found[modality, True]:,} | {found[modality, False]:,} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
