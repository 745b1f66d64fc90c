"""Shards to sharded global batches. One integer, the number of examples seen, is the whole data state.

Example number g of a run (0, 1, 2, …) is a fixed slice for a given seed and split, whatever the batch size and the
number of hosts: epochs follow one another, each a new shuffle of all slices. Batch k of size B holds the examples
k*B … k*B + B - 1 after the start; host p of n reads the p-th of n equal parts of them and nothing else.
"""

import collections
import math
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from jaxtyping import Int64, Shaped, UInt16

from curia_common.errors import UserError

HostBatch = dict[str, Shaped[np.ndarray, "..."]]


@runtime_checkable
class Slices(Protocol):
    """Random access to slices, as data_pipeline.format.shards.SliceSource gives it.

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


def slice_numbers(first: int, count: int, *, slices: int, seed: int) -> Int64[np.ndarray, " count"]:
    """Slice numbers of the examples first … first + count - 1: every slice once per epoch, shuffled anew in each epoch.

    No table is kept, whatever the number of slices: a block cipher of as many values is the shuffle.
    """
    parts, end = [], first + count
    while first < end:
        epoch, start = divmod(first, slices)
        stop = min(slices, start + end - first)
        parts.append(_shuffled(np.arange(start, stop), slices, seed, epoch))
        first += stop - start
    return np.concatenate(parts)


_ROUNDS = 6  # even; from 8 bits on no deviation from evenly random orders shows in 6,000 epochs


def _shuffled(numbers: Int64[np.ndarray, " n"], slices: int, seed: int, epoch: int) -> Int64[np.ndarray, " n"]:
    """Places of numbers below `slices` in a random order of them.

    A Feistel network whose rounds are a multiplicative hash, applied again to what it sends beyond the end (cycle walking;
    Black and Rogaway 2002, doi 10.1007/3-540-45760-7_9), in as few bits as the slices need. Grain's shuffle works alike, but
    one number at a time and in 16 bits at least: it takes 9 µs a slice, and 63 where there are 512 slices; this one 1 to 6.
    """
    bits = max(8, (slices - 1).bit_length())
    keys = np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64)
    values = numbers.astype(np.uint64)
    beyond = np.arange(len(values))
    while beyond.size:
        left_bits, right_bits = bits - bits // 2, bits // 2
        value = values[beyond]
        left, right = value >> np.uint64(right_bits), value & np.uint64((1 << right_bits) - 1)
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # constants of splitmix64 (Steele et al. 2014)
            mixed ^= mixed >> np.uint64(32)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(64 - left_bits))
            left_bits, right_bits = right_bits, left_bits
        values[beyond] = (left << np.uint64(right_bits)) | right
        beyond = beyond[values[beyond] >= slices]
    return values.astype(np.int64)


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
    load = _Load(source, seed, examples_seen + process_index * part, batch_size, part, canvas)
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
        # The small fields are sent; a piece of shared memory for each, as Grain would have it, costs more.
        options = grain.experimental.DatasetOptions(min_shm_size=2**16)
        batches = grain.experimental.WithOptionsIterDataset(batches, options)
        return _open_shared(iter(batches))
    return iter(batches)


class _Load:
    """Batch number -> this host's part of it. A class, because Grain sends it to worker processes."""

    def __init__(
        self, source: Slices, seed: int, first: int, batch_size: int, part: int, canvas: tuple[int, int]
    ) -> None:
        self._source, self._seed = source, seed
        self._first, self._batch_size, self._part = first, batch_size, part
        self._shape = (part, *canvas)
        self._canvases: _Canvases | _SharedCanvases = _Canvases(self._shape)

    def __call__(self, batch: int) -> HostBatch:
        first = self._first + batch * self._batch_size
        numbers = slice_numbers(first, self._part, slices=len(self._source), seed=self._seed)
        if isinstance(self._canvases, _Canvases):
            return _read(self._source, numbers, self._canvases.take())
        pixels, place = self._canvases.take()
        return _read(self._source, numbers, pixels) | {"pixels": place}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_canvases": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a worker process."""
        self.__dict__.update(state)
        self._canvases = (_SharedCanvases if hasattr(os, "memfd_create") else _Canvases)(self._shape)


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


class _Place(NamedTuple):
    """Where a worker process left the pixels of a batch: a file in memory, which that process has open."""

    process: int
    file: int
    shape: tuple[int, int, int]


class _SharedCanvases:
    """As _Canvases, for a worker process: memory that it shares with the training process, and uses again as well.

    Grain would copy every batch to a new piece of shared memory. What the kernel does for new pages makes that dearer than
    reading the batch, and worse with every worker. The first byte of a file says whether the training process holds it.
    The files have no names, so nothing is left of them when the processes end, however they do. Linux alone has such files;
    elsewhere Grain copies.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._shape = shape
        self._files: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()

    def take(self) -> tuple[UInt16[np.ndarray, "batch height width"], _Place]:
        """Pixels of any value, and where they are for the training process."""
        with self._lock:
            file = next((file for file, memory in self._files.items() if memory[0] == _FREE), None)
            if file is None:
                file = os.memfd_create("batch")
                size = _HEAD + 2 * math.prod(self._shape)
                os.truncate(file, size)
                self._files[file] = mmap.mmap(file, size)
            self._files[file][0] = _HELD
        pixels = np.frombuffer(self._files[file], np.uint16, offset=_HEAD).reshape(self._shape)
        return pixels, _Place(os.getpid(), file, self._shape)


_FREE, _HELD = 0, 1
_HEAD = 64  # bytes before the pixels, which start at XLA's alignment


def _open_shared(batches: Iterator[HostBatch]) -> Iterator[HostBatch]:
    """Batches of workers with their pixels, whose memory goes back to the worker once nobody holds them any more."""
    files: dict[tuple[int, int], mmap.mmap] = {}
    for batch in batches:
        place = batch["pixels"]
        if isinstance(place, _Place):
            key = place.process, place.file
            if key not in files:
                with open(f"/proc/{place.process}/fd/{place.file}", "r+b") as file:
                    files[key] = mmap.mmap(file.fileno(), 0)
            # Through a memoryview: see _Canvases.
            pixels = np.frombuffer(memoryview(files[key])[_HEAD:], np.uint16)
            weakref.finalize(pixels, files[key].__setitem__, 0, _FREE).atexit = False
            batch = batch | {"pixels": pixels.reshape(place.shape)}
            del pixels  # or the loop would hold it until the next batch is there
        yield batch
        del batch


def evaluation_batches(
    source: Slices, slices: Shaped[np.ndarray, " slices"], *, batch_size: int, canvas: tuple[int, int]
) -> Iterator[HostBatch]:
    """Batches of the given slice numbers, in order. The last one is padded by repetition; `valid` is False there."""
    canvases = _Canvases((batch_size, *canvas))
    for start in range(0, len(slices), batch_size):
        numbers = np.asarray(slices[start : start + batch_size], np.int64)
        valid = np.arange(batch_size) < len(numbers)
        numbers = np.pad(numbers, (0, batch_size - len(numbers)), mode="edge")
        yield _read(source, numbers, canvases.take()) | {"valid": valid}


def _read(
    source: Slices, numbers: Int64[np.ndarray, " batch"], pixels: UInt16[np.ndarray, "batch height width"]
) -> HostBatch:
    """The batch of these slices, its pixels written to `pixels`."""
    sizes, facts = source.read_into(numbers.tolist(), pixels)
    batch = {"pixels": pixels, "extent": sizes} | {name: [getattr(one, name) for one in facts] for name in FACTS}
    batch = {name: np.asarray(batch[name], dtype) for name, dtype in DEVICE_FIELDS.items()}
    return batch | {"slice": numbers}


def to_devices(batch: HostBatch, sharding: NamedSharding) -> dict[str, jax.Array]:
    """The device fields of every host's part as global arrays, split as `sharding` says. Does not block."""
    return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in DEVICE_FIELDS}
