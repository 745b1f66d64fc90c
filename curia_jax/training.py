"""The loop both stages share.

The order inside a step is a contract, because it says which examples a checkpoint has counted:

  save the state of step n  ->  pull batch n  ->  dispatch step n  ->  report step n - 1

so the checkpoint of step n has seen the batches 0 … n - 1 and no other, and the devices always have a step queued while
the host reads the figures of the one before.
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from curia_jax import checkpoint, telemetry

# A launcher starts the same command again after this one (EX_TEMPFAIL of sysexits.h): the state is saved, nothing failed.
EXIT_PREEMPTED = 75


class NonFinite(Exception):
    """A loss or norm is not a number: the message has the step, the quantity and the last good checkpoint."""


class Stop:
    """Remembers SIGTERM and SIGINT until the loop gets to it. A second SIGINT interrupts at once.

    With several hosts SIGTERM stays with JAX's preemption service, which tells the other hosts; a handler of our own would
    take it away from the service. SIGINT is passed on to it.
    """

    def __init__(self) -> None:
        self._requested = False
        self._alone = jax.process_count() == 1

    @contextlib.contextmanager
    def listening(self) -> Iterator["Stop"]:
        def request(number: int, frame: Any) -> None:
            if self._requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._requested = True
            if not self._alone:
                os.kill(os.getpid(), signal.SIGTERM)

        numbers = (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,)
        previous = {number: signal.signal(number, request) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def agreed(self, step: int) -> bool:
        """True on every host in the same step, as soon as one host was told to stop."""
        return self._requested if self._alone else multihost_utils.reached_preemption_sync_point(step)


def fit(
    state: Any,
    train_step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]],
    batches: Iterator[Any],
    *,
    start_step: int,
    total_steps: int,
    batch_size: int,
    examples_seen: int,
    save_every_steps: int,
    log_every_steps: int,
    config: Mapping[str, Any],
    checkpointer: checkpoint.Checkpointer,
    meter: telemetry.Meter,
    log: telemetry.Log | None,
    progress: telemetry.ProgressLine | None,
) -> tuple[Any, bool]:
    """Trains from `start_step` to `total_steps`, or until a signal asks to stop.

    Args:
      state: train state on the devices; donated.
      train_step: compiled (state, batch) -> (state, metrics). Metrics are scalars; all of them have to stay finite,
        `loss` and `baseline_loss` are shown.
      batches: global batches on the devices.
      examples_seen: examples that the state has been trained on.
      save_every_steps, log_every_steps: distances; the last step is saved and logged in any case.
      config: stored with each checkpoint.
      log, progress: None on all hosts but one.

    Returns:
      The state, and whether it is finished (False: saved because a signal asked to stop).

    Raises:
      NonFinite: a metric is not finite. The state that led to it is not saved.
    """
    saved_step = start_step if checkpointer.latest_step == start_step else None
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def report(last: bool = False) -> None:
        """Waits for the pending step, checks it and passes its figures on; in any case if it is the last one."""
        nonlocal pending
        if pending is None:
            return
        step, metrics = pending[0], {name: float(value) for name, value in jax.device_get(pending[1]).items()}
        pending = None
        for name, value in metrics.items():
            if not math.isfinite(value):
                good = (
                    f"the last good checkpoint is step {saved_step}"
                    if saved_step is not None
                    else "there is no checkpoint yet"
                )
                if log is not None:
                    log.event("non-finite", step=step, quantity=name, last_good_step=saved_step)
                raise NonFinite(
                    f"{name} is {value} at step {step}; {good}. Try a lower learning rate or --config.optimizer.clip_norm=1.0"
                )
        meter.finished(batch_size)
        if last or step % log_every_steps == 0 or step == start_step + 1:
            values = {"examples_seen": examples_seen + (step - start_step) * batch_size, **metrics, **meter.read()}
            if log is not None:
                log.metrics(step, values)
            if progress is not None:
                progress.update(step, values)

    with Stop().listening() as stop, jax.transfer_guard("disallow"):
        for step in range(start_step, total_steps + 1):
            done = stop.agreed(step) or step == total_steps
            if step != saved_step and (done or (step > start_step and step % save_every_steps == 0)):
                report(last=done)
                seen = examples_seen + (step - start_step) * batch_size
                asked = time.perf_counter()
                with jax.transfer_guard("allow"):  # a save copies the state to the host; that is its purpose
                    checkpointer.save(step, state, config=config, examples_seen=seen)
                meter.saved(time.perf_counter() - asked)
                saved_step = step
                if log is not None:
                    log.event("saved", step=step, examples_seen=seen)
            if done:
                break

            asked = time.perf_counter()
            with jax.transfer_guard_host_to_device("allow"):  # with several hosts, JAX counts this as a hidden transfer
                batch = next(batches)
            # Devices that are still at work did not wait.
            if pending is None or all(value.is_ready() for value in pending[1].values()):
                meter.waited(time.perf_counter() - asked)

            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, batch)
            report()
            pending = step + 1, metrics
        checkpointer.wait()
    return state, step == total_steps
