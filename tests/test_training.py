"""The loop with fakes for the step, the batches, the checkpoints and the log: what happens, and in which order."""

import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_common.errors import StorageError
from curia_jax import checkpoint, saving, telemetry, training
from curia_jax.training import Hook, Report, StateHook


class FakeCheckpointer(saving.Checkpointer):
    """Records saves instead of saving."""

    def __init__(self, notes: list[Any], problems: dict[int, str], latest: int | None = None) -> None:
        self._notes, self._latest = notes, latest
        self._problems = problems  # step -> why its save fails
        self._done: list[saving.Ended] = []
        self.metrics: dict[int, Mapping[str, float]] = {}

    @property
    def latest_step(self) -> int | None:
        return self._latest

    def save(self, step: int, state: Any, meta: checkpoint.Meta) -> None:
        assert int(state["step"]) == step  # the state of step n has taken n steps
        self._notes.append(("save", step, meta.examples_seen))
        self.metrics[step] = meta.metrics
        self._done.append(saving.Ended(step, meta.examples_seen, self._problems.get(step), 0.25))

    def ended(self) -> list[saving.Ended]:
        done, self._done = self._done, []
        return done

    def wait(self) -> None:
        self._notes.append(("wait",))


class FakeLog(telemetry.Log):
    """Records events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, name: str, **fields: Any) -> None:
        self.events.append((name, fields))


class Loop:
    """A loop over a state that counts its steps. `bad` is (quantity, step, value): a metric of that step."""

    def __init__(self, *, start_step: int = 0, bad: tuple[str, int, float] | None = None) -> None:
        self.notes: list[Any] = []
        self.problems: dict[int, str] = {}
        self.reports: dict[int, Report] = {}
        self.start_step, self.bad = start_step, bad
        self.log, self.patience, self.refusals = FakeLog(), float("inf"), float("inf")
        self.first_loss: float | None = None
        self.checkpointer: saving.Checkpointer = FakeCheckpointer(self.notes, self.problems, start_step or None)
        self.on_pull: Callable[[int], None] = lambda number: None
        self.more_hooks: list[Hook | StateHook] = []
        self.validate: Callable[[Any], dict[str, float]] | None = None
        self._advance = jax.jit(lambda state, batch: {"step": state["step"] + 1, "sum": state["sum"] + batch})
        self.state = {"step": jnp.int32(start_step), "sum": jnp.float32(0)}
        self.scalars = {value: jnp.float32(value) for value in (0.5, 1.0, bad[2] if bad else 1.0)}
        self._advance(self.state, jnp.float32(0))  # compiled before the loop

    def batches(self) -> Iterator[Any]:
        number = self.start_step
        while True:
            self.notes.append(("pull", number))
            self.on_pull(number)
            yield jnp.float32(number)
            number += 1

    def step(self, state: Any, batch: Any) -> Any:
        number = sum(note[0] == "dispatch" for note in self.notes) + self.start_step
        self.notes.append(("dispatch", number))
        metrics = {"loss": self.scalars[0.5], "gradient_norm": self.scalars[1.0]}
        if self.bad is not None and number + 1 == self.bad[1]:
            metrics[self.bad[0]] = self.scalars[self.bad[2]]
        return self._advance(state, batch), metrics

    def report(self, report: Report) -> None:
        self.notes.append(("report", report.step))
        self.reports[report.step] = report

    def run(self, total_steps: int, *, save_every: int = 100, log_every: int = 1) -> tuple[Any, bool]:
        schedule = training.Schedule(self.start_step, total_steps, batch_size=8, examples_seen=8 * self.start_step)
        saver = training.Saver(
            self.checkpointer,
            schedule,
            lambda seen: checkpoint.Meta({"seed": 0}, seen),
            self.log,
            patience=self.patience,
            refusals=self.refusals,
            first_loss=self.first_loss,
            validate=self.validate,
        )
        hooks = [*saver.hooks(save_every), Hook(self.report, every=log_every), *self.more_hooks]
        return training.fit(self.state, self.step, self.batches(), schedule, hooks)

    def noted(self, kind: str) -> list[int]:
        return [note[1] for note in self.notes if note[0] == kind]


# ---- the contract


def test_order_is_save_pull_dispatch_report() -> None:
    """Report n is of the n-th step, number n - 1: read while the step after it is queued, or before its state is saved."""
    loop = Loop()
    state, finished = loop.run(5, save_every=3)
    assert loop.notes == [
        ("pull", 0), ("dispatch", 0),
        ("pull", 1), ("dispatch", 1), ("report", 1),
        ("pull", 2), ("dispatch", 2), ("report", 2),
        ("report", 3), ("save", 3, 24), ("pull", 3), ("dispatch", 3),
        ("pull", 4), ("dispatch", 4), ("report", 4),
        ("report", 5), ("save", 5, 40), ("wait",),
    ]  # fmt: skip
    assert finished and int(state["step"]) == 5 and float(state["sum"]) == 0 + 1 + 2 + 3 + 4


def test_resumed_loop_repeats_no_batch_and_no_save() -> None:
    loop = Loop(start_step=4)
    state, _ = loop.run(8, save_every=2)
    assert loop.noted("pull") == loop.noted("dispatch") == [4, 5, 6, 7]
    assert [note[1:] for note in loop.notes if note[0] == "save"] == [(6, 48), (8, 64)]
    assert int(state["step"]) == 8


def test_hook_gets_every_nth_step_and_the_first_and_last() -> None:
    loop = Loop()
    loop.run(11, log_every=4)
    assert loop.noted("report") == [1, 4, 8, 11]
    assert loop.reports[8].metrics == {"loss": 0.5, "gradient_norm": 1.0}


def test_state_hook_gets_the_state_of_its_step_and_finishes_once() -> None:
    loop = Loop()
    seen: list[Any] = []
    loop.more_hooks = [
        StateHook(lambda step, state: seen.append((step, int(state["step"]))), 3, lambda: seen.append("end"))
    ]
    loop.run(7)
    assert seen == [(3, 3), (6, 6), (7, 7), "end"]


def test_report_has_the_time_of_hooks_and_of_waiting_for_input(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    loop = Loop()

    def slow_batch(number: int) -> None:
        jax.block_until_ready(loop.state)
        now[0] += 2.0 if number == 4 else 0.0

    loop.on_pull = slow_batch
    loop.more_hooks = [StateHook(lambda step, state: now.__setitem__(0, now[0] + 3.0), 2)]
    loop.run(6)
    assert {step: report.hook_wait for step, report in loop.reports.items()} == {1: 0, 2: 0, 3: 3, 4: 0, 5: 3, 6: 0}
    assert {step: report.input_wait for step, report in loop.reports.items()} == {1: 0, 2: 0, 3: 0, 4: 0, 5: 2, 6: 0}


@pytest.mark.parametrize(("every", "saves"), [(3, [3, 6, 7]), (7, [7]), (100, [7]), (1, [1, 2, 3, 4, 5, 6, 7])])
def test_saves_come_every_n_steps_and_at_the_end(every: int, saves: list[int]) -> None:
    loop = Loop()
    loop.run(7, save_every=every)
    assert loop.noted("save") == saves
    saved = [fields for name, fields in loop.log.events if name == "saved"]
    assert [(fields["step"], fields["seconds"]) for fields in saved] == [(step, 0.25) for step in saves]


def test_newest_checkpoints_stay_and_are_on_disk_at_the_end(tmp_path: Path) -> None:
    loop = Loop()
    loop.checkpointer = saving.Checkpointer(str(tmp_path), keep=2)
    try:
        loop.run(7, save_every=2)
        assert checkpoint.find(str(tmp_path)).name == "7"  # fit waits for its last save
    finally:
        loop.checkpointer.close()
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["6", "7"]


def test_states_are_validated_before_they_are_saved_but_not_where_a_signal_stops() -> None:
    loop = Loop()
    loop.validate = lambda state: {"validation_loss": float(state["sum"])}
    loop.on_pull = lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 6 else None
    _, finished = loop.run(9, save_every=3)
    assert not finished and loop.noted("save") == [3, 6, 7]
    saved = cast(FakeCheckpointer, loop.checkpointer).metrics
    assert [saved[step].get("validation_loss") for step in (3, 6, 7)] == [0 + 1 + 2, 0 + 1 + 2 + 3 + 4 + 5, None]
    assert all(saved[step]["loss"] == 0.5 for step in (3, 6, 7))
    found = [fields for name, fields in loop.log.events if name == "validated"]
    assert [(one["step"], one["examples_seen"], one["validation_loss"]) for one in found] == [(3, 24, 3), (6, 48, 15)]


def test_last_state_is_validated_whatever_the_interval() -> None:
    loop = Loop()
    loop.validate = lambda state: {"validation_loss": float(state["sum"])}
    loop.run(4, save_every=3)
    assert cast(FakeCheckpointer, loop.checkpointer).metrics[4]["validation_loss"] == 6


# ---- saves that fail


def test_failed_save_is_an_event_and_training_continues() -> None:
    loop = Loop()
    loop.problems[4] = "the disk is full"
    _, finished = loop.run(9, save_every=2)
    assert finished
    saves = [(name, fields["step"]) for name, fields in loop.log.events]
    assert saves == [("saved", 2), ("save-failed", 4), ("saved", 6), ("saved", 8), ("saved", 9)]
    failed = loop.log.events[1][1]
    assert (failed["reason"], failed["last_good_step"]) == ("the disk is full", 2)


def test_failed_save_is_tried_again_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    loop = Loop()
    loop.on_pull = lambda batch: now.__setitem__(0, now[0] + 25.0)
    loop.problems[4] = "the disk is full"
    loop.run(11, save_every=4)
    assert loop.noted("save") == [4, 7, 8, 11]  # 3 steps of 25 s later


def test_saves_that_fail_for_longer_than_the_patience_end_the_run_with_75(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    loop = Loop()
    loop.patience = 100.0
    loop.on_pull = lambda batch: now.__setitem__(0, now[0] + 25.0)
    loop.problems.update(dict.fromkeys(range(4, 100), "the disk is full"))
    with pytest.raises(
        StorageError, match="no save has succeeded for 2 minutes; the newest checkpoint is step 2"
    ) as error:
        loop.run(100, save_every=2)
    assert error.value.exit_code == 75
    assert 8 <= max(loop.noted("dispatch")) <= 10


def test_last_save_that_fails_is_an_error() -> None:
    loop = Loop()
    loop.problems[4] = "the disk is full"
    with pytest.raises(StorageError, match="the last state could not be saved; the newest checkpoint is step 2"):
        loop.run(4, save_every=2)


# ---- hidden transfers


def test_hidden_transfer_in_the_step_is_an_error() -> None:
    loop = Loop()
    honest = loop.step
    loop.step = lambda state, batch: honest({**state, "sum": np.float32(0)}, batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.run(3)


# ---- divergence


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantity", ["loss", "parameter_norm"])
def test_metric_that_is_not_finite_ends_the_loop_before_a_save(quantity: str, value: float) -> None:
    loop = Loop(bad=(quantity, 6, value))
    with pytest.raises(training.Diverged) as error:
        loop.run(20, save_every=2)
    assert (str(error.value), error.value.step) == (f"{quantity} is {value} at step 6", 6)
    assert loop.noted("save") == [2, 4]  # not 6, where a save was due
    assert loop.noted("report") == [1, 2, 3, 4, 5]


def test_last_step_is_checked_before_it_is_saved() -> None:
    loop = Loop(start_step=3, bad=("loss", 5, float("nan")))
    with pytest.raises(training.Diverged, match="loss is nan at step 5"):
        loop.run(5)
    assert loop.noted("save") == []


def test_refused_update_is_neither_divergence_nor_rollback_target(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop(bad=(training.REFUSED, 6, 1.0))
    _, finished = loop.run(9, save_every=2)
    assert finished and loop.noted("save") == [2, 4, 8, 9]
    assert ("update-refused", {"step": 6, "in_a_row": 1}) in loop.log.events
    assert caplog.messages == ["step 6: update refused, loss 0.5, gradient_norm 1"]


def test_too_many_refused_updates_in_a_row_end_the_loop() -> None:
    loop = Loop(bad=(training.REFUSED, 6, 3.0))
    loop.refusals = 3
    with pytest.raises(
        training.Diverged, match=r"3 updates in a row were refused, loss 0.5, gradient_norm 1 at step 6"
    ):
        loop.run(9)


def test_loss_long_above_that_of_the_untrained_model_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """All losses are 0.5."""
    monkeypatch.setattr(training, "WORSE_STEPS", 4)
    loop = Loop(start_step=3)
    loop.first_loss = 0.32
    with pytest.raises(training.Diverged) as error:
        loop.run(20, save_every=2)
    assert str(error.value) == "the mean loss of 4 steps is 0.5, that of the untrained model was 0.32, at step 7"
    assert loop.noted("save") == [4, 6]
    for usual in (0.34, None, math.inf):  # 0.5 / 1.5 = 0.333; None: the first of this start
        loop = Loop()
        loop.first_loss = usual
        assert loop.run(20)[1]


def test_short_rise_of_the_loss_is_no_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WORSE_STEPS", 4)
    loop = Loop(bad=("loss", 6, 1.4))
    loop.first_loss = 0.5
    assert loop.run(20)[1]  # (1.4 + 3 x 0.5) / 4 = 0.725


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(number: int) -> None:
    loop = Loop()
    loop.on_pull = lambda batch: os.kill(os.getpid(), number) if batch == 4 else None
    before = signal.getsignal(number)
    state, finished = loop.run(20, log_every=10)
    assert not finished
    assert loop.noted("dispatch") == [0, 1, 2, 3, 4]  # the batch that was pulled is not lost
    assert loop.notes[-3:] == [("report", 5), ("save", 5, 40), ("wait",)]
    assert int(state["step"]) == 5
    assert signal.getsignal(number) is before


def test_second_ctrl_c_interrupts_at_once(request: pytest.FixtureRequest) -> None:
    # A shell's background jobs ignore SIGINT, and so may this process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    loop = Loop()

    def interrupt_twice(batch: int) -> None:
        if batch == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    loop.on_pull = interrupt_twice
    with pytest.raises(KeyboardInterrupt):
        loop.run(20)
    assert loop.noted("save") == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signal_where_a_save_is_due_saves_once() -> None:
    loop = Loop()
    loop.on_pull = lambda batch: os.kill(os.getpid(), signal.SIGTERM) if batch == 3 else None
    loop.run(20, save_every=4)
    assert loop.noted("save") == [4]
