import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.format import shards
from data_pipeline.stages import summary


@pytest.fixture(scope="module")
def made(dataset: Path) -> dict[str, Any]:
    return json.loads((dataset / shards.CARD).read_text())


def text(made: dict[str, Any], **changes: Any) -> str:
    return "\n".join(summary.lines(made | changes, Path("shards"), 7.0))


def test_summary_says_what_a_dataset_holds(made: dict[str, Any]) -> None:
    found = text(made)
    lines = found.splitlines()
    assert lines[0].startswith("160 slices of 32 series of 8 patients in 12 shards, ") and lines[0].endswith("in 7 s")
    assert "  CT in Hounsfield units: 80 slices of 16 series" in lines
    assert "  MR in units of its own: 80 slices of 16 series" in lines
    assert f"files: 160 kept; each with its reason in {Path('shards/manifest.parquet')}" in lines
    assert len(lines) <= 24  # one screen
    by_split = {name: (made["slices_by"]["split"][name], made["patients_by_split"][name]) for name in ("train", "test")}
    for name, (slices, patients) in by_split.items():
        assert f"{name} {slices} slices of {patients} patient" in found


def test_units_evidence_is_summed_over_kinds(made: dict[str, Any]) -> None:
    kinds = [kind | {"series_by_units_evidence": {"proved": 15, "guessed": 1}} for kind in made["kinds"]]
    assert "units: proved by the pixels for 30 series, guessed from the values for 2 series" in text(made, kinds=kinds)


def test_refused_units_are_counted_beside_the_evidence(made: dict[str, Any]) -> None:
    assert "refused" not in text(made)
    found = text(made, units_refused={"series": 0, "slices": 1})
    assert (
        "units: proved by the pixels for 16 series, declared by the header alone for 16 series; refused for 1 slice\n"
        in found
    )
    found = text(made, units_refused={"series": 2, "slices": 1042})
    assert "; refused for 1,042 slices, 2 whole series among them\n" in found


def test_guessed_modality_is_named(made: dict[str, Any]) -> None:
    kinds = [made["kinds"][0] | {"modality_inferred": 7}, made["kinds"][1]]
    assert "16 series, modality guessed from the values of 7 slices" in text(made, kinds=kinds)


def test_five_commonest_reasons_come_with_advice(made: dict[str, Any]) -> None:
    excluded = {f"reason {'x' * n}": 10 - n for n in range(6)} | {"label map: few distinct whole numbers": 50}
    lines = text(made, reasons=made["reasons"] | {"excluded": excluded}).splitlines()
    shown = [line for line in lines if " x excluded: " in line]
    assert len(shown) == 5 and lines[lines.index(shown[-1]) + 1].startswith("  and rarer reasons")
    assert (
        shown[0].strip()
        == "50 x excluded: label map: few distinct whole numbers -> nothing to do: it is a segmentation"
    )


def test_empty_and_tiny_splits_are_pointed_out(made: dict[str, Any]) -> None:
    changes = {
        "slices_by": made["slices_by"] | {"split": {"train": 150, "test": 1}},
        "patients_by_split": {"train": 7, "validation": 0, "test": 1},
    }
    found = text(made, **changes)
    assert (
        "validation is empty: none of 8 patients fell into its share of 0.25; build anew with a larger --validation"
        in found
    )
    assert "test has 1 slice of 1 patient, too few for a score" in found
    # A split that nobody asked for is not missed.
    assert "validation is empty" not in text(made, **changes, settings=made["settings"] | {"validation": 0})
    assert "train is empty" in text(made, slices_by=made["slices_by"] | {"split": {"test": 160}})


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"patients_from": {"id": 3, "file": 217, "study": 2}}, "no patient is named for 2 studies and 217 files; each counts as a patient of its own"),
        ({"near_duplicates": {"series": 4, "of another patient": 3, "in another split": 2}}, "2 series look like one in another split"),
        ({"settings": {"planes": "coronal", "validation": 0, "test": 0}, "reformatted": 0}, "--planes coronal made nothing"),
        (
            {"reasons": {"kept": {}, "excluded": {}, "duplicate": {}, "quarantined": {"cannot be read: No such file or directory": 3}}},
            "3 files that a DICOMDIR or a link names are not there",
        ),
    ],
)  # fmt: skip
def test_notes_name_what_needs_a_look(made: dict[str, Any], changes: dict[str, Any], note: str) -> None:
    assert note in text(made, **changes) and note not in text(made)


# ---- inputs of which nothing could be used


def write_manifest(folder: Path, *rows: tuple[str, str, str]) -> None:
    columns = {name: [row[n] for row in rows] for n, name in enumerate(("path", "fate", "reason"))}
    pq.write_table(pa.table(columns), folder / shards.MANIFEST)


def test_unusable_inputs_are_found_by_their_files(tmp_path: Path) -> None:
    write_manifest(
        tmp_path,
        ("/x/good/1.dcm", "kept", ""),
        ("/x/good/2.pdf", "excluded", "not a medical image"),
        ("/x/known/1.dcm", "duplicate", "the same instance was sent twice"),
        ("/x/held/1.dcm", "excluded", "patient is held out"),
        ("/x/bad/1.dcm", "quarantined", "empty file"),
        ("/x/bad/in/2.dcm", "quarantined", "empty file"),
        ("/x/bad.zip!/in/2.dcm", "excluded", "constant"),
        ("s3://bucket/bad/1.dcm", "excluded", "constant"),
        ("s3://bucket/good/1.dcm", "kept", ""),
    )
    good = ["/x/good", "/x/known/", "/x/held", "s3://bucket/good", "/x"]
    found = summary.unusable_inputs([*good, "/x/bad", "/x/bad.zip", "s3://bucket/bad/"], tmp_path)
    assert [(one.name, one.files) for one in found] == [("/x/bad", 2), ("/x/bad.zip", 1), ("s3://bucket/bad/", 1)]
    assert found[0].reasons == "2 x empty file (transfer it again)"


def test_empty_folder_is_unusable_unless_read_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "empty" / "in").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.dcm").touch()
    write_manifest(tmp_path, ("/x/link/1.dcm", "kept", ""))
    found = summary.unusable_inputs([str(tmp_path / "empty"), str(tmp_path / "other")], tmp_path)
    assert found == [summary.Unusable(str(tmp_path / "empty"), 0, "no file")]


def test_dicomdir_stands_for_its_folder(tmp_path: Path) -> None:
    write_manifest(
        tmp_path, ("/cd/DICOMDIR", "excluded", "an index of DICOM files (DICOMDIR)"), ("/cd/A/1", "kept", "")
    )
    assert summary.unusable_inputs(["/cd/DICOMDIR"], tmp_path) == []
