"""Stored values of a volume, in memory and in a file."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.sources import voxels
from data_pipeline.sources.base import ReadError

VALUES = np.random.default_rng(0).integers(-900, 900, (3, 4, 5)).astype(">i2")
DATA = b"head" + VALUES.tobytes(order="F")
LAYOUT = voxels.Layout(4, VALUES.shape, VALUES.dtype)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_in_a_file_equal_those_in_memory(tmp_path: Path, monkeypatch, axis: int) -> None:
    (tmp_path / "v").write_bytes(DATA)
    with (tmp_path / "v").open("rb") as file:
        memory = voxels.stored_in(file, LAYOUT)
        monkeypatch.setattr(voxels, "IN_MEMORY_BYTES", 0)
        on_disk = voxels.stored_in(file, LAYOUT)
        assert type(memory) is not type(on_disk)
        for first, last in ((0, 1), (1, 3), (0, VALUES.shape[axis])):
            wanted = np.take(VALUES, range(first, last), axis)
            for stored in (memory, on_disk):
                np.testing.assert_array_equal(stored.planes(axis, first, last), wanted)


def test_planes_are_read_in_portions_of_a_size(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "v").write_bytes(DATA)
    monkeypatch.setattr(voxels, "SLAB_BYTES", 2 * 3 * 4 * 2)  # two planes of 3 x 4 values of two bytes
    monkeypatch.setattr(voxels, "BLOCK_BYTES", 3 * 4 * 5 * 2)  # three planes of 4 x 5 values
    with (tmp_path / "v").open("rb") as file:
        assert [voxels.File(file, *LAYOUT).planes_at_once(axis) for axis in (0, 2)] == [3, 2]
        monkeypatch.setattr(voxels, "SLAB_BYTES", 1)
        assert voxels.File(file, *LAYOUT).planes_at_once(2) == voxels.Array(VALUES).planes_at_once(2) == 1


def test_file_that_is_cut_off_is_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "v").write_bytes(DATA[:-1])
    with (tmp_path / "v").open("rb") as file:
        with pytest.raises(ReadError, match="damaged volume: it is cut off"):
            voxels.stored_in(file, LAYOUT)
        monkeypatch.setattr(voxels, "IN_MEMORY_BYTES", 0)
        stored = voxels.stored_in(file, LAYOUT)
        np.testing.assert_array_equal(stored.planes(2, 0, 4), VALUES[:, :, :4])
        with pytest.raises(ReadError, match="damaged volume: it is cut off"):
            stored.planes(2, 4, 5)


def pieces(data: bytes, size: int = 7) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.parametrize("in_memory", [10**6, 0])
def test_unpacked_values_are_those_after_the_head(tmp_path: Path, monkeypatch, in_memory: int) -> None:
    monkeypatch.setattr(voxels, "IN_MEMORY_BYTES", in_memory)
    monkeypatch.setattr(voxels, "TAIL_BYTES", 30)
    with contextlib.ExitStack() as stack:
        stored = voxels.unpacked(pieces(DATA + bytes(20)), LAYOUT, str(tmp_path), stack)
        np.testing.assert_array_equal(stored.planes(2, 0, 5), VALUES)
        with pytest.raises(ReadError, match="damaged volume: it is cut off"):
            voxels.unpacked(pieces(DATA[:-1]), LAYOUT, str(tmp_path), stack)
        with pytest.raises(ReadError, match="damaged volume: it unpacks to more than its header states"):
            voxels.unpacked(pieces(DATA + bytes(50)), LAYOUT, str(tmp_path), stack)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((3, 4, 5), (3, 4, 5)), ((3, 4), (3, 4, 1)), ((3, 4, 5, 1), (3, 4, 5)), ((3, 1, 4, 5), (3, 4, 5))],
)
def test_shape_has_three_axes(shape: tuple[int, ...], wanted: tuple[int, int, int]) -> None:
    assert voxels.check_shape(shape, np.dtype(np.int16)) == wanted


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((3,), "i2", "1 dimensions; slices come from volumes of 2 or 3"),
        ((3, 4, 5, 2), "i2", "4 dimensions; slices come from volumes of 2 or 3"),
        ((3, 0, 5), "i2", "a side of less than one voxel"),
        ((3, 4, 5), "c8", "complex or colour values"),
        ((3, 4, 5), [("r", "u1"), ("g", "u1"), ("b", "u1")], "complex or colour values"),
    ],
)
def test_shape_or_type_of_no_volume_is_refused(shape: tuple[int, ...], dtype: object, message: str) -> None:
    with pytest.raises(ReadError, match=message):
        voxels.check_shape(shape, np.dtype(dtype))


def test_size_that_no_compression_reaches_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(bytes(100))
    voxels.check_size(100_000, str(tmp_path / "v"))
    with pytest.raises(ReadError, match="its header states 200,000 bytes, which the file cannot hold"):
        voxels.check_size(200_000, str(tmp_path / "v"))


def test_affine_of_less_than_a_volume_is_singular() -> None:
    tilted = np.diag([0.5, 0.5, 3.0, 1.0])
    tilted[0, 2] = 0.2
    flat, infinite = tilted.copy(), tilted.copy()
    flat[:3, 2] = flat[:3, 1]
    infinite[0, 3] = np.inf
    assert [voxels.is_singular(affine) for affine in (tilted, flat, infinite)] == [False, True, True]


def test_survey_is_that_of_scaled_values(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "v").write_bytes(DATA)
    with (tmp_path / "v").open("rb") as file:
        memory = voxels.survey(voxels.stored_in(file, LAYOUT), (2.0, -10.0))
        monkeypatch.setattr(voxels, "IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(voxels, "SLAB_BYTES", 1)
        on_disk = voxels.survey(voxels.stored_in(file, LAYOUT), (2.0, -10.0))
    for found in (memory, on_disk):
        assert (found.low, found.high, found.integers) == (VALUES.min() * 2 - 10, VALUES.max() * 2 - 10, True)


def test_scratch_file_of_unpacked_values_has_no_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(voxels, "IN_MEMORY_BYTES", 0)
    with contextlib.ExitStack() as stack:
        voxels.unpacked(iter([io.BytesIO(DATA).read()]), LAYOUT, str(tmp_path), stack)
        assert list(tmp_path.iterdir()) == []
