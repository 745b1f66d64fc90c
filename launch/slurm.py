"""Runs on GPU machines of a Slurm cluster: a batch script that asks Slurm to start it again after the exit code 75 and all others
that are not final.

The environment is that of the shell in which the launch is typed, as sbatch passes it on; folders have to be on a file system that all
machines share.
"""

import shlex
import time
from collections.abc import Callable
from pathlib import Path

from curia_common import launching
from curia_common.errors import UserError
from curia_common.exit_codes import FINAL, ExitCode
from launch import buckets, records, tools
from launch.rendering import Rendering, bash_array
from launch.spec import ALIKE, FAST_SECONDS, LaunchSpec

SCRIPT = "job.sbatch"
BODY = Path(__file__).with_name("job.sh")
OUTPUT, JOB, STOP, FAILURES = "output.log", "job", "stop", "failures"  # beside the script
OWN_DISK = ("/tmp/", "/var/tmp/", "/dev/shm/")  # each machine has folders of its own there
POLL_SECONDS = 5.0
Pause = Callable[[float], object]


def render(spec: LaunchSpec) -> Rendering:
    """The batch script and its submission.

    Raises:
      UserError: Slurm does not serve the spec.
    """
    spec.refuse_unused("environment")
    there = spec.topology
    if there.platform == "tpu":
        raise UserError(f"{there} has TPUs, which --target=slurm does not serve; --target=gke does")
    shards = [part.folder for part in spec.data]
    for folder in shards:
        if folder.startswith(buckets.SCHEME):
            raise UserError(
                f"{spec.data_option}={folder} is a bucket, which Slurm does not mount; name a folder that all machines share"
            )
    if spec.workdir is not None and not spec.workdir.startswith("/") and "://" not in spec.workdir:
        raise UserError(f"--workdir={spec.workdir} is relative, and jobs start in another folder; write the whole path")
    for option, folder in (("--workdir", spec.workdir or ""), *((spec.data_option, folder) for folder in shards)):
        if there.hosts > 1 and folder.startswith(OWN_DISK):
            raise UserError(
                f"{option}={folder} is on the own disk of each machine; name a folder that all machines share"
            )
    return Rendering(files={SCRIPT: _script(spec)}, commands=(("sbatch", "--parsable", SCRIPT),))


def submit(spec: LaunchSpec, rendering: Rendering) -> int:
    """Submits the job, unless it is in the queue already."""
    if (state := _state(spec)) is not None:
        raise UserError(f"{spec.run} is in the queue already ({state.lower()}); see python -m launch status {spec.run}")
    folder = records.folder_of(spec.run)
    rendering.write(folder, spec)
    for name in (STOP, FAILURES):
        (folder / name).unlink(missing_ok=True)
    [command] = rendering.commands
    number = tools.run(command, folder=folder).strip().partition(";")[0]
    (folder / JOB).write_text(number, encoding="utf-8")
    tools.logger.info(f"submitted as job {number}; its output: {folder / OUTPUT}")
    return ExitCode.DONE


def status(spec: LaunchSpec) -> str:
    """State of the job in the queue, or the failures of a job that has left it."""
    folder = records.folder_of(spec.run)
    lines = [f"{spec.run}: {(_state(spec) or 'not in the queue').lower()}"]
    failures = folder / FAILURES
    if failures.is_file():
        codes = [line.partition(" ")[0] for line in failures.read_text(encoding="utf-8").splitlines()]
        lines.append(
            f"failed starts: {len(codes)}, the last with exit code {codes[-1]}" if codes else "failed starts: 0"
        )
    return "\n".join(lines)


def logs(spec: LaunchSpec, *, follow: bool) -> int:
    """What all processes wrote."""
    path = records.folder_of(spec.run) / OUTPUT
    if not path.is_file():
        raise UserError(f"{spec.run} has written nothing yet; see python -m launch status {spec.run}")
    with path.open(encoding="utf-8", errors="replace") as stream:
        while True:
            running = follow and _state(spec) is not None  # before the last look
            print(stream.read(), end="", flush=True)
            if not running:
                return ExitCode.DONE
            time.sleep(POLL_SECONDS)


def stop(spec: LaunchSpec, pause: Pause = time.sleep) -> str:
    """SIGTERM to all processes, which save and end; cancels the job after the grace period."""
    folder = records.folder_of(spec.run)
    state = _state(spec)
    if state is None:
        return f"{spec.run} is not in the queue; nothing to stop"
    (folder / STOP).touch()  # the script does not ask for another start
    number = (folder / JOB).read_text(encoding="utf-8")
    if state == "RUNNING":
        tools.run(("scancel", "--signal=TERM", number))
        for _ in range(int((spec.grace_seconds + 60) // POLL_SECONDS) + 1):
            if _state(spec) is None:
                return f"{spec.run} has saved and ended"
            pause(POLL_SECONDS)
    tools.run(("scancel", number))
    while _state(spec) is not None:
        pause(POLL_SECONDS)
    return f"{spec.run} was cancelled; it resumes from its newest checkpoint"


def restart(spec: LaunchSpec) -> int:
    """Stops the job where it is alive, and submits it anew."""
    print(stop(spec))
    return submit(spec, render(spec))


def _state(spec: LaunchSpec) -> str | None:
    """State of the job, such as PENDING or RUNNING; None where the queue does not have it."""
    path = records.folder_of(spec.run) / JOB
    if not path.is_file():
        return None
    try:
        text = tools.run(("squeue", "--noheader", "--format=%T", f"--jobs={path.read_text(encoding='utf-8')}")).strip()
    except tools.ToolError as error:
        if error.problem == "absent":
            return None
        raise
    return text.splitlines()[0] if text else None


def _script(spec: LaunchSpec) -> str:
    there = spec.topology
    machines, devices = there.shape
    options = {
        "job-name": spec.run,
        "nodes": machines,
        "ntasks-per-node": 1,
        "exclusive": None,
        "gpus-per-node": devices if there.platform == "gpu" else None,
        "requeue": None,
        "open-mode": "append",
        "output": OUTPUT,
        # Before the job's time is over or it is preempted: SIGTERM to the processes, which save.
        "signal": f"TERM@{spec.grace_seconds}",
    }
    if there.platform != "gpu":
        del options["gpus-per-node"]
    contract = spec.contract("-", "-")  # both are known when the job starts
    variables = {**contract.environment(), **dict(spec.environment)}
    for name in (f"{launching.PREFIX}ATTEMPT", f"{launching.PREFIX}COORDINATOR", launching.ADDRESS):
        del variables[name]
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    lines += [
        f"FINAL={shlex.quote(' '.join(str(int(code)) for code in (ExitCode.DONE, *FINAL)))}",
        f"MAX_RESTARTS={spec.max_restarts}",
        f"FAST={FAST_SECONDS}",
        f"ALIKE={ALIKE}",
        bash_array("COMMAND", ("python", *spec.argv)),
    ]
    return "\n".join(lines) + "\n" + BODY.read_text(encoding="utf-8")
