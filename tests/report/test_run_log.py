"""The log of a run, read from its work directory."""

import json
from pathlib import Path
from typing import Any

import pytest

from curia_common.errors import DataError, UserError
from curia_jax.report import run_log

STARTED = {
    "event": "started", "step": 0, "examples_seen": 0, "time": 100.0, "total_steps": 6, "parameters": 123, "device": "cpu",
    "mesh": {"replica": 1, "data": 2, "fsdp": 4}, "peak_flops": 1e11, "peak_source": "measured",
}  # fmt: skip


def metrics(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "examples_seen": 8 * step, "loss": 1.0, "baseline_loss": 0.9, "time": 100.0 + step, **more}


def event(kind: str, step: int) -> dict[str, Any]:
    return {"event": kind, "step": step, "examples_seen": 8 * step, "time": 100.0 + step}


def write(folder: Path, lines: list[dict[str, Any]], events: list[dict[str, Any]]) -> Path:
    for name, rows in (("metrics", lines), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_log_has_lines_events_and_setup(tmp_path: Path) -> None:
    rates = [{}, {"images_per_second": 100.0, "mfu": 0.25}, {"images_per_second": 900.0, "mfu": 0.5},
             {"images_per_second": 300.0, "mfu": 0.75}]  # fmt: skip
    lines = [metrics(step, learning_rate=1e-3, **rate) for step, rate in enumerate(rates, start=1)]
    events = [STARTED, event("preempted", 2), {**STARTED, **event("resumed", 2)}, event("finished", 4)]
    log = run_log.read(write(tmp_path, lines, events))
    assert [line.step for line in log.metrics] == [1, 2, 3, 4]
    assert [one.event for one in log.events] == ["started", "preempted", "resumed", "finished"]
    assert (log.setup.total_steps, log.setup.parameters, log.setup.device) == (6, 123, "cpu")
    assert (log.images_per_second, log.mfu) == (300.0, 0.5)
    assert (log.devices, log.resumed_at) == (8, [16])


def test_rates_of_a_run_without_a_measured_interval_are_none(tmp_path: Path) -> None:
    log = run_log.read(write(tmp_path, [metrics(1)], [STARTED]))
    assert (log.images_per_second, log.mfu, log.resumed_at) == (None, None, [])


@pytest.mark.parametrize("name", ["metrics", "events"])
def test_missing_and_empty_logs_are_usage_errors(tmp_path: Path, name: str) -> None:
    write(tmp_path, [metrics(1)], [STARTED])
    (tmp_path / f"{name}.jsonl").write_text("")
    with pytest.raises(UserError, match=f"{name}.jsonl is empty: the run has not taken a step yet"):
        run_log.read(tmp_path)
    (tmp_path / f"{name}.jsonl").unlink()
    with pytest.raises(UserError, match=f"no {name}.jsonl in .*; --run takes the work directory of curia_jax.pretrain"):
        run_log.read(tmp_path)


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, [metrics(1)], [{"event": 3}, STARTED])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for wrong in ("garbage", "[]", json.dumps({**metrics(2), "loss": "high"}), '{"step": 9}'):
            file.write(wrong + "\n")
        file.write(json.dumps(metrics(3)) + '\n{"step": 4, "exam')
    log = run_log.read(tmp_path)
    assert [line.step for line in log.metrics] == [1, 3]
    assert [one.event for one in log.events] == ["started"]


@pytest.mark.parametrize("field", ["mesh", "total_steps", "peak_source"])
@pytest.mark.parametrize("value", [None, [], {"data": "two"}, True])
def test_log_without_a_whole_start_is_a_data_error(field: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no line says how the run was started"):
        run_log.read(write(tmp_path, [metrics(1)], [{**STARTED, field: value}]))
