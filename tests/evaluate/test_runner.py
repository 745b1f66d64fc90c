"""Tasks run one after the other: rows are written as they come, failures are rows, finished tasks are not run again."""

import json

import pyarrow as pa
import pytest

from curia_common.errors import DataError
from curia_jax.evaluate import results, runner
from tests.scores import make_score

PREDICTIONS = pa.table({"target": ["yes"]})


def job(
    task: str = "lesion", key: str = "1", fails: BaseException | None = None, calls: list[str] | None = None
) -> runner.Job:
    def run():
        if calls is not None:
            calls.append(task)
        if fails:
            raise fails
        return [make_score(task)], PREDICTIONS

    return runner.Job(task, "ours", key, run)


def test_failed_task_is_a_row_and_the_others_finish(tmp_path, capsys) -> None:
    jobs = [
        job("first", fails=DataError("mask of row 3 is 4x4, its image 8x8")), job("second"),
        runner.Job("registration", "ours", not_run="dense tasks do not exist yet"),
    ]  # fmt: skip
    outcome = runner.run(jobs, tmp_path)
    assert outcome.exit_code == 65
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["task"], row["status"], row["reason"]) for row in rows] == [
        ("first", "failed", "mask of row 3 is 4x4, its image 8x8"), ("second", "ok", None),
        ("registration", "not_run", "dense tasks do not exist yet"),
    ]  # fmt: skip
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 4


def test_unforeseen_fault_is_a_row_without_its_text_and_exits_1(tmp_path, capsys) -> None:
    outcome = runner.run([job("first", fails=ZeroDivisionError("Jane Roe")), job("second")], tmp_path)
    assert outcome.exit_code == 1 and [row["status"] for row in outcome.rows] == ["failed", "ok"]
    assert "ZeroDivisionError" in outcome.rows[0]["reason"] and "Jane" not in (tmp_path / "results.json").read_text()


def test_finished_task_runs_again_only_with_other_inputs(tmp_path) -> None:
    calls: list[str] = []
    first = runner.run([job(calls=calls)], tmp_path)
    assert runner.run([job(calls=calls)], tmp_path).rows == json.loads(json.dumps(first.rows)) and calls == ["lesion"]
    runner.run([job(calls=calls, key="2")], tmp_path)
    assert calls == ["lesion"] * 2
    (tmp_path / "lesion" / "ours.json").write_text("{")
    runner.run([job(calls=calls, key="2")], tmp_path)
    assert calls == ["lesion"] * 3


def test_interrupted_run_keeps_what_is_finished(tmp_path) -> None:
    calls: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        runner.run([job("a", calls=calls), job("b", fails=KeyboardInterrupt(), calls=calls)], tmp_path)
    assert [row["task"] for row in json.loads((tmp_path / "results.json").read_text())] == ["a"]
    runner.run([job("a", calls=calls), job("b", calls=calls)], tmp_path)
    assert calls == ["a", "b", "b"]


def test_full_disk_ends_the_run(tmp_path) -> None:
    with pytest.raises(OSError, match="No space"):
        runner.run([job(fails=OSError(28, "No space left on device"))], tmp_path)


def test_rows_are_in_the_order_of_the_jobs(tmp_path) -> None:
    rows = runner.run([job("b"), job("a")], tmp_path).rows
    assert [row["task"] for row in rows] == ["b", "a"]
    assert [score.study.task for score in results.read(tmp_path / "results.json")] == ["b", "a"]


def test_results_of_earlier_commands_into_the_folder_stay(tmp_path) -> None:
    missing = runner.Job("registration", "ours", not_run="no dense features")
    runner.run([job("a"), job("b"), missing], tmp_path)
    outcome = runner.run([job("c"), job("b", key="2", fails=DataError("no mask"))], tmp_path)
    assert [(row["task"], row["status"]) for row in outcome.rows] == [
        ("c", "ok"), ("b", "failed"), ("a", "ok"), ("registration", "not_run"),
    ]  # fmt: skip
    assert outcome.own == 2 and outcome.exit_code == 65
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(outcome.rows))
    # Another protocol is another row of the same task.
    official = runner.Job("a", "official", "1", lambda: ([make_score("a", protocol="official")], PREDICTIONS))
    both = runner.run([official], tmp_path).rows
    assert [row["protocol"] for row in both if row["task"] == "a"] == ["official", "ours"]


@pytest.mark.parametrize("content", ["{", '[{"status": "ok", "task": "a", "protocol": "ours", "labels": 1.0}]'])
def test_results_of_another_version_are_replaced_with_a_warning(content: str, tmp_path, caplog) -> None:
    (tmp_path / "results.json").write_text(content)
    assert [row["task"] for row in runner.run([job("b")], tmp_path).rows] == ["b"]
    assert "results.json has rows that cannot be kept" in caplog.text


def test_p_values_are_corrected_over_the_tasks_of_a_comparison() -> None:
    scores = [
        make_score("a", against="random", p=0.02), make_score("b", against="random", p=0.03),
        make_score("a", against="pixels", p=0.04), make_score("a"),
    ]  # fmt: skip
    rows = runner.with_holm(results.rows(scores))
    assert [row["p_holm"] for row in rows] == [0.04, 0.04, 0.04, None]
    assert [row["p"] for row in rows] == [0.02, 0.03, 0.04, None]
