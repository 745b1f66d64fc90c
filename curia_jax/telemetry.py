"""Clocks, throughput, MFU, writers and the progress line of a run."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Dense bf16 FLOP/s per chip as the makers publish them: cloud.google.com/tpu/docs/system-architecture-tpu-vm, and the
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
    """Peak FLOP/s of all devices of the run together, and where the figure comes from.

    A device that PEAK_FLOPS does not list is timed on products of square matrices: 1024 wide and float32 on a CPU, 4096
    wide and bfloat16 elsewhere. Simulated CPU devices share one machine, so their figure is the machine's.
    """
    kind = jax.devices()[0].device_kind
    if kind in PEAK_FLOPS:
        return PEAK_FLOPS[kind] * jax.device_count(), f"data sheet of {kind}"
    cpu = jax.default_backend() == "cpu"
    n, dtype, repeats = (1024, jnp.float32, 8) if cpu else (4096, jnp.bfloat16, 32)
    product = jax.jit(lambda a: a @ a)
    a = jax.device_put(jnp.full((n, n), 1 / n, dtype), jax.local_devices()[0])
    jax.block_until_ready(product(a))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            a = product(a)
        jax.block_until_ready(a)
        best = min(best, (time.perf_counter() - start) / repeats)
    machines = jax.process_count() if cpu else jax.device_count()
    return 2 * n**3 / best * machines, f"measured {a.dtype} matrix product on {kind}"


class Meter:
    """Throughput without start-up and compilation, and the shares of the time spent waiting for input and for saves.

    Args:
      flops_per_image: model FLOPs of a training step per image (no credit for rematerialisation).
      peak: FLOP/s of all devices together.
    """

    def __init__(self, *, flops_per_image: float, peak: float) -> None:
        self._flops, self._peak = flops_per_image, peak
        self._interval: _Span | None = None
        self._run: _Span | None = None

    def waited(self, seconds: float) -> None:
        """Adds time in which the devices had nothing to do because the input was not there."""
        if self._interval is not None:
            self._interval.waited += seconds

    def saved(self, seconds: float) -> None:
        """Adds time in which a save kept the loop."""
        if self._interval is not None:
            self._interval.saving += seconds

    def finished(self, images: int) -> None:
        """Counts a step whose result is known to be there. The first one only starts the clock."""
        now = time.perf_counter()
        if self._interval is None:
            self._interval, self._run = _Span(now), _Span(now)
        else:
            self._interval.images += images
        self._interval.end = now

    def read(self) -> dict[str, float]:
        """images_per_second, data_stall_fraction, save_stall_fraction and mfu of the steps since the last call; empty
        while there is nothing to divide."""
        if self._interval is None or not self._interval.images:
            return {}
        span = self._interval
        self._run.add(span)
        self._interval = _Span(span.end)
        return self._rates(span)

    def total(self) -> dict[str, float]:
        """The same of all steps that were read."""
        return self._rates(self._run) if self._run is not None and self._run.images else {}

    def _rates(self, span: "_Span") -> dict[str, float]:
        seconds = span.end - span.start
        rate = span.images / seconds
        return {
            "images_per_second": rate,
            "data_stall_fraction": min(1.0, span.waited / seconds),
            "save_stall_fraction": min(1.0, span.saving / seconds),
            "mfu": rate * self._flops / self._peak,
        }


class _Span:
    """From the end of one step to the end of a later one."""

    def __init__(self, start: float) -> None:
        self.start = self.end = start
        self.images, self.waited, self.saving = 0, 0.0, 0.0

    def add(self, later: "_Span") -> None:
        self.end = later.end
        self.images += later.images
        self.waited += later.waited
        self.saving += later.saving


METRICS, EVENTS, BOARD = "metrics.jsonl", "events.jsonl", "tensorboard"


class Log:
    """`metrics.jsonl`, `events.jsonl` and TensorBoard events of a work directory. Only one host of a run has one.

    A run that goes on from step n drops the lines after step n that its killed predecessor had written, and tells
    TensorBoard to do so.

    Args:
      start_step: step of the checkpoint that the run goes on from; 0 for a new run.
    """

    def __init__(self, workdir: str, *, start_step: int) -> None:
        # Imported here because a host that writes nothing does not need it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder = Path(workdir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._metrics = self._open(METRICS, lambda line: line["step"] <= start_step)
        self._events = self._open(EVENTS, lambda line: True)
        self._board = EventFileWriter(str(self._folder / BOARD))
        if start_step:
            again = SessionLog(status=SessionLog.START)
            self._board.add_event(Event(wall_time=time.time(), step=start_step + 1, session_log=again))

    def _open(self, name: str, keep: Callable[[dict[str, Any]], bool]) -> TextIO:
        """Opens a file of JSON lines for appending, after dropping a torn last line and those that are not to be kept."""
        path = self._folder / name
        kept = [line for line in _json_lines(path) if keep(line)] if path.exists() else []
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(beside, path)
        return path.open("a", encoding="utf-8")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to `metrics.jsonl` and one point per value to TensorBoard."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        now = time.time()
        self._metrics.write(json.dumps({"step": step, **values, "time": round(now, 3)}) + "\n")
        self._metrics.flush()
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._board.add_event(Event(wall_time=now, step=step, summary=summary))

    def event(self, name: str, **fields: Any) -> None:
        """Appends one line to `events.jsonl`: started, resumed, saved, preempted, non-finite, finished."""
        self._events.write(json.dumps({"event": name, **fields, "time": round(time.time(), 3)}) + "\n")
        self._events.flush()

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        self._board.close()


def last_metrics(workdir: str) -> dict[str, Any]:
    """The last whole line of `metrics.jsonl`; empty where there is none."""
    path = Path(workdir) / METRICS
    lines = _json_lines(path) if path.exists() else []
    return lines[-1] if lines else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file up to a torn one, which a killed run leaves at the end."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class ProgressLine:
    """Progress of a run on standard error: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, *, start_step: int, total_steps: int, seconds_between_lines: float = 10.0) -> None:
        self._total = total_steps
        self._every = seconds_between_lines
        self._first = self._last = time.monotonic()
        self._start_step = start_step
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("pretraining"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, text="")
            self._bar.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the newest figures: `loss`, `baseline_loss` and, once known, `images_per_second` and `mfu`."""
        text = f"loss {values['loss']:.4f} (mean predictor {values['baseline_loss']:.4f})"
        if "images_per_second" in values:
            text += f"  {values['images_per_second']:,.0f} images/s  MFU {values['mfu']:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._last >= self._every or step == self._total:
            self._last = now
            left = (now - self._first) / max(1, step - self._start_step) * (self._total - step)
            print(f"step {step}/{self._total}  {text}  {_duration(left)} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
