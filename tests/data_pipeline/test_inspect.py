import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curia_common.exit_codes import ExitCode
from data_pipeline.format import shards


def index_of(folder: Path) -> pa.Table:
    return pq.read_table(folder / shards.INDEX)


def test_counts_of_a_dataset(dataset: Path, run_inspect) -> None:
    result = run_inspect(dataset)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == f"{dataset}: 160 slices of 32 series of 8 patients in 12 shards"
    assert (
        "  modality     CT 80, MR 80" in lines
        and "  px           40x40 160" in lines
        and "  flags        none" in lines
    )
    assert any(line.startswith("  body_part    head 80, ") for line in lines)
    assert not any("count as one each" in line for line in lines)  # DICOM with PatientID


def test_units_evidence_is_counted_by_series(dataset: Path, tmp_path: Path, run_inspect) -> None:
    index = index_of(dataset)
    series = sorted(index["series"].unique().to_pylist())
    evidence = {
        name: "proved" if name in series[:20] else None if name in series[20:25] else "guessed" for name in series
    }
    copy = shutil.copytree(dataset, tmp_path / "copy")
    without = index.drop_columns([name for name in ("units_evidence",) if name in index.column_names])
    pq.write_table(without, copy / shards.INDEX)
    assert "  units from   declared 32 series" in run_inspect(copy).out.splitlines()
    column = pa.array([evidence[name] for name in index["series"].to_pylist()], pa.string())
    pq.write_table(without.append_column("units_evidence", column), copy / shards.INDEX)
    assert "  units from   proved 20 series, declared 5 series, guessed 7 series" in run_inspect(copy).out.splitlines()


def test_unknown_patients_are_named(dataset: Path, tmp_path: Path, run_inspect) -> None:
    index = index_of(dataset)
    copy = shutil.copytree(dataset, tmp_path / "copy")
    one = index["patient"].to_pylist()[0]
    column = pa.array(["study" if patient == one else "id" for patient in index["patient"].to_pylist()])
    place = index.column_names.index("patient_from")
    pq.write_table(index.set_column(place, "patient_from", column), copy / shards.INDEX)
    assert (
        "  patients     1 unknown: each is a file, series or study that names no patient"
        in run_inspect(copy).out.splitlines()
    )


def test_series_is_found_by_beginning_of_its_name(dataset: Path, run_inspect) -> None:
    row = index_of(dataset).to_pylist()[0]
    result = run_inspect(dataset, "--series", row["series"][:7])
    assert result.code == 0 and ": 5 slices of 1 series of 1 patients in 1 shards" in result.out
    line = result.out.splitlines()[-1].split()
    assert line[:7] == [row["series"], row["patient"], row["split"], row["modality"], row["plane"], "5", "40x40"]
    names = index_of(dataset)["series"].to_pylist()
    result = run_inspect(dataset, "--series", "none")
    assert (result.code, result.error) == (
        2, f"error: --series none: no series begins with it; an existing one is {min(names)}",
    )  # fmt: skip
    assert "series begin with it" in run_inspect(dataset, "--series", "").error


def test_slice_fields_equal_the_index(dataset: Path, run_inspect) -> None:
    index = shards.SliceSource(dataset, "test").index.to_pylist()
    for number in (0, 3, len(index) - 1):
        result = run_inspect(dataset, "--split", "test", "--slice", number)
        fields = dict(line.split(maxsplit=1) for line in result.out.splitlines() if line.startswith("  "))
        row = index[number]
        assert (
            fields["series"] == row["series"]
            and fields["source"] == row["source"]
            and fields["index"] == str(row["index"])
        )
        assert float(fields["mean"]) == pytest.approx(row["mean"], rel=1e-5)
        assert fields["spacing"].split(", ")[2] == f"{row['spacing_slices']:.6g}"
        assert fields["flags"] == "0 (none)" and "bytes for 40x40 px of 16 bit" in fields["slices"]
    result = run_inspect(dataset, "--split", "test", "--slice", len(index))
    assert (result.code, result.error) == (
        2, f"error: --slice={len(index)}: the selection has slices 0 to {len(index) - 1}",
    )  # fmt: skip


def test_contact_sheet_shows_selected_slices(dataset: Path, tmp_path: Path, run_inspect) -> None:
    ct = next(row for row in index_of(dataset).to_pylist() if row["body_part"] == "abdomen" and row["split"] == "train")
    result = run_inspect(dataset, "--series", ct["series"], "--sheet", tmp_path / "a.png", "--tile", 64, "--columns", 3)
    assert result.code == 0 and result.out.endswith(f"5 slices on {tmp_path / 'a.png'}\n")
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.ndim == 2 and picture.shape[1] == 3 * (64 + 6) + 6
    source = shards.SliceSource(dataset, "train")
    number = next(n for n, row in enumerate(source.index.to_pylist()) if row["series"] == ct["series"])
    one = source[number]
    # Soft tissue: -160 HU is black, 240 HU white. The first tile's mean is that of the slice in this window.
    hu = one.real
    wanted = np.clip((hu + 160) / 400, 0, 1).mean() * 255
    height, width = (n * mm for n, mm in zip(hu.shape, one.spacing[:2], strict=True))
    covered = min(height, width) / max(height, width)  # the rest of the square tile is black
    assert picture[6:70, 6:70].mean() == pytest.approx(wanted * covered, abs=1)
    assert run_inspect(dataset, "--sheet", tmp_path / "a.txt").error.endswith("has to end in .png")
    assert run_inspect(dataset, "--sheet", tmp_path / "none" / "a.png").code == 75


def test_diff_with_itself_is_empty(dataset: Path, run_inspect) -> None:
    result = run_inspect(dataset, "--diff", dataset)
    assert (result.code, result.out) == (0, "160 slices are the same in both\n")


def test_differences_are_counted_and_exit_65(dataset: Path, tmp_path: Path, run_inspect) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    rows = index_of(copy).to_pylist()
    rows = [row for row in rows if row["series"] != rows[-1]["series"]]
    rows[0]["mean"] += 1
    rows[0]["flags"] = rows[1]["flags"] = 2
    pq.write_table(pa.Table.from_pylist(rows), copy / shards.INDEX)
    result = run_inspect(dataset, "--diff", copy)
    assert result.code == ExitCode.DATA
    assert result.out.splitlines() == [
        "153 slices are the same in both",
        f"5 slices only in {dataset}, of 1 series",
        "2 slices differ; in how many each column: mean 1, flags 2",
    ]


def test_diff_under_other_key_compares_pixels(study: Path, tmp_path: Path, run_build, run_inspect) -> None:
    (tmp_path / "other.key").write_text("another key of sixteen bytes")
    words = ("--input", study / "dicom" / "PHANTOM-0001", "--validation", 0, "--test", 0)
    assert run_build(*words, "--output", tmp_path / "a").code == 0
    assert run_build(*words, "--output", tmp_path / "b", "--key-file", tmp_path / "other.key").code == 0
    result = run_inspect(tmp_path / "a", "--diff", tmp_path / "b")
    assert result.code == ExitCode.DATA
    assert (
        "no series in common: pseudonyms differ where the keys do; by their source pixels 20 slices are in both"
        in result.out
    )


def test_wrong_usage_is_one_line(dataset: Path, tmp_path: Path, run_inspect) -> None:
    assert "no shards in" in run_inspect(tmp_path).error
    assert "no split 'dev'" in run_inspect(dataset, "--split", "dev").error
    assert run_inspect(dataset, "--count", 0).error == "error: --count is 0; it has to be at least 1"
