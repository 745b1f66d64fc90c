"""First stage: every file under the inputs, what it is, and the headers of those that are images. No pixels of DICOM files."""

import csv
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline import dicom, pseudonyms, rules
from data_pipeline.errors import ReadError, UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
FILES_PER_TASK = 64
MODALITIES = ("CT", "MR")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the inventory has to know of the user's wishes.

    Attributes:
      key: for pseudonyms.
      modality: "auto", "CT" or "MR": of files that do not say.
      keep_lossy: keep slices that were compressed with loss.
    """

    key: bytes
    modality: str = "auto"
    keep_lossy: bool = True


@dataclasses.dataclass
class Entry:
    """One input file.

    Attributes:
      kind: "dicom", "volume", "image" or "" for what is none of these.
      fate: "" while it is a candidate, else "excluded", "duplicate" or "quarantined".
      series, patient: pseudonyms.
      facts: whitelisted header fields, plain JSON values.
      labels: columns of the label table.
      split: set by the label table, else "".
    """

    path: str
    size: int
    modified_ns: int
    kind: str = ""
    fate: str = ""
    reason: str = ""
    series: str = ""
    patient: str = ""
    split: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)


def find_files(inputs: Sequence[str]) -> list[Path]:
    """All regular files under the inputs, in the order of their paths; hidden files and folders are left out.

    Raises:
      UserError: an input does not exist, or there is no file in any of them.
    """
    found: set[Path] = set()
    for text in inputs:
        top = Path(text)
        if top.is_file():
            found.add(top)
        elif top.is_dir():
            for folder, folders, names in os.walk(top):
                folders[:] = [name for name in folders if not name.startswith(".")]
                found.update(Path(folder, name) for name in names if not name.startswith("."))
        else:
            raise UserError(f"no such input: {text}")
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise UserError(
            f"no files in {', '.join(inputs)}; name a folder of DICOM, NIfTI, NRRD, MetaImage, PNG or JPEG files"
        )
    return files


def inspect(task: tuple[list[str], Options], skip: Mapping[str, str], touch: Callable[[str], None]) -> list[Entry]:
    """Entries of some files; the work of one task of workers.run. Never raises for what a file holds."""
    paths, options = task
    entries = []
    for path in paths:
        status = os.stat(path)
        entry = Entry(path, status.st_size, status.st_mtime_ns)
        entries.append(entry)
        if path in skip:
            entry.fate, entry.reason = "quarantined", skip[path]
            continue
        touch(path)
        try:
            _inspect(entry, options)
        except ReadError as error:
            entry.fate, entry.reason = "quarantined", str(error)
    return entries


def _inspect(entry: Entry, options: Options) -> None:
    name = entry.path.lower()
    if entry.size == 0:
        raise ReadError("empty file")
    if name.endswith(VOLUME_SUFFIXES):
        entry.kind = "volume"
        _name_by_path(entry, options)
        entry.facts = {"modality": options.modality}
    elif name.endswith(IMAGE_SUFFIXES):
        entry.kind = "image"
        _name_by_path(entry, options)
        entry.facts = {"modality": "OT" if options.modality == "auto" else options.modality}
    elif dicom.is_dicom(entry.path):
        entry.kind = "dicom"
        header = dicom.read_header(entry.path)
        series = header.series_uid or header.sop_uid or entry.path
        entry.series = pseudonyms.digest(options.key, "series", series)
        # A patient without an id is told apart by the study, so that one study never falls into two splits.
        entry.patient = pseudonyms.digest(options.key, "patient", header.patient_id or header.study_uid or series)
        rule = rules.exclude_header(header)
        if rule is None and header.lossy and not options.keep_lossy:
            rule = "lossy compression"
        if rule is not None:
            entry.fate, entry.reason = "excluded", rule
            return
        entry.facts = {
            "sop": pseudonyms.digest(options.key, "instance", header.sop_uid or entry.path),
            "modality": header.modality, "rows": header.rows, "columns": header.columns, "frames": header.frames,
            "body_part": header.body_part, "manufacturer": header.manufacturer, "lossy": header.lossy,
            "thickness": header.thickness, "geometry": [dataclasses.asdict(frame) for frame in header.geometry],
        }  # fmt: skip
    else:
        entry.fate, entry.reason = (
            "excluded",
            "not a medical image (no DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG or TIFF file)",
        )


def _name_by_path(entry: Entry, options: Options) -> None:
    """Series and patient of a file without identities: the file itself, or the BIDS subject in its name."""
    path = os.path.abspath(entry.path)
    entry.series = pseudonyms.digest(options.key, "series", path)
    subject = re.search(r"(sub-[A-Za-z0-9]+)(?=[_/.])", path)
    patient = f"{Path(path).parent.parent}/{subject[1]}" if subject else path
    entry.patient = pseudonyms.digest(options.key, "patient", patient)


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """A CSV with a column `file`, relative to the CSV.

    Attributes:
      columns: columns that become labels; None takes all but the special ones.
      split_column, patient_column: columns that decide the split and the patient, or None. A row may leave them empty.
      modality_column: column that holds the modality, CT or MR, of files that do not say, or None.
    """

    path: str
    columns: tuple[str, ...] | None = None
    split_column: str | None = None
    patient_column: str | None = None
    modality_column: str | None = None

    def apply(self, entries: Sequence[Entry], key: bytes) -> None:
        """Gives entries their labels, split and patient; files that the table does not name are excluded.

        Raises:
          UserError: the table cannot be read, a column or a named file is missing, or a split or modality is not one
            that exists.
        """
        rows = list(self._rows())
        by_path = {os.path.abspath(entry.path): entry for entry in entries}
        named = set()
        for number, row in enumerate(rows, start=2):
            path = os.path.abspath(os.path.join(os.path.dirname(self.path), row["file"]))
            entry = by_path.get(path)
            if entry is None:
                raise UserError(
                    f"{self.path}, line {number}: the file it names is not among the inputs; correct the table or add its folder to --input"
                )
            named.add(path)
            entry.labels = {name: _number(row[name]) for name in self._label_names(row)}
            if self.split_column is not None and row[self.split_column]:
                value = {"val": "validation", "valid": "validation", "dev": "validation"}.get(
                    row[self.split_column], row[self.split_column]
                )
                if value not in pseudonyms.SPLITS:
                    raise UserError(
                        f"{self.path}, line {number}: split {value!r} is none of {', '.join(pseudonyms.SPLITS)}"
                    )
                entry.split = value
            if self.modality_column is not None and row[self.modality_column]:
                modality = row[self.modality_column]
                if modality not in MODALITIES:
                    raise UserError(
                        f"{self.path}, line {number}: modality {modality!r} is none of {', '.join(MODALITIES)}"
                    )
                if entry.kind in ("volume", "image"):
                    entry.facts["modality"] = modality
            if self.patient_column is not None and row[self.patient_column]:
                entry.patient = pseudonyms.digest(key, "patient", row[self.patient_column])
        for path, entry in by_path.items():
            if path not in named and not entry.fate:
                entry.fate, entry.reason = "excluded", "not in the label table"

    def _label_names(self, row: Mapping[str, str]) -> tuple[str, ...]:
        special = {"file", self.split_column, self.patient_column, self.modality_column}
        return self.columns if self.columns is not None else tuple(name for name in row if name not in special)

    def _rows(self) -> Iterator[dict[str, str]]:
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                have = reader.fieldnames or []
                special = (self.split_column, self.patient_column, self.modality_column)
                wanted = ["file", *(self.columns or ()), *(name for name in special if name)]
                missing = [name for name in wanted if name not in have]
                if missing:
                    raise UserError(
                        f"{self.path} has no column {', '.join(missing)}; its columns are: {', '.join(have)}"
                    )
                yield from reader
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"cannot read the label table {self.path}: {error}") from error


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
