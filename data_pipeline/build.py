"""Turns exams into slice shards: DICOM, NIfTI, NRRD, MetaImage, PNG and JPEG files to a folder that trains and loads with TFDS.

stages:
  inventory  every file, what it is; headers only
  plan       which series goes to which shard, fixed before a pixel is read
  convert    decode, check, encode; each shard is written beside, verified, then published
  commit     index, manifest, dataset card (index.html, card.json) and TFDS metadata

A build that was stopped goes on with the same command: finished shards stay as they are. Bad files never stop it; every
input file stands in manifest.parquet with its fate (kept, excluded, duplicate, quarantined) and the reason.

Further exams are added by building into the same output again, with the new inputs alone or together with the old ones:
they become further shards, and those that are there stay as they are, byte for byte. Patients keep their split, what is in
already is not taken twice, and until the addition is finished the folder is the dataset that it was.

Patients never share a split. DICOM names them; volumes and pictures are told apart by their BIDS subject (sub-01) or, where
there is none, file by file: if several files show one patient, say so with --labels and --patient-column.

what leaves the inputs: pixels, a fixed list of technical facts and the labels you name. Identities become pseudonyms under
a secret key that you keep; only manifest.parquet (paths, yours alone to read) leads back, so do not give it away.

exit codes:
  0   done
  1   a fault of the program itself
  2   wrong usage, no usable input, or a disk that is full or may not be written
  75  stopped by SIGTERM or Ctrl-C; start the same command again
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from curia_common import progress
from curia_common.errors import UserError, fault_location
from data_pipeline import beam, workers
from data_pipeline.format import codec, files, shards
from data_pipeline.sources import archives, dicom_pixels
from data_pipeline.sources import object_stores as objects
from data_pipeline.stages import assignment as plan
from data_pipeline.stages import card as cards
from data_pipeline.stages import commit, convert, inventory, labels, pseudonyms, reformat

EXIT_STOPPED = 75
FAILED_ON = "failed_on.txt"  # in the build folder, because paths can hold names
BEAM_LOG = "beam.log"
REASONS_SHOWN = 12


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m data_pipeline.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m data_pipeline.build --input exams/ --output shards/
  python -m data_pipeline.build --input a/ b/ --output shards/ --key-file ~/curia.key --size 512 --workers 8
  python -m data_pipeline.build --input pictures/ --labels pictures/labels.csv --label-columns covid --split-column split \\
      --patient-column patient --modality CT --output labelled/""",
    )  # fmt: skip
    p.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="folders, files, .zip and .tar archives, a DICOMDIR, s3://bucket/folder, gs://bucket/folder; folders are searched whole",
    )
    p.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="dataset folder; an unfinished build in it is gone on with, a finished one added to",
    )
    p.add_argument("--name", default="slices", help="dataset name, the start of the shard names (default: %(default)s)")
    p.add_argument(
        "--key-file",
        metavar="FILE",
        help=f"secret for pseudonyms and splits; else the variable {pseudonyms.KEY_VARIABLE}, else OUTPUT.key, made new if need be",
    )
    p.add_argument(
        "--modality",
        choices=("auto", "CT", "MR"),
        default="auto",
        help="of files that do not say (NIfTI, NRRD, MetaImage, pictures); auto looks at the range of a volume's values",
    )
    p.add_argument(
        "--size", type=int, metavar="PX", help="reduce slices whose longer side is larger (default: native size)"
    )
    p.add_argument(
        "--planes",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="PLANE,…",
        help="reformat regular series into axial, coronal, sagittal too, at isotropic spacing (default: slices as acquired)",
    )
    p.add_argument(
        "--slices-per-record",
        type=int,
        default=1,
        metavar="N",
        help="neighbours of a series stored together; 16 to 32 save requests to object storage (default: %(default)s)",
    )
    p.add_argument(
        "--shard-mb", type=int, default=256, metavar="MB", help="input megabytes per shard (default: %(default)s)"
    )
    p.add_argument(
        "--validation",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the patients for validation (default: %(default)s)",
    )
    p.add_argument(
        "--test",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the patients for testing (default: %(default)s)",
    )
    p.add_argument(
        "--labels", metavar="CSV", help="table with a column 'file' relative to the table; other columns become labels"
    )
    p.add_argument("--label-columns", nargs="+", metavar="NAME", help="columns of --labels to keep (default: all)")
    p.add_argument(
        "--split-column", metavar="NAME", help="column of --labels that holds train, validation (or val) and test"
    )
    p.add_argument("--patient-column", metavar="NAME", help="column of --labels that tells patients apart")
    p.add_argument(
        "--modality-column",
        metavar="NAME",
        help="column of --labels that holds CT or MR, for files that do not say; where it is empty --modality decides",
    )
    p.add_argument(
        "--holdout",
        metavar="FILE",
        help="patients to keep out: one patient id, or one folder, archive or file of theirs (also exams.zip!/folder), per line",
    )
    p.add_argument(
        "--examples",
        type=int,
        default=24,
        metavar="N",
        help="slices to show on the dataset card, none of them a face; 0 for none (default: %(default)s)",
    )
    p.add_argument(
        "--drop-faces",
        action="store_true",
        help="leave out series of body parts with a face, and those whose body part is not named",
    )
    p.add_argument("--drop-lossy", action="store_true", help="leave out slices that were compressed with loss")
    p.add_argument(
        "--runner",
        choices=("local", "beam"),
        default="local",
        help="who converts: processes of this machine, or Apache Beam (see docs/ingest.md; default: %(default)s)",
    )
    p.add_argument(
        "--beam-options",
        metavar="OPTIONS",
        help="Beam's own options, in one word: --beam-options='--runner=FlinkRunner --flink_master=…' (default: processes of this machine)",
    )
    p.add_argument(
        "--scratch",
        metavar="FOLDER",
        help="folder on a local disk, of every machine that converts, for what is in hand; wanted where OUTPUT is a mounted bucket (default: OUTPUT)",
    )
    p.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)"
    )
    p.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds a file may take before it is given up (default: %(default)s)",
    )
    p.add_argument(
        "--memory-gb",
        type=float,
        default=4.0,
        metavar="GB",
        help="memory a worker may take; a file that needs more is given up (default: %(default)s)",
    )
    p.add_argument(
        "--unpack-gb",
        type=int,
        default=100,
        metavar="GB",
        help="room for plain copies of compressed tar archives, in OUTPUT until the build is done (default: %(default)s)",
    )
    p.add_argument("--json", metavar="FILE", help="write the dataset card here too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        build(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}; mend that and start the same command again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished shards are kept, start the same command again to go on", file=sys.stderr)
        return EXIT_STOPPED
    except Exception as error:  # noqa: BLE001 - a traceback could quote header values
        text = str(error) if isinstance(error, workers.TaskFault) else fault_location(error)
        print(f"error: the program is at fault ({text}); please report this line", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _stop(number: int, frame: Any) -> None:
    for again in (signal.SIGTERM, signal.SIGINT):
        signal.signal(again, signal.SIG_IGN)  # a second one must not interrupt the tidying up
    raise KeyboardInterrupt


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the four stages; returns the dataset card."""
    _check(args)
    inventory.refuse_address("--output", args.output)
    began = time.monotonic()
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
    output = Path(args.output)
    found = inventory.find_files(args.input, leave_out=args.output)
    private = output / commit.BUILD_FOLDER
    if not private.is_dir():
        if output.exists() and (not output.is_dir() or any(not p.name.startswith(".") for p in output.iterdir())):
            raise UserError(f"{output} is not empty and holds no build; choose an empty or new --output")
        private.mkdir(parents=True)
    private.chmod(0o700)
    with _only_build(private, output):
        key, origin = pseudonyms.load_key(args.key_file, args.output)
        known = commit.known(output, private)
        conversion = {
            "size": args.size, "slices_per_record": args.slices_per_record, "codec": codec.DELTA, "name": args.name,
            "planes": list(args.planes), "drop_faces": args.drop_faces, "drop_lossy": args.drop_lossy,
        }  # fmt: skip
        _check_settings(known, plan.settings(key, args.validation, args.test, conversion), output)
        console.print(f"{len(found):,} files; {origin}")
        entries = _inventory(found, args, key, console, known)
        held_out, holdout = _held_out(args, private, entries, known, key, console)
        named = [entry.patient for entry in entries]
        entries = _label(args, entries, known, key)
        # Whoever is held out stays out under the name that the table gives him.
        held_out |= {entry.patient for entry, before in zip(entries, named, strict=True) if before in held_out}
        _check_held_out(output, known, held_out)
        options = plan.Options(
            key=key, validation=args.validation, test=args.test, shard_bytes=args.shard_mb * 1_000_000,
            held_out=frozenset(held_out), conversion=conversion, first=known.first_numbers(), instances=known.instances,
            splits=known.splits, continued=known.slices_of(output, {entry.series for entry in entries if not entry.fate}),
        )  # fmt: skip
        made, entries = plan.make(entries, options)
        settings = {
            name: getattr(args, name) for name in ("modality", "size", "slices_per_record", "validation", "test")
        }
        settings["planes"] = ", ".join(args.planes) or None
        settings |= {"drop_faces": args.drop_faces, "drop_lossy": args.drop_lossy}
        request = commit.Request(
            output,
            private,
            args.name,
            settings,
            args.examples,
            known,
            made,
            entries,
            named,
            frozenset(held_out),
            holdout,
        )
        if holdout is not None:
            holdout["files"] = sum(entry.reason == plan.HELD_OUT for entry in entries) + known.held_out_files()
        if known.additions and not entries:
            console.print(f"nothing new: all {len(found):,} files are in the manifest of {output} already")
            if _clear_unfinished(private, known.additions, output):
                card = commit.publish(request, known.shards, {}, {}, known.additions)
            else:
                card = json.loads((output / shards.CARD).read_text(encoding="utf-8"))
        else:
            if not made["shards"] and not known.additions:
                raise commit.nothing_left(output, commit.file_rows(request, {}, {}))
            made = request.made = _fix_plan(private, known.additions, made, output)
            _convert(output, private, args, made, known.additions, console)
            card = commit.commit(request)
        files.write_text(private / commit.HELD_OUT, json.dumps(sorted(held_out)), private=True)
        shutil.rmtree(archives.folder(output), ignore_errors=True)
    if args.json:
        Path(args.json).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    seconds = time.monotonic() - began
    counts = card["files"]
    console.print(
        f"{card['slices']:,} slices of {card['patients']:,} patients in {len(card['shards'])} shards, "
        f"{card['bytes'] / 1e6:,.1f} MB, in {seconds:.0f} s; files: "
        + ", ".join(f"{counts[fate]:,} {fate}" for fate in cards.FATES if counts[fate]) + f"; see {output / shards.MANIFEST}"
    )  # fmt: skip
    reasons = [(n, fate, reason) for fate, found in card["reasons"].items() for reason, n in found.items()]
    for count, fate, reason in sorted(reasons, reverse=True)[:REASONS_SHOWN]:
        console.print(f"  {count:6,} x {fate}: {reason}")
    if len(reasons) > REASONS_SHOWN:
        console.print(f"  and {len(reasons) - REASONS_SHOWN} rarer reasons, see {output / shards.CARD}")
    return card


def _check(args: argparse.Namespace) -> None:
    if not re.fullmatch(r"[a-zA-Z]\w*", args.name, re.ASCII):
        raise UserError(f"--name is {args.name!r}; TFDS takes letters, digits and underscores, a letter first")
    for name, low in (("workers", 1), ("slices_per_record", 1), ("shard_mb", 1), ("examples", 0), ("unpack_gb", 0)):
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it has to be at least {low}")
    if not args.timeout > 0:
        raise UserError(f"--timeout is {args.timeout}; it has to be more than 0 seconds")
    if args.memory_gb < 1:
        raise UserError(f"--memory-gb is {args.memory_gb}; a worker needs at least 1")
    strange = [plane for plane in args.planes if plane not in reformat.PLANES]
    if strange:
        raise UserError(
            f"--planes names {strange[0]!r}; there are {', '.join(reformat.PLANES)}, with commas between them"
        )
    if args.size is not None and args.size < 32:
        raise UserError(f"--size is {args.size}; slices under 32 px are left out, so it has to be at least 32")
    if not (args.validation >= 0 and args.test >= 0 and args.validation + args.test < 1):
        raise UserError(
            f"--validation {args.validation} and --test {args.test} have to be at least 0 and together under 1"
        )
    for option in ("label_columns", "split_column", "patient_column", "modality_column"):
        if getattr(args, option) and not args.labels:
            raise UserError(f"--{option.replace('_', '-')} needs --labels=CSV")
    if args.beam_options is not None and args.runner != "beam":
        raise UserError("--beam-options are for --runner=beam; add that, or leave them out")
    if args.runner == "beam":
        beam.options(args.beam_options or "", args.workers)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json: no folder {Path(args.json).parent}; make it first")
    dicom_pixels.check_plugins()


class _only_build:
    """Two builds on one output would publish each other's shards: the second is refused."""

    def __init__(self, private: Path, output: Path) -> None:
        self._path, self._output = private / "lock", output

    def __enter__(self) -> None:
        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UserError(
                f"another build is writing {self._output}; wait for it or choose another --output"
            ) from error

    def __exit__(self, *unused: object) -> None:
        self._file.close()


def _held_out(
    args: argparse.Namespace, private: Path, entries: Sequence[inventory.Entry], known: commit.Known, key: bytes, console: Console,
) -> tuple[set[str], dict[str, Any] | None]:  # fmt: skip
    """Pseudonyms of the patients to keep out, of earlier additions too, and what the card says of --holdout."""
    before = private / commit.HELD_OUT
    out: set[str] = set(json.loads(before.read_text(encoding="utf-8"))) if before.exists() else set()
    if args.holdout is None:
        return out, None
    lines = inventory.read_holdout(args.holdout)
    places = [(objects.absolute(entry.path), entry.patient) for entry in entries if entry.patient]
    places += [(objects.absolute(path), row["named"]) for path, row in known.files.items() if row["named"]]
    here = {patient for _, patient in places} | {row["patient"] for row in known.files.values()}
    unmatched = []
    for number, line in lines:
        patients = {pseudonyms.digest(key, "patient", line)}
        if inventory.is_place(line):
            patients |= {patient for path, patient in places if inventory.lies_in(path, line)}
        if patients.isdisjoint(here):
            unmatched.append(number)
        out |= patients
    console.print(f"held out: {len(lines) - len(unmatched):,} of {len(lines):,} lines name a patient of these inputs")
    if unmatched:
        # The lines themselves are identities.
        shown = ", ".join(str(number) for number in unmatched[:20]) + (" …" if len(unmatched) > 20 else "")
        console.print(f"held out: nothing matches line{'s' if len(unmatched) > 1 else ''} {shown} of {args.holdout}")
    return out, {"lines": len(lines), "matched": len(lines) - len(unmatched), "unmatched_lines": unmatched}


def _check_held_out(output: Path, known: commit.Known, held_out: set[str]) -> None:
    inside = [row for row in known.files.values() if row["fate"] == "kept" and row["patient"] in held_out]
    if inside:
        patients = len({row["patient"] for row in inside})
        raise UserError(
            f"{patients:,} held-out patients with {len(inside):,} files are in {output} already; shards are never changed, so choose another --output and build it anew"
        )


def _label(
    args: argparse.Namespace, entries: list[inventory.Entry], known: commit.Known, key: bytes
) -> list[inventory.Entry]:
    if not args.labels:
        return entries
    columns = tuple(args.label_columns) if args.label_columns else None
    table = labels.LabelTable(args.labels, columns, args.split_column, args.patient_column, args.modality_column)
    # The table may name files that are in the dataset already; what it says of those must not have changed.
    here = {entry.path for entry in entries}
    old = [
        inventory.Entry(path, row["size"], row["modified_ns"], fate="known", series=row["series"], patient=row["named"])
        for path, row in known.files.items()
        if path not in here
    ]
    named = table.apply([*entries, *old], key)
    for entry in named[len(entries) :]:
        row = known.files[entry.path]
        told = (entry.patient, entry.split or row["split"], json.dumps(entry.labels, sort_keys=True))
        if entry.labels and row["fate"] == "kept" and told != (row["patient"], row["split"], row["labels"]):
            raise UserError(
                f"{args.labels} gives another patient, split or label than before to a file that is in the dataset already; shards are never changed, so choose another --output and build it anew"
            )
    return named[: len(entries)]


def _check_settings(known: commit.Known, settings: dict[str, Any], output: Path) -> None:
    if known.settings is None:
        return
    before = {"drop_faces": False, "drop_lossy": False} | known.settings  # which older plans do not name
    if before == settings:
        return
    if before["format"] != settings["format"]:
        raise UserError(
            f"{output} holds a finished dataset of another version of this software (its plan has format {before['format']}, this version writes {settings['format']}); choose another --output, or remove it to build it anew"
        )
    if before["key"] != settings["key"]:
        raise UserError(
            f"{output} was built with another key; name that one with --key-file, or choose another --output"
        )
    changed = [name for name in settings if settings[name] != before.get(name)]
    texts = [
        f"--{name.replace('_', '-')} was {_said(before.get(name))} and is {_said(settings[name])}" for name in changed
    ]
    raise UserError(
        f"{output} holds a finished dataset of other settings: {'; '.join(texts)}; exams are added with the same ones, or choose another --output"
    )


def _said(value: Any) -> Any:
    return ("given" if value else "not given") if isinstance(value, bool) else value


def _run(
    function: workers.Work, tasks: Sequence[Any], args: argparse.Namespace, private: Path
) -> Iterator[workers.Progress | workers.Done]:
    memory = int(args.memory_gb * 1e9)
    with _named_in(private):
        yield from workers.run(
            function, tasks, workers=min(args.workers, len(tasks)), timeout=args.timeout, memory=memory
        )


@contextlib.contextmanager
def _named_in(private: Path) -> Iterator[None]:
    """Errors that concern a file say where its path is written, because paths can hold names."""
    try:
        yield
    except workers.TaskError as error:
        if error.item is None:
            raise
        path = private / FAILED_ON
        files.write_text(path, ascii(error.item)[1:-1] + "\n", private=True)
        raise UserError(f"{error} (the path of the file stands in {path})") from error


def _inventory(
    found: Sequence[Path | objects.Object], args: argparse.Namespace, key: bytes, console: Console, known: commit.Known
) -> list[inventory.Entry]:
    """What is new among the inputs."""
    private = Path(args.output) / commit.BUILD_FOLDER
    unpacked = archives.folder(args.output)
    options = inventory.Options(
        key=key,
        modality=args.modality,
        keep_lossy=not args.drop_lossy,
        keep_faces=not args.drop_faces,
        unpacked=unpacked,
    )
    paths = [inventory.path_of(one) for one in found]
    packed = [path for path in paths if archives.is_archive(path)]
    listings: dict[int, archives.Listing] = {}
    if packed:
        tasks = [(path, unpacked, args.unpack_gb * 1_000_000_000) for path in packed]
        with progress.Progress("archives", len(packed)) as counter:
            for message in _run(archives.list_members, tasks, args, private):
                if isinstance(message, workers.Done):
                    listings[message.number] = message.result
                else:
                    counter.step()
    sources: list[str | objects.Object | archives.Member] = [
        one if isinstance(one, objects.Object) else path
        for one, path in zip(found, paths, strict=True)
        if not archives.is_archive(path)
    ]
    sources += [member for number in sorted(listings) for member in listings[number].members]
    sources = [source for source in sources if _is_new(source, known)]
    size = inventory.FILES_PER_TASK
    tasks = [(sources[n : n + size], options) for n in range(0, len(sources), size)]
    read: dict[int, list[inventory.Entry]] = {}
    with progress.Progress("inventory", len(sources)) as counter:
        for message in _run(inventory.inspect, tasks, args, private):
            if isinstance(message, workers.Done):
                read[message.number] = message.result
            else:
                counter.step()
    entries = [entry for number in sorted(read) for entry in read[number]]
    return entries + [
        inventory.Entry(one.archive, one.size, one.modified_ns, fate="quarantined", reason=one.problem)
        for _, one in sorted(listings.items())
        if one.problem and one.archive not in known.files
    ]


def _is_new(source: str | objects.Object | archives.Member, known: commit.Known) -> bool:
    """Whether a file is to be looked at; not if it was before and is as it was."""
    row = known.files.get(source if isinstance(source, str) else source.path)
    if row is None:
        return True
    try:
        status = os.stat(source) if isinstance(source, str) else None
    except OSError:
        return False
    now = (status.st_size, status.st_mtime_ns) if status else (source.size, source.modified_ns)
    if now == (row["size"], row["modified_ns"]):
        return False
    if row["fate"] == "kept":
        raise UserError(
            "a file that is in the dataset already has changed since; shards are never changed, so choose another --output and build it anew"
        )
    return True


def _fix_plan(private: Path, addition: int, made: dict[str, Any], output: Path) -> dict[str, Any]:
    """Keeps the plan of an unfinished addition, or puts another one in its place; returns what plan.write does."""
    own = commit.folder_of(private, addition)
    before = plan.read(own)
    if before is not None and before["hash"] == made["hash"] and plan.lines_of(own, made["hash"]).exists():
        return before
    _clear_unfinished(private, addition, output)
    own.mkdir()
    return plan.write(own, made)


def _clear_unfinished(private: Path, addition: int, output: Path) -> bool:
    """Removes what an addition that was never finished has left; its shards would lie about under names that nobody knows."""
    own = commit.folder_of(private, addition)
    if not own.exists():
        return False
    made = plan.read(own) or {"shards": []}
    for shard in made["shards"]:
        name = shards.file_name(made["conversion"]["name"], shard["split"], shard["number"])
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(own)
    return True


def _convert(
    output: Path, private: Path, args: argparse.Namespace, made: dict[str, Any], addition: int, console: Console
) -> None:
    own = commit.folder_of(private, addition)
    sidecars = own / "shards"
    sidecars.mkdir(exist_ok=True)
    _remove_leftovers(output)
    (private / FAILED_ON).unlink(missing_ok=True)
    names = [shards.file_name(args.name, shard["split"], shard["number"]) for shard in made["shards"]]
    todo = [n for n, name in enumerate(names) if not commit.is_finished(sidecars, output / name, made["hash"])]
    if len(todo) < len(names):
        console.print(f"{len(names) - len(todo)} of {len(names)} shards are finished already")
    if not todo:
        return
    common = {
        "output": str(output.absolute()), "sidecars": str(sidecars.absolute()), "plan": made["hash"],
        "scratch": os.path.abspath(args.scratch) if args.scratch else None,
        "lines": str(plan.lines_of(own, made["hash"]).absolute()), "name": args.name, "conversion": made["conversion"],
    }  # fmt: skip
    _remove_reports(sidecars, [names[n] for n in todo])
    try:
        if args.runner == "beam":
            _convert_on_beam(common, [made["shards"][n]["at"] for n in todo], args, private, console)
            missing = sum(not commit.is_finished(sidecars, output / names[n], made["hash"]) for n in todo)
            if missing:
                raise UserError(
                    f"the Beam runner has ended, but {missing:,} of {len(todo):,} shards are not in {output}; is that one folder, the same for all workers?"
                )
            (private / BEAM_LOG).unlink()
        else:
            tasks = [common | {"at": made["shards"][n]["at"]} for n in todo]
            with progress.Progress("convert", sum(made["shards"][n]["files"] for n in todo)) as counter:
                for message in _run(convert.publish, tasks, args, private):
                    if isinstance(message, workers.Progress):
                        counter.step()
    finally:
        _remove_leftovers(output)
        if args.scratch:
            shutil.rmtree(convert.scratch_folder(args.scratch, str(output)), ignore_errors=True)


def _convert_on_beam(
    common: dict[str, Any], places: list[Any], args: argparse.Namespace, private: Path, console: Console
) -> None:
    log = private / BEAM_LOG
    words = beam.options(args.beam_options or "", min(args.workers, len(places)))
    settings = common | {"timeout": args.timeout, "memory": int(args.memory_gb * 1e9)}
    console.print(f"convert: on Apache Beam, which writes its log to {log}")
    with (
        progress.Progress("convert", len(places), "shards") as counter,
        contextlib.closing(beam.run(settings, places, words, log)) as running,
        _named_in(private),
    ):
        for amount in running:
            counter.step(amount)


def _remove_reports(sidecars: Path, names: Sequence[str]) -> None:
    """Of shards that are made again; what is there counts as made."""
    for name in names:
        for ending in (".json", ".final.json", beam.FAILED):
            (sidecars / f"{name}{ending}").unlink(missing_ok=True)


def _remove_leftovers(output: Path) -> None:
    """What workers that were killed had half written."""
    private = output / commit.BUILD_FOLDER
    for leftover in (*output.glob(".*.tmp"), *private.glob(".*.tmp"), *private.glob("addition-*/**/.*.tmp")):
        leftover.unlink(missing_ok=True)
    for leftover in Path(archives.folder(output)).glob("m*"):
        shutil.rmtree(leftover, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
