"""Slices without files, for tests: what a subclass's `__getitem__` gives is what batches are made of."""

from collections.abc import Sequence

import numpy as np

from data_pipeline.format.records import SliceFacts
from data_pipeline.format.shards import SliceSource


class FakeSlices(SliceSource):
    """A SliceSource whose slices a subclass makes up, together with `split`, `largest` and the length."""

    def read_into(self, numbers: Sequence[int], images: np.ndarray) -> tuple[list[tuple[int, int]], list[SliceFacts]]:
        sizes, facts = [], []
        for number, image in zip(numbers, images, strict=True):
            one = self[number]
            height, width = one.pixels.shape
            image[:] = 0
            image[:height, :width] = one.pixels
            sizes.append((height, width))
            facts.append(one.facts)
        return sizes, facts
