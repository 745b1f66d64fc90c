import csv
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from curia_common.errors import UserError
from data_pipeline import synthetic_anatomy, synthetic_exams
from data_pipeline.sources import geometry, volumes
from data_pipeline.sources.dicom_header import read_header
from data_pipeline.stages import exclusion

LABELS = synthetic_anatomy.LABELS


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def volumes_of() -> dict[tuple[str, str], list[synthetic_exams.Volume]]:
    """Two patients of every series at a size that shows the organs."""
    return {
        (region, contrast): [
            synthetic_exams.make(1, patient, region, contrast, size=64, slices=12, lesion=True) for patient in range(2)
        ]
        for region, contrast, _ in synthetic_exams.SERIES
    }


def test_unknown_series_is_rejected_with_the_choices() -> None:
    with pytest.raises(
        UserError, match="no T1 of the chest; it has CT of the chest, CT of the abdomen, T1 of the head"
    ):
        synthetic_exams.make(0, 0, "chest", "T1")


# ---- the files


def test_every_series_is_a_regular_dicom_volume(study: Path) -> None:
    folders = sorted(path for path in (study / "dicom").glob("*/*"))
    assert len(folders) == 8 * 4
    uids: set[str] = set()
    for folder in folders[:8]:
        headers = [read_header(str(path)) for path in sorted(folder.iterdir())]
        assert len(headers) == 5 and len({header.series_uid for header in headers}) == 1
        assert [exclusion.exclude_header(header) for header in headers] == [None] * 5
        (found,) = geometry.check(
            [h.geometry[0].orientation for h in headers], [h.geometry[0].position for h in headers]
        )
        assert (found.problems, found.plane, found.order) == ((), "axial", (0, 1, 2, 3, 4))
        region = folder.name.split("_")[1]
        assert found.spacing == pytest.approx(synthetic_exams.EXTENT[region][1] / 5, abs=1e-3)
        assert headers[0].geometry[0].spacing == pytest.approx((synthetic_exams.EXTENT[region][0] / 40,) * 2)
        uids |= {header.sop_uid for header in headers} | {headers[0].series_uid}
    assert len(uids) == 8 * 6
    # The head's two contrasts are one study, chest and abdomen are others.
    studies = {folder.name: read_header(str(folder / "000.dcm")).study_uid for folder in folders[:4]}
    assert len(set(studies.values())) == 3 and studies["3_head_t1"] == studies["4_head_t2"]


def test_written_pixels_and_masks_equal_the_volume(study: Path) -> None:
    volume = synthetic_exams.make(3, 2, "abdomen", "CT", size=40, slices=5)
    place = study / "dicom" / "PHANTOM-0002" / "2_abdomen_ct"
    for k, path in enumerate(sorted(place.iterdir())):
        data = pydicom.dcmread(path)
        hu = data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept)
        np.testing.assert_allclose(hu, volume.values[k], atol=0.51)
    path = study / "masks" / "PHANTOM-0002_2_abdomen_ct.nii.gz"
    with volumes.open_volume(str(path)) as mask:
        assert mask.excluded == volumes.LABEL_MAP
        np.testing.assert_array_equal(list(mask.slices()), volume.labels)
    # The mask lies where the slices lie: NIfTI's axes point right and front, DICOM's left and back.
    first = pydicom.dcmread(place / "000.dcm")
    corner = nibabel.load(path).affine @ [0, 0, 0, 1]
    assert corner[:3] * [-1, -1, 1] == pytest.approx([float(v) for v in first.ImagePositionPatient], abs=1e-3)


def test_labels_agree_with_the_masks(study: Path) -> None:
    table = rows(study)
    assert len(table) == 8 * 4 * 5
    shown = 0
    for row in table:
        path = study / row["file"]
        mask = nibabel.load(study / "masks" / f"{row['patient']}_{path.parent.name}.nii.gz")
        lesion = int((np.asarray(mask.dataobj)[:, :, int(path.stem)] == LABELS["lesion"]).sum())
        assert row["lesion"] == str(int(lesion >= 4)), row["file"]
        assert row["lesion_type"] == (synthetic_exams.LESION_NAMES[row["region"]] if lesion >= 4 else "none")
        assert row["contrast"].lower() in path.parent.name and pydicom.dcmread(path).PatientID == row["patient"]
        shown += lesion >= 4
    assert 0.05 * len(table) < shown < 0.8 * len(table)


# ---- the anatomy


@pytest.mark.parametrize(
    ("region", "contrast", "organs"),
    [
        ("chest", "CT", {"fat", "muscle", "bone", "lung", "heart", "aorta", "lesion"}),
        ("abdomen", "CT", {"fat", "muscle", "bone", "aorta", "liver", "spleen", "kidney", "bowel", "lesion"}),
        ("head", "T1", {"fat", "bone", "white matter", "grey matter", "ventricle", "lesion"}),
    ],
)
def test_every_region_has_its_organs(volumes_of, region: str, contrast: str, organs: set[str]) -> None:
    for volume in volumes_of[region, contrast]:
        present = {name for name, number in LABELS.items() if (volume.labels == number).sum() > 10}
        assert organs | {"outside"} <= present


def interior(labels: np.ndarray, number: int, margin: int = 2) -> np.ndarray:
    """Voxels all of whose neighbours in the slice have the same label: no partial volume."""
    inside = labels == number
    for axis in (1, 2):
        for step in (*range(-margin, 0), *range(1, margin + 1)):
            inside &= np.roll(labels, step, axis) == number
    return inside


def test_ct_values_equal_the_organs_hu(volumes_of) -> None:
    for region in ("chest", "abdomen"):
        for volume in volumes_of[region, "CT"]:
            for name in ("outside", "fat", "muscle", "lung", "heart", "liver", "spleen", "kidney"):
                values = volume.values[interior(volume.labels, LABELS[name])]
                if len(values) > 30:
                    # Patients differ by 4 HU (standard deviation); three of them, and the blur at air.
                    assert values.mean() == pytest.approx(synthetic_anatomy.HU[name][0], abs=15), name
            assert volume.values.min() >= -1024
    bone = np.concatenate([v.values[v.labels == LABELS["bone"]] for v in volumes_of["chest", "CT"]])
    assert 200 < np.median(bone) < 600


def test_ct_has_noise_and_partial_volume(volumes_of) -> None:
    volume = volumes_of["abdomen", "CT"][0]
    outside = volume.values[interior(volume.labels, LABELS["outside"])]
    assert 5 < outside.std() < synthetic_anatomy.CT_NOISE_HU * 1.2  # blurred a little
    # Between air and skin lie values of neither, in a rim of about a voxel.
    rim = ((volume.values > -800) & (volume.values < -300)).mean()
    assert 0.002 < rim < 0.05


def test_lesion_contrast_has_the_right_sign(volumes_of) -> None:
    for (region, contrast), organ, sign in ((("abdomen", "CT"), "liver", -1), (("chest", "CT"), "lung", 1)):
        for volume in volumes_of[region, contrast]:
            assert volume.lesion
            lesion, healthy = (volume.values[volume.labels == LABELS[name]].mean() for name in ("lesion", organ))
            assert sign * (lesion - healthy) > 15


def test_mr_contrasts_show_the_same_anatomy_in_opposite_order(volumes_of) -> None:
    for t1, t2 in zip(volumes_of["head", "T1"], volumes_of["head", "T2"], strict=True):
        np.testing.assert_array_equal(t1.labels, t2.labels)

        def mean(volume: synthetic_exams.Volume, name: str) -> float:
            return float(volume.values[interior(volume.labels, LABELS[name], margin=1)].mean())

        assert mean(t1, "white matter") > mean(t1, "grey matter") > mean(t1, "ventricle")
        assert mean(t2, "ventricle") > mean(t2, "grey matter") > mean(t2, "white matter")
        assert t1.values.min() >= 0  # a magnitude
        assert mean(t1, "outside") == pytest.approx(20, abs=12)  # Rician noise has a floor of 1.25 sigma


def test_lesion_follows_the_argument_else_half_of_the_patients() -> None:
    def count(**settings) -> list[bool]:
        made = [synthetic_exams.make(5, n, "head", "T2", size=32, slices=4, **settings) for n in range(24)]
        for volume in made:
            assert volume.lesion or not (volume.labels == LABELS["lesion"]).any()
        return [volume.lesion for volume in made]

    assert set(count(lesion=False)) == {False} and set(count(lesion=True)) == {True}
    assert 6 <= sum(count()) <= 18
    with_one = synthetic_exams.make(5, 0, "abdomen", "CT", size=64, slices=8, lesion=True)
    assert (with_one.labels == LABELS["lesion"]).sum() > 4
    without = synthetic_exams.make(5, 0, "abdomen", "CT", size=64, slices=8, lesion=False)
    same = (with_one.labels == without.labels)[with_one.labels != LABELS["lesion"]]
    assert same.all()  # nothing but the lesion differs


def test_patients_differ(volumes_of) -> None:
    for pair in volumes_of.values():
        assert (pair[0].labels != pair[1].labels).mean() > 0.02


# ---- varied patients


@pytest.fixture(scope="module")
def varied() -> list[synthetic_exams.Volume]:
    return [synthetic_exams.make(2, n, "abdomen", "CT", size=48, slices=6, varied=True) for n in range(24)]


def centre(volume: synthetic_exams.Volume, name: str) -> np.ndarray:
    """Mean column and row of an organ."""
    _, rows, columns = np.nonzero(volume.labels == LABELS[name])
    return np.array([columns.mean(), rows.mean()])


def test_situs_inversus_puts_the_liver_on_the_left(varied) -> None:
    found = [volume.situs for volume in varied]
    assert 6 <= found.count("inversus") <= 18
    for volume in varied:
        spine, liver = centre(volume, "bone"), centre(volume, "liver")
        body = centre(volume, "fat")
        # Which side of the line from spine to middle the liver is on: the sign holds however the patient is turned.
        (ax, ay), (bx, by) = body - spine, liver - spine
        assert (ax * by - ay * bx > 0) == (volume.situs == "inversus")


def test_all_series_of_a_varied_patient_have_one_situs() -> None:
    for patient in range(6):
        made = {
            synthetic_exams.make(2, patient, region, contrast, size=32, slices=4, varied=True).situs
            for region, contrast, _ in synthetic_exams.SERIES
        }
        assert len(made) == 1


def test_varied_patients_differ_in_enhancement_and_position(varied) -> None:
    liver = [float(volume.values[interior(volume.labels, LABELS["liver"])].mean()) for volume in varied]
    assert min(liver) < 75 and max(liver) > 100  # 55 HU before the contrast agent, 120 at its peak
    spines = np.array([centre(volume, "bone") for volume in varied])
    assert spines.std(axis=0).min() > 1  # px


def test_patients_are_not_varied_unless_asked() -> None:
    made = [synthetic_exams.make(2, n, "abdomen", "CT", size=48, slices=6) for n in range(8)]
    assert {volume.situs for volume in made} == {"solitus"}
    assert np.array([centre(volume, "bone")[0] for volume in made]).std() < 0.5  # px: they lie in the middle
