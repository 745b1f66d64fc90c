"""The suite on its phantom: the shuffle, the test against chance, and a small run."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import suite
from tests.evaluate.test_command import save_checkpoint
from tests.scores import make_score


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
    suite.shuffle(tmp_path / "a", tmp_path / "b")
    found = columns(tmp_path / "b", "kits")
    assert found["image"] == list(range(40)) and sorted(found["target"]) == targets and found["target"] != targets
    assert found["target"][::2] == found["target"][1::2]
    # A time and its event stay together.
    assert found["event"] == [target % 2 for target in found["target"]]


def test_shuffle_mixes_rows_where_a_patient_has_several_targets(tmp_path) -> None:
    targets = [n % 8 for n in range(40)]
    write(tmp_path / "a", "anatomy-ct", targets)
    suite.shuffle(tmp_path / "a", tmp_path / "b")
    found = columns(tmp_path / "b", "anatomy-ct")["target"]
    assert sorted(found) == sorted(targets) and np.mean(np.array(found) == targets) < 0.5


def test_chance_is_judged_by_intervals_widened_for_the_number_of_tests() -> None:
    near, far = make_score(value=0.62, low=0.52, high=0.7), make_score(value=0.8, low=0.7, high=0.9)
    assert suite.outside(near) and suite.outside(far) and not suite.outside(make_score(value=0.55, low=0.45, high=0.65))
    # 0.12 is 1.2 times the half width; for 20 tests 1.54 times is allowed.
    assert suite.excess(near, 1) and not suite.excess(near, 20) and suite.excess(far, 20)
    worse = make_score(metric="r2", value=-0.5, low=-0.9, high=-0.2)
    assert not suite.excess(worse, 1) and not suite.outside(worse)


@pytest.mark.slow
def test_small_suite_scores_and_its_shuffled_labels_are_at_chance(tmp_path, capfd) -> None:
    save_checkpoint(tmp_path / "run")
    words = ["--tasks=kits,tcia-survival,ixi", "--patients=30", "--size=32", "--control-heads=ridge,cox"]
    assert suite.main([f"--backbone={tmp_path / 'run'}", f"--output={tmp_path / 'out'}", *words]) == 0
    shown = capfd.readouterr()
    assert "| protocol `ours` |" in shown.out and "| protocol `official` |" in shown.out
    assert "3 tasks with figures" in shown.out and shown.err.count("done before") == 5
