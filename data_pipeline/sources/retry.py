"""Retries of transient storage errors, as network file systems and object stores have them."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from curia_common.errors import StorageError
from data_pipeline.sources.base import Heartbeat

Result = TypeVar("Result")

# They say nothing about the file itself.
TRANSIENT = frozenset(getattr(errno, name) for name in (
    "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "ENFILE", "EMFILE", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED",
    "ENOTCONN", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO", "EPIPE",
) if hasattr(errno, name))  # fmt: skip
PAUSES = (0.5, 2.0, 8.0, 20.0)  # seconds between tries
FAILED = (
    "an input cannot be read, tried {tries} times ({error}); rerun the same command when the storage answers, or, if it is this one "
    "file alone, without it"
)


def retry_transient(read: Callable[[], Result], heartbeat: Heartbeat, item: str) -> Result:
    """What `read` returns; called again after a pause where it fails with a transient error.

    Args:
      heartbeat, item: as in workers.run; pauses do not count against the item's time limit.

    Raises:
      StorageError: it still fails. To quarantine the file for that would leave it out for good.
      OSError: any other error.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            if pause is None:
                raise StorageError(FAILED.format(tries=len(PAUSES) + 1, error=error.strerror)) from error
        heartbeat(None)
        time.sleep(pause)
        heartbeat(item)
    raise AssertionError  # the last try returns or raises
