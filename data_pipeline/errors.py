"""The errors that a user can mend."""

import errno
import traceback
from pathlib import Path

# Of a storage that fails for a moment, as far ones do; of its files nothing can be said by that.
TRANSIENT = frozenset(getattr(errno, name) for name in (
    "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "ENFILE", "EMFILE", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED",
    "ENOTCONN", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO", "EPIPE",
) if hasattr(errno, name))  # fmt: skip


class UserError(Exception):
    """Wrong usage, configuration or input. Commands print it as one line, `error: …`, and exit with 2."""


class ReadError(Exception):
    """A file cannot be read. The reason is for people to read and holds no value of any header."""


NO_MEMORY = "it needs more memory than a worker may take; if it is sound, give them more with --memory-gb"
NO_ROOM = "no room on the disk for what is in hand ({error}); make room there and start the build again"


def fault(error: BaseException) -> str:
    """Kind and line of an unexpected error, without its text: libraries quote header values in theirs."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).parent.name == "data_pipeline"] or frames[-1:]
    where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{where}"
