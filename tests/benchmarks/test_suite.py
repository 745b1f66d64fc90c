"""The suite on its phantom: the shuffle, the test against chance, and a small run."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import suite
from benchmarks.suite import Predicted
from curia_jax.evaluate import metrics
from curia_jax.evaluate.targets import Times
from tests.evaluate.test_command import save_checkpoint


def columns(folder, task: str) -> dict[str, list]:
    return pq.read_table(folder / task / "train.parquet").to_pydict()


def write(folder, task: str, targets: list[int], **more) -> None:
    (folder / task).mkdir(parents=True)
    rows = {
        "patient_id": [f"p{n // 2}" for n in range(len(targets))],
        "target": targets,
        "image": list(range(len(targets))),
    }
    pq.write_table(pa.table(rows | more), folder / task / "train.parquet")


def test_shuffle_gives_patients_the_targets_of_others(tmp_path) -> None:
    targets = [n // 2 for n in range(40)]
    write(tmp_path / "a", "kits", targets, event=[n // 2 % 2 for n in range(40)])
    (tmp_path / "a/README.md").write_text("its files")
    suite.shuffle(tmp_path / "a", tmp_path / "b", seed=0)
    assert (tmp_path / "b/README.md").read_text() == "its files"
    found = columns(tmp_path / "b", "kits")
    assert found["image"] == list(range(40)) and sorted(found["target"]) == targets and found["target"] != targets
    assert found["target"][::2] == found["target"][1::2]
    # A time and its event stay together.
    assert found["event"] == [target % 2 for target in found["target"]]


def test_shuffle_mixes_rows_where_a_patient_has_several_targets(tmp_path) -> None:
    targets = [n % 8 for n in range(40)]
    write(tmp_path / "a", "anatomy-ct", targets)
    suite.shuffle(tmp_path / "a", tmp_path / "b", seed=0)
    found = columns(tmp_path / "b", "anatomy-ct")["target"]
    assert sorted(found) == sorted(targets) and np.mean(np.array(found) == targets) < 0.5


def predicted(metric: str, seed: int, *, signal: float = 0.0, classes: int = 3, **changes) -> Predicted:
    """30 patients with two cases each, ties among times and scores; `signal` is how much the scores know of the targets."""
    r = np.random.default_rng(seed)
    of = np.repeat(np.arange(30), 2)
    targets, scores = r.permutation(np.arange(30) % classes)[of], r.normal(size=(60, classes)).round(1)
    scores += signal * np.eye(classes)[targets]
    if metric == "c_index":
        targets = Times(1.0 + targets, r.integers(0, 2, 30).astype(bool)[of])
    if metric == "r2":
        targets = targets.astype(np.float64)
    late = scores[:, -1:] - scores[:, :1]
    outputs = {"auroc": scores, "c_index": -late, "r2": late}[metric]
    return dataclasses.replace(Predicted("kits", "run", "ridge", metric, of, targets, outputs), **changes)


@pytest.mark.parametrize(("metric", "classes"), [("auroc", 2), ("auroc", 5), ("c_index", 8), ("r2", 8)])
def test_values_of_chance_are_the_metric_of_reordered_targets(metric: str, classes: int) -> None:
    one = predicted(metric, 0, classes=classes)
    drawn = suite.orders(one.patients, one.keys, 4, np.random.default_rng(0))
    assert len(np.unique(drawn, axis=0)) == 4
    function = {**metrics.METRICS, **metrics.VALUE_METRICS, **metrics.TIME_METRICS}[metric]
    wanted = [function(one.targets[order], one.scores, np.ones((1, 60)))[0] for order in (np.arange(60), *drawn)]
    np.testing.assert_allclose(one.values(np.stack([np.arange(60), *drawn])), wanted, atol=1e-12)


@pytest.mark.parametrize("metric", ["auroc", "c_index", "r2"])
def test_judge_finds_leaked_labels_and_accepts_ignorance(metric: str) -> None:
    found = [
        suite.judge([[predicted(metric, seed, signal=signal)] for seed in range(3)], draws=999)[0]
        for signal in (0.0, 1.5)
    ]
    assert found[0].low < found[0].value < found[0].high and found[0].p > 0.05
    assert found[1].value > found[1].high and found[1].p == pytest.approx(2 / 1000)


def test_judge_rejects_chance_no_more_often_than_it_says() -> None:
    figures = [suite.judge([[predicted("c_index", seed)]], draws=99)[0] for seed in range(100)]
    # 5 are expected with p <= 0.05, more than 11 in one case of two hundred.
    assert sum(figure.p <= 0.05 for figure in figures) <= 11
    assert 35 <= sum(figure.p <= 0.5 for figure in figures) <= 65


def test_all_tasks_together_show_a_leak_that_no_single_task_does() -> None:
    tasks = [predicted("auroc", seed, signal=0.25, task=f"task {seed}") for seed in range(20)]
    *single, together = suite.judge([tasks], draws=4999)
    assert min(figure.p_holm for figure in single) > 0.05 > together.p_holm
    assert (together.task, together.backbone) == (suite.ALL, "run")


@pytest.mark.slow
def test_small_suite_scores_and_its_shuffled_labels_are_at_chance(tmp_path, capfd) -> None:
    save_checkpoint(tmp_path / "run")
    words = [
        "--tasks=kits,tcia-survival,ixi",
        "--patients=30",
        "--size=32",
        "--control-heads=ridge,cox",
        "--shuffles=2",
    ]
    assert suite.main([f"--backbone={tmp_path / 'run'}", f"--output={tmp_path / 'out'}", *words]) == 0
    shown = capfd.readouterr()
    assert "| protocol `ours` |" in shown.out and "| protocol `official` |" in shown.out
    assert "3 tasks with figures" in shown.out and shown.err.count("done before") == 5
    assert "| shuffled labels | encoder |" in shown.out and "not at chance" not in shown.out
    # Images are the same: features of the shuffled copies come from the cache.
    control = shown.err[shown.err.index("shuffled/0") :]
    assert "ridge: " in control and "slices in" not in control
