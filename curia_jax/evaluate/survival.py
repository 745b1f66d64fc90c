"""Cox regression with a ridge penalty, and its partial likelihood. Ties by Efron's method, as in R and lifelines."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

_TOLERANCE = 1e-9
_ITERATIONS = 100


@dataclasses.dataclass(frozen=True)
class RiskSets:
    """Who is at risk at every event, of cases sorted by time.

    Attributes:
      order: numbers of the cases by time.
      events: positions in that order of the cases with an event.
      first: for each event, the position of the first case at risk; all after it are.
      tie: for each event, the number of its time among the times with events.
      share: for each event, the part of its tied events that has left the risk set (Efron): 0, 1/d … (d - 1)/d of d.
    """

    order: Int[np.ndarray, " n"]
    events: Int[np.ndarray, " e"]
    first: Int[np.ndarray, " e"]
    tie: Int[np.ndarray, " e"]
    share: Float[np.ndarray, " e"]

    @classmethod
    def of(cls, time: Float[np.ndarray, " n"], event: Bool[np.ndarray, " n"]) -> "RiskSets":
        order = np.argsort(time, kind="stable")
        time, event = time[order], event[order]
        events = np.flatnonzero(event)
        _, start, tie, count = np.unique(time[events], return_index=True, return_inverse=True, return_counts=True)
        share = (np.arange(len(events)) - start[tie]) / count[tie]
        return cls(order, events, np.searchsorted(time, time[events]), tie, share)

    def at_risk(self, risk: Float[np.ndarray, "n *d"]) -> Float[np.ndarray, "e *d"]:
        """Sum over the risk set of each event, of values by case in sorted order."""
        total = np.cumsum(risk[::-1], axis=0)[::-1]
        tied = np.zeros((self.tie.max(initial=-1) + 1, *risk.shape[1:]))
        np.add.at(tied, self.tie, risk[self.events])
        share = self.share.reshape(-1, *[1] * (risk.ndim - 1))
        return total[self.first] - share * tied[self.tie]


def log_partial_likelihood(
    log_risk: Float[np.ndarray, " n"], time: Float[np.ndarray, " n"], event: Bool[np.ndarray, " n"]
) -> float:
    """Of predicted log risks; 0 without an event."""
    sets = RiskSets.of(time, event)
    sorted_risk = log_risk[sets.order]
    shift = sorted_risk.max(initial=0.0)
    return float(sorted_risk[sets.events].sum() - (np.log(sets.at_risk(np.exp(sorted_risk - shift))) + shift).sum())


def fit_cox(
    x: Float[np.ndarray, "n d"],
    time: Float[np.ndarray, " n"],
    event: Bool[np.ndarray, " n"],
    penalty: float,
    start: Float[np.ndarray, " d"] | None = None,
) -> Float[np.ndarray, " d"]:
    """Coefficients that maximise the log partial likelihood minus penalty / 2 times their squared length. Newton's method.

    Args:
      penalty: above 0 where features are more than events, or separate them.
      start: coefficients to start from.
    """
    sets = RiskSets.of(time, event)
    x = x[sets.order]
    observed = np.zeros(len(x))
    observed[sets.events] = 1

    def value(coefficients: Float[np.ndarray, " d"]) -> float:
        log_risk = x @ coefficients
        shift = log_risk.max()
        fitted = log_risk[sets.events].sum() - (np.log(sets.at_risk(np.exp(log_risk - shift))) + shift).sum()
        return float(fitted - penalty / 2 * coefficients @ coefficients)

    coefficients = np.zeros(x.shape[1]) if start is None else start
    best = value(coefficients)
    for _ in range(_ITERATIONS):
        log_risk = x @ coefficients
        risk = np.exp(log_risk - log_risk.max())
        inverse = 1 / sets.at_risk(risk)
        # Expected events of each case: its risk, over the risk sets that it was in.
        hazard = np.zeros(len(x))
        np.add.at(hazard, sets.first, inverse)
        leaves = np.bincount(sets.tie, inverse * sets.share)
        hazard = np.cumsum(hazard)
        hazard[sets.events] -= leaves[sets.tie]
        expected = risk * hazard
        gradient = x.T @ (observed - expected) - penalty * coefficients
        if np.abs(gradient).max(initial=0.0) < _TOLERANCE * max(1.0, len(sets.events)):
            break
        means = sets.at_risk(risk[:, None] * x) * inverse[:, None]
        curvature = (x * expected[:, None]).T @ x - means.T @ means + penalty * np.eye(x.shape[1])
        step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]
        # Halved until it helps: far from the optimum Newton's step may be too long.
        while (found := value(coefficients + step)) < best and np.abs(step).max() > 1e-12:
            step = step / 2
        if found <= best and np.abs(step).max() <= 1e-12:
            break
        coefficients, best = coefficients + step, found
    return coefficients
