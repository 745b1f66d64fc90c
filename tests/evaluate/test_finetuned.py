"""Results of fine-tuned runs: rows in the suite's form, differences to other runs, and their place beside frozen features."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from curia_common.errors import DataError, UserError
from curia_jax.evaluate import __main__ as evaluate
from curia_jax.evaluate import finetuned, labels, results, runner
from curia_jax.evaluate.results import Fit, Provenance
from tests.evaluate import published
from tests.evaluate.test_command import save_checkpoint

COUNTS = {"train": 40, "validation": 24, "test": 36}
PROVENANCE = Provenance("0" * 64, "", step=7, examples_seen=56)


def task(per_series: int = 1) -> labels.Task:
    """Two classes, a third of the cases "yes"; every series is a patient."""
    rows = [
        {"split": split, "patient": f"{split}{n // per_series}", "series": f"{split}{n // per_series}",
         "label_kind": "yes" if n // per_series % 3 == 0 else "no"}
        for split, count in COUNTS.items() for n in range(count)
    ]  # fmt: skip
    return labels.task(pa.Table.from_pylist(rows), "kind")


def outputs(split: str, noise: float, seed: int = 0, per_series: int = 1) -> np.ndarray:
    """Probabilities of "no" and "yes" that are right but for the noise, and below 0.5 for most cases of "yes"."""
    rng = np.random.default_rng([seed, *split.encode()])
    yes = np.arange(COUNTS[split]) // per_series % 3 == 0
    present = np.clip(0.1 + 0.3 * yes + noise * rng.normal(size=len(yes)), 0.01, 0.99)
    return np.stack([1 - present, present], axis=1)


def scored(
    name: str = "run, full fine-tuning",
    *,
    noise: float = 0.1,
    others=(),
    per_series: int = 1,
    unit: str = "slice",
    sha: str = "abc",
):
    model = finetuned.Model(
        name, "fine-tuned (full)", "cls", Fit(32, "validation split", 0.5, 0.9, {"step": 7}), PROVENANCE
    )
    return finetuned.score(
        task(per_series), model, held_out=outputs("validation", noise, 1, per_series), test=outputs("test", noise, 2, per_series),
        unit=unit, bagged=False, draws=200, seed=3, data_sha256=sha, others=others,
    )  # fmt: skip


def save(folder: Path, name: str, **changes) -> finetuned.Finished:
    scores, predictions, decision = scored(name, **changes)
    folder.mkdir()
    finetuned.write(str(folder), scores, [predictions], {"kind": decision})
    return finetuned.read(str(folder))


def value(rows, **wanted):
    (found,) = [row for row in rows if all(row[name] == one for name, one in wanted.items())]
    return found


def test_rows_have_the_columns_of_the_suite_and_the_right_values() -> None:
    scores, predictions, decision = scored()
    rows = results.rows(scores)
    truth, test = np.arange(36) % 3 == 0, outputs("test", 0.1, 2)
    own = {"backbone": "run, full fine-tuning", "against": None}
    auroc = value(rows, metric="auroc", **own)
    assert tuple(auroc)[: len(results.COLUMNS)] == results.COLUMNS
    assert (
        auroc["value"] == pytest.approx(roc_auc_score(truth, test[:, 1]))
        and auroc["low"] <= auroc["value"] <= auroc["high"]
    )
    # The threshold is that of the validation cases: at 0.5 hardly a case would be "yes".
    decided = (test * decision).argmax(axis=1)
    assert value(rows, metric="balanced_accuracy", **own)["value"] == pytest.approx(
        balanced_accuracy_score(truth, decided)
    )
    assert balanced_accuracy_score(truth, decided) > balanced_accuracy_score(truth, test.argmax(axis=1)) + 0.1
    for row in rows:
        assert (row["protocol"], row["seed"], row["data_sha256"], row["train_n"], row["n"]) == (
            "ours",
            3,
            "abc",
            40,
            36,
        )
    assert (auroc["weights_sha256"], auroc["step"], auroc["chosen"]) == ("0" * 64, 7, {"step": 7})
    assert {row["backbone"] for row in rows} == {"run, full fine-tuning", "majority"}
    assert predictions.column("target").to_pylist() == np.where(truth, "yes", "no").tolist()


def test_series_have_the_mean_of_their_slices() -> None:
    scores, predictions, _ = scored(per_series=3, unit="series")
    test = outputs("test", 0.1, 2, 3)[:, 1].reshape(12, 3).mean(axis=1)
    found = dict(zip(predictions.column("series").to_pylist(), predictions.column("scores").to_pylist(), strict=True))
    for number in range(12):
        assert found[f"test{number}"][1] == pytest.approx(test[number])
    assert scores[0].study.n == 12 and scores[0].study.unit == "series"


def test_difference_to_another_run_is_paired(tmp_path: Path) -> None:
    scratch = save(tmp_path / "scratch", "from scratch, full fine-tuning", noise=0.4)
    scores, _, _ = scored(others=[scratch])
    rows = results.rows(scores)
    difference = value(rows, metric="auroc", against="from scratch, full fine-tuning")
    own = value(rows, metric="auroc", against=None, backbone="run, full fine-tuning")
    theirs = value(scratch.own, metric="auroc")
    assert difference["value"] == pytest.approx(own["value"] - theirs["value"], abs=1e-12)
    assert 0 < difference["low"] and 0 < difference["p"] < 0.05
    # The rows of the other run stay in its own results.
    assert {row["backbone"] for row in rows} == {"run, full fine-tuning", "majority"}


def test_run_of_other_cases_or_another_task_is_not_compared_with(tmp_path: Path) -> None:
    other = save(tmp_path / "other", "from scratch", sha="def")
    with pytest.raises(
        DataError, match="--against=.*other: it scored other test cases of kind; fine-tune it on the same data"
    ):
        scored(others=[other])
    elsewhere = finetuned.Finished(other.place, other.rows, {"shards/age": other.tables["kind"]})
    with pytest.raises(UserError, match="it was fine-tuned for shards/age, not for kind; name a run of the same task"):
        scored(others=[elsewhere])


def test_work_directory_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the work directory of a fine-tuned run that has finished"):
        finetuned.read(str(tmp_path))
    save(tmp_path / "run", "run")
    (tmp_path / "run" / finetuned.PREDICTIONS).write_bytes(b"no table")
    with pytest.raises(DataError, match="the results of .* are damaged .*delete selected.json and rerun"):
        finetuned.read(str(tmp_path / "run"))


def frozen(data_sha256: str = "abc") -> runner.Job:
    scores, predictions, _ = scored("run", noise=0.3, sha=data_sha256)
    return runner.Job("kind", "ours", "key", run=lambda: (list(scores), predictions))


def test_fine_tuned_runs_are_listed_behind_frozen_features(tmp_path: Path) -> None:
    tuned = save(tmp_path / "tuned", "run, full fine-tuning")
    job = finetuned.beside(frozen(), [tuned])
    assert job.run is not None and job.key != "key"
    scores, predictions = job.run()
    assert list(dict.fromkeys(score.backbone for score in scores)) == ["run", "majority", "run, full fine-tuning"]
    assert set(predictions.column("backbone").to_pylist()) == {"run", "run, full fine-tuning"}
    other = runner.Job("another task", "ours", "key", run=lambda: ([], predictions))
    assert finetuned.beside(other, [tuned]) is other


def test_fine_tuned_run_on_other_data_is_not_listed_beside(tmp_path: Path) -> None:
    job = finetuned.beside(frozen("def"), [save(tmp_path / "tuned", "tuned")])
    assert job.run is not None
    with pytest.raises(
        DataError, match=r"on other data of kind \(abc\) than is scored here \(def\); name the same --data"
    ):
        job.run()


def test_two_runs_of_the_same_name_and_runs_of_other_tasks_are_refused(tmp_path: Path) -> None:
    runs = [save(tmp_path / name, "run, LoRA") for name in ("a", "b")]
    with pytest.raises(UserError, match="are both 'run, LoRA' for kind; name one of them"):
        finetuned.check_names(runs, ["kind"])
    with pytest.raises(UserError, match="it was fine-tuned for kind, which is not among the tasks to score"):
        finetuned.check_names(runs[:1], ["ich"])


@pytest.mark.long
def test_report_of_the_command_has_frozen_and_fine_tuned(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run")
    published.write(tmp_path / "data/ich", published.task())
    words = [f"--data={tmp_path}/data", f"--backbones={tmp_path}/run", f"--output={tmp_path}/out", "--tasks=ich"]
    words += ["--floors=pixels", "--heads=ridge", "--features=mean", "--draws=50"]
    assert evaluate.main(words) == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    pixels = [results.Score.from_row(row) for row in rows if row["backbone"] == "pixels"]
    (tmp_path / "tuned").mkdir()
    predictions = runner.files.read_table(tmp_path / "out/ich/ours-predictions.parquet", {})
    own = predictions.filter(pa.array([name == "pixels" for name in predictions.column("backbone").to_pylist()]))
    renamed = own.set_column(own.schema.get_field_index("backbone"), "backbone", pa.array(["tuned"] * len(own)))
    made = [results.dataclasses.replace(score, backbone="tuned") for score in pixels]
    finetuned.write(str(tmp_path / "tuned"), made, [renamed], {"ich": np.ones(2)})
    assert evaluate.main([*words, f"--finetuned={tmp_path}/tuned"]) == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert (
        value(rows, backbone="tuned", metric="auroc", against=None)["value"]
        == value(rows, backbone="pixels", metric="auroc", against=None)["value"]
    )
    assert "tuned" in (tmp_path / "out/report.html").read_text()
