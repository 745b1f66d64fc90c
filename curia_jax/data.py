"""Shards to sharded global batches. One integer, the number of examples seen, is the whole data state.

Example number g of a run (0, 1, 2, …) is a fixed slice for a given seed and split, whatever the batch size and the
number of hosts: epochs follow one another, each a new shuffle of all slices. Batch k of size B holds the examples
k*B … k*B + B - 1 after the start; host p of n reads the p-th of n equal parts of them and nothing else.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from jaxtyping import Shaped

from data_pipeline.errors import UserError

HostBatch = dict[str, Shaped[np.ndarray, "..."]]


@runtime_checkable
class Slices(Protocol):
    """Random access to decoded slices, as data_pipeline.shards.SliceSource gives it.

    `source[n]` has `pixels` uint16 (height, width), `slope`, `intercept`, `low`, `high` and `hu` (see augment.py);
    `source.largest` is the greatest height and width of a slice.
    """

    largest: tuple[int, int]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Mapping[str, object]: ...


# What travels to the device, with the type it has there.
DEVICE_FIELDS = {
    "pixels": np.uint16, "extent": np.int32, "slope": np.float32, "intercept": np.float32,
    "low": np.float32, "high": np.float32, "hu": np.bool_,
}  # fmt: skip


def canvas_size(source: Slices, canvas: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width that every slice of `source` fits into; `canvas` itself where it is given.

    Raises:
      UserError: a slice is larger than `canvas`.
    """
    height, width = source.largest
    if canvas is None:
        return height, width
    if height > canvas[0] or width > canvas[1]:
        raise UserError(
            f"slices of up to {height}x{width} px do not fit the canvas {canvas[0]}x{canvas[1]}; "
            f"set --config.data.canvas=({height},{width}) or build the shards with --size={min(canvas)}"
        )
    return canvas[0], canvas[1]


def slice_order(slices: int, seed: int) -> grain.MapDataset:
    """Example number -> slice number: every slice once per epoch, shuffled anew in each epoch. Unbounded."""
    return grain.MapDataset.range(slices).seed(seed).shuffle().repeat()


def training_batches(
    source: Slices,
    *,
    batch_size: int,
    canvas: tuple[int, int],
    seed: int,
    examples_seen: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
    workers: int = 0,
) -> Iterator[HostBatch]:
    """This host's part of every global batch from example number `examples_seen` on, without end.

    Args:
      source: slices of the training split.
      batch_size: global; must divide by `process_count`.
      canvas: height and width of the pixel canvas.
      threads, prefetch: reading threads and examples read ahead, per worker.
      workers: reading processes; 0 reads in this process.

    Yields:
      The fields of DEVICE_FIELDS with a leading dimension of batch_size / process_count, and `slice` int64, the slice
      numbers.

    Raises:
      UserError: the batch does not divide over the hosts.
    """
    if batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} does not divide over {process_count} hosts; choose a multiple of {process_count}"
        )
    part = batch_size // process_count
    load = _Load(source, slice_order(len(source), seed), examples_seen, batch_size, part, process_index * part)
    # 2**62 local examples stand for "without end": a Grain range needs a stop.
    dataset = grain.MapDataset.range(2**62).map(load).batch(part, batch_fn=functools.partial(_stack, canvas=canvas))
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    if workers:
        # Grain's workers read absl flags, which only programs started through absl have parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(batches)


class _Load:
    """Local example number of a host -> slice. A class, because Grain sends it to worker processes."""

    def __init__(
        self, source: Slices, order: grain.MapDataset, examples_seen: int, batch_size: int, part: int, offset: int
    ) -> None:
        self._source, self._order = source, order
        self._start, self._batch_size, self._part = examples_seen + offset, batch_size, part

    def __call__(self, local: int) -> dict[str, object]:
        batch, row = divmod(local, self._part)
        number = int(self._order[self._start + batch * self._batch_size + row])
        return {"slice": number, **self._source[number]}


def evaluation_batches(
    source: Slices, slices: Shaped[np.ndarray, " slices"], *, batch_size: int, canvas: tuple[int, int]
) -> Iterator[HostBatch]:
    """Batches of the given slice numbers, in order. The last one is padded by repetition; `valid` is False there."""
    for start in range(0, len(slices), batch_size):
        numbers = np.asarray(slices[start : start + batch_size])
        valid = np.arange(batch_size) < len(numbers)
        numbers = np.pad(numbers, (0, batch_size - len(numbers)), mode="edge")
        yield _stack([{"slice": int(n), **source[int(n)]} for n in numbers], canvas) | {"valid": valid}


def _stack(rows: list[Mapping[str, object]], canvas: tuple[int, int]) -> HostBatch:
    batch: HostBatch = {"slice": np.array([row["slice"] for row in rows], np.int64)}
    pixels = np.zeros((len(rows), *canvas), np.uint16)
    extent = np.zeros((len(rows), 2), np.int32)
    for i, row in enumerate(rows):
        height, width = row["pixels"].shape
        pixels[i, :height, :width] = row["pixels"]
        extent[i] = height, width
    batch |= {"pixels": pixels, "extent": extent}
    for name, dtype in DEVICE_FIELDS.items():
        if name not in batch:
            batch[name] = np.array([row[name] for row in rows], dtype)
    return batch


def to_devices(batch: HostBatch, sharding: NamedSharding) -> dict[str, jax.Array]:
    """The device fields of every host's part as global arrays, split as `sharding` says. Does not block."""
    return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in DEVICE_FIELDS}
