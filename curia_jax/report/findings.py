"""What the scores show of a checkpoint: one probe for each task, its comparisons, and a sentence in words."""

import dataclasses
from collections.abc import Mapping, Sequence

from curia_jax.evaluate.results import Score

# What a checkpoint is compared with, as a sentence says it.
OTHERS = {"random": "the same encoder untrained", "pixels": "the raw pixels"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """The checkpoint's AUROC in one task, with the probe that was best on the validation cases.

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
            f"training has seen, a {self.score.head} probe on the frozen features tells {study.task} ({', '.join(study.classes)}) with "
            f"an AUROC of {self.score.value_text} {self.score.interval_text}"
        )
        return f"{text}: {', and '.join(parts)}." if parts else f"{text}."


def find(scores: Sequence[Score]) -> Mapping[str, Finding]:
    """The finding of every task whose AUROC is defined, in the order of the scores."""
    best: dict[str, tuple[float, Score]] = {}
    for score in scores:
        if (score.metric, score.backbone, score.against) != ("auroc", "checkpoint", None) or score.value is None:
            continue
        selection = (score.fit and score.fit.selection_auroc) or 0.0
        if score.study.task not in best or selection > best[score.study.task][0]:
            best[score.study.task] = selection, score
    return {task: Finding(score, _differences(scores, score)) for task, (_, score) in best.items()}


def _differences(scores: Sequence[Score], ours: Score) -> tuple[Score, ...]:
    return tuple(
        score
        for score in scores
        if score.against is not None
        and score.value is not None
        and (score.study.task, score.head, score.metric) == (ours.study.task, ours.head, ours.metric)
    )


def control_sentence(scores: Sequence[Score], control: str) -> str:
    """What the probes make of a task whose labels were shuffled; empty without such a task.

    Args:
      control: name of that task.
    """
    controls = [
        score
        for score in scores
        if (score.study.task, score.metric, score.against) == (control, "auroc", None) and score.backbone != "none"
    ]
    values = [score.value for score in controls if score.value is not None]
    if not values:
        return ""
    span = f"{min(values):.3f} to {max(values):.3f}"
    off = [
        f"{score.backbone}, {score.head}"
        for score in controls
        if score.low is not None and score.high is not None and not score.low <= 0.5 <= score.high
    ]
    verdict = f"of {', '.join(off)} the interval leaves out 0.5" if off else "every interval contains 0.5, chance"
    return f"Control: with the labels shuffled among the patients ({control}) the same probes score {span}; {verdict}."
