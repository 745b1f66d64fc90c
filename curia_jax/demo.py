"""Shows the whole way, with the commands that a user types: exams, shards, pretraining (interrupted half way and
resumed), weights, scores, report.

Without --data it takes a synthetic phantom of many patients and the CT and MR files that come with pydicom; nothing is
downloaded. Stopped at any point, the same command goes on where it was; what is done and whose inputs have not changed
is not done again.

exit codes:
  0   finished
  1   a stage failed, or the resumed run did not go on with the very next example
  2   wrong usage or input
  75  stopped by SIGTERM or Ctrl-C; start the same command again
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from curia_common.errors import UserError

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.py"
LAYOUTS = ("vit_mae", "vit", "dinov2", "timm")
STATE = "demo.json"
EXIT_STOPPED = 75
# The demo runs on the CPU, whatever there is. There glibc gives freed memory back to the kernel and gets it zeroed page by
# page, in every step anew; keeping it, in huge pages, makes a step about a tenth faster. Other C libraries ignore the word.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184",
}
# Of each of the phantom's four series.
SLICES = 16
LESION = {"0": "no", "1": "yes"}


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m curia_jax.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m curia_jax.demo
  python -m curia_jax.demo --data=/path/to/exams --output=mine
  python -m curia_jax.demo --output=longer --config.duration='3000 steps'     fields of the config can be changed""",
    )
    parser.add_argument("--data", metavar="FOLDER", help="your own DICOM or NIfTI files, instead of the phantom")
    parser.add_argument("--output", metavar="FOLDER", default="demo", help="where everything goes (%(default)s)")
    parser.add_argument("--patients", type=int, default=24, help="of the phantom (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the build (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="do every stage again")
    args, rest = parser.parse_known_args(argv)
    for word in rest:
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word}")
    return args, rest


def main(argv: list[str] | None = None) -> int:
    args, overrides = parse(argv)
    try:
        demo = Demo(args, overrides)
        demo.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        if error.text:
            print(f"error: {error.text}", file=sys.stderr)
        return error.code
    except Stopped:
        print("stopped; start the same command again to go on", file=sys.stderr)
        return EXIT_STOPPED
    return 0


class Failed(Exception):
    """A stage did not succeed. `text` is empty where the command has already said what is wrong."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(text)
        self.code, self.text = code, text


class Stopped(Exception):
    """Somebody asked to stop; the command that was running has ended."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the demo.

    Attributes:
      name, title: for the record, and for people.
      action: does it; may be called again after an interruption.
      outputs: what it leaves; a stage without its outputs is not done.
      depends: whatever else than the earlier stages decides its result.
    """

    name: str
    title: str
    action: Callable[[], None]
    outputs: tuple[Path, ...]
    depends: Any


class Demo:
    """The stages, and the record of them in <output>/demo.json."""

    def __init__(self, args: argparse.Namespace, overrides: list[str]) -> None:
        self.data = Path(args.data) if args.data else None
        if self.data is not None and not self.data.is_dir():
            what = "is a file" if self.data.exists() else "does not exist"
            raise UserError(f"--data={self.data} {what}; name a folder of DICOM or NIfTI files")
        self.folder = Path(args.output)
        self.shards, self.run_folder, self.weights = (self.folder / name for name in ("shards", "run", "weights"))
        self.results, self.report = self.folder / "results.json", self.folder / "report.html"
        self.phantom = self.folder / "phantom"
        self.patients, self.workers = args.patients, args.workers
        self.overrides = overrides
        self.config = _shown(CONFIG)
        self.stages = self._stages()
        self.record = self._open_record(args.fresh)
        self.began = time.monotonic()

    # ---- the stages

    def _stages(self) -> list[Stage]:
        settings = [hashlib.sha256(CONFIG.read_bytes()).hexdigest(), self.overrides]
        stages = [
            Stage("build", "exams to slice shards", self._build, (self.shards,), _fingerprint(self._inputs())),
            Stage("pretrain", "pretraining, interrupted half way", self._pretrain, (self.run_folder,), settings),
            Stage("resume", "pretraining, resumed", self._resume, (self.run_folder,), None),
            Stage("convert", "weights for PyTorch", self._convert, (self.weights,), LAYOUTS),
            Stage("evaluate", "scores", self._evaluate, (self.results,), None),
            Stage("report", "report", self._report, (self.report, self.report.with_name("report_pictures")), None),
        ]
        if self.data is None:
            stages.insert(
                0, Stage("phantom", "synthetic exams", self._phantom, (self.phantom,), [self.patients, SLICES])
            )
        return stages

    def _inputs(self) -> list[Path]:
        """Folders of exams that no stage makes."""
        if self.data is not None:
            return [self.data]
        return [Path(find_spec("pydicom").submodule_search_locations[0]) / "data" / "test_files"]

    def _phantom(self) -> None:
        if self.phantom.exists():
            shutil.rmtree(self.phantom)  # half written by a demo that was stopped
        self.command(
            "data_pipeline.phantom", f"--output={self.phantom}", f"--patients={self.patients}", f"--slices={SLICES}"
        )

    def _build(self) -> None:
        inputs, options = [_shown(folder) for folder in self._inputs()], []
        if self.data is None:
            inputs = [str(self.phantom), *inputs]
            table = self.folder / "labels.csv"
            _write_labels(table, self.phantom / "labels.csv", self._inputs())
            # Pseudonyms and splits follow from a secret key, made for you unless you name one. Nothing here is secret, and
            # the same patients should be in the test split wherever the demo runs.
            self.shards.with_suffix(".key").write_text("the phantom has no secrets\n", encoding="utf-8")
            options = [f"--labels={table}"]
        self.command(
            "data_pipeline.build", "--input", *inputs, f"--output={self.shards}", *options,
            "--validation=0.15", "--test=0.25", f"--workers={self.workers}",
        )  # fmt: skip

    def _pretrain_words(self) -> list[str]:
        return [
            "curia_jax.pretrain", f"--config={self.config}", f"--workdir={self.run_folder}",
            f"--config.data.shards={self.shards}", *self._without_train_split(), *self.overrides,
        ]  # fmt: skip

    def _without_train_split(self) -> list[str]:
        """With very few patients the keyed hash can leave none for training: then all of them are trained on, and
        nothing is held out to be scored."""
        from curia_jax.evaluate import labels

        splits = sorted(set(labels.read_index(self.shards).column("split").to_pylist()))
        return [] if "train" in splits else [f"--config.data.split={'+'.join(splits)}"]

    def _pretrain(self) -> None:
        if any(event["event"] == "preempted" for event in self._log("events")):
            return  # this stage was stopped between the interruption and its record
        self._starts_before = sum(event["event"] in ("started", "resumed") for event in self._log("events"))
        code = self.command(*self._pretrain_words(), stop_when=self._half_way, accept=(0, EXIT_STOPPED))
        if code == 0:
            self.say("the run was over before it could be interrupted")

    def _half_way(self) -> bool:
        """Whether the run has taken a step since it was started last, and half of all."""
        starts = [event for event in self._log("events") if event["event"] in ("started", "resumed")]
        lines = self._log("metrics")
        if len(starts) <= self._starts_before or not lines:
            return False
        return lines[-1]["step"] > starts[-1]["step"] and lines[-1]["step"] >= starts[-1]["total_steps"] // 2

    def _resume(self) -> None:
        self.command(*self._pretrain_words())
        batch_size = json.loads((self.run_folder / "config.json").read_text(encoding="utf-8"))["batch_size"]
        self.say(check_resumed(self._log("events"), self._log("metrics"), batch_size))

    def _convert(self) -> None:
        for layout in LAYOUTS:
            self.command(
                "curia_jax.convert",
                f"--checkpoint={self.run_folder}",
                f"--output={self.weights / layout}",
                f"--layout={layout}",
            )

    def _evaluate(self) -> None:
        # Imported here: pyarrow is slow to load, and a skipped stage does not need it.
        from curia_jax.evaluate import labels

        index = labels.read_index(self.shards)
        names = labels.available(index)
        # Labels that somebody gave; only where there are none, what every exam says of itself.
        given = [name for name in names if name not in labels.TECHNICAL]
        obstacles = {name: labels.problem(index, name) for name in given or names}
        possible = [name for name, problem in obstacles.items() if problem is None]
        self.record["not_probed"] = {name: problem for name, problem in obstacles.items() if problem is not None}
        for name, problem in self.record["not_probed"].items():
            self.say(f"not probed: {name}: {problem}")
        if not possible:
            self.results.write_text("[]\n", encoding="utf-8")
            return
        self.command(
            "curia_jax.evaluate", f"--checkpoint={self.run_folder}", f"--shards={self.shards}",
            f"--label={','.join(possible)}", f"--json={self.results}",
        )  # fmt: skip

    def _report(self) -> None:
        self.record["next"] = self.next_commands()
        self._save_record()
        self.command(
            "curia_jax.report", f"--run={self.run_folder}", f"--shards={self.shards}", f"--results={self.results}",
            f"--weights={self.weights}", f"--timeline={self.folder / STATE}", f"--output={self.report}",
        )  # fmt: skip

    def next_commands(self) -> list[tuple[str, list[str]]]:
        """What to type next, each with its purpose."""
        steps = next(event["total_steps"] for event in self._log("events") if "total_steps" in event)
        pretrain = [word for word in self._pretrain_words() if not word.startswith("--config.duration=")]
        pretrain = ["python", "-m", *pretrain, f"--config.duration={10 * steps} steps"]
        return [
            (
                "the same on your own exams, a folder of DICOM or NIfTI files",
                ["make", "demo", "DATA=/path/to/exams", "OUT=mine"],
            ),
            ("ten times the training; the run goes on from its newest checkpoint", pretrain),
            ("watch the curves", ["tensorboard", f"--logdir={self.run_folder / 'tensorboard'}"]),
        ]

    # ---- running them

    def run(self) -> None:
        """Does what is not done.

        Raises:
          Failed: a command failed.
          Stopped: a signal asked to stop.
          UserError: the inputs cannot be used.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        key = ""
        for number, stage in enumerate(self.stages, start=1):
            key = hashlib.sha256(json.dumps([key, stage.name, stage.depends]).encode()).hexdigest()
            heading = f"[{number}/{len(self.stages)}] {stage.title}"
            entry = self.record["stages"].get(stage.name)
            if entry and entry["key"] == key and entry["done"] and all(path.exists() for path in stage.outputs):
                self.say(f"{heading}: done before, in {entry['seconds']:.0f} s")
                continue
            if entry and (entry["key"] != key or entry["done"]):
                self._forget(number - 1, "its inputs changed" if entry["key"] != key else "its output is missing")
            entry = self.record["stages"].setdefault(
                stage.name,
                {"key": key, "done": False, "seconds": 0.0, "title": stage.title, "commands": []},
            )
            entry["commands"] = []
            self._save_record()
            self.say(f"\n{heading}  ({time.monotonic() - self.began:.0f} s so far)", bold=True)
            self._current, started = entry, time.monotonic()
            try:
                stage.action()
                entry["done"] = True
            finally:
                entry["seconds"] += time.monotonic() - started
                self._save_record()
        self._summary()

    def command(
        self, module: str, *words: str, stop_when: Callable[[], bool] | None = None, accept: tuple[int, ...] = (0,)
    ) -> int:
        """Runs `python -m module words` in the foreground.

        Args:
          stop_when: asked ten times a second; once it says yes, the command gets SIGTERM.
          accept: exit codes of success.
        """
        shown = shlex.join(["python", "-m", module, *words])
        self._current["commands"].append(shown)
        self.say(f"$ {shown}")
        process = subprocess.Popen([sys.executable, "-m", module, *words], env={**ENVIRONMENT, **os.environ})
        signalled = False
        with _stoppable(process) as stopped:
            while process.poll() is None:
                if stop_when is not None and not signalled and stop_when():
                    self.say("half way: interrupting the run with SIGTERM, as a cloud would")
                    process.send_signal(signal.SIGTERM)
                    signalled = True
                time.sleep(0.1)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        # Kibibytes, but bytes on macOS.
        self.record["peak_bytes"] = max(self.record["peak_bytes"], peak * (1 if sys.platform == "darwin" else 1024))
        code = process.returncode
        if stopped():
            raise Stopped
        if code in accept:
            return code
        if code == 2:
            raise Failed(2)
        raise Failed(1, f"exit code {code} from: {shown}")

    def _forget(self, first: int, why: str) -> None:
        """Removes what the stages from `first` on have left, for they will be done again."""
        again = [stage for stage in self.stages[first:] if stage.name in self.record["stages"]]
        self.say(f"{again[0].title}: {why}; doing this and what follows again")
        for stage in again:
            del self.record["stages"][stage.name]
            for path in stage.outputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    # ---- the record

    def _open_record(self, fresh: bool) -> dict[str, Any]:
        path = self.folder / STATE
        empty = {
            "data": _shown(self.data) if self.data else None, "stages": {}, "not_probed": {}, "next": [],
            "cores": os.cpu_count(), "peak_bytes": 0,
        }  # fmt: skip
        outputs = {path for stage in self.stages for path in stage.outputs}
        if not path.exists():
            foreign = sorted(str(p) for p in outputs if p.exists())
            if foreign:
                raise UserError(
                    f"{foreign[0]} exists, but was not made by this command; name another folder with --output"
                )
            return empty
        if not fresh:
            return {**json.loads(path.read_text(encoding="utf-8")), "data": empty["data"]}
        for output in outputs:
            shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        path.unlink()
        return empty

    def _save_record(self) -> None:
        beside = self.folder / f"{STATE}.tmp"
        beside.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.folder / STATE)

    def _log(self, name: str) -> list[dict[str, Any]]:
        """Finished lines of the run's log."""
        path = self.run_folder / f"{name}.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    # ---- what is said

    def say(self, text: str, *, bold: bool = False) -> None:
        if bold and sys.stderr.isatty():
            text = f"\033[1m{text}\033[0m"
        print(text, file=sys.stderr, flush=True)

    def _summary(self) -> None:
        from curia_jax.evaluate import table

        rows = json.loads(self.results.read_text(encoding="utf-8"))
        self.say("")
        if rows:
            table.show([row for row in rows if row["metric"].startswith("auroc")])
        seconds = sum(entry["seconds"] for entry in self.record["stages"].values())
        gigabytes = self.record["peak_bytes"] / 1e9
        self.say(
            f"report: {self.report}   (all stages {seconds / 60:.1f} min; largest process {gigabytes:.1f} GB)",
            bold=True,
        )
        self.say("next:")
        for why, words in self.record["next"]:
            self.say(f"  {shlex.join(words)}\n      {why}")


def check_resumed(events: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]], batch_size: int) -> str:
    """Compares the log of a run with what it should be if every example was taken once, in turn.

    Args:
      events, lines: of events.jsonl and metrics.jsonl.

    Returns:
      What was found, in a sentence.

    Raises:
      Failed: the run left out or repeated examples when it was resumed.
    """
    for line in lines:
        if line["examples_seen"] != line["step"] * batch_size:
            raise Failed(
                1,
                f"the run's log says {line['examples_seen']} examples at step {line['step']}, "
                f"but {batch_size} a step make {line['step'] * batch_size}",
            )
    stops = [event for event in events if event["event"] == "preempted"]
    if not stops:
        return "the run was never interrupted"
    stop = stops[-1]
    resumed = next((event for event in events if event["event"] == "resumed" and event["time"] >= stop["time"]), None)
    after = next((line for line in lines if resumed and line["step"] > resumed["step"]), None)
    if resumed is None or after is None:
        raise Failed(1, f"the run was interrupted at step {stop['step']}, but its log shows no step after that")
    if resumed["examples_seen"] != stop["examples_seen"]:
        raise Failed(
            1, f"the run stopped after {stop['examples_seen']} examples, but went on after {resumed['examples_seen']}"
        )
    return (
        f"interrupted after {stop['examples_seen']:,} examples, resumed with the very next one "
        f"(step {after['step']:,} ends at {after['examples_seen']:,})"
    )


@contextlib.contextmanager
def _stoppable(process: subprocess.Popen) -> Iterator[Callable[[], bool]]:
    """While it lasts, SIGTERM is passed on to the process and SIGINT is left to it: a terminal sends it to both."""
    asked = False

    def on_signal(number: int, _: Any) -> None:
        nonlocal asked
        asked = True
        if number == signal.SIGTERM:
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _write_labels(table: Path, phantom: Path, others: Sequence[Path]) -> None:
    """The phantom's labels, and a line without any for each file of the other folders: a label table says which files of
    its folders take part."""
    from data_pipeline.stages import inventory

    with phantom.open(encoding="utf-8", newline="") as file:
        rows = [{"file": phantom.parent / row["file"], "lesion": LESION[row["lesion"]]} for row in csv.DictReader(file)]
    rows += [{"file": path, "lesion": ""} for path in inventory.find_files([str(p) for p in others])]
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["file", "lesion"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "file": os.path.relpath(row["file"], table.parent)} for row in rows)


def _fingerprint(folders: Sequence[Path]) -> str:
    """Changes when a file in one of the folders is added, removed, renamed or written to."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            status = path.stat()
            digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _shown(path: Path) -> str:
    """A path as one types it here: relative, unless that leads far up."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("../../") else relative


if __name__ == "__main__":
    sys.exit(main())
