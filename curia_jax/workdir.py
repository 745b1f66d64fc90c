"""The work directory of a run: whether it can be one, and whether it is a new one."""

import os
from pathlib import Path

from etils import epath

from curia_common import launching, logs
from curia_common.errors import DataError, UserError
from curia_jax import checkpoint, goodput, lease, profiling, telemetry

CONFIG = "config.json"
# What a run may have left that was killed before it wrote its config.
OWN_FILES = {
    checkpoint.FOLDER,
    goodput.LEDGER,
    telemetry.METRICS,
    telemetry.EVENTS,
    telemetry.BOARD,
    logs.FOLDER,
    lease.FILE,
    profiling.FOLDER,
    profiling.REQUEST,
    launching.RECORDS,
}


def check(workdir: str) -> None:
    """Makes the folder where there is none, before hours are spent on results that could not be written.

    Raises:
      UserError: it is an address, or cannot be written to.
    """
    if "://" in workdir:
        raise UserError(
            f"--workdir={workdir} is an address, not a folder; mount the bucket (Cloud Storage: gcsfuse --rename-dir-limit=100000) "
            "and name the folder where it is mounted"
        )
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the work directory {workdir}: {error.strerror}; choose another --workdir"
        ) from error
    if not os.access(workdir, os.W_OK):
        raise UserError(f"cannot write to the work directory {workdir}; choose another --workdir")


def check_new(workdir: str) -> None:
    """Refuses to start at step 0 where checkpoints have been or somebody else's files are.

    Raises:
      DataError: a run saved checkpoints here, and they are gone.
      UserError: the folder has files and is not the work directory of a run.
    """
    events = telemetry.events(workdir)
    saved = [event["step"] for event in events if event.get("event") == "saved"]
    if saved:
        raise DataError(
            f"{workdir} is the work directory of a run that saved step {max(saved)}, but has no checkpoint: is its storage mounted? "
            f"Bring its folder {checkpoint.FOLDER}/ back, or choose another --workdir for a new run"
        )
    found = {path.name for path in Path(workdir).iterdir() if not path.name.startswith(".")}
    if found - OWN_FILES and CONFIG not in found:
        raise UserError(f"--workdir={workdir} is not empty and not the work directory of a run; choose another folder")


def saved_steps(workdir: str) -> tuple[int, ...]:
    """Steps of the checkpoints that were finished, whole or not."""
    return tuple(checkpoint.finished_steps(epath.Path(workdir).expanduser().absolute() / checkpoint.FOLDER))
