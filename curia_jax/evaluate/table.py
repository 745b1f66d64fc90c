"""Result rows as a table on standard error."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

DIFFERENCE = "_difference"


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints values with their 95 % intervals, then the paired differences."""
    # Where it is piped into a file there is no width to fit.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
    for title, paired in (("value [95 % interval]", False), ("paired difference [95 % interval]", True)):
        chosen = [row for row in rows if row["metric"].endswith(DIFFERENCE) == paired]
        if not chosen:
            continue
        metrics = list(dict.fromkeys(row["metric"] for row in chosen))
        table = Table(title=title, title_justify="left")
        for name in ("task", "features", "probe", *metrics):
            table.add_column(name.removesuffix(DIFFERENCE).replace("_", " "))
        lines: dict[tuple[str, str, str], dict[str, str]] = {}
        for row in chosen:
            features = f"{row['backbone']} - {row['against']}" if paired else row["backbone"]
            lines.setdefault((row["task"], features, row["head"]), {})[row["metric"]] = interval(row)
        for key, values in lines.items():
            table.add_row(*key, *(values[name] for name in metrics))
        console.print(table)


def interval(row: Mapping[str, Any]) -> str:
    """Value and interval of a row as text; differences carry their sign."""
    sign = "+" if row["metric"].endswith(DIFFERENCE) else ""
    value, low, high = (
        "undefined" if row[name] is None else format(row[name], f"{sign}.3f") for name in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"
