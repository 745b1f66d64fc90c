"""Files of JSON lines: appended to during a run, and readable even after crashes and damage."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from etils import epath

from curia_common import logs
from curia_jax import json_records

Line = dict[str, Any]  # of a file of JSON lines
logger = logs.get_logger(__name__)


class Found(NamedTuple):
    """What a file holds.

    Attributes:
      unreadable: lines that are not a JSON object, or lack a field: torn by a crash, or damaged.
    """

    lines: list[Line]
    unreadable: int


def read(path: Path | epath.Path, numbers: tuple[str, ...] = ()) -> Found:
    """All readable lines of a file, in order; none where there is no file.

    Args:
      numbers: fields that a line needs, which hold numbers.
    """
    lines, unreadable = [], 0
    if path.is_file():
        for text in path.read_bytes().decode("utf-8", "replace").splitlines():
            line = _parse(text)
            if line is not None and all(json_records.is_number(line.get(name)) for name in numbers):
                lines.append(line)
            elif text.strip("\0 "):  # a crash of the machine can leave a block of zeros
                unreadable += 1
    return Found(lines, unreadable)


def _parse(text: str) -> Line | None:
    try:
        line = json_records.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


class Writer:
    """Appends lines, each at once. Nothing that goes wrong there ends a run: it is logged, and tried again at the next line.

    Args:
      keep: lines of an earlier start that stay. Without, all do, and a torn last line is closed.
    """

    def __init__(self, path: Path, keep: Callable[[Line], bool] | None = None, numbers: tuple[str, ...] = ()) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._failing = False
        with self._tolerating():
            if keep is not None and path.exists():
                found = read(path, numbers)
                if found.unreadable:
                    logger.warning(f"{path}: {found.unreadable} unreadable lines are left out")
                beside = path.with_suffix(".tmp")
                beside.write_text(
                    "".join(json.dumps(line) + "\n" for line in found.lines if keep(line)), encoding="utf-8"
                )
                os.replace(beside, path)
            elif path.exists() and not path.read_bytes().endswith(b"\n"):
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line."""
        with self._tolerating():
            if self._file is None or not self._path.exists():  # not opened yet, or deleted meanwhile
                self.close()
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._failing = False

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None

    @contextlib.contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            if not self._failing:
                logger.warning(
                    f"cannot write {self._path}: {error.strerror or error}; the run continues without it and will try again"
                )
            self._failing = True
