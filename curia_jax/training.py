"""The training loop of both stages, and the hooks that save and check.

The order inside a step is a contract, because it decides which examples a checkpoint counts:

  save the state of step n  ->  pull batch n  ->  dispatch step n  ->  report step n - 1

The checkpoint of step n has seen the batches 0 … n - 1 and no other, and the devices always have a step queued while the host
reads the metrics of the step before.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from curia_common import logs, signals
from curia_common.errors import StorageError
from curia_jax import checkpoint, hosts, saving, telemetry

logger = logs.get_logger(__name__)
RETRY_SECONDS = 60  # after a save that failed
REFUSED = "refused_updates"  # metric: updates refused in a row up to this step
# A mean loss so many times that of the untrained model, over so many steps: training has made the model worse for good.
WORSE, WORSE_STEPS = 1.5, 100

State = TypeVar("State")
Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Where a run starts and ends.

    Attributes:
      start_step: steps that the first state has taken.
      total_steps: step at which the run is finished.
      batch_size: examples per step, over all hosts.
      examples_seen: examples that the first state was trained on.
    """

    start_step: int
    total_steps: int
    batch_size: int
    examples_seen: int

    def examples_at(self, step: int) -> int:
        """Examples that the state of this step was trained on."""
        return self.examples_seen + (step - self.start_step) * self.batch_size


class Report(NamedTuple):
    """A step whose metrics are on the host.

    Attributes:
      step: steps taken, this one included.
      input_wait: seconds since the last report in which the devices were idle because the next batch was not there.
      hook_wait: seconds since the last report in which state hooks, such as saving, held up the loop.
    """

    step: int
    metrics: dict[str, float]
    input_wait: float
    hook_wait: float


@dataclasses.dataclass(frozen=True)
class Hook:
    """Calls `fn` with the report of every `every`-th step, and of the first and last step of this start."""

    fn: Callable[[Report], None]
    every: int = 1


@dataclasses.dataclass(frozen=True)
class StateHook:
    """Calls `fn` with the state after every `every`-th step and after the last one, before the next batch is pulled.

    It may copy the state to the host, and must not keep it: the next step reuses its memory. `wanted` asks for the state of any
    other step; with several hosts its answer has to be the same on all. `finish` is called once, after the last step.
    """

    fn: Callable[[int, Any], None]
    every: int
    finish: Callable[[], None] = lambda: None
    wanted: Callable[[], bool] = lambda: False


def fit(
    state: State,
    train_step: Callable[[State, Batch], tuple[State, Mapping[str, jax.Array]]],
    batches: Iterator[Batch],
    schedule: Schedule,
    hooks: Sequence[Hook | StateHook],
) -> tuple[State, bool]:
    """Trains to `schedule.total_steps`, or until a signal asks to stop.

    Args:
      state: train state on the devices; donated.
      train_step: compiled (state, batch) -> (state, metrics); metrics are scalars.
      batches: global batches on the devices.
      hooks: called in their order. What one raises ends the run.

    Returns:
      The state, and whether it is finished (False: a signal asked to stop).
    """
    start, total = schedule.start_step, schedule.total_steps
    report_hooks = [hook for hook in hooks if isinstance(hook, Hook)]
    state_hooks = [hook for hook in hooks if isinstance(hook, StateHook)]
    pending: tuple[int, Mapping[str, jax.Array]] | None = None
    input_wait = hook_wait = 0.0

    def report(last: bool = False) -> None:
        """Waits for the pending step and passes its metrics to the hooks."""
        nonlocal pending, input_wait, hook_wait
        if pending is None:
            return
        step, metrics = pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        done = Report(step, values, input_wait, hook_wait)
        pending, input_wait, hook_wait = None, 0.0, 0.0
        for hook in report_hooks:
            if last or step % hook.every == 0 or step == start + 1:
                hook.fn(done)

    with signals.receiving() as received, jax.transfer_guard("disallow"):
        stop = Stop(received)
        for step in range(start, total + 1):
            last = stop.agreed(step) or step == total
            due = [hook for hook in state_hooks if last or (step > start and (step % hook.every == 0 or hook.wanted()))]
            if due or last:
                report(last)
                began = time.perf_counter()
                with jax.transfer_guard("allow"):
                    for hook in due:
                        hook.fn(step, state)
                hook_wait += time.perf_counter() - began
            if last:
                break

            began = time.perf_counter()
            with jax.transfer_guard_host_to_device(
                "allow"
            ):  # with several hosts, JAX counts this as an implicit transfer
                batch = next(batches)
            # Devices that are still busy did not wait.
            if pending is None or all(value.is_ready() for value in pending[1].values()):  # pyright: ignore[reportAttributeAccessIssue] - missing in JAX's stub
                input_wait += time.perf_counter() - began

            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, batch)
            report()
            pending = step + 1, metrics
        for hook in state_hooks:
            hook.finish()
    return state, step == total


class Stop:
    """Whether the hosts have agreed to stop, after one of them was asked to.

    With several hosts JAX's preemption service finds a step that none of them has passed.
    """

    def __init__(self, received: signals.Received) -> None:
        self._requested = False
        received.on_stop = self.request
        if received.stop_requested:
            self.request()

    def request(self) -> None:
        """A signal asks this host to stop."""
        self._requested = True
        if hosts.count() > 1:
            hosts.request_stop()

    def agreed(self, step: int) -> bool:
        """True on every host in the same step, as soon as one host was told to stop."""
        return self._requested if hosts.count() == 1 else multihost_utils.reached_preemption_sync_point(step)


class Diverged(Exception):
    """The state of a step is not one to continue from."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"{reason} at step {step}")
        self.step, self.reason = step, reason


class Saver:
    """Saves the state, and checks that what is saved is finite.

    A save that fails is tried again while training continues: after a minute on a single host, when the next one is due
    with several, which have to save at the same step.

    Args:
      meta: examples seen -> what is saved with the state.
      log: None on all hosts but one.
      patience: seconds for which training continues while saves fail.
      refusals: updates refused in a row that mean divergence.
      first_loss: of the untrained model; None takes that of the first step, infinity allows any.
      validate: state -> metrics that are saved with it, of what is saved at multiples of the interval and at the end. Not of what a
        signal or a retried save puts between: a run that was stopped must not choose among other states.

    Attributes:
      saved_step: newest checkpoint; None where there is none.
    """

    def __init__(
        self,
        checkpointer: saving.Checkpointer,
        schedule: Schedule,
        meta: Callable[[int], checkpoint.Meta],
        log: telemetry.Log | None,
        *,
        patience: int | float = math.inf,
        refusals: int | float = math.inf,
        first_loss: float | None = None,
        validate: Callable[[PyTree], Mapping[str, float]] | None = None,
    ) -> None:
        self._checkpointer, self._schedule, self._meta, self._log = checkpointer, schedule, meta, log
        self._first_loss, self._losses = first_loss, collections.deque[float](maxlen=WORSE_STEPS)
        self._patience, self._refusals, self._single_host = patience, refusals, jax.process_count() == 1
        self._validate = validate
        self._metrics: Mapping[str, float] = {}
        self._failing_since: float | None = None
        self._retry_at, self._every = math.inf, 1
        self.saved_step = checkpointer.latest_step

    def hooks(self, every: int) -> list[Hook | StateHook]:
        """Checks every step, saves every `every`-th and the last one."""
        self._every = every
        return [Hook(self._check), StateHook(self._save, every, finish=self._finish, wanted=self._retry_is_due)]

    def _retry_is_due(self) -> bool:
        return self._single_host and time.monotonic() >= self._retry_at

    def _save(self, step: int, state: PyTree) -> None:
        if step == self.saved_step:
            return  # resumed from it and stopped at once
        if self._metrics.get(REFUSED, 0) and step % self._every == 0 and step < self._schedule.total_steps:
            return  # not a state to go back to; where the run ends, it is saved
        self._retry_at = math.inf
        seen, metrics = self._schedule.examples_at(step), self._metrics
        if self._validate is not None and (step % self._every == 0 or step == self._schedule.total_steps):
            found = self._validate(state)
            metrics = {**metrics, **found}
            if self._log is not None:
                self._log.event("validated", step=step, examples_seen=seen, **found)
        self._checkpointer.save(step, state, dataclasses.replace(self._meta(seen), metrics=metrics))
        self._note_ended()

    def _note_ended(self) -> None:
        """Notes the saves that have ended.

        Raises:
          StorageError: saves have failed for longer than `patience`.
        """
        now = time.monotonic()
        for ended in self._checkpointer.ended():
            if ended.problem is None:
                self.saved_step, self._failing_since = ended.step, None
                if self._log is not None:
                    self._log.event(
                        "saved", step=ended.step, examples_seen=ended.examples_seen, seconds=round(ended.seconds, 2)
                    )
                continue
            self._failing_since = now if self._failing_since is None else self._failing_since
            self._retry_at = now + RETRY_SECONDS
            logger.warning(f"could not save step {ended.step}: {ended.problem}; {self._newest()}; training continues")
            if self._log is not None:
                self._log.event("save-failed", step=ended.step, reason=ended.problem, last_good_step=self.saved_step)
        if self._failing_since is not None and now - self._failing_since > self._patience:
            raise StorageError(
                f"no save has succeeded for {(now - self._failing_since) / 60:.0f} minutes; {self._newest()}. Make room or mend the "
                "storage and rerun the same command (--config.save_patience sets how long training continues)"
            )

    def _newest(self) -> str:
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the newest checkpoint is step {self.saved_step}"

    def _finish(self) -> None:
        """Waits for the last save.

        Raises:
          StorageError: it failed.
        """
        self._checkpointer.wait()
        self._note_ended()
        if self._failing_since is not None:
            raise StorageError(
                f"the last state could not be saved; {self._newest()}. Make room or mend the storage and rerun the same command"
            )

    def _check(self, report: Report) -> None:
        """Looks at the metrics of a step before the state that it belongs to is saved.

        Raises:
          Diverged: training has to go back.
        """
        self._note_ended()
        self._metrics = report.metrics
        refused = report.metrics.get(REFUSED, 0)
        if refused == 1:
            logger.warning(f"step {report.step}: update refused, {self._described(report.metrics)}")
        if self._log is not None and refused:
            self._log.event("update-refused", step=report.step, in_a_row=int(refused))
        if refused >= self._refusals:
            raise Diverged(
                report.step, f"{refused:.0f} updates in a row were refused, {self._described(report.metrics)}"
            )
        for name, value in report.metrics.items():
            if not math.isfinite(value) and not refused:
                raise Diverged(report.step, f"{name} is {value}")
        if not refused and "loss" in report.metrics:
            self._check_trend(report.step, report.metrics["loss"])

    def _check_trend(self, step: int, loss: float) -> None:
        """Raises Diverged where the model has been worse than an untrained one for long."""
        self._first_loss = loss if self._first_loss is None else self._first_loss
        self._losses.append(loss)
        mean = math.fsum(self._losses) / WORSE_STEPS
        if len(self._losses) == WORSE_STEPS and mean > WORSE * abs(self._first_loss):
            raise Diverged(
                step,
                f"the mean loss of {WORSE_STEPS} steps is {mean:.3g}, that of the untrained model was {self._first_loss:.3g},",
            )

    @staticmethod
    def _described(metrics: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {metrics[name]:.3g}" for name in ("loss", "gradient_norm") if name in metrics)
