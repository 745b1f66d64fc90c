import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from data_pipeline.format import records
from data_pipeline.sources import nrrd_metaimage, volumes, voxels
from data_pipeline.sources.base import ReadError, ReadRequest

# An asymmetric volume in axes right, front, up: every voxel knows where it is.
SHAPE = (6, 7, 4)
TRUTH = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16) * 3 - 100
SPACING = (1.0, 1.5, 4.0)


def write_nifti(path: Path, axes: str, values: np.ndarray = TRUTH, spacing=SPACING) -> str:
    """Stores the same volume with other array axes; the affine says which way they run."""
    image = nibabel.Nifti1Image(values, np.diag([*spacing, 1.0]))
    start, end = nibabel.io_orientation(np.eye(4)), nibabel.orientations.axcodes2ornt(axes)
    image.as_reoriented(nibabel.orientations.ornt_transform(start, end)).to_filename(path)
    return str(path)


def read(path: object) -> tuple[volumes.Volume, np.ndarray]:
    with volumes.open_volume(str(path)) as volume:
        return volume, np.stack(list(volume.slices()))


def axial(values: np.ndarray) -> np.ndarray:
    """What a viewer shows: slices from the feet up, the front above, the patient's right on the left of the picture."""
    return np.stack([values[::-1, ::-1, z].T for z in range(values.shape[2])])


# The rows of an axial slice run from front to back and its columns from the patient's right: in axes right, front, up the
# first pixel is the last voxel of both axes.
def test_axial_helper_shows_the_right_on_the_left() -> None:
    picture = axial(TRUTH)[0]
    assert picture[0, 0] == TRUTH[-1, -1, 0]
    assert picture.shape == (SHAPE[1], SHAPE[0])


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "RPI", "SRA", "PSR", "AIL", "ILP"])
def test_slices_do_not_depend_on_the_stored_axis_order(tmp_path: Path, axes: str) -> None:
    volume, values = read(write_nifti(tmp_path / "v.nii.gz", axes))
    np.testing.assert_array_equal(values, axial(TRUTH))
    assert volume.plane == "axial"
    assert volume.spacing == pytest.approx((1.5, 1.0, 4.0))
    assert not volume.excluded


def read_whole(*unused: object) -> None:
    raise AssertionError("a volume that should be read in pieces is in memory")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("axes", ["RAS", "LPI", "SRA", "PSR", "ILP"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 4.0), (4.0, 1.0, 1.0), (1.0, 4.0, 1.0)])
def test_nifti_read_in_pieces_equals_read_whole(tmp_path: Path, monkeypatch, suffix: str, axes: str, spacing) -> None:
    values = TRUTH.astype(np.float32) / 3
    values[3, 2, 1] = np.nan
    for name, one in (("whole", TRUTH), ("real", values)):
        path = write_nifti(tmp_path / f"{name}{suffix}", axes, one, spacing)
        monkeypatch.undo()
        volume, wanted = read(path)
        monkeypatch.setattr(voxels, "IN_MEMORY_BYTES", 0)
        monkeypatch.setattr(voxels, "SLAB_BYTES", 100)
        monkeypatch.setattr(voxels, "BLOCK_BYTES", 250)
        monkeypatch.setattr(voxels, "Array", read_whole)
        with volumes.open_volume(path, str(tmp_path)) as again:
            found = list(again.slices())
        np.testing.assert_array_equal(found, wanted)
        assert (again.spacing, again.plane, again.survey.low, again.survey.high, again.survey.integers, again.excluded) == (
            volume.spacing, volume.plane, volume.survey.low, volume.survey.high, volume.survey.integers, volume.excluded,
        )  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"real{suffix}", f"whole{suffix}"]
    Path(path).write_bytes(Path(path).read_bytes()[:-20])
    with pytest.raises(ReadError, match="damaged volume"):
        read(path)


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32, np.float64])
def test_nrrd_and_metaimage_read_in_pieces_equal_read_whole(
    tmp_path: Path, monkeypatch, suffix, compress, kind
) -> None:
    image = SimpleITK.GetImageFromArray((TRUTH.transpose(2, 1, 0) / 2).astype(kind))
    image.SetSpacing((1.0, 4.0, 1.0))
    image.SetDirection([0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    path = tmp_path / f"v{suffix}"
    SimpleITK.WriteImage(image, str(path), useCompression=compress)
    volume, wanted = read(path)
    monkeypatch.setattr(voxels, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(voxels, "SLAB_BYTES", 100)
    monkeypatch.setattr(voxels, "Array", read_whole)
    with volumes.open_volume(str(path), str(tmp_path)) as again:
        np.testing.assert_array_equal(list(again.slices()), wanted)
        assert (again.plane, again.spacing, again.survey.low) == (volume.plane, volume.spacing, volume.survey.low)
        monkeypatch.setattr(voxels, "SLAB_BYTES", 1)
        with volumes.open_volume(str(path), str(tmp_path)) as again:
            assert again.survey.high == volume.survey.high
    data = max(tmp_path.iterdir(), key=lambda one: one.stat().st_size)
    data.write_bytes(data.read_bytes()[:-30])
    with pytest.raises(ReadError, match="damaged volume"):
        read(path)


def test_unusual_layouts_are_read_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(voxels, "IN_MEMORY_BYTES", 0)
    (tmp_path / "v.raw").write_bytes(bytes(5) + TRUTH.astype(">i2").transpose(2, 1, 0).tobytes())
    head = "NRRD0004\ntype: short\ndimension: 3\nsizes: 6 7 4\nendian: big\nencoding: raw\ndata file: v.raw\n"
    for skip in ("byte skip: 5\n", "byteskip: -1\n"):
        (tmp_path / "v.nhdr").write_text(head + skip)
        assert read(tmp_path / "v.nhdr")[1].sum() == TRUTH.sum()
    (tmp_path / "v.raw").write_bytes((tmp_path / "v.raw").read_bytes()[5:])
    (tmp_path / "v.nhdr").write_text(head)
    with monkeypatch.context() as patch:
        patch.setattr(voxels, "Array", read_whole)
        assert read(tmp_path / "v.nhdr")[1].sum() == TRUTH.sum()
    text = "NRRD0004\ntype: short\ndimension: 3\nsizes: 6 7 4\nencoding: text\n\n"
    (tmp_path / "t.nrrd").write_text(text + " ".join(map(str, TRUTH.ravel(order="F"))))
    assert read(tmp_path / "t.nrrd")[1].sum() == TRUTH.sum()


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd", ".nii"])
@pytest.mark.parametrize(
    "direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (-1, 0, 0, 0, -1, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0, 0, 1, 0)]
)
def test_itk_formats_agree_with_nifti(tmp_path: Path, suffix: str, direction: tuple[int, ...]) -> None:
    image = SimpleITK.GetImageFromArray(TRUTH.transpose(2, 1, 0))
    image.SetSpacing(SPACING)
    image.SetDirection([float(v) for v in direction])
    SimpleITK.WriteImage(image, str(tmp_path / f"v{suffix}"))
    SimpleITK.WriteImage(image, str(tmp_path / "same.nii.gz"))
    (volume, values), (same, expected) = (read(tmp_path / name) for name in (f"v{suffix}", "same.nii.gz"))
    np.testing.assert_array_equal(values, expected)
    assert (volume.plane, volume.spacing) == (same.plane, pytest.approx(same.spacing))


def test_itk_axes_point_left_and_back(tmp_path: Path) -> None:
    # The identity direction of ITK is an axial DICOM series: columns run to the patient's left, rows to the back.
    image = SimpleITK.GetImageFromArray(TRUTH.transpose(2, 1, 0))
    image.SetSpacing(SPACING)
    SimpleITK.WriteImage(image, str(tmp_path / "v.mha"))
    np.testing.assert_array_equal(read(tmp_path / "v.mha")[1], TRUTH.transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("spacing", "plane", "through"),
    [((4.0, 1.0, 1.0), "sagittal", 0), ((1.0, 4.0, 1.0), "coronal", 1), ((1.0, 1.0, 4.0), "axial", 2), ((1.0, 1.0, 1.0), "axial", 2)],
)  # fmt: skip
def test_slices_lie_in_the_plane_with_the_smallest_spacing(tmp_path: Path, spacing, plane: str, through: int) -> None:
    volume, values = read(write_nifti(tmp_path / "v.nii", "LPS", spacing=spacing))
    assert volume.plane == plane
    assert len(values) == SHAPE[through]
    assert volume.spacing == pytest.approx((1.0, 1.0, spacing[through]))
    first = np.take(TRUTH, 0, axis=through)
    assert values[0][0, 0] == first[-1, -1]  # up or front above, the right or the face on the left
    assert values[0][-1, -1] == first[0, 0]


def test_single_slice_and_fourth_axis_of_length_one(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "v.nii", "RAS", TRUTH[:, :1, :], spacing=(1.0, 1.0, 1.0))
    assert read(path)[0].plane == "coronal"
    nibabel.Nifti1Image(TRUTH[..., None], np.diag([*SPACING, 1.0])).to_filename(tmp_path / "t.nii")
    np.testing.assert_array_equal(read(tmp_path / "t.nii")[1], axial(TRUTH))


def test_scl_slope_and_inter_are_applied(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(TRUTH, np.diag([*SPACING, 1.0]))
    image.header.set_slope_inter(2.0, -24.0)
    image.to_filename(tmp_path / "v.nii")
    # nibabel resets the scaling of an array image, so set it in the file: floats at 112 and 116 of the header.
    data = bytearray((tmp_path / "v.nii").read_bytes())
    data[112:120] = np.array([2.0, -24.0], "<f4").tobytes()
    (tmp_path / "v.nii").write_bytes(data)
    volume, values = read(tmp_path / "v.nii")
    np.testing.assert_array_equal(values, axial(TRUTH.astype(int) * 2 - 24))
    assert (volume.survey.low, volume.survey.high) == (values.min(), values.max())
    assert volume.survey.integers and values.dtype.kind == "i"  # whole numbers stay whole


def test_nan_becomes_lowest_and_infinity_an_extreme_value(tmp_path: Path) -> None:
    values = TRUTH.astype(np.float32)
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0] = np.nan, -np.inf, np.inf
    rest = np.delete(TRUTH.ravel(), [0, 28, 56])
    volume, found = read(write_nifti(tmp_path / "v.nii", "RAS", values))
    assert (volume.survey.low, volume.survey.high) == (found.min(), found.max()) == (rest.min(), rest.max())
    assert found[0][-1, -1] == rest.min()
    with pytest.raises(ReadError, match="none of its values is a finite number"):
        read(write_nifti(tmp_path / "n.nii", "RAS", np.full(SHAPE, np.nan, np.float32)))


# ---- label maps


def blocks(labels: np.ndarray, side: int, gap: int = 1) -> np.ndarray:
    """Cubes of one label each, 6 planes deep, with background between them."""
    values, step = np.zeros((64, 64, 12), np.int32), side + gap
    places = [(x, y, z) for x in range(2, 64 - side, step) for y in range(2, 64 - side, step) for z in (0, 6)]
    assert len(places) >= len(labels)
    for label, (x, y, z) in zip(labels, places, strict=False):
        values[x : x + side, y : y + side, z : z + 6] = label
    return values


RANDOM = np.random.default_rng(0)
Y, X = np.mgrid[:64, :64] / 63
SMOOTH = (100 + 80 * np.sin(5 * X) * np.cos(4 * Y))[..., None] + np.arange(12)
NOISY = np.where(SMOOTH > 110, SMOOTH + RANDOM.normal(0, 6, SMOOTH.shape), 0).clip(0, 255)
LANDMARKS = np.zeros((64, 64, 12))
LANDMARKS[[3, 20, 40, 41, 60], [5, 8, 40, 40, 61], [1, 2, 3, 4, 5]] = [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("s0001_total.nii.gz", blocks(np.arange(1, 118), 6), True),  # TotalSegmentator, 117 classes
        ("wmparc.mgz", blocks(np.arange(180) * 27 + 2, 5), True),  # FreeSurfer, up to 5002
        ("nuclei.nii.gz", blocks(np.arange(1, 161), 5), True),
        ("far_apart.nii.gz", blocks(np.arange(30) * 70_001, 6), True),
        ("case_1.nii.gz", (blocks(np.arange(1, 3), 20) > 0).astype(np.uint8), True),
        ("landmarks.nii.gz", LANDMARKS, True),
        ("labelsTr/case_1.nii.gz", blocks(np.arange(1, 60), 2), True),  # mostly borders; the folder says it
        ("imagesTr/case_1.nii.gz", blocks(np.arange(1, 60), 2), False),
        ("case_1_seg.nii.gz", blocks(np.arange(1, 60), 2), True),
        ("t1.nii.gz", NOISY.astype(np.uint8), False),
        ("t1_16_levels.nii.gz", NOISY // 16, False),
        ("smooth_in_8_levels.nii.gz", SMOOTH // 25, False),  # regions of one value, but single steps between them
        ("labelsTr/smooth_in_40_levels.nii.gz", SMOOTH // 5, False),
        ("brain_masked_seg.nii.gz", NOISY.astype(np.int16) * 7, False),  # an image by its values, whatever its name
    ],
)  # fmt: skip
def test_label_map_is_told_from_image_by_regions(tmp_path: Path, name: str, values: np.ndarray, expected: bool) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    kind = np.int32 if values.dtype.kind == "i" else np.float32
    image = nibabel.MGHImage if name.endswith("mgz") else nibabel.Nifti1Image
    image(values.astype(kind), np.diag([1.5, 1.5, 1.5, 1])).to_filename(path)
    with volumes.open_volume(str(path)) as volume:
        assert volume.excluded == ("label map: whole numbers in regions of one value" if expected else "")


def test_intent_code_of_labels_makes_a_label_map(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(NOISY.astype(np.uint8), np.eye(4))
    image.header.set_intent("label")
    image.to_filename(tmp_path / "v.nii")
    assert read(tmp_path / "v.nii")[0].excluded == volumes.LABEL_MAP


def test_named_probability_map_is_excluded(tmp_path: Path) -> None:
    values = (NOISY / 255).astype(np.float32)
    assert read(write_nifti(tmp_path / "lesion_mask.nii", "RAS", values))[0].excluded == volumes.PROBABILITY_MAP
    assert read(write_nifti(tmp_path / "t1_scaled.nii", "RAS", values))[0].excluded == ""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/liver_seg.nii.gz", True), ("a/Lobes.nii", True), ("a/0004Mask.nii.gz", True), ("labelsTs/a.nii", True),
        ("Segmentations/a.nii", True), ("masks/a.nii", True), ("aparc+aseg.mgz", True), ("x/dseg-label.nrrd", True),
        ("segmentation_project/images/a.nii", False), ("a/segovia.nii", False), ("a/heroic.nii", False), ("imagesTr/a.nii", False),
    ],
)  # fmt: skip
def test_labels_are_named_by_file_or_folder(path: str, expected: bool) -> None:
    assert volumes.is_named_label(path) == expected


# ---- modality and scale


def ct(shape: tuple[int, int, int] = (64, 64, 6)) -> np.ndarray:
    """HU of a body in air, with lungs and bone."""
    x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape[:2]), indexing="ij")
    slice_ = np.full(shape[:2], -1000.0)
    slice_[(x / 0.85) ** 2 + (y / 0.7) ** 2 < 1] = 40
    slice_[((abs(x) - 0.35) / 0.25) ** 2 + (y / 0.4) ** 2 < 1] = -850
    slice_[(x / 0.1) ** 2 + ((y - 0.5) / 0.12) ** 2 < 1] = 700
    noise = np.random.default_rng(1).normal(0, 8, shape)
    return np.rint(slice_[..., None] + noise).clip(-1024, 3000)


CORNERS = (np.add.outer((np.linspace(-1, 1, 64)) ** 2, np.linspace(-1, 1, 64) ** 2) > 0.97)[..., None].repeat(6, 2)


def slices(path: str, modality: str = "auto") -> tuple[volumes.ImageFacts, list[volumes.Slice]]:
    with volumes.open_volume_file(ReadRequest(path, modality, "/nowhere")) as source:
        assert source.excluded == ""
        return source.facts, list(source.slices())


def real(found: list[volumes.Slice]) -> np.ndarray:
    return np.stack([one.pixels.astype(np.float64) * one.slope + one.intercept for one in found])


@pytest.mark.parametrize("padding", [-1024, -2000, -3024, -4096, -8192, -10000, -32768])
@pytest.mark.parametrize("form", ["whole", "half steps", "float"])
def test_padded_ct_is_inferred_and_padding_becomes_air(tmp_path: Path, padding: int, form: str) -> None:
    values = np.where(CORNERS, padding, ct() + (0.25 if form == "float" else 0))
    path = write_nifti(tmp_path / "ct.nii", "RAS", values.astype(np.float32 if form == "float" else np.int16))
    if form == "half steps":  # stored = 2 * HU, in 16 bits as far as they go
        values = np.where(CORNERS, max(padding, -16384), ct())
        data = bytearray(Path(write_nifti(tmp_path / "ct.nii", "RAS", (values * 2).astype(np.int16))).read_bytes())
        data[112:120] = np.array([0.5, 0.0], "<f4").tobytes()
        (tmp_path / "ct.nii").write_bytes(data)
    facts, found = slices(path)
    assert (facts.modality, facts.units) == ("CT", "HU")
    wanted = axial(np.maximum(values, -1024))
    np.testing.assert_allclose(real(found), wanted, atol=0.05 if form == "float" else 0)
    assert all(bool(one.flags & records.CLIPPED) == (padding < -1024) for one in found)


def test_slices_of_a_fractional_ct_have_one_scale(tmp_path: Path) -> None:
    """Its lowest value lies above -1024, and one slice has the highest."""
    values = ct() + 0.25
    values[3, 3, 3] = 2900.5
    assert values.min() > -1024
    _, found = slices(write_nifti(tmp_path / "ct.nii", "RAS", values.astype(np.float32)))
    assert len({(one.slope, one.intercept) for one in found}) == 1
    np.testing.assert_allclose(real(found), axial(values), atol=0.05)


def test_phase_and_field_maps_are_mr_without_loss(tmp_path: Path) -> None:
    x, y, z = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64), np.arange(8), indexing="ij")
    inside = x**2 + y**2 < 0.8
    phase = np.angle(np.exp(1j * (9 * x * y + 0.7 * z + 6 * x))) / np.pi * 4096
    phase = np.where(inside, phase, np.random.default_rng(5).uniform(-4096, 4094, x.shape))
    phase = (np.rint(phase / 2) * 2).clip(-4096, 4094).astype(np.int16)  # as Siemens stores it
    facts, found = slices(write_nifti(tmp_path / "phase.nii", "RAS", phase))
    assert (facts.modality, facts.units) == ("MR", "arbitrary")
    np.testing.assert_array_equal(real(found), axial(phase))
    hertz = np.where(inside, 180 * x * y * 8 + 300 * x - 350 * (y > 0.3) + z, 0).astype(np.float32)
    facts, found = slices(write_nifti(tmp_path / "field.nii", "RAS", hertz))
    assert (facts.modality, facts.units) == ("MR", "arbitrary")
    np.testing.assert_allclose(real(found), axial(hertz), atol=0.5 * np.ptp(hertz) / 65535 * 1.01)


@pytest.mark.parametrize(
    ("kind", "outlier"),
    [(kind, outlier) for kind in (np.float32, np.float64, np.int32) for outlier in (1e6, -1e5, 2e9)]
    + [(np.float32, 3e38), (np.float64, 3e38)],
)
@pytest.mark.parametrize("modality", ["CT", "MR", "auto"])
def test_single_outlier_does_not_cost_the_resolution_of_others(tmp_path: Path, kind, outlier: float, modality) -> None:
    values = (ct() + (0 if kind == np.int32 else 0.25)).astype(kind)
    values[3, 3, 3] = outlier
    _, found = slices(write_nifti(tmp_path / "v.nii", "RAS", values), modality)
    rest = axial(values) != kind(outlier)
    error = np.abs(real(found) - axial(values))[rest]
    assert error.max() <= (0 if kind == np.int32 else 0.25)
    assert [bool(one.flags & records.CLIPPED) for one in found] == [n == 3 for n in range(6)]
    assert (real(found)[~rest] > 3000) == (outlier > 0)  # it stays an extreme


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float64])
def test_whole_numbers_of_every_type_are_kept(tmp_path: Path, kind: type) -> None:
    top = min(np.iinfo(kind).max if kind != np.float64 else 60_000, 60_000)
    values = np.random.default_rng(3).integers(0, top, (40, 44, 3)).astype(kind)
    nibabel.Nifti1Image(values, np.diag([*SPACING, 1.0]), dtype=kind).to_filename(tmp_path / "v.nii")
    facts, found = slices(str(tmp_path / "v.nii"))
    assert facts.modality == "MR"
    np.testing.assert_array_equal(real(found), axial(values.astype(np.float64)))


def test_nan_outside_the_field_of_view_changes_nothing(tmp_path: Path) -> None:
    values = np.where(CORNERS, np.nan, ct() + 0.25).astype(np.float32)
    values[32, 0, 0] = 1e6  # the first finite value that is seen
    facts, found = slices(write_nifti(tmp_path / "v.nii", "RAS", values))
    assert facts.modality == "CT"
    sound = np.isfinite(axial(values)) & (axial(values) < 1e6)
    assert np.abs(real(found) - axial(values))[sound].max() <= 0.25


def test_metal_and_steep_contrast_are_not_outliers(tmp_path: Path) -> None:
    values = (ct() + 0.25).astype(np.float32)
    values[20:26, 20:26, :] = 20_000  # 0.9 % of the voxels
    _, found = slices(write_nifti(tmp_path / "metal.nii", "RAS", values), "CT")
    assert np.abs(real(found) - axial(values)).max() <= 0.5
    assert not any(one.flags & records.CLIPPED for one in found)
    spots = np.random.default_rng(2).normal(100, 5, (64, 64, 6)).astype(np.float32)
    spots[5, 5, :3] = 400  # a few times as bright as all else
    _, found = slices(write_nifti(tmp_path / "spots.nii", "RAS", spots), "MR")
    assert real(found).max() == pytest.approx(400, abs=0.01)


def test_damaged_volume_raises_read_error(tmp_path: Path) -> None:
    whole = Path(write_nifti(tmp_path / "v.nii.gz", "RAS")).read_bytes()
    image = SimpleITK.GetImageFromArray(TRUTH)
    SimpleITK.WriteImage(image, str(tmp_path / "v.nrrd"))
    cases = {
        "cut.nii.gz": whole[: len(whole) // 2], "text.nii": b"no volume", "text.nrrd": b"NRRD0004\nno volume", "text.mha": b"x",
        "cut.nrrd": (tmp_path / "v.nrrd").read_bytes()[:300], "bits.nii.gz": whole[:100] + bytes(50) + whole[150:],
    }  # fmt: skip
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ReadError):
            read(tmp_path / name)
    nibabel.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)).to_filename(tmp_path / "time.nii")
    with pytest.raises(ReadError, match="4 dimensions"):
        read(tmp_path / "time.nii")
    colour = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.Nifti1Image(colour, np.eye(4)).to_filename(tmp_path / "rgb.nii")
    with pytest.raises(ReadError, match="colour"):
        read(tmp_path / "rgb.nii")


def test_fractional_scaling_gives_float32_values(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "v.nii", "RAS")
    for slope, inter in ((0.5, -1024.0), (3.0, 0.25), (1e-3, 1e5)):
        data = bytearray((tmp_path / "v.nii").read_bytes())
        data[112:120] = np.array([slope, inter], "<f4").tobytes()
        (tmp_path / "v.nii").write_bytes(data)
        values = read(path)[1]
        assert values.dtype.itemsize == 4
        np.testing.assert_allclose(values, axial(TRUTH * np.float32(slope) + inter), rtol=1e-6)


# ---- hostile headers


@pytest.mark.parametrize("form", ["nrrd", "mha"])
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("/etc/passwd", "outside its folder"), ("../secret.raw", "outside its folder"), ("sub/../../secret.raw", "outside its folder"),
        ("link/secret.raw", "outside its folder"), ("LIST", "several data files"), ("%03d.raw 1 9 1", "several data files"),
        ("gone.raw", "its data file is missing"),
    ],
)  # fmt: skip
def test_data_file_outside_the_folder_is_refused(tmp_path: Path, form: str, target: str, reason: str) -> None:
    place = tmp_path / "exams"
    place.mkdir()
    (place / "link").symlink_to(tmp_path)
    (tmp_path / "secret.raw").write_bytes(TRUTH.tobytes())
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(TRUTH), str(place / "whole.mha"))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(TRUTH), str(place / "whole.nrrd"))
    data = (place / f"whole.{form}").read_bytes()
    if form == "mha":
        # Both ways of writing it that the reader of the format takes.
        texts = [data.replace(b"= LOCAL", mark + target.encode()) for mark in (b"= ", b":  ")]
    else:
        texts = [data.replace(b"\n\n", f"\n{key}: {target}\n\n".encode(), 1) for key in ("data file", "datafile")]
    for text in texts:
        (place / f"a.{form}").write_bytes(text)
        with pytest.raises(ReadError, match=reason):
            read(place / f"a.{form}")


def test_zero_bytes_and_singular_affine_raise_read_error(tmp_path: Path) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(TRUTH), str(tmp_path / "a.mha"))
    data = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(data.replace(b"= LOCAL", b"= LO\0AL"))
    with pytest.raises(ReadError, match="damaged volume: zeros in its header"):
        read(tmp_path / "a.mha")
    data = bytearray(Path(write_nifti(tmp_path / "a.nii", "RAS")).read_bytes())
    for affine in (
        np.diag([1e-7, 1, 1, 1]),
        np.array([[1, 1, 0, 0], [1, 1 + 1e-8, 0, 0], [0, 0, 1e5, 0], [0, 0, 0, 1]]),
    ):
        data[280:328] = affine[:3].astype("<f4").tobytes()
        (tmp_path / "a.nii").write_bytes(data)
        with pytest.raises(ReadError, match="its affine is singular|correct the spacing or its unit"):
            read(tmp_path / "a.nii")
    data[280:328] = np.diag([1, 1, 1e7, 1])[:3].astype("<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(data)
    with pytest.raises(ReadError, match="its affine has a value beyond 1,000,000 mm"):
        read(tmp_path / "a.nii")


def test_detached_data_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "v.raw").write_bytes(TRUTH.transpose(2, 1, 0).tobytes())
    sizes = " ".join(map(str, SHAPE))
    (tmp_path / "v.nhdr").write_text(
        f"NRRD0004\ntype: short\ndimension: 3\nsizes: {sizes}\nendian: little\nencoding: raw\ndata file: raw/v.raw\n"
    )
    (tmp_path / "v.mhd").write_text(
        f"ObjectType = Image\nNDims = 3\nDimSize = {sizes}\nElementType = MET_SHORT\nElementDataFile = raw/v.raw\n"
    )
    for name in ("v.nhdr", "v.mhd"):
        assert read(tmp_path / name)[1].sum() == TRUTH.sum()


def test_overlong_header_is_refused(tmp_path: Path) -> None:
    comment = "x" * nrrd_metaimage.HEADER_BYTES
    (tmp_path / "a.mhd").write_text(f"ObjectType = Image\nComment = {comment}\nElementDataFile = /etc/passwd\n")
    (tmp_path / "a.nhdr").write_text(f"NRRD0004\n# {comment}\ndata file: /etc/passwd\n\n")
    for name in ("a.mhd", "a.nhdr"):
        with pytest.raises(ReadError, match="its header does not end within 65,536 bytes"):
            read(tmp_path / name)


def test_size_beyond_the_file_is_refused_before_reading(tmp_path: Path) -> None:
    data = bytearray(Path(write_nifti(tmp_path / "v.nii", "RAS")).read_bytes())
    data[42:48] = np.array([32767, 32767, 32767], "<i2").tobytes()
    (tmp_path / "v.nii").write_bytes(data)
    (tmp_path / "v.nii.gz").write_bytes(gzip.compress(data))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(TRUTH), str(tmp_path / "v.mha"))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(TRUTH), str(tmp_path / "v.nrrd"))
    for name, old in (("v.mha", b"DimSize = 4 7 6"), ("v.nrrd", b"sizes: 4 7 6")):
        text = (tmp_path / name).read_bytes()
        assert old in text
        (tmp_path / name).write_bytes(text.replace(old, old.replace(b"4 7 6", b"30000 30000 30000")))
    for name in ("v.nii", "v.nii.gz", "v.mha", "v.nrrd"):
        with pytest.raises(ReadError, match="its header states [0-9,]{18} bytes, which the file cannot hold"):
            read(tmp_path / name)
