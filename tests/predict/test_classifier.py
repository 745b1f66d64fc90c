"""A fine-tuned model on slices: bags that are not full, devices, and what it is loaded from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_common.errors import DataError, UserError
from curia_jax import augment, data
from curia_jax.evaluate.preparation import default_settings
from curia_jax.models import head, vit
from curia_jax.models.head import HeadConfig
from curia_jax.predict import classifier
from tests.convert import fine_tuned
from tests.evaluate.test_features import Slices

SOURCE = Slices(8)
CANVAS = (128, 128)


def load(config: HeadConfig, slices: int = 1) -> classifier.Classifier:
    return classifier.load(str(fine_tuned.run(config, slices=slices)), otherwise=default_settings())


def tokens_of(model: classifier.Classifier) -> np.ndarray:
    """Tokens of the slices of SOURCE."""
    (batch,) = data.evaluation_batches(SOURCE, np.arange(8), batch_size=8, canvas=CANVAS)
    on_device = {name: jnp.asarray(batch[name]) for name in data.DEVICE_FIELDS}
    images = augment.evaluation_view(on_device, model.settings, model.config.image_size)
    return np.asarray(jax.jit(vit.bind(model.config, model.params["encoder"]))(images))


@pytest.mark.parametrize("kind", head.KINDS)
def test_bag_that_is_not_full_is_scored_as_it_is(kind: str) -> None:
    model = load(HeadConfig(kind, "mean", "labels", ("bleed", "fracture")), slices=3)
    cases = [np.array([0, 5, 2]), np.array([7]), np.array([1, 3])]
    found = model.scores(SOURCE, cases, together=2, canvas=CANVAS)
    tokens = tokens_of(model)
    bound = head.bind(model.head, model.config.width, model.params["head"])
    for number, case in enumerate(cases):
        alone = bound(jnp.asarray(tokens[case][None]), jnp.ones((1, len(case)), bool))
        np.testing.assert_allclose(found.outputs[number], jax.nn.sigmoid(alone.outputs[0]), atol=1e-5)
        by_slice = found.by_slice[number]
        assert np.isneginf(by_slice[len(case) :]).all()
        if kind == "attentive":
            np.testing.assert_allclose(by_slice[: len(case), 0], alone.attention[0], atol=1e-5)
        else:
            each = bound(jnp.asarray(tokens[case][:, None]), jnp.ones((len(case), 1), bool)).outputs
            np.testing.assert_allclose(by_slice[: len(case)], jax.nn.sigmoid(each), atol=1e-5)


def test_scores_do_not_depend_on_how_many_cases_are_together() -> None:
    model = load(fine_tuned.CLASSES)
    cases = [np.array([number]) for number in range(8)]
    few, many = (model.scores(SOURCE, cases, together=count, canvas=CANVAS) for count in (1, 64))
    np.testing.assert_allclose(few.outputs, many.outputs, atol=1e-6)
    np.testing.assert_allclose(few.outputs.sum(axis=1), 1, atol=1e-6)


def test_canvas_is_a_multiple_that_slices_fit_into() -> None:
    source = Slices(1)
    source.largest = (129, 512)
    assert classifier.canvas_of(source) == (256, 512)


def test_weights_that_are_not_there_are_named(tmp_path) -> None:
    with pytest.raises((UserError, DataError), match="missing"):
        classifier.load(str(tmp_path / "missing"), otherwise=default_settings())
