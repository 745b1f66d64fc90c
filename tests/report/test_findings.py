"""What a report says of scores follows from their intervals."""

import dataclasses

import pytest

from curia_jax.evaluate.results import Fit
from curia_jax.report import findings
from tests.scores import make_score


def test_probe_with_the_best_validation_score_is_reported() -> None:
    # kNN is better on the test cases, which must not decide.
    ridge = dataclasses.replace(make_score(head="ridge", value=0.7), fit=Fit(32, "validation split", 0.9, {}))
    knn = dataclasses.replace(make_score(head="knn", value=0.8), fit=Fit(32, "validation split", 0.6, {}))
    differences = [make_score(head=head, against="random", value=0.1, low=0.05, high=0.2) for head in ("knn", "ridge")]
    accuracy = make_score(head="ridge", metric="accuracy", against="random")
    found = findings.find([knn, ridge, *differences, accuracy])["lesion"]
    assert found.score == ridge and found.differences == (differences[1],)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.02, 0.2, "better than the same encoder untrained (+0.100 [+0.020, +0.200])"),
        (-0.02, 0.2, "not distinguishable from the same encoder untrained (+0.100 [-0.020, +0.200])"),
        (-0.3, -0.02, "worse than the same encoder untrained (+0.100 [-0.300, -0.020])"),
        (None, None, "not distinguishable from the same encoder untrained (+0.100 [no interval])"),
    ],
)
def test_sentence_follows_from_the_interval(low: float | None, high: float | None, words: str) -> None:
    difference = make_score(against="random", value=0.1, low=low, high=high)
    found = findings.find([make_score(), difference])["lesion"]
    assert found.sentence == (
        "On 60 slices of 12 patients that no training has seen, a ridge probe on the frozen features tells lesion (no, yes) "
        f"with an AUROC of 0.700 [0.600, 0.800]: {words}."
    )


def test_undefined_scores_are_no_finding() -> None:
    assert findings.find([make_score(value=None, low=None, high=None), make_score(backbone="random")]) == {}


def test_control_sentence_names_intervals_without_chance() -> None:
    chance = make_score("shuffled", value=0.52, low=0.4, high=0.6)
    off = make_score("shuffled", "pixels", "knn", value=0.7, low=0.6, high=0.8)
    assert findings.control_sentence([chance, make_score()], "shuffled").endswith(
        "the same probes score 0.520 to 0.520; every interval contains 0.5, chance."
    )
    assert "score 0.520 to 0.700; of pixels, knn the interval leaves out 0.5." in findings.control_sentence(
        [chance, off], "shuffled"
    )
    undefined = dataclasses.replace(chance, value=None)
    assert findings.control_sentence([make_score(), undefined], "shuffled") == ""
