"""Injects faults into runs of `python -m curia_jax.pretrain`, and checks the outcome. Prints the table of docs/reliability.md.

  python -m benchmarks.faults                              every fault, a few times: `make faults`
  python -m benchmarks.faults --all                        the whole counts, more than 200 SIGKILLs among them
  python -m benchmarks.faults --only=SIGTERM --processes=2 those faults whose name begins so, on two processes

Every start is the command itself, in a process of its own, with a model so small that a run is its start-up and a few milliseconds
a step; several processes are hosts that find each other on loopback (Gloo). Aimed faults are injected by the process itself, at
an audit event of Python such as the opening of the commit marker (benchmarks/fault_config.py), so that they hit on any machine;
SIGKILLs at random moments come from outside. A full disk is a limit of 4 KiB on the size of files (RLIMIT_FSIZE), so that every
write beyond it fails as on a full disk. Work directories in a bucket are on a Cloud Storage server on loopback (tests/gcs.py).

  tried         faults injected
  survived      of them, those with the promised outcome: the exit codes of docs/reliability.md, and where it promises that the
                same command resumes, a finished run whose checkpoints are all whole. The right refusal counts
  lost_steps    steps that had to be taken again: the most after one fault
  lost_examples neither trained on nor reported as skipped, of all tries together: examples of steps that are missing in
                metrics.jsonl, or whose loss is not that of the undisturbed run. A bucket may lack lines of metrics.jsonl, as
                docs/buckets.md says: where the final parameters are identical, their examples are not lost
  identical     the final parameters are bit for bit those of an undisturbed run on as many processes; null where the run was
                refused, or rightly trained on something else
  seconds_to_stop    from the fault to the end of the last process, the median; null where nothing was to end
  seconds_to_resume  from the command to its first step, the median

Results are kept in --folder; rerun the command to resume. Exits with 1 if a run did not survive a fault.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow.parquet as pq
from etils import epath

from curia_common import cli
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode
from curia_common.progress import Progress
from tests import gcs

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "benchmarks" / "fault_config.py"
BATCH, SAVE_EVERY = 16, 4  # of fault_config.py
SHORT, LONG = 24, 80  # steps of a run with one fault, and of one that is killed again and again
AT = 14  # the batch in which most faults happen: steps 4, 8 and 12 are saved
# XLA compiles in half the time; every run of the benchmark is compiled so, the undisturbed ones too.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
PATIENCE = 600  # seconds for one start; JAX's own limit for a lost host is 300
STOPPED = 2.0  # seconds of a SIGSTOP that ends
BUCKET = "bucket"  # the storage of a task whose work directory is in one
TRIES = "tries.jsonl"

Words = Sequence[str]
Injected = dict[str, Any]  # see fault_config.py


class Try(NamedTuple):
    """One fault and its outcome; see the head of this file. `note` says which promise was broken."""

    survived: bool
    lost_steps: int = 0
    lost_examples: int = 0
    identical: bool | None = None
    seconds_to_stop: float | None = None
    seconds_to_resume: float | None = None
    note: str = ""


class Row(NamedTuple):
    """A line of the table."""

    fault: str
    processes: int
    storage: str
    tried: int
    survived: int
    lost_steps: int
    lost_examples: int
    identical: bool | None
    seconds_to_stop: float | None
    seconds_to_resume: float | None


# ---- one start of the command


class Start:
    """One start of the command on several processes.

    Args:
      injected: process -> its faults.
    """

    def __init__(
        self,
        place: "Place",
        words: Words,
        injected: Mapping[int, Sequence[Injected]] | None = None,
        shards: Path | None = None,
    ) -> None:
        self._place, self.began = place, time.time()
        place.starts += 1
        self._name = place.folder / f"start-{place.starts}"
        command = [
            sys.executable, "-m", "curia_jax.pretrain", f"--config={CONFIG}", f"--workdir={place.workdir}",
            f"--config.data.shards={shards or place.bench.shards}", f"--config.mesh.data={place.processes}",
            f"--config.devices.multihost={place.processes > 1}", *words,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        environment |= {
            "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "FAULT_TIME": f"{self._name}.fault",
            "JAX_COMPILATION_CACHE_DIR": str(place.bench.folder / "compilations"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "XLA_FLAGS": QUICK,
        }  # fmt: skip
        if place.processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                environment["JAX_COORDINATOR_ADDRESS"] = f"localhost:{free.getsockname()[1]}"
            environment["JAX_NUM_PROCESSES"] = str(place.processes)
        self.processes: list[subprocess.Popen[bytes]] = []
        for number in range(place.processes):
            own = {"JAX_PROCESS_ID": str(number)} if place.processes > 1 else {}
            own["FAULTS"] = json.dumps((injected or {}).get(number, []))
            with self._file(number).open("wb") as err:
                process = subprocess.Popen(command, cwd=ROOT, env={**environment, **own}, stdout=err, stderr=err)
            place.bench.add(process)
            self.processes.append(process)
        self._ends: dict[int, float] = {}

    def _file(self, number: int) -> Path:
        return Path(f"{self._name}-{number}.err")

    def err(self, number: int = 0) -> str:
        """Standard error of a process."""
        return self._file(number).read_text(errors="replace")

    @property
    def ended(self) -> list[int | None]:
        """Exit codes, None for those that are still there."""
        for number, process in enumerate(self.processes):
            if process.poll() is not None:
                self._ends.setdefault(number, time.time())
        return [process.returncode for process in self.processes]

    def wait(self, without: Iterable[int] = (), seconds: float = PATIENCE) -> list[int | None]:
        """Exit codes of all processes, in time; kills what has not ended, and `without` when the others have."""
        deadline, waited = time.monotonic() + seconds, set(range(len(self.processes))) - set(without)
        while any(self.ended[number] is None for number in waited) and time.monotonic() < deadline:
            time.sleep(0.02)
        codes = self.ended
        for process in self.processes:
            process.kill()
            process.wait()
        return codes

    def kill(self, number: int, number_of_signal: int = signal.SIGKILL) -> float:
        """Sends a signal; returns when."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[number].pid, number_of_signal)
        return time.time()

    def until(self, happened: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Waits for something; False where a process ended before."""
        deadline = time.monotonic() + seconds
        while not happened():
            if any(code is not None for code in self.ended) or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    @property
    def fault_at(self) -> float | None:
        """When the first injected fault happened."""
        path = Path(f"{self._name}.fault")
        return float(path.read_text().split()[0]) if path.exists() and path.stat().st_size else None

    def seconds_to_stop(self, since: float | None) -> float | None:
        """From the fault to the end of the last process that ended by itself."""
        return max(0.0, max(self._ends.values()) - since) if since is not None and self._ends else None

    def seconds_to_resume(self) -> float | None:
        """From the command to its first step."""
        events = _lines(self._place.workdir / "events.jsonl")
        times = [event["time"] for event in events if event.get("event") in ("started", "resumed")]
        return times[-1] - self.began if times and times[-1] > self.began else None


def _lines(path: Path | epath.Path) -> list[dict[str, Any]]:
    """The readable lines of a file of JSON lines."""
    found: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


# ---- a work directory, and the checks on it


@dataclasses.dataclass
class Place:
    """The folder of one unit of work: a run that faults happen to.

    Attributes:
      workdir: where the run is, in `folder` or in a bucket.
      starts: of the command so far.
    """

    bench: "Bench"
    folder: Path
    processes: int
    random: random.Random
    in_bucket: bool = False
    starts: int = 0

    @property
    def workdir(self) -> epath.Path:
        from curia_jax import storage

        return storage.root(f"gs://{gcs.BUCKET}/{self.folder.name}" if self.in_bucket else self.folder / "run")

    def start(
        self,
        *words: str,
        injected: Mapping[int, Sequence[Injected]] | None = None,
        steps: int = SHORT,
        shards: Path | None = None,
    ) -> Start:
        return Start(self, [f"--config.duration={steps} steps", *words], injected, shards)

    def logged(self) -> dict[int, float]:
        """Loss of each step in the log, the last of those that were taken again."""
        return {
            row["step"]: row.get("loss", float("nan"))
            for row in _lines(self.workdir / "metrics.jsonl")
            if "step" in row
        }

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in _lines(self.workdir / "events.jsonl") if event.get("event") == name]

    def resumed_at(self) -> int:
        """Step from which the last start resumed."""
        starts = self.events("started") + self.events("resumed")
        return int(max(starts, key=lambda event: event["time"])["step"]) if starts else 0

    def lost_examples(self, steps: int, *, same: bool = True) -> int:
        """Examples of steps that are missing or, where it has to be the same, not those of the undisturbed run."""
        found = self.logged()
        wanted = self.bench.undisturbed(self.processes, steps).losses if same else {}
        return BATCH * sum(step not in found or (same and found[step] != wanted[step]) for step in range(1, steps + 1))

    def problems(self, steps: int, *, same: bool = True) -> list[str]:
        """What is wrong with a run that ought to have finished."""
        from curia_jax import checkpoint

        verdicts = checkpoint.examine(str(self.workdir))
        torn = [f"{Path(verdict.path).name}: {verdict.problem}" for verdict in verdicts if verdict.problem]
        steps_saved = [int(Path(verdict.path).name) for verdict in verdicts if not verdict.problem]
        found = [f"{len(torn)} checkpoints are torn at the end ({torn[0]})"] if torn else []
        if steps not in steps_saved:
            found.append(f"there is no checkpoint of step {steps}")
        if len(self.events("finished")) != 1:
            found.append(f"{len(self.events('finished'))} events 'finished'")
        return found

    def identical(self, steps: int) -> bool:
        """Whether the final parameters are those of the undisturbed run."""
        try:
            return _same(_parameters(self.workdir), self.bench.undisturbed(self.processes, steps).parameters)
        except Exception:  # noqa: BLE001 - no checkpoint, or none that can be read
            return False

    def judged(
        self,
        again: Start,
        before: int,
        problems: list[str],
        *,
        steps: int = SHORT,
        same: bool = True,
        stop: float | None = None,
    ) -> Try:
        """The outcome of a fault, after the next start has ended.

        Args:
          before: last step before the fault.
          problems: what was not as promised so far.
          same: it has to be bit for bit the undisturbed run.
          stop: seconds.
        """
        if not problems:
            problems = self.problems(steps)
        identical = self.identical(steps) if same else None
        if identical is False:
            problems.append("the parameters are not those of the undisturbed run")
        lost = 0 if self.in_bucket and identical else self.lost_examples(steps, same=same)
        if lost:
            problems.append(f"{lost} examples are lost")
        return Try(
            not problems,
            max(0, before - self.resumed_at()),
            lost,
            identical,
            stop,
            again.seconds_to_resume(),
            "; ".join(problems),
        )


def _parameters(workdir: epath.Path) -> dict[str, np.ndarray]:
    from curia_jax import checkpoint, sharding

    return sharding.paths(checkpoint.load(workdir).params)


def _same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(leaf.tobytes() == other[name].tobytes() for name, leaf in one.items())


class Undisturbed(NamedTuple):
    """A run without a fault.

    Attributes:
      seconds: from the command to its end.
    """

    losses: dict[int, float]
    parameters: dict[str, np.ndarray]
    seconds: float


class Bench:
    """The folders of the benchmark, and the undisturbed runs to compare with."""

    def __init__(self, folder: Path, shards: Path | None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._locks: dict[Any, threading.Lock] = {}
        self._lock = threading.Lock()
        self._undisturbed: dict[tuple[int, int], Undisturbed] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopped = False
        self.shards = shards or self._phantom()

    def _phantom(self) -> Path:
        """Shards of three phantom patients: 48 slices of 32 px."""
        if not (self.folder / "shards").exists():
            exams, built = self.folder / "exams", self.folder / "building"
            for command in (
                ["data_pipeline.phantom", f"--output={exams}", "--patients=3", "--size=32", "--slices=4"],
                [
                    "data_pipeline.build",
                    f"--input={exams}/dicom",
                    f"--output={built}",
                    "--validation=0",
                    "--test=0",
                    "--workers=1",
                ],
            ):
                subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
            built.rename(self.folder / "shards")
        return self.folder / "shards"

    def add(self, process: subprocess.Popen[bytes]) -> None:
        """Notes a process of a start."""
        with self._lock:
            if self._stopped:
                process.kill()
            self._processes.append(process)

    @contextlib.contextmanager
    def stopping(self, threads: concurrent.futures.Executor) -> Iterator[None]:
        """Where the block is interrupted, no further fault is injected, and no process is left behind."""
        try:
            yield
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            with self._lock:
                self._stopped = True
                for process in self._processes:
                    process.kill()
            raise

    def _alone(self, key: Any) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(key, threading.Lock())

    def undisturbed(self, processes: int, steps: int) -> Undisturbed:
        """The run without a fault, made once."""
        with self._alone((processes, steps)):
            if (processes, steps) not in self._undisturbed:
                place = Place(self, self.folder / f"undisturbed-{processes}-{steps}", processes, random.Random(0))
                took = place.folder / "seconds"
                if not took.exists():
                    shutil.rmtree(place.folder, ignore_errors=True)
                    place.folder.mkdir()
                    began = time.time()
                    start = place.start(steps=steps)
                    if set(start.wait()) != {0}:
                        raise RuntimeError(f"a run without a fault failed: {start.err()}")
                    took.write_text(str(time.time() - began))
                self._undisturbed[processes, steps] = Undisturbed(
                    place.logged(), _parameters(place.workdir), float(took.read_text())
                )
        return self._undisturbed[processes, steps]

    def stopped(self, place: Place) -> int:
        """Copies a run that SIGTERM stopped into a place, and returns its step. The run is made once."""
        made = self.folder / f"stopped-{place.processes}"
        with self._alone(("stopped", place.processes)):
            if not (made / "done").exists():
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir()
                first = Place(self, made, place.processes, random.Random(0))
                start = first.start(injected={0: [{"at": "batch", "nth": AT, "do": "SIGTERM"}]})
                if set(start.wait()) != {75}:
                    raise RuntimeError(f"a run that was told to stop failed: {start.err()}")
                (made / "done").touch()
        for path in (made / "run").rglob("*"):
            if path.is_file() and path.name != "lock.json":
                copy = place.workdir / path.relative_to(made / "run").as_posix()
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        return max(int(path.name) for path in (place.workdir / "checkpoints").iterdir())


# ---- faults


class Moment(NamedTuple):
    """When SIGKILL comes: at an audit event of the process, or a random number of steps after its first.

    Attributes:
      at: the event and a part of its path; None for a random moment.
      nth: which of them, at most.
      delay: seconds after it, at most.
    """

    at: str | None = None
    nth: int = 1
    delay: float = 0.0


def killed(place: Place, kills: int, moments: Sequence[Moment]) -> list[Try]:
    """SIGKILL, one process of several, and again in the next start; then the run may finish.

    A fifth of the random moments are in the first seconds of the process, the others in training.
    """
    steps = LONG if place.processes == 1 and not place.in_bucket else SHORT
    start_up = 0.5 * place.bench.undisturbed(place.processes, steps).seconds
    problems: list[str] = []
    kept: list[tuple[int, float, int]] = []  # number of the start; seconds to stop; last step before
    at: dict[int, tuple[int, float | None]] = {}  # start -> the step from which it resumed, and the seconds until then

    def kill(start: Start, who: int) -> float | None:
        """When it was killed; None where it ended by itself."""
        if place.random.random() < 0.2:
            start.until(lambda: False, place.random.uniform(0, start_up))
        elif start.until(lambda: start.seconds_to_resume() is not None):
            first, more = place.resumed_at(), place.random.randint(0, 9)
            start.until(lambda: max(place.logged(), default=0) >= first + more)
            start.until(lambda: False, place.random.uniform(0, 0.3))
        return None if any(code is not None for code in start.ended) else start.kill(who)

    while len(kept) < kills and not problems:
        who, moment = place.random.randrange(place.processes), place.random.choice(moments)
        if moment.at is None:
            start = place.start("--config.keep=2", steps=steps)
            when = kill(start, who)
            codes = start.wait()
        else:
            nth, delay = place.random.randint(1, moment.nth), place.random.uniform(0, moment.delay)
            fault = {"at": moment.at, "nth": nth, "do": "SIGKILL", "delay": delay}
            if (
                who and "checkpoint-tmp" in moment.at
            ):  # the first host makes the folder; the others write into it meanwhile
                fault |= {"at": "batch", "nth": SAVE_EVERY * nth + 1}
            elif moment.at != "batch":  # the first host alone does the rest of a save
                who = 0
            start = place.start("--config.keep=2", steps=steps, injected={who: [fault]})
            codes, when = start.wait(), start.fault_at
        if start.seconds_to_resume() is not None:
            at[place.starts] = place.resumed_at(), start.seconds_to_resume()
        if when is None or codes == [0] * place.processes:
            if codes != [0] * place.processes:
                problems.append(f"exit codes {codes} instead of 0: {start.err()[-300:]}")
            break  # it had finished before
        if [code for number, code in enumerate(codes) if number != who] != [75] * (place.processes - 1) or codes[
            who
        ] != -9:
            problems.append(
                f"exit codes {codes}, where {who} was killed and the others have to end with 75: {start.err(who)[-300:]}"
            )
        kept.append((place.starts, start.seconds_to_stop(when) or 0.0, max(place.logged(), default=0)))
    last = place.start("--config.keep=2", steps=steps)
    if (codes := last.wait()) != [0] * place.processes:
        problems.append(f"exit codes {codes} instead of 0: {last.err()[-300:]}")
    if last.seconds_to_resume() is not None:
        at[place.starts] = place.resumed_at(), last.seconds_to_resume()
    whole = place.judged(last, 0, problems, steps=steps)
    tries = []
    for number, stop, before in kept:
        # Of the starts after it, the first that took a step says what the kill has cost.
        later = next((at[one] for one in range(number + 1, place.starts + 1) if one in at), (before, None))
        lost = max(0, before - later[0])
        tries.append(whole._replace(lost_steps=lost, lost_examples=0 if tries else whole.lost_examples, seconds_to_stop=stop,
                                    seconds_to_resume=later[1]))  # fmt: skip
    return tries or [whole._replace(survived=False, note=f"nothing was killed; {whole.note}")]


def disturbed(
    place: Place,
    injected: Mapping[int, Sequence[Injected]],
    codes: Sequence[int | None],
    *words: str,
    silent: Iterable[int] = (),
    resumes_at: Sequence[int] = (),
) -> Try:
    """A run that faults happen to, and the same command again.

    Args:
      codes: the promised exit codes; None where SIGSTOP holds a process until the end.
      silent: processes that do not end.
      resumes_at: the promised steps; none for any.
    """
    start = place.start(*words, injected=injected)
    found, problems = start.wait(without=silent), []
    if start.fault_at is None:
        problems.append("the fault did not happen")
    if [None if number in silent else code for number, code in enumerate(found)] != list(codes):
        problems.append(f"exit codes {found} instead of {list(codes)}: {start.err()[-300:]}")
    again, before = start, 0
    if any(codes) or None in codes:
        before = max(place.logged(), default=0)
        again = place.start(*words)
        if set(ended := again.wait()) != {0}:
            problems.append(f"exit codes {ended} of the next start instead of 0: {again.err()[-300:]}")
        if resumes_at and place.resumed_at() not in resumes_at:
            problems.append(f"resumed from step {place.resumed_at()} instead of one of {list(resumes_at)}")
    stop = start.seconds_to_stop(start.fault_at) if any(codes) else None
    return place.judged(again, before, problems, stop=stop)


def _who(place: Place) -> int:
    """Any process, or the last of several, which is not the coordinator."""
    return place.processes - 1


def second_run(place: Place) -> list[Try]:
    """Refused with 75, naming the owner, while the first holds the lock; killed, the first has lost it at once."""
    first = place.start(injected={0: [{"at": "batch", "nth": AT, "do": "hang"}]})
    problems = [] if first.until(lambda: first.fault_at is not None) else ["the first run did not get that far"]
    second = place.start()
    if (codes := second.wait()) != [75]:
        problems.append(f"exit codes {codes} instead of 75: {second.err()[-300:]}")
    if f"is in use by process {first.processes[0].pid}" not in second.err():
        problems.append(f"the owner is not named: {second.err()[-300:]}")
    stop, before = second.seconds_to_stop(second.began), AT - 2  # the last step that is known to have ended
    first.wait(without=[0])
    again = place.start()
    if (codes := again.wait()) != [0]:
        problems.append(f"exit codes {codes} of the next start instead of 0: {again.err()[-300:]}")
    return [place.judged(again, before, problems, stop=stop)]


def lost_coordinator(place: Place) -> list[Try]:
    fault = {"at": "batch", "nth": AT, "do": "SIGKILL"}
    return [disturbed(place, {0: [fault]}, [-9] + [75] * (place.processes - 1))]


def suspended(place: Place) -> list[Try]:
    """SIGSTOP: a single process is continued and trains on; of several, the others end."""
    who = place.random.randrange(place.processes)
    fault = {"at": "batch", "nth": AT, "do": "SIGSTOP"}
    if place.processes > 1:
        return [
            disturbed(place, {who: [fault]}, [None if n == who else 75 for n in range(place.processes)], silent=[who])
        ]
    start = place.start(injected={0: [fault]})
    problems = [] if start.until(lambda: start.fault_at is not None) else ["the fault did not happen"]
    time.sleep(STOPPED)
    start.kill(0, signal.SIGCONT)
    if (codes := start.wait()) != [0]:
        problems.append(f"exit codes {codes} instead of 0: {start.err()[-300:]}")
    return [place.judged(start, 0, problems)]


def terminated(place: Place) -> list[Try]:
    """SIGTERM on one process: all save the same step and end with 75; nothing is lost."""
    fault = {"at": "batch", "nth": AT, "do": "SIGTERM"}
    return [disturbed(place, {_who(place): [fault]}, [75] * place.processes)]


def terminated_twice(place: Place) -> list[Try]:
    """A second SIGTERM while the last checkpoint is written."""
    faults = [
        {"at": "batch", "nth": AT - 1, "do": "SIGTERM"},  # step 12 is saved before, so this is the fourth save
        {"at": "open commit_success.txt", "nth": 4, "do": "SIGTERM"},
    ]
    return [disturbed(place, {0: faults}, [75] * place.processes)]


def failing(place: Place) -> list[Try]:
    """An unexpected exception: 1 where it happened, 75 elsewhere."""
    who = _who(place)
    codes = [1 if number == who else 75 for number in range(place.processes)]
    return [disturbed(place, {who: [{"at": "batch", "nth": AT, "do": "raise"}]}, codes)]


def hanging(place: Place) -> list[Try]:
    """A process whose main thread is stuck: all end with 75."""
    words = ["--config.devices.watchdog_seconds=45"]
    return [disturbed(place, {_who(place): [{"at": "batch", "nth": AT, "do": "hang"}]}, [75] * place.processes, *words)]


def disk_full_for_a_while(place: Place) -> list[Try]:
    """No file can grow while step 8 is saved: training continues, later saves succeed."""
    faults = [{"at": "batch", "nth": 7, "do": "full"}, {"at": "batch", "nth": 11, "do": "free"}]
    one = disturbed(place, {0: faults}, [0] * place.processes)
    if not place.events("save-failed") and "could not save step 8" not in (place.folder / "start-1-0.err").read_text():
        one = one._replace(survived=False, note="no save failed; " + one.note)
    # The lines of metrics that could not be written are lost, the examples are not.
    return [one]


def disk_full_to_the_end(place: Place) -> list[Try]:
    """The last state cannot be saved, nor that of step 12 where its save had not ended: 75, and resumed from what is whole."""
    return [
        disturbed(place, {0: [{"at": "batch", "nth": AT, "do": "full"}]}, [75] * place.processes, resumes_at=(8, 12))
    ]


# ---- damaged checkpoints


def _flip(path: epath.Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(bytes(data))


def _cut(path: epath.Path, generator: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: generator.randrange(1, len(data))])


def _empty(path: epath.Path, generator: random.Random) -> None:
    path.write_bytes(b"")


def _zeros(path: epath.Path, generator: random.Random) -> None:
    path.write_bytes(bytes(len(path.read_bytes())))


def _grow(path: epath.Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def _delete(path: epath.Path, generator: random.Random) -> None:
    path.rmtree() if path.is_dir() else path.unlink()


def _rename(path: epath.Path, generator: random.Random) -> None:
    path.rename(path.with_name("20"))


def _swap(path: epath.Path, generator: random.Random) -> None:
    """The state of the checkpoint before, under this step."""
    shutil.rmtree(path)
    shutil.copytree(path.parent.parent / "12" / path.name, path)


Damage = Callable[[epath.Path, random.Random], None]
ARRAYS, TABLE, META = "state/d/*", "state/_METADATA", "meta/data.json"
# What happens to the newest checkpoint: name, file, how.
DAMAGES: dict[str, tuple[str, Damage]] = {
    "bit flipped in the arrays": (ARRAYS, _flip),
    "bit flipped in the table of arrays": (TABLE, _flip),
    "bit flipped in the arrays' metadata": ("state/array_metadatas/*", _flip),
    "bit flipped in the manifest": ("state/manifest.ocdbt", _flip),
    "bit flipped in the process's data": ("state/ocdbt.process_0/d/*", _flip),
    "bit flipped in the meta data": (META, _flip),
    "bit flipped in Orbax's metadata": ("_CHECKPOINT_METADATA", _flip),
    "bit flipped in the digests": ("digests.json", _flip),
    "arrays cut": (ARRAYS, _cut),
    "arrays empty": (ARRAYS, _empty),
    "arrays missing": (ARRAYS, _delete),
    "arrays zeroed": (ARRAYS, _zeros),
    "arrays too long": (ARRAYS, _grow),
    "table of arrays cut": (TABLE, _cut),
    "manifest missing": ("state/manifest.ocdbt", _delete),
    "manifest cut": ("state/manifest.ocdbt", _cut),
    "state missing": ("state", _delete),
    "meta data missing": ("meta", _delete),
    "meta data empty": (META, _empty),
    "digests cut": ("digests.json", _cut),
    "commit marker missing": ("commit_success.txt", _delete),
    "folder named after another step": (".", _rename),
    "state of another step": ("state", _swap),
}


# Tried in a bucket, too; there is nothing to rename there.
DAMAGES_IN_BUCKET = {
    "bit flipped in the arrays",
    "arrays cut",
    "arrays missing",
    "commit marker missing",
    "meta data empty",
}


def _damage(folder: epath.Path, name: str, generator: random.Random) -> None:
    where, how = DAMAGES[name]
    path = folder if where == "." else sorted(folder.glob(where), key=str)[0]
    how(path, generator)


def damaged_newest(name: str) -> "Unit":
    """The next start resumes from the checkpoint before."""

    def unit(place: Place) -> list[Try]:
        step = place.bench.stopped(place)
        _damage(place.workdir / "checkpoints" / str(step), name, place.random)
        start = place.start()
        problems = []
        if (codes := start.wait()) != [0] * place.processes:
            problems.append(f"exit codes {codes} instead of 0: {start.err()[-300:]}")
        elif place.resumed_at() != 12:
            problems.append(f"resumed from step {place.resumed_at()} instead of 12")
        if "skipped a" not in start.err():
            problems.append("no line says that a checkpoint was skipped")
        # The damaged one is saved again only where it was not finished; else it stays, for whoever wants to look at it.
        identical, lost = place.identical(SHORT), place.lost_examples(SHORT)
        if not identical or lost:
            problems.append(f"identical: {identical}, examples lost: {lost}")
        lost_steps = max(0, step - place.resumed_at())
        return [Try(not problems, lost_steps, lost, identical, None, start.seconds_to_resume(), "; ".join(problems))]

    return unit


def refused(place: Place, start: Start, code: int, text: str, *more: str) -> list[Try]:
    """A start that has to end with this code and name the thing."""
    problems, codes = [*more], start.wait()
    if codes != [code] * place.processes:
        problems.append(f"exit codes {codes} instead of {code}: {start.err()[-300:]}")
    if text not in start.err():
        problems.append(f"no line with {text!r}: {start.err()[-300:]}")
    return [
        Try(
            not problems, seconds_to_stop=start.seconds_to_stop(start.fault_at or start.began), note="; ".join(problems)
        )
    ]


def no_whole_checkpoint(place: Place) -> list[Try]:
    """Refused with 65; the run does not restart at step 0."""
    place.bench.stopped(place)
    for folder in (place.workdir / "checkpoints").iterdir():
        _damage(folder, "bit flipped in the arrays", place.random)
    return refused(place, place.start(), ExitCode.DATA, "no checkpoint in")


def no_checkpoint_folder(place: Place) -> list[Try]:
    place.bench.stopped(place)
    (place.workdir / "checkpoints").rmtree()
    return refused(place, place.start(), ExitCode.DATA, "but has no checkpoint: is its storage mounted?")


# ---- damaged data

ALLOWED = "--config.data.damaged_share=0.5"


def _copied(place: Place) -> tuple[Path, Path]:
    """A dataset of the place's own, and its first shard."""
    shards = place.folder / "shards"
    shutil.copytree(place.bench.shards, shards)
    return shards, sorted(shards.glob("*.array_record-*"))[0]


def _republished(place: Place, slope: float) -> Path:
    """A dataset of the place's own whose first record has another slope, with the digests of that."""
    from data_pipeline.format import records
    from data_pipeline.format import shards as files

    shards, first = _copied(place)
    table = pq.read_table(shards / files.SHARDS)
    rows = table.to_pylist()
    row = next(row for row in rows if row["file"] == first.name)
    data = [files.read_record(first, number) for number in range(row["records"])]
    record = records.parse(data[0])
    data[0] = records.serialize(record.slices, dataclasses.replace(record.header, slope=slope), record.entries)
    first.unlink()
    _, row["sha256"] = files.write(first, data)
    row["bytes"] = first.stat().st_size
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), shards / files.SHARDS)
    return shards


def damaged_shard(how: Damage) -> "Unit":
    """Bytes of a shard that are not as published: 65, with the shard's name."""

    def unit(place: Place) -> list[Try]:
        shards, first = _copied(place)
        how(epath.Path(first), place.random)
        return refused(place, place.start(shards=shards, steps=4000), ExitCode.DATA, str(first.name))

    return unit


def shard_cut_while_running(place: Place) -> list[Try]:
    shards, first = _copied(place)
    start = place.start(shards=shards, steps=4000)
    problems = [] if start.until(lambda: len(place.logged()) > 4) else [f"it did not train: {start.err()[-300:]}"]
    os.truncate(first, 100)
    return refused(place, start, ExitCode.DATA, str(first.name), *problems)


def damaged_shard_table(place: Place) -> list[Try]:
    shards, _ = _copied(place)
    _cut(epath.Path(shards) / "shards.parquet", place.random)
    return refused(place, place.start(shards=shards), ExitCode.DATA, "shards.parquet is damaged")


def record_without_measurements(place: Place) -> list[Try]:
    shards = _republished(place, float("nan"))
    return refused(
        place, place.start("--config.data.damaged_share=0", shards=shards), ExitCode.DATA, "which are no measurements"
    )


def record_replaced(place: Place) -> list[Try]:
    """Where it is allowed, another slice takes the place of a damaged one, which is named."""
    shards = _republished(place, float("nan"))
    start = place.start(ALLOWED, shards=shards)
    problems = []
    if (codes := start.wait()) != [0] * place.processes:
        problems.append(f"exit codes {codes} instead of 0: {start.err()[-300:]}")
    if not any("is damaged: another slice is in its place" in start.err(number) for number in range(place.processes)):
        problems.append("no line names the damaged record")
    return [place.judged(start, 0, problems, same=False)]


def poisoned_batch(place: Place) -> list[Try]:
    """NaN in one batch: its update is not applied, which is an event; training continues."""
    injected = [{"at": "batch", "nth": AT, "do": "nan"}]
    start = place.start(injected=dict.fromkeys(range(place.processes), injected))
    problems = []
    if (codes := start.wait()) != [0] * place.processes:
        problems.append(f"exit codes {codes} instead of 0: {start.err()[-300:]}")
    if [event["step"] for event in place.events("update-refused")] != [AT]:
        problems.append(
            f"refused were {[event['step'] for event in place.events('update-refused')]} instead of {AT} alone"
        )
    return [place.judged(start, 0, problems, same=False)]


def poisoned_batches(place: Place) -> list[Try]:
    """NaN in every batch from one on: the run rolls back up to its limit, then 64."""
    injected = [{"at": "batch", "nth": AT, "last": 10_000, "do": "nan"}]
    start = place.start(
        "--config.guard.patience=3", injected=dict.fromkeys(range(place.processes), injected), steps=400
    )
    return refused(place, start, ExitCode.DIVERGED, "the run went back 3 times")


def changed_dataset(place: Place) -> list[Try]:
    place.bench.stopped(place)
    shards = _republished(place, 2.0)
    return refused(place, place.start(shards=shards), ExitCode.DATA, "is not the dataset that the checkpoint")


def new_epoch(place: Place) -> list[Try]:
    """The changed dataset where that is allowed."""
    place.bench.stopped(place)
    shards = _republished(place, 2.0)
    start = place.start("--config.data.on_change=new_epoch", shards=shards)
    codes = start.wait()
    problems = [] if codes == [0] * place.processes else [f"exit codes {codes} instead of 0: {start.err()[-300:]}"]
    return [place.judged(start, 0, problems, same=False)]


# ---- all of them

Unit = Callable[[Place], list[Try]]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
      unit: injects it once.
      counts: processes -> how often in a usual run, and with --all.
      in_bucket: the same, of work directories in a bucket; one process.
    """

    unit: Unit
    counts: Mapping[int, tuple[int, int]]
    in_bucket: tuple[int, int] = (0, 0)


ONE = {1: (1, 1)}
# Counts are lists of kills here: one run each.
KILLS: dict[str, tuple[Sequence[Moment], Mapping[int, tuple[Sequence[int], Sequence[int]]]]] = {
    "SIGKILL at a random moment": ([Moment()], {1: ((5, 5), (10,) * 15), 2: ((2,), (3, 3)), 4: ((), (2,))}),
    "SIGKILL in a save": ([Moment("os.mkdir checkpoint-tmp", 3, 0.3)], {1: ((2,), (10,)), 2: ((), (2,))}),
    "SIGKILL before the commit marker": ([Moment("open commit_success.txt", 2)], {1: ((2,), (8,))}),
    "SIGKILL after the commit marker": (
        [Moment("open .digests.json.tmp", 2), Moment("os.rename .digests.json.tmp", 2)], {1: ((2,), (8,))},
    ),
    "SIGKILL in retention": (
        [Moment("os.rename removed.txt", 2), Moment("shutil.rmtree checkpoints", 6), Moment("os.rmdir array_metadatas", 2)],
        {1: ((3,), (10,))},
    ),
    "SIGKILL in a restore": ([Moment("open _METADATA", 3, 0.3)], {1: ((2,), (10,))}),
}  # fmt: skip
FAULTS: dict[str, Fault] = {
    "SIGTERM": Fault(terminated, {1: (1, 2), 2: (1, 1), 4: (1, 1)}, (1, 2)),
    "second run in the work directory": Fault(second_run, ONE, (1, 1)),
    "SIGTERM twice": Fault(terminated_twice, {1: (1, 2), 2: (0, 1)}),
    "lost coordinator": Fault(lost_coordinator, {2: (1, 1), 4: (0, 1)}),
    "SIGSTOP": Fault(suspended, {1: (1, 2), 2: (1, 1)}),
    "exception": Fault(failing, {1: (1, 1), 2: (1, 1), 4: (0, 1)}),
    "hang": Fault(hanging, {1: (1, 1), 2: (1, 1)}),
    "disk full for a while": Fault(disk_full_for_a_while, {1: (1, 2)}),
    "disk full to the end": Fault(disk_full_to_the_end, {1: (1, 2)}),
    **{
        f"checkpoint: {name}": Fault(damaged_newest(name), ONE, (0, int(name in DAMAGES_IN_BUCKET))) for name in DAMAGES
    },
    "checkpoints: all damaged": Fault(no_whole_checkpoint, {1: (1, 1), 2: (0, 1)}, (0, 1)),
    "checkpoints: folder gone": Fault(no_checkpoint_folder, ONE, (0, 1)),
    "shard: bit flipped": Fault(damaged_shard(_flip), {1: (1, 2)}),
    "shard: cut": Fault(damaged_shard(_cut), ONE),
    "shard: missing": Fault(damaged_shard(_delete), ONE),
    "shard: cut while running": Fault(shard_cut_while_running, ONE),
    "shards.parquet cut": Fault(damaged_shard_table, ONE),
    "record that is no measurement": Fault(record_without_measurements, ONE),
    "record that is no measurement, allowed": Fault(record_replaced, {1: (1, 1), 2: (0, 1)}),
    "poisoned batch": Fault(poisoned_batch, {1: (1, 1), 2: (0, 1)}),
    "poisoned for good": Fault(poisoned_batches, ONE),
    "changed dataset": Fault(changed_dataset, ONE),
    "changed dataset, allowed": Fault(new_epoch, ONE),
}
# SIGKILLs of runs in a bucket. Its logs arrive too late to choose moments by them, so the process kills itself.
BUCKET_KILLS: dict[str, tuple[Sequence[Moment], tuple[Sequence[int], Sequence[int]]]] = {
    "SIGKILL at a random moment": ([Moment("batch", 20, 0.3)], ((2,), (5, 5))),
    "SIGKILL before the commit marker": ([Moment("bucket commit_success.txt", 2)], ((1,), (4,))),
    "SIGKILL after the commit marker": ([Moment("bucket digests.json", 2)], ((1,), (4,))),
}
NAMES = [*KILLS, *FAULTS]


class Task(NamedTuple):
    """A unit of work."""

    fault: str
    processes: int
    storage: str
    number: int
    folder: Path
    tries: int


def tasks(bench: Bench, names: Iterable[str], processes: Iterable[int], every: bool) -> list[Task]:
    """The units of work. Random SIGKILLs alternate between the folder and, where there is one, a file system in memory."""
    places = [bench.folder]
    if os.access("/dev/shm", os.W_OK):
        places.append(Path("/dev/shm") / f"{bench.folder.name}-{os.getuid()}")
    found = []
    processes = set(processes)
    for name in names:
        counts = KILLS[name][1] if name in KILLS else FAULTS[name].counts
        for hosts in sorted(counts.keys() & processes):
            count = counts[hosts][every]
            for number, tries in enumerate([1] * count if isinstance(count, int) else count):
                base = places[number % len(places)]
                folder = base / f"{NAMES.index(name):02}-{hosts}-{number}"
                found.append(Task(name, hosts, _file_system(base), number, folder, tries))
        if name in BUCKET_KILLS:
            count = BUCKET_KILLS[name][1][every]
        else:
            count = FAULTS[name].in_bucket[every] if name in FAULTS else 0
        for number, tries in enumerate([1] * count if isinstance(count, int) else count):
            if 1 in processes and gcs.binary() is not None:
                folder = bench.folder / f"{NAMES.index(name):02}-bucket-{number}"
                found.append(Task(name, 1, BUCKET, number, folder, tries))
    return sorted(found, key=lambda task: task.processes)  # the cheap ones first


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, such as ext4."""
    folder = folder.absolute()
    mounts = [one for one in psutil.disk_partitions(all=True) if folder.is_relative_to(one.mountpoint)]
    return max(mounts, key=lambda one: len(one.mountpoint)).fstype if mounts else "unknown"


def perform(bench: Bench, task: Task) -> list[Try]:
    """Injects the faults of a task."""
    shutil.rmtree(task.folder, ignore_errors=True)
    task.folder.mkdir(parents=True)
    generator = random.Random(f"{task.fault} {task.processes} {task.number}")
    place = Place(bench, task.folder, task.processes, generator, task.storage == BUCKET)
    try:
        if place.in_bucket and place.workdir.exists():  # of an unfinished try
            place.workdir.rmtree()
        if task.fault in KILLS:
            moments = BUCKET_KILLS[task.fault][0] if place.in_bucket else KILLS[task.fault][0]
            tries = killed(place, task.tries, moments)
        else:
            tries = FAULTS[task.fault].unit(place)
    except Exception as error:  # noqa: BLE001 - a fault that breaks this program is not survived
        tries = [Try(False, note=f"{type(error).__name__}: {error}"[:600])]
    if all(one.survived for one in tries):
        shutil.rmtree(task.folder, ignore_errors=True)
    return tries


def rows(results: Iterable[tuple[str, int, str, list[Try]]]) -> list[Row]:
    """The table."""
    groups: dict[tuple[str, int, str], list[Try]] = {}
    for fault, processes, storage, tries in results:
        groups.setdefault((fault, processes, storage), []).extend(tries)
    found = []
    for (fault, processes, storage), tries in groups.items():
        same = [one.identical for one in tries if one.identical is not None]
        found.append(
            Row(
                fault, processes, storage, len(tries), sum(one.survived for one in tries), max(one.lost_steps for one in tries),
                sum(one.lost_examples for one in tries), all(same) if same else None,
                _median(one.seconds_to_stop for one in tries), _median(one.seconds_to_resume for one in tries),
            )
        )  # fmt: skip
    return sorted(found, key=lambda row: (NAMES.index(row.fault), row.processes, row.storage))


def _median(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return round(statistics.median(found), 1) if found else None


def table(found: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| fault | processes | storage | tried | survived | lost steps | lost examples | identical | s to stop | s to resume |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    words = {True: "yes", False: "NO", None: "–"}
    for row in found:
        seconds = ["–" if value is None else f"{value:.1f}" for value in row[-2:]]
        lines.append("| " + " | ".join([*map(str, row[:7]), words[row.identical], *seconds]) + " |")
    return "\n".join(lines)


# ---- the command


def parser() -> argparse.ArgumentParser:
    made = cli.parser(
        "python -m benchmarks.faults", __doc__, examples="""
python -m benchmarks.faults
python -m benchmarks.faults --all --json=faults.json
python -m benchmarks.faults --all --show
python -m benchmarks.faults --only=checkpoint,shard --processes=1
python -m benchmarks.faults --storage=bucket""",
    )  # fmt: skip
    made.add_argument("--all", action="store_true", help="the whole counts")
    made.add_argument("--only", default="", help="faults whose names begin with one of these, separated by commas")
    made.add_argument("--processes", default="1,2,4", help="numbers of processes, separated by commas")
    made.add_argument(
        "--storage", default="disk,bucket", help="kinds of work directory, separated by commas (%(default)s)"
    )
    made.add_argument(
        "--folder", type=Path, help="of what is finished; default: curia_faults in the folder for temporary files"
    )
    made.add_argument("--shards", type=Path, help="dataset to train on; default: that of a phantom, made in --folder")
    made.add_argument("--show", action="store_true", help="print the table of what is finished, and do nothing more")
    made.add_argument("--workers", type=int, default=2, help="faults injected at the same time")
    cli.add_json(made, f"list of {', '.join(Row._fields)}")
    return made


def faults(args: argparse.Namespace) -> int:
    """Runs the command."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # also of this process, which reads checkpoints
    wanted = [name for name in NAMES if name.startswith(tuple(args.only.split(",")))]
    cli.at_least("--workers", args.workers, 1)
    bench = Bench(args.folder or Path(tempfile.gettempdir()) / "curia_faults", args.shards)
    kinds = args.storage.split(",")
    if unknown := {*kinds} - {"disk", BUCKET}:
        raise UserError(f"--storage={','.join(sorted(unknown))} is unknown; choose from disk, {BUCKET}")
    todo = [
        task
        for task in tasks(bench, wanted, [int(word) for word in args.processes.split(",")], args.all)
        if (BUCKET if task.storage == BUCKET else "disk") in kinds
    ]
    path = bench.folder / TRIES
    done = {
        (line["fault"], line["processes"], line["storage"], line["number"]): [Try(*one) for one in line["tries"]]
        for line in _lines(path)
    }
    done = {key: tries for key, tries in done.items() if key in {task[:4] for task in todo}}
    left = [task for task in todo if task[:4] not in done]
    counted, total = sum(map(len, done.values())), sum(task.tries for task in left)
    if args.show:
        left = []
    in_bucket = any(task.storage == BUCKET for task in left)
    with (
        gcs.server() if in_bucket else contextlib.nullcontext({}) as bucket,
        gcs.environment(bucket),  # of the starts and of this process
        path.open("a") as file,
        Progress("faults", counted + total, "tries", done=counted, enabled=not args.show) as progress,
        concurrent.futures.ThreadPoolExecutor(args.workers) as threads,
        bench.stopping(threads),
    ):
        running = {threads.submit(perform, bench, task): task for task in left}
        for future in concurrent.futures.as_completed(running):
            task, tries = running[future], future.result()
            done[task[:4]] = tries
            file.write(json.dumps({**task._asdict(), "folder": str(task.folder), "tries": tries}) + "\n")
            file.flush()
            progress.step(
                task.tries,
                f"{task.fault}, {task.processes}: {'survived' if all(t.survived for t in tries) else 'NOT SURVIVED'}",
            )
    found = rows((*key[:3], tries) for key, tries in done.items())
    print(table(found))
    failed = [(key, one) for key, tries in done.items() for one in tries if not one.survived]
    for (fault, processes, storage, number), one in failed:
        print(f"not survived: {fault}, {processes} processes, {storage}, number {number}: {one.note}")
    print(f"{sum(row.survived for row in found)} of {sum(row.tried for row in found)} survived")
    cli.write_json(args.json, [row._asdict() for row in found])
    return ExitCode.FAULT if failed else ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), faults, argv, stopped="stopped; rerun the command to resume")


if __name__ == "__main__":
    sys.exit(main())
