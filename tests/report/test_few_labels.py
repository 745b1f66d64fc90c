"""What the plot of few labels shows: levels by patients, every seed, the head that was chosen with all labels."""

import pytest

from curia_jax.evaluate.results import Score
from curia_jax.report import few_labels
from tests.scores import make_score


def scores(labels: str, patients: int, values: list[float], **changes: str) -> list[Score]:
    """A score for each seed."""
    return [
        make_score(value=value, labels=labels, seed=seed, train_patients=patients, **changes)
        for seed, value in enumerate(values)
    ]


def test_all_labels_alone_are_no_curve() -> None:
    assert few_labels.curve([make_score(), make_score(backbone="pixels")]) is None


def test_levels_are_in_the_order_of_their_patients_with_every_seed() -> None:
    found = few_labels.curve(
        [*scores("25 %", 10, [0.7, 0.72, 0.74]), *scores("k=1", 2, [0.5, 0.6, 0.55]), make_score(value=0.8)]
    )
    assert found is not None and found.metric == "auroc"
    assert [(level.labels, level.patients) for level in found.levels] == [("k=1", 2), ("25 %", 10), ("100 %", 40)]
    assert [list(level.values["run"]) for level in found.levels] == [[0.5, 0.6, 0.55], [0.7, 0.72, 0.74], [0.8]]


def test_level_with_fewer_than_three_seeds_is_left_out() -> None:
    found = few_labels.curve([*scores("25 %", 10, [0.7, 0.72]), *scores("50 %", 20, [0.7, 0.8, 0.9]), make_score()])
    assert found is not None and [level.labels for level in found.levels] == ["50 %", "100 %"]


def test_head_is_the_one_that_was_chosen_with_all_labels() -> None:
    good, bad = (make_score(head=head, value=value) for head, value in (("ridge", 0.9), ("knn", 0.6)))
    few = [*scores("25 %", 10, [0.6, 0.6, 0.6], head="ridge"), *scores("25 %", 10, [0.8, 0.8, 0.8], head="knn")]
    found = few_labels.curve([good, bad, *few])
    assert found is not None and list(found.levels[0].values["run"]) == [0.6, 0.6, 0.6]


def test_differences_and_the_majority_are_not_drawn() -> None:
    found = few_labels.curve(
        [make_score(), make_score(backbone="majority", head="none", value=0.5), *scores("25 %", 10, [0.6, 0.6, 0.6]),
         *scores("25 %", 10, [0.1, 0.1, 0.1], against="pixels")]
    )  # fmt: skip
    assert found is not None
    assert [dict(level.values) for level in found.levels] == [{"run": [0.6, 0.6, 0.6]}, {"run": [0.7]}]


def test_figure_has_a_line_with_its_band_for_every_backbone() -> None:
    found = few_labels.curve(
        [*scores("25 %", 10, [0.5, 0.6, 0.7]), *scores("25 %", 10, [0.4, 0.4, 0.4], backbone="pixels"),
         make_score(), make_score(backbone="pixels", value=0.6)]
    )  # fmt: skip
    assert found is not None
    (axes,) = few_labels.figure(found, "AUROC").axes
    lines = {str(line.get_label()): line for line in axes.lines}
    assert set(lines) == {"run", "pixels"}
    assert lines["run"].get_xdata().tolist() == [10, 40]
    assert lines["run"].get_ydata().tolist() == pytest.approx([0.6, 0.7])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.5) and axes.get_ylabel() == "AUROC"
