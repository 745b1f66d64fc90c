"""What is lost across a column: picked from the scores, and drawn."""

import dataclasses

import numpy as np
import pytest

from curia_jax.evaluate.results import Score
from curia_jax.report import across, comparison
from tests.scores import make_score

SIDES = ("CT", "MR")


def scores(task: str = "organ", shift: float = 0.0) -> list[Score]:
    """Two backbones and heads: 0.9 within a modality, 0.6 across; the head knn is better in the test and worse on the held-out cases."""
    made = []
    for backbone, less in (("run", shift), ("pixels", 0.2)):
        for head, more in (("ridge", 0.0), ("knn", 0.05)):
            for trained in SIDES:
                for tested in SIDES:
                    value = 0.9 - less + more - (0.3 if trained != tested else 0.0)
                    words = {
                        "task": task,
                        "backbone": backbone,
                        "head": head,
                        "trained_on": trained,
                        "tested_on": tested,
                    }
                    score = make_score(**words, metric="accuracy", value=value, low=value - 0.1, high=value + 0.1)
                    fit = dataclasses.replace(score.fit, selection_loss=1.0 + more) if score.fit else None
                    made.append(dataclasses.replace(score, fit=fit))
                    if trained != tested:
                        for against in (f"trained on {tested}", f"tested on {trained}"):
                            made.append(
                                make_score(**words, metric="accuracy", value=-0.3, low=-0.4, high=-0.2, against=against)
                            )
    made.append(make_score(task, "majority", "none", metric="accuracy", value=0.1, trained_on="CT", tested_on="MR"))
    made.append(
        make_score(task, "run", metric="accuracy", value=0.2, against="pixels", trained_on="CT", tested_on="MR")
    )
    return made


def test_each_direction_pairs_what_is_within_and_across() -> None:
    found = across.crossing(scores())
    assert found is not None and found.metric == "accuracy"
    assert set(found.directions) == {("CT", "MR"), ("MR", "CT")}
    for (trained, tested), by_backbone in found.directions.items():
        assert list(by_backbone) == ["run", "pixels"]
        pair = by_backbone["run"]
        assert (pair.within.study.trained_on, pair.within.study.tested_on) == (tested, tested)
        assert (pair.crossed.study.trained_on, pair.crossed.study.tested_on) == (trained, tested)
        assert (pair.trained.against, pair.tested.against) == (f"trained on {tested}", f"tested on {trained}")
        # The head is chosen on the held-out cases.
        assert {score.head for score in pair} == {"ridge"}
        assert pair.crossed.value == pytest.approx(0.6)


def test_task_that_is_not_across_a_column_has_no_picture() -> None:
    assert across.crossing([make_score(), make_score(backbone="pixels")]) is None


def test_picture_has_a_panel_for_each_direction_with_both_figures() -> None:
    found = across.crossing(scores())
    assert found is not None
    made = across.figure(found, "accuracy")
    assert [axes.get_title(loc="left") for axes in made.axes] == ["CT to MR", "MR to CT"]
    for axes in made.axes:
        dots = [x for line in axes.lines if line.get_marker() == "o" for x in np.asarray(line.get_xdata())]
        assert [text.get_text() for text in axes.texts] == ["-0.300", "-0.300"]
        assert sorted(dots) == pytest.approx([0.4, 0.6, 0.7, 0.9])
        assert [label.get_text() for label in axes.get_yticklabels()] == ["run", "pixels"]


def test_comparison_lists_directions_across_and_ranks_them_as_one_task() -> None:
    other = [
        make_score("lesion", name, metric="accuracy", value=value) for name, value in (("run", 0.5), ("pixels", 0.6))
    ]
    (found,) = comparison.compare([*scores(), *other])
    assert [line.title for line in found.lines] == ["organ, CT to MR", "organ, MR to CT", "lesion"]
    # First in both directions, second in the other task.
    assert found.mean_rank("run") == 1.5
