"""Which classes of several tasks are one: the map that a task across them is made by.

A map is a table (CSV): the column `class` names the shared class, and a column for each task names its classes, several with
";" between them. Classes are written as the data states them: by name where targets are text or a ClassLabel of `datasets`, by number
otherwise. Nothing is guessed from numbers: a name does not match a number, nor the reverse.

The map of this package, `class_map.csv`, goes by the names of TotalSegmentator 2 for CT (`total`, `thigh_shoulder_muscles`) and MR (`total_mr`,
`thigh_shoulder_muscles_mr`). Lobes of a lung are one class, and so are vertebrae, which MR does not tell apart.
"""

import csv
import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from curia_common.errors import UserError

SHIPPED = Path(__file__).with_name("class_map.csv")
_NAME, _SEVERAL = "class", ";"
_LISTED = 12  # classes of the data that a message names


class SharedClass(NamedTuple):
    """A row: the shared class, and the classes of each task that are it."""

    name: str
    line: int
    of_task: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class ClassMap:
    """A map.

    Attributes:
      source: in words, for messages.
      rows: of all shared classes.
      exact: whether data has to have every class of the map; the map of this package has more than any data.
      sha256: hex digest of its text.
    """

    source: str
    rows: tuple[SharedClass, ...]
    exact: bool
    sha256: str

    @classmethod
    def read(cls, path: str | None, tasks: Sequence[str]) -> "ClassMap":
        """The map in a file; None reads that of this package.

        Args:
          tasks: that it has a column for.

        Raises:
          UserError: it cannot be read, lacks a column or a class, or a class is in two rows.
        """
        source = f"--class-map={path}" if path else "the class map of this package"
        try:
            text = (Path(path) if path else SHIPPED).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source} cannot be read ({type(error).__name__}); name a CSV file in UTF-8") from error
        reader = csv.DictReader(io.StringIO(text))
        for column in (_NAME, *tasks):
            if column not in (reader.fieldnames or ()):
                found = ", ".join(reader.fieldnames or ()) or "none"
                raise UserError(
                    f"{source} has no column {column!r}; found: {found}; wanted: {', '.join((_NAME, *tasks))}"
                )
        rows, seen = [], {}
        for record in reader:
            where = f"{source} line {reader.line_num}"
            of_task = {task: tuple(filter(None, map(_plain, (record[task] or "").split(_SEVERAL)))) for task in tasks}
            name = (record[_NAME] or "").strip()
            for column, classes in ((_NAME, (name,)), *of_task.items()):
                if not any(classes):
                    raise UserError(f"{where} has an empty {column}; leave the row out where a task lacks the class")
                for one in classes:
                    if (column, one) in seen:
                        raise UserError(
                            f"{where}: {column} {one!r} is in line {seen[column, one]} too; it can be of one class only"
                        )
                    seen[column, one] = reader.line_num
            rows.append(SharedClass(name, reader.line_num, of_task))
        return cls(source, tuple(rows), path is not None, hashlib.sha256(text.encode()).hexdigest())

    def shared(self, known: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
        """Task -> its class -> the shared class, of those that all tasks have.

        Args:
          known: the classes of each task, as its data states them.

        Raises:
          UserError: the data lacks a class of an exact map, or fewer than two classes are shared.
        """
        plain = {task: {_plain(name): name for name in names} for task, names in known.items()}
        found: dict[str, dict[str, str]] = {task: {} for task in known}
        count = 0
        for row in self.rows:
            there = {task: [name for name in row.of_task[task] if name in plain[task]] for task in known}
            for task in known:
                missing = [name for name in row.of_task[task] if name not in plain[task]]
                if self.exact and missing:
                    raise UserError(
                        f"{self.source} line {row.line} ({row.name}): {task} has no class {missing[0]!r}; it has: {_listed(known[task])}"
                    )
            if all(there.values()):
                count += 1
                for task, names in there.items():
                    found[task].update({plain[task][name]: row.name for name in names})
        if count < 2:
            data = "; ".join(f"{task} has {_listed(names)}" for task, names in known.items())
            raise UserError(
                f"{self.source} finds {count} classes that {' and '.join(known)} share: {data}. Give --class-map=FILE with the classes as the "
                "data states them; docs/evaluate.md says how"
            )
        return found


def _plain(text: str) -> str:
    """A class as it is compared: "7" for "007"."""
    text = text.strip()
    return str(int(text)) if text.isdecimal() else text


def _listed(names: Sequence[str]) -> str:
    shown = [_plain(name) for name in names]
    numbers = " (numbers without names)" if all(name.isdecimal() for name in shown) else ""
    return f"{', '.join(shown[:_LISTED])}{', …' if len(shown) > _LISTED else ''}{numbers}"
