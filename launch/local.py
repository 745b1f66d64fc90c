"""A pod on this machine: a process for each host, chips simulated on the CPU, restarts as on a pod. A Target.

  launch (supervisor) ── process 0 … process N-1     JAX connects them over loopback, as the hosts of a pod

The supervisor runs in the foreground. SIGTERM or Ctrl-C to it stops the processes, which save first.
"""

import dataclasses
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from curia_common import signals
from curia_common.errors import StorageError, UserError
from curia_common.exit_codes import FINAL, ExitCode
from launch import gang, records, workdirs
from launch.gang import End, Gang, Output, Process, State
from launch.rendering import Rendering
from launch.spec import ALIKE, FAST_SECONDS, LaunchSpec, variables_as_words

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts
SCRIPT = "pod.sh"
_DRY_PORT = 8476


class LaunchFailed(UserError):
    """The run ended, and another start would not help."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # pyright: ignore[reportAttributeAccessIssue] - that of the process


def render(spec: LaunchSpec) -> Rendering:
    """A script that starts all processes once. See rendering.Target.

    Raises:
      UserError: an option that has no effect on this machine.
    """
    spec.refuse_unused("environment")
    if spec.topology.kind == "gpu":
        raise UserError(
            f"--target=local simulates devices on the CPU, and {spec.topology} are GPUs; take cpu:{spec.topology.shape_text}"
        )
    lines = [
        f"{variables_as_words(environment)} python {shlex.join(spec.argv)} &"
        for environment in gang.environments_of(spec, "1", f"{gang.LOOPBACK}:{_DRY_PORT}")
    ]
    head = [
        "#!/bin/sh",
        "# Starts all processes once, without restarts.",
        "trap 'kill $(jobs -p)' TERM INT",
        f"cd {shlex.quote(os.getcwd())}",
    ]
    return Rendering(
        files={SCRIPT: "\n".join([*head, *lines, "wait", ""])},
        commands=(("sh", SCRIPT),),
        links={"output": str(records.folder_of(spec.run) / gang.OUTPUT)},
    )


def submit(spec: LaunchSpec, rendering: Rendering) -> int:
    """Runs all attempts until the run has finished, was stopped, or cannot continue. See rendering.Target.

    Raises:
      LaunchFailed: it cannot continue; exits with the code of the process that failed.
      UserError: the run is alive.
      StorageError: its work directory is in a bucket that cannot be read now.
    """
    del rendering  # a script for people; the supervisor starts the processes itself
    return supervise(spec, os.getcwd())


def restart(spec: LaunchSpec) -> int:
    folder = folder_of_processes(spec)
    _stop(spec)
    return supervise(spec, folder)


def folder_of_processes(spec: LaunchSpec) -> str:
    """The folder in which the processes of a run were started; the present one where it has not started."""
    state = State.read(records.folder_of(spec.run))
    return state.folder if state else os.getcwd()


def stop(spec: LaunchSpec) -> str:
    return f"run {spec.run} {'has saved and ended' if _stop(spec) else 'was not running'}"


def status(spec: LaunchSpec) -> str:
    folder = records.folder_of(spec.run)
    state = State.read(folder)
    lines = [
        f"command: {spec.command_line}",
        f"machines: {_processes(spec)} on this machine, for {spec.topology}",
    ]
    if state is None:
        return "\n".join([f"run {spec.run} has not started", *lines])
    alive = sum(process.alive for process in state.processes)
    phase = state.phase
    if phase in ("running", "restarting") and not state.supervisor.alive:
        phase = (
            f"has lost its launcher; {alive} of its processes are still running"
            if alive
            else "was killed with its launcher"
        )
    lines.insert(0, f"run {spec.run}: {phase}, attempt {state.attempt}, {alive} of {_processes(spec)} alive")
    lines.append(f"restarts: {state.restarts} of {spec.max_restarts}" + (f"; last: {state.why}" if state.why else ""))
    try:
        step = workdirs.newest_checkpoint(spec.workdir)
        if spec.workdir is not None:
            lines.append(f"newest checkpoint: {'none' if step is None else f'step {step:,}'} in {spec.workdir}")
    except StorageError as error:
        lines.append(f"newest checkpoint: {error}")
    lines.append(f"output: {folder / gang.OUTPUT}")
    if phase not in ("running", "restarting", "finished"):
        lines.append(f"continue with: python -m launch restart {spec.run}")
    return "\n".join(lines)


def logs(spec: LaunchSpec, *, follow: bool) -> int:
    folder = records.folder_of(spec.run)
    path = folder / gang.OUTPUT
    if not path.is_file():
        raise UserError(f"run {spec.run} has written nothing yet; python -m launch status {spec.run} says what it does")
    with signals.receiving() as received, path.open(encoding="utf-8", errors="replace") as stream:
        received.on_stop = lambda: None
        while True:
            going_on = follow and gang.is_locked(folder)
            print(stream.read(), end="", flush=True)
            if not going_on or received.stop_requested:
                return ExitCode.DONE
            time.sleep(0.2)


def _stop(spec: LaunchSpec) -> bool:
    """Ends the processes of a run; returns whether any were alive."""
    folder = records.folder_of(spec.run)
    state = State.read(folder)
    if state is None or not gang.is_locked(folder):
        return False
    if state.supervisor.alive:
        state.supervisor.send(signal.SIGTERM)
        while state.supervisor.alive and gang.is_locked(folder):
            time.sleep(gang.POLL_SECONDS)
    gang.end_all(state.processes, lambda: not gang.is_locked(folder), spec.grace_seconds)
    return True


def _as_it_is(spec: LaunchSpec, attempt: int) -> LaunchSpec:
    del attempt
    return spec


def supervise(
    spec: LaunchSpec, working_directory: str, of_attempt: Callable[[LaunchSpec, int], LaunchSpec] = _as_it_is
) -> int:
    """Runs all attempts of a run.

    Args:
      working_directory: of its processes.
      of_attempt: (spec, number of an attempt) -> what is started here for it.

    Returns and raises what `submit` does.
    """
    folder = records.folder_of(spec.run)
    output = Output(folder / gang.OUTPUT)
    stop = threading.Event()
    with signals.receiving() as received, gang.holding(folder, output.say, grace=spec.grace_seconds) as lock:
        received.on_stop = stop.set
        if received.stop_requested:
            stop.set()
        before = State.read(folder)
        attempt = before.attempt if before else 0
        state = State("running", attempt, 0, working_directory, Process.of(os.getpid()))
        failures: list[str] = []  # fast ones in a row that are alike
        newest = workdirs.newest_checkpoint(spec.workdir)
        while True:
            attempt += 1
            step = newest
            started = of_attempt(spec, attempt)
            output.say(f"attempt {attempt}: {_processes(started)}{_from(spec, step)}")
            running = Gang(started, attempt, output, inherited=lock, folder=working_directory)
            state = dataclasses.replace(state, phase="running", attempt=attempt, processes=running.processes)
            state.write(folder)
            received.on_abort = running.kill
            end = running.wait(stop, spec.grace_seconds)
            newest = _look(spec, step, output)
            why = end.text()
            state = dataclasses.replace(state, processes=(), why=why if end.code else "")
            if end.code == ExitCode.DONE:
                dataclasses.replace(state, phase="finished").write(folder)
                output.say("finished")
                return ExitCode.DONE
            if end.code in FINAL:
                _give_up(state, folder, end.code, f"{why}; starting again would not change that")
            if stop.is_set():
                dataclasses.replace(state, phase="stopped").write(folder)
                then = f"{_from(spec, newest)} next" if spec.workdir else ""
                output.say(f"stopped{then}; python -m launch restart {spec.run}")
                return ExitCode.RESTART
            slow = end.seconds > FAST_SECONDS or newest != step
            alike = _alike(end)
            failures = [] if slow else [alike] if failures[-1:] != [alike] else [*failures, alike]
            if len(failures) == ALIKE:
                idle = " without a new checkpoint" if spec.workdir else ""
                _give_up(state, folder, end.code, f"{ALIKE} attempts in a row failed alike{idle}: {why}")
            if state.restarts == spec.max_restarts:
                _give_up(state, folder, end.code, f"no restart is left of --max-restarts={spec.max_restarts}: {why}")
            pause = min(FIRST_PAUSE * 2 ** (len(failures) - 1), LONGEST_PAUSE) if failures else 0.0
            output.say(f"{why}; starting again" + (f" in {pause:g} s" if pause else ""))
            state = dataclasses.replace(state, phase="restarting", restarts=state.restarts + 1)
            state.write(folder)
            if stop.wait(pause):
                dataclasses.replace(state, phase="stopped").write(folder)
                return ExitCode.RESTART


def _give_up(state: State, folder: Path, code: int, why: str) -> NoReturn:
    dataclasses.replace(state, phase="failed").write(folder)
    raise LaunchFailed(why, code if code > 0 and code != ExitCode.RESTART else ExitCode.FAULT)


def _alike(end: End) -> str:
    """A key that is equal for failures that differ only in numbers: steps, ports, times."""
    return f"{end.code} {re.sub(r'[0-9]+', '#', end.line) if end.code > 0 else ''}"


def _look(spec: LaunchSpec, before: int | None, output: Output) -> int | None:
    """Newest checkpoint; the last known one if storage does not answer, because that must not end the run."""
    try:
        return workdirs.newest_checkpoint(spec.workdir)
    except StorageError as error:
        output.say(str(error))
        return before


def _from(spec: LaunchSpec, step: int | None) -> str:
    """Where a run with checkpoints starts."""
    if spec.workdir is None:
        return ""
    return ", from the beginning" if step is None else f", from the checkpoint of step {step:,}"


def _processes(spec: LaunchSpec) -> str:
    return f"{spec.topology.hosts} process{'es' if spec.topology.hosts > 1 else ''}"
