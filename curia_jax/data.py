"""Shards to sharded global batches. One integer, the number of examples seen, is the whole data state.

Example number g of a run (0, 1, 2, …) is a fixed slice for a given seed and split, whatever the batch size and the
number of hosts: epochs follow one another, each a new shuffle of all slices. Batch k of size B holds the examples
k*B … k*B + B - 1 after the start; host p of n reads the p-th of n equal parts of them and nothing else.
"""

import collections
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from jaxtyping import Shaped, UInt16

from data_pipeline.errors import UserError

HostBatch = dict[str, Shaped[np.ndarray, "..."]]


@runtime_checkable
class Slices(Protocol):
    """Random access to slices, as data_pipeline.shards.SliceSource gives it.

    `source.largest` is the greatest height and width of a slice; `source.read_into(numbers, images)` writes slices to the
    top left of images, with zeros around, and returns their sizes and `slope`, `intercept`, `low`, `high` and `hu` of each
    (see augment.py).
    """

    largest: tuple[int, int]

    def __len__(self) -> int: ...

    def read_into(
        self, numbers: Sequence[int], images: UInt16[np.ndarray, "batch height width"]
    ) -> tuple[list[tuple[int, int]], list[dict[str, Any]]]: ...


# What travels to the device, with the type it has there.
DEVICE_FIELDS = {
    "pixels": np.uint16, "extent": np.int32, "slope": np.float32, "intercept": np.float32,
    "low": np.float32, "high": np.float32, "hu": np.bool_,
}  # fmt: skip
FACTS = [name for name in DEVICE_FIELDS if name not in ("pixels", "extent")]


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
      threads, prefetch: reading threads and examples read ahead, per worker; at least a batch per thread is.
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
    load = _Load(source, slice_order(len(source), seed), examples_seen + process_index * part, batch_size, part, canvas)
    # 2**32 batches stand for "without end": a Grain range needs a stop. A whole batch is one of Grain's elements, because
    # what Grain does per element would cost more than a small slice's decoding.
    dataset = grain.MapDataset.range(2**32).map(load)
    ahead = max(threads, -(-prefetch // part))
    batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    if workers:
        # Grain's workers read absl flags, which only programs started through absl have parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(batches)


class _Load:
    """Batch number -> this host's part of it. A class, because Grain sends it to worker processes."""

    def __init__(
        self, source: Slices, order: grain.MapDataset, first: int, batch_size: int, part: int, canvas: tuple[int, int]
    ) -> None:
        self._source, self._order = source, order
        self._first, self._batch_size, self._part = first, batch_size, part
        self._canvases = _Canvases((part, *canvas))

    def __call__(self, batch: int) -> HostBatch:
        first = self._first + batch * self._batch_size
        numbers = [int(self._order[number]) for number in range(first, first + self._part)]
        return _read(self._source, numbers, self._canvases.take())


class _Canvases:
    """Memory for the pixels of batches: that of a batch which nobody holds any more goes to the next one.

    New memory costs as much as decoding does, in pages that the kernel has to zero. It starts at a multiple of 64 bytes,
    which lets a CPU "device" use it where it is, without a copy (XLA's alignment).
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self._free: collections.deque[np.ndarray] = collections.deque()

    def take(self) -> UInt16[np.ndarray, "batch height width"]:
        """Pixels of any value."""
        size = 2 * math.prod(self._shape)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(size + 64, np.uint8)
            start = -memory.ctypes.data % 64
            memory = memory[start : start + size]
        # Through a memoryview, so that this very array is the `base` of every view of it, JAX's included: it dies with the
        # last of them. numpy would name the array that owns the memory instead.
        pixels = np.frombuffer(memoryview(memory), np.uint16)
        weakref.finalize(pixels, self._free.append, memory).atexit = False
        return pixels.reshape(self._shape)


def evaluation_batches(
    source: Slices, slices: Shaped[np.ndarray, " slices"], *, batch_size: int, canvas: tuple[int, int]
) -> Iterator[HostBatch]:
    """Batches of the given slice numbers, in order. The last one is padded by repetition; `valid` is False there."""
    canvases = _Canvases((batch_size, *canvas))
    for start in range(0, len(slices), batch_size):
        numbers = np.asarray(slices[start : start + batch_size])
        valid = np.arange(batch_size) < len(numbers)
        numbers = np.pad(numbers, (0, batch_size - len(numbers)), mode="edge")
        yield _read(source, numbers.tolist(), canvases.take()) | {"valid": valid}


def _read(source: Slices, numbers: list[int], pixels: UInt16[np.ndarray, "batch height width"]) -> HostBatch:
    """The batch of these slices, its pixels written to `pixels`."""
    sizes, facts = source.read_into(numbers, pixels)
    batch = {"pixels": pixels, "extent": sizes} | {name: [one[name] for one in facts] for name in FACTS}
    batch = {name: np.asarray(batch[name], dtype) for name, dtype in DEVICE_FIELDS.items()}
    return batch | {"slice": np.array(numbers, np.int64)}


def to_devices(batch: HostBatch, sharding: NamedSharding) -> dict[str, jax.Array]:
    """The device fields of every host's part as global arrays, split as `sharding` says. Does not block."""
    return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in DEVICE_FIELDS}
