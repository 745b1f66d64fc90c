"""The loop, with stand-ins for the step, the batches and what writes: what happens, and in which order."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax import checkpoint, telemetry, training


class Recorder(checkpoint.Checkpointer):
    """Notes what is saved instead of saving it."""

    def __init__(self, notes: list[Any], latest: int | None = None) -> None:
        self._notes, self._latest = notes, latest

    @property
    def latest_step(self) -> int | None:
        return self._latest

    def save(self, step: int, state: Any, *, config: Any, examples_seen: int) -> None:
        assert int(state["step"]) == step  # the state of step n has taken n steps
        self._notes.append(("save", step, examples_seen))

    def wait(self) -> None:
        self._notes.append(("wait",))


class Log(telemetry.Log):
    """Notes what is logged; `events` are kept apart."""

    def __init__(self, notes: list[Any]) -> None:
        self._notes, self.events, self.lines = notes, [], {}

    def metrics(self, step: int, values: Any) -> None:
        self._notes.append(("report", step))
        self.lines[step] = dict(values)

    def event(self, name: str, **fields: Any) -> None:
        self.events.append((name, fields))


class Loop:
    """A loop over a state that counts its steps. `bad` is (quantity, step, value): what step number `step` gives."""

    def __init__(self, *, start_step: int = 0, bad: tuple[str, int, float] | None = None) -> None:
        self.notes: list[Any] = []
        self.start_step, self.bad = start_step, bad
        self.log = Log(self.notes)
        self.checkpointer: checkpoint.Checkpointer = Recorder(self.notes, start_step or None)
        self.on_pull: Callable[[int], None] = lambda number: None
        self._advance = jax.jit(lambda state, batch: {"step": state["step"] + 1, "sum": state["sum"] + batch})
        self.state = {"step": jnp.int32(start_step), "sum": jnp.float32(0)}
        self.scalars = {value: jnp.float32(value) for value in (0.5, 1.0, bad[2] if bad else 1.0)}
        self._advance(self.state, jnp.float32(0))  # compiled outside of the loop

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
        metrics = {"loss": self.scalars[0.5], "baseline_loss": self.scalars[1.0], "gradient_norm": self.scalars[1.0]}
        if self.bad is not None and number + 1 == self.bad[1]:
            metrics[self.bad[0]] = self.scalars[self.bad[2]]
        return self._advance(state, batch), metrics

    def run(self, total_steps: int, *, save_every: int = 100, log_every: int = 1) -> tuple[Any, bool]:
        return training.fit(
            self.state, self.step, self.batches(),
            start_step=self.start_step, total_steps=total_steps, batch_size=8, examples_seen=8 * self.start_step,
            save_every_steps=save_every, log_every_steps=log_every, config={"seed": 0}, checkpointer=self.checkpointer,
            meter=telemetry.Meter(flops_per_image=1.0, peak=1.0), log=self.log, progress=None,
        )  # fmt: skip

    def noted(self, kind: str) -> list[int]:
        return [note[1] for note in self.notes if note[0] == kind]


# ---- the contract


def test_save_pull_dispatch_report_in_this_order() -> None:
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


def test_a_resumed_loop_pulls_no_batch_twice_and_does_not_save_what_it_read() -> None:
    loop = Loop(start_step=4)
    state, _ = loop.run(8, save_every=2)
    assert loop.noted("pull") == loop.noted("dispatch") == [4, 5, 6, 7]
    assert [note[1:] for note in loop.notes if note[0] == "save"] == [(6, 48), (8, 64)]
    assert [line["examples_seen"] for line in loop.log.lines.values()] == [40, 48, 56, 64]
    assert int(state["step"]) == 8


def test_the_first_and_the_last_step_are_logged_whatever_the_distance() -> None:
    loop = Loop()
    loop.run(11, log_every=4)
    assert loop.noted("report") == [1, 4, 8, 11]
    assert loop.log.lines[8]["examples_seen"] == 64
    assert loop.log.lines[8].keys() >= {"loss", "baseline_loss", "gradient_norm", "images_per_second", "mfu"}


@pytest.mark.parametrize(("every", "saves"), [(3, [3, 6, 7]), (7, [7]), (100, [7]), (1, [1, 2, 3, 4, 5, 6, 7])])
def test_saves_come_at_their_distance_and_at_the_end(every: int, saves: list[int]) -> None:
    loop = Loop()
    loop.run(7, save_every=every)
    assert loop.noted("save") == saves
    assert [fields["step"] for name, fields in loop.log.events if name == "saved"] == saves


def test_only_the_newest_checkpoints_stay_and_all_are_on_disk_at_the_end(tmp_path: Any) -> None:
    loop = Loop()
    loop.checkpointer = checkpoint.Checkpointer(str(tmp_path), keep=2)
    try:
        loop.run(7, save_every=2)
        assert checkpoint.find(str(tmp_path)).name == "7"  # fit waits for its last save
    finally:
        loop.checkpointer.close()
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["6", "7"]


# ---- hidden transfers


def test_a_transfer_hidden_in_the_step_is_an_error() -> None:
    loop = Loop()
    honest = loop.step
    loop.step = lambda state, batch: honest({**state, "sum": np.float32(0)}, batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.run(3)


# ---- losses and norms that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantity", ["loss", "gradient_norm"])
def test_what_is_not_finite_stops_the_run_with_step_quantity_and_last_good_checkpoint(
    quantity: str, value: float
) -> None:
    loop = Loop(bad=(quantity, 6, value))
    with pytest.raises(training.NonFinite) as error:
        loop.run(20, save_every=2)
    assert str(error.value) == (
        f"{quantity} is {value} at step 6; the last good checkpoint is step 4. "
        "Try a lower learning rate or --config.optimizer.clip_norm=1.0"
    )
    assert loop.noted("save") == [2, 4]  # not 6, where a save was due
    assert loop.noted("report") == [1, 2, 3, 4, 5]
    assert loop.log.events[-1] == ("non-finite", {"step": 6, "quantity": quantity, "last_good_step": 4})


@pytest.mark.parametrize(
    ("start", "good"), [(0, "there is no checkpoint yet"), (3, "the last good checkpoint is step 3")]
)
def test_the_last_step_is_checked_before_it_is_saved(start: int, good: str) -> None:
    loop = Loop(start_step=start, bad=("loss", start + 2, float("nan")))
    with pytest.raises(training.NonFinite, match=rf"loss is nan at step {start + 2}; {good}"):
        loop.run(start + 2)
    assert loop.noted("save") == []


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_so(number: int) -> None:
    loop = Loop()
    loop.on_pull = lambda batch: os.kill(os.getpid(), number) if batch == 4 else None
    before = signal.getsignal(number)
    state, finished = loop.run(20, log_every=10)
    assert not finished
    assert loop.noted("dispatch") == [0, 1, 2, 3, 4]  # the batch that was pulled is not lost
    assert loop.notes[-3:] == [("report", 5), ("save", 5, 40), ("wait",)]
    assert int(state["step"]) == 5
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts_at_once(request: pytest.FixtureRequest) -> None:
    # A shell's background jobs ignore SIGINT, and so may this process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    loop = Loop()
    loop.on_pull = lambda batch: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] if batch == 2 else None
    with pytest.raises(KeyboardInterrupt):
        loop.run(20)
    assert loop.noted("save") == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_where_a_save_is_due_saves_once() -> None:
    loop = Loop()
    loop.on_pull = lambda batch: os.kill(os.getpid(), signal.SIGTERM) if batch == 3 else None
    loop.run(20, save_every=4)
    assert loop.noted("save") == [4]
