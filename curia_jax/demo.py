"""Runs the whole pipeline with the commands that a user types: exams, shards, pretraining (interrupted half way and
resumed), weights, scores, report.

Without --data it uses a synthetic phantom of many patients and the CT and MR files that come with pydicom; nothing is
downloaded. Rerun the command to resume after an interruption. Finished stages whose inputs have not changed are skipped.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from curia_common import cli, logs
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode
from curia_jax.evaluate.results import RESULTS, SHARDS
from curia_jax.report import timeline

CONFIG = "demo"
FEATURES, HEADS = "mean+std", "ridge,logistic"  # of the patch tokens; probes
LAYOUTS = ("vit_mae", "vit", "dinov2", "timm")
RECORD = "demo.json"
# The demo runs on the CPU, even where there is an accelerator. There glibc returns freed memory to the operating system and gets it zeroed
# page by page in every step; keeping it, in huge pages, makes a step about a tenth faster. Other C libraries ignore this.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184",
}
# Longer side of the slices, px: that of the model's image. Reading larger ones would take longer than a training step.
SIZE = 64
# Many patients with few small slices: enough to learn from, and enough test patients for narrow intervals.
PHANTOM = ("--seed=1", "--series=abdomen_ct", f"--size={SIZE}", "--slices=5", "--varied")
# Shares of the phantom's patients: tested, and labelled for the probes. The rest are for pretraining alone.
TEST_SHARE, LABELLED_SHARE = 0.3, 0.2
TASK = "situs"
ABOUT = (
    "The task: half of the phantom's patients have situs inversus, the mirror image of the usual anatomy (situs solitus), with "
    "the liver on the left. All are rotated and off centre, in different contrast phases, so that the position of the organs relative "
    "to each other tells the classes apart, hardly the brightness of a pixel. Most training patients have no label; the probes learn "
    "from the others."
)
# The same labels, shuffled among the patients of a split. The score of a single shuffle of few patients varies a lot; the mean
# over many shuffles shows chance.
CONTROLS = tuple(f"{TASK}_shuffled_{n}" for n in range(1, 9))
EXAMPLES = """
python -m curia_jax.demo
python -m curia_jax.demo --data=/path/to/exams --output=mine
python -m curia_jax.demo --output=longer --config.duration='3000 steps'     fields of the config can be changed
"""

log = logs.get_logger(__name__)


def parser() -> cli.Parser:
    made = cli.parser(
        "python -m curia_jax.demo", __doc__, examples=EXAMPLES, overrides=True,
        codes=(ExitCode.DIVERGED, ExitCode.DATA, ExitCode.DOES_NOT_FIT),
    )  # fmt: skip
    made.add_argument("--data", metavar="FOLDER", help="your own DICOM or NIfTI files, instead of the phantom")
    made.add_argument("--output", metavar="FOLDER", default="demo", help="folder of all results (%(default)s)")
    made.add_argument("--patients", type=int, default=400, help="of the phantom (%(default)s)")
    made.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the build (%(default)s)")
    made.add_argument("--fresh", action="store_true", help="run every stage again")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), demo, argv)


def demo(args: argparse.Namespace) -> int:
    try:
        Demo(args).run()
    except CommandFailed as failed:
        return failed.exit_code
    return ExitCode.DONE


class CommandFailed(Exception):
    """A command failed and has said why; the demo ends with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class ResumeError(UserError):
    """The resumed run left out or repeated examples."""

    exit_code = ExitCode.FAULT


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the demo.

    Attributes:
      name, title: for the record, and for people.
      action: runs it; may be called again after an interruption.
      outputs: files and folders that it writes; without them the stage is not done.
      inputs: text that changes with everything, apart from the earlier stages, that decides its result.
    """

    name: str
    title: str
    action: Callable[[], None]
    outputs: tuple[Path, ...]
    inputs: str = ""


@dataclasses.dataclass(frozen=True)
class LogLine:
    """The fields of a line of metrics.jsonl or events.jsonl that the demo reads.

    Attributes:
      time: seconds since 1970.
      event: "started", "resumed", "preempted" or "finished"; empty for metrics.
      total_steps: of the run; 0 where the line does not say.
    """

    step: int
    examples_seen: int
    time: int | float = 0.0
    event: str = ""
    total_steps: int = 0


class Demo:
    """The stages, and the record of them in <output>/demo.json.

    Raises:
      UserError: an option or the output folder cannot be used.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from curia_jax import config

        cli.at_least("--patients", args.patients, 1)
        cli.at_least("--workers", args.workers, 1)
        self.data = Path(args.data) if args.data else None
        if self.data is not None and not self.data.is_dir():
            what = "is a file" if self.data.exists() else "does not exist"
            raise UserError(f"--data={self.data} {what}; name a folder of DICOM or NIfTI files")
        self.folder = Path(args.output)
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output={self.folder} is a file; name a folder")
        self.shards, self.run_folder, self.weights = (self.folder / name for name in ("shards", "run", "weights"))
        self.results, self.report = self.folder / "results", self.folder / "report.html"
        self.phantom = self.folder / "phantom"
        self.patients, self.workers, self.overrides = args.patients, args.workers, args.overrides
        # Loaded before anything runs, so that a misspelt field is found at once.
        self.settings = config.load(CONFIG, self.overrides).to_json_best_effort(sort_keys=True)
        self.stages = self._stages()
        self.record = self._open_record(args.fresh)
        self.began = time.monotonic()

    # ---- stages

    def _stages(self) -> list[Stage]:
        phantom = Stage("phantom", "synthetic exams", self._phantom, (self.phantom,), f"{self.patients} {PHANTOM}")
        return [
            *([phantom] if self.data is None else []),
            Stage(
                "build", "exams to slice shards", self._build, (self.shards,), f"{SIZE} {_fingerprint(self._exams())}"
            ),
            Stage("pretrain", "pretraining, interrupted half way", self._pretrain, (self.run_folder,), self.settings),
            Stage("resume", "pretraining, resumed", self._resume, (self.run_folder,)),
            Stage("convert", "weights for PyTorch", self._convert, (self.weights,), " ".join(LAYOUTS)),
            Stage("evaluate", "scores", self._evaluate, (self.results,)),
            Stage("report", "report", self._report, (self.report, self.report.with_name("report_pictures"))),
        ]

    def _exams(self) -> Path:
        """The folder of exams that no stage writes."""
        if self.data is not None:
            return self.data
        pydicom = find_spec("pydicom")
        if pydicom is None or not pydicom.submodule_search_locations:
            raise UserError("pydicom is not installed; pip install 'curia-jax[demo]'")
        return Path(pydicom.submodule_search_locations[0]) / "data" / "test_files"

    def _phantom(self) -> None:
        if self.phantom.exists():
            shutil.rmtree(self.phantom)  # half written by a demo that was stopped
        self.command("data_pipeline.phantom", f"--output={self.phantom}", f"--patients={self.patients}", *PHANTOM)

    def _build(self) -> None:
        inputs, options = [_relative(self._exams())], []
        if self.data is None:
            inputs = [str(self.phantom), *inputs]
            table = self.folder / "labels.csv"
            _write_labels(table, self.phantom / "labels.csv")
            # Pseudonyms, and the splits of the other files, follow from a secret key, which the build creates unless there is
            # one. The phantom has no secrets, and with a fixed key every demo is the same.
            self.shards.with_suffix(".key").write_text("the phantom has no secrets\n", encoding="utf-8")
            options = [f"--labels={table}", "--label-columns", TASK, *CONTROLS, "--split-column=split"]
        self.command(
            "data_pipeline.build", "--input", *inputs, f"--output={self.shards}", *options,
            f"--size={SIZE}", "--validation=0.15", "--test=0.25", f"--workers={self.workers}",
        )  # fmt: skip

    def _pretrain_words(self) -> list[str]:
        from curia_jax.evaluate import labels

        # With very few patients the keyed hash can leave none for training: then train on all, and score nothing.
        splits = sorted(set(labels.read_index(self.shards).column("split").to_pylist()))
        split = [] if "train" in splits else [f"--config.data.split={'+'.join(splits)}"]
        return [
            "curia_jax.pretrain", f"--config={CONFIG}", f"--workdir={self.run_folder}",
            f"--config.data.shards={self.shards}", *split, *self.overrides,
        ]  # fmt: skip

    def _pretrain(self) -> None:
        events = self._log("events")
        if any(line.event == "preempted" for line in events):
            return  # this stage was stopped between the interruption and its record
        starts_before = len(_starts(events))

        def half_way() -> bool:
            """Whether the run has taken a step since its latest start, and half of all its steps."""
            starts, lines = _starts(self._log("events")), self._log("metrics")
            if len(starts) <= starts_before or not lines:
                return False
            return lines[-1].step > starts[-1].step and lines[-1].step >= starts[-1].total_steps // 2

        code = self.command(*self._pretrain_words(), stop_when=half_way, accept=(ExitCode.DONE, ExitCode.RESTART))
        if code == ExitCode.DONE:
            log.info("the run finished before it could be interrupted")

    def _resume(self) -> None:
        self.command(*self._pretrain_words())
        batch_size = json.loads((self.run_folder / "config.json").read_text(encoding="utf-8"))["batch_size"]
        log.info(check_resumed(self._log("events"), self._log("metrics"), batch_size))

    def _convert(self) -> None:
        for layout in LAYOUTS:
            output = self.weights / layout
            self.command(
                "curia_jax.convert", f"--checkpoint={self.run_folder}", f"--output={output}", f"--layout={layout}"
            )

    def _evaluate(self) -> None:
        from curia_jax.evaluate import labels

        index = labels.read_index(self.shards)
        names = labels.available(index)
        # Labels from a table; only without any, what every exam says of itself.
        given = [name for name in names if name not in labels.TECHNICAL]
        obstacles = {name: labels.obstacle(index, name) for name in given or names}
        not_probed = {name: reason for name, reason in obstacles.items() if reason is not None}
        self._save(dataclasses.replace(self.record, not_probed=not_probed))
        for name, reason in not_probed.items():
            log.info(f"not probed: {name}: {reason}")
        possible = [name for name, reason in obstacles.items() if reason is None]
        if not possible:
            self.results.mkdir(exist_ok=True)
            (self.results / RESULTS).write_text("[]\n", encoding="utf-8")
            return
        self.command(
            "curia_jax.evaluate", f"--tasks={','.join(SHARDS + name for name in possible)}", f"--data={self.shards}",
            f"--backbones={self.run_folder}", f"--features={FEATURES}", f"--heads={HEADS}", f"--output={self.results}",
        )  # fmt: skip

    def _report(self) -> None:
        self._save(dataclasses.replace(self.record, next=self._next_commands()))
        self.command(
            "curia_jax.report", f"--run={self.run_folder}", f"--shards={self.shards}", f"--results={self.results / RESULTS}",
            f"--weights={self.weights}", f"--timeline={self.folder / RECORD}", f"--output={self.report}",
            *([f"--about={ABOUT}", f"--control={','.join(SHARDS + name for name in CONTROLS)}"] if self.data is None else []),
        )  # fmt: skip

    def _next_commands(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """What to type next: pairs of a purpose and the words."""
        steps = _starts(self._log("events"))[0].total_steps
        pretrain = [word for word in self._pretrain_words() if not word.startswith("--config.duration=")]
        return (
            (
                "the same on your own exams, a folder of DICOM or NIfTI files",
                ("python", "-m", "curia_jax.demo", "--data=/path/to/exams", "--output=mine"),
            ),
            (
                "ten times the training; the run resumes from its newest checkpoint",
                ("python", "-m", *pretrain, f"--config.duration={10 * steps} steps"),
            ),
            ("watch the curves", ("tensorboard", f"--logdir={self.run_folder / 'tensorboard'}")),
        )

    # ---- running them

    def run(self) -> None:
        """Runs the stages that are not done.

        Raises:
          CommandFailed: a command failed.
          ResumeError: training left out or repeated examples when it was resumed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        key = ""
        for number, stage in enumerate(self.stages, start=1):
            key = hashlib.sha256(json.dumps([key, stage.name, stage.inputs]).encode()).hexdigest()
            heading = f"[{number}/{len(self.stages)}] {stage.title}"
            known = self.record.stages.get(stage.name)
            if known and known.key == key and known.done and all(path.exists() for path in stage.outputs):
                log.info(f"{heading}: done before, in {known.seconds:.0f} s")
                continue
            if known and (known.key != key or known.done):
                self._forget(number - 1, "its inputs changed" if known.key != key else "its output is missing")
                known = None
            seconds_before = known.seconds if known else 0.0
            self._current = stage.name
            self._save(self.record.with_stage(stage.name, timeline.Stage(key, False, seconds_before, stage.title)))
            log.info(_bold(f"\n{heading}  ({time.monotonic() - self.began:.0f} s so far)"))
            started, done = time.monotonic(), False
            try:
                stage.action()
                done = True
            finally:
                self._update_stage(done=done, seconds=seconds_before + time.monotonic() - started)
        self._summary()

    def command(
        self, module: str, *words: str, stop_when: Callable[[], bool] | None = None,
        accept: tuple[int, ...] = (ExitCode.DONE,),
    ) -> int:  # fmt: skip
        """Runs `python -m module words` in the foreground.

        Args:
          stop_when: asked ten times a second; once it is true, the command gets SIGTERM.
          accept: exit codes of success.

        Raises:
          CommandFailed: another exit code.
        """
        shown = shlex.join(["python", "-m", module, *words])
        self._update_stage(commands=(*self.record.stages[self._current].commands, shown))
        log.info(f"$ {shown}")
        process = subprocess.Popen([sys.executable, "-m", module, *words], env={**ENVIRONMENT, **os.environ})
        signalled = False
        try:
            while process.poll() is None:
                if stop_when is not None and not signalled and stop_when():
                    log.info("half way: interrupting the run with SIGTERM, as a cloud would")
                    process.send_signal(signal.SIGTERM)
                    signalled = True
                time.sleep(0.1)
        except KeyboardInterrupt:
            # A terminal sends Ctrl-C to both processes, but SIGTERM reaches this one only.
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024  # kibibytes, but bytes on macOS
        self._save(dataclasses.replace(self.record, peak_bytes=max(self.record.peak_bytes, peak)))
        code = process.returncode
        if code in accept:
            return code
        log.info(f"exit code {code} from: {shown}")
        raise CommandFailed(code if code > 0 else ExitCode.FAULT)  # negative: killed by a signal

    def _forget(self, first: int, reason: str) -> None:
        """Removes the outputs of the stages from `first` on, which run again."""
        again = [stage for stage in self.stages[first:] if stage.name in self.record.stages]
        log.info(f"{again[0].title}: {reason}; running this stage and those after it again")
        record = self.record
        for stage in again:
            record = record.with_stage(stage.name, None)
            for path in stage.outputs:
                _remove(path)
        self._save(record)

    # ---- record

    def _open_record(self, fresh: bool) -> timeline.Timeline:
        path = self.folder / RECORD
        empty = timeline.Timeline(data=_relative(self.data) if self.data else None, cores=os.cpu_count() or 1)
        outputs = {path for stage in self.stages for path in stage.outputs}
        if not path.exists():
            foreign = sorted(str(output) for output in outputs if output.exists())
            if foreign:
                raise UserError(
                    f"{foreign[0]} exists, but was not made by this command; name another folder with --output"
                )
            return empty
        if not fresh:
            return dataclasses.replace(timeline.read(path), data=empty.data)
        for output in outputs:
            _remove(output)
        path.unlink()
        return empty

    def _save(self, record: timeline.Timeline) -> None:
        self.record = record
        record.write(self.folder / RECORD)

    def _update_stage(self, **changes: bool | float | tuple[str, ...]) -> None:
        """Changes fields of the record of the current stage."""
        stage = dataclasses.replace(self.record.stages[self._current], **changes)
        self._save(self.record.with_stage(self._current, stage))

    def _log(self, name: str) -> list[LogLine]:
        """Complete lines of the run's metrics.jsonl or events.jsonl."""
        path = self.run_folder / f"{name}.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        names = [field.name for field in dataclasses.fields(LogLine)]
        return [LogLine(**{name: line[name] for name in names if name in line}) for line in lines]

    def _summary(self) -> None:
        from curia_jax.evaluate import results, table
        from curia_jax.report import findings

        scores = [score for score in results.read(self.results / RESULTS) if score.metric == "auroc"]
        log.info("")
        controls = [SHARDS + name for name in CONTROLS]
        shown = [score for score in scores if score.study.task not in controls]
        if shown:
            table.show(shown)
        for finding in findings.find(shown).values():
            log.info(finding.sentence)
        if sentence := findings.control_sentence(scores, controls):
            log.info(sentence)
        gigabytes = self.record.peak_bytes / 1e9
        log.info(
            _bold(
                f"report: {self.report}   (all stages {self.record.seconds / 60:.1f} min; largest process {gigabytes:.1f} GB)"
            )
        )
        log.info("next:")
        for purpose, words in self.record.next:
            log.info(f"  {shlex.join(words)}\n      {purpose}")


def check_resumed(events: Sequence[LogLine], lines: Sequence[LogLine], batch_size: int) -> str:
    """Checks by the log of a run that it consumed every example once, in order, across its interruption.

    Args:
      events, lines: of events.jsonl and metrics.jsonl.

    Returns:
      A sentence with the result.

    Raises:
      ResumeError: examples were left out or repeated.
    """
    for line in lines:
        if line.examples_seen != line.step * batch_size:
            raise ResumeError(
                f"the run's log says {line.examples_seen} examples at step {line.step}, but {batch_size} a step make "
                f"{line.step * batch_size}"
            )
    stops = [event for event in events if event.event == "preempted"]
    if not stops:
        return "the run was never interrupted"
    stop = stops[-1]
    resumed = next((event for event in events if event.event == "resumed" and event.time >= stop.time), None)
    after = next((line for line in lines if resumed and line.step > resumed.step), None)
    if resumed is None or after is None:
        raise ResumeError(f"the run was interrupted at step {stop.step}, but its log shows no step after that")
    if resumed.examples_seen != stop.examples_seen:
        raise ResumeError(
            f"the run stopped after {stop.examples_seen} examples, but resumed after {resumed.examples_seen}"
        )
    return (
        f"interrupted after {stop.examples_seen:,} examples, resumed with the very next one "
        f"(step {after.step:,} ends at {after.examples_seen:,})"
    )


def _starts(events: Sequence[LogLine]) -> list[LogLine]:
    return [line for line in events if line.event in ("started", "resumed")]


def _write_labels(table: Path, phantom: Path) -> None:
    """The label table of the build: split and labels of the phantom's files."""
    with phantom.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    by_patient = divide({line["patient"]: line[TASK] for line in lines})
    rows = [(phantom.parent / line["file"], by_patient[line["patient"]]) for line in lines]
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "split", TASK, *CONTROLS])
        writer.writerows(
            (os.path.relpath(path, table.parent), one.split, one.label, *one.shuffled) for path, one in rows
        )


class Divided(NamedTuple):
    """A patient's split, label, and label in each shuffle; labels are empty where the probes get none."""

    split: str
    label: str
    shuffled: tuple[str, ...]


def divide(labels: Mapping[str, str]) -> dict[str, Divided]:
    """Splits patients and shuffles their labels within each split, as often as there are CONTROLS.

    Patients differ at random, so that their order can decide the split. The last ones have no label: pretraining needs none.
    """
    patients, random_order = list(labels), random.Random(0)
    tested = round(TEST_SHARE * len(patients))
    labelled = round(LABELLED_SHARE * len(patients))
    result = dict.fromkeys(patients, Divided("train", "", ("",) * len(CONTROLS)))
    for split, part in (("test", patients[:tested]), ("train", patients[tested : tested + labelled])):
        shuffles = [random_order.sample(part, len(part)) for _ in CONTROLS]
        for one, *others in zip(part, *shuffles, strict=True):
            result[one] = Divided(split, labels[one], tuple(labels[other] for other in others))
    return result


def _fingerprint(folder: Path) -> str:
    """Changes when a file in the folder is added, removed, renamed or written to."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        status = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _relative(path: Path) -> str:
    """The path relative to the working directory, unless that leads far up."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("../../") else relative


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stderr.isatty() else text


if __name__ == "__main__":
    sys.exit(main())
