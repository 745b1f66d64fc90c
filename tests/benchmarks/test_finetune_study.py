"""The study of fine-tuning on real slices: its splits, its choices and its tables, without running it."""

import dataclasses
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from benchmarks import finetune_study as study
from curia_jax.evaluate import finetuned, results
from curia_jax.evaluate.results import Fit
from tests.evaluate.test_finetuned import PROVENANCE, outputs, task
from tests.scores import make_score

RUN = Path("runs/mae")
TRUTH = np.arange(36) % 3 == 0  # of the test cases of tests/evaluate/test_finetuned.py
# The smaller the noise, the better the scores.
NOISE = {"scratch": 0.6, "full": 0.05, "lora": 0.1, "head": 0.2}


def test_validation_is_some_of_the_training_patients(real_data: Path) -> None:
    before = {row["file"]: row for row in study.real_data.label_table(real_data)}
    splits, patients = defaultdict(Counter), defaultdict(set)
    for row in study.label_table(real_data):
        was = before[row["file"]]["split"]
        assert row["split"] == was or (row["split"], was) == ("validation", "train")
        for name in study.TASKS:
            if row.get(name):
                splits[name, row["split"]][row[name]] += 1
        patients[row.get("patient") or row["file"]].add(row["split"])
    assert all(len(found) == 1 for found in patients.values())
    for name, classes in (("tumor", 4), ("covid", 2)):
        sizes = {split: splits[name, split] for split in ("train", "validation", "test")}
        assert all(len(counts) == classes and min(counts.values()) >= 25 for counts in sizes.values())
        assert 0.1 < sizes["validation"].total() / (sizes["train"].total() + sizes["validation"].total()) < 0.3


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """What the commands leave: two classes, all ways and seeds; the second rate has the smaller validation loss."""
    for name, way in study.WAYS.items():
        for rate in way.rates:
            for seed in study.SEEDS:
                folder = study.place(tmp_path, "kind", name, rate, seed)
                folder.mkdir(parents=True)
                loss = 0.5 if rate == way.rates[1] else 0.6
                (folder / "selected.json").write_text(json.dumps({"step": 7, "validation_loss": loss, "key": ""}))
                model = finetuned.Model(name, "fine-tuned", "mean", Fit(32, "", loss, None, {}), PROVENANCE)
                scores, predictions, decision = finetuned.score(
                    dataclasses.replace(task(), name="shards/kind"), model, held_out=outputs("validation", 0.1),
                    test=outputs("test", NOISE[name], seed), unit="slice", bagged=False, draws=20, seed=0, data_sha256="abc",
                )  # fmt: skip
                finetuned.write(str(folder), scores, [predictions], {"shards/kind": decision})
    rows, tables = [], []
    for head, loss, noise in (("knn", 0.4, 0.3), ("ridge", 0.3, 0.1)):
        for backbone in (str(RUN), "pixels"):
            score = make_score("shards/kind", backbone, head)
            rows.append(dataclasses.replace(score, fit=Fit(32, "", loss, None, {})))
            own = predictions.drop_columns(["backbone", "head", "scores"])
            own = own.append_column("backbone", [[backbone] * 36]).append_column("head", [[head] * 36])
            own = own.append_column("scores", pa.array(outputs("test", noise, 9).tolist()))
            tables.append(own.take(np.arange(36)[::-1]))  # in another order
    frozen = tmp_path / "frozen"
    (frozen / "shards" / "kind").mkdir(parents=True)
    (frozen / "results.json").write_text(json.dumps(results.rows(rows)))
    pq.write_table(pa.concat_tables(tables), frozen / "shards" / "kind" / "ours-predictions.parquet")
    return tmp_path


def test_rate_with_the_smallest_validation_loss_is_chosen(output: Path) -> None:
    for name, way in study.WAYS.items():
        assert study.chosen_rate(output, "kind", name) == way.rates[1]


def test_figures_are_means_over_seeds_and_differences_to_scratch(output: Path) -> None:
    found = study.compare("kind", run=RUN, output=output)
    full, scratch = (
        [roc_auc_score(TRUTH, outputs("test", NOISE[name], seed)[:, 1]) for seed in study.SEEDS]
        for name in ("full", "scratch")
    )
    frozen = accuracy_score(TRUTH, outputs("test", 0.1, 9).argmax(axis=1))  # of ridge, by the validation loss
    lines = study.markdown([found]).splitlines()
    (auroc,) = [line.split(" | ") for line in lines[: len(lines) // 2] if "full fine-tuning" in line]
    assert auroc[2:4] == [f"{study.WAYS['full'].rates[1]:g}", "0.500"]
    assert auroc[4].startswith(f"{np.mean(full):.3f} [")
    assert auroc[5].startswith(f"{np.mean(full) - np.mean(scratch):+.3f} [+")
    assert auroc[6] == ", ".join(f"{own - other:+.3f}" for own, other in zip(full, scratch, strict=True))
    (accuracy,) = [line.split(" | ") for line in lines[len(lines) // 2 :] if "frozen, best head" in line]
    assert accuracy[2:4] == ["ridge", "0.300"] and accuracy[4].startswith(f"{frozen:.3f} [")


def test_picture_of_the_seeds_is_written(output: Path, tmp_path: Path) -> None:
    study.draw([study.compare("kind", run=RUN, output=output)], tmp_path / "seeds.png")
    assert (tmp_path / "seeds.png").read_bytes().startswith(b"\x89PNG")


def test_run_that_has_not_finished_is_not_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(study, "finetune", lambda task, name, rate, seed, **named: started.append(name))
    monkeypatch.setattr(study, "chosen_rate", lambda output, task, name: study.WAYS[name].rates[0])
    (tmp_path / "events.jsonl").write_text('{"event": "saved", "step": 8}\n')
    with pytest.raises(SystemExit, match="has not finished; rerun this command when it has"):
        study.train(study.TASKS, run=tmp_path, shards=tmp_path, output=tmp_path, overrides=[])
    assert set(started) == {"scratch"}
