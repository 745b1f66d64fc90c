"""How well heads do that learned from few labels: the value over the number of labelled patients, and its spread over seeds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from curia_jax.evaluate.results import ALL_LABELS, MAJORITY, Score
from curia_jax.evaluate.subsets import SEEDS
from curia_jax.report import comparison
from curia_jax.report.curves import COLOURS, MORE_STYLE
from curia_jax.report.style import FLOORS, WIDTH


class Level(NamedTuple):
    """A number of labels.

    Attributes:
      labels: as in results.
      patients: labelled patients, the mean over the seeds.
      values: by backbone, the value of every seed.
    """

    labels: str
    patients: float
    values: Mapping[str, Sequence[float]]


class Curve(NamedTuple):
    """A task; the levels in the order of their patients."""

    metric: str
    levels: Sequence[Level]


def curve(scores: Sequence[Score]) -> Curve | None:
    """Of a task's scores by one protocol; None with all labels alone.

    Every backbone has the head that was chosen with all labels, or that of the first level without such scores. Levels below all
    with fewer than SEEDS seeds say too little and are left out.
    """
    values = [s for s in scores if s.against is None and s.value is not None and s.backbone != MAJORITY]
    if all(score.study.labels == ALL_LABELS for score in values):
        return None
    whole = [s for s in values if s.study.labels == ALL_LABELS]
    first = whole or [s for s in values if s.study.labels == values[0].study.labels]
    ranked = comparison.line(first)
    heads = {backbone: comparison.chosen_head(first, backbone) for backbone in ranked.scores}
    levels = []
    for labels in dict.fromkeys(score.study.labels for score in values):
        own = [
            s
            for s in values
            if s.study.labels == labels and s.metric == ranked.metric and heads.get(s.backbone) == s.head
        ]
        by_backbone: dict[str, list[float]] = {}
        for score in own:
            by_backbone.setdefault(score.backbone, []).append(score.value or 0.0)
        seeds = {score.study.seed: score.study.train_patients for score in own}
        if labels == ALL_LABELS or len(seeds) >= SEEDS:
            levels.append(Level(labels, statistics.fmean(seeds.values()), by_backbone))
    return Curve(ranked.metric, sorted(levels, key=lambda level: level.patients)) if levels else None


def figure(found: Curve, name: str) -> Figure:
    """A line for each backbone, the mean over the seeds, and a band from the smallest to the largest value.

    Args:
      name: of the metric, for people.
    """
    with matplotlib.rc_context(MORE_STYLE):
        made = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        axes = made.subplots()
        names = list(dict.fromkeys(name for level in found.levels for name in level.values))
        own = [name for name in names if name not in FLOORS]
        colours = {**FLOORS, **{name: COLOURS[n % len(COLOURS)] for n, name in enumerate(own)}}
        for backbone in names:
            levels = [level for level in found.levels if backbone in level.values]
            x = [level.patients for level in levels]
            means = [statistics.fmean(level.values[backbone]) for level in levels]
            lows, highs = ([end(level.values[backbone]) for level in levels] for end in (min, max))
            axes.fill_between(x, lows, highs, color=colours[backbone], alpha=0.15, linewidth=0)
            axes.plot(x, means, "o-", color=colours[backbone], linewidth=1.6, markersize=3.5, label=backbone)
        axes.set(xscale="log", xlabel="labelled patients that heads learn from", ylabel=name)
        ticks = sorted({round(level.patients) for level in found.levels})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        made.legend(loc="outside lower center", ncols=4)
    return made
