"""The stages of a build in their order: inventory, plan, convert, commit. `data_pipeline.build` is its command line."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from curia_common import cli, logs, progress
from curia_common.errors import DataError, UserError
from data_pipeline import beam, workers
from data_pipeline.format import files, shards
from data_pipeline.sources import archives, dicom_pixels, object_stores
from data_pipeline.sources.stored_values import DIGESTS
from data_pipeline.stages import assignment, card, commit, convert, inventory, pseudonyms, reformat, summary
from data_pipeline.stages.assignment import Conversion, Plan, Settings, StoredPlan
from data_pipeline.stages.labels import Columns, LabelTables

FAILED_ON = "failed_on.txt"  # in the build folder, because paths can hold names
BEAM_LOG = "beam.log"
_log = logs.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a build, named as on the command line, where each is explained.

    Raises:
      UserError: a value is out of range, or options contradict each other.
    """

    input: Sequence[str]
    output: str
    name: str = "slices"
    key_file: str | None = None
    modality: str = "auto"
    size: int | None = None
    planes: tuple[str, ...] = ()
    slices_per_record: int = 1
    shard_mb: int = 256
    validation: float = 0.05
    test: float = 0.05
    labels: Sequence[str] = ()
    label_columns: Sequence[str] = ()
    force_label_columns: Sequence[str] = ()
    split_column: str | None = None
    patient_column: str | None = None
    modality_column: str | None = None
    holdout: str | None = None
    examples: int = 24
    drop_faces: bool = False
    drop_lossy: bool = False
    keep_maps: bool = False
    runner: str = "local"
    beam_options: str | None = None
    scratch: str | None = None
    workers: int = 1
    timeout: float = 60.0
    memory_gb: float = 4.0
    unpack_gb: int = 100

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-zA-Z]\w*", self.name, re.ASCII):
            raise UserError(f"--name is {self.name!r}; TFDS takes letters, digits and underscores, a letter first")
        for name, low in (
            ("workers", 1), ("slices_per_record", 1), ("shard_mb", 1), ("examples", 0), ("unpack_gb", 0), ("memory_gb", 1),
        ):  # fmt: skip
            cli.at_least(_flag(name), getattr(self, name), low)
        if not self.timeout > 0:
            raise UserError(f"--timeout is {self.timeout:g}; it has to be more than 0 seconds")
        unknown = [plane for plane in self.planes if plane not in reformat.PLANES]
        if unknown:
            raise UserError(
                f"--planes names {unknown[0]!r}; there are {', '.join(reformat.PLANES)}, with commas between them"
            )
        if self.size is not None and self.size < 32:
            raise UserError(f"--size is {self.size}; slices under 32 px are left out, so it has to be at least 32")
        if not (self.validation >= 0 and self.test >= 0 and self.validation + self.test < 1):
            raise UserError(
                f"--validation {self.validation} and --test {self.test} have to be at least 0 and together under 1"
            )
        for name in ("label_columns", "force_label_columns", "split_column", "patient_column", "modality_column"):
            if getattr(self, name) and not self.labels:
                raise UserError(f"{_flag(name)} needs --labels=CSV")
        if self.beam_options is not None and self.runner != "beam":
            raise UserError("--beam-options needs --runner=beam; add that, or leave --beam-options out")
        inventory.refuse_address("--output", self.output)

    @property
    def columns(self) -> Columns:
        return Columns(
            tuple(self.label_columns), tuple(self.force_label_columns), self.split_column, self.patient_column, self.modality_column
        )  # fmt: skip

    @property
    def conversion(self) -> Conversion:
        return Conversion(
            name=self.name, size=self.size, slices_per_record=self.slices_per_record, planes=self.planes,
            drop_faces=self.drop_faces, drop_lossy=self.drop_lossy, keep_maps=self.keep_maps,
        )  # fmt: skip

    @property
    def shown_on_card(self) -> dict[str, str | int | float | bool | None]:
        names = ("modality", "size", "slices_per_record", "validation", "test")
        return {name: getattr(self, name) for name in names} | {
            "planes": ", ".join(self.planes) or None, "drop_faces": self.drop_faces, "drop_lossy": self.drop_lossy,
            "keep_maps": self.keep_maps,
        }  # fmt: skip


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclasses.dataclass(frozen=True)
class _Build:
    """A build that has its output to itself.

    Attributes:
      output, private: dataset folder, and the build folder in it.
      key: for pseudonyms.
      known: what earlier additions brought.
      tables: of --labels, or None.
    """

    options: Options
    output: Path
    private: Path
    key: bytes
    known: commit.Known
    tables: LabelTables | None

    @property
    def conversion(self) -> Conversion:
        """What the options say, with the digests that the dataset has already."""
        before = self.known.settings
        wanted = self.options.conversion
        return wanted if before is None else dataclasses.replace(wanted, digest=before.conversion.digest)

    @property
    def shown_on_card(self) -> dict[str, str | int | float | bool | None]:
        return self.options.shown_on_card | {"stored_sha256": DIGESTS[self.conversion.digest]}


class Result(NamedTuple):
    """The dataset card, and the inputs of which nothing could be used."""

    card: card.Card
    unusable: list[summary.Unusable]


def run(options: Options) -> Result:
    """Builds a dataset, resumes an unfinished build, or adds to a finished dataset.

    Raises:
      UserError: options do not go together with each other or with the dataset, or an input does not exist.
      DataError: no input is usable, or the dataset is damaged.
      StorageError: storage failed or is full; finished shards are kept.
    """
    began = time.monotonic()
    dicom_pixels.check_plugins()
    if options.runner == "beam":
        beam.options(options.beam_options or "", options.workers)
    output = Path(options.output)
    private = output / commit.BUILD_FOLDER
    tables = LabelTables(options.labels, options.columns) if options.labels else None
    found = inventory.find_files(options.input, leave_out=options.output)
    key_file = str(options.key_file or pseudonyms.key_beside(options.output))
    found = [one for one in found if not _is_one_of(inventory.path_of(one), [key_file])]
    if not private.is_dir():
        if output.exists() and (not output.is_dir() or any(not path.name.startswith(".") for path in output.iterdir())):
            raise UserError(f"{output} is not empty and holds no build; choose an empty or new --output")
        try:
            private.mkdir(parents=True)
        except (NotADirectoryError, PermissionError) as error:
            raise UserError(f"--output {output} cannot be made ({error.strerror}); choose another one") from error
    private.chmod(0o700)
    with _only_build(private, output):
        key = pseudonyms.load_key(options.key_file, options.output)
        build = _Build(options, output, private, key.secret, commit.known(output, private), tables)
        _check_settings(build)
        _log.info(f"{len(found):,} files; {key.origin}")
        try:
            made = _run_stages(build, found)
        except commit.NothingLeftError:
            if key.made is not None:  # nothing depends on it
                key.made.unlink()
            raise
        shutil.rmtree(archives.folder(output), ignore_errors=True)
    for line in summary.lines(made, output, time.monotonic() - began):
        _log.info(line)
    return Result(made, summary.unusable_inputs(options.input, output))


def _run_stages(build: _Build, found: Sequence[str | object_stores.Object]) -> card.Card:
    options, known = build.options, build.known
    entries = _take_inventory(build, found)
    held_out, holdout = _read_holdout(build, entries)
    named = [entry.patient for entry in entries]
    entries = _label(build, entries)
    # Held-out patients stay out under the names that the label table gives them.
    held_out |= {entry.patient for entry, before in zip(entries, named, strict=True) if before in held_out}
    _check_held_out(build, held_out)
    entries = assignment.split_kinds(entries, build.key)
    plan, entries = assignment.make(entries, assignment.Options(
        key=build.key, validation=options.validation, test=options.test, shard_bytes=options.shard_mb * 1_000_000,
        held_out=frozenset(held_out), conversion=build.conversion, first=known.first_numbers(),
        splits=known.splits,
        continued=known.slices_of(build.output, {entry.series for entry in entries if not entry.fate}),
    ))  # fmt: skip
    if holdout is not None:
        count = sum(one.reason == assignment.HELD_OUT for one in (*entries, *known.files.values()))
        holdout = holdout._replace(files=count)
    request = commit.Request(
        build.output, build.private, options.name, build.shown_on_card, options.examples, known, entries, named,
        frozenset(held_out), holdout, options.input,
    )  # fmt: skip
    if known.additions and not entries:
        _log.info(f"nothing new: all {len(found):,} files are in the manifest of {build.output} already")
        made = json.loads((build.output / shards.CARD).read_text(encoding="utf-8"))
        if _clear_unfinished(build) or not card.is_current(made):
            made = commit.publish(request, known.shards, {}, {}, known.additions)
    else:
        if not plan.shards and not known.additions:
            raise commit.nothing_left(build.output, commit.file_rows(request, {}, {}))
        stored = _fix_plan(build, plan)
        _convert(build, stored)
        made = commit.commit(request, stored)
    files.write_text(build.private / commit.HELD_OUT, json.dumps(sorted(held_out)), private=True)
    return made


@contextlib.contextmanager
def _only_build(private: Path, output: Path) -> Iterator[None]:
    """Refuses a second build on one output: the two would publish each other's shards."""
    with (private / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another build is writing {output}; wait for it or choose another --output") from error
        yield


def _check_settings(build: _Build) -> None:
    before, output, options = build.known.settings, build.output, build.options
    now = assignment.settings(build.key, options.validation, options.test, build.conversion)
    if before is None or before == now:
        return
    if before.format != now.format:
        raise DataError(
            f"{output} holds a finished dataset of another version of this software (its plan has format {before.format}, this version writes {now.format}); choose another --output, or remove it to build it anew"
        )
    if before.key != now.key:
        raise UserError(
            f"{output} was built with another key; name that one with --key-file, or choose another --output"
        )
    raise UserError(
        f"{output} holds a finished dataset of other settings: {_differences(before, now)}; exams are added with the same ones, or choose another --output"
    )


def _differences(before: Settings, now: Settings) -> str:
    def text(value: object) -> object:
        return ("given" if value else "not given") if isinstance(value, bool) else value

    old, new = before.to_json(), now.to_json()
    changed = [name for name in new if new[name] != old[name]]
    return "; ".join(f"{_flag(name)} was {text(old[name])} and is {text(new[name])}" for name in changed)


# ---- inventory


def _take_inventory(build: _Build, found: Sequence[str | object_stores.Object]) -> list[inventory.Entry]:
    """What is new among the inputs."""
    options, known = build.options, build.known
    others: list[str | object_stores.Object] = []
    own: list[inventory.Entry] = []
    for one in found:
        path = inventory.path_of(one)
        if _is_one_of(path, options.labels):
            own += [inventory.Entry(path, fate="excluded", reason=inventory.A_LABEL_TABLE)] * (path not in known.files)
        elif options.holdout and _is_one_of(path, [options.holdout]):
            own += [inventory.Entry(path, fate="excluded", reason=inventory.A_HOLDOUT_FILE)] * (path not in known.files)
        else:
            others.append(one)
    wishes = inventory.Options(
        key=build.key, modality=options.modality, keep_lossy=not options.drop_lossy, keep_faces=not options.drop_faces,
        keep_maps=options.keep_maps, unpacked=archives.folder(options.output), unpack_gb=options.unpack_gb,
    )  # fmt: skip
    run = functools.partial(_run, build)
    entries = inventory.take(others, wishes, run, is_new=lambda source: _is_new(source, known))
    return own + [one for one in entries if one.path not in known.files or not archives.is_archive(one.path)]


def _is_one_of(path: str, names: Sequence[str]) -> bool:
    """Whether a file of the inputs is one of those that other options name."""
    return any(
        os.path.basename(path) == os.path.basename(name) and os.path.realpath(path) == os.path.realpath(name)
        for name in names
    )


def _is_new(source: inventory.Source, known: commit.Known) -> bool:
    """Whether a file has to be looked at: it is not in the dataset's manifest, or it was bad and has changed since."""
    row = known.files.get(inventory.path_of(source))
    if row is None:
        return True
    if isinstance(source, str):
        try:
            status = os.stat(source)
        except OSError:
            return False
        now = (status.st_size, status.st_mtime_ns)
    else:
        now = (source.size, source.modified_ns)
    if now == (row.size, row.modified_ns):
        return False
    if row.fate == "kept":
        raise DataError(
            f"a file that is in the dataset already has changed since; shards are never changed, so {commit.REBUILD}"
        )
    return True


def _read_holdout(build: _Build, entries: Sequence[inventory.Entry]) -> tuple[set[str], card.Holdout | None]:
    """Pseudonyms of the patients to keep out, of earlier additions too, and what the card says of --holdout."""
    before = build.private / commit.HELD_OUT
    out: set[str] = set(json.loads(before.read_text(encoding="utf-8"))) if before.exists() else set()
    if build.options.holdout is None:
        return out, None
    lines = inventory.read_holdout(build.options.holdout)
    known = build.known.files
    places = [(object_stores.absolute(entry.path), entry.patient) for entry in entries if entry.patient]
    places += [(object_stores.absolute(path), row.named) for path, row in known.items() if row.named]
    here = {patient for _, patient in places} | {row.patient for row in known.values()}
    unmatched = []
    for number, line in lines:
        patients = {pseudonyms.digest(build.key, "patient", line)}
        if inventory.is_place(line):
            patients |= {patient for path, patient in places if inventory.lies_in(path, line)}
        if patients.isdisjoint(here):
            unmatched.append(number)
        out |= patients
    matched = len(lines) - len(unmatched)
    _log.info(f"held out: {matched:,} of {len(lines):,} lines name a patient of these inputs")
    if unmatched:
        # The lines themselves are identities.
        _log.info(f"held out: nothing matches {_lines(unmatched)} of {build.options.holdout}")
    return out, card.Holdout(len(lines), matched, unmatched, 0)


def _check_held_out(build: _Build, held_out: set[str]) -> None:
    inside = [row for row in build.known.files.values() if row.fate == "kept" and row.patient in held_out]
    if inside:
        patients = len({row.patient for row in inside})
        raise UserError(
            f"{patients:,} held-out patients with {len(inside):,} files are in {build.output} already; shards are never changed, so {commit.REBUILD}"
        )


def _label(build: _Build, entries: list[inventory.Entry]) -> list[inventory.Entry]:
    if build.tables is None:
        return entries
    # The tables may also name files of the dataset; what they say of those must not have changed.
    here = {entry.path for entry in entries}
    old = [row.entry() for path, row in build.known.files.items() if path not in here]
    applied = build.tables.apply([*entries, *old], build.key)
    for entry in applied.entries[len(entries) :]:
        row = build.known.files[entry.path]
        now = (entry.patient, entry.split or row.split, json.dumps(entry.labels, sort_keys=True))
        if entry.labels and row.fate == "kept" and now != (row.patient, row.split, row.labels):
            raise UserError(
                f"{', '.join(build.tables.paths)}: another patient, split or label than before for a file that is in the dataset already; shards are never changed, so {commit.REBUILD}"
            )
    for path, lines in applied.unmatched.items():
        _log.info(f"labels: nothing among the inputs for {len(lines):,} rows of {path}: {_lines(lines)}")
    return applied.entries[: len(entries)]


def _lines(numbers: Sequence[int]) -> str:
    """The first line numbers of a list."""
    plural = "s" if len(numbers) > 1 else ""
    return f"line{plural} {', '.join(map(str, numbers[:20]))}{' …' if len(numbers) > 20 else ''}"


# ---- plan


def _fix_plan(build: _Build, plan: Plan) -> StoredPlan:
    """The plan of the unfinished addition if it is this one; else `plan` replaces it and its shards."""
    own = commit.folder_of(build.private, build.known.additions)
    before = assignment.read(own)
    if before is not None and before.hash == plan.hash and assignment.lines_of(own, plan.hash).exists():
        return before
    _clear_unfinished(build)
    own.mkdir()
    return assignment.write(own, plan)


def _clear_unfinished(build: _Build) -> bool:
    """Removes what an unfinished addition has left, shards included, which no table names; False if there is none."""
    own = commit.folder_of(build.private, build.known.additions)
    if not own.exists():
        return False
    if plan := assignment.read(own):
        for place in plan.shards:
            name = shards.file_name(plan.settings.conversion.name, place.split, place.number)
            (build.output / name).unlink(missing_ok=True)
    shutil.rmtree(own)
    return True


# ---- convert


def _convert(build: _Build, plan: StoredPlan) -> None:
    options, output, private = build.options, build.output, build.private
    own = commit.folder_of(private, build.known.additions)
    sidecars = own / "shards"
    sidecars.mkdir(exist_ok=True)
    _remove_leftovers(output)
    (private / FAILED_ON).unlink(missing_ok=True)
    names = {place: shards.file_name(options.name, place.split, place.number) for place in plan.shards}
    todo = [place for place in plan.shards if not commit.is_finished(sidecars, output / names[place], plan.hash)]
    if len(todo) < len(names):
        _log.info(f"{len(names) - len(todo)} of {len(names)} shards are finished already")
    if not todo:
        return
    job = convert.Job(
        output=str(output.absolute()), sidecars=str(sidecars.absolute()),
        scratch=os.path.abspath(options.scratch) if options.scratch else None, plan=plan.hash,
        lines=str(assignment.lines_of(own, plan.hash).absolute()), conversion=plan.settings.conversion,
    )  # fmt: skip
    for place in todo:  # a report that exists counts as made
        for ending in (".json", ".final.json", beam.FAILED):
            (sidecars / f"{names[place]}{ending}").unlink(missing_ok=True)
    try:
        if options.runner == "beam":
            _convert_on_beam(build, job, todo)
            missing = sum(not commit.is_finished(sidecars, output / names[place], plan.hash) for place in todo)
            if missing:
                raise UserError(
                    f"the Beam runner has ended, but {missing:,} of {len(todo):,} shards are not in {output}; is that one folder, the same for all workers?"
                )
            (private / BEAM_LOG).unlink()
        else:
            tasks = [convert.ShardTask(job, place.at) for place in todo]
            _run(build, "convert", sum(place.files for place in todo), convert.publish, tasks)
    finally:
        _remove_leftovers(output)
        if options.scratch:
            shutil.rmtree(convert.scratch_folder(options.scratch, str(output)), ignore_errors=True)


def _convert_on_beam(build: _Build, job: convert.Job, places: Sequence[assignment.ShardPlace]) -> None:
    options = build.options
    log = build.private / BEAM_LOG
    flags = beam.options(options.beam_options or "", min(options.workers, len(places)))
    limits = beam.Limits(options.timeout, int(options.memory_gb * 1e9))
    _log.info(f"convert: on Apache Beam, which writes its log to {log}")
    with (
        progress.Progress("convert", len(places), "shards") as counter,
        contextlib.closing(beam.run(job, limits, places, flags, log)) as running,
        _failed_on(build.private),
    ):
        for amount in running:
            counter.step(amount)


def _run(build: _Build, label: str, items: int, function: workers.Work, tasks: Sequence[Any]) -> list[Any]:
    """Results of `function` in the order of the tasks, on local workers; shows how many of the `items` were read."""
    if not tasks:
        return []
    options = build.options
    count, memory = min(options.workers, len(tasks)), int(options.memory_gb * 1e9)
    results: dict[int, Any] = {}
    with progress.Progress(label, items) as counter, _failed_on(build.private):
        for message in workers.run(function, tasks, workers=count, timeout=options.timeout, memory=memory):
            if isinstance(message, workers.Done):
                results[message.number] = message.result
            else:
                counter.step()
    return [results[number] for number in sorted(results)]


@contextlib.contextmanager
def _failed_on(private: Path) -> Iterator[None]:
    """Writes the path of the file that made a task fail to FAILED_ON; the message names that, because paths can hold names."""
    try:
        yield
    except workers.TaskError as error:
        if error.item is None:
            raise
        path = private / FAILED_ON
        files.write_text(path, ascii(error.item)[1:-1] + "\n", private=True)
        raise workers.TaskError(f"{error} (the path of the file is in {path})", None, error.exit_code) from error


def _remove_leftovers(output: Path) -> None:
    """Temporary files of workers that were killed."""
    private = output / commit.BUILD_FOLDER
    for leftover in (*output.glob(".*.tmp"), *private.glob(".*.tmp"), *private.glob("addition-*/**/.*.tmp")):
        leftover.unlink(missing_ok=True)
    for leftover in Path(archives.folder(output)).glob("m*"):
        shutil.rmtree(leftover, ignore_errors=True)
