"""What the figures of predictions show, from counts by hand."""

import numpy as np
import pytest

from curia_jax.report import curves
from curia_jax.report.curves import Predictions


def of(classes: tuple[str, ...], targets: list[int], probabilities: np.ndarray) -> Predictions:
    numbers = np.arange(len(targets))
    return Predictions(classes, np.array(targets), probabilities, numbers, numbers)


def binary(targets: list[int], positive: list[float]) -> Predictions:
    scores = np.array(positive)
    return of(("no", "yes"), targets, np.stack([1 - scores, scores], axis=1))


def area(curve: tuple[np.ndarray, np.ndarray]) -> float:
    return float(np.trapezoid(curve[1], curve[0]))


def test_roc_area_is_the_share_of_ordered_pairs() -> None:
    # Positive 0.8, 0.4; negative 0.6, 0.1: three of four pairs are in order.
    curve = curves.roc_curve(binary([1, 1, 0, 0], [0.8, 0.4, 0.6, 0.1]))
    assert curve is not None and area(curve) == pytest.approx(0.75)


def test_roc_of_one_class_is_not_drawn() -> None:
    assert curves.roc_curve(binary([1, 1], [0.8, 0.4])) is None


def test_roc_of_several_classes_is_the_mean_over_those_present() -> None:
    p = np.array([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.7, 0.1]])
    curve = curves.roc_curve(of(("a", "b", "c"), [0, 0, 1, 1], p))
    assert curve is not None and area(curve) == pytest.approx(1.0, abs=0.01)


def test_reliability_of_two_classes_counts_the_second() -> None:
    mean, share, counts = curves.reliability(binary([1, 0, 1, 1], [0.02, 0.08, 0.91, 1.0]))
    np.testing.assert_allclose(mean, [0.05, 0.955])
    np.testing.assert_allclose(share, [0.5, 1.0])
    np.testing.assert_array_equal(counts, [2, 2])


def test_reliability_of_several_classes_is_of_the_likeliest() -> None:
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.55, 0.35]])
    mean, share, counts = curves.reliability(of(("a", "b", "c"), [0, 2], p))
    np.testing.assert_allclose(mean, [0.525])
    np.testing.assert_allclose(share, [0.5])
    assert counts.tolist() == [2]


def test_confusion_has_true_classes_in_rows() -> None:
    table = curves.confusion(binary([0, 0, 1, 1, 2], [0.2, 0.9, 0.8, 0.7, 0.6]))  # class 2 was never learned
    np.testing.assert_array_equal(table, [[1, 1], [0, 2]])
