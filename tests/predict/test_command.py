"""The command from exams to a table: its values, its resume, what it leaves out, and what it tells nobody."""

import csv
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
import safetensors.numpy
import scipy.special

from curia_jax.convert import __main__ as convert
from curia_jax.convert import numpy_forward
from curia_jax.models.head import HeadConfig
from curia_jax.predict import __main__ as predict
from data_pipeline.format.shards import SliceSource
from data_pipeline.stages import exams
from tests.convert import fine_tuned
from tests.predict.conftest import HEAD

SPLITS = "train+test"
RESAMPLED = 2e-4  # float32 resampling of pixels in JAX and of the export's processor, seen through the model


def by_class(path: Path) -> dict[tuple[str, str], dict]:
    return {(row["series"], row["class"]): row for row in pq.read_table(path).to_pylist()}


def slice_probabilities(weights: Path, dataset: Path) -> dict[tuple[str, int], np.ndarray]:
    """Of each slice of the dataset by series and number: the export's own processor, then its classifier in NumPy."""
    processor = runpy.run_path(str(weights / "image_processing_curia_jax.py"))["CuriaJaxImageProcessor"]
    settings = numpy_forward.read_settings("vit_classifier", json.loads((weights / "config.json").read_text()))
    tensors = numpy_forward.Tensors(safetensors.numpy.load_file(weights / "model.safetensors"))
    prepare = {hu: processor.from_pretrained(weights, hu=hu) for hu in (True, False)}
    source, found = SliceSource(dataset, SPLITS), {}
    for number, row in enumerate(source.index.to_pylist()):
        one = source[number]
        pixels = np.asarray(prepare[one.facts.hu](one.real)["pixel_values"])
        tokens = numpy_forward.features("vit_classifier", settings, tensors, pixels)
        logits = numpy_forward.logits("vit_classifier", settings, tensors, tokens)
        found[row["series"], row["index"]] = scipy.special.softmax(logits[0])
    return found


@pytest.mark.torch
@pytest.mark.parametrize("volumes", predict.VOLUMES)
def test_probabilities_are_those_of_the_exported_classifier(volumes, run, study, dataset, weights, tmp_path) -> None:
    result = run(study, tmp_path / "found.parquet", f"--volumes={volumes}")
    assert result.code == 0, result.err
    rows = pq.read_table(tmp_path / "found.parquet").to_pylist()
    assert list(rows[0]) == ["id", "series", "class", "probability", "slice"]
    wanted = slice_probabilities(weights, dataset)
    series = {name for name, _ in wanted}
    if volumes == "each":
        assert len(rows) == 3 * len(wanted)
        for row in rows:
            value = wanted[row["series"], row["slice"]][HEAD.names.index(row["class"])]
            assert row["probability"] == pytest.approx(value, abs=RESAMPLED)
        return
    assert len(rows) == 3 * len(series)
    for row in rows:
        slices = {place: values for (name, place), values in wanted.items() if name == row["series"]}
        of_class = {place: values[HEAD.names.index(row["class"])] for place, values in slices.items()}
        value = max(of_class.values()) if volumes == "max" else np.mean(list(of_class.values()))
        assert row["probability"] == pytest.approx(value, abs=RESAMPLED)
        assert of_class[row["slice"]] == pytest.approx(max(of_class.values()), abs=RESAMPLED)


def test_shards_give_the_table_of_their_exams(run, study, dataset, tmp_path) -> None:
    assert run(study, tmp_path / "exams.parquet").code == 0
    assert run(dataset, tmp_path / "shards.parquet").code == 0
    found, wanted = by_class(tmp_path / "shards.parquet"), by_class(tmp_path / "exams.parquet")
    assert found.keys() == wanted.keys()
    for place, row in wanted.items():
        assert (found[place]["id"], found[place]["slice"]) == (row["id"], row["slice"])
        assert found[place]["probability"] == pytest.approx(row["probability"], abs=1e-6)
    patients = set(SliceSource(dataset, SPLITS).index["patient"].to_pylist())
    assert {row["id"] for row in wanted.values()} == patients


def test_stopped_command_resumes_with_what_is_missing(run, study, monkeypatch, tmp_path) -> None:
    assert run(study, tmp_path / "whole.parquet").code == 0
    read, groups = exams.read, []

    def stop_after_two(some, options):
        for number, group in enumerate(read(some, options)):
            if number == 2:
                raise KeyboardInterrupt
            groups.append({exam.series for exam in group.exams})
            yield group

    monkeypatch.setattr(exams, "read", stop_after_two)
    result = run(study, tmp_path / "found.parquet")
    assert result.code == 75 and "rerun the same command to resume" in result.err
    assert not (tmp_path / "found.parquet").exists()

    before, asked = set().union(*groups), []
    monkeypatch.setattr(exams, "read", lambda some, options: asked.extend(some) or read(some, options))
    result = run(study, tmp_path / "found.parquet")
    assert result.code == 0 and f"{len(before)} of 8 series are predicted already" in result.err
    assert {exam.series for exam in asked}.isdisjoint(before) and len(asked) == 8 - len(before)
    whole, found = (by_class(tmp_path / f"{name}.parquet") for name in ("whole", "found"))
    assert found == whole
    assert {path.name for path in tmp_path.iterdir()} == {"whole.parquet", "found.parquet"}


def test_unfinished_table_of_other_options_starts_anew(run, study, monkeypatch, tmp_path) -> None:
    read = exams.read

    def stop(some, options):
        yield next(read(some, options))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exams, "read", stop)
        assert run(study, tmp_path / "found.parquet", "--volumes=max").code == 75
    result = run(study, tmp_path / "found.parquet")
    assert result.code == 0 and "of other weights or options was there: started anew" in result.err
    assert "predicted already" not in result.err


def test_finished_table_is_kept_and_another_one_refused(run, study, tmp_path) -> None:
    output = tmp_path / "found.parquet"
    assert run(study, output).code == 0
    before = output.stat().st_mtime_ns
    result = run(study, output)
    assert result.code == 0 and "has the predictions of these series already" in result.err
    result = run(study, output, "--volumes=max")
    assert result.code == 2 and "holds predictions of other weights, inputs or options" in result.err
    assert output.stat().st_mtime_ns == before and list(tmp_path.glob(".*")) == []
    (tmp_path / "notes.parquet").write_text("notes")
    result = run(study, tmp_path / "notes.parquet")
    assert result.code == 2 and "holds something else; name another one" in result.err


@pytest.fixture
def mixed(study, tmp_path) -> Path:
    """An exam, a broken volume and a text, with a name in their paths."""
    folder = tmp_path / "exams of Ada"
    series = next(path for path in sorted(study.rglob("*")) if any(path.glob("*.dcm")))
    for path in series.iterdir():
        (folder / "b").mkdir(parents=True, exist_ok=True)
        (folder / "b" / path.name).write_bytes(path.read_bytes())
    (folder / "a.nii.gz").write_bytes(b"\x1f\x8b broken")
    (folder / "letter.txt").write_text("Dear Ada")
    return folder


def test_left_out_files_are_listed_by_number_and_reason(run, mixed, tmp_path) -> None:
    result = run(mixed, tmp_path / "found.parquet")
    assert result.code == 0
    assert "2 of 7 files were left out, 1 of them because they cannot be read" in result.err
    with (tmp_path / "found.left_out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["number"], row["fate"]) for row in rows] == [("1", "quarantined"), ("7", "excluded")]
    assert list(rows[0]) == ["number", "fate", "reason"] and "not a medical image" in rows[1]["reason"]


def test_paths_appear_only_where_they_are_asked_for(run, mixed, tmp_path) -> None:
    result = run(mixed, tmp_path / "found.parquet")
    written = (tmp_path / "found.parquet").read_bytes() + (tmp_path / "found.left_out.csv").read_bytes()
    assert "Ada" not in result.out + result.err and b"Ada" not in written
    assert run(mixed, tmp_path / "named.parquet", "--paths").code == 0
    assert set(pq.read_table(tmp_path / "named.parquet")["id"].to_pylist()) == {str(mixed / "b")}
    with (tmp_path / "named.left_out.csv").open() as file:
        assert [row["path"] for row in csv.DictReader(file)] == [str(mixed / "a.nii.gz"), str(mixed / "letter.txt")]


def test_input_without_any_slice_is_data_error(run, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/letter.txt").write_text("Dear Ada")
    for _ in range(2):  # a second time it is not taken for finished
        result = run(tmp_path / "in", tmp_path / "found.parquet")
        assert result.code == 65 and "no slice of --input could be predicted; " in result.err
    assert {path.name for path in tmp_path.iterdir()} == {"in", "found.left_out.csv"}


def test_series_of_which_no_slice_is_left_are_counted(run, mixed, tmp_path) -> None:
    for path in (mixed / "b").iterdir():
        scan = pydicom.dcmread(path)
        scan.SeriesInstanceUID, scan.SOPInstanceUID = "2.25.7", f"{scan.SOPInstanceUID}.7"
        scan.PixelData = bytes(len(scan.PixelData))  # slices of one value, beside the broken volume
        scan.save_as(mixed / f"empty-{path.name}")
    result = run(mixed, tmp_path / "found.parquet", f"--json={tmp_path / 'found.json'}")
    assert result.code == 0 and "3 rows of 1 series; of 2 more no slice is left" in result.err
    assert json.loads((tmp_path / "found.json").read_text())["series"] == 1


def test_bag_of_slices_names_the_slice_it_attends_to(run, study, tmp_path) -> None:
    head = HeadConfig("attentive", "cls", "labels", ("bleed", "fracture"))
    assert run(study, tmp_path / "found.parquet", f"--weights={fine_tuned.run(head, slices=3)}").code == 0
    rows = pq.read_table(tmp_path / "found.parquet").to_pylist()
    assert len(rows) == 8 * 2 and {row["class"] for row in rows} == {"bleed", "fracture"}
    by_series = {}
    for row in rows:
        by_series.setdefault(row["series"], set()).add(row["slice"])
    # Of 5 slices the middles of three parts; one slice of a series for all its labels.
    assert all(len(places) == 1 and places <= {0, 2, 4} for places in by_series.values())


def test_value_is_in_its_units_under_its_own_column(run, study, tmp_path) -> None:
    head = HeadConfig("linear", "mean", "value", ("age",), mean=54.0, scale=2.0)
    assert run(study, tmp_path / "found.parquet", f"--weights={fine_tuned.run(head)}").code == 0
    table = pq.read_table(tmp_path / "found.parquet")
    assert table.column_names == ["id", "series", "class", "value", "slice"]
    assert set(table["class"].to_pylist()) == {"age"} and table["slice"].null_count == len(table) == 8
    assert all(30 < value < 80 for value in table["value"].to_pylist())


def test_weights_that_cannot_predict_are_refused(run, study, weights, tmp_path) -> None:
    masked = fine_tuned.run(HeadConfig("linear", "mean", "classes", ("no", "yes")), masked=True)
    result = run(study, tmp_path / "found.parquet", f"--weights={masked}")
    assert result.code == 2 and "was trained with region masks, which exams do not have" in result.err
    words = [f"--checkpoint={fine_tuned.run(HEAD)}", f"--output={tmp_path / 'vit'}", "--layout=vit"]
    assert convert.main(words) == 0
    result = run(study, tmp_path / "found.parquet", f"--weights={tmp_path / 'vit'}")
    assert result.code == 2 and "has no head: it is an encoder" in result.err
    result = run(study, tmp_path / "found.parquet", f"--weights={weights}", "--step=7")
    assert result.code == 2 and "is an export; leave it out" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]


def test_run_and_its_export_say_the_same(run, study, tmp_path) -> None:
    assert run(study, tmp_path / "export.parquet").code == 0
    assert run(study, tmp_path / "run.parquet", f"--weights={fine_tuned.run(HEAD)}", "--step=7").code == 0
    found, wanted = by_class(tmp_path / "run.parquet"), by_class(tmp_path / "export.parquet")
    assert found.keys() == wanted.keys()
    for place, row in wanted.items():
        assert found[place]["probability"] == pytest.approx(row["probability"], abs=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size=0"], "--batch-size is 0; it has to be at least 1"),
        (
            ["--output=missing/found.parquet"],
            "--output=missing/found.parquet: there is no folder missing; make it first",
        ),
        (["--input", "nothing-here"], "no such input: nothing-here"),
    ],
)
def test_wrong_option_is_one_line(words, message, run, study, tmp_path) -> None:
    result = run(study, tmp_path / "found.parquet", *words)
    assert result.code == 2 and result.err.splitlines()[-1].startswith("error: ") and message in result.err


def test_help_names_the_columns(capsys) -> None:
    assert predict.main(["--help"]) == 0
    out = capsys.readouterr().out
    for word in ("probability", "--volumes", "exit codes", "left_out.csv"):
        assert word in out
    for line in re.findall(r"^  python -m curia_jax\.predict (.*)$", out, flags=re.MULTILINE):
        assert predict.parser().parse_args(line.split())
