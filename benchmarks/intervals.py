"""How often the 95 % intervals of curia_jax.evaluate contain the true value, on simulated studies of which it is known.

A study draws patients with one case each, of classes, values or times to an event; the scores know something of the targets, or nothing.
Prints the table of docs/evaluate.md: the share of the studies whose interval misses the true value, where 5 % is right, and the share
of those whose interval has a `doubt`, which are not counted in the first.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from curia_jax.evaluate import metrics
from curia_jax.evaluate.targets import Times

LARGE = 10_000  # cases of the study that gives the true value


@dataclasses.dataclass(frozen=True)
class Kind:
    """Studies of a kind.

    Attributes:
      metric: "auroc", "accuracy", "c_index" or "r2".
      signal: what scores know of the targets: the distance of the classes, the correlation with the value, or the log hazard
        ratio, in deviations of the score; 0 is nothing.
      share: of positive cases, or of cases whose event is seen; of values without meaning.
    """

    metric: str
    signal: float
    share: float = 0.5

    @property
    def function(self) -> metrics.Metric:
        return {**metrics.METRICS, **metrics.VALUE_METRICS, **metrics.TIME_METRICS}[self.metric]

    def draw(
        self, n: int, r: np.random.Generator
    ) -> tuple[Int[np.ndarray, " n"] | Float[np.ndarray, " n"] | Times, Float[np.ndarray, "n outputs"]]:
        """Targets and scores of n cases."""
        score = r.normal(size=n)
        if self.metric == "c_index":
            # Follow-up ends at random: of two exponential times the shorter is the event with probability `share`.
            event = r.exponential(size=n) * np.exp(-self.signal * score)
            end = r.exponential(self.share / max(1e-9, 1 - self.share), size=n)
            return Times(np.minimum(event, end), event <= end), score[:, None]
        if self.metric == "r2":
            value = self.signal * score + (1 - self.signal**2) ** 0.5 * r.normal(size=n)
            return value, self.signal * score[:, None]
        positive = (r.random(n) < self.share).astype(np.int64)
        score += self.signal * positive
        # The log odds of the positive class, by Bayes' rule for two normal distributions of deviation 1.
        odds = self.signal * score - self.signal**2 / 2 + np.log(self.share / (1 - self.share))
        if self.signal == 0:
            odds += score
        return positive, np.stack([-odds, odds], axis=1)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What became of the intervals of many studies.

    Attributes:
      true: value of the metric.
      below, above: of the studies without a `doubt`, the share whose interval is wholly below, or above, the true value; NaN if
        all have one.
      doubted: share of the studies with a `doubt`, or without an interval.
    """

    true: float
    below: float
    above: float
    doubted: float

    @property
    def text(self) -> str:
        doubted = f" ({self.doubted:.0%} doubted)" if self.doubted else ""
        return "all doubted" if self.doubted == 1 else f"{self.below + self.above:.1%}{doubted}"


KINDS = (
    Kind("auroc", 0.0), Kind("auroc", 1.2), Kind("auroc", 0.0, 0.2), Kind("auroc", 1.2, 0.2), Kind("accuracy", 1.2),
    Kind("c_index", 0.0, 0.7), Kind("c_index", 1.0, 0.7), Kind("r2", 0.4), Kind("r2", 0.7),
)  # fmt: skip


@functools.cache
def true_value(kind: Kind) -> float:
    """The metric of one large study."""
    targets, scores = kind.draw(LARGE, np.random.default_rng(0))
    return float(kind.function(targets, scores, np.ones((1, LARGE)))[0])


def coverage(kind: Kind, n: int, *, studies: int, draws: int, seed: int = 0) -> Coverage:
    """Of studies of n patients each."""
    r = np.random.default_rng([seed, n])
    true = true_value(kind)
    sides = []
    for study in range(studies):
        targets, scores = kind.draw(n, r)
        found = metrics.Bootstrap.over(np.arange(n), draws=draws, seed=study).estimate(kind.function, targets, scores)
        if np.isfinite(found.low) and found.doubt is None:
            sides.append((found.high < true, found.low > true))
    below, above = np.mean(sides, axis=0) if sides else (float("nan"), float("nan"))
    return Coverage(true, float(below), float(above), 1 - len(sides) / studies)


def markdown(kinds: Sequence[Kind], sizes: Sequence[int], *, studies: int, draws: int) -> str:
    """A line for each kind of study, a column for each number of patients."""
    lines = [
        f"| metric | true value | {' | '.join(f'{n} patients' for n in sizes)} |",
        "|---|---|" + "---|" * len(sizes),
    ]
    for kind in kinds:
        found = [coverage(kind, n, studies=studies, draws=draws) for n in sizes]
        what = {"c_index": f", {kind.share:.0%} with an event", "r2": ""}.get(
            kind.metric, f", {kind.share:.0%} positive"
        )
        lines.append(f"| {kind.metric}{what} | {found[-1].true:.2f} | {' | '.join(one.text for one in found)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m benchmarks.intervals",
    )  # fmt: skip
    parser.add_argument("--patients", default="15,30,100", help="of a study, with commas (%(default)s)")
    parser.add_argument("--studies", type=int, default=500, help="(%(default)s)")
    parser.add_argument("--draws", type=int, default=1000, help="of each bootstrap (%(default)s)")
    args = parser.parse_args(argv)
    sizes = [int(word) for word in args.patients.split(",")]
    print(markdown(KINDS, sizes, studies=args.studies, draws=args.draws))
    return 0


if __name__ == "__main__":
    sys.exit(main())
