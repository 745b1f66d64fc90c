"""Groups of cases by a column of the data, numbers in bands: subgroups of the test cases, or what is scored across."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from curia_common.errors import UserError

UNKNOWN = "unknown"
MOST = 30  # different values of a column


@dataclasses.dataclass(frozen=True)
class Column:
    """What cases are grouped by.

    Attributes:
      name: of the column.
      width: of the bands of a column of numbers; None where its values are groups as they are.
      option: that names it, for messages.
    """

    name: str
    width: float | None = None
    option: str = "--subgroups"

    @classmethod
    def parse(cls, word: str, option: str = "--subgroups") -> "Column":
        """Reads "scanner" or "age:10".

        Raises:
          UserError: the width is not a number above 0.
        """
        name, colon, text = word.partition(":")
        try:
            width = float(text) if colon else None
        except ValueError:
            width = math.nan
        if not name or (width is not None and not (math.isfinite(width) and width > 0)):
            raise UserError(
                f"{option}={word}: write a column, or a column of numbers with the width of its bands, such as age:10"
            )
        return cls(name, width, option)

    def __str__(self) -> str:
        return self.name if self.width is None else f"{self.name}:{self.width:g}"

    def groups(self, values: Sequence[object]) -> Shaped[np.ndarray, " n"]:
        """The group of each case: its value, or "60 to 70" for 60 <= value < 70; UNKNOWN where there is none.

        Raises:
          UserError: more than MOST different groups, or bands of a column that is not of numbers.
        """
        found = np.array([self._group(value) for value in values], np.str_)
        count = len(np.unique(found))
        if count > MOST:
            raise UserError(
                f"{self.option}={self}: {count} different groups, more than {MOST}; give the width of bands of a column of numbers, "
                f"such as {self.name}:10, or name another column"
            )
        return found

    def _group(self, value: object) -> str:
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            return UNKNOWN
        if self.width is None:
            return f"{value:g}" if isinstance(value, float) else str(value)
        try:
            number = float(str(value))
        except ValueError:
            raise UserError(
                f"{self.option}={self}: a value of the column is not a number; name it without a width"
            ) from None
        low = math.floor(number / self.width) * self.width
        return f"{low:g} to {low + self.width:g}"


def in_order(groups: Shaped[np.ndarray, " n"]) -> list[str]:
    """The groups by their numbers, else by name; UNKNOWN last."""

    def key(name: str) -> tuple[bool, float, str]:
        try:
            return name == UNKNOWN, float(name.split(" ")[0]), name
        except ValueError:
            return name == UNKNOWN, math.inf, name

    return sorted(set(groups.tolist()), key=key)
