"""Compares backbones across tasks: figures, ranks and a table in LaTeX."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from curia_jax.evaluate.results import ALL_LABELS, CLINICAL, MAJORITY, Score

WITHOUT_IMAGE = (MAJORITY, CLINICAL)

# The first of these that a task has is what its backbones are ranked by.
RANKED_BY = ("auroc", "c_index", "rmse", "accuracy")
_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{sign: "\\" + sign for sign in "&%$#_{}"},
    }
)
LOWER_IS_BETTER = ("rmse", "mae", "brier", "log_loss")


@dataclasses.dataclass(frozen=True)
class Line:
    """A task, or one of its directions across a column.

    Attributes:
      task: its name.
      metric: that the backbones are ranked by.
      scores: by backbone, with the head that was best on the held-out cases.
      ranks: of the backbones that have a value and see the image, 1 being the best; equal values share a rank.
    """

    task: str
    title: str
    metric: str
    scores: Mapping[str, Score]
    ranks: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All tasks by one protocol; figures of different protocols are not comparable.

    Attributes:
      backbones: in the order of the results.
    """

    protocol: str
    backbones: tuple[str, ...]
    lines: tuple[Line, ...]

    def mean_rank(self, backbone: str) -> float | None:
        """Over the tasks in which every backbone that sees the image has a rank; None without one. Values of different metrics have no mean.

        The directions of a task count as one task together.
        """
        ranked = [b for b in self.backbones if b not in WITHOUT_IMAGE]
        by_task: dict[str, list[int]] = {}
        for line in self.lines:
            if backbone in ranked and all(b in line.ranks for b in ranked):
                by_task.setdefault(line.task, []).append(line.ranks[backbone])
        return statistics.fmean(map(statistics.fmean, by_task.values())) if by_task else None


def compare(scores: Sequence[Score]) -> list[Comparison]:
    """The comparison of every protocol, of scores with all labels; of a task across a column, between different values of it."""
    values = [
        s for s in scores
        if s.against is None and s.study.labels == ALL_LABELS
        and (s.study.trained_on is None or s.study.trained_on != s.study.tested_on)
    ]  # fmt: skip
    found = []
    for protocol in dict.fromkeys(score.study.protocol for score in values):
        own = [score for score in values if score.study.protocol == protocol]
        titles = dict.fromkeys(score.study.title for score in own)
        lines = [line([score for score in own if score.study.title == title]) for title in titles]
        found.append(Comparison(protocol, tuple(dict.fromkeys(score.backbone for score in own)), tuple(lines)))
    return found


def chosen_head(scores: Sequence[Score], backbone: str) -> str | None:
    """Of a backbone in a task, the head with the smallest loss on the held-out cases; the test is not looked at."""
    own = [score for score in scores if score.backbone == backbone and score.against is None]
    if not own:
        return None
    return min(own, key=held_out_loss).head


def held_out_loss(score: Score) -> float:
    """Of its head, on the held-out cases; infinite where nothing was chosen."""
    loss = score.fit.selection_loss if score.fit else None
    return math.inf if loss is None else loss


def line(scores: Sequence[Score]) -> Line:
    """The comparison of the backbones of a task, by one protocol and with all labels."""
    metrics = [score.metric for score in scores]
    metric = next((name for name in RANKED_BY if name in metrics), metrics[0])
    heads = {score.backbone: chosen_head(scores, score.backbone) for score in scores}
    chosen = {s.backbone: s for s in scores if s.metric == metric and s.head == heads[s.backbone]}
    sign = 1 if metric in LOWER_IS_BETTER else -1
    values = {name: sign * s.value for name, s in chosen.items() if s.value is not None and name not in WITHOUT_IMAGE}
    ranks = {name: 1 + sum(other < value for other in values.values()) for name, value in values.items()}
    return Line(scores[0].study.task, scores[0].study.title, metric, chosen, ranks)


def latex(comparisons: Sequence[Comparison]) -> str:
    """A table of each protocol, for the package booktabs; the best value of a task is bold."""
    return "\n".join(_latex(comparison) for comparison in comparisons)


def _latex(comparison: Comparison) -> str:
    head = " & ".join(map(_tex, ("task", "metric", *comparison.backbones)))
    lines = []
    for line in comparison.lines:
        cells = [_tex(line.title), _tex(line.metric)]
        for backbone in comparison.backbones:
            score = line.scores.get(backbone)
            if score is None or score.value is None:
                cells.append("--")
                continue
            value = f"\\textbf{{{score.value_text}}}" if line.ranks.get(backbone) == 1 else score.value_text
            cells.append(f"{value} {score.interval_text}")
        lines.append(" & ".join(cells) + r" \\")
    ranks = [comparison.mean_rank(backbone) for backbone in comparison.backbones]
    mean = " & ".join(["mean rank", "", *("--" if rank is None else f"{rank:.2f}" for rank in ranks)])
    return "\n".join(
        [
            f"% protocol {comparison.protocol}; value [95 % interval]",
            r"\begin{tabular}{ll" + "l" * len(comparison.backbones) + "}", r"\toprule", head + r" \\", r"\midrule",
            *lines, r"\midrule", mean + r" \\", r"\bottomrule", r"\end{tabular}", "",
        ]
    )  # fmt: skip


def _tex(text: str) -> str:
    return text.translate(_TEX)
