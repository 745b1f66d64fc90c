"""The comparison with published runs: their rates, and the program it is made with."""

from collections.abc import Iterator

import jax
import pytest

from benchmarks import plan_check
from curia_jax import sharding
from curia_jax.models import vit


@pytest.fixture
def mesh() -> Iterator[jax.sharding.Mesh]:
    yield sharding.make_mesh(data=1, devices=jax.devices()[:1])


def test_published_rates_follow_from_images_epochs_and_hours() -> None:
    # README of deit3-jax: 90 epochs of ImageNet-21k in 12 h 12 min and 37 h 13 min on 32 chips.
    assert plan_check.published_rate("B") == pytest.approx(842, abs=1)
    assert plan_check.published_rate("L") == pytest.approx(276, abs=1)


def test_own_step_has_the_parameters_of_a_deit_classifier(mesh: jax.sharding.Mesh) -> None:
    step = plan_check.own_step("B", mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(step.state["params"]))
    width, depth = vit.SIZES["B"][0], vit.SIZES["B"][1]
    encoder = 12 * width**2 + 13 * width  # matmuls and biases of a block, and its two norms
    layer_scale = 2 * width
    embed = 16 * 16 * 3 * width + width
    head = width * plan_check.CLASSES + plan_check.CLASSES
    known = depth * (encoder + layer_scale) + embed + head
    # CLS, the final norm and positions are what is left.
    assert 0 <= parameters - known < 300 * width
    assert step.images[0] == plan_check.BATCH


def test_unknown_size_is_refused_before_anything_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_check.main(["--size=H"]) == 2
    assert "invalid choice: 'H'" in capsys.readouterr().err
