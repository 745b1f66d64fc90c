import collections
import hashlib

import numpy as np
import pytest

from data_pipeline.format import records
from data_pipeline.sources.base import ReadError
from data_pipeline.sources.stored_values import (
    Digest,
    Padding,
    below_air,
    extract_bits,
    levels,
    replace_padding,
    stored_sha256,
    to_uint16,
)

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
    # The lowest step at or above -1024 HU.
    bottom = -1024 if whole else intercept + abs(slope) * np.ceil((-1024 - intercept) / abs(slope))
    wanted = np.maximum(real, bottom) if hu and (whole or bottom <= real.max()) else real
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


# ---- bits


@pytest.mark.parametrize(("stored", "high"), [(12, 11), (12, 15), (12, 13), (10, 15), (16, 15)])
@pytest.mark.parametrize("signed", [False, True])
def test_values_are_taken_from_the_bits_that_the_header_names(stored: int, high: int, signed: bool) -> None:
    low = -(1 << stored - 1) if signed else 0
    values = np.random.default_rng(2).integers(low, low + (1 << stored), (20, 30))
    words = ((values % (1 << stored)) << (high + 1 - stored)).astype("<u2").view("<i2" if signed else "<u2")
    np.testing.assert_array_equal(extract_bits(words, stored, high, signed=signed), values)


def test_sign_repeated_in_unused_bits_is_no_contradiction() -> None:
    values = np.array([[-2048, -1], [0, 2047]], "<i2")
    np.testing.assert_array_equal(extract_bits(values, 12, 11, signed=True), values)
    values[0, 0] = 0x0FFE  # some writers repeat it in some pixels alone
    np.testing.assert_array_equal(extract_bits(values, 12, 11, signed=True), [[-2, -1], [0, 2047]])


def test_overlay_in_unused_bits_is_masked_where_the_header_places_one() -> None:
    words = (PIXELS % 4096) | np.where(PIXELS % 3 == 0, 0x4000, 0).astype(np.uint16)
    np.testing.assert_array_equal(extract_bits(words, 12, 11, signed=False, overlays=[14]), PIXELS % 4096)
    for overlays in ((), (13,)):
        with pytest.raises(ReadError, match="bits outside the 12 of BitsStored"):
            extract_bits(words, 12, 11, signed=False, overlays=overlays)


def test_signed_values_beyond_bits_stored_raise_read_error() -> None:
    with pytest.raises(ReadError, match="bits outside the 12 of BitsStored"):
        extract_bits(np.array([[3000, 5000]], "<i2"), 12, 11, signed=True)  # 5000 has 13 bits
    with pytest.raises(ReadError, match="BitsStored 12 and HighBit 16 do not fit 16 allocated bits"):
        extract_bits(np.zeros((2, 2), "<u2"), 12, 16, signed=False)


# ---- levels and padding


@pytest.mark.parametrize("kind", ["u1", "i1", "<i2", ">i2", "u2", "i4", "u4", "i8", "f4"])
def test_levels_are_the_distinct_values_with_their_counts(kind: str) -> None:
    span = (-3.5e38, 3.5e38) if kind == "f4" else (np.iinfo(kind).min, np.iinfo(kind).max)
    for low, high in (span, (max(span[0], -300), min(span[1], 70_000))):
        values = np.random.default_rng(1).integers(0, 9, (30, 20)).astype(kind)
        values[0, 0], values[-1, -1] = max(low, -1e38), min(high, 1e38) if kind == "f4" else high
        wanted = collections.Counter(values.ravel().tolist())
        found = levels(values[:, ::-1])
        assert dict(zip(found.values.tolist(), found.counts.tolist(), strict=True)) == wanted
        assert found.values.tolist() == sorted(wanted)


def padded(value: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored HU + 1024 from 0 to 3000 with padding outside a circle, and where that is."""
    y, x = np.mgrid[:64, :64] - 31.5
    outside = x**2 + y**2 > 31**2
    values = np.random.default_rng(3).integers(0, 3000, (64, 64))
    return np.where(outside, value, values), outside


@pytest.mark.parametrize(("value", "kind"), [(65535, "<u2"), (4095, "<u2"), (2000, "<u2"), (-2000, "<i2")])
def test_padding_of_a_ct_becomes_air(value: int, kind: str) -> None:
    values, outside = padded(value)
    values[30, 30] = max(value, 0) if value < 4096 else 1  # within the body this is tissue or metal
    real = values - 1024
    replaced, count = replace_padding(values.astype(kind), levels(values), Padding(value, value), 1.0, -1024.0, hu=True)
    pixels, slope, intercept, clipped = to_uint16(replaced, 1.0, -1024.0, hu=True)
    np.testing.assert_array_equal(pixels * slope + intercept, np.where(outside, -1024, np.maximum(real, -1024)))
    assert count == np.count_nonzero(outside) and clipped == (records.CLIPPED if value < 0 else 0)


def test_padding_of_an_mr_becomes_the_lowest_value() -> None:
    values, outside = padded(65535)
    replaced, count = replace_padding(values, levels(values), Padding(65535, 65535), 1.0, 0.0, hu=False)
    lowest = values[~outside].min()
    np.testing.assert_array_equal(replaced, np.where(outside, lowest, values))
    assert count == np.count_nonzero(outside)
    values[~outside] += 1
    values[outside] = 0  # as good as background
    replaced, count = replace_padding(values, levels(values), Padding(0, 0), 1.0, 0.0, hu=False)
    assert replaced is values and count == np.count_nonzero(outside)


def test_values_below_air_are_counted_without_padding() -> None:
    values = np.array([[0, 5, 5], [1024, 900, 7]], np.int32)
    assert below_air(levels(values), 1.0, -1030.0) == ((-1030.0, 1), (-1025.0, 2))
    assert below_air(levels(values), 1.0, -1030.0, Padding(0, 0)) == ((-1025.0, 2),)
