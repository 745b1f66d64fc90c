"""Units of series and slices. Values are made here, in HU, and then spoilt as scanners, editors and anonymisers do."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from data_pipeline.format import shards
from data_pipeline.sources import hu
from data_pipeline.sources.base import Slice
from data_pipeline.stages import units
from data_pipeline.stages.units import SliceValues

RESCALED, LOST = (1.0, -1024.0), None


def body(seed: int) -> np.ndarray:
    """HU of a slice: air, lung, fat, soft tissue and bone."""
    r = np.random.default_rng(seed)
    parts = [(-1000, 12, 1600), (-850, 40, 600), (-100, 15, 600), (45, 20, 1000), (600, 250, 200)]
    return np.rint(np.concatenate([r.normal(mean, spread, n) for mean, spread, n in parts]))


def one(values: np.ndarray, rescale: tuple[float, float] | None = RESCALED) -> SliceValues:
    return SliceValues(hu.profile(*np.unique(values, return_counts=True)), rescale)


CHEST = [one(body(seed)) for seed in range(8)]
BONE = np.abs(np.random.default_rng(3).normal(500, 150, 4000))
PART = [one(values[values > -300]) for values in map(body, range(4))]  # without air around


def judge(*slices: SliceValues) -> tuple[str, list[str | None]]:
    found = units.judge_ct(slices, inferred=False)
    return found.evidence, found.reasons


def test_ct_with_air_and_tissue_in_place_is_proved() -> None:
    assert judge(*CHEST) == ("proved", [None] * 8)


def test_slices_that_lost_their_rescale_are_left_out_by_name() -> None:
    lost = one(body(9) + 1024, LOST)
    evidence, reasons = judge(CHEST[0], lost, *CHEST[1:], lost)
    assert evidence == "proved"
    assert reasons == [None, units.UNLIKE_SERIES, *[None] * 7, units.UNLIKE_SERIES]


def test_undeclared_padding_that_lost_its_sign_is_named() -> None:
    wrapped = np.append(body(9), np.full(300, 65_536 - 2000 - 1024))  # -2000 as unsigned 16 bits
    assert judge(*CHEST, one(wrapped)) == ("proved", [*[None] * 8, units.WITHOUT_SIGN])
    assert judge(one(wrapped), one(wrapped))[1] == [units.WITHOUT_SIGN] * 2
    # Neither the metal of an extended scale nor a single damaged pixel.
    assert (
        judge(*CHEST, one(np.append(body(9), np.full(300, 30_710))), one(np.append(body(9), 62_512)))[1] == [None] * 10
    )


def test_slice_of_mr_under_the_series_of_a_ct_is_left_out() -> None:
    mr = one(np.abs(np.random.default_rng(4).normal(400, 120, 4000)))
    assert judge(*CHEST, mr) == ("proved", [*[None] * 8, units.UNLIKE_SERIES])


def test_slice_with_its_intercept_applied_twice_is_left_out() -> None:
    assert judge(*CHEST, one(body(5) - 1024)) == ("proved", [*[None] * 8, units.UNLIKE_SERIES])


def test_slice_of_air_or_of_bone_in_a_cropped_series_is_kept() -> None:
    air = one(np.random.default_rng(6).normal(-1000, 15, 4000))
    assert judge(*CHEST, air) == ("proved", [None] * 9)
    assert judge(*PART, one(BONE)) == ("declared", [None] * 5)


def test_part_of_a_body_without_air_is_declared_by_its_header() -> None:
    assert judge(*PART) == ("declared", [None] * 4)
    nothing = [SliceValues(values.profile, LOST) for values in PART]
    assert judge(*nothing) == ("declared", [units.UNKNOWN_UNITS] * 4)


def test_ct_without_rescale_is_kept_where_its_values_prove_hu() -> None:
    assert judge(*(SliceValues(values.profile, LOST) for values in CHEST)) == ("proved", [None] * 8)


@pytest.mark.parametrize(
    "values",
    [body(1) + 1024, body(1) - 1024, np.arange(0, 255), np.arange(-1024, -769), np.arange(-4096, 4095), np.append(body(1) + 1025, [-2000.0] * 1000)],
    ids=["no rescale", "intercept twice", "8 bit", "8 bit with intercept", "phase", "padded without rescale"],
)  # fmt: skip
def test_series_that_is_not_hu_is_left_out_whole(values: np.ndarray) -> None:
    assert judge(one(values), one(values)) == ("declared", [units.NO_HU] * 2)


def test_inferred_ct_is_proved_or_guessed_and_never_left_out() -> None:
    assert units.judge_ct(CHEST, inferred=True) == ("proved", [None] * 8)
    assert units.judge_ct(PART, inferred=True) == ("guessed", [None] * 4)


def test_mr_series_in_hu_is_left_out_and_phase_kept() -> None:
    air_and_tissue = np.concatenate([np.arange(-1030, -970), np.arange(-60, 80)])
    assert units.judge_mr([one(air_and_tissue)], inferred=False) == ("declared", [units.HU_IN_MR])
    assert units.judge_mr([one(np.arange(-4096, 4095))], inferred=False) == ("declared", [None])
    assert units.judge_mr([one(np.arange(0, 255))], inferred=False) == ("declared", [None])
    assert units.judge_mr([one(air_and_tissue)], inferred=True) == ("guessed", [None])


def test_raised_values_and_padding_count_as_they_were() -> None:
    values = np.append(body(1) - 1024, [-1024.0] * 500)  # 500 pixels of declared padding
    raised = np.maximum(values, -1024)
    stored = (raised + 1024).astype(np.uint16)[None]
    low, counts = np.unique(values[values < -1024], return_counts=True)
    item = Slice(
        0, stored, 1.0, -1024.0, 0.0, 0, "0" * 16, (1.0, 1.0), rescale=RESCALED,
        below=tuple(zip(low.tolist(), counts.tolist(), strict=True)), padded=500,
    )  # fmt: skip
    found = units.slice_values(item, np.bincount(stored.ravel()), lossy=False)
    expected = one(values[:-500])
    np.testing.assert_array_equal(found.profile.bins, expected.profile.bins)
    assert (found.profile.low, found.profile.high) == (expected.profile.low, expected.profile.high)
    assert found.rescale == RESCALED


# ---- builds: the exams that public bug reports describe, made anew


def picture(number: int) -> np.ndarray:
    """HU of an axial slice, 64 px: air, a body with fat, lungs and a spine; noise of its own."""
    y, x = np.mgrid[:64, :64] / 31.5 - 1
    image = np.full((64, 64), -1000.0)
    image[(x / 0.85) ** 2 + (y / 0.7) ** 2 < 1] = -90
    image[(x / 0.78) ** 2 + (y / 0.63) ** 2 < 1] = 40 + number
    for side in (-1, 1):
        image[((x - side * 0.35) / 0.22) ** 2 + ((y + 0.05) / 0.35) ** 2 < 1] = -850
    image[(x / 0.1) ** 2 + ((y - 0.5) / 0.12) ** 2 < 1] = 700
    return np.rint(image + np.random.default_rng(number).normal(0, 8, image.shape)).clip(-1024, 3000).astype(np.int32)


@pytest.fixture
def series(write_dicom, tmp_path: Path) -> Callable[..., None]:
    """Writes slices of one series UID, 2.5 mm apart; `stored` makes the stored values of slice number n."""

    def write(
        name: str, stored: Callable[[int], np.ndarray], count: int = 8, *, uid: str = "2.25.7", start: float = 0.0, **fields: Any
    ) -> None:  # fmt: skip
        for number in range(count):
            own = {key: value(number) if callable(value) else value for key, value in fields.items()}
            position = {"ImagePositionPatient": [0, 0, start + 2.5 * number], "SeriesInstanceUID": uid}
            values = stored(number)
            kind = "<i2" if values.min() < 0 else "<u2"
            write_dicom(tmp_path / "in" / f"{name}{number}.dcm", values.astype(kind), **(position | own))

    return write


@pytest.fixture
def built(run_build, tmp_path: Path) -> Callable[..., tuple[list[dict], dict[str, tuple[str, str]]]]:
    """Builds what was written; the rows of the index in order, and fate and reason by file name."""

    def build(*words: Any) -> tuple[list[dict], dict[str, tuple[str, str]]]:
        out = tmp_path / "out"
        result = run_build("--input", tmp_path / "in", "--output", out, "--validation", 0, "--test", 0, *words)
        assert result.code == 0, result.err
        source = shards.SliceSource(str(out), "train")
        rows = [{**row, "real": source[number].real} for number, row in enumerate(source.index.to_pylist())]
        manifest = pq.read_table(out / shards.MANIFEST).to_pylist()
        fates = {Path(row["path"]).stem: (row["fate"], row["reason"]) for row in manifest}
        return sorted(rows, key=lambda row: (row["plane"], row["series"], row["position"])), fates

    return build


MR: dict[str, Any] = {"Modality": "MR", "ImageType": ["ORIGINAL", "PRIMARY", "M"], "BodyPartExamined": "BRAIN"}


def refused(folder: Path) -> dict[str, int]:
    return json.loads((folder / shards.CARD).read_text())["units_refused"]


def test_build_keeps_hu_of_a_proved_series_and_leaves_out_lost_rescales(series, built, tmp_path: Path) -> None:
    lost = (2, 5)
    series(
        "a", lambda number: picture(number) + 1024,
        RescaleSlope=lambda number: None if number in lost else 1, RescaleIntercept=lambda number: None if number in lost else -1024,
    )  # fmt: skip
    rows, fates = built()
    assert {fates[f"a{number}"] for number in lost} == {("excluded", units.UNLIKE_SERIES)}
    assert [row["position"] for row in rows] == [2.5 * number for number in range(8) if number not in lost]
    assert {row["units_evidence"] for row in rows} == {"proved"}
    for row in rows:
        np.testing.assert_array_equal(row["real"], picture(round(row["position"] / 2.5)))
    assert refused(tmp_path / "out") == {"series": 0, "slices": 2}


def test_build_names_an_intercept_applied_twice(series, built, write_dicom, tmp_path: Path) -> None:
    series("twice", picture, uid="2.25.8", RescaleIntercept=-1024)
    series("sound", lambda number: picture(number + 20) + 1024)
    _, fates = built()
    assert {fates[f"twice{number}"] for number in range(8)} == {("excluded", units.NO_HU)}
    assert refused(tmp_path / "out") == {"series": 1, "slices": 8}
    assert {fates[f"sound{number}"][0] for number in range(8)} == {"kept"}


def test_build_leaves_out_maps_and_keeps_them_in_arbitrary_units_if_asked(series, built, tmp_path: Path) -> None:
    derived = ["DERIVED", "PRIMARY", "AXIAL"]
    series("vmi", lambda n: picture(n) + 1024, uid="2.25.1", RescaleType="HU", ImageType=[*derived, "VMI"])
    series("iodine", lambda n: np.maximum(picture(n), 0) // 4, uid="2.25.2", RescaleType="MGML", RescaleSlope="0.1",
           RescaleIntercept=0, ImageType=[*derived, "MAT_SPECIFIC"])  # fmt: skip
    series("density", lambda n: (picture(n + 40) + 1024) // 2, uid="2.25.3", RescaleType="ED", RescaleIntercept=-1000)
    series(
        "adc",
        lambda n: picture(n + 60) + 1024,
        uid="2.25.4",
        **(MR | {"ImageType": [*derived[:2], "DIFFUSION", "ADC"]}),
    )
    rows, fates = built()
    assert {(row["units"], row["series"]) for row in rows} == {("HU", rows[0]["series"])} and len(rows) == 8
    assert {reason for fate, reason in fates.values() if fate == "excluded"} == {
        f"a map of {what}; --keep-maps keeps it" for what in ("concentration", "electron density", "diffusion")
    }
    shutil.rmtree(tmp_path / "out")
    rows, fates = built("--keep-maps")
    assert {fate for fate, _ in fates.values()} == {"kept"}
    assert Counter((row["modality"], row["units"]) for row in rows) == {
        ("CT", "HU"): 8, ("CT", "arbitrary"): 16, ("MR", "arbitrary"): 8
    }  # fmt: skip


def test_build_excludes_a_modality_lut_by_name(series, built) -> None:
    series("lut", lambda n: picture(n) + 1024, uid="2.25.1", RescaleSlope=None, RescaleIntercept=None,
           ModalityLUTSequence=DicomSequence([Dataset()]))  # fmt: skip
    series("sound", lambda n: picture(n + 20) + 1024)
    _, fates = built()
    assert fates["lut0"] == ("excluded", "stored values are indices of a Modality LUT, which is not applied")


def test_build_accepts_an_unspecified_rescale_type_only_with_proof(series, built) -> None:
    series("sound", lambda n: picture(n) + 1024, uid="2.25.1", RescaleType="US")
    # A cone-beam CT in units of its own: air, fat and tissue 300 too high.
    series("cbct", lambda n: picture(n + 20) + 1324, uid="2.25.2", RescaleType="US")
    rows, fates = built()
    assert {fates[f"cbct{number}"] for number in range(8)} == {("excluded", units.UNKNOWN_UNITS)}
    assert {row["units_evidence"] for row in rows} == {"proved"} and len(rows) == 8


def test_build_separates_ct_and_mr_under_one_series_uid(series, built) -> None:
    series("ct", lambda n: picture(n) + 1024, BodyPartExamined="CHEST")
    series("mr", lambda n: np.abs(picture(n + 20)) + 1, start=100.0, **MR)
    rows, fates = built()
    assert {fate for fate, _ in fates.values()} == {"kept"}
    found = {(row["series"], row["modality"], row["units"], row["body_part"], row["position"] >= 100) for row in rows}
    assert {one[1:] for one in found} == {("CT", "HU", "chest", False), ("MR", "arbitrary", "brain", True)}
    assert len({one[0] for one in found}) == 2 and len(rows) == 16


def signed(number: int) -> np.ndarray:
    """MR with undershoot: the lowest value differs from slice to slice."""
    values = (picture(number) + 1024) * (number + 2) // 4
    values[:2, :40] = -3 - number
    return values


def test_build_gives_signed_mr_one_scale_and_one_set_of_statistics(series, built) -> None:
    series("a", signed, 24, PixelSpacing=[0.8, 0.8], **MR)
    rows, _ = built("--planes", "coronal", "--slices-per-record", 4)
    native = [row for row in rows if row["plane"] == "axial"]
    everything = np.stack([signed(number) for number in range(24)])
    for number, row in enumerate(native):
        np.testing.assert_array_equal(row["real"], signed(number))
        assert row["series_mean"] == pytest.approx(everything.mean(), rel=1e-6)
        assert row["series_std"] == pytest.approx(everything.std(), rel=1e-6)
    assert len({row["record"] for row in native}) == 6
    assert len(rows) > len(native) == 24


def test_build_names_series_with_a_slope_per_slice_and_joins_statistics(series, built) -> None:
    series("a", lambda n: picture(n) + 1024, RescaleSlope=lambda n: str(1 + n / 4), RescaleIntercept=0, **MR)
    rows, fates = built("--planes", "coronal")
    assert set(fates.values()) == {("kept", units.SEVERAL_SCALES)}
    real = np.stack([(picture(number) + 1024) * (1 + number / 4) for number in range(8)])
    for number, row in enumerate(rows):
        np.testing.assert_allclose(row["real"], real[number], rtol=1e-6)
        assert row["series_mean"] == pytest.approx(real.mean(), rel=1e-6)
        assert row["plane"] == "axial"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.random.default_rng(0).integers(-4096, 4095, (40, 40, 6)), ("excluded", units.NO_HU)),  # phase
        (np.stack([picture(number) - 1024 for number in range(6)], axis=2), ("excluded", units.NO_HU)),
        (np.stack([picture(number) for number in range(6)], axis=2), ("kept", "")),
    ],
    ids=["phase", "intercept twice", "hu"],
)  # fmt: skip
def test_build_checks_volumes_that_the_user_calls_ct(
    built, tmp_path: Path, values: np.ndarray, expected: tuple
) -> None:
    (tmp_path / "in").mkdir()
    nibabel.Nifti1Image(values.astype(np.int16), np.diag([1.0, 1.0, 3.0, 1.0])).to_filename(tmp_path / "in" / "x.nii")
    series = np.stack([picture(number + 20) for number in range(6)], axis=2).astype(np.int16)
    nibabel.Nifti1Image(series, np.diag([1.0, 1.0, 3.0, 1.0])).to_filename(tmp_path / "in" / "sound.nii")
    rows, fates = built("--modality", "CT")
    assert fates["x"] == expected and fates["sound"] == ("kept", "")
    assert {row["units_evidence"] for row in rows} == {"proved"}
