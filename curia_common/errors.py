"""Errors that a user can fix. `cli.run` prints each as one line, `error: …`, and exits with its code."""

import traceback
from pathlib import Path

from curia_common.exit_codes import ExitCode

PACKAGES = frozenset({"curia_common", "curia_jax", "data_pipeline", "launch"})


class UserError(Exception):
    """What was typed or configured is wrong: a missing path, an unknown field, values that do not go together."""

    exit_code = ExitCode.USAGE


class DataError(UserError):
    """What was read is damaged, incomplete or not the one expected: inputs, a dataset, a checkpoint, an export."""

    exit_code = ExitCode.DATA


class DivergedError(UserError):
    """A loss or norm is not finite. The message has the step, the quantity and the last good checkpoint."""

    exit_code = ExitCode.DIVERGED


class DoesNotFitError(UserError):
    """The run needs more memory or other devices than there are."""

    exit_code = ExitCode.DOES_NOT_FIT


class StorageError(UserError):
    """Storage failed or is full while the command ran. What was finished before is saved: rerunning resumes."""

    exit_code = ExitCode.RESTART


class RestartError(UserError):
    """The run cannot continue now, but can later: another host is lost, or the work directory is in use. Rerunning resumes."""

    exit_code = ExitCode.RESTART


class RemoteFault(Exception):
    """An unexpected error in another process; its text is the `fault_location` there."""


def fault_location(error: BaseException) -> str:
    """Type and source line of an unexpected error, without its text: libraries quote DICOM header values in theirs."""
    if isinstance(error, RemoteFault):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if PACKAGES.intersection(Path(frame.filename).parts)] or frames[-1:]
    where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{where}"
