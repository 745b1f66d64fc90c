"""Tokens on disk: computed once, resumed where they were, equal to the encoder's."""

import numpy as np
import pytest

from curia_jax.evaluate import backbones, cache, features, token_store
from curia_jax.evaluate.picture_store import PictureStore, open_store
from curia_jax.evaluate.pictures import TaskPictures
from curia_jax.evaluate.token_store import TokenStore
from tests.evaluate import published
from tests.evaluate.test_command import save_checkpoint
from tests.evaluate.test_task_data import MASKED, opened


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[backbones.JaxBackbone]:
    run = tmp_path_factory.mktemp("tokens") / "run"
    save_checkpoint(run)
    readouts = [features.Readout(("mean",))]
    return backbones.open_backbones([str(run)], ["histogram"], readouts=readouts)


@pytest.fixture
def images(tmp_path) -> PictureStore:
    files = opened(tmp_path / "data", MASKED, published.task(masked=True))
    return open_store(TaskPictures(MASKED, files, "train"), tmp_path / "decoded")


def test_mean_of_the_tokens_inside_is_the_pooled_feature(models, images, tmp_path) -> None:
    store = TokenStore(tmp_path / "cache", models[0], images, batch_size=10)
    found = store.get(images.numbers)
    assert found.values.shape == (24, 4, 16) and found.values.dtype == np.float32
    assert 0 < found.inside.sum() < found.inside.size
    pooled = cache.FeatureStore(tmp_path / "cache", models[0], images).get(images.numbers)["mean"]
    mean = (found.values * found.inside[:, :, None]).sum(axis=1) / found.inside.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(mean, pooled, atol=1e-5)
    halves = TokenStore(tmp_path / "cache", models[0], images, kind="float16", batch_size=10).get(images.numbers)
    np.testing.assert_allclose(halves.values, found.values, atol=5e-3)
    before = TokenStore(tmp_path / "cache", models[0], images, before_norm=True).get(images.numbers)
    assert np.abs(before.values - found.values).max() > 0.1


def test_slice_without_patches_is_one_token(models, images, tmp_path) -> None:
    found = TokenStore(tmp_path, models[1], images).get(images.numbers)
    pooled = cache.FeatureStore(tmp_path, models[1], images).get(images.numbers)["64 bins"]
    np.testing.assert_allclose(found.values[:, 0], pooled, atol=1e-6)
    assert found.inside.all() and found.values.shape == (24, 1, 64)


def test_stopped_store_resumes_where_it_stopped(models, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(token_store, "PART", 8)
    store = TokenStore(tmp_path, models[0], images, batch_size=4)

    def stop(count: int) -> None:
        if store.done(images.numbers) >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get(images.numbers, stop)
    assert 0 < store.done(images.numbers) < 24
    computed: list[int] = []
    found = store.get(images.numbers, computed.append)
    assert sum(computed) == 24 - 8
    again: list[int] = []
    store.get(images.numbers, again.append)
    assert again == []
    wanted = TokenStore(tmp_path / "other", models[0], images, batch_size=4).get(images.numbers)
    np.testing.assert_array_equal(found.values, wanted.values)
    np.testing.assert_array_equal(found.inside, wanted.inside)


def test_damaged_store_is_named_and_computed_again(models, images, tmp_path, caplog) -> None:
    store = TokenStore(tmp_path, models[0], images)
    first = np.array(store.get(images.numbers).values)
    (store.path / "state.json").write_text("{")
    np.testing.assert_array_equal(store.get(images.numbers).values, first)
    assert f"{store.path} is damaged" in caplog.text
