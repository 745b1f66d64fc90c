import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from curia_common.exit_codes import ExitCode
from data_pipeline.format import files, shards
from data_pipeline.sources import geometry
from data_pipeline.stages import assignment, pseudonyms
from tests.data_pipeline.pictures import pictures

# ---- a good build


def test_dataset_loads_with_tfds_and_equals_its_source(study: Path, dataset: Path, manifest) -> None:
    builder = tfds.builder_from_directory(dataset)
    sources = {}
    for path, row in manifest(dataset).items():
        data = pydicom.dcmread(path)
        assert row["fate"] == "kept"
        stored = data.pixel_array.astype(int) * int(data.get("RescaleSlope", 1)) + int(data.get("RescaleIntercept", 0))
        sources[row["stored_sha256"]] = (stored, row)
    assert len(sources) == 8 * 4 * 5
    seen = set()
    for split in pseudonyms.SPLITS:
        records, slices = builder.as_data_source(split=split), shards.SliceSource(dataset, split)
        assert len(records) == builder.info.splits[split].num_examples
        number = 0
        for record in records:
            for slot, pixels in enumerate(record["slices"]):
                mine = slices[number]
                np.testing.assert_array_equal(mine.pixels, pixels)
                source = record["source"][slot].decode()
                stored, row = sources[source]
                np.testing.assert_array_equal(pixels * np.float64(record["slope"]) + record["intercept"], stored)
                assert (record["units"] == b"HU") == (record["modality"] == b"CT") == mine.facts.hu
                assert (row["split"], row["series"]) == (split, record["series"].decode())
                seen.add(source)
                number += 1
        assert number == len(slices)
    assert seen == set(sources)


def test_neither_tensorflow_nor_jax_is_needed(dataset: Path) -> None:
    code = (
        "import sys\nimport tensorflow_datasets as tfds\n"
        f"source = tfds.builder_from_directory({str(dataset)!r}).as_data_source(split='train')\n"
        "assert source[0]['slices'].dtype == 'uint16'\nimport data_pipeline.build, data_pipeline.phantom\n"
        "assert not {'jax', 'tensorflow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_index_manifest_shards_and_card_agree(dataset: Path, manifest) -> None:
    index, table = pq.read_table(dataset / shards.INDEX).to_pylist(), pq.read_table(dataset / shards.SHARDS).to_pylist()
    card, rows = json.loads((dataset / shards.CARD).read_text()), manifest(dataset)
    info = json.loads((dataset / "dataset_info.json").read_text())
    assert card["slices"] == len(index) == sum(shard["slices"] for shard in table) == 160
    assert card["patients"] == len({row["patient"] for row in index}) == 8
    assert card["series"] == len({row["series"] for row in index}) == 32
    assert card["slices_by"]["split"] == dict(Counter(row["split"] for row in index))
    assert card["slices_by"]["modality"] == {"CT": 80, "MR": 80}
    assert card["slices_by"]["body_part"] == {"abdomen": 40, "chest": 40, "head": 80}
    assert card["files"] == {"kept": 160, "excluded": 0, "duplicate": 0, "quarantined": 0}
    assert sum(card["patients_by_split"].values()) == 8
    assert [{k: shard[k] for k in ("file", "records", "sha256")} for shard in table] == [
        {k: shard[k] for k in ("file", "records", "sha256")} for shard in card["shards"]
    ]
    for shard in table:
        path = dataset / shard["file"]
        assert (shards.sha256(path), path.stat().st_size) == (shard["sha256"], shard["bytes"])
        mine = [row for row in index if row["shard"] == shard["file"]]
        assert len(mine) == shard["slices"] and len({row["record"] for row in mine}) == shard["records"]
        assert {row["split"] for row in mine} <= {shard["split"]}
    lengths = {split["name"]: [int(n) for n in split["shardLengths"]] for split in info["splits"]}
    assert lengths == {split: [s["records"] for s in table if s["split"] == split] for split in lengths}
    assert {row["shard"] for row in rows.values()} == {row["shard"] for row in index}
    assert {path.name for path in dataset.iterdir() if "array_record" in path.name} == {
        shard["file"] for shard in table
    }
    assert {row["problems"] for row in rows.values()} == {""}


def test_no_patient_is_in_two_splits_or_moves_with_more_exams(
    study: Path, dataset: Path, tmp_path: Path, run_build
) -> None:
    def splits(folder: Path) -> dict[str, str]:
        found: dict[str, set[str]] = {}
        for row in pq.read_table(folder / shards.INDEX).to_pylist():
            found.setdefault(row["patient"], set()).add(row["split"])
        assert all(len(names) == 1 for names in found.values())
        return {patient: names.pop() for patient, names in found.items()}

    whole = splits(dataset)
    assert set(whole.values()) == set(pseudonyms.SPLITS)
    some = [study / "dicom" / f"PHANTOM-{n:04d}" for n in (1, 4, 6)]
    result = run_build("--input", *some, "--output", tmp_path / "out", "--validation", 0.25, "--test", 0.25)
    assert result.code == 0, result.err
    part = splits(tmp_path / "out")
    assert len(part) == 3 and part == {patient: whole[patient] for patient in part}


@pytest.mark.long
def test_build_is_deterministic_for_any_number_of_workers(
    study: Path, dataset: Path, tmp_path: Path, run_build, contents
) -> None:
    words = ("--input", study / "dicom", "--slices-per-record", 2, "--validation", 0.25, "--test", 0.25)
    assert run_build(*words, "--output", tmp_path / "out").code == 0
    assert contents(tmp_path / "out") == contents(dataset)


def test_rerun_of_finished_build_changes_nothing(
    study: Path, dataset: Path, tmp_path: Path, run_build, contents
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in copy.glob("*array_record*")}
    result = run_build(
        "--input", study / "dicom", "--output", copy, "--slices-per-record", 2, "--validation", 0.25, "--test", 0.25
    )
    assert result.code == 0 and f"nothing new: all 160 files are in the manifest of {copy} already" in result.err
    assert contents(copy) == contents(dataset)
    assert times == {path.name: path.stat().st_mtime_ns for path in copy.glob("*array_record*")}


def test_output_of_a_build(tmp_path: Path, run_build, write_series) -> None:
    write_series(tmp_path / "in", 6)
    (tmp_path / "in" / "notes.txt").write_text("x")
    result = run_build(
        "--input", tmp_path / "in", "--output", tmp_path / "out", "--json", tmp_path / "card.json", processes=1
    )
    assert (result.code, result.out) == (0, "")
    lines = result.err.splitlines()
    assert lines[0].startswith("7 files; key from ")
    assert lines[1].startswith("inventory: 7 files in ") and lines[1].endswith(("/s", "/min"))
    assert lines[2].startswith("convert: 6 files in ")
    assert lines[3].startswith("6 slices of 1 series of 1 patient in 1 shard, ")
    assert lines[4] == "  CT in Hounsfield units: 6 slices of 1 series"
    files = lines.index(f"files: 6 kept, 1 excluded; each with its reason in {tmp_path / 'out' / 'manifest.parquet'}")
    assert (
        lines[files + 1].split()
        == (
            "1 x excluded: not a medical image (no DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG or TIFF file) -> nothing to do; "
            "if it is an image, give it the suffix of its format"
        ).split()
    )
    assert lines[-1] == f"examples, labels and counts: {tmp_path / 'out' / 'index.html'}"
    assert (tmp_path / "card.json").read_text() == (tmp_path / "out" / "card.json").read_text()
    assert stat.S_IMODE((tmp_path / "out" / "manifest.parquet").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "out" / ".build").stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in (tmp_path / "out" / ".build").rglob("*.*"))


def test_help_has_stages_examples_and_exit_codes(run_build) -> None:
    result = run_build("--help", key=False)
    assert result.code == 0
    for words in (
        "stages:",
        "exit codes:",
        "75",
        "examples:",
        "--patient-column",
        "--modality-column",
        "manifest.parquet",
    ):
        assert words in result.out


# ---- labels, splits, hold-outs


def test_labels_reach_the_index(study: Path, tmp_path: Path, run_build) -> None:
    result = run_build(
        "--input", study / "dicom" / "PHANTOM-0001", "--output", tmp_path / "out", "--labels", study / "labels.csv",
        "--label-columns", "lesion", "region",
    )  # fmt: skip
    # The table names patients that are not among the inputs.
    assert result.code == 2 and "is not among the inputs" in result.error
    result = run_build(
        "--input", study, "--output", tmp_path / "out", "--labels", study / "labels.csv",
        "--label-columns", "lesion", "region", "--patient-column", "patient",
    )  # fmt: skip
    assert result.code == 0, result.err
    index = pq.read_table(tmp_path / "out" / shards.INDEX)
    table = {Path(row["file"]): row for row in __import__("csv").DictReader((study / "labels.csv").open())}
    assert index.column("label_lesion").type == "int64" and len(index) == len(table)
    assert sum(index.column("label_lesion").to_pylist()) == sum(int(row["lesion"]) for row in table.values())
    assert Counter(index.column("label_region").to_pylist()) == Counter(row["region"] for row in table.values())
    # Nothing but the named columns, though the table has the patients too.
    assert {name for name in index.column_names if name.startswith("label_")} == {"label_lesion", "label_region"}
    assert set(index.column("patient_from").to_pylist()) == {"table"} and set(index.column("kind").to_pylist()) == {
        "dicom"
    }
    of_table = [
        row for row in pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist() if row["path"].endswith(".csv")
    ]
    assert [(row["fate"], row["reason"]) for row in of_table] == [("excluded", "the label table of --labels")]


def test_label_column_with_empty_cells_and_numbers(tmp_path: Path, run_build) -> None:
    pictures(tmp_path / "in", 4)
    (tmp_path / "labels.csv").write_text(
        "file,grade,split,kind\nin/0.png,1,train,CT\nin/1.png,,val,\nin/2.png,x,test,MR\nin/3.png,2.5,,\n"
    )
    result = run_build(
        "--input", tmp_path / "in", "--output", tmp_path / "out", "--labels", tmp_path / "labels.csv",
        "--label-columns", "grade", "--split-column", "split", "--modality-column", "kind", "--modality", "MR", "--validation", 0, "--test", 0,
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = pq.read_table(tmp_path / "out" / shards.INDEX).to_pylist()
    assert Counter((row["label_grade"], row["split"], row["modality"]) for row in rows) == Counter(
        [("1", "train", "CT"), (None, "validation", "MR"), ("x", "test", "MR"), ("2.5", "train", "MR")]
    )
    assert {(row["kind"], row["patient_from"]) for row in rows} == {
        ("image", "file")
    }  # nobody says whose pictures these are


def test_rows_of_patients_in_two_tables_label_and_split_dicom(tmp_path: Path, run_build, write_series) -> None:
    for n in range(3):
        write_series(
            tmp_path / "in" / f"{n}",
            2,
            PatientID=f"QX-77-{n}",
            StudyInstanceUID=f"2.25.987654{n + 1}",
            SeriesInstanceUID=f"2.25.{n + 1}0",
        )
    (tmp_path / "in" / "grades.csv").write_text("patient;grade\nQX-77-0;1.0\nQX-77-1;NaN\nQX-77-9;2\n")
    (tmp_path / "in" / "splits.csv").write_text("study,split\n2.25.9876541,train\n2.25.9876543,test\n")
    result = run_build(
        "--input", tmp_path / "in", "--output", tmp_path / "out", "--labels", tmp_path / "in" / "grades.csv",
        tmp_path / "in" / "splits.csv", "--label-columns", "grade", "--split-column", "split", "--validation", 0, "--test", 0,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert f"labels: nothing among the inputs for 1 rows of {tmp_path / 'in' / 'grades.csv'}: line 4" in result.err
    index = pq.read_table(tmp_path / "out" / shards.INDEX)
    rows = Counter(zip(*(index[name].to_pylist() for name in ("label_grade", "split", "patient_from")), strict=True))
    assert rows == {(1, "train", "id"): 2, (None, "train", "id"): 2, (None, "test", "id"): 2}
    assert index.column("label_grade").type == "int64"
    for path in (tmp_path / "out").rglob(
        "*"
    ):  # the ids of the tables are stored nowhere, not in the private folder either
        if path.is_file():
            text = (
                str(pq.read_table(path).to_pylist())
                if path.suffix == ".parquet"
                else path.read_bytes().decode("latin-1")
            )
            assert not any(name in text for name in ("QX-77-", "2.25.987654")), path.name


def test_label_table_with_patient_in_two_splits_is_rejected(tmp_path: Path, run_build, write_series) -> None:
    write_series(tmp_path / "in", 5)
    (tmp_path / "labels.csv").write_text("file,split\nin/000.dcm,train\nin/001.dcm,test\n")
    words = ("--input", tmp_path / "in", "--output", tmp_path / "out", "--labels", tmp_path / "labels.csv")
    result = run_build(*words, "--split-column", "split")
    assert result.code == 2 and "lines 2 and 3: one patient is in train and in test" in result.error
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".build"]


def test_held_out_patients_stay_out_when_renamed_by_labels(study: Path, tmp_path: Path, run_build) -> None:
    inputs = [study / "dicom" / f"PHANTOM-{n:04d}" for n in range(4)]
    (tmp_path / "holdout.txt").write_text(f"PHANTOM-0001\n\n{inputs[2]}\nPHANTOM-9999\n")
    rows = ["file,who"] + [
        f"{os.path.relpath(path, tmp_path)},patient {folder.name[-1]}"
        for folder in inputs for path in sorted(folder.rglob("*.dcm"))
    ]  # fmt: skip
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    words = ("--input", *inputs, "--holdout", tmp_path / "holdout.txt")
    for name, more in (("a", ()), ("b", ("--labels", tmp_path / "labels.csv", "--patient-column", "who"))):
        result = run_build(*words, *more, "--output", tmp_path / name)
        assert result.code == 0, result.err
        assert "held out: 2 of 3 lines name a patient of these inputs" in result.err
        assert (
            f"held out: nothing matches line 4 of {tmp_path / 'holdout.txt'}" in result.err and "9999" not in result.err
        )
        held = json.loads((tmp_path / name / "card.json").read_text())["held_out"]
        assert held == {"lines": 3, "matched": 2, "unmatched_lines": [4], "files": 40, "slices_found": 0}
        assert "Slices of held-out patients in the dataset: 0" in (tmp_path / name / shards.PAGE).read_text()
        kept = {
            r["path"].split("/")[-3]
            for r in pq.read_table(tmp_path / name / "manifest.parquet").to_pylist()
            if r["fate"] == "kept"
        }
        assert kept == {"PHANTOM-0000", "PHANTOM-0003"}


# ---- bad input


def test_bad_files_are_quarantined_with_reasons(tmp_path: Path, run_build, manifest, write_series) -> None:
    folder = tmp_path / "in"
    paths = write_series(folder / "series", 8)
    paths[2].unlink()  # a missing slice
    paths[5].write_bytes(paths[5].read_bytes()[:-900])
    (folder / "report.pdf").write_bytes(b"%PDF-1.7")
    (folder / "noise.dcm").write_bytes(bytes(range(256)) * 8)
    (folder / "header only.dcm").write_bytes(bytes(128) + b"DICM")
    (folder / "broken.nii.gz").write_bytes(b"\x1f\x8b broken")
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "empty.dcm").write_bytes(b"")
    latin = os.fsencode(folder) + b"/M\xfcller.nii"  # a file name that is no UTF-8
    with open(latin, "wb") as file:
        file.write(b"no volume")
    result = run_build("--input", folder, "--output", tmp_path / "out", processes=1)
    assert result.code == 0, result.err
    assert "6 kept, 2 excluded, 6 quarantined" in result.err
    rows = {Path(path).name: (row["fate"], row["reason"]) for path, row in manifest(tmp_path / "out").items()}
    assert len(rows) == 14
    assert {rows[path.name] for path in paths[:2] + paths[3:5] + paths[6:]} == {("kept", geometry.GAP)}
    assert rows["005.dcm"] == ("quarantined", "truncated: the pixel data has 2,620 of 3,520 bytes")
    assert rows["report.pdf"][0] == rows["noise.dcm"][0] == "excluded"
    assert rows["empty.dcm"] == ("quarantined", "empty file")
    for name in ("header only.dcm", "broken.nii.gz", "cut.png", "M\\xfcller.nii"):
        fate, reason = rows[name]
        assert fate == "quarantined" and reason
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert sum(sum(reasons.values()) for reasons in card["reasons"].values()) == 14


def test_unusable_inputs_are_one_line(tmp_path: Path, run_build, manifest) -> None:
    output = tmp_path / "out"
    result = run_build("--input", tmp_path / "none", "--output", output)
    assert (result.code, result.error) == (2, f"error: no such input: {tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    result = run_build("--input", tmp_path / "empty", "--output", output)
    assert result.code == ExitCode.DATA and result.error.startswith(
        f"error: no files in {tmp_path / 'empty'}; name a folder"
    )
    assert not output.exists() and not (tmp_path / "out.key").exists()
    for n in range(3):
        (tmp_path / "empty" / f"{n}.pdf").write_bytes(b"%PDF-1.7")
    result = run_build("--input", tmp_path / "empty", "--output", output)
    assert result.code == ExitCode.DATA
    assert result.error == (
        "error: none of the 3 files is a usable slice: 3 x not a medical image (no DICOM, NIfTI, NRRD, MetaImage, PNG, "
        f"JPEG or TIFF file) (nothing to do; if it is an image, give it the suffix of its format); {output / 'manifest.parquet'} has the reason of each file"
    )
    assert {row["fate"] for row in manifest(output).values()} == {"excluded"}
    # Nothing depends on a key of its own, so none is left behind; one that existed stays.
    assert run_build("--input", tmp_path / "empty", "--output", output, key=False).code == ExitCode.DATA
    assert not (tmp_path / "out.key").exists()
    (tmp_path / "out.key").write_text("a key that was here before")
    assert run_build("--input", tmp_path / "empty", "--output", output, key=False).code == ExitCode.DATA
    assert (tmp_path / "out.key").read_text() == "a key that was here before"
    # With a better input the same output can be used.
    pictures(tmp_path / "empty", 2)
    assert run_build("--input", tmp_path / "empty", "--output", output).code == 0


def test_card_of_an_older_version_is_made_anew(tmp_path: Path, run_build) -> None:
    pictures(tmp_path / "in", 2)
    words = ("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert run_build(*words).code == 0
    card, index = tmp_path / "out" / shards.CARD, tmp_path / "out" / shards.INDEX
    made = json.loads(card.read_text())
    card.write_text(json.dumps({name: made[name] for name in ("slices", "files", "shards", "near_duplicates")}))
    table = pq.read_table(index)
    pq.write_table(table.drop_columns(["kind", "patient_from"]), index)  # which older versions do not have
    result = run_build(*words)
    assert result.code == 0, result.err
    again = json.loads(card.read_text())
    assert again | {"patients_from": made["patients_from"]} == made and again["patients_from"] == {}
    assert (
        pq.read_table(index).drop_columns(["kind", "patient_from"]).equals(table.drop_columns(["kind", "patient_from"]))
    )


def test_unusable_input_beside_a_usable_one_is_a_data_error(tmp_path: Path, run_build, run_verify) -> None:
    pictures(tmp_path / "good", 2)
    for name in ("notes", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes" / "a.pdf").write_bytes(b"%PDF-1.7")
    words = ("--input", tmp_path / "good", tmp_path / "notes", tmp_path / "empty", "--output", tmp_path / "out")
    for _ in range(2):  # the second finds nothing new and says the same
        result = run_build(*words, "--json", tmp_path / "card.json")
        assert result.code == ExitCode.DATA
        assert f"nothing usable came of {tmp_path / 'notes'} (1 files: 1 x not a medical image" in result.error
        assert f"{tmp_path / 'empty'} (0 files: no file); the dataset in {tmp_path / 'out'} is complete" in result.error
        assert json.loads((tmp_path / "card.json").read_text())["slices"] == 2
    assert run_verify(tmp_path / "out").code == 0
    assert run_build("--input", tmp_path / "good", "--output", tmp_path / "out").code == 0


def test_inputs_without_slices_are_one_line(tmp_path: Path, run_build) -> None:
    Image.fromarray(np.full((40, 40), 7, np.uint8)).save(tmp_path / "flat.png")
    result = run_build("--input", tmp_path / "flat.png", "--output", tmp_path / "out")
    assert result.code == ExitCode.DATA and "none of the 1 files is a usable slice: 1 x constant" in result.error
    assert not (tmp_path / "out" / "dataset_info.json").exists() and not (tmp_path / "out" / shards.SHARDS).exists()


def test_empty_split_is_left_out(tmp_path: Path, run_build) -> None:
    pictures(tmp_path / "in", 2)
    Image.fromarray(np.full((40, 40), 7, np.uint8)).save(tmp_path / "in" / "flat.png")
    (tmp_path / "labels.csv").write_text("file,split\nin/0.png,train\nin/1.png,train\nin/flat.png,test\n")
    words = (
        "--input",
        tmp_path / "in",
        "--output",
        tmp_path / "out",
        "--labels",
        tmp_path / "labels.csv",
        "--split-column",
        "split",
    )
    for _ in range(2):
        assert run_build(*words).code == 0
        assert list(tfds.builder_from_directory(tmp_path / "out").info.splits) == ["train"]
        assert set(pq.read_table(tmp_path / "out" / shards.SHARDS)["split"].to_pylist()) == {"train"}
        assert not list((tmp_path / "out").glob("*-test.*"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--validation", "nan"], "--validation nan"),
        (["--size", 16], "--size is 16; slices under 32 px are left out, so it has to be at least 32"),
        (["--labels", "none.csv", "--label-columns", "a"], "cannot read the label table none.csv"),
        (["--holdout", "none.txt"], "cannot read --holdout=none.txt"),
        (["--key-file", "none.key"], "no key file none.key"),
        (["--json", "none/card.json"], "--json=none/card.json: there is no folder none"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path: Path, run_build, words: list, text: str) -> None:
    pictures(tmp_path / "in", 1)
    result = run_build("--input", tmp_path / "in", "--output", tmp_path / "out", *words)
    assert result.code == 2 and text in result.error
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_dataset_of_old_version_is_named(tmp_path: Path, run_build) -> None:
    pictures(tmp_path / "in", 3)
    words = ("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert run_build(*words).code == 0
    table = pq.read_table(tmp_path / "out" / shards.SHARDS)
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "out" / shards.SHARDS)
    assert "of another version of this software, which had no additions" in run_build(*words).error
    (tmp_path / "out" / shards.SHARDS).unlink()
    (tmp_path / "out" / ".build" / "plan.json").write_text("{}")
    assert "an unfinished build of another version" in run_build(*words).error


def test_square_brackets_in_paths_are_printed(tmp_path: Path, run_build) -> None:
    pictures(tmp_path / "in", 1)
    result = run_build("--input", tmp_path / "in", "--output", tmp_path / "[bold]out[/x]")
    assert result.code == 0 and "[bold]out[/x]/manifest.parquet" in result.err


# ---- trouble on the way


def test_unforeseen_fault_is_one_line_without_data(tmp_path: Path, run_build, monkeypatch) -> None:
    pictures(tmp_path / "in", 1)

    def fail(*unused):
        raise ValueError("DOE^JOHN")

    monkeypatch.setattr(assignment, "make", fail)
    result = run_build("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert result.code == 1
    assert result.error.startswith("error: unforeseen fault (ValueError at ")
    assert result.error.endswith("); please report it")
    assert "DOE" not in result.err


def test_full_disk_is_one_line(tmp_path: Path, run_build, monkeypatch) -> None:
    pictures(tmp_path / "in", 1)

    def fail(path, *unused, **more):
        raise OSError(28, "No space left on device", str(path))

    for where, name in ((shards, "write"), (files, "write_table")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fail)
            result = run_build("--input", tmp_path / "in", "--output", tmp_path / "out")
        assert result.code == ExitCode.RESTART and result.error.startswith("error: No space left on device")
    assert run_build("--input", tmp_path / "in", "--output", tmp_path / "out").code == 0


@pytest.mark.long
def test_decoder_hang_or_crash_quarantines_its_file(tmp_path: Path, exams: Path, start_build, manifest) -> None:
    for name, (patient, number) in {"hang.dcm": (1, 0), "crash.dcm": (2, 3), "bug.dcm": (3, 2)}.items():
        (exams / f"p{patient}" / f"{number:03d}.dcm").rename(exams / f"p{patient}" / name)
    running = start_build(
        "--input", exams, "--output", tmp_path / "out", "--workers", 2, "--timeout", 3,
        trouble={"hang.dcm": "hang", "crash.dcm": "crash", "bug.dcm": "bug"},
    )  # fmt: skip
    out, err = running.process.communicate(timeout=100)
    assert (running.process.returncode, out) == (0, ""), err
    assert "57 kept, 3 quarantined" in err and "Traceback" not in err and "P3" not in err
    rows = {Path(path).name: row for path, row in manifest(tmp_path / "out").items() if row["fate"] == "quarantined"}
    assert rows["hang.dcm"]["reason"] == "reading it took more than 3 s"
    assert rows["crash.dcm"]["reason"] == "the decoder crashed on it (SIGABRT)"
    assert rows["bug.dcm"]["reason"].startswith("the reader failed on it (KeyError at ")
    assert len(shards.SliceSource(tmp_path / "out", "train")) > 0


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_build_resumes_to_the_same_bytes(
    tmp_path: Path, exams: Path, start_build, run_build, contents, number: int
) -> None:
    words = ("--input", exams, "--output", tmp_path / "out", "--validation", 0, "--test", 0)
    running = start_build(*words, "--workers", 1, trouble={"*": 0.03})
    finished = running.wait_for_shards(1)
    code, err = running.stop(number)
    assert len(finished) < 4
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == ExitCode.RESTART
        assert err.splitlines()[-1].startswith("stopped; finished shards are kept, rerun the same command to resume")
        assert not list((tmp_path / "out").glob(".*.tmp"))
    assert "Traceback" not in err
    assert not (tmp_path / "out" / shards.SHARDS).exists() and not (tmp_path / "out" / "dataset_info.json").exists()
    finished = running.finished_shards()
    before = {name: (tmp_path / "out" / name).stat() for name in finished}
    again = run_build(*words)
    assert again.code == 0 and f"{len(finished)} of 4 shards are finished already" in again.err
    for name, status in before.items():
        now = (tmp_path / "out" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert run_build("--input", exams, "--output", tmp_path / "fresh", "--validation", 0, "--test", 0).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.long
def test_second_build_on_output_and_changed_input_are_rejected(
    tmp_path: Path, exams: Path, start_build, run_build
) -> None:
    words = ("--input", exams, "--output", tmp_path / "out", "--validation", 0, "--test", 0)
    running = start_build(*words, "--workers", 1, trouble={"*": 0.05})
    finished = running.wait_for_shards(1)
    result = run_build(*words)
    assert (result.code, result.error) == (
        2, f"error: another build is writing {tmp_path / 'out'}; wait for it or choose another --output",
    )  # fmt: skip
    # Files of shards that are not finished yet change.
    (lines,) = (tmp_path / "out" / ".build" / "addition-00000").glob("plan-*.jsonl")
    last = json.loads(lines.read_text().splitlines()[-1])["series"][-1]["files"][-1]["path"]
    assert len(finished) < 4
    os.utime(last, ns=(1, 1))
    _, err = running.process.communicate(timeout=60)
    assert running.process.returncode == ExitCode.DATA
    where = tmp_path / "out" / ".build" / "failed_on.txt"
    assert (
        f"error: an input changed while the build ran; rerun the same command (the path of the file is in {where})"
        in err
    )
    assert where.read_text() == f"{last}\n" and stat.S_IMODE(where.stat().st_mode) == 0o600
    assert str(exams) not in err.replace(f"--input {exams}", "")
    assert run_build(*words).code == 0
    assert not where.exists()
