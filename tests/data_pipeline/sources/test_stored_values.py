import hashlib

import numpy as np
import pytest

from data_pipeline.format import records
from data_pipeline.sources.base import ReadError
from data_pipeline.sources.stored_values import stored_sha256, to_uint16

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


def test_digest_of_frames_equals_sha256_of_little_endian_int64() -> None:
    values = np.stack([PIXELS, PIXELS + 1])
    whole = hashlib.sha256(values.astype("<i8").tobytes()).hexdigest()[:16]
    assert stored_sha256(values) == whole == stored_sha256(np.asfortranarray(values))
