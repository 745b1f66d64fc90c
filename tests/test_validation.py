"""From outputs to scores, and the choice among checkpoints; whole runs are in test_finetune.py."""

from pathlib import Path

import numpy as np
import pytest
import scipy.special
from jax import numpy as jnp

from curia_common.errors import DataError
from curia_jax import checkpoint, saving, validation
from curia_jax.models.head import HeadConfig


def head(target: str, **changes) -> HeadConfig:
    names = {"classes": ("a", "b", "c"), "labels": ("a", "b", "c")}.get(target, ("age",))
    return HeadConfig("linear", "cls", target, names, **changes)


def test_outputs_become_probabilities_values_and_log_risks() -> None:
    outputs = np.array([[1.0, -2.0, 0.5], [80.0, 0.0, -90.0]], np.float32)
    found = validation.scores(head("classes"), outputs)
    np.testing.assert_allclose(
        found, np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True), rtol=1e-6, atol=1e-12
    )
    np.testing.assert_allclose(validation.scores(head("labels"), outputs), scipy.special.expit(outputs.astype(float)))
    single = outputs[:, :1]
    np.testing.assert_allclose(validation.scores(head("value", mean=40.0, scale=8.0), single), [[48], [680]])
    np.testing.assert_array_equal(validation.scores(head("time"), single), single)


def save(workdir: Path, losses: dict[int, float | None]) -> None:
    saver = saving.Checkpointer(str(workdir), keep=10)
    for step, loss in losses.items():
        metrics = {"loss": 0.1} | ({} if loss is None else {validation.LOSS: loss})
        saver.save(step, {"step": jnp.int32(step)}, checkpoint.Meta({}, 8 * step, metrics=metrics))
    saver.close()


def test_earliest_of_the_smallest_validation_losses_is_chosen(tmp_path: Path) -> None:
    save(tmp_path, {2: 0.7, 4: 0.3, 5: None, 6: 0.3, 8: 0.4})
    assert validation.choose(str(tmp_path)) == (4, 0.3, "")


def test_loss_that_is_not_finite_is_never_chosen(tmp_path: Path) -> None:
    save(tmp_path, {2: float("nan"), 4: 5.0})
    assert validation.choose(str(tmp_path)).step == 4


def test_run_without_a_validation_loss_is_one_line(tmp_path: Path) -> None:
    save(tmp_path, {2: None})
    with pytest.raises(DataError, match="no checkpoint in .* has a validation loss, so that none can be chosen"):
        validation.choose(str(tmp_path))
