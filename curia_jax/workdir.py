"""The work directory of a run: checks whether it can be used, and whether it is new; which of its steps counts."""

from pathlib import Path
from typing import NamedTuple

from curia_common import launching, logs
from curia_common.errors import DataError, UserError
from curia_jax import checkpoint, goodput, json_records, lease, profiling, storage, telemetry

CONFIG = "config.json"
SELECTED = "selected.json"  # of a fine-tuned run that has finished
CACHE = "cache"  # decoded images of a fine-tuned run's task
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
    CACHE,
}
APPENDED = (telemetry.METRICS, telemetry.EVENTS, goodput.LEDGER)  # by the first host of every start


def check(workdir: str) -> None:
    """Makes the folder where there is none, before hours are spent on results that could not be written.

    Raises:
      UserError: it is an address that runs cannot use, or cannot be written to.
    """
    storage.check_writable(workdir)


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
    folder = storage.root(workdir)
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set[str]()
    if found - OWN_FILES and CONFIG not in found:
        raise UserError(f"--workdir={workdir} is not empty and not the work directory of a run; choose another folder")


def saved_steps(workdir: str) -> tuple[int, ...]:
    """Steps of the checkpoints that were finished, whole or not."""
    return tuple(checkpoint.finished_steps(storage.root(workdir) / checkpoint.FOLDER))


class Selected(NamedTuple):
    """The checkpoint that was chosen on the validation split.

    Attributes:
      validation_loss: of its weights.
      key: changes with everything that decides the results of the test split.
    """

    step: int
    validation_loss: float
    key: str = ""


def selected(workdir: str | Path) -> Selected | None:
    """What a finished fine-tuned run has chosen; None for other runs.

    Raises:
      DataError: the file that says so is damaged.
    """
    path = storage.root(workdir) / SELECTED
    if not path.exists():
        return None
    try:
        return json_records.record(Selected, json_records.loads(path.read_bytes()))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); rerun curia_jax.finetune, which writes it again") from error
