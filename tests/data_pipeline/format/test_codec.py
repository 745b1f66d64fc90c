import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_pipeline.format import codec

RANDOM = np.random.default_rng(0)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)),
    st.sampled_from([codec.RAW, codec.DELTA]),
)
def test_round_trips_are_exact(pixels: np.ndarray, kind: int) -> None:
    back = codec.decode(codec.encode(pixels, kind))
    assert back.dtype == np.uint16
    np.testing.assert_array_equal(back, pixels)
    back[:] = 7  # the caller owns it


@pytest.mark.parametrize(
    "pixels",
    [
        RANDOM.integers(0, 65536, (513, 511)).astype(np.uint16),
        np.zeros((1, 1), np.uint16),
        np.full((300, 1), 65535, np.uint16),
        np.tile(np.array([0, 65535], np.uint16), (64, 32)),
        np.arange(65536, dtype=np.uint16).reshape(256, 256),
        np.ascontiguousarray(RANDOM.integers(0, 4096, (64, 96)).astype(np.uint16))[::2, ::-3],
    ],
    ids=["noise of odd size", "one pixel", "a column of the highest value", "extremes", "every value", "strided"],
)
def test_exact_on_hard_slices(pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(codec.decode(codec.encode(pixels)), pixels)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.sampled_from([codec.RAW, codec.DELTA])), max_size=30)
)
def test_decode_into_fills_top_left_of_images(kinds: list[tuple[int, int, int]]) -> None:
    """Those that follow each other in one size and codec are decoded together, the others not: the pixels are the same."""
    slices = [RANDOM.integers(0, 65536, (height, width)).astype(np.uint16) for height, width, _ in kinds]
    images = np.full((len(kinds), 40, 30), 9, np.uint16)
    items = [codec.encode(one, kind) for one, (_, _, kind) in zip(slices, kinds, strict=True)]
    assert codec.decode_into(iter(items), images) == [one.shape for one in slices]
    for image, one in zip(images, slices, strict=True):
        wanted = np.zeros((40, 30), np.uint16)
        wanted[: one.shape[0], : one.shape[1]] = one
        np.testing.assert_array_equal(image, wanted)


@pytest.mark.parametrize("side", [33, 1500])
def test_decode_into_equals_decode_for_equal_sizes(side: int) -> None:
    slices = RANDOM.integers(0, 65536, (21, side, 33)).astype(np.uint16)
    images = np.empty_like(slices)
    codec.decode_into([codec.encode(one) for one in slices], images)
    np.testing.assert_array_equal(images, slices)


def test_slice_larger_than_its_image_is_rejected() -> None:
    with pytest.raises(ValueError, match="a slice of 4x6 px does not fit into 8x5"):
        codec.decode_into([codec.encode(np.zeros((4, 6), np.uint16))], np.empty((1, 8, 5), np.uint16))


def test_smooth_slices_shrink() -> None:
    y, x = np.mgrid[:256, :256]
    pixels = (1000 + 300 * np.sin(x / 20) + 200 * np.cos(y / 15) + RANDOM.normal(0, 5, (256, 256))).astype(np.uint16)
    assert len(codec.encode(pixels)) < 0.5 * pixels.nbytes


def test_encoding_is_deterministic() -> None:
    pixels = RANDOM.integers(0, 4096, (60, 50)).astype(np.uint16)
    assert codec.encode(pixels) == codec.encode(pixels.copy())
    assert codec.encode(pixels) == codec.encode(np.asfortranarray(pixels))


@pytest.mark.parametrize("kind", [codec.RAW, codec.DELTA])
def test_truncated_or_oversized_bytes_are_rejected(kind: int) -> None:
    data = codec.encode(RANDOM.integers(0, 4096, (40, 33)).astype(np.uint16), kind)
    for length in (0, 3, 5, 8, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError):
            codec.decode(data[:length])
    with pytest.raises(ValueError):
        codec.decode(data + b"\0")
    # A smaller size once made blosc2 write past the end of the array; a larger one left its end undefined.
    for height, width in ((20, 33), (40, 34), (80, 33), (0, 33), (65535, 65535)):
        with pytest.raises(ValueError):
            codec.decode(struct.pack("<BHH", kind, height, width) + data[5:])
    with pytest.raises(ValueError, match="unknown codec 9"):
        codec.decode(b"\x09" + data[1:])


def test_invalid_slices_and_codecs_are_rejected() -> None:
    with pytest.raises(ValueError, match="unknown codec 9"):
        codec.encode(np.zeros((4, 4), np.uint16), 9)
    with pytest.raises(ValueError, match="sides go from 1 to 65535"):
        codec.encode(np.zeros((0, 4), np.uint16))
