"""Slices without files, for tests: what a subclass's `__getitem__` returns is what batches are made of."""

import numpy as np
import pyarrow as pa

from data_pipeline.format import codec
from data_pipeline.format.records import DecodedSlice, SliceFacts
from data_pipeline.format.shards import SliceSource


def decoded(
    pixels: np.ndarray, facts: SliceFacts, modality: str = "CT", plane: str = "axial", body_part: str = ""
) -> DecodedSlice:
    """A slice that says nothing else of itself."""
    return DecodedSlice(
        pixels=pixels, facts=facts, mean=0.0, std=1.0, body_box=(0, 0, *pixels.shape), spacing=(1.0, 1.0, 1.0),
        modality=modality, plane=plane, body_part=body_part, series="s", patient="p",
    )  # fmt: skip


class FakeSlices(SliceSource):
    """A SliceSource whose slices a subclass makes up, together with `split`, `largest` and the length."""

    @property
    def index(self) -> pa.Table:
        """What features take from the index."""
        spacing = np.ones(len(self))
        return pa.table({"spacing_rows": 2 * spacing, "spacing_columns": spacing})

    def encoded(self, number: int) -> tuple[bytes, SliceFacts]:
        one = self[number]
        return codec.encode(one.pixels), one.facts


def decoded_slice(pixels: np.ndarray, facts: SliceFacts, *, modality: str = "CT", plane: str = "axial") -> DecodedSlice:
    """A slice with these pixels and facts; the rest of its record is of no interest."""
    return DecodedSlice(
        pixels=pixels, facts=facts, mean=0.0, std=1.0, body_box=(0, 0, *pixels.shape), spacing=(1.0, 1.0, 1.0),
        modality=modality, plane=plane, body_part="", series="", patient="",
    )  # fmt: skip
