"""Slices without files, for tests: what a subclass's `__getitem__` gives is what batches are made of."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from curia_jax.data import FACTS
from data_pipeline.shards import SliceSource


class FakeSlices(SliceSource):
    """A SliceSource whose slices a subclass makes up, together with `split`, `largest` and the length."""

    def read_into(
        self, numbers: Sequence[int], images: np.ndarray
    ) -> tuple[list[tuple[int, int]], list[dict[str, Any]]]:
        sizes, facts = [], []
        for number, image in zip(numbers, images, strict=True):
            one = self[number]
            height, width = one["pixels"].shape
            image[:] = 0
            image[:height, :width] = one["pixels"]
            sizes.append((height, width))
            facts.append({name: one[name] for name in FACTS})
        return sizes, facts
