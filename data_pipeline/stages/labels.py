"""Label tables: CSV files that give the inputs labels, patients, splits and modalities."""

import csv
import dataclasses
import os
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from curia_common.errors import UserError
from data_pipeline.sources.object_stores import absolute, is_address
from data_pipeline.stages import label_values, pseudonyms
from data_pipeline.stages.inventory import Entry, containing
from data_pipeline.stages.label_values import LabelValue

KEYS = ("file", "folder", "series", "study", "patient")
PATHS = ("file", "folder")
MODALITIES = ("CT", "MR")
_SPLITS = {name: name for name in pseudonyms.SPLITS} | {
    "training": "train", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test",
}  # fmt: skip
_DELIMITERS = ",;\t"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of the tables are used; everything else in them is left alone.

    Attributes:
      labels: columns that become labels. One that looks like an id, a date or a name is refused.
      forced: columns that become labels whatever they look like.
      split, patient, modality: columns that decide split, patient and, of files that do not say, modality; or None.
    """

    labels: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    split: str | None = None
    patient: str | None = None
    modality: str | None = None

    @property
    def used(self) -> list[str]:
        special = (self.split, self.patient, self.modality)
        return [*self.labels, *self.forced, *(name for name in special if name)]


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of a table.

    Attributes:
      key, name: the column of KEYS that says which files it is about, and its cell; of PATHS an absolute path.
      cells: clean text by column.
      labels: by column; None where missing.
    """

    table: str
    line: int
    key: str
    name: str
    cells: Mapping[str, str]
    labels: Mapping[str, LabelValue] = dataclasses.field(default_factory=dict)

    @property
    def place(self) -> str:
        return f"{self.table}, line {self.line}"

    def cell(self, column: str | None) -> str:
        return self.cells.get(column, "") if column else ""


class Applied(NamedTuple):
    """Entries with what the tables say of them, and by table the lines of rows that name nothing among the inputs."""

    entries: list[Entry]
    unmatched: dict[str, list[int]]


class LabelTables:
    """The rows of one or more CSV files.

    The first of the columns file, folder, series, study and patient that a table has names what its rows are about. `file`
    and `folder` are paths relative to the table, or addresses; a folder stands for every file in it and below. `series` and
    `study` are DICOM UIDs, `patient` is a PatientID or a value of the patient column of another table. They are compared as
    keyed hashes and stored nowhere. What no row names has no labels.
    """

    def __init__(self, paths: Sequence[str], columns: Columns) -> None:
        """Reads the tables.

        Raises:
          UserError: one cannot be read, lacks a column or has one twice, a label would identify somebody, or the value of a
            split, modality or label cannot be used. The message has the line.
        """
        self.paths, self._columns = tuple(paths), columns
        both = [name for name in columns.labels if name in columns.forced]
        named = [*columns.labels, *columns.forced]
        for name in both or [name for n, name in enumerate(named) if name in named[:n]]:
            raise UserError(f"label column {name} is named twice; name it once")
        titles: dict[str, list[str]] = {}
        rows: list[_Row] = []
        for path in paths:
            titles[path], found = _read(path)
            rows += found
        self._check_columns(titles)
        values = {name: self._values(name, rows) for name in named}
        self._rows = [
            dataclasses.replace(row, labels={name: column[number] for name, column in values.items()})
            for number, row in enumerate(rows)
        ]
        for row in rows:
            split, modality = row.cell(columns.split), row.cell(columns.modality)
            if split and split.casefold() not in _SPLITS:
                raise UserError(f"{row.place}: split {split!r} is none of {', '.join(pseudonyms.SPLITS)}; correct it")
            if modality and modality.upper() not in MODALITIES:
                raise UserError(f"{row.place}: modality {modality!r} is none of {', '.join(MODALITIES)}; correct it")

    def _check_columns(self, titles: Mapping[str, Sequence[str]]) -> None:
        used = self._columns.used
        have = [name for names in titles.values() for name in names]
        tables = ", ".join(titles)
        listed = ", ".join(dict.fromkeys(have))
        if missing := [name for name in used if name not in have]:
            parts = [part.strip() for part in missing[0].split(",")]
            if len(parts) > 1 and set(parts) <= set(have):
                raise UserError(
                    f"{tables} has no column {missing[0]!r}; names are separated with spaces: {' '.join(map(shlex.quote, parts))}"
                )
            raise UserError(f"{tables} has no column {', '.join(missing)}; its columns are: {listed}")
        if not used:
            raise UserError(
                f"nothing of {tables} is used: name columns with --label-columns, --split-column, --patient-column or --modality-column; its columns are: {listed}"
            )
        for path, names in titles.items():
            if not set(names) & set(used):
                raise UserError(f"{path} has none of the columns that are used ({', '.join(used)}); leave it out")

    def _values(self, name: str, rows: Sequence[_Row]) -> list[LabelValue]:
        """The values of a label column, one for each row."""
        if name in PATHS:
            raise UserError(
                f"column {name} names the inputs; paths cannot be labels, so leave it out of the label columns"
            )
        cells = [row.cell(name) for row in rows]
        looks_like = None if name in self._columns.forced else label_values.identifying(name, cells)
        if looks_like:
            raise UserError(
                f"column {name} looks like {looks_like}; labels are stored in clear, so leave it out of --label-columns, or insist with --force-label-columns {name}"
            )
        if pair := label_values.differ_in_case(cells):
            first, second = (rows[number].place for number in pair)
            raise UserError(
                f"column {name}: {first} and {second} differ only in upper and lower case, which would be two classes; write both alike"
            )
        return label_values.typed(cells)

    def apply(self, entries: Sequence[Entry], key: bytes) -> Applied:
        """The entries with their labels, split, patient and modality.

        A patient or split that is named for one file of a series or patient holds for the others with empty cells too.

        Raises:
          UserError: a named file or folder is not among the inputs, no row names any of them, rows contradict each other, a
            series has two patients, or a patient is in two splits.
        """
        rows = _Lookup(self._rows, key)
        of_entry = [rows.of(entry) for entry in entries]
        patients = self._patients(entries, of_entry)
        renamed = [
            entry if patient is None else dataclasses.replace(
                entry, patient=pseudonyms.digest(key, "patient", patient), patient_from="table"
            )
            for entry, patient in zip(entries, patients, strict=True)
        ]  # fmt: skip
        for number, entry in enumerate(renamed):
            if patients[number] is not None:
                of_entry[number] += [row for row in rows.of_patient(entry.patient) if row not in of_entry[number]]
        unmatched = self._unmatched(of_entry)
        splits = self._splits(renamed, of_entry)
        result = []
        for entry, own in zip(renamed, of_entry, strict=True):
            facts = entry.facts
            modality = self._one(own, self._columns.modality).upper()
            if modality and entry.kind in ("volume", "image"):
                facts = dataclasses.replace(facts, modality=modality)
            split = splits.get(entry.patient, entry.split)
            result.append(dataclasses.replace(entry, facts=facts, split=split, labels=_labels(own)))
        return Applied(result, unmatched)

    def _one(self, rows: Sequence[_Row], column: str | None) -> str:
        """The cell of a column that rows about one file agree on."""
        found: _Row | None = None
        for row in rows:
            if row.cell(column):
                found = found or row
                if row.cell(column) != found.cell(column):
                    raise _contradiction(found, row, str(column))
        return found.cell(column) if found else ""

    def _patients(self, entries: Sequence[Entry], of_entry: Sequence[Sequence[_Row]]) -> list[str | None]:
        """What the patient column says of each entry, or None."""
        column = self._columns.patient
        by_series: dict[str, _Row] = {}
        by_patient: dict[str, set[str]] = defaultdict(set)
        for entry, rows in zip(entries, of_entry, strict=True):
            self._one(rows, column)
            for row in rows:
                if not row.cell(column) or not entry.series:
                    continue
                before = by_series.setdefault(entry.series, row)
                if before.cell(column) != row.cell(column):
                    raise UserError(
                        f"{_places(before, row)}: two patients in column {column} for files of one series; correct one of them"
                    )
                by_patient[entry.patient].add(row.cell(column))
        found = []
        for entry in entries:
            own = (
                {by_series[entry.series].cell(column)}
                if entry.series in by_series
                else by_patient.get(entry.patient, set())
            )
            found.append(next(iter(own)) if len(own) == 1 else None)
        return found

    def _splits(self, entries: Sequence[Entry], of_entry: Sequence[Sequence[_Row]]) -> dict[str, str]:
        """Split by pseudonym of the patient."""
        column = self._columns.split
        found: dict[str, _Row] = {}

        def split_of(row: _Row) -> str:
            return _SPLITS[row.cell(column).casefold()]

        for entry, rows in zip(entries, of_entry, strict=True):
            for row in rows:
                if not row.cell(column) or not entry.patient:
                    continue
                before = found.setdefault(entry.patient, row)
                if split_of(before) != split_of(row):
                    raise UserError(
                        f"{_places(before, row)}: one patient is in {split_of(before)} and in {split_of(row)}; a patient belongs to one split, so correct column {column}"
                    )
        return {patient: split_of(row) for patient, row in found.items()}

    def _unmatched(self, of_entry: Sequence[Sequence[_Row]]) -> dict[str, list[int]]:
        """By table the lines that name nothing among the inputs. A path that names nothing is taken for a mistake."""
        matched = {id(row) for rows in of_entry for row in rows}
        left = [row for row in self._rows if id(row) not in matched]
        for row in left:
            if row.key in PATHS:
                raise UserError(
                    f"{row.place}: the {row.key} it names is not among the inputs; correct the table or add it to --input"
                )
        if len(left) == len(self._rows):
            raise UserError(
                f"no row of {', '.join(self.paths)} names a {left[0].key} of the inputs; column {left[0].key} has to hold the values of the DICOM headers, as they are written there"
            )
        found: dict[str, list[int]] = defaultdict(list)
        for row in left:
            found[row.table].append(row.line)
        return dict(found)


class _Lookup:
    """Rows by what they are about: absolute paths, or keyed hashes of UIDs and patients."""

    def __init__(self, rows: Sequence[_Row], key: bytes) -> None:
        self._rows: dict[tuple[str, str], list[_Row]] = defaultdict(list)
        kinds = {"series": "series uid", "study": "study", "patient": "patient"}
        for row in rows:
            name = row.name if row.key in PATHS else pseudonyms.digest(key, kinds[row.key], row.name)
            self._rows[row.key, name].append(row)
        self._has_folders = any(row.key == "folder" for row in rows)

    def of(self, entry: Entry) -> list[_Row]:
        """The rows about an entry, under the patient that its header or path gives it."""
        path = absolute(entry.path)
        found = list(self._rows.get(("file", path), ()))
        for folder in containing(path) if self._has_folders else ():
            found += self._rows.get(("folder", folder), ())
        for kind, name in (("series", entry.series_uid), ("study", entry.study), ("patient", entry.patient)):
            if name:
                found += self._rows.get((kind, name), ())
        return found

    def of_patient(self, patient: str) -> Sequence[_Row]:
        return self._rows.get(("patient", patient), ())


def _labels(rows: Sequence[_Row]) -> dict[str, LabelValue]:
    """The labels of one file; a column that one row leaves empty is filled by another."""
    found: dict[str, LabelValue] = {}
    source: dict[str, _Row] = {}
    for row in rows:
        for name, value in row.labels.items():
            if value is not None and found.get(name) is not None and value != found[name]:
                raise _contradiction(source[name], row, name)
            if value is not None or name not in found:
                found[name], source[name] = value, row
    return found


def _places(first: _Row, second: _Row) -> str:
    if first.table == second.table:
        return f"{first.table}, lines {first.line} and {second.line}"
    return f"{first.place} and {second.place}"


def _contradiction(first: _Row, second: _Row, column: str) -> UserError:
    return UserError(f"{_places(first, second)}: different values in column {column} for one file; correct one of them")


def _read(path: str) -> tuple[list[str], list[_Row]]:
    """The titles of a table's columns and its rows."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(_DELIMITERS, key=first.count)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            titles = [title.strip() for title in next(reader, [])]
            if repeated := [title for n, title in enumerate(titles) if title in titles[:n]]:
                raise UserError(f"{path} has two columns named {repeated[0]}; rename or remove one of them")
            key = next((key for key in KEYS if key in titles), None)
            if key is None:
                raise UserError(
                    f"{path} has no column {', '.join(KEYS[:-1])} or {KEYS[-1]}, which says what its rows are about; its columns are: {', '.join(titles) or 'none'}"
                )
            rows = []
            for cells in reader:
                if not any(cells):  # an empty line
                    continue
                if len(cells) != len(titles):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells under {len(titles)} column names; quote cells that hold {delimiter!r}"
                    )
                row = dict(zip(titles, cells, strict=True))
                name = row[key].strip()
                if not name:
                    raise UserError(
                        f"{path}, line {reader.line_num}: column {key} is empty; fill it, or remove the line"
                    )
                if key in PATHS:
                    name = absolute(name if is_address(name) else os.path.join(os.path.dirname(path), name))
                clean = {title: label_values.clean(cell) for title, cell in row.items()}
                rows.append(_Row(path, reader.line_num, key, name, clean))
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read the label table {path}: {error}; save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read the label table {path}: {error}") from error
    if not rows:
        raise UserError(f"{path} names nothing: it has a header and no lines under it")
    return titles, rows
