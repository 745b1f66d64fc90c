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
    rows = [["file", "patient", "split", "shape", "sex"]]
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
            rows.append([f"{modality}{patient}.nii", f"p{patient}", split, "tall" if patient % 2 else "flat", sex])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def save_checkpoint(workdir: Path, **changes) -> None:
    model = {**MODEL, **changes}
    params = mae.init(mae.config(**model), jax.random.key(0))
    settings = config.load("base").augment
    plain = {"model": model, "augment": json.loads(settings.to_json()), "seed": 0}
    checkpoints.save(workdir, {7: {"params": params}}, config=plain)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """A folder with shards/ and run/."""
    folder = tmp_path_factory.mktemp("study")
    write_exams(folder / "exams")
    code = build.main(
        ["--input", str(folder / "exams"), "--output", str(folder / "shards"), "--workers", "1", "--labels",
         str(folder / "exams/labels.csv"), "--label-columns", "shape", "sex", "--split-column", "split", "--patient-column",
         "patient"]
    )  # fmt: skip
    assert code == 0
    save_checkpoint(folder / "run")
    return folder


def run(study: Path, *words: str) -> int:
    return evaluate.main([f"--checkpoint={study / 'run'}", f"--shards={study / 'shards'}", *words])


@pytest.mark.long
def test_every_backbone_and_probe_is_scored_reproducibly(study, tmp_path, capsys) -> None:
    files = [tmp_path / name for name in ("first.json", "again.json")]
    for file in files:
        assert run(study, "--label=shape", f"--json={file}", f"--predictions={tmp_path / 'cases.parquet'}") == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = json.loads(files[0].read_text())
    combined = {(b, h) for b in ("checkpoint", "random", "pixels") for h in ("knn", "ridge", "logistic")}
    assert {(row["backbone"], row["head"]) for row in rows} == combined | {("none", "majority")}
    assert {row["against"] for row in rows if row["metric"] == "auroc_difference"} == {"random", "pixels"}
    for row in rows:
        assert (row["task"], row["n"], row["patients"], row["step"], row["examples_seen"]) == ("shape", 36, 6, 7, 56)
        assert row["train_n"] == 84 and row["low"] <= row["value"] <= row["high"]
    # The pixels show four pixels of height.
    best = next(r for r in rows if (r["backbone"], r["head"], r["metric"]) == ("pixels", "ridge", "auroc"))
    assert best["value"] > 0.95 and best["selection"] == "validation split"

    cases = pq.read_table(tmp_path / "cases.parquet").to_pylist()
    assert len(cases) == 9 * 36
    mine = [case for case in cases if (case["backbone"], case["head"]) == ("pixels", "ridge")]
    area = roc_auc_score([c["target"] == "tall" for c in mine], [c["scores"][1] - c["scores"][0] for c in mine])
    assert best["value"] == pytest.approx(area, abs=1e-12)

    shown = capsys.readouterr()
    assert shown.out == "" and "paired difference" in shown.err and re.search(r"features: \d+ slices in", shown.err)


def test_several_labels_series_and_layers_are_scored(study, tmp_path) -> None:
    words = ["--label=shape,modality", "--heads=ridge", "--cases=series", "--layers=1,last", "--features=cls+mean"]
    assert run(study, *words, "--backbones=checkpoint", f"--json={tmp_path / 'rows.json'}") == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["task"] for row in rows} == {"shape", "modality"} and {row["n"] for row in rows} == {12}
    assert {row["dimension"] for row in rows if "dimension" in row} == {2 * 2 * 16}
    by_task = {row["task"]: row for row in rows if (row["metric"], row["head"]) == ("auroc", "ridge")}
    assert by_task["modality"]["classes"] == ["CT", "MR"] and by_task["shape"]["classes"] == ["flat", "tall"]
    assert by_task["shape"]["value"] > 0.9


def test_permuted_test_labels_change_no_prediction(study, tmp_path) -> None:
    """Test labels swapped in the index change the figures, but neither predictions nor chosen settings."""
    words = ["--label=shape", "--heads=knn,logistic", "--backbones=pixels"]
    outputs = [[f"--json={tmp_path / f'{n}.json'}", f"--predictions={tmp_path / f'{n}.parquet'}"] for n in (0, 1)]
    assert run(study, *words, *outputs[0]) == 0
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
        assert run(study, *words, *outputs[1]) == 0
    finally:
        (study / "shards/index.parquet").write_bytes(before)
    first, turned = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1))
    for name in ("scores", "predicted"):
        assert pq.read_table(tmp_path / "0.parquet")[name].equals(pq.read_table(tmp_path / "1.parquet")[name])
    assert [row.get("chosen") for row in first] == [row.get("chosen") for row in turned]
    auroc = [
        [row["value"] for row in rows if row["metric"] == "auroc" and row["head"] == "knn"] for rows in (first, turned)
    ]
    assert auroc[0][0] == pytest.approx(1 - auroc[1][0]) and auroc[0] != auroc[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--label=shpae"],
            "error: no label 'shpae' in the shards; there are: shape, sex, modality, plane, body_part\n",
        ),
        (
            ["--label=sex"],
            "error: label 'sex' cannot be probed: every labelled slice of the test split is of class 'm'",
        ),
        (["--label=body_part"], "error: label 'body_part' cannot be probed: no slice has a value"),
        (["--label=shape", "--heads=svm"], "error: no head 'svm'; there are: knn, ridge, logistic\n"),
        (
            ["--label=shape", "--backbones=resnet"],
            "error: no backbone 'resnet'; there are: checkpoint, random, pixels\n",
        ),
        (["--label=shape", "--features=max"], "error: no features 'max'; there are: mean, std, cls, and several"),
        (["--label=shape", "--layers=9"], "error: no layer 9; this encoder has layers 1 to 2\n"),
        (["--label=shape", "--layers=first"], "error: --layers=first: write last, or numbers of blocks"),
        (["--label=shape", "--draws=0"], "error: --draws is 0; it has to be at least 1\n"),
        (["--label=shape", "--batch-size=0"], "error: --batch-size is 0; it has to be at least 1\n"),
        (["--label=shape", "--seed=-1"], "error: --seed is -1; it has to be at least 0\n"),
        (["--label=shape", "--image-sizes=0"], "error: --image-sizes=0: write numbers of px with commas"),
        (["--label=shape", "--image-sizes="], "error: --image-sizes=: write numbers of px with commas"),
        (["--label=shape", "--image-sizes=20"], "error: --image-sizes: image size (20, 20) is not a multiple"),
        (["--label=shape", "--layers=0"], "error: no layer 0; this encoder has layers 1 to 2\n"),
        (["--label=shape", "--layers=²"], "error: --layers=²: write last, or numbers of blocks"),
        (["--label=,"], "error: --label is empty; name a label of the shards"),
        (["--label=shape", "--heads=,"], "error: no head given; there are: knn, ridge, logistic\n"),
        (
            ["--label=shape", "--predictions=no/such/file"],
            "error: --predictions=no/such/file: there is no folder no/such",
        ),
        (["--label=shape", "--json=no/such/file"], "error: --json=no/such/file: there is no folder no/such"),
        (["--label=shape,plane", "--task=x"], "error: --task=x names one task, but --label has 2"),
        (["--label=shape", "--step=3"], "error: no checkpoint of step 3"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_2(study, capsys, words: list[str], line: str) -> None:
    assert run(study, *words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(line) and shown.count("\n") == 1


def test_wrong_folders_are_named_and_exit_2(study, tmp_path, capsys) -> None:
    label = "--label=shape"
    assert evaluate.main([f"--checkpoint={study / 'shards'}", f"--shards={study / 'shards'}", label]) == 2
    assert "error: no finished checkpoint in" in capsys.readouterr().err
    assert evaluate.main([f"--checkpoint={study / 'run'}", f"--shards={study / 'run'}", label]) == 2
    assert "which looks like a work directory of curia_jax.pretrain" in capsys.readouterr().err
    save_checkpoint(tmp_path / "colour", channels=3)
    assert evaluate.main([f"--checkpoint={tmp_path / 'colour'}", f"--shards={study / 'shards'}", label]) == 2
    assert "takes 3 channels, but a slice has 1" in capsys.readouterr().err


def test_shards_without_test_split_exit_2(study, tmp_path, capsys) -> None:
    words = ["--input", str(study / "exams"), "--output", str(tmp_path / "all"), "--workers", "1"]
    code = build.main([*words, "--validation", "0", "--test", "0"])
    assert code == 0
    capsys.readouterr()
    assert evaluate.main([f"--checkpoint={study / 'run'}", f"--shards={tmp_path / 'all'}", "--label=modality"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'all'} has no test split (it has: train)")


def test_features_that_are_not_finite_exit_65(study, tmp_path, capsys, monkeypatch) -> None:
    load = trained_model.load

    def broken(*words):
        loaded = load(*words)
        loaded.params["encoder"]["norm"]["bias"][0] = np.nan
        return loaded

    monkeypatch.setattr(trained_model, "load", broken)
    assert run(study, "--label=shape") == 65
    assert "error: the checkpoint features of slice 0 of split 'train' are not finite" in capsys.readouterr().err


def test_help_has_examples(capsys) -> None:
    assert evaluate.main(["--help"]) == 0
    assert "--label=situs --json=results.json" in capsys.readouterr().out
