"""Few labels: subsets of the training cases, by patient and with the shares of the classes.

A subset depends on the patients, their targets, the seed and the size alone, so that it is the same for every backbone and on
every machine; and a larger one contains a smaller one of the same seed.
"""

import hashlib

import numpy as np
from jaxtyping import Int, Shaped

from curia_common.errors import UserError
from curia_jax.evaluate.targets import Classes, Targets

SEEDS = 3


def fraction(targets: Targets, patients: Shaped[np.ndarray, " n"], share: float, seed: int) -> Int[np.ndarray, " m"]:
    """Numbers of the cases of that share of the patients of each stratum, rounded up.

    Strata are the classes, fifths of the values, or whether there was an event. A patient with several belongs to the one that the fewest
    patients have.

    Args:
      share: above 0, at most 1.
    """
    strata = targets.strata
    names, number = np.unique(patients, return_inverse=True)
    has = np.zeros((len(names), int(strata.max()) + 1), bool)
    has[number, strata] = True
    # Of the strata that a patient has, the rarest.
    own = np.where(has, has.sum(axis=0), len(names) + 1).argmin(axis=1)
    order = _order(names, seed)
    chosen = np.zeros(len(names), bool)
    for stratum in np.unique(own):
        members = order[own[order] == stratum]
        chosen[members[: int(np.ceil(round(share * len(members), 9)))]] = True
    return np.flatnonzero(chosen[number])


def shots(targets: Classes, patients: Shaped[np.ndarray, " n"], k: int, seed: int) -> Int[np.ndarray, " m"]:
    """Numbers of k cases of every class, each of another patient of that class.

    Raises:
      UserError: a class has fewer than k patients.
    """
    names, number = np.unique(patients, return_inverse=True)
    order = _order(names, seed)
    rows = []
    for label in np.unique(targets.labels):
        of_class = np.flatnonzero(targets.labels == label)
        members = order[np.isin(order, number[of_class])][:k]
        if len(members) < k:
            raise UserError(f"{k} shots of every class: class {label} has {len(members)} patients to learn from")
        for member in members:
            cases = of_class[number[of_class] == member]
            rows.append(cases[_digest(f"{names[member]}:{label}", seed) % len(cases)])
    return np.sort(np.array(rows, np.int64))


def _order(names: Shaped[np.ndarray, " patients"], seed: int) -> Int[np.ndarray, " patients"]:
    """Patients in an order that depends on the seed and their names alone."""
    return np.array(sorted(range(len(names)), key=lambda i: _digest(str(names[i]), seed)), np.int64)


def _digest(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "big")
