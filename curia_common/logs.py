"""Logging: standard `logging` to standard error, message only, so that a log line is what a person reads.

A command with a work directory also keeps one log file per host (`LogFile`). It has what standard error has, with times, and
everything that is not for a reader of standard error: tracebacks, stacks, and what libraries print.
"""

import contextlib
import io
import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = "curia"
FOLDER = "logs"


class _StandardError(logging.StreamHandler):
    """Writes to whatever sys.stderr is now: a progress bar on a terminal replaces it while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride] - a property on purpose
        return sys.stderr


class Unbreakable(io.TextIOBase):
    """A text stream whose reader may go away, as a closed pipe or terminal does: what is written then is lost, no error."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] - rich asks for it
        return self._stream.encoding

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; `logs.get_logger(__name__)`."""
    return logging.getLogger(f"{ROOT}.{name}")


def configure(level: int = logging.INFO) -> None:
    """Shows messages from `level` on. Called once by each command; a host that is not the first asks for WARNING."""
    root = logging.getLogger(ROOT)
    root.setLevel(logging.INFO)
    root.propagate = False
    handler = next((handler for handler in root.handlers if isinstance(handler, _StandardError)), None)
    if handler is None:
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)
    handler.setLevel(level)


def say(text: str) -> None:
    """Prints the last line of a process on standard error, whole and at once, from any thread; also to the log file."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    if LogFile.current is not None:
        LogFile.current.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')},000 ERROR {ROOT}: {text}")


class LogFile:
    """`<workdir>/logs/host-<n>.log`, appended to by every start. At most one is open in a process.

    Args:
      take_descriptor: what C and C++ libraries print on standard error also goes there, and nowhere else. Only for a process of
        the command's own.
    """

    current: "LogFile | None" = None

    def __init__(self, workdir: str | Path, host: int, *, take_descriptor: bool = False) -> None:
        folder = Path(workdir, FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"host-{host}.log"
        self.stream = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._handler = logging.StreamHandler(self.stream)
        self._handler.setFormatter(form)
        # What other libraries log, from WARNING on, would go to standard error if the root logger had no handler.
        self._loggers = logging.getLogger(ROOT), logging.getLogger()
        for logger in self._loggers:
            logger.addHandler(self._handler)
        self._before: tuple[Any, int] | None = None
        if take_descriptor:
            real = os.dup(2)
            self._before = sys.stderr, real
            sys.stderr = Unbreakable(
                os.fdopen(os.dup(real), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
            )
            os.dup2(self.stream.fileno(), 2)
            threading.excepthook = self._thread_failed
        LogFile.current = self

    def write(self, text: str) -> None:
        """Adds text that is not a log message: a traceback, or the line a command ends with."""
        with contextlib.suppress(OSError, ValueError):  # a full disk must not replace the error that is written here
            self.stream.write(f"{text}\n")
            self.stream.flush()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        text = "".join(traceback.format_exception(failure.exc_type, failure.exc_value, failure.exc_traceback))
        self.write(f"a thread of a library ended:\n{text}")

    def close(self) -> None:
        for logger in self._loggers:
            logger.removeHandler(self._handler)
        if self._before is not None:
            sys.stderr, real = self._before
            os.dup2(real, 2)
            os.close(real)
            threading.excepthook = threading.__excepthook__
        LogFile.current = None
        with contextlib.suppress(OSError):
            self.stream.close()
