"""The guard of the train step: which updates it refuses, by the rule as the settings state it."""

import jax.numpy as jnp
import pytest

from curia_jax.objectives import base


def judged(updates: list[tuple[float, float]], factor: float | None = 10.0) -> tuple[list[bool], base.GuardState]:
    """(loss, gradient norm) of successive steps -> which are applied."""
    guard, applied = base.new_guard(), []
    for loss, norm in updates:
        good, guard = base.judge(guard, jnp.float32(loss), jnp.float32(norm), factor)
        applied.append(bool(good))
    return applied, guard


@pytest.mark.parametrize(
    "loss, norm", [(float("nan"), 1.0), (1.0, float("nan")), (float("inf"), 1.0), (1.0, float("inf"))]
)
def test_update_that_is_not_finite_is_refused(loss: float, norm: float) -> None:
    applied, guard = judged([(loss, norm), (1.0, 1.0), (loss, norm), (loss, norm), (1.0, 1.0), (loss, norm)])
    assert applied == [False, True, False, False, True, False]
    assert (int(guard["applied"]), int(guard["refused"]), float(guard["gradient_norm"])) == (2, 1, 1.0)


def test_norm_above_its_running_mean_is_refused_and_not_learned() -> None:
    applied, guard = judged([(1.0, 2.0), (1.0, 4.0), (1.0, 29.0), (1.0, 42.0), (1.0, 3.0)])
    # The means before each are 0, 2, 3, (2 + 4 + 29) / 3 = 11.67 and, once 42 is applied, (35 + 42) / 4 = 19.25.
    assert applied == [True, True, True, True, True]
    assert float(guard["gradient_norm"]) == pytest.approx((2 + 4 + 29 + 42 + 3) / 5)
    applied, guard = judged([(1.0, 2.0), (1.0, 4.0), (1.0, 31.0), (1.0, 3.0)])
    assert applied == [True, True, False, True]
    assert float(guard["gradient_norm"]) == pytest.approx(3.3 + (3 - 3.3) / 3)  # the bound rose by a tenth


def test_loss_far_above_the_first_is_refused() -> None:
    applied, _ = judged([(2.0, 1.0), (0.001, 1.0), (19.9, 1.0), (20.1, 1.0), (0.5, 1.0)])
    assert applied == [True, True, True, False, True]


def test_lasting_change_of_the_norm_is_accepted_after_some_steps() -> None:
    applied, _ = judged([(1.0, 1.0)] * 200 + [(1.0, 20.0)] * 20)
    assert all(applied[:200]) and applied[200:].index(True) == 8  # 10 x 1.1**8 = 21.4


def test_mean_forgets_old_norms() -> None:
    _, guard = judged([(1.0, 1.0)] * 500 + [(1.0, 5.0)] * 500)
    assert float(guard["gradient_norm"]) == pytest.approx(5 - 4 * 0.99**500, rel=1e-3)


def test_without_a_factor_only_what_is_not_finite_is_refused() -> None:
    applied, guard = judged([(0.0, 0.0), (5.0, 1.0), (1e6, 1e9), (float("nan"), 1.0), (2.0, 1.0)], factor=None)
    assert applied == [True, True, True, False, True]
    assert int(guard["refused"]) == 0
