"""First stage: lists every file under the inputs, what it is, and the headers of DICOM images; reads no pixels."""

import dataclasses
import errno
import functools
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydicom.uid import MediaStorageDirectoryStorage

from curia_common.errors import DataError, StorageError, UserError, fault_location
from data_pipeline.sources import archives, dicom_header, nifti, object_stores, volumes
from data_pipeline.sources.base import Heartbeat, ReadError
from data_pipeline.sources.dicom_header import FrameGeometry
from data_pipeline.sources.object_stores import Object, absolute
from data_pipeline.sources.retry import TRANSIENT, retry_transient
from data_pipeline.stages import exclusion, pseudonyms

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# Of files with the values that a header beside them describes, and of those headers.
DATA_SUFFIXES, DATA_HEADERS = (".raw", ".zraw", ".img", ".img.gz", ".raw.gz"), (".hdr", ".mhd", ".nhdr")
FILES_PER_TASK = 64

# Columns of the label table: whole numbers, decimal numbers or text, None for an empty cell.
Labels = Mapping[str, str | int | float | None]
# What tells patients apart: PatientID, the label table, a BIDS subject. Where none of them does, the patient is unknown and the
# study, the series or the file stands for one.
PATIENT_FROM = ("id", "table", "subject", "study", "series", "file")
PATIENT_UNKNOWN = ("study", "series", "file")
Source = str | Object | archives.Member  # a path, an object of a bucket, or a file in an archive


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the inventory.

    Attributes:
      key: for pseudonyms.
      modality: "auto", "CT" or "MR": of files that do not say.
      keep_lossy: keep slices that were compressed with loss.
      keep_faces: keep series that show a face, or may show one because their body part is not named.
      keep_maps: keep maps of a quantity (ADC, iodine, phase, …), in arbitrary units.
      unpacked: folder of the copies of compressed archives.
      unpack_gb: space that these may take, GB.
    """

    key: bytes
    modality: str = "auto"
    keep_lossy: bool = True
    keep_faces: bool = True
    keep_maps: bool = False
    unpacked: str = ""
    unpack_gb: int = 100


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """Whitelisted header fields of a file; the defaults where it has no header.

    Attributes:
      modality: "CT", "MR" or "OT"; "auto" where neither the file nor the user says; "" of what is not an image.
      instance: pseudonym of the SOP instance.
      rows, columns: px.
      body_part: a defined term in lower case, or "".
      manufacturer: a class of manufacturers, or "unknown".
      lossy: the pixels were compressed with loss.
      thickness: of a slice, mm.
      geometry: one per frame.
      maybe_localizer: the series description has a word that localizers share with other series.
      quantity: what a map measures, see sources.quantities; "" for HU and the signal of MR.
      tiles: slices of a mosaic, which are the frames; else 0.
    """

    modality: str
    instance: str = ""
    rows: int = 0
    columns: int = 0
    frames: int = 1
    body_part: str = ""
    manufacturer: str = ""
    lossy: bool = False
    thickness: float = 0.0
    geometry: tuple[FrameGeometry, ...] = ()
    maybe_localizer: bool = False
    quantity: str = ""
    tiles: int = 0


@dataclasses.dataclass(frozen=True)
class Entry:
    """One input file.

    Attributes:
      path: as the manifest has it: a path, an address, or archive.zip!/member.
      size: bytes.
      modified_ns: as of os.stat; of an object, a number made of its ETag.
      kind: which reader takes it; "" for what no reader takes.
      fate: "" while it is a candidate, else "excluded", "duplicate" or "quarantined"; "known" if the dataset has it already.
      series, patient, study, series_uid: pseudonyms; `series_uid` of the UID alone, `series` of patient and UID.
      patient_from: what tells the patient apart; one of PATIENT_FROM, or "" of what no reader takes.
      split: set by the label table, else "".
      labels: columns of the label table.
      member: of a file in an archive.
    """

    path: str
    size: int = 0
    modified_ns: int = 0
    kind: Literal["", "dicom", "volume", "image"] = ""
    fate: str = ""
    reason: str = ""
    series: str = ""
    patient: str = ""
    study: str = ""
    series_uid: str = ""
    patient_from: str = ""
    split: str = ""
    facts: FileFacts = FileFacts("")
    labels: Labels = dataclasses.field(default_factory=dict)
    member: archives.Member | None = None

    def with_fate(self, fate: str, reason: str) -> "Entry":
        return dataclasses.replace(self, fate=fate, reason=reason)


def find_files(inputs: Sequence[str], leave_out: str | None = None) -> list[str | Object]:
    """All files and objects under the inputs, each once, sorted by path.

    Links to folders are followed; hidden files and folders are skipped. What cannot be read (broken links, folders without
    permission) is in the result too, so that it is counted. A DICOMDIR that is itself an input is replaced by the files that it
    names; in a folder or a bucket it is a file like others.

    Args:
      leave_out: a folder inside an input that is skipped: the output.

    Raises:
      UserError: an input does not exist.
      DataError: a DICOMDIR cannot be read, or there is no file in any input.
      StorageError: a folder or a bucket cannot be listed at the moment.
    """
    found: dict[str, str | Object] = {}
    # Links can lead back up; each folder is walked once.
    walked: set[tuple[int, int]] = set()
    if leave_out is not None and os.path.isdir(leave_out):
        walked.add(_identity(leave_out))

    def add(path: Path) -> None:
        found.setdefault(os.path.abspath(path), str(path))

    def unreadable(error: OSError) -> None:
        _raise_if_transient(error)
        add(Path(error.filename))

    for text in inputs:
        if object_stores.is_address(text):
            for one in object_stores.find(text):
                found.setdefault(one.path, one)
            if is_dicomdir(text):
                raise UserError(
                    f"{text}: the files that a DICOMDIR in a bucket names are not looked up; name its folder instead"
                )
            continue
        refuse_address("--input", text)
        top = Path(text)
        try:
            top.stat()
        except FileNotFoundError as error:
            raise UserError(f"no such input: {text}") from error
        except OSError as error:
            raise UserError(f"--input {text} cannot be read ({error.strerror}); check its permissions") from error
        if not top.is_dir():
            add(top)
            if is_dicomdir(top.name):
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
                try:
                    identity = _identity(os.path.join(folder, name))
                except OSError as error:  # listed in a folder that may not be entered, or gone since
                    _raise_if_transient(error)
                    add(Path(folder, name))
                    continue
                if identity not in walked:
                    walked.add(identity)
                    folders.append(name)
            for name in names:
                if not name.startswith("."):
                    add(Path(folder, name))
    if not found:
        raise DataError(
            f"no files in {', '.join(inputs)}; name a folder of DICOM, NIfTI, NRRD, MetaImage, PNG or JPEG files"
        )
    return sorted(found.values(), key=lambda one: Path(path_of(one)))


def path_of(source: Source) -> str:
    """The path of a source as the manifest records it."""
    return source if isinstance(source, str) else source.path


def read_holdout(path: str) -> list[tuple[int, str]]:
    """Non-empty lines of a hold-out file, with their numbers from 1.

    Raises:
      UserError: it cannot be read.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --holdout={path}: {error}") from error
    return [(number, line) for number, line in enumerate(lines, 1) if line]


def is_place(line: str) -> bool:
    """Whether a line of a hold-out file names a path: a folder, a file, an archive or a folder in one (exams.zip!/folder), on a
    disk or in a bucket."""
    if object_stores.is_address(line) or os.path.exists(line):
        return True
    archive, mark, _ = line.partition("!/")
    return bool(mark) and archives.is_archive(archive) and os.path.isfile(archive)


def lies_in(path: str, place: str) -> bool:
    """Whether an absolute path, of a file or an archive member, is `place` or is in it."""
    top = absolute(place)
    return path == top or path.startswith((top + os.sep, top + "!/"))


def containing(path: str) -> Iterator[str]:
    """The folders and archives that a file is in, and itself: of "/a/b.zip!/c/d.dcm" also "/a", "/a/b.zip" and "/a/b.zip!/c"."""
    for number, character in enumerate(path):
        if character == os.sep and number:
            yield path[:number].removesuffix("!")
            if path[:number].endswith("!"):
                yield path[:number]
    yield path


def is_dicomdir(path: str) -> bool:
    return path.rpartition("/")[2].upper() == "DICOMDIR"


MOUNTS = {"gs": "gcsfuse --implicit-dirs", "s3": "mount-s3", "az": "blobfuse2", "abfs": "blobfuse2", "http": "rclone mount", "https": "rclone mount"}  # fmt: skip


def refuse_address(option: str, text: str) -> None:
    """Raises UserError for an address where a path is needed; names the program that mounts such a bucket."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme:
        mount = MOUNTS.get(scheme[1].lower(), "rclone mount")
        raise UserError(
            f"{option} {text} is an address, but a path is needed; mount it ({mount} …, see docs/ingest_scale.md) and name the mounted folder"
        )


def _raise_if_transient(error: OSError) -> None:
    """Raises StorageError where storage fails: to quarantine a folder would leave out all files in it for good."""
    if error.errno in TRANSIENT:
        raise StorageError(
            f"a folder of the inputs cannot be listed ({error.strerror}); rerun the same command when the storage answers"
        ) from error


def _named_by_dicomdir(path: Path) -> list[Path]:
    """Paths of the files that a DICOMDIR names; of those that are not on the medium as well, so that they are counted.

    Media and programs that copy them change names: to lower case, with the version that ISO 9660 adds (";1") or the dot of an
    empty ending, or with .dcm. An exact match comes first.
    """
    try:
        names = dicom_header.read_dicomdir(str(path))
    except ReadError as error:
        raise DataError(f"{path}: {error}; name its folder instead, which takes every file there") from error
    listed: dict[Path, dict[str, str]] = {}
    found = []
    for name in names:
        place = path.parent
        for part in name.split("/"):
            if place not in listed:
                listed[place] = _names_in(place)
            known = listed[place]
            place = place / known.get(part, known.get(_plain_name(part), part))
        found.append(place)
    return found


def _names_in(folder: Path) -> dict[str, str]:
    """The names in a folder by themselves and by their plain form; none where it cannot be listed."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        _raise_if_transient(error)
        return {}
    return {_plain_name(name): name for name in names} | {name: name for name in names}


def _plain_name(name: str) -> str:
    return re.sub(r"(;\d+)?$", "", name.upper()).removesuffix(".DCM").rstrip(".")


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


# (what is done, how many items, function, tasks) -> results in the order of the tasks; see workers.run
RunTasks = Callable[[str, int, Callable[..., Any], Sequence[Any]], list[Any]]


def take(
    found: Sequence[str | Object], options: Options, run: RunTasks, *, is_new: Callable[[Source], bool] = lambda _: True
) -> list[Entry]:
    """Entries of all files and objects, archives opened.

    Args:
      is_new: whether a file has to be looked at; the others have no entry.
    """
    packed = [path for path in map(path_of, found) if archives.is_archive(path)]
    tasks = [(path, options.unpacked, options.unpack_gb * 1_000_000_000) for path in packed]
    listings: list[archives.Listing] = run("archives", len(packed), archives.list_members, tasks)
    sources: list[Source] = [one for one in found if not archives.is_archive(path_of(one))]
    sources += [member for listing in listings for member in listing.members]
    sources = [source for source in sources if is_new(source)]
    parts = [(sources[n : n + FILES_PER_TASK], options) for n in range(0, len(sources), FILES_PER_TASK)]
    entries = [entry for part in run("inventory", len(sources), inspect, parts) for entry in part]
    return entries + [Entry(*one.archive, fate="quarantined", reason=one.problem) for one in listings if one.problem]


def inspect(task: tuple[Sequence[Source], Options], skip: Mapping[str, str], heartbeat: Heartbeat) -> list[Entry]:
    """Entries of some files, objects and archive members; the work of one task of workers.run. Never raises for file contents.

    Args:
      skip: paths that must not be opened, with the reason.

    Raises:
      StorageError: the storage fails.
      DataError: an object was replaced since it was listed.
    """
    sources, options = task
    entries = []
    for source in sources:
        path = path_of(source)
        if path in skip:
            entries.append(Entry(path).with_fate("quarantined", skip[path]))
            continue
        heartbeat(path)
        entries.append(_inspect(source, path, options, heartbeat))
    heartbeat(None)
    return entries


def _inspect(source: Source, path: str, options: Options, heartbeat: Heartbeat) -> Entry:
    entry = Entry(path)
    try:
        if isinstance(source, str):
            status = retry_transient(functools.partial(os.stat, source), heartbeat, path)
            entry = Entry(path, status.st_size, status.st_mtime_ns)
            if stat.S_ISDIR(status.st_mode):
                raise ReadError(archives.UNLISTED)
            if not stat.S_ISREG(status.st_mode):
                raise ReadError(archives.NO_FILE)
        else:
            member = source if isinstance(source, archives.Member) else None
            entry = Entry(path, source.size, source.modified_ns, member=member)
            if member and member.problem:
                raise ReadError(member.problem)
        if entry.size == 0:
            raise ReadError("empty file")
        return retry_transient(functools.partial(_classify, entry, options, heartbeat), heartbeat, path)
    except UserError:
        raise
    except ReadError as error:
        return entry.with_fate("quarantined", str(error))
    except OSError as error:
        link = " (broken link)" if error.errno == errno.ENOENT and os.path.islink(path) else ""
        return entry.with_fate("quarantined", f"cannot be read: {error.strerror}{link}")
    except Exception as error:  # noqa: BLE001 - no file may end the build, whatever it holds
        return entry.with_fate("quarantined", f"the reader failed on it ({fault_location(error)})")


def _classify(entry: Entry, options: Options, heartbeat: Heartbeat) -> Entry:
    """The entry with kind, series, patient and facts from its name or header."""
    name = archives.unpacked_name(entry.path).lower()
    place = Object(entry.path, entry.size, entry.modified_ns)
    if name.endswith(volumes.SUFFIXES) and not name.endswith(".hdr"):
        return _volume(entry, options)
    if name.endswith(IMAGE_SUFFIXES):
        return _without_header(entry, "image", "OT" if options.modality == "auto" else options.modality, options)
    if name.endswith(archives.UNREAD):
        raise ReadError("an archive of a kind that is not read: unpack it")
    with archives.stream(place, entry.member, options.unpacked, heartbeat) as file:
        start = file.read(132)
        file.seek(0)
        if name.endswith(".hdr") and nifti.is_header(start):
            return _volume(entry, options)
        # Raw values can begin like DICOM without its mark, so beside a header only the mark counts.
        is_data = name.endswith(DATA_SUFFIXES) and (name.endswith(".raw") or _has_header_beside(entry.path))
        if dicom_header.is_dicom(file) and not (is_data and start[128:] != b"DICM"):
            return _with_header(entry, dicom_header.read_header(file), options)
    return entry.with_fate("excluded", DATA_OF_A_HEADER if is_data else NO_IMAGE)


def _volume(entry: Entry, options: Options) -> Entry:
    entry = _without_header(entry, "volume", options.modality, options)
    return entry if options.keep_faces else entry.with_fate("excluded", MAY_BE_A_FACE)


def _has_header_beside(path: str) -> bool:
    """Whether a header of the same name lies beside a file of values; only looked up on disks."""
    stem = re.sub(r"(\.gz)?$", "", path, flags=re.IGNORECASE).rpartition(".")[0]
    return any(os.path.isfile(stem + ending) for ending in DATA_HEADERS)


LOSSY = "lossy compression"
A_FACE = "a body part with a face"
MAY_BE_A_FACE = "may show a face: its body part is not named"
A_MAP = "a map of {quantity}; --keep-maps keeps it"
# Files of the inputs that are named by other options.
OWN_FILES = A_LABEL_TABLE, A_HOLDOUT_FILE = "the label table of --labels", "the list of --holdout"
NO_IMAGE = "not a medical image (no DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG or TIFF file)"
DATA_OF_A_HEADER = "values without a header; the .hdr, .mhd or .nhdr file beside it is read instead"


def _with_header(entry: Entry, header: dicom_header.Header, options: Options) -> Entry:
    series = header.series_uid or header.sop_uid or entry.path
    # Patients without an ID are told apart by the study, so that one study never falls into two splits.
    candidates = (("id", header.patient_id), ("study", header.study_uid), ("series", series))
    patient_from, patient = next((name, value) for name, value in candidates if value)
    entry = dataclasses.replace(
        entry,
        kind="dicom",
        patient=pseudonyms.digest(options.key, "patient", patient),
        # With the patient, because some anonymisers give many patients the same series UID.
        series=pseudonyms.digest(options.key, "series", f"{patient}/{series}"),
        study=pseudonyms.digest(options.key, "study", header.study_uid) if header.study_uid else "",
        series_uid=pseudonyms.digest(options.key, "series uid", header.series_uid) if header.series_uid else "",
        patient_from=patient_from,
    )
    rule = (
        "an index of DICOM files (DICOMDIR)"
        if header.sop_class == MediaStorageDirectoryStorage
        else exclusion.exclude_header(header)
    )
    if rule is None and header.quantity and not options.keep_maps:
        rule = A_MAP.format(quantity=header.quantity)
    if rule is None and header.lossy and not options.keep_lossy:
        rule = LOSSY
    if rule is None and not options.keep_faces:
        rule = A_FACE if header.body_part in dicom_header.FACES else MAY_BE_A_FACE if not header.body_part else None
    if rule is not None:
        return entry.with_fate("excluded", rule)
    instance = pseudonyms.digest(options.key, "instance", header.sop_uid or entry.path)
    facts = FileFacts(
        header.modality, instance, header.rows, header.columns, header.frames, header.body_part, header.manufacturer,
        header.lossy, header.thickness, header.geometry, header.maybe_localizer, header.quantity, header.tiles,
    )  # fmt: skip
    return dataclasses.replace(entry, facts=facts)


# Parts of a BIDS dataset that repeat its subjects.
_BIDS_PARTS = re.compile(r"/(?:rawdata|sourcedata|derivatives)(?:/|$)")


def _without_header(entry: Entry, kind: Literal["volume", "image"], modality: str, options: Options) -> Entry:
    """The series is the file itself; the patient too, or the BIDS subject it belongs to."""
    path = absolute(entry.path)
    subject = re.search(r"(?<=/)sub-[A-Za-z0-9]+(?=[_/.])", path)
    patient = path
    if subject:
        dataset = _BIDS_PARTS.split(path[: subject.start() - 1])[0]
        patient = f"{dataset}/{subject[0]}"
    return dataclasses.replace(
        entry,
        kind=kind,
        series=pseudonyms.digest(options.key, "series", path),
        patient=pseudonyms.digest(options.key, "patient", patient),
        patient_from="subject" if subject else "file",
        facts=FileFacts(modality),
    )
