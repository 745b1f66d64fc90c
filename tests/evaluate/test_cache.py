"""Features on disk: nothing is computed twice, and nothing stale or damaged is used."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from curia_jax.evaluate import cache
from curia_jax.evaluate.cache import FeatureStore
from curia_jax.evaluate.results import Provenance


@dataclasses.dataclass
class CountingBackbone:  # keeps the protocol features.Backbone
    """Features that are the image number; counts the images it has computed."""

    name: str = "run"
    digest: str = "0123"
    devices: int = 1
    computed: int = 0
    provenance: Provenance = Provenance("0123", "{}")

    def features(self, batch):
        self.computed += int(batch["valid"].sum())
        return {"mean": np.stack([batch["slice"], -batch["slice"]], axis=1).astype(np.float32)}

    def tokens(self, batch, *, before_norm):
        raise NotImplementedError  # nothing here asks for them


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Images that are their numbers; `stop` interrupts the reading at an image."""

    split: str = "test"
    fingerprint: str = "f" * 64
    stop: int | None = None

    def batches(self, numbers: np.ndarray, batch_size: int) -> Iterator[Any]:
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            if self.stop is not None and self.stop in part:
                raise KeyboardInterrupt
            valid = np.arange(batch_size) < len(part)
            yield {"slice": np.pad(part, (0, batch_size - len(part)), mode="edge"), "valid": valid}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(cache, "PART", 8)


def store(folder, backbone, **changes) -> FeatureStore:
    return FeatureStore(folder, backbone, Numbers(**changes), batch_size=4)


def test_features_are_in_requested_order_and_computed_once(tmp_path) -> None:
    backbone = CountingBackbone()
    found = store(tmp_path, backbone).get(np.array([3, 1, 7, 20]))
    np.testing.assert_array_equal(found["mean"][:, 0], [3, 1, 7, 20])
    again = store(tmp_path, backbone)
    np.testing.assert_array_equal(again.get(np.array([20, 3]))["mean"][:, 0], [20, 3])
    assert backbone.computed == 4 and len(again.missing(np.array([1, 2, 3]))) == 1
    # Of more images only the new ones are computed.
    np.testing.assert_array_equal(again.get(np.arange(21))["mean"][:, 1], -np.arange(21))
    assert backbone.computed == 21


def test_interrupted_extraction_resumes_where_it_stopped(tmp_path) -> None:
    backbone = CountingBackbone()
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, backbone, stop=18).get(np.arange(24))
    done, backbone.computed = backbone.computed, 0
    np.testing.assert_array_equal(store(tmp_path, backbone).get(np.arange(24))["mean"][:, 0], np.arange(24))
    assert done >= 12 and backbone.computed == 16  # one whole part of 8 was kept


@pytest.mark.parametrize(
    "change", [{"digest": "4567"}, {"fingerprint": "e" * 64}, {"split": "train"}], ids=["weights", "pixels", "split"]
)
def test_other_weights_and_other_images_are_computed_anew(tmp_path, change: dict) -> None:
    backbone = CountingBackbone()
    store(tmp_path, backbone).get(np.arange(4))
    other = dataclasses.replace(backbone, computed=0, **{k: v for k, v in change.items() if k == "digest"})
    store(tmp_path, other, **{k: v for k, v in change.items() if k != "digest"}).get(np.arange(4))
    assert other.computed == 4


@pytest.mark.parametrize("length", [0, 100, -30])
def test_damaged_part_is_named_and_computed_again(tmp_path, caplog, length: int) -> None:
    backbone = CountingBackbone()
    first = store(tmp_path, backbone)
    first.get(np.arange(4))
    (part,) = first.path.iterdir()
    part.write_bytes(part.read_bytes()[:length])
    np.testing.assert_array_equal(store(tmp_path, backbone).get(np.arange(4))["mean"][:, 0], np.arange(4))
    assert backbone.computed == 8 and f"{part} is damaged" in caplog.text
