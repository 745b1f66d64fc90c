"""Clocks, throughput, MFU, writers and the progress line of a run."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

    A device that PEAK_FLOPS does not list (a CPU, say) is timed on 1024 x 1024 x 1024 float32 matrix products; simulated
    CPU devices share one machine, so their figure is the machine's.
    """
    kind = jax.devices()[0].device_kind
    if kind in PEAK_FLOPS:
        return PEAK_FLOPS[kind] * jax.device_count(), f"data sheet of {kind}"
    n, repeats = 1024, 8
    product = jax.jit(lambda a: a @ a)
    a = jax.device_put(jnp.full((n, n), 1 / n, jnp.float32), jax.local_devices()[0])
    jax.block_until_ready(product(a))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            a = product(a)
        jax.block_until_ready(a)
        best = min(best, (time.perf_counter() - start) / repeats)
    machines = jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()
    return 2 * n**3 / best * machines, f"measured float32 matrix product on {kind}"


class Meter:
    """Throughput between two reports, without start-up and compilation, and the share of it spent waiting for input.

    Args:
      flops_per_image: model FLOPs of a training step per image (no credit for rematerialisation).
      peak: FLOP/s of all devices together.
    """

    def __init__(self, *, flops_per_image: float, peak: float) -> None:
        self._flops, self._peak = flops_per_image, peak
        self._start: float | None = None
        self._images = 0
        self._waited = 0.0

    def waited(self, seconds: float) -> None:
        """Adds time in which the devices' queue was not fed because the input was not there."""
        self._waited += seconds

    def finished(self, images: int) -> None:
        """Counts a step whose result is known to be there. The first one only starts the clock."""
        if self._start is None:
            self._start, self._images, self._waited = time.perf_counter(), 0, 0.0
        else:
            self._images += images

    def read(self) -> dict[str, float]:
        """Rates since the last call; empty while there is nothing to divide."""
        now = time.perf_counter()
        if self._start is None or not self._images:
            return {}
        seconds = now - self._start
        rate = self._images / seconds
        result = {
            "images_per_second": rate,
            "data_stall_fraction": min(1.0, self._waited / seconds),
            "mfu": rate * self._flops / self._peak,
        }
        self._start, self._images, self._waited = now, 0, 0.0
        return result


class Log:
    """`metrics.jsonl`, `events.jsonl` and TensorBoard events of a work directory. Only one host of a run has one.

    A run that goes on from step n drops the lines after step n that its killed predecessor had written.
    """

    def __init__(self, workdir: str, *, start_step: int) -> None:
        # Imported here because a host that writes nothing does not need it.
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics_path = folder / "metrics.jsonl"
        self._drop_after(start_step)
        self._metrics = self._metrics_path.open("a", encoding="utf-8")
        self._events = (folder / "events.jsonl").open("a", encoding="utf-8")
        self._board = EventFileWriter(str(folder / "tensorboard"))

    def _drop_after(self, step: int) -> None:
        if not self._metrics_path.exists():
            return
        kept = []
        for line in self._metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break  # the torn last line of a killed run
        beside = self._metrics_path.with_suffix(".tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        os.replace(beside, self._metrics_path)

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
            print(f"step {step}/{self._total}  {text}  {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
