"""Scores as a table on standard error, and the tasks on standard output."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from curia_jax.evaluate.results import Score
from curia_jax.evaluate.tasks import Official, Task

DOUBTED = "?"  # behind an interval that means little


def show(scores: Sequence[Score]) -> None:
    """Prints values with their 95 % intervals, then the paired differences."""
    # Redirected to a file there is no terminal width to fit. Square brackets are intervals and labels, not markup.
    console = Console(stderr=True, markup=False, emoji=False, width=None if sys.stderr.isatty() else 140)
    for title, paired in (("value [95 % interval]", False), ("paired difference [95 % interval]", True)):
        chosen = [score for score in scores if (score.against is not None) == paired]
        if not chosen:
            continue
        metrics = list(dict.fromkeys(score.metric for score in chosen))
        table = Table(title=title, title_justify="left")
        for name in ("task", "features", "probe", *metrics):
            table.add_column(name.replace("_", " "))
        lines: dict[tuple[str, str, str], dict[str, str]] = {}
        for score in chosen:
            features = f"{score.backbone} - {score.against}" if paired else score.backbone
            line = lines.setdefault((score.study.title + score.study.few_text, features, score.head), {})
            line[score.metric] = f"{score.value_text} {score.interval_text}{DOUBTED if score.doubt else ''}"
        for key, values in lines.items():
            table.add_row(*key, *(values.get(name, "") for name in metrics))
        console.print(table)
    for doubt in dict.fromkeys(score.doubt for score in scores if score.doubt):
        console.print(f"{DOUBTED} {doubt}")


def show_tasks(tasks: Sequence[Task]) -> None:
    """Prints what each task is and how to get its data."""
    for task in tasks:
        target = f"{task.classes} classes" if task.classes else task.target
        lines = [
            f"{task.name}: {task.title}",
            f"    input     {task.modality}, {task.form}; target: {target}; {', '.join(task.metrics) or 'no published metric'}",
            f"    official  {_official(task.official)}",
            f"    data      {task.access}; made of {task.origin} ({task.licence})",
            *([f"    not run   {task.not_run}"] if task.not_run else []),
        ]
        print("\n".join(lines))


def _official(official: Official | None) -> str:
    if official is None:
        return "not released"
    return f"{official.head}, {official.epochs} epochs, rate {official.base_rate:g}, batch {official.batch}"
