"""What the scores show of a checkpoint: one probe for each task, its comparisons, and a sentence in words."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

from curia_jax.evaluate.results import FLOORS, HISTOGRAM, MAJORITY, PIXELS, RANDOM, Score
from curia_jax.report.comparison import held_out_loss

# What a checkpoint is compared with, as a sentence says it.
OTHERS = {
    RANDOM: "the same encoder untrained",
    PIXELS: "the raw pixels",
    HISTOGRAM: "the histogram of the pixels",
}


def first_backbone(scores: Sequence[Score]) -> str | None:
    """The backbone that a user named first; None where there are floors alone."""
    return next((score.backbone for score in scores if score.backbone not in (*FLOORS, MAJORITY)), None)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The checkpoint's AUROC in one task, with the probe that had the smallest loss on the held-out cases.

    Attributes:
      score: of the checkpoint.
      differences: checkpoint minus each other backbone, paired, with the same probe.
    """

    score: Score
    differences: tuple[Score, ...]

    @property
    def sentence(self) -> str:
        """The result and each comparison, in words that follow from the intervals."""
        study, parts = self.score.study, []
        for score in self.differences:
            other, by = OTHERS.get(score.against or "", score.against), f"{score.value_text} {score.interval_text}"
            if score.low is not None and score.low > 0:
                parts.append(f"better than {other} ({by})")
            elif score.high is not None and score.high < 0:
                parts.append(f"worse than {other} ({by})")
            else:
                parts.append(f"not distinguishable from {other} ({by})")
        text = (
            f"On {study.n:,} {'slices' if study.unit == 'slice' else 'series'} of {study.count_groups(study.patients)} that no "
            f"training has seen, a {self.score.head} probe on the frozen features tells {study.title} ({', '.join(study.classes)}) with "
            f"an AUROC of {self.score.value_text} {self.score.interval_text}"
        )
        listed = ", ".join(parts[:-1]) + (", and " if parts[:-1] else "") + parts[-1] if parts else ""
        return f"{text}: {listed}." if listed else f"{text}."


def find(scores: Sequence[Score]) -> Mapping[str, Finding]:
    """The finding of every task (or direction of one) whose AUROC is defined, by its title, in the order of the scores."""
    best: dict[str, tuple[float, Score]] = {}
    ours = first_backbone(scores)
    for score in scores:
        if (score.metric, score.backbone, score.against) != ("auroc", ours, None) or score.value is None:
            continue
        loss = held_out_loss(score)
        if score.study.title not in best or loss < best[score.study.title][0]:
            best[score.study.title] = loss, score
    return {title: Finding(score, _differences(scores, score)) for title, (_, score) in best.items()}


def _differences(scores: Sequence[Score], ours: Score) -> tuple[Score, ...]:
    return tuple(
        score
        for score in scores
        if score.against is not None
        and score.value is not None
        and not score.is_across
        and (score.study.title, score.head, score.metric) == (ours.study.title, ours.head, ours.metric)
    )


def control_sentence(scores: Sequence[Score], controls: Sequence[str]) -> str:
    """What the probes make of shuffled labels, on average over the shuffles; empty without two such tasks.

    The intervals are Student's t over the shuffles, and hold for all probes together (Bonferroni).

    Args:
      controls: names of the tasks, one for each shuffle.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for score in scores:
        if (
            score.study.task in controls
            and (score.metric, score.against) == ("auroc", None)
            and score.backbone != MAJORITY
        ):
            found.setdefault((score.backbone, score.head), []).append(math.nan if score.value is None else score.value)
    means: list[float] = []
    off: list[str] = []
    tail = 0.025 / max(len(found), 1)
    for (backbone, head), values in found.items():
        known = [value for value in values if math.isfinite(value)]
        if len(known) < 2:
            return ""
        means.append(statistics.fmean(known))
        half = float(stats.t.ppf(1 - tail, len(known) - 1)) * statistics.stdev(known) / len(known) ** 0.5
        if abs(means[-1] - 0.5) > half:
            off.append(f"{backbone}, {head}")
    if not means:
        return ""
    verdict = (
        f"the interval of {' and of '.join(off)} leaves out 0.5"
        if off
        else "the intervals of these means (95 % for all together) contain 0.5, chance"
    )
    return (
        f"Control: with the labels shuffled among the patients, the same probes have a mean AUROC of {min(means):.3f} to "
        f"{max(means):.3f} over {len(controls)} shuffles; {verdict}."
    )
