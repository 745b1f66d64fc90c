"""Keeps the messages of reading libraries out of logs: they quote header values."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator

import pydicom.config
import SimpleITK

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


@functools.lru_cache(maxsize=1)
def _loggers(existing: int) -> tuple[logging.Logger, ...]:
    """Those of the libraries; looked up again once there are more loggers, because this runs for every frame."""
    return tuple(
        logger
        for name, logger in logging.Logger.manager.loggerDict.items()
        if name.partition(".")[0] in _LIBRARIES and isinstance(logger, logging.Logger)
    )
