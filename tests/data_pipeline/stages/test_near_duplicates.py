import numpy as np
import pytest

from data_pipeline.stages import near_duplicates

SHAPE = (len(near_duplicates.PLACES), near_duplicates.SIDE, near_duplicates.SIDE)


def signatures(count: int, seed: int = 0, noise: float = 1.5) -> np.ndarray:
    """Series of one anatomy: they share the low frequencies, and correlate less than LIKE."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :16] / 8 - 1
    body = 64 * np.exp(-2 * (x**2 + y**2)) - 20
    return np.clip(np.rint(body + rng.normal(0, 12 * noise, (count, *SHAPE))), -127, 127).astype(np.int8)


def plain(found: np.ndarray, kinds: list[str]) -> list[int]:
    """Every pair, one after the other."""
    vectors = found.reshape(len(found), -1).astype(float)
    first = list(range(len(found)))
    for n in range(len(found)):
        for m in range(n):
            score = vectors[n] @ vectors[m] / max(np.linalg.norm(vectors[n]) * np.linalg.norm(vectors[m]), 1e-9)
            if kinds[n] == kinds[m] and score > near_duplicates.LIKE:
                first[n] = first[m]
                break
    return first


@pytest.mark.parametrize("block", [7, 2048])
def test_groups_equal_comparison_of_every_pair(block: int, monkeypatch) -> None:
    monkeypatch.setattr(near_duplicates, "BLOCK", block)
    found = signatures(60)
    # Exact copies, and nearly exact ones.
    found[20], found[41], found[59] = found[3], found[20], found[7]
    found[33] = np.clip(found[5].astype(int) + 1, -127, 127)
    found[50] = 0
    kinds = ["CT axial"] * 58 + ["MR axial"] * 2
    assert near_duplicates.groups(found, kinds) == plain(found, kinds)
    assert [n for n, m in enumerate(near_duplicates.groups(found, kinds)) if n != m] == [20, 33, 41]
    assert near_duplicates.groups(found[:0], []) == []


def test_duplicate_is_found_among_many_with_a_shared_structure() -> None:
    found = signatures(3000, noise=0.2)
    found[:, 0] = found[0, 0]  # the first of three slices has the same structure in all
    found[:, 1:] = np.random.default_rng(1).integers(-100, 100, (3000, 2, 16, 16))
    found[2999] = found[2900]
    result = near_duplicates.groups(found, ["CT axial"] * 3000)
    assert [n for n, m in enumerate(result) if n != m] == [2999] and result[2999] == 2900
