"""Keeps the messages of reading libraries out of logs and errors: they quote header values."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator

import pydicom.config
import SimpleITK

from curia_common.errors import UserError, fault_location
from data_pipeline.sources.base import NO_MEMORY, ReadError

_LIBRARIES = ("pydicom", "pylibjpeg", "openjpeg", "libjpeg", "rle", "jpeg_ls", "nibabel", "PIL")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Context in which libraries neither warn nor log, and pydicom does not validate values; settings are restored at its end.

    Wrap each call into a library, not the `yield` of a generator, which would change settings for whoever consumes it.
    """
    loud = [logger for logger in _loggers(len(logging.Logger.manager.loggerDict)) if not logger.disabled]
    shown = SimpleITK.ProcessObject.GetGlobalWarningDisplay()
    validation = pydicom.config.settings.reading_validation_mode
    with warnings.catch_warnings(action="ignore"):
        try:
            for logger in loud:
                logger.disabled = True
            SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
            pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
            yield
        finally:
            for logger in loud:
                logger.disabled = False
            SimpleITK.ProcessObject.SetGlobalWarningDisplay(shown)
            pydicom.config.settings.reading_validation_mode = validation


@contextlib.contextmanager
def guarded(failure: str) -> Iterator[None]:
    """silenced() for calls that read a file: whatever a library raises on damaged ones becomes a ReadError.

    Args:
      failure: its reason; may hold {kind} and {place}, the type of the error and the line of ours at which it occurred.

    Raises:
      ReadError: the file is damaged, or needs too much memory.
      OSError: with an errno, the storage fails.
    """
    try:
        with silenced():
            yield
    except (ReadError, UserError):
        raise
    except MemoryError as error:
        raise ReadError(NO_MEMORY) from error
    except Exception as error:  # each library raises its own kinds
        if isinstance(error, OSError) and error.errno:  # of the disk
            raise
        raise ReadError(failure.format(kind=type(error).__name__, place=fault_location(error))) from error


@functools.lru_cache(maxsize=1)
def _loggers(existing: int) -> tuple[logging.Logger, ...]:
    """Those of the libraries; looked up again once there are more loggers, because this runs for every frame."""
    return tuple(
        logger
        for name, logger in logging.Logger.manager.loggerDict.items()
        if name.partition(".")[0] in _LIBRARIES and isinstance(logger, logging.Logger)
    )
