"""The label table: a CSV file that gives input files labels, patients, splits and modalities."""

import csv
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence

from curia_common.errors import UserError
from data_pipeline.sources.object_stores import absolute, is_address
from data_pipeline.stages import pseudonyms
from data_pipeline.stages.inventory import Entry, Labels

MODALITIES = ("CT", "MR")
_SPLIT_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation"}


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of the table; `path` is the absolute path of its file, `cells` maps column names to stripped text."""

    line: int
    path: str
    cells: dict[str, str]


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """A CSV file with a column `file`: a path relative to the CSV file, or an address.

    Attributes:
      columns: columns that become labels; None takes all but the special ones.
      split_column, patient_column: columns that decide split and patient, or None. A row may leave them empty.
      modality_column: column with the modality, CT or MR, of files that do not say, or None.
    """

    path: str
    columns: tuple[str, ...] | None = None
    split_column: str | None = None
    patient_column: str | None = None
    modality_column: str | None = None

    def apply(self, entries: Sequence[Entry], key: bytes) -> list[Entry]:
        """The entries with their labels, split, patient and modality; candidates that the table does not name are excluded.

        A patient or split that is named for one file of a series or patient holds for the others with empty cells too.

        Raises:
          UserError: the table cannot be read, a column or a named file is missing or named twice, a split or modality does
            not exist, a series has two patients, or a patient is in two splits.
        """
        rows = self._read()
        by_path = {absolute(entry.path): entry for entry in entries}
        named: dict[str, _Row] = {}
        for row in rows:
            if row.path not in by_path:
                raise UserError(
                    f"{self.path}, line {row.line}: the file it names is not among the inputs; correct the table or add its folder to --input"
                )
            if row.path in named:
                raise UserError(
                    f"{self.path}, line {row.line}: it names the same file as line {named[row.path].line}; keep one of them"
                )
            named[row.path] = row
        special = {"file", self.split_column, self.patient_column, self.modality_column}
        names = [name for name in rows[0].cells if name not in special] if self.columns is None else self.columns
        columns = {name: _typed([row.cells[name] for row in rows]) for name in names}
        for number, row in enumerate(rows):
            entry = by_path[row.path]
            modality = row.cells[self.modality_column] if self.modality_column else ""
            if modality and modality not in MODALITIES:
                raise UserError(
                    f"{self.path}, line {row.line}: modality {modality!r} is none of {', '.join(MODALITIES)}"
                )
            facts = entry.facts
            if modality and entry.kind in ("volume", "image"):
                facts = dataclasses.replace(facts, modality=modality)
            labels: Labels = {name: values[number] for name, values in columns.items()}
            by_path[row.path] = dataclasses.replace(entry, labels=labels, facts=facts)
        patients = self._patients(by_path, rows, key)
        splits = self._splits(rows, patients)
        result = []
        for before in entries:
            path = absolute(before.path)
            patient = patients[path]
            entry = dataclasses.replace(by_path[path], patient=patient, split=splits.get(patient, before.split))
            if path not in named and not entry.fate:
                entry = entry.with_fate("excluded", "not in the label table")
            result.append(entry)
        return result

    def _patients(self, by_path: Mapping[str, Entry], rows: Sequence[_Row], key: bytes) -> dict[str, str]:
        """Pseudonym of the patient by path."""
        by_series: dict[str, tuple[str, int]] = {}
        by_patient: dict[str, set[str]] = {}
        for row in rows:
            entry, value = by_path[row.path], row.cells[self.patient_column] if self.patient_column else ""
            if not value or not entry.series:
                continue
            before, first = by_series.setdefault(entry.series, (value, row.line))
            if before != value:
                raise UserError(
                    f"{self.path}, lines {first} and {row.line}: two patients in column {self.patient_column} for files of one series; correct one of them"
                )
            by_patient.setdefault(entry.patient, set()).add(value)
        result = {}
        for path, entry in by_path.items():
            values = {by_series[entry.series][0]} if entry.series in by_series else by_patient.get(entry.patient, set())
            result[path] = pseudonyms.digest(key, "patient", next(iter(values))) if len(values) == 1 else entry.patient
        return result

    def _splits(self, rows: Sequence[_Row], patients: Mapping[str, str]) -> dict[str, str]:
        """Split by pseudonym of the patient."""
        found: dict[str, tuple[str, int]] = {}
        for row in rows:
            cell, patient = row.cells[self.split_column] if self.split_column else "", patients[row.path]
            split = _SPLIT_ALIASES.get(cell, cell)
            if not split or not patient:
                continue
            if split not in pseudonyms.SPLITS:
                raise UserError(
                    f"{self.path}, line {row.line}: split {split!r} is none of {', '.join(pseudonyms.SPLITS)}"
                )
            before, first = found.setdefault(patient, (split, row.line))
            if before != split:
                raise UserError(
                    f"{self.path}: one patient is in {before} (line {first}) and in {split} (line {row.line}); a patient belongs to one split, so correct column {self.split_column}"
                )
        return {patient: split for patient, (split, _) in found.items()}

    def _read(self) -> list[_Row]:
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                have = reader.fieldnames or []
                special = (self.split_column, self.patient_column, self.modality_column)
                wanted = ["file", *(self.columns or ()), *(name for name in special if name)]
                missing = [name for name in wanted if name not in have]
                if missing:
                    raise UserError(
                        f"{self.path} has no column {', '.join(missing)}; its columns are: {', '.join(have) or 'none'}"
                    )
                rows = []
                for cells in reader:
                    if None in cells or None in cells.values():
                        count = len(cells.get(None, ())) + sum(v is not None for name, v in cells.items() if name)
                        raise UserError(
                            f"{self.path}, line {reader.line_num}: {count} cells under {len(have)} column names; quote cells that hold commas"
                        )
                    row = {name: value.strip() for name, value in cells.items()}
                    name = row["file"]
                    place = name if is_address(name) else os.path.join(os.path.dirname(self.path), name)
                    rows.append(_Row(reader.line_num, absolute(place), row))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"cannot read the label table {self.path}: {error}") from error
        if not rows:
            raise UserError(f"{self.path} names no file; it has a header and no lines under it")
        return rows


_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")


def _typed(cells: Sequence[str]) -> list[str | int | float | None]:
    """Whole numbers, decimal numbers or text, whichever holds the whole column; empty cells are None. 007 is text."""
    full = [cell for cell in cells if cell]
    kind: Callable[[str], str | int | float] = str
    if all(_WHOLE.fullmatch(cell) for cell in full):
        kind = int
    elif all(
        _WHOLE.fullmatch(cell) or ("." in cell or "e" in cell.lower()) and _DECIMAL.fullmatch(cell) for cell in full
    ):
        kind = float
    return [kind(cell) if cell else None for cell in cells]
