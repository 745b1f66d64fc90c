"""The processes of one attempt on this machine: started together, ended together, and never alive at the same time as those of another attempt."""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from curia_common import logs
from curia_common.errors import UserError
from curia_common.exit_codes import FINAL, ExitCode
from curia_common.launching import ADDRESS, COUNT, MEGASCALE, NUMBER, PREFIX
from launch.spec import LaunchSpec

STATE, OUTPUT, LOCK = "state.json", "output.log", "lock"
POLL_SECONDS = 0.1
LOOPBACK = "127.0.0.1"
# What an earlier launcher may have left in the environment of this one.
_LEFT = (ADDRESS, COUNT, NUMBER, "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
_LEFT_PREFIXES = (PREFIX, MEGASCALE, "TPU_")

_NOISE = "[Gloo] Rank "  # the library says at each start who is connected; it never says why a process ends

logger = logs.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Process:
    """A process of this machine, also after its number has been given to another one.

    Attributes:
      pid: its number, which is that of its process group.
      started: when, as the system counts.
    """

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> "Process":
        return cls(pid, _started(pid) or "")

    @property
    def alive(self) -> bool:
        return _started(self.pid) == self.started != ""

    def send(self, number: int, *, group: bool = False) -> None:
        """Sends a signal, unless the process has ended."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.pid, number)


@dataclasses.dataclass(frozen=True)
class State:
    """The state of a run, as recorded on disk.

    Attributes:
      phase: running, restarting, finished, stopped or failed.
      attempt: number of the newest start of all processes.
      restarts: starts after failures, since the run was launched or restarted.
      folder: working directory of the processes.
      supervisor: the process that restarts them.
      processes: of the newest attempt.
      why: how the newest attempt that has ended ended; "" for none.
    """

    phase: str
    attempt: int
    restarts: int
    folder: str
    supervisor: Process
    processes: tuple[Process, ...] = ()
    why: str = ""

    def write(self, folder: Path) -> None:
        """Replaces the state in the folder of a run at once."""
        path = folder / f"{STATE}.new"
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        path.replace(folder / STATE)

    @classmethod
    def read(cls, folder: Path) -> "State | None":
        """The state in the folder of a run; None where it has not started or the file is damaged."""
        try:
            found = json.loads((folder / STATE).read_text(encoding="utf-8"))
            processes = tuple(Process(**one) for one in found.pop("processes"))
            return cls(supervisor=Process(**found.pop("supervisor")), processes=processes, **found)
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclasses.dataclass(frozen=True)
class End:
    """How an attempt ended.

    Attributes:
      code: 0 where all processes ended with 0; else the first one that a restart would not change, or the first of all. Negative:
        minus the signal that killed it.
      process: number of the process that ended so.
      line: the last that it wrote.
      seconds: since the start of the attempt.
    """

    code: int
    process: int
    line: str
    seconds: float

    def text(self) -> str:
        """As messages call it. What a process wrote last before it was killed says nothing."""
        if self.code < 0:
            return f"process {self.process} was killed by {signal.Signals(-self.code).name}"
        return f"process {self.process} ended with exit code {self.code}" + (f": {self.line}" if self.line else "")


class Output:
    """What all processes write, line by line, on standard output and in a file, after the number of the process: "[3] …"."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")
        self._writing = threading.Lock()

    def say(self, line: str, number: int | None = None) -> None:
        """Writes a line of a process, or of the launcher."""
        text = f"[{'launch' if number is None else number}] {line}\n"
        with self._writing:
            for stream in (self._file, sys.stdout):
                with contextlib.suppress(OSError, ValueError):  # a reader that went away, or a full disk, ends no run
                    stream.write(text)
                    stream.flush()

    def close(self) -> None:
        self._file.close()


class Gang:
    """All processes of an attempt.

    Args:
      inherited: a file descriptor that every process gets and keeps until its end.
      folder: working directory.
    """

    def __init__(self, spec: LaunchSpec, attempt: int, output: Output, *, inherited: int, folder: str) -> None:
        self._output = output
        self._lines = [""] * spec.topology.hosts
        self._began = time.monotonic()
        environments = environments_of(spec, str(attempt), f"{LOOPBACK}:{_free_port()}")
        self._running: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        for number, environment in enumerate(environments):
            process = subprocess.Popen(
                [sys.executable, *spec.argv], cwd=folder, env=clean_environment() | environment, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="backslashreplace",
                pass_fds=(inherited,), start_new_session=True,
            )  # fmt: skip
            self._running.append(process)
            reader = threading.Thread(target=self._read, args=(number, process.stdout), daemon=True)
            reader.start()
            self._readers.append(reader)
        self.processes = tuple(Process.of(process.pid) for process in self._running)

    def wait(self, stop: threading.Event, grace: float) -> End:
        """Waits until all processes have ended.

        Args:
          stop: once it is set, they are asked to save and end.
          grace: seconds from there, or from the end of the first process, until the rest is killed.
        """
        first: list[tuple[int, int]] = []  # number and code, in the order of their ends
        deadline, asked = float("inf"), False
        while len(first) < len(self._running):
            ended = {number for number, _ in first}
            now = [(n, p.poll()) for n, p in enumerate(self._running) if n not in ended]
            first += sorted(
                ((n, code) for n, code in now if code is not None), key=lambda end: end[1] in (0, ExitCode.RESTART)
            )
            if stop.is_set() and not asked:
                asked = True
                for process in self.processes:
                    process.send(signal.SIGTERM)
                deadline = time.monotonic() + grace
            if first:
                deadline = min(deadline, time.monotonic() + grace)
            if time.monotonic() > deadline:
                self._output.say(f"killing what has not ended {grace:g} s after it should have")
                self.kill()
                deadline = float("inf")
            time.sleep(POLL_SECONDS)
        self.kill()  # what the processes started and left
        for reader in self._readers:
            reader.join(timeout=grace)
        bad = [end for end in first if end[1] != 0]
        number, code = next((end for end in bad if end[1] in FINAL), bad[0] if bad else first[0])
        return End(code, number, self._lines[number], time.monotonic() - self._began)

    def kill(self) -> None:
        """Kills all processes and their children."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def _read(self, number: int, stream: IO[str]) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in stream:
                line = line.rstrip("\n")
                if not line.startswith(_NOISE):
                    self._lines[number] = line
                self._output.say(line, number)


def environments_of(spec: LaunchSpec, attempt: str, coordinator: str) -> list[dict[str, str]]:
    """Variables of each process: as on a pod, with the chips simulated on the CPU."""
    there = spec.topology
    contract = dataclasses.replace(spec.contract(attempt, coordinator), platform="cpu")
    simulated = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(there.devices // there.hosts)}
    shared = {**simulated, **contract.environment(), **dict(spec.environment)}
    return [{**shared, NUMBER: str(number)} for number in range(there.hosts)]


def clean_environment() -> dict[str, str]:
    """The environment of this process without what another launcher has left in it."""
    return {k: v for k, v in os.environ.items() if k not in _LEFT and not k.startswith(_LEFT_PREFIXES)}


@contextlib.contextmanager
def holding(folder: Path, say: Callable[[str], None], *, grace: float) -> Iterator[int]:
    """Holds the lock of a run inside the block; yields its file descriptor.

    Every process of a gang inherits the descriptor, so that the lock is free only when the supervisor and all its processes
    have ended. Processes whose supervisor was killed are asked to save and end first.

    Raises:
      UserError: another supervisor is at work.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _locked(lock):
            state = State.read(folder)
            if state is None or state.supervisor.alive:
                whose = f"process {state.supervisor.pid}" if state else "another process"
                raise UserError(
                    f"run {folder.name} is being run by {whose}; python -m launch stop {folder.name} stops it"
                )
            left = sum(process.alive for process in state.processes)
            say(f"stopping {left} processes of attempt {state.attempt}, whose launcher has ended")
            end_all(state.processes, lambda: _locked(lock), grace)
        yield lock
    finally:
        os.close(lock)


def end_all(processes: Sequence[Process], ended: Callable[[], bool], grace: float) -> None:
    """Asks processes to save and end, and kills what is left after `grace` seconds; returns once `ended` says so."""
    for process in processes:
        process.send(signal.SIGTERM)
    deadline = time.monotonic() + grace
    while not ended():
        if time.monotonic() > deadline:
            for process in processes:
                process.send(signal.SIGKILL, group=True)
        time.sleep(POLL_SECONDS)


def is_locked(folder: Path) -> bool:
    """Whether a supervisor or a process of a run is alive."""
    if not (folder / LOCK).exists():
        return False
    lock = os.open(folder / LOCK, os.O_RDWR)
    try:
        return not _locked(lock)
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    """Takes the lock where it is free."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return free.getsockname()[1]


def _started(pid: int) -> str | None:
    """When a process started; None where there is none, or it has ended and waits for its parent."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        if stat.parent.parent.joinpath("self").exists():  # Linux
            state, *fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            return None if state == "Z" else fields[18]  # field 22 of proc(5), in clock ticks since the machine started
        command = ["ps", "-o", "lstart=", "-p", str(pid)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None
