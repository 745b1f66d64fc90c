"""What a report says of scores follows from their intervals."""

import dataclasses

import pytest

from curia_jax.evaluate.results import Fit, Score
from curia_jax.report import findings
from tests.scores import make_score


def test_probe_with_the_smallest_held_out_loss_is_reported() -> None:
    # kNN is better on the test cases and ranks the held-out ones better, neither of which decides.
    ridge = dataclasses.replace(make_score(head="ridge", value=0.7), fit=Fit(32, "validation split", 0.3, 0.6, {}))
    knn = dataclasses.replace(make_score(head="knn", value=0.8), fit=Fit(32, "validation split", 0.5, 0.9, {}))
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


def test_directions_across_a_column_are_findings_of_their_own() -> None:
    directions = {"trained_on": "CT"}
    within, across = (
        make_score(**directions, tested_on=side, value=value) for side, value in (("CT", 0.9), ("MR", 0.6))
    )
    lost = make_score(**directions, tested_on="MR", value=-0.3, low=-0.4, high=-0.2, against="tested on CT")
    other = make_score(**directions, tested_on="MR", value=0.1, low=0.05, high=0.2, against="random")
    found = findings.find([within, across, lost, other])
    assert {title: one.score for title, one in found.items()} == {
        "lesion, CT to CT": within,
        "lesion, CT to MR": across,
    }
    assert found["lesion, CT to MR"].differences == (other,)


def test_undefined_scores_are_no_finding() -> None:
    assert findings.find([make_score(value=None, low=None, high=None), make_score(backbone="random")]) == {}


def test_control_sentence_gives_means_and_names_those_off_chance() -> None:
    names = ["a", "b", "c", "d"]

    def shuffles(backbone: str, head: str, values: list[float | None]) -> list[Score]:
        made = [make_score(name, backbone, head) for name in names]
        return [dataclasses.replace(one, value=value) for one, value in zip(made, values, strict=True)]

    # Mean 0.51, standard deviation 0.0294: t(3) = 3.182 (4.177 for two probes) times 0.0147 is more than 0.01. Mean 0.7, standard
    # deviation 0.0082: 4.177 times 0.0041 is less than 0.2.
    chance = shuffles("run", "ridge", [0.55, 0.48, 0.50, 0.51])
    off = shuffles("pixels", "knn", [0.70, 0.71, 0.69, 0.70])
    assert findings.control_sentence([*chance, make_score()], names).endswith(
        "a mean AUROC of 0.510 to 0.510 over 4 shuffles; the intervals of these means (95 % for all together) contain 0.5, chance."
    )
    assert findings.control_sentence([*chance, *off], names).endswith(
        "0.510 to 0.700 over 4 shuffles; the interval of pixels, knn leaves out 0.5."
    )
    assert findings.control_sentence(shuffles("run", "ridge", [None, None, None, 0.5]), names) == ""
    assert findings.control_sentence([make_score()], []) == ""
