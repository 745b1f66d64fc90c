import hashlib

import numpy as np
import pytest

from data_pipeline.format import records
from data_pipeline.sources.base import ReadError
from data_pipeline.sources.stored_values import Digest, stored_sha256, to_uint16

PIXELS = np.random.default_rng(0).integers(0, 4096, (34, 38)).astype(np.uint16)


@pytest.mark.parametrize("kind", ["u1", "i1", "<i2", ">i2", "u2", "i4", "i8"])
@pytest.mark.parametrize("slope", [1.0, -1.0, 2.0, 0.5])
@pytest.mark.parametrize("intercept", [0.0, -1024.0, -1000.0, 100.0, -40_000.0, 0.25])
@pytest.mark.parametrize("hu", [True, False])
def test_to_uint16_equals_plain_arithmetic(kind: str, slope: float, intercept: float, hu: bool) -> None:
    span = np.iinfo(kind)
    low, high = max(-3000, span.min), min(5000, span.max)
    values = np.random.default_rng(1).integers(low, high, (9, 11), endpoint=True).astype(kind)
    values[0, :2] = low, high
    pixels, s, i, clipped = to_uint16(values, slope, intercept, hu=hu)
    real = values.astype(np.float64) * slope + intercept
    whole = float(slope).is_integer() and float(intercept).is_integer()
    wanted = np.maximum(real, -1024) if hu and whole else real
    np.testing.assert_array_equal(pixels.astype(np.float64) * s + i, wanted)
    assert pixels.dtype == np.uint16 and s > 0
    assert clipped == (records.CLIPPED if (wanted != real).any() else 0)
    assert (s, i) == (1.0, -1024.0) if hu and whole else s == abs(slope)


def test_to_uint16_rejects_values_beyond_16_bits() -> None:
    wide = np.array([[0, 70_000]] * 2)
    with pytest.raises(ReadError, match="70,001 steps; a slice holds 65,536"):
        to_uint16(wide, 1.0, 0.0, hu=False)
    pixels, _, intercept, _ = to_uint16(wide // 2 - 30_000, 1.0, 0.0, hu=False)
    np.testing.assert_array_equal(pixels + intercept, wide // 2 - 30_000)


def sha256(values: np.ndarray, kind: str) -> str:
    return hashlib.sha256(values.astype(kind).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [
        (0, 65_535, "<u2"), (0, 255, "<u2"), (5, 32_768, "<u2"), (-1, 32_767, "<i2"), (-32_768, -1, "<i2"), (-1, 32_768, "<i4"),
        (0, 65_536, "<i4"), (-32_769, 0, "<i4"), (-(2**31), 2**31 - 1, "<i4"), (0, 2**31, "<i8"), (-(2**31) - 1, 0, "<i8"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_digest_takes_smallest_type_that_holds_all_frames(low: int, high: int, kind: str, first: bool) -> None:
    # The frame that decides comes first or last.
    small = np.arange(100).reshape(10, 10) % 7
    wide = np.linspace(low, high, 100).astype(np.int64).reshape(10, 10)
    wide[0, 0], wide[-1, -1] = low, high
    frames = np.stack([wide, small] if first else [small, wide])
    wanted = sha256(frames, kind)
    narrow = next(one for one in ("u1", "i1", "u2", "i2", "i4", "i8") if (frames.astype(one) == frames).all())
    for dtype in (narrow, "i8", ">i8"):
        assert stored_sha256(frames.astype(dtype)) == wanted == stored_sha256(np.asfortranarray(frames.astype(dtype)))
    assert stored_sha256(frames, "int64") == sha256(frames, "<i8")
    digest = Digest()
    # Each frame alone has a type of its own.
    assert digest.add(wide.astype("i8"), also_alone=True) == sha256(wide, kind)
    assert digest.add(small.astype("u1"), also_alone=True) == sha256(small, "<u2")


def test_digest_takes_narrow_frames_after_wide_ones_that_fit() -> None:
    # A second decoder may give wider integers for the same file.
    digest = Digest()
    digest.add(np.full((2, 2), 65_535, np.uint16))
    digest.add(np.full((2, 2), 7, np.int32))
    assert digest.hex() == sha256(np.array([65_535] * 4 + [7] * 4), "<u2")
    digest.add(np.full((2, 2), 65_536, np.int32))
    with pytest.raises(ReadError, match="values of 16 and of 32 bits"):
        digest.hex()
