"""Figures of the predictions of a task: ROC, reliability, confusion."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn import metrics

from curia_jax.report.style import FLOORS, OURS, SOFT, STYLE, WIDTH

BINS = 5  # of the reliability diagram: test splits are small
NAMED_CLASSES = 12  # more have no names and numbers in the confusion
# Of the backbones that a user named; those of results.FLOORS have their own.
COLOURS = (OURS, "#2f8f6b", "#8c4fa3", "#b23a48", "#3f7fbf", "#7a6a2f")
MORE_STYLE: dict[Any, Any] = {**STYLE, "font.size": 9}


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What one backbone and head says of the test cases of a task.

    Attributes:
      targets: index of the class; len(classes) for a class that training lacks.
      probabilities: of the classes.
      patients, slices: of each case; slices by their numbers in the test split.
    """

    classes: tuple[str, ...]
    targets: Int[np.ndarray, " n"]
    probabilities: Float[np.ndarray, "n classes"]
    patients: Shaped[np.ndarray, " n"]
    slices: Int[np.ndarray, " n"]


def roc_curve(p: Predictions) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]] | None:
    """False and true positive rates; of more than two classes the mean of each against the rest, at 101 false positive rates.

    None where the test has one class.
    """
    if len(p.classes) == 2:
        positive = p.targets == 1
        if not 0 < positive.sum() < len(positive):
            return None
        false, true, _ = metrics.roc_curve(positive, p.probabilities[:, 1])
        return false, true
    grid, curves = np.linspace(0, 1, 101), []
    for number in range(len(p.classes)):
        positive = p.targets == number
        if 0 < positive.sum() < len(positive):
            false, true, _ = metrics.roc_curve(positive, p.probabilities[:, number])
            curves.append(np.interp(grid, false, true))
    return (grid, np.mean(curves, axis=0)) if curves else None


def reliability(
    p: Predictions,
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"], Int[np.ndarray, " bins"]]:
    """Of the bins that hold cases: mean probability, share that is right, and number of cases.

    Two classes: the probability of the second, and the share that has it. More: the probability of the likeliest class.
    """
    if len(p.classes) == 2:
        sure, right = p.probabilities[:, 1], p.targets == 1
    else:
        sure, right = p.probabilities.max(axis=1), p.probabilities.argmax(axis=1) == p.targets
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    held = counts > 0
    sums = np.stack([np.bincount(place, weights=values, minlength=BINS) for values in (sure, right.astype(float))])
    mean, share = sums[:, held] / counts[held]
    return mean, share, counts[held]


def confusion(p: Predictions) -> Int[np.ndarray, "classes classes"]:
    """Cases by class (rows) and likeliest class (columns), of the classes that training has."""
    known = p.targets < len(p.classes)
    table = np.zeros((len(p.classes), len(p.classes)), np.int64)
    np.add.at(table, (p.targets[known], p.probabilities[known].argmax(axis=1)), 1)
    return table


def task_figure(predictions: Mapping[str, Predictions]) -> Figure:
    """ROC and reliability of every backbone, and the confusion of the first."""
    with matplotlib.rc_context(MORE_STYLE):
        figure = Figure(figsize=(WIDTH * 1.35, 3.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        own = [name for name in predictions if name not in FLOORS]
        colours = {**FLOORS, **{name: COLOURS[n % len(COLOURS)] for n, name in enumerate(own)}}
        for name, p in predictions.items():
            curve = roc_curve(p)
            if curve is not None:
                left.plot(*curve, color=colours[name], linewidth=1.7, label=name)
            mean, share, _ = reliability(p)
            middle.plot(mean, share, "o-", color=colours[name], linewidth=1.2, markersize=3.5)
        several = len(next(iter(predictions.values())).classes) > 2
        for axes, title, x, y in (
            (left, "ROC, mean over classes" if several else "ROC", "false positive rate", "true positive rate"),
            (middle, "reliability", "probability", "share that is right" if several else "share of positive cases"),
        ):
            axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":")
            axes.set(title=title, xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1), box_aspect=1)
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4) or 1)
        _confusion(right, next(iter(predictions.values())))
    return figure


def _confusion(axes: Axes, p: Predictions) -> None:
    table = confusion(p)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title="confusion", xlabel="predicted", ylabel="true")
    axes.grid(visible=False)
    if len(p.classes) > NAMED_CLASSES:
        return
    for (row, column), number in np.ndenumerate(table):
        colour = "white" if shares[row, column] > 0.6 else "#1b2430"
        axes.text(column, row, f"{number:,}", ha="center", va="center", color=colour)
    short: Sequence[str] = [name if len(name) < 12 else name[:11] + "…" for name in p.classes]
    axes.set_xticks(range(len(short)), short, rotation=35, ha="right")
    axes.set_yticks(range(len(short)), short)
