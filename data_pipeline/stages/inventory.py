"""First stage: every file under the inputs, what it is, and the headers of those that are images. No pixels of DICOM files."""

import csv
import dataclasses
import functools
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from curia_common.errors import UserError, fault_location
from data_pipeline.sources import archives, dicom, retry
from data_pipeline.sources import object_stores as objects
from data_pipeline.sources.base import Heartbeat, ReadError
from data_pipeline.sources.object_stores import Object, absolute
from data_pipeline.sources.retry import TRANSIENT
from data_pipeline.stages import exclusion as rules
from data_pipeline.stages import pseudonyms

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
FILES_PER_TASK = 64
MODALITIES = ("CT", "MR")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the inventory has to know of the user's wishes.

    Attributes:
      key: for pseudonyms.
      modality: "auto", "CT" or "MR": of files that do not say.
      keep_lossy: keep slices that were compressed with loss.
      keep_faces: keep series in which a face can be, or of which nobody says that none can.
      unpacked: folder of the copies of compressed archives.
    """

    key: bytes
    modality: str = "auto"
    keep_lossy: bool = True
    keep_faces: bool = True
    unpacked: str = ""


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
      member: of a file in an archive, an archives.Member as plain values.
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
    member: list[Any] | None = None


def find_files(inputs: Sequence[str], leave_out: str | None = None) -> list[Path | Object]:
    """Everything under the inputs that is no folder, in the order of the paths, each once; as an Object what lies in a bucket.

    Links to folders are followed. Hidden files and folders are left out. What turns out not to be readable (broken links,
    folders that may not be listed) is among the result, so that it is counted. A DICOMDIR that is itself an input stands for the
    files that it names; one that lies in a folder or a bucket is a file like others.

    Args:
      leave_out: a folder inside an input that is none: the output.

    Raises:
      UserError: an input does not exist or cannot be listed, a DICOMDIR cannot be read, or there is no file in any input.
    """
    found: dict[str, Path | Object] = {}
    # Links can lead back up; each folder is walked once.
    walked: set[tuple[int, int]] = set()
    if leave_out is not None and os.path.isdir(leave_out):
        walked.add(_identity(leave_out))

    def add(path: Path) -> None:
        found.setdefault(os.path.abspath(path), path)

    def unreadable(error: OSError) -> None:
        if error.errno in TRANSIENT:  # a quarantined folder would be left out with all that is in it
            raise UserError(
                f"a folder of the inputs cannot be listed ({error.strerror}); start the build again when the storage answers"
            ) from error
        add(Path(error.filename))

    for text in inputs:
        if objects.is_address(text):
            for one in objects.find(text):
                found.setdefault(one.path, one)
            if text.rpartition("/")[2].upper() == "DICOMDIR":
                raise UserError(
                    f"{text}: the files that a DICOMDIR in a bucket names are not looked up; name its folder instead"
                )
            continue
        refuse_address("--input", text)
        top = Path(text)
        if not top.exists():
            raise UserError(f"no such input: {text}")
        if not top.is_dir():
            add(top)
            if top.name.upper() == "DICOMDIR":
                for path in _named_by_dicomdir(top):
                    add(path)
            continue
        if _identity(text) in walked:
            continue
        walked.add(_identity(text))
        for folder, folders, names in os.walk(top, followlinks=True, onerror=unreadable):
            visible = sorted(name for name in folders if not name.startswith("."))
            folders[:] = []
            for name in visible:
                identity = _identity(os.path.join(folder, name))
                if identity not in walked:
                    walked.add(identity)
                    folders.append(name)
            for name in names:
                if not name.startswith("."):
                    add(Path(folder, name))
    if not found:
        raise UserError(
            f"no files in {', '.join(inputs)}; name a folder of DICOM, NIfTI, NRRD, MetaImage, PNG or JPEG files"
        )
    return sorted(found.values(), key=lambda one: Path(path_of(one)))


def path_of(found: Path | Object) -> str:
    """As the manifest has it."""
    return found.path if isinstance(found, Object) else str(found)


def read_holdout(path: str) -> list[tuple[int, str]]:
    """Lines of a hold-out file that are not empty, with their numbers from 1.

    Raises:
      UserError: it cannot be read.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --holdout={path}: {error}") from error
    return [(number, line) for number, line in enumerate(lines, 1) if line]


def is_place(line: str) -> bool:
    """Whether a line of a hold-out file names a folder, an archive, a file, a place in an archive, exams.zip!/folder, or one of
    these in a bucket."""
    archive, mark, _ = line.partition("!/")
    return (
        objects.is_address(line)
        or os.path.exists(line)
        or bool(mark)
        and archives.is_archive(archive)
        and os.path.isfile(archive)
    )


def lies_in(path: str, place: str) -> bool:
    """Whether an absolute path, of a file or of a member of an archive, is a place or lies in it."""
    top = absolute(place)
    return path == top or path.startswith((top + os.sep, top + "!/"))


MOUNTS = {"gs": "gcsfuse --implicit-dirs", "s3": "mount-s3", "az": "blobfuse2", "abfs": "blobfuse2", "http": "rclone mount", "https": "rclone mount"}  # fmt: skip


def refuse_address(option: str, text: str) -> None:
    """Raises UserError for an address where files are opened; names the program that makes files of objects."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme:
        mount = MOUNTS.get(scheme[1].lower(), "rclone mount")
        raise UserError(
            f"{option} {text} is an address, wanted is a path; mount it ({mount} …, see docs/ingest.md) and name the mounted folder"
        )


def _named_by_dicomdir(path: Path) -> list[Path]:
    """Paths of the files that a DICOMDIR names, found as media write them: in upper or lower case."""
    try:
        names = dicom.read_dicomdir(str(path))
    except ReadError as error:
        raise UserError(f"{path}: {error}; name its folder instead, which takes every file there") from error
    listed: dict[Path, dict[str, str]] = {}
    found = []
    for name in names:
        place = path.parent
        for part in name.split("/"):
            if place not in listed:
                listed[place] = {entry.upper(): entry for entry in (os.listdir(place) if place.is_dir() else ())}
            place = place / listed[place].get(part.upper(), part)
        found.append(place)  # also where it is missing, so that it is counted
    return found


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def inspect(
    task: tuple[Sequence[str | Object | archives.Member], Options], skip: Mapping[str, str], touch: Heartbeat
) -> list[Entry]:
    """Entries of some files, objects and members of archives; the work of one task of workers.run. Never raises for what a file
    holds.

    Raises:
      UserError: the storage fails, or an object was replaced since it was listed.
    """
    sources, options = task
    entries = []
    for source in sources:
        path = source if isinstance(source, str) else source.path
        entry = Entry(path, 0, 0)
        entries.append(entry)
        if path in skip:
            entry.fate, entry.reason = "quarantined", skip[path]
            continue
        touch(path)
        try:
            retry.retry_transient(functools.partial(_look, source, entry, options, touch), touch, path)
        except UserError:
            raise
        except ReadError as error:
            entry.fate, entry.reason = "quarantined", str(error)
        except OSError as error:
            link = " (broken link)" if os.path.islink(path) and not os.path.exists(path) else ""
            entry.fate, entry.reason = "quarantined", f"cannot be read: {error.strerror}{link}"
        except Exception as error:  # noqa: BLE001 - no file may end the build, whatever it holds
            entry.fate, entry.reason = "quarantined", f"the reader failed on it ({fault_location(error)})"
    touch(None)
    return entries


def _look(source: str | Object | archives.Member, entry: Entry, options: Options, touch: Heartbeat) -> None:
    if isinstance(source, str):
        status = os.stat(source)
        entry.size, entry.modified_ns = status.st_size, status.st_mtime_ns
        if stat.S_ISDIR(status.st_mode):
            raise ReadError("the folder cannot be listed")
        if not stat.S_ISREG(status.st_mode):
            raise ReadError("neither a file nor a folder")
    else:
        entry.size, entry.modified_ns = source.size, source.modified_ns
    if isinstance(source, archives.Member):
        entry.member = list(source)
        if source.problem:
            raise ReadError(source.problem)
    _inspect(entry, options, touch)


def _inspect(entry: Entry, options: Options, touch: Heartbeat) -> None:
    name = entry.path.lower()
    if entry.size == 0:
        raise ReadError("empty file")
    if name.endswith(VOLUME_SUFFIXES):
        entry.kind = "volume"
        _name_by_path(entry, options)
        if not options.keep_faces:
            entry.fate, entry.reason = "excluded", MAY_BE_A_FACE
        entry.facts = {"modality": options.modality}
    elif name.endswith(IMAGE_SUFFIXES):
        entry.kind = "image"
        _name_by_path(entry, options)
        entry.facts = {"modality": "OT" if options.modality == "auto" else options.modality}
    elif name.endswith(archives.UNREAD):
        raise ReadError("an archive of a kind that is not read: unpack it")
    else:
        place = Object(entry.path, entry.size, entry.modified_ns)
        with archives.stream(place, entry.member, options.unpacked, touch) as file:
            if dicom.is_dicom(file):
                _inspect_dicom(entry, dicom.read_header(entry.path, file), options)
            else:
                entry.fate, entry.reason = "excluded", NO_IMAGE


A_FACE = "a body part with a face"
MAY_BE_A_FACE = "may show a face: its body part is not named"
NO_IMAGE = "not a medical image (no DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG or TIFF file)"


def _inspect_dicom(entry: Entry, header: dicom.Header, options: Options) -> None:
    entry.kind = "dicom"
    series = header.series_uid or header.sop_uid or entry.path
    # A patient without an id is told apart by the study, so that one study never falls into two splits.
    patient = header.patient_id or header.study_uid or series
    entry.patient = pseudonyms.digest(options.key, "patient", patient)
    # With the patient, because some anonymisers give many patients the same series UID.
    entry.series = pseudonyms.digest(options.key, "series", f"{patient}/{series}")
    rule = "an index of DICOM files (DICOMDIR)" if header.sop_class == dicom.DICOMDIR else rules.exclude_header(header)
    if rule is None and header.lossy and not options.keep_lossy:
        rule = "lossy compression"
    if rule is None and not options.keep_faces:
        rule = A_FACE if header.body_part in dicom.FACES else MAY_BE_A_FACE if not header.body_part else None
    if rule is not None:
        entry.fate, entry.reason = "excluded", rule
        return
    entry.facts = {
        "sop": pseudonyms.digest(options.key, "instance", header.sop_uid or entry.path),
        "modality": header.modality, "rows": header.rows, "columns": header.columns, "frames": header.frames,
        "body_part": header.body_part, "manufacturer": header.manufacturer, "lossy": header.lossy,
        "thickness": header.thickness, "geometry": [dataclasses.asdict(frame) for frame in header.geometry],
    }  # fmt: skip


# Parts of a BIDS dataset that repeat its subjects.
_BIDS_PARTS = re.compile(r"/(?:rawdata|sourcedata|derivatives)(?:/|$)")


def _name_by_path(entry: Entry, options: Options) -> None:
    """Series and patient of a file without identities: the file itself, or the BIDS subject it belongs to."""
    path = absolute(entry.path)
    entry.series = pseudonyms.digest(options.key, "series", path)
    subject = re.search(r"(?<=/)sub-[A-Za-z0-9]+(?=[_/.])", path)
    patient = path
    if subject:
        dataset = _BIDS_PARTS.split(path[: subject.start() - 1])[0]
        patient = f"{dataset}/{subject[0]}"
    entry.patient = pseudonyms.digest(options.key, "patient", patient)


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """A CSV with a column `file`, relative to the CSV, or an address.

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
        """Gives entries their labels, split, patient and modality; files that the table does not name are excluded.

        A patient or split that is named for one file of a series or patient counts for the others with empty cells too.

        Raises:
          UserError: the table cannot be read, a column or a named file is missing or named twice, a split or modality is
            not one that exists, a series has two patients, or a patient is in two splits.
        """
        rows = self._rows()
        by_path = {absolute(entry.path): entry for entry in entries}
        lines: dict[str, int] = {}
        named: list[tuple[Entry, dict[str, str], int]] = []
        for line, row in rows:
            name = row["file"]
            path = absolute(name if objects.is_address(name) else os.path.join(os.path.dirname(self.path), name))
            if path not in by_path:
                raise UserError(
                    f"{self.path}, line {line}: the file it names is not among the inputs; correct the table or add its folder to --input"
                )
            if path in lines:
                raise UserError(
                    f"{self.path}, line {line}: it names the same file as line {lines[path]}; keep one of them"
                )
            lines[path] = line
            named.append((by_path[path], row, line))
        columns = {name: _typed([row[name] for _, row, _ in named]) for name in self._label_names(rows)}
        for number, (entry, row, line) in enumerate(named):
            entry.labels = {name: values[number] for name, values in columns.items()}
            modality = row[self.modality_column] if self.modality_column is not None else ""
            if modality and modality not in MODALITIES:
                raise UserError(f"{self.path}, line {line}: modality {modality!r} is none of {', '.join(MODALITIES)}")
            if modality and entry.kind in ("volume", "image"):
                entry.facts["modality"] = modality
        self._patients(entries, named, key)
        self._splits(entries, named)
        for path, entry in by_path.items():
            if path not in lines and not entry.fate:
                entry.fate, entry.reason = "excluded", "not in the label table"

    def _patients(
        self, entries: Sequence[Entry], named: Sequence[tuple[Entry, dict[str, str], int]], key: bytes
    ) -> None:
        if self.patient_column is None:
            return
        by_series: dict[str, tuple[str, int]] = {}
        by_patient: dict[str, set[str]] = {}
        for entry, row, line in named:
            value = row[self.patient_column]
            if not value or not entry.series:
                continue
            before, first = by_series.setdefault(entry.series, (value, line))
            if before != value:
                raise UserError(
                    f"{self.path}, lines {first} and {line}: two patients in column {self.patient_column} for files of one series; correct one of them"
                )
            by_patient.setdefault(entry.patient, set()).add(value)
        for entry in entries:
            values = {by_series[entry.series][0]} if entry.series in by_series else by_patient.get(entry.patient, set())
            if len(values) == 1:
                entry.patient = pseudonyms.digest(key, "patient", next(iter(values)))

    def _splits(self, entries: Sequence[Entry], named: Sequence[tuple[Entry, dict[str, str], int]]) -> None:
        if self.split_column is None:
            return
        by_patient: dict[str, tuple[str, int]] = {}
        for entry, row, line in named:
            value = {"val": "validation", "valid": "validation", "dev": "validation"}.get(
                row[self.split_column], row[self.split_column]
            )
            if not value or not entry.patient:
                continue
            if value not in pseudonyms.SPLITS:
                raise UserError(f"{self.path}, line {line}: split {value!r} is none of {', '.join(pseudonyms.SPLITS)}")
            before, first = by_patient.setdefault(entry.patient, (value, line))
            if before != value:
                raise UserError(
                    f"{self.path}: one patient is in {before} (line {first}) and in {value} (line {line}); a patient belongs to one split, so correct column {self.split_column}"
                )
        for entry in entries:
            if entry.patient in by_patient:
                entry.split = by_patient[entry.patient][0]

    def _label_names(self, rows: Sequence[tuple[int, dict[str, str]]]) -> tuple[str, ...]:
        special = {"file", self.split_column, self.patient_column, self.modality_column}
        if self.columns is not None:
            return self.columns
        return tuple(name for name in rows[0][1] if name not in special)

    def _rows(self) -> list[tuple[int, dict[str, str]]]:
        """Line numbers and rows."""
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
                for row in reader:
                    if None in row or None in row.values():
                        cells = len(row.get(None, ())) + sum(value is not None for name, value in row.items() if name)
                        raise UserError(
                            f"{self.path}, line {reader.line_num}: {cells} cells under {len(have)} column names; quote cells that hold commas"
                        )
                    rows.append((reader.line_num, {name: value.strip() for name, value in row.items()}))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"cannot read the label table {self.path}: {error}") from error
        if not rows:
            raise UserError(f"{self.path} names no file; it has a header and no lines under it")
        return rows


_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")


def _typed(cells: Sequence[str]) -> list[Any]:
    """Whole numbers, decimal numbers or text, whichever holds the whole column; empty cells are None. 007 is text."""
    full = [cell for cell in cells if cell]
    kind: Callable[[str], Any] = str
    if all(_WHOLE.fullmatch(cell) for cell in full):
        kind = int
    elif all(
        _WHOLE.fullmatch(cell) or ("." in cell or "e" in cell.lower()) and _DECIMAL.fullmatch(cell) for cell in full
    ):
        kind = float
    return [kind(cell) if cell else None for cell in cells]
