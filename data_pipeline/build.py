"""Turns exams into slice shards: DICOM, NIfTI, NRRD, MetaImage, PNG and JPEG files to a folder that trains and loads with TFDS.

stages:
  inventory  every file, what it is; headers only
  plan       which series goes to which shard, fixed before a pixel is read
  convert    decode, check, encode; each shard is written beside, verified, then published
  commit     index, manifest, dataset card (index.html, card.json) and TFDS metadata

A build that was stopped goes on with the same command: finished shards stay as they are. Bad files never stop it; every
input file stands in manifest.parquet with its fate (kept, excluded, duplicate, quarantined) and the reason.

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
import collections
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

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from data_pipeline import archives, codec, convert, dicom, inventory, plan, progress, pseudonyms, shards, workers
from data_pipeline import card as cards
from data_pipeline.errors import UserError, fault

EXIT_STOPPED = 75
BUILD_FOLDER = ".build"
FAILED_ON = "failed_on.txt"  # in the build folder, because paths can hold names
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
        help="folders, files, .zip and .tar archives, a DICOMDIR; folders are searched whole",
    )
    p.add_argument(
        "--output", required=True, metavar="FOLDER", help="dataset folder; an unfinished build in it is gone on with"
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
        "--holdout", metavar="FILE", help="patients to keep out: one patient id, or one folder of their exams, per line"
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
        text = str(error) if isinstance(error, workers.TaskFault) else fault(error)
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
    inventory.refuse_object_storage("--output", args.output)
    began = time.monotonic()
    console = progress.console()
    output = Path(args.output)
    files = inventory.find_files(args.input, leave_out=args.output)
    private = output / BUILD_FOLDER
    if not private.is_dir():
        if output.exists() and (not output.is_dir() or any(not p.name.startswith(".") for p in output.iterdir())):
            raise UserError(f"{output} is not empty and holds no build; choose an empty or new --output")
        private.mkdir(parents=True)
    private.chmod(0o700)
    with _only_build(private, output):
        key, origin = pseudonyms.load_key(args.key_file, args.output)
        console.print(f"{len(files):,} files; {origin}")
        entries = _inventory(files, args, key, console)
        held_out = _held_out(args.holdout, entries, key, console)
        patients = [entry.patient for entry in entries]
        if args.labels:
            columns = tuple(args.label_columns) if args.label_columns else None
            inventory.LabelTable(
                args.labels, columns, args.split_column, args.patient_column, args.modality_column
            ).apply(entries, key)
        # Whoever is held out stays out under the name that the table gives him.
        held_out |= {entry.patient for entry, before in zip(entries, patients, strict=True) if before in held_out}
        options = plan.Options(
            key=key, validation=args.validation, test=args.test, shard_bytes=args.shard_mb * 1_000_000,
            held_out=frozenset(held_out),
            conversion={"size": args.size, "slices_per_record": args.slices_per_record, "codec": codec.DELTA, "name": args.name},
        )  # fmt: skip
        made = plan.make(entries, options)
        if not made["shards"]:
            raise _nothing_left(output, _manifest(entries, []))
        _fix_plan(private, made, output)
        reports = _convert(output, private, args, made, console)
        card = _commit(output, args, entries, reports)
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
    if args.size is not None and args.size < 32:
        raise UserError(f"--size is {args.size}; slices under 32 px are left out, so it has to be at least 32")
    if not (args.validation >= 0 and args.test >= 0 and args.validation + args.test < 1):
        raise UserError(
            f"--validation {args.validation} and --test {args.test} have to be at least 0 and together under 1"
        )
    for option in ("label_columns", "split_column", "patient_column", "modality_column"):
        if getattr(args, option) and not args.labels:
            raise UserError(f"--{option.replace('_', '-')} needs --labels=CSV")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json: no folder {Path(args.json).parent}; make it first")
    dicom.check_plugins()


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


def _held_out(path: str | None, entries: Sequence[inventory.Entry], key: bytes, console: Console) -> set[str]:
    """Pseudonyms of the patients to keep out."""
    if path is None:
        return set()
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --holdout={path}: {error}") from error
    lines = [line for line in lines if line]
    here = {entry.patient for entry in entries}
    out: set[str] = set()
    matched = 0
    for line in lines:
        patients = {pseudonyms.digest(key, "patient", line)}
        if os.path.isdir(line):
            top = os.path.abspath(line) + os.sep
            patients |= {e.patient for e in entries if e.patient and os.path.abspath(e.path).startswith(top)}
        matched += not patients.isdisjoint(here)
        out |= patients
    console.print(f"held out: {matched:,} of {len(lines):,} lines name a patient of these inputs")
    return out


def _run(
    function: workers.Work, tasks: Sequence[Any], args: argparse.Namespace, private: Path
) -> Iterator[workers.Progress | workers.Done]:
    try:
        memory = int(args.memory_gb * 1e9)
        yield from workers.run(
            function, tasks, workers=min(args.workers, len(tasks)), timeout=args.timeout, memory=memory
        )
    except workers.TaskError as error:
        if error.item is None:
            raise
        path = private / FAILED_ON
        _write_private(path, ascii(error.item)[1:-1] + "\n")
        raise UserError(f"{error} (the path of the file stands in {path})") from error


def _inventory(files: Sequence[Path], args: argparse.Namespace, key: bytes, console: Console) -> list[inventory.Entry]:
    private = Path(args.output) / BUILD_FOLDER
    unpacked = archives.folder(args.output)
    options = inventory.Options(
        key=key,
        modality=args.modality,
        keep_lossy=not args.drop_lossy,
        keep_faces=not args.drop_faces,
        unpacked=unpacked,
    )
    packed = [str(path) for path in files if archives.is_archive(str(path))]
    listings: dict[int, archives.Listing] = {}
    if packed:
        tasks = [(path, unpacked, args.unpack_gb * 1_000_000_000) for path in packed]
        with progress.Counter(console, "archives", len(packed)) as counter:
            for message in _run(archives.list_members, tasks, args, private):
                if isinstance(message, workers.Done):
                    listings[message.number] = message.result
                else:
                    counter.step()
    sources: list[str | archives.Member] = [str(path) for path in files if not archives.is_archive(str(path))]
    sources += [member for number in sorted(listings) for member in listings[number].members]
    size = inventory.FILES_PER_TASK
    tasks = [(sources[n : n + size], options) for n in range(0, len(sources), size)]
    found: dict[int, list[inventory.Entry]] = {}
    with progress.Counter(console, "inventory", len(sources)) as counter:
        for message in _run(inventory.inspect, tasks, args, private):
            if isinstance(message, workers.Done):
                found[message.number] = message.result
            else:
                counter.step()
    entries = [entry for number in sorted(found) for entry in found[number]]
    return entries + [
        inventory.Entry(one.archive, one.size, one.modified_ns, fate="quarantined", reason=one.problem)
        for _, one in sorted(listings.items())
        if one.problem
    ]


def _fix_plan(private: Path, made: dict[str, Any], output: Path) -> None:
    """Keeps the plan of an unfinished build; refuses another plan on top of a finished one."""
    path = private / "plan.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["hash"] == made["hash"]:
            return
        if (output / shards.SHARDS).exists():
            if before.get("format") != plan.FORMAT:
                raise UserError(
                    f"{output} holds a finished dataset of another version of this software (its plan has format {before.get('format', 1)}, this version writes {plan.FORMAT}); choose another --output, or remove it to build it anew"
                )
            raise UserError(
                f"{output} holds a finished dataset of other inputs, another key or other settings; choose another --output, or remove it to build it anew"
            )
        # Half a dataset of another plan: its shards would lie about under names that nobody knows.
        for shard in before["shards"]:
            name = shards.file_name(before["conversion"]["name"], shard["split"], shard["number"], shard["count"])
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(private / "shards", ignore_errors=True)
    _write_private(path, json.dumps(made, sort_keys=True))


def _write_text(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _write_private(path: Path, text: str) -> None:
    beside = path.with_suffix(".tmp")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _convert(
    output: Path, private: Path, args: argparse.Namespace, made: dict[str, Any], console: Console
) -> list[dict[str, Any]]:
    sidecars = private / "shards"
    sidecars.mkdir(exist_ok=True)
    _remove_leftovers(output)
    (private / FAILED_ON).unlink(missing_ok=True)
    reports: dict[int, dict[str, Any]] = {}
    todo = []
    for number, shard in enumerate(made["shards"]):
        name = shards.file_name(args.name, shard["split"], shard["number"], shard["count"])
        report = _finished(sidecars / f"{name}.json", output / name, made["hash"])
        if report is None:
            todo.append(number)
        else:
            reports[number] = report
    if reports:
        console.print(f"{len(reports)} of {len(made['shards'])} shards are finished already")
    tasks = [(str(output), args.name, made["conversion"], made["shards"][number]) for number in todo]
    total = sum(len(series["files"]) for number in todo for series in made["shards"][number]["series"])
    if tasks:
        try:
            with progress.Counter(console, "convert", total) as counter:
                for message in _run(convert.convert_shard, tasks, args, private):
                    if isinstance(message, workers.Done):
                        report = message.result
                        # The sidecar comes last: a shard without one is made again.
                        _write_private(
                            sidecars / f"{report['file']}.json", json.dumps({"plan": made["hash"], **report})
                        )
                        reports[todo[message.number]] = report
                    else:
                        counter.step()
        finally:
            _remove_leftovers(output)
    return [reports[number] for number in sorted(reports)]


def _remove_leftovers(output: Path) -> None:
    """What workers that were killed had half written."""
    for leftover in output.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    for leftover in Path(archives.folder(output)).glob("m*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _finished(sidecar: Path, path: Path, plan_hash: str) -> dict[str, Any] | None:
    if not sidecar.exists() or not path.exists():
        return None
    try:
        report = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError:
        return None  # made again
    if report.pop("plan") != plan_hash or path.stat().st_size != report["bytes"]:
        return None
    return report


def _commit(
    output: Path, args: argparse.Namespace, entries: Sequence[inventory.Entry], reports: list[dict[str, Any]]
) -> dict[str, Any]:
    manifest = _manifest(entries, reports)
    index = [row for report in reports for row in report["index"]]
    if not index:
        raise _nothing_left(output, manifest)
    # A split of which nothing is left would be an empty one to train on or to test with.
    splits = {row["split"] for row in index}
    for report in reports:
        if report["split"] not in splits:
            (output / report["file"]).unlink(missing_ok=True)
    reports = [report for report in reports if report["split"] in splits]
    names = {name: None for row in index for name in row}  # labels may be missing in some rows
    columns = {name: [row.get(name) for row in index] for name in names}
    _write_table(output / shards.INDEX, pa.table(columns))
    _write_table(output / shards.MANIFEST, pa.Table.from_pylist(manifest), private=True)
    files: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in manifest:
        files[row["fate"]][row["reason"]] += 1
    settings = ("modality", "size", "slices_per_record", "validation", "test")
    card = cards.make(
        name=args.name, settings={name: getattr(args, name) for name in settings}, codec=codec.NAMES[codec.DELTA], index=columns,
        shard_table=reports, files=files,
        intensity={
            kind: [sum(bins) for bins in zip(*(report["intensity"][kind] for report in reports), strict=True)]
            for kind in reports[0]["intensity"]
        },
    )  # fmt: skip
    _write_text(output / shards.CARD, json.dumps(card, indent=2) + "\n")
    _write_text(output / shards.PAGE, cards.page(card, cards.examples(output, columns, args.examples)))
    _tfds_metadata(output, args.name, reports)
    # Last, because it is what makes the folder a dataset.
    _write_table(output / shards.SHARDS, _shard_table(reports))
    return card


def _manifest(entries: Sequence[inventory.Entry], reports: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    outcomes: dict[str, dict[str, Any]] = {}
    for report in reports:
        for path, outcome in report["files"].items():
            convert.merge_outcome(outcomes, path, outcome)
    rows = []
    for entry in entries:
        path = os.fsencode(entry.path).decode("utf-8", "backslashreplace")
        row = {"path": path, "fate": entry.fate, "reason": entry.reason, "series": entry.series, "split": entry.split}
        row |= {"problems": "", "stored_sha256": "", "shard": "", "decoder": ""}
        rows.append(row | outcomes.get(entry.path, {}))
    return rows


def _nothing_left(output: Path, manifest: Sequence[dict[str, Any]]) -> UserError:
    _write_table(output / shards.MANIFEST, pa.Table.from_pylist(list(manifest)), private=True)
    reasons = collections.Counter(row["reason"] for row in manifest)
    return UserError(
        f"none of the {len(manifest):,} files is a usable slice: "
        + "; ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common(4))
        + f"; {output / shards.MANIFEST} says it for each file"
    )


def _shard_table(reports: Sequence[dict[str, Any]]) -> pa.Table:
    names = ("file", "split", "records", "slices", "bytes", "sha256")
    table = {name: [report[name] for report in reports] for name in names}
    table["largest_height"] = [report["largest"][0] for report in reports]
    table["largest_width"] = [report["largest"][1] for report in reports]
    counts = [None if set(report["slice_counts"]) <= {1} else report["slice_counts"] for report in reports]
    table["slice_counts"] = pa.array(counts, pa.list_(pa.int32()))
    return pa.table(table)


def _write_table(path: Path, table: pa.Table, *, private: bool = False) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.unlink(missing_ok=True)
    # Paths can hold names.
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666), "wb") as file:
        pq.write_table(table, file)
    os.replace(beside, path)


def _tfds_metadata(output: Path, name: str, reports: Sequence[dict[str, Any]]) -> None:
    # Imported here: the other stages and the workers do not need it.
    import tensorflow_datasets as tfds

    from data_pipeline import features

    infos = []
    for split in pseudonyms.SPLITS:
        part = [report for report in reports if report["split"] == split]
        if part:
            infos.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=[report["records"] for report in part], num_bytes=sum(report["bytes"] for report in part),
                    filename_template=tfds.core.ShardedFileTemplate(
                        dataset_name=name, data_dir=output, split=split, filetype_suffix="array_record",
                        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    ),
                )
            )  # fmt: skip
    tfds.folder_dataset.write_metadata(
        data_dir=output,
        features=features.features(),
        split_infos=infos,
        check_data=False,
        description="CT and MR slices, see card.json",
    )


if __name__ == "__main__":
    sys.exit(main())
