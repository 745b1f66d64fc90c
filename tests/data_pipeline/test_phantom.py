import csv
from pathlib import Path

import pytest


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_bytes_follow_from_the_seed(tmp_path: Path, run_phantom) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = run_phantom("--output", tmp_path / name, "--patients", 1, "--size", 32, "--slices", 4, "--seed", seed)
        assert result.code == 0, result.err
        assert result.out == ""
    first, same, other = (tree(tmp_path / name) for name in "abc")
    assert first == same
    assert set(first) == set(other)
    assert all(first[name] != other[name] for name in first if name != "labels.csv")


def test_progress_and_result_go_to_standard_error(tmp_path: Path, run_phantom) -> None:
    err = run_phantom("--output", tmp_path / "p", "--patients", 2, "--size", 32, "--slices", 4).err
    first, last = err.splitlines()
    assert first.startswith("phantom: 2 patients in ")
    assert (
        last
        == f"2 patients in {tmp_path / 'p' / 'dicom'}; masks beside them; labels in {tmp_path / 'p' / 'labels.csv'}"
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--patients", 0], "--patients is 0; a study has 1 to 9,999 patients"),
        (["--size", 16], "a series of 24 slices of 16 px is too small; it takes at least 4 of 32 px"),
        (["--slices", 3], "a series of 3 slices of 128 px is too small"),
        (["--size", 100000], "at most 2,048"),
    ],
)
def test_invalid_size_is_refused_before_writing(tmp_path: Path, run_phantom, words: list, text: str) -> None:
    result = run_phantom("--output", tmp_path / "p", *words)
    assert result.code == 2 and text in result.error
    assert not (tmp_path / "p").exists()


def test_existing_files_are_not_overwritten(tmp_path: Path, run_phantom) -> None:
    (tmp_path / "mine").write_text("precious")
    result = run_phantom("--output", tmp_path, "--patients", 1)
    assert (result.code, result.error) == (2, f"error: {tmp_path} is not empty; name a new folder")
    assert tree(tmp_path) == {"mine": b"precious"}
    assert run_phantom("--output", tmp_path / "mine", "--patients", 1).code == 2
    result = run_phantom("--output", tmp_path / "mine" / "below", "--patients", 1, "--size", 32, "--slices", 4)
    assert result.code == 2 and "cannot create" in result.error


def test_series_and_varied_patients_are_written(tmp_path: Path, run_phantom) -> None:
    words = ["--patients", 12, "--size", 32, "--slices", 4, "--series", "abdomen_ct", "--varied"]
    assert run_phantom("--output", tmp_path / "p", *words).code == 0
    assert {path.name for path in (tmp_path / "p/dicom").glob("*/*")} == {"2_abdomen_ct"}
    with (tmp_path / "p/labels.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    situs = {line["patient"]: line["situs"] for line in lines}
    assert len(lines) == 12 * 4 and set(situs.values()) == {"solitus", "inversus"}
    assert all(situs[line["patient"]] == line["situs"] for line in lines)


def test_unknown_series_exits_2_with_the_choices(tmp_path: Path, run_phantom) -> None:
    result = run_phantom("--output", tmp_path / "p", "--series", "abdomen_ct,pelvis_ct")
    assert result.code == 2
    assert result.error == "error: --series: no series 'pelvis_ct'; there are: chest_ct, abdomen_ct, head_t1, head_t2"


# ---- suites of tasks

TWO = ("--suite=curiabench", "--patients", 3, "--size", 32)


def test_suite_bytes_follow_from_the_seed_alone(tmp_path: Path, run_phantom) -> None:
    for name, seed, tasks in (("a", 0, "ich,oasis"), ("b", 0, "oasis"), ("c", 1, "oasis")):
        result = run_phantom(*TWO, "--output", tmp_path / name, "--seed", seed, "--tasks", tasks)
        assert result.code == 0, result.err
    first, same, other = (tree(tmp_path / name / "oasis") for name in "abc")
    assert first == same and set(first) == {"train.parquet", "val.parquet", "test.parquet", "README.md"}
    assert all(first[name] != other[name] for name in first)


def test_suite_shows_progress_and_the_tasks_it_wrote(tmp_path: Path, run_phantom) -> None:
    result = run_phantom(*TWO, "--output", tmp_path / "s", "--tasks", "kits")
    assert result.out == ""
    first, last = result.err.splitlines()
    assert (
        first.startswith("phantom: 15 patients in ")
        and last == f"1 tasks in {tmp_path / 's'}; README.md says what is in them"
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--suite=curiabench", "--tasks=kits,kats"], "--tasks: no task 'kats'; there are: anatomy-ct, "),
        (["--suite=curiabench", "--varied"], "--varied is not for --suite"),
        (["--suite=curiabench", "--slices=5"], "--slices is not for --suite"),
        (["--suite=curiabench", "--patients=2"], "--patients is 2; it has to be at least 3"),
        (["--suite=curiabench", "--size=16"], "--size is 16; it has to be at least 32"),
        (["--tasks=kits"], "--tasks is only for --suite"),
    ],
)
def test_wrong_suite_option_exits_2_and_writes_nothing(tmp_path: Path, run_phantom, words: list, text: str) -> None:
    result = run_phantom("--output", tmp_path / "s", *words)
    assert result.code == 2 and text in result.error
    assert not (tmp_path / "s").exists()
