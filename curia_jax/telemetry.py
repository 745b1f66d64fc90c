"""Clocks, throughput, MFU and the files that a run writes."""

import contextlib
import operator
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curia_common import logs
from curia_jax import journal, storage

logger = logs.get_logger(__name__)

# Dense bf16 FLOP/s per chip as their makers publish them: cloud.google.com/tpu/docs/system-architecture-tpu-vm, and the
# H100 SXM, H200 and A100 data sheets (without sparsity).
PEAK_FLOPS = {
    "TPU v3": 61.5e12,  # jax lists the two cores of a v3 chip as two devices
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # two devices a chip
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}


def peak_flops() -> tuple[float, str]:
    """Peak FLOP/s of all devices of the run together, and the source of the figure.

    A device that PEAK_FLOPS does not list is timed on matmuls: 1024 x 1024 in float32 on a CPU, 4096 x 4096 in bfloat16
    elsewhere. Simulated CPU devices share one machine, so their figure is the machine's.
    """
    kind = jax.devices()[0].device_kind
    if kind in PEAK_FLOPS:
        return PEAK_FLOPS[kind] * jax.device_count(), f"data sheet of {kind}"
    cpu = jax.default_backend() == "cpu"
    n, dtype, repeats = (1024, jnp.float32, 8) if cpu else (4096, jnp.bfloat16, 32)
    matmul = jax.jit(lambda a: a @ a)
    a = jax.device_put(jnp.full((n, n), 1 / n, dtype), jax.local_devices()[0])
    jax.block_until_ready(matmul(a))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            a = matmul(a)
        jax.block_until_ready(a)
        best = min(best, (time.perf_counter() - start) / repeats)
    machines = jax.process_count() if cpu else jax.device_count()
    return 2 * n**3 / best * machines, f"measured {a.dtype} matmul on {kind}"


class Meter:
    """Throughput without start-up and compilation, and the fractions of the time spent waiting for input and for saves.

    Args:
      batch_size: examples per step, over all hosts.
      flops_per_example: model FLOPs of a training step per example (no credit for rematerialisation).
      peak: FLOP/s of all devices together.
    """

    def __init__(self, *, batch_size: int, flops_per_example: int | float, peak: float) -> None:
        self._batch_size, self._flops, self._peak = batch_size, flops_per_example, peak
        self._interval, self._run = _Span(), _Span()
        self._last: float | None = None

    def finished(self, *, input_wait: float, save_wait: float) -> None:
        """Counts a step whose result is known. The first one only starts the clock.

        Args:
          input_wait, save_wait: seconds since the step before in which the devices had no input, and in which a save held up
            the loop.
        """
        now = time.perf_counter()
        if self._last is not None:
            step = _Span(now - self._last, self._batch_size, input_wait, save_wait)
            self._interval, self._run = self._interval.plus(step), self._run.plus(step)
        self._last = now

    def read(self) -> dict[str, float]:
        """images_per_second, data_stall_fraction, save_stall_fraction and mfu of the steps since the last call; empty where there
        are none."""
        rates = self._rates(self._interval)
        self._interval = _Span()
        return rates

    def total(self) -> dict[str, float]:
        """The same of all steps."""
        return self._rates(self._run)

    def _rates(self, span: "_Span") -> dict[str, float]:
        if not span.examples:
            return {}
        rate = span.examples / span.seconds
        return {
            "images_per_second": rate,
            "data_stall_fraction": min(1.0, span.input_wait / span.seconds),
            "save_stall_fraction": min(1.0, span.save_wait / span.seconds),
            "mfu": rate * self._flops / self._peak,
        }


class _Span(NamedTuple):
    """Time from the end of one step to the end of a later one, in seconds."""

    seconds: float = 0.0
    examples: int | float = 0
    input_wait: float = 0.0
    save_wait: float = 0.0

    def plus(self, later: "_Span") -> "_Span":
        return _Span(*map(operator.add, self, later))


METRICS, EVENTS, BOARD = "metrics.jsonl", "events.jsonl", "tensorboard"


class Log:
    """`metrics.jsonl`, `events.jsonl` and TensorBoard events of a work directory. Only one host of a run has one.

    A run that resumes from step n drops the lines after step n that its killed predecessor wrote, and tells TensorBoard to do
    so. No failure to write ends a run.

    Args:
      start_step: step of the checkpoint that the run resumes from; 0 for a new run.
    """

    def __init__(self, workdir: str | Path, *, start_step: int) -> None:
        self._folder = Path(workdir)
        self._metrics = journal.Writer(self._folder / METRICS, lambda line: line["step"] <= start_step, ("step",))
        self._events = journal.Writer(self._folder / EVENTS, lambda line: True)
        self._board: Any = None
        self._board_fails = False
        self._dropped_after = start_step or None  # what TensorBoard has to be told yet

    def go_back(self, step: int) -> None:
        """Drops the lines of metrics after `step`, from which the run continues, and tells TensorBoard to do so."""
        self._metrics.close()
        self._metrics = journal.Writer(self._folder / METRICS, lambda line: line["step"] <= step, ("step",))
        self._dropped_after = step

    def metrics(self, step: int, values: Mapping[str, int | float]) -> None:
        """Appends one line to `metrics.jsonl` and one point per value to TensorBoard."""
        now = time.time()
        self._metrics.write({"step": step, **values, "time": round(now, 3)})
        self._show(step, values, now)

    def _show(self, step: int, values: Mapping[str, int | float], now: float) -> None:
        # Imported here because a host that writes nothing does not need it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] - generated
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue] - generated
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        try:
            if self._board is None or not (self._folder / BOARD).is_dir():  # not opened yet, or deleted meanwhile
                self._board = EventFileWriter(str(self._folder / BOARD))
            if self._dropped_after is not None:
                restart = SessionLog(status=SessionLog.START)
                self._board.add_event(Event(wall_time=now, step=self._dropped_after + 1, session_log=restart))
                self._dropped_after = None
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
            self._board.add_event(Event(wall_time=now, step=step, summary=summary))
            self._board_fails = False
        except Exception as error:  # noqa: BLE001 - its writer passes on whatever its thread met
            self._board = None
            if not self._board_fails:
                logger.warning(
                    f"cannot write {self._folder / BOARD} ({type(error).__name__}); the run continues and will try again"
                )
            self._board_fails = True

    def event(self, name: str, **fields: Any) -> None:
        """Appends one line to `events.jsonl`: started, resumed, validated, saved, save-failed, update-refused, rolled-back, preempted, finished."""
        self._events.write({"event": name, **fields, "time": round(time.time(), 3)})

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        with contextlib.suppress(Exception):  # of its last points
            if self._board is not None:
                self._board.close()


def last_metrics(workdir: str | Path) -> journal.Line:
    """The last readable line of `metrics.jsonl`; empty where there is none."""
    lines = journal.read(storage.root(workdir) / METRICS, ("step",)).lines
    return lines[-1] if lines else {}


def events(workdir: str | Path) -> list[journal.Line]:
    """The lines of `events.jsonl`; empty where there is none."""
    return journal.read(storage.root(workdir) / EVENTS).lines
