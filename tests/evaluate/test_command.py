"""python -m curia_jax.evaluate on tiny shards and a tiny checkpoint."""

import csv
import json
import re
from pathlib import Path

import jax
import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from curia_jax import config, trained_model
from curia_jax.evaluate import __main__ as evaluate
from curia_jax.evaluate import features
from curia_jax.models import mae
from data_pipeline import build
from tests import checkpoints

MODEL = {"size": "Ti", "image_size": [16, 16], "patch_size": [8, 8], "width": 16, "depth": 2, "heads": 2,
         "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "dtype": "float32"}  # fmt: skip
PATIENTS = 20


def write_exams(folder: Path) -> None:
    """A CT and an MR of ten tall and ten flat patients, with a table of shapes, splits and patients."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :40] - 19.5
    folder.mkdir()
    rows = [["file", "patient", "split", "shape", "sex", "age"]]
    for patient in range(PATIENTS):
        split = "train" if patient < 10 else "validation" if patient < 14 else "test"
        disc = np.hypot(y / (12 + 2 * (patient % 2)), x / 14) < 1
        for modality, (inside, outside, noise) in {"CT": (40, -1000, 40), "MR": (400, 60, 60)}.items():
            values = np.where(disc, inside, outside)[:, :, None] + noise * rng.normal(size=(40, 40, 3))
            volume = np.maximum(values, -1000 if modality == "CT" else 0).astype(np.int16)
            nibabel.save(
                nibabel.Nifti1Image(volume, np.diag([2.0, 2.0, 5.0, 1.0])), folder / f"{modality}{patient}.nii"
            )
            sex = "f" if patient < PATIENTS - 6 else "m"  # the test split holds "m" alone
            rows.append(
                [f"{modality}{patient}.nii", f"p{patient}", split, "tall" if patient % 2 else "flat", sex, 30 + patient]
            )
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def save_checkpoint(workdir: Path, **changes) -> None:
    model = {**MODEL, **changes}
    params = mae.init(mae.config(**model), jax.random.key(0))
    settings = config.load("base").augment
    plain = {"model": model, "augment": json.loads(settings.to_json()), "seed": 0}
    checkpoints.save(workdir, {7: {"params": params}}, config=plain)
    (workdir / "config.json").write_text(json.dumps(plain))  # as pretrain does


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder with shards/ and run/."""
    folder = tmp_path_factory.mktemp("study")
    write_exams(folder / "exams")
    code = build.main(
        ["--input", str(folder / "exams"), "--output", str(folder / "shards"), "--workers", "1", "--labels",
         str(folder / "exams/labels.csv"), "--label-columns", "shape", "sex", "age", "--split-column", "split", "--patient-column",
         "patient"]
    )  # fmt: skip
    assert code == 0
    save_checkpoint(folder / "run")
    return folder


def run(study: Path, output: Path, *words: str) -> int:
    given = {"data": study / "shards", "backbones": study / "run", "tasks": "shards/shape", "output": output}
    typed = {word.split("=")[0].removeprefix("--") for word in words}
    return evaluate.main([f"--{name}={value}" for name, value in given.items() if name not in typed] + list(words))


def read(output: Path) -> list[dict]:
    return json.loads((output / "results.json").read_text())


@pytest.mark.long
def test_every_backbone_and_head_is_scored_reproducibly(study, tmp_path, capsys) -> None:
    outputs = [tmp_path / name for name in ("first", "again")]
    for output in outputs:
        assert run(study, output, "--features=cls,mean") == 0
    assert (outputs[0] / "results.json").read_bytes() == (outputs[1] / "results.json").read_bytes()
    rows, ours = read(outputs[0]), str(study / "run")
    combined = {(b, h) for b in (ours, "random", "pixels", "histogram") for h in ("knn", "ridge", "logistic")}
    assert {(row["backbone"], row["head"]) for row in rows} == combined | {("majority", "none")}
    differences = [row for row in rows if row["against"] is not None]
    assert {(row["backbone"], row["against"]) for row in differences} == {
        (ours, floor) for floor in ("random", "pixels", "histogram")
    }
    for row in rows:
        assert (row["task"], row["protocol"], row["labels"], row["status"]) == ("shards/shape", "ours", "100 %", "ok")
        assert (row["n"], row["patients"], row["events"], row["train_n"]) == (36, 6, 18, 84)
        assert row["low"] <= row["value"] <= row["high"] and len(row["data_sha256"]) == 64
    (checkpoint,) = {(row["step"], row["examples_seen"]) for row in rows if row["backbone"] == ours}
    assert checkpoint == (7, 56)
    assert {row["features"] for row in rows if row["backbone"] in (ours, "random")} <= {"cls", "mean"}
    # The pixels show four pixels of height.
    best = next(r for r in rows if (r["backbone"], r["head"], r["metric"]) == ("pixels", "ridge", "auroc"))
    assert best["value"] > 0.95 and best["selection"] == "validation split"
    with (outputs[0] / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["value"]) for line in lines] == [row["value"] for row in rows]

    cases = pq.read_table(outputs[0] / "shards/shape/ours-predictions.parquet").to_pylist()
    assert len(cases) == 12 * 36
    mine = [case for case in cases if (case["backbone"], case["head"]) == ("pixels", "ridge")]
    area = roc_auc_score([c["target"] == "tall" for c in mine], [c["scores"][1] - c["scores"][0] for c in mine])
    assert best["value"] == pytest.approx(area, abs=1e-12)

    page = (outputs[0] / "report.html").read_text()
    assert "ROC, reliability and confusion of shape" in page and f"--data={study / 'shards'}" in page
    assert (outputs[0] / "table.tex").read_text().count(" & auroc & ") == 1

    shown = capsys.readouterr()
    assert shown.out == "" and "paired difference" in shown.err and re.search(r"features: \d+ slices in", shown.err)


def test_second_run_computes_only_what_changed(study, tmp_path, capsys, monkeypatch) -> None:
    words = ("--heads=ridge", "--floors=pixels", "--features=mean")
    assert run(study, tmp_path, *words) == 0
    before = (tmp_path / "results.json").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(features, "extract", None)  # features are there
    assert run(study, tmp_path, *words) == 0
    assert "done before" in capsys.readouterr().err and (tmp_path / "results.json").read_bytes() == before
    # Another head needs the same features.
    assert run(study, tmp_path, "--heads=knn", *words[1:]) == 0
    assert {row["head"] for row in read(tmp_path)} == {"knn", "none"}


def test_few_labels_and_a_value_are_scored(study, tmp_path, capsys) -> None:
    words = ["--tasks=shards/shape,shards/age:value", "--heads=ridge,logistic", "--floors=pixels", "--features=mean"]
    assert run(study, tmp_path, *words, "--labels=0.5,1.0", "--draws=100") == 0
    rows = read(tmp_path)
    by_task = {task: [row for row in rows if row["task"] == task] for task in ("shards/shape", "shards/age:value")}
    assert {(row["labels"], row["seed"]) for row in by_task["shards/shape"]} == {
        ("50 %", 0),
        ("50 %", 1),
        ("50 %", 2),
        ("100 %", 0),
    }
    assert {row["metric"] for row in by_task["shards/age:value"]} == {"rmse", "mae", "r2"}
    assert {row["head"] for row in by_task["shards/age:value"]} == {"ridge", "none"}
    # Two tasks compare by the same head, but not by the same metric: nothing to correct for.
    assert all(row["p_holm"] == row["p"] for row in rows)
    assert "6 resampled groups, and 3 of the rarest class are too few" in capsys.readouterr().err


def test_several_tasks_series_and_layers_are_scored(study, tmp_path) -> None:
    words = ["--tasks=shards/shape,shards/modality", "--heads=ridge", "--cases=series", "--features=cls+mean@1+last"]
    assert run(study, tmp_path, *words, "--floors=", f"--json={tmp_path / 'rows.json'}") == 0
    rows = read(tmp_path)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert {row["task"] for row in rows} == {"shards/shape", "shards/modality"} and {row["n"] for row in rows} == {12}
    assert {row["dimension"] for row in rows if "dimension" in row} == {2 * 2 * 16}
    by_task = {row["task"]: row for row in rows if (row["metric"], row["head"]) == ("auroc", "ridge")}
    assert by_task["shards/modality"]["classes"] == ["CT", "MR"]
    assert by_task["shards/shape"]["classes"] == ["flat", "tall"] and by_task["shards/shape"]["value"] > 0.9


def test_several_backbones_are_compared_with_the_first(study, tmp_path) -> None:
    save_checkpoint(tmp_path / "other", depth=1)
    words = ["--heads=ridge", "--floors=", "--features=mean", f"--backbones={study / 'run'},{tmp_path / 'other'}"]
    assert run(study, tmp_path / "results", *words) == 0
    pairs = {(row["backbone"], row["against"]) for row in read(tmp_path / "results")}
    first, other = str(study / "run"), str(tmp_path / "other")
    assert pairs == {(first, None), (other, None), (first, other), ("majority", None)}


def test_task_that_cannot_be_scored_is_a_row_and_the_others_finish(study, tmp_path, capsys) -> None:
    words = ["--tasks=shards/sex,shards/body_part,shards/shape", "--heads=ridge", "--floors=pixels", "--features=mean"]
    assert run(study, tmp_path, *words) == 65
    failed = {row["task"]: row["reason"] for row in read(tmp_path) if row["status"] == "failed"}
    assert "every labelled slice of the test split is of class 'm'" in failed["shards/sex"]
    assert "no slice has a value" in failed["shards/body_part"]
    assert {row["task"] for row in read(tmp_path) if row["status"] == "ok"} == {"shards/shape"}
    assert "failed: shards/sex: label 'sex' cannot be probed" in capsys.readouterr().err


def test_permuted_test_labels_change_no_prediction(study, tmp_path) -> None:
    """Test labels swapped in the index change the figures, but neither predictions nor chosen settings."""
    words = ["--heads=knn,logistic", "--floors=pixels", "--features=mean"]
    outputs = tmp_path / "0", tmp_path / "1"
    assert run(study, outputs[0], *words) == 0
    index = pq.read_table(study / "shards/index.parquet")
    values = [
        {"tall": "flat", "flat": "tall"}[value] if split == "test" else value
        for split, value in zip(index["split"].to_pylist(), index["label_shape"].to_pylist(), strict=True)
    ]
    before = (study / "shards/index.parquet").read_bytes()
    try:
        pq.write_table(
            index.set_column(index.column_names.index("label_shape"), "label_shape", pa.array(values)),
            study / "shards/index.parquet",
        )
        assert run(study, outputs[1], *words) == 0
    finally:
        (study / "shards/index.parquet").write_bytes(before)
    tables = [pq.read_table(output / "shards/shape/ours-predictions.parquet") for output in outputs]
    for name in ("scores", "predicted"):
        assert tables[0][name].equals(tables[1][name])
    first, turned = map(read, outputs)
    assert [row.get("chosen") for row in first] == [row.get("chosen") for row in turned]
    assert first[0]["data_sha256"] != turned[0]["data_sha256"]
    auroc = [
        [row["value"] for row in rows if row["metric"] == "auroc" and row["head"] == "knn"] for rows in (first, turned)
    ]
    assert auroc[0][0] == pytest.approx(1 - auroc[1][0]) and auroc[0] != auroc[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--tasks=shards/shpae"],
            "error: no label 'shpae' in the shards; there are: shape, sex, age, modality, plane, body_part\n",
        ),
        (["--tasks=shape"], "error: no task 'shape'; --list shows those of CuriaBench, shards/LABEL is a label"),
        (["--heads=svm"], "error: no head 'svm'; there are: knn, ridge, logistic, cox, efficient\n"),
        (["--backbones=resnet"], "error: no backbone 'resnet': it is neither a folder nor one of the floors"),
        (["--floors=age"], "error: no floor 'age'; there are: random, pixels, histogram\n"),
        (["--features=max"], "error: no features 'max'; there are: mean, std, cls, and several"),
        (["--features=mean@9"], "error: no layer 9; this encoder has layers 1 to 2\n"),
        (["--features=mean@0"], "error: no layer 0; this encoder has layers 1 to 2\n"),
        (["--features=mean@first"], "error: features 'mean@first': after @ write last, prenorm, or numbers of blocks"),
        (["--labels=1.5"], "error: --labels=1.5: write shares above 0 up to 1.0, or whole numbers of cases"),
        (["--labels=0"], "error: --labels=0: write shares above 0 up to 1.0, or whole numbers of cases"),
        (["--labels=all"], "error: --labels=all: write shares above 0 up to 1.0, or whole numbers of cases"),
        (["--draws=0"], "error: --draws is 0; it has to be at least 1\n"),
        (["--batch-size=0"], "error: --batch-size is 0; it has to be at least 1\n"),
        (["--seed=-1"], "error: --seed is -1; it has to be at least 0\n"),
        (["--image-sizes=0"], "error: --image-sizes=0: write numbers of px with commas"),
        (["--image-sizes="], "error: --image-sizes=: write numbers of px with commas"),
        (["--image-sizes=20"], "error: --image-sizes: image size (20, 20) is not a multiple"),
        (["--tasks=,"], "error: --tasks is empty; see --help\n"),
        (["--heads=,"], "error: --heads is empty; see --help\n"),
        (["--json=no/such/file"], "error: --json=no/such/file: there is no folder no/such"),
        (["--checkpoint=demo/run"], "error: --checkpoint is now --backbones=RUN; see --help\n"),
        (["--shards=demo/shards"], "error: --shards is now --data=SHARDS; see --help\n"),
        (["--label=situs"], "error: --label is now --tasks=shards/LABEL; see --help\n"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_2(study, tmp_path, capsys, words: list[str], line: str) -> None:
    assert run(study, tmp_path, *words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(line) and shown.count("\n") == 1


def test_old_command_is_answered_with_the_new_option(capsys) -> None:
    assert evaluate.main(["--checkpoint=demo/run", "--shards=demo/shards", "--label=situs", "--json=x.json"]) == 2
    assert capsys.readouterr().err == "error: --checkpoint is now --backbones=RUN; see --help\n"


def test_output_that_cannot_be_written_is_refused_before_the_work(study, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert run(study, tmp_path / "file") == 2
    assert capsys.readouterr().err == f"error: --output={tmp_path / 'file'} is a file; name a folder\n"
    assert run(study, tmp_path / "file" / "below") == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_wrong_folders_are_named_and_exit_2(study, tmp_path, capsys) -> None:
    assert run(study, tmp_path / "out", f"--backbones={study / 'shards'}") == 2
    assert "error: no finished checkpoint in" in capsys.readouterr().err
    assert run(study, tmp_path / "out", f"--data={study / 'run'}") == 2
    assert "which looks like a work directory of curia_jax.pretrain" in capsys.readouterr().err
    save_checkpoint(tmp_path / "colour", channels=3)
    assert run(study, tmp_path / "out", f"--backbones={tmp_path / 'colour'}") == 2
    assert "takes 3 channels, but a slice has 1" in capsys.readouterr().err


def test_shards_without_test_split_exit_2(study, tmp_path, capsys) -> None:
    words = ["--input", str(study / "exams"), "--output", str(tmp_path / "all"), "--workers", "1"]
    code = build.main([*words, "--validation", "0", "--test", "0"])
    assert code == 0
    capsys.readouterr()
    assert run(study, tmp_path / "out", f"--data={tmp_path / 'all'}", "--tasks=shards/modality") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'all'} has no test split (it has: train)")


def test_features_that_are_not_finite_exit_65(study, tmp_path, capsys, monkeypatch) -> None:
    load = trained_model.load

    def broken(*words):
        loaded = load(*words)
        loaded.params["encoder"]["norm"]["bias"][0] = np.nan
        return loaded

    monkeypatch.setattr(trained_model, "load", broken)
    assert run(study, tmp_path) == 65
    (row,) = read(tmp_path)
    assert f"the {study / 'run'} features of slice 0 of split 'train' are not finite" in row["reason"]


def test_help_has_examples(capsys) -> None:
    assert evaluate.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--tasks=shards/situs --data=demo/shards --backbones=demo/run --output=results" in shown
    assert "--checkpoint" not in shown


@pytest.mark.long
def test_label_of_shards_is_scored_across_modalities(study, tmp_path) -> None:
    words = ("--floors=pixels", "--heads=ridge", "--features=mean", "--draws=100")
    assert run(study, tmp_path, *words) == 0
    together = read(tmp_path)
    assert run(study, tmp_path, "--across=modality", *words) == 0
    rows = read(tmp_path)
    kept = [row for row in rows if row["across"] is None]
    assert kept and [row | {"p_holm": None} for row in kept] == [row | {"p_holm": None} for row in together]
    assert len(list((tmp_path / "shards/shape").glob("*-predictions.parquet"))) == 2
    rows = [row for row in rows if row["metric"] == "auroc" and row["across"] == "modality"]
    values = [row for row in rows if row["against"] is None]
    assert {(row["trained_on"], row["tested_on"]) for row in values} == {
        (a, b) for a in ("CT", "MR") for b in ("CT", "MR")
    }
    # Half of the slices of all patients; every patient has both, so that differences are paired by patient.
    assert {(row["n"], row["patients"], row["train_n"], row["train_patients"]) for row in values} == {(18, 6, 42, 14)}
    lost = {
        (row["trained_on"], row["against"]) for row in rows if row["against"] and row["against"][:4] in ("trai", "test")
    }
    assert lost == {("CT", "trained on MR"), ("CT", "tested on CT"), ("MR", "trained on CT"), ("MR", "tested on MR")}
    # The shape is the same in both: what was learned from one modality is seen in the other.
    assert all(row["value"] > 0.8 for row in values if row["backbone"] == "pixels")
    assert "shape, protocol ours: what is lost across" in (tmp_path / "report.html").read_text()
