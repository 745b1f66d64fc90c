from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline.format import records, shards
from data_pipeline.stages import reformat

# A body that is different along every axis: x to the left, y to the back, z up, mm.
SIDE = {"x": 60.0, "y": 50.0, "z": 40.0}


def value(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Smooth, so that resampling hardly changes it, and without symmetry."""
    return 1000 + 400 * np.sin(x / 13) + 300 * np.cos(y / 11 + 1) + 200 * np.sin(z / 17 + x / 29)


def acquire(orientation: tuple[float, ...], spacing: tuple[float, float, float]) -> np.ndarray:
    """Slices of the body in an acquisition with this orientation, sorted along their normal."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(row, column)
    size = np.array(list(SIDE.values()))
    counts = [round(float(np.abs(v) @ size) / s) for v, s in zip((normal, column, row), spacing, strict=True)]
    k, r, c = np.meshgrid(*(np.arange(n) for n in counts), indexing="ij")
    # The corner of the body from which all three axes lead into it.
    start = sum(np.where(v < 0, -v * size, 0) for v in (normal, column, row))
    points = [
        start[axis] + normal[axis] * (k + 0.5) * spacing[0] + column[axis] * (r + 0.5) * spacing[1] + row[axis] * (c + 0.5) * spacing[2]
        for axis in range(3)
    ]  # fmt: skip
    return np.rint(value(*points)).astype(np.uint16)


AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)


@pytest.mark.parametrize("plane", reformat.PLANES)
@pytest.mark.parametrize(
    ("orientation", "own"),
    [
        (AXIAL, "axial"), (CORONAL, "coronal"), (SAGITTAL, "sagittal"), ((-1, 0, 0, 0, 1, 0), "axial"), ((0, 1, 0, 1, 0, 0), "axial"),
        ((-1, 0, 0, 0, 0, -1), "coronal"),
    ],
)  # fmt: skip
def test_reformat_equals_acquisition_in_that_plane(
    tmp_path: Path, plane: str, orientation: tuple[float, ...], own: str
) -> None:
    spacing = (2.0, 1.0, 1.0)
    with reformat.Stack(tmp_path, spacing, reformat.directions(tuple(map(float, orientation)))) as stack:
        for one in acquire(orientation, spacing):
            stack.add(one)
        found = list(stack.planes((plane,)))
        iso = stack.spacing
    assert iso == pytest.approx(2 ** (1 / 3))
    if plane == own:
        assert found == []
        return
    wanted_orientation = {"axial": AXIAL, "coronal": CORONAL, "sagittal": SAGITTAL}[plane]
    wanted = acquire(wanted_orientation, (iso, iso, iso))
    if plane == "sagittal":
        wanted = wanted[::-1]  # sorted along its normal it goes from left to right
    assert [cut.number for cut in found] == list(range(len(wanted)))
    assert [cut.position for cut in found] == pytest.approx([n * iso for n in range(len(wanted))])
    for cut, one in zip(found, wanted, strict=True):
        # Within 3 % of the range where the kernel sees both sides; edges are repeated.
        assert cut.pixels.shape == one.shape
        inner = np.s_[3:-3, 3:-3]
        assert np.abs(cut.pixels[inner].astype(int) - one[inner]).mean() < 0.03 * 1800


def test_block_size_changes_no_pixel(tmp_path: Path, monkeypatch) -> None:
    volume = acquire(AXIAL, (1.5, 1.0, 1.0))

    def cut() -> list[np.ndarray]:
        with reformat.Stack(tmp_path, (1.5, 1.0, 1.0), reformat.directions(tuple(map(float, AXIAL)))) as stack:
            for one in volume:
                stack.add(one)
            return [found.pixels for found in stack.planes(("coronal", "sagittal"))]

    whole = cut()
    monkeypatch.setattr(reformat, "BLOCK_BYTES", 1)
    for a, b in zip(whole, cut(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert list(tmp_path.iterdir()) == []


def test_shrinking_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), np.uint16)
    stripes[:, ::2] = 2000  # finer than the target can show
    with reformat.Stack(tmp_path, (8.0, 1.0, 1.0), reformat.directions(tuple(map(float, AXIAL)))) as stack:
        for _ in range(8):
            stack.add(stripes)
        (*_, middle) = [cut.pixels for cut in stack.planes(("coronal",))][:16]
    assert np.abs(middle[:, 4:-4].astype(int) - 1000).max() < 60


def test_directions_are_none_for_two_axes_along_one_direction() -> None:
    assert reformat.directions((0.8, 0.6, 0.0, 0.7, -0.6, 0.3)) is None


# ---- in a build


def test_build_reformats_regular_series_only(tmp_path: Path, run_build, run_verify, write_series) -> None:
    rng = np.random.default_rng(0)
    for name, positions in {
        "regular": [2.0 * n for n in range(20)],
        "gap": [2.0 * n for n in range(20) if n != 9],
    }.items():
        for n, z in enumerate(positions):
            write_series(
                tmp_path / "in" / name / f"{n:02d}", positions=[z], PatientID=name, SeriesInstanceUID=f"2.25.{len(name)}", ImagePositionPatient=[0, 0, z],
                PixelSpacing=[1, 1], pixels=rng.integers(0, 1900, (40, 44)),
            )  # fmt: skip
    words = ("--input", tmp_path / "in", "--output", tmp_path / "out", "--validation", 0, "--test", 0)
    result = run_build(*words, "--planes", "coronal,sagittal", "--slices-per-record", 4)
    assert result.code == 0, result.err
    index = pq.read_table(tmp_path / "out" / shards.INDEX).to_pylist()
    planes: dict[str, set[str]] = {}
    for row in index:
        planes.setdefault(row["series"], set()).add(row["plane"])
        assert bool(row["flags"] & records.REFORMATTED) == (row["plane"] != "axial")
    assert sorted(planes.values(), key=len) == [{"axial"}, {"axial", "coronal", "sagittal"}]
    cut = [row for row in index if row["plane"] == "coronal"]
    iso = 2 ** (1 / 3)
    assert {(row["height"], row["width"]) for row in cut} == {(round(40 / iso), round(44 / iso))}
    for name in ("rows", "columns", "slices"):
        assert {round(row[f"spacing_{name}"], 4) for row in cut} == {round(iso, 4)}
    assert [row["index"] for row in cut] == list(range(round(40 / iso)))
    result = run_verify(tmp_path / "out")
    assert result.code == 0, result.out


def test_unknown_plane_is_rejected_in_one_line(tmp_path: Path, run_build, write_series) -> None:
    write_series(tmp_path / "in", 5)
    result = run_build("--input", tmp_path / "in", "--output", tmp_path / "out", "--planes", "coronal,frontal")
    assert result.code == 2 and "--planes names 'frontal'; there are axial, coronal, sagittal" in result.error
