"""Logging: standard `logging` to standard error, message only, so that a log line is what a person reads."""

import logging
import sys

ROOT = "curia"


class _StandardError(logging.StreamHandler):
    """Writes to whatever sys.stderr is now: a progress bar on a terminal replaces it while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride] - a property on purpose
        return sys.stderr


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; `logs.get_logger(__name__)`."""
    return logging.getLogger(f"{ROOT}.{name}")


def configure(level: int = logging.INFO) -> None:
    """Shows messages from `level` on. Called once by each command; a host that is not the first asks for WARNING."""
    root = logging.getLogger(ROOT)
    root.setLevel(level)
    root.propagate = False
    if not any(isinstance(handler, _StandardError) for handler in root.handlers):
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)
