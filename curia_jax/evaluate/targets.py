"""What heads learn: classes, values or times to an event, each with the loss that chooses settings."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from curia_jax.evaluate import survival

Scores = Float[np.ndarray, "n outputs"]
# Probabilities below this count as this in the log loss, as in scikit-learn.
_SMALLEST = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True)
class Classes:
    """Class numbers.

    Attributes:
      labels: 0 … count - 1; a class may be absent.
      count: number of classes.
    """

    labels: Int[np.ndarray, " n"]
    count: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Int[np.ndarray, " m"] | Bool[np.ndarray, " n"]) -> "Classes":
        return Classes(self.labels[rows], self.count)

    @property
    def strata(self) -> Int[np.ndarray, " n"]:
        """What cross-validation and subsets keep the shares of."""
        return self.labels

    @property
    def frequencies(self) -> Float[np.ndarray, " count"]:
        """Share of each class."""
        return np.bincount(self.labels, minlength=self.count) / len(self.labels)

    def loss(self, scores: Scores) -> float:
        """Sum of the log loss, in nats, of probabilities."""
        return -float(np.log(np.maximum(scores[np.arange(len(self)), self.labels], _SMALLEST)).sum())


@dataclasses.dataclass(frozen=True)
class Values:
    """A number for each case, in the unit of the label."""

    values: Float[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Int[np.ndarray, " m"] | Bool[np.ndarray, " n"]) -> "Values":
        return Values(self.values[rows])

    @property
    def strata(self) -> Int[np.ndarray, " n"]:
        """The fifth of the values that a case belongs to."""
        return np.searchsorted(np.quantile(self.values, (0.2, 0.4, 0.6, 0.8)), self.values).astype(np.int64)

    def loss(self, scores: Scores) -> float:
        """Sum of squared errors of the one output."""
        return float(np.square(scores[:, 0] - self.values).sum())


@dataclasses.dataclass(frozen=True)
class Times:
    """Times to an event, or to the end of follow-up.

    Attributes:
      time: above 0, in any unit.
      event: whether the event was seen at that time; otherwise the case is censored.
    """

    time: Float[np.ndarray, " n"]
    event: Bool[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, rows: Int[np.ndarray, " m"] | Bool[np.ndarray, " n"]) -> "Times":
        return Times(self.time[rows], self.event[rows])

    @property
    def strata(self) -> Int[np.ndarray, " n"]:
        """Whether there was an event."""
        return self.event.astype(np.int64)

    def loss(self, scores: Scores) -> float:
        """Negative log partial likelihood of log risks, among these cases."""
        return -survival.log_partial_likelihood(scores[:, 0], self.time, self.event)


Targets = Classes | Values | Times


@dataclasses.dataclass(frozen=True)
class Labels:
    """Several labels of each case, each there or not. Fine-tuning learns them together; the heads of frozen features one at a time.

    Attributes:
      present: whether each label is there.
    """

    present: Bool[np.ndarray, "n labels"]

    def __len__(self) -> int:
        return len(self.present)

    def loss(self, scores: Scores) -> float:
        """Sum over the cases of the mean log loss of the labels, in nats; scores are the probability of each."""
        right = np.where(self.present, scores, 1 - scores)
        return -float(np.log(np.maximum(right, _SMALLEST)).mean(axis=1).sum())
