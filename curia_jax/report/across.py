"""What is lost from one value of a column to another, such as from CT to MR: picked from the scores of a task, and drawn."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from curia_jax.evaluate.results import ALL_LABELS, MAJORITY, TRAINED_ON, Score, Study
from curia_jax.report import comparison
from curia_jax.report.curves import MORE_STYLE
from curia_jax.report.style import OURS, SOFT, WIDTH

# What is shown: the first that a task has.
_METRICS = ("accuracy", "c_index", "rmse")
_WITHIN = "#c2762b"


class Pair(NamedTuple):
    """A direction of a backbone.

    Attributes:
      within: of a head that learned from the value that is tested.
      crossed: of one that learned from another value.
      trained: `crossed` minus `within`, on the same cases.
      tested: `crossed` minus the same head on the test cases of the value that it learned from.
    """

    within: Score
    crossed: Score
    trained: Score
    tested: Score


class Crossing(NamedTuple):
    """A task across a column.

    Attributes:
      study: of one of its scores.
      directions: (value that heads learned from, value that is tested) -> backbone -> its figures.
    """

    study: Study
    metric: str
    directions: Mapping[tuple[str, str], Mapping[str, Pair]]


def crossing(scores: Sequence[Score]) -> Crossing | None:
    """Of a task by one protocol, with all labels; None where it is not scored across a column.

    Every backbone has one head in all directions, so that differences are those of the figures: the one with the smallest mean loss on the
    held-out cases, over the values that heads learn from.
    """
    own = [
        s for s in scores if s.study.trained_on is not None and s.study.labels == ALL_LABELS and s.backbone != MAJORITY
    ]
    if not own:
        return None
    metric = next(name for name in _METRICS if any(score.metric == name for score in own))
    losses: dict[str, dict[str, list[float]]] = {}
    for score in own:
        if score.against is None:
            losses.setdefault(score.backbone, {}).setdefault(score.head, []).append(comparison.held_out_loss(score))
    head = {name: min(by_head, key=lambda head: statistics.fmean(by_head[head])) for name, by_head in losses.items()}
    shown = [s for s in own if s.metric == metric and s.head == head[s.backbone]]
    values = {(s.study.trained_on, s.study.tested_on, s.backbone): s for s in shown if s.against is None}
    differences = {
        (s.study.trained_on, s.study.tested_on, s.backbone, (s.against or "").startswith(TRAINED_ON)): s
        for s in shown
        if s.is_across
    }
    directions: dict[tuple[str, str], dict[str, Pair]] = {}
    for (trained, tested, backbone), score in values.items():
        if trained != tested:
            directions.setdefault((str(trained), str(tested)), {})[backbone] = Pair(
                values[tested, tested, backbone], score, differences[trained, tested, backbone, True],
                differences[trained, tested, backbone, False],
            )  # fmt: skip
    return Crossing(own[0].study, metric, directions)


def figure(found: Crossing, name: str) -> Figure:
    """A panel for each direction: of each backbone the figure within and across with their intervals, and on the right what is lost.

    Args:
      name: of the metric, for people.
    """
    count = max(map(len, found.directions.values()))
    with matplotlib.rc_context(MORE_STYLE):
        made = Figure(figsize=(WIDTH, (0.75 + 0.42 * count) * len(found.directions) + 0.5), layout="constrained")
        panels = made.subplots(len(found.directions), 1, sharex=True, squeeze=False)[:, 0]
        for axes, ((trained, tested), by_backbone) in zip(panels, found.directions.items(), strict=True):
            for place, pair in enumerate(by_backbone.values()):
                ends = [score.value for score in (pair.within, pair.crossed) if score.value is not None]
                axes.plot(ends, [place] * len(ends), color=SOFT, linewidth=1.2, zorder=1)
                for score, colour, offset in ((pair.within, _WITHIN, -0.12), (pair.crossed, OURS, 0.12)):
                    if score.value is None:
                        continue
                    if score.low is not None and score.high is not None:
                        axes.plot([score.low, score.high], [place + offset] * 2, color=colour, linewidth=1.6, alpha=0.6)
                    axes.plot(score.value, place, "o", color=colour, markersize=6, zorder=2)
                axes.text(
                    1.01, place, pair.trained.value_text, transform=axes.get_yaxis_transform(), va="center", fontsize=9
                )
            axes.set_yticks(np.arange(len(by_backbone)), list(by_backbone))
            axes.set_ylim(len(by_backbone) - 0.5, -0.5)
            axes.set_title(f"{trained} to {tested}", loc="left", fontsize=10)
            axes.set_title("lost", loc="right", fontsize=9)
            axes.grid(visible=False, axis="y")
        panels[-1].set_xlabel(name)
        panels[0].plot([], [], "o", color=_WITHIN, label="within: learned from what is tested")
        panels[0].plot([], [], "o", color=OURS, label="across: learned from the other")
        made.legend(loc="outside lower center", ncols=2)
    return made
