"""The pipeline on real files: see SOURCES.md of the data folder. Values of headers are never printed, in assertions neither."""

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from array_record.python import array_record_module

from data_pipeline.format import records, shards
from data_pipeline.sources import dicom_header, dicom_pixels, geometry
from data_pipeline.sources.base import ReadError
from data_pipeline.sources.stored_values import stored_sha256
from data_pipeline.stages import commit, exclusion, pseudonyms

FOLDERS = ("dicom", "nifti", "registration", "labelled/ct_luad_contrast")


@pytest.fixture(scope="module")
def golden(real_data: Path) -> list[dict[str, str]]:
    table = real_data / "dicom_golden.csv"
    if not table.is_file():
        pytest.skip(f"no {table}")
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def built(real_data: Path, tmp_path_factory: pytest.TempPathFactory, run_build) -> tuple[Path, str]:
    """One build of everything but the pictures; the folder and what was said."""
    output = tmp_path_factory.mktemp("real") / "out"
    inputs = [real_data / folder for folder in FOLDERS]
    missing = [str(path) for path in inputs if not path.is_dir()]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
    result = run_build("--input", *inputs, "--output", output, processes=2)
    assert (result.code, result.out) == (0, "")
    return output, result.err


@pytest.fixture(scope="module")
def rows(built, real_data: Path) -> dict[str, dict[str, Any]]:
    """The manifest by path below the data folder."""
    table = pq.read_table(built[0] / "manifest.parquet").to_pylist()
    return {str(Path(row["path"]).relative_to(real_data)): row for row in table}


def under(rows: dict[str, dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    found = [row for path, row in rows.items() if path.startswith(f"{folder}/")]
    assert found, folder
    return found


# ---- decoding


def readable(row: dict[str, str]) -> bool:
    """Whether the stored values of a file can be had: they are grey, and one of two independent decoders had them."""
    # The number of rows of this one is not a number; a reader that shrugs at it is not asked.
    broken = row["file"] == "dicom/odd/badVR.dcm"
    grey = row["photometric"] in ("MONOCHROME1", "MONOCHROME2")
    return grey and "ok" in (row["pydicom_status"], row["simpleitk_status"]) and not broken


def test_stored_values_equal_independent_decoders(golden, real_data: Path) -> None:
    # This one lacks the delimiter after its last frame, at which the reference decoders give up; its frames are those of its twin.
    short, twin = "emri_small_jpeg_2k_lossless_too_short.dcm", "emri_small_jpeg_2k_lossless.dcm"
    digests = {Path(row["file"]).name: row["sha256_16_of_stored_values_smallest"] for row in golden}
    wrong, same, lossy = [], 0, 0
    for row in golden:
        try:
            values, _ = dicom_pixels.read_stored(str(real_data / row["file"]))
        except ReadError:
            if readable(row):
                wrong.append(f"{row['file']}: refused")
            continue
        expected = digests[twin] if row["file"].endswith(short) else row["sha256_16_of_stored_values_smallest"]
        if expected and stored_sha256(values) == expected:
            same += 1
        elif row["transfer_syntax"] in dicom_header.LOSSY_SYNTAXES and (
            not row["stored_max"] or abs(int(values.max()) - float(row["stored_max"])) <= 1
        ):
            lossy += 1  # decoders of lossy JPEG differ by rounding, and the reference decoded some of them with another
        else:
            wrong.append(f"{row['file']}: other values")
    assert wrong == []
    assert same >= 230 and lossy <= 6


def test_nine_lossless_encodings_give_one_image(golden, real_data: Path) -> None:
    of_one = [row for row in golden if "ct_hispeed_13ts" in row["file"]]
    (digest, count), *_ = Counter(row["sha256_16_of_stored_values_smallest"] for row in of_one).most_common()
    assert count == 9
    lossless = [row for row in of_one if row["sha256_16_of_stored_values_smallest"] == digest]
    decoded = [dicom_pixels.read_stored(str(real_data / row["file"])) for row in lossless]
    assert {stored_sha256(values) for values, _ in decoded} == {digest}
    assert len({row["transfer_syntax"] for row in lossless}) == 9
    # Each by the decoder that is pinned for it, none by the fallback.
    plugins = {row["transfer_syntax"]: name.split()[-1] for row, (_, name) in zip(lossless, decoded, strict=True)}
    assert {syntax: plugins[syntax] for syntax in plugins if syntax in dicom_pixels.PLUGINS} == {
        syntax: dicom_pixels.PLUGINS[syntax] for syntax in plugins if syntax in dicom_pixels.PLUGINS
    }


def test_both_decoders_agree(golden, real_data: Path) -> None:
    compared = 0
    for row in golden:
        if not row["file"].startswith(
            ("dicom/enhanced_multiframe", "dicom/mr_vendors", "dicom/transfer_syntaxes/pydicom")
        ):
            continue
        if (
            not readable(row)
            or row["modality"] not in ("CT", "MR")
            or row["transfer_syntax"] in dicom_header.LOSSY_SYNTAXES
        ):
            continue
        values, _ = dicom_pixels.read_stored(str(real_data / row["file"]))
        path = str(real_data / row["file"])
        again = list(dicom_pixels.decode_with_simpleitk(path, dicom_header.read_header(path).geometry))
        np.testing.assert_array_equal(again, values)
        compared += 1
    assert compared > 20


def test_stored_hashes_equal_golden_ones(golden, rows) -> None:
    checked = 0
    for row in golden:
        found = rows[row["file"]]
        if found["fate"] == "kept" and row["transfer_syntax"] not in dicom_header.LOSSY_SYNTAXES:
            assert found["stored_sha256"] == row["sha256_16_of_stored_values_smallest"], row["file"]
            checked += 1
    assert checked > 100


# ---- geometry


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("gantrytilting_001", geometry.TILTED),  # 14 degrees, and no tag that says so
        ("notavolume_001", geometry.REPEATED_POSITION),
        ("slicecount_001", geometry.FEW),
        ("sliceincrement_001", geometry.GAP),
        ("sliceorientation_001", geometry.MIXED_ORIENTATION),
    ],
)
def test_geometry_defects_are_flagged_by_their_own_reason(rows, folder: str, problem: str) -> None:
    own = {geometry.TILTED, geometry.REPEATED_POSITION, geometry.GAP, geometry.MIXED_ORIENTATION}
    for row in under(rows, f"dicom/bad_geometry/{folder}"):
        problems = set(row["problems"].split("; "))
        assert problem in problems
        assert problems & own <= {problem}
        # The CT of this set holds 8-bit values instead of HU, which is another reason and does not hide the first.
        assert row["fate"] == "kept" or row["reason"] == "values are not HU"


def test_tilted_head_is_flagged_and_kept(rows) -> None:
    head = under(rows, "dicom/ct_ge_head_tilt18")
    assert {row["fate"] for row in head} == {"kept"}
    assert {row["problems"] for row in head} == {f"{geometry.GAP}; {geometry.TILTED}"}


@pytest.mark.parametrize(
    "folder",
    [
        "ct_philips_phantom_brain5mm",
        "mr_ge_wrist",
        "mr_prostatex_0000/t2tsetra",
        "mr_prostatex_0000/t2tsesag",
        "enhanced_multiframe/siemens_multiframe_anatomical_001",
    ],
)
def test_regular_volumes_have_no_problems(rows, folder: str) -> None:
    assert {(row["fate"], row["problems"]) for row in under(rows, f"dicom/{folder}")} == {("kept", "")}


def test_maps_of_a_quantity_are_left_out_unless_asked_for(rows, real_data: Path, tmp_path: Path, run_build) -> None:
    adc = real_data / "dicom" / "mr_prostatex_0000" / "ep2ddifftraDYNDISTADC"
    assert Counter((row["fate"], row["reason"]) for row in under(rows, str(adc.relative_to(real_data)))) == {
        ("excluded", "a map of diffusion; --keep-maps keeps it"): 19
    }
    perfusion = rows["dicom/enhanced_multiframe/pydicom_ect/eCT_Supplemental.dcm"]
    assert (perfusion["fate"], perfusion["reason"]) == ("excluded", "a map of perfusion; --keep-maps keeps it")
    result = run_build("--input", adc, "--output", tmp_path / "out", "--keep-maps", "--validation", 0, "--test", 0)
    assert result.code == 0, result.err
    index = pq.read_table(tmp_path / "out" / shards.INDEX).to_pylist()
    assert Counter((row["modality"], row["units"], row["units_evidence"]) for row in index) == {
        ("MR", "arbitrary", "declared"): 19
    }


def test_units_of_ct_are_proved_where_air_and_tissue_show(built, rows) -> None:
    index = pq.read_table(built[0] / shards.INDEX).to_pylist()
    evidence = {row["series"]: (row["modality"], row["units_evidence"]) for row in index}
    for folder, expected in (
        ("dicom/ct_ge_head_tilt18", ("CT", "proved")),
        ("dicom/ct_philips_phantom_brain5mm", ("CT", "declared")),  # plastic
        ("dicom/mr_ge_wrist", ("MR", "declared")),
        ("nifti/ct_abdomen_totalseg", ("CT", "proved")),
        ("nifti/ct_spine_tptbox", ("CT", "guessed")),  # a vertebra without air around
        ("nifti/mr_abdomen_totalseg", ("MR", "guessed")),
    ):
        kept = {row["series"] for row in under(rows, folder) if row["fate"] == "kept"}
        assert {evidence[series] for series in kept} == {expected}, folder


def test_planes_of_a_study(built, rows) -> None:
    index = pq.read_table(built[0] / shards.INDEX).to_pylist()
    planes = {row["series"]: row["plane"] for row in index}
    for folder, plane in (
        ("mr_prostatex_0000/t2tsetra", "axial"), ("mr_prostatex_0000/t2tsesag", "sagittal"), ("mr_ge_wrist", "coronal"),
    ):  # fmt: skip
        assert {planes[row["series"]] for row in under(rows, f"dicom/{folder}")} == {plane}


# ---- what is left out


def test_localizers_and_mislabelled_files_are_excluded(rows, real_data: Path) -> None:
    folder = real_data / "dicom" / "ct_philips_localizer_and_sc"
    for path in sorted(folder.iterdir()):
        header = dicom_header.read_header(str(path))
        row = rows[str(path.relative_to(real_data))]
        localizer = header.sop_class in exclusion.IMAGE_CLASSES
        assert row["fate"] == "excluded"
        assert row["reason"] == ("localizer or screen" if localizer else "not a CT or MR image object")
    mislabelled = under(rows, "dicom/odd/mislabelled_modality_ct_but_mr")
    assert len(mislabelled) == 17
    assert {(row["fate"], row["reason"]) for row in mislabelled} == {("excluded", "values are not HU")}


def test_damaged_files_have_fates(rows, golden) -> None:
    odd = {path: row for path, row in rows.items() if path.startswith("dicom/odd/")}
    assert set(odd) >= {row["file"] for row in golden if row["file"].startswith("dicom/odd/")}
    assert all(row["fate"] == "kept" or row["reason"] for row in odd.values())
    for name, fate in (
        # Its whole twin is elsewhere in the inputs and is kept.
        ("MR_truncated.dcm", "quarantined"), ("rtstruct.dcm", "excluded"), ("reportsi.dcm", "excluded"),
        ("SC_rgb_rle.dcm", "excluded"), ("no-pixel-data.dcm", "excluded"),
    ):  # fmt: skip
        assert odd[f"dicom/odd/{name}"]["fate"] == fate, name


def test_reasons_are_sentences(rows) -> None:
    assert rows["dicom/odd/badVR.dcm"]["reason"] == "malformed header: NumberOfFrames is not a whole number"
    quarantined = {path: row["reason"] for path, row in rows.items() if row["fate"] == "quarantined"}
    assert len(quarantined) >= 10
    for path, reason in quarantined.items():
        # No exception's name, no place in the code, no abbreviation.
        assert re.search(r"Error|Exception|\.py|\bNone\b", reason) is None, (path, reason)
        assert len(reason.split()) >= 3, path


def test_registration_images_are_kept_without_labels(rows) -> None:
    label = "label map: whole numbers in regions of one value"
    fates = {
        folder: Counter((row["fate"], row["reason"]) for row in under(rows, f"registration/{folder}"))
        for folder in (
            "mr_hippocampus_msd/images",
            "mr_hippocampus_msd/labels",
            "mr_oasis_trt_2d",
            "mr_lung_lobes",
            "ct_lung_elastix",
        )
    }
    kept = ("kept", "")
    assert fates == {
        "mr_hippocampus_msd/images": {kept: 59, ("excluded", "smaller than 32 px"): 1},
        "mr_hippocampus_msd/labels": {("excluded", label): 60},
        "mr_oasis_trt_2d": {kept: 14, ("excluded", label): 14},
        "mr_lung_lobes": {kept: 3, ("excluded", label): 6},
        "ct_lung_elastix": {
            kept: 2, ("excluded", label): 1,
            ("excluded", "not a medical image (no DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG or TIFF file)"): 1,
        },
    }  # fmt: skip
    pairs = Counter(row["fate"] for row in under(rows, "registration/prostate_mr_us"))
    # Ten label files have a fourth axis, one label each.
    assert pairs == {"kept": 16, "excluded": 6, "quarantined": 10}


def test_label_maps_are_excluded_and_images_keep_modality(built, rows) -> None:
    index = pq.read_table(built[0] / shards.INDEX).to_pylist()
    modality = {row["series"]: row["modality"] for row in index}
    kept = {path: row for path, row in rows.items() if path.startswith("nifti/") and row["fate"] == "kept"}
    left_out = [row for path, row in rows.items() if path.startswith("nifti/") and row["fate"] == "excluded"]
    # One of them is 30 slices of another, which are in once: as a part of the other, or, where it is in a split that comes
    # first, by itself. A volume without a patient gets its split from where it lies.
    again = [row["reason"] for path, row in rows.items() if path.startswith("nifti/") and row["fate"] == "duplicate"]
    assert (len(kept) + len(again), len(left_out)) == (9, 29) and set(again) <= {commit.SAME_PIXELS}
    series = {row["series"] for row in kept.values()}
    slices = [row["source"] for row in index if row["series"] in series]
    assert len(slices) == len(set(slices)) > 300
    assert {row["reason"] for row in left_out} == {"label map: whole numbers in regions of one value"}
    for path, row in kept.items():
        assert modality[row["series"]] == path.split("/")[1][:2].upper(), path


# ---- what is in


def test_hu_separate_contrast_from_plain_ct(built, rows, real_data: Path) -> None:
    with (real_data / "labelled" / "ct_luad_contrast" / "labels.csv").open(newline="") as file:
        contrast = {row["file"]: int(row["contrast"]) for row in csv.DictReader(file)}
    digests = {
        row["stored_sha256"]: contrast[Path(path).name]
        for path, row in rows.items()
        if path.startswith("labelled/") and row["fate"] == "kept" and Path(path).name in contrast
    }
    assert len(contrast) == 36 and len(digests) >= 33  # some slices are in the set twice
    scores: dict[int, list[float]] = {0: [], 1: []}
    for split in {row["split"] for row in rows.values() if row["path"].endswith(tuple(contrast)) and row["split"]}:
        source = shards.SliceSource(built[0], split)
        for n, digest in enumerate(source.index.column("source").to_pylist()):
            if digest in digests:
                one = source[n]
                assert one.facts.hu
                hu = one.pixels * one.facts.slope + one.facts.intercept
                scores[digests[digest]].append(float(((hu > 100) & (hu < 300)).mean()))
    assert len(scores[0]) + len(scores[1]) >= 33
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[1] for b in scores[0]]
    # Area under the ROC curve; 0.935 with correct HU, near 0.5 without.
    assert np.mean(pairs) >= 0.9


def test_no_patient_is_in_two_splits(built) -> None:
    splits: dict[str, set[str]] = {}
    for row in pq.read_table(built[0] / shards.INDEX).to_pylist():
        splits.setdefault(row["patient"], set()).add(row["split"])
    assert Counter(len(found) for found in splits.values()) == {1: len(splits)}
    assert set.union(*splits.values()) <= set(pseudonyms.SPLITS)


def test_every_file_is_in_the_manifest(rows, real_data: Path) -> None:
    files = {
        str(path.relative_to(real_data))
        for folder in FOLDERS
        for path in (real_data / folder).rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    assert set(rows) == files


def test_printed_summary_equals_the_card(built) -> None:
    output, err = built
    card = json.loads((output / "card.json").read_text())
    assert "Traceback" not in err and "Warning" not in err
    assert re.search(rf"^{card['slices']:,} slices of .* of {card['patients']:,} patients ", err, re.MULTILINE)
    index = pq.read_table(output / shards.INDEX)
    assert card["slices"] == len(index) > 700


# ---- privacy

IDENTIFYING = (
    "PatientName", "PatientID", "PatientBirthDate", "OtherPatientIDs", "PatientAddress", "PatientComments", "AccessionNumber", "StudyID",
    "InstitutionName", "InstitutionAddress", "StationName", "ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName",
    "PhysiciansOfRecord", "NameOfPhysiciansReadingStudy", "RequestingPhysician", "StudyDescription", "SeriesDescription", "ProtocolName",
    "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "DeviceSerialNumber", "StudyInstanceUID", "SeriesInstanceUID",
    "SOPInstanceUID", "FrameOfReferenceUID",
)  # fmt: skip


def test_no_identifying_value_of_any_header_is_in_the_dataset(built, golden, rows, real_data: Path) -> None:
    values: set[str] = set()
    texts_of_volumes = 0
    for path in sorted((real_data / "nifti").rglob("*.nii.gz")) + sorted((real_data / "registration").rglob("*.nii*")):
        header = nibabel.load(path).header
        found = [header[name].tobytes().rstrip(b"\0").decode("latin-1") for name in ("descrip", "aux_file", "db_name")]
        found += [extension.get_content() for extension in header.extensions]
        values.update(value for value in map(str, found) if len(value) >= 8)
        texts_of_volumes += any(found)
    assert texts_of_volumes > 10
    for path in rows:
        values.update(part for part in path.split("/") if len(part) >= 8)  # names of files and folders
    values.difference_update(
        part for folder in FOLDERS for part in folder.split("/")
    )  # the card names what --input names
    for path in [real_data / row["file"] for row in golden] + sorted((real_data / FOLDERS[2]).glob("*.dcm")):
        try:
            data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(IDENTIFYING), force=True)
            found = [str(data.get(name) or "").strip() for name in IDENTIFYING]
        except Exception:  # noqa: BLE001, S112 - broken on purpose; nothing of them was kept either
            continue
        # Short ones turn up anywhere; whitelisted words are in the index rightly.
        values.update(value for value in found if len(value) >= 6)
    allowed = (
        dicom_header.BODY_PARTS
        | set(dicom_header.MANUFACTURERS)
        | {"unknown", "axial", "coronal", "sagittal", "oblique", "arbitrary"}
    )
    values = {value for value in values if value.lower() not in allowed}
    assert len(values) > 200
    output, err = built
    texts = {"what was said": err, "card": (output / "card.json").read_text()}
    for name in ("index", "shards"):
        texts[name] = json.dumps(pq.read_table(output / f"{name}.parquet").to_pydict())
    manifest = pq.read_table(output / "manifest.parquet").drop_columns("path")
    texts["manifest but for paths"] = json.dumps(manifest.to_pydict())
    for path in output.glob("*.array_record-*"):
        reader = array_record_module.ArrayRecordReader(str(path), "")
        words: set[bytes] = set()
        for n in range(reader.num_records()):
            for name, feature in records.Example.FromString(reader.read([n])[0]).features.feature.items():
                words.update({name.encode()} if name == "slices" else {name.encode(), *feature.bytes_list.value})
        texts[path.name] = "\n".join(sorted(word.decode() for word in words))
    leaking = [name for name, text in texts.items() if _any_of(values, text.lower())]
    assert leaking == []
    assert _any_of(values, f"a name: {max(values, key=len).lower()}.") and not _any_of(
        {"20040119"}, "0.20040119 120040119"
    )


def _any_of(values: set[str], text: str) -> bool:
    """Whether a value stands in the text; a date that is part of a longer number does not count."""
    return any(
        value.lower() in text and (not value.isdigit() or re.search(rf"(?<![0-9.]){value}(?![0-9])", text) is not None)
        for value in values
    )
