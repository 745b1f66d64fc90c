"""Which cases are shown as right and wrong."""

from collections.abc import Sequence

import numpy as np

from curia_common import windows
from curia_jax.report import examples
from curia_jax.report.curves import Predictions


def images(numbers: Sequence[int]) -> list[examples.Image]:
    return [examples.Image(np.full((4, 4), float(n)), windows.Window("all", 50.0, 100.0)) for n in numbers]


def predictions() -> Predictions:
    positive = np.array([0.9, 0.95, 0.6, 0.99, 0.2, 0.4, 0.7])
    targets = np.array([1, 1, 1, 0, 1, 0, 2])  # the last class was not learned
    patients = np.array(["a", "a", "b", "c", "d", "e", "f"])
    return Predictions(("no", "yes"), targets, np.stack([1 - positive, positive], axis=1), patients, np.arange(7) + 10)


def test_surest_cases_are_shown_one_of_each_patient() -> None:
    right, wrong = examples.choose(predictions(), images)
    # 11 of patient a is surer than 10, the other slice of that patient.
    assert [float(case.image.pixels[0, 0]) for case in right] == [11, 12, 15]
    assert [(case.truth, case.predicted, round(case.probability, 2)) for case in right] == [
        ("yes", "yes", 0.95), ("yes", "yes", 0.6), ("no", "no", 0.6),
    ]  # fmt: skip
    assert [(case.truth, case.predicted, round(case.probability, 2)) for case in wrong] == [
        ("no", "yes", 0.99), ("yes", "no", 0.8), ("a class not learned", "yes", 0.7),
    ]  # fmt: skip


def test_figure_says_what_each_case_is() -> None:
    right, _ = examples.choose(predictions(), images)
    made = examples.figure((right, []))
    titles = [axes.get_title() for axes in made.axes]
    assert titles[:3] == ["right: yes 0.95", "right: yes 0.60", "right: no 0.60"] and set(titles[3:]) == {""}
    assert [text.get_text() for text in made.axes[4].texts] == ["none wrong"]
    assert made.axes[0].images[0].get_clim() == (0, 100)
