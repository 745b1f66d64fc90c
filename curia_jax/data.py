"""Slices to sharded global batches. One integer, the number of examples seen, is the whole data state.

Example number g of a run (0, 1, 2, …) is a fixed slice for a given seed and split, whatever the batch size and the
number of hosts: epochs follow one another, each a new shuffle of all slices (order.py), of each folder of a mixture on its own
(mixture.py). Batch k of size B holds the examples k*B … k*B + B - 1 after the start; host p of n reads the p-th of n equal
parts of them and nothing else.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NotRequired, Protocol, TypedDict, TypeVar, cast, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Sharding
from jaxtyping import Bool, Float32, Int32, Int64, UInt16

from curia_common import logs, processes
from curia_common.errors import DataError, UserError
from curia_jax.augment import Batch
from curia_jax.buffers import BufferPool, SharedBuffer, SharedBufferPool, SharedBufferReader
from curia_jax.mixture import Mixture
from curia_jax.order import shuffled, slice_numbers
from data_pipeline.format.records import SliceFacts
from data_pipeline.format.shards import SliceSource

logger = logs.get_logger(__name__)


@runtime_checkable
class Slices(Protocol):
    """Random access to slices, as data_pipeline.format.shards.SliceSource gives it.

    `source.largest` is the greatest height and width of a slice, px; `source.read_into(numbers, images)` writes slices to the
    top left of images, with zeros around, and returns the height and width of each and what training needs to know of it.
    """

    largest: tuple[int, int]

    def __len__(self) -> int: ...

    def read_into(
        self, numbers: Sequence[int], images: UInt16[np.ndarray, "batch height width"]
    ) -> tuple[list[tuple[int, int]], list[SliceFacts]]: ...


class HostBatch(TypedDict):
    """A host's part of a batch; see augment.Batch.

    Attributes:
      slice: slice numbers.
      damaged: number of the slice that could not be read, where another one is in its place; -1 elsewhere. Only in
        `training_batches`.
      valid: False for padding; only in `evaluation_batches`.
      mask: inside the region that a task is about; only of tasks that have one.
      spacing: mm between rows and between columns, 0 where unknown; only where features are extracted from shards.
    """

    pixels: UInt16[np.ndarray, "batch height width"]
    extent: Int32[np.ndarray, "batch 2"]
    slope: Float32[np.ndarray, " batch"]
    intercept: Float32[np.ndarray, " batch"]
    low: Float32[np.ndarray, " batch"]
    high: Float32[np.ndarray, " batch"]
    hu: Bool[np.ndarray, " batch"]
    slice: Int64[np.ndarray, " batch"]
    damaged: NotRequired[Int64[np.ndarray, " batch"]]
    valid: NotRequired[Bool[np.ndarray, " batch"]]
    mask: NotRequired[Bool[np.ndarray, "batch height width"]]
    spacing: NotRequired[Float32[np.ndarray, "batch 2"]]


LoadedBatch = TypeVar("LoadedBatch", bound=Mapping[str, Any])
# What travels to the device, with the type it has there.
DeviceField = Literal["pixels", "extent", "slope", "intercept", "low", "high", "hu"]
DEVICE_FIELDS: dict[DeviceField, type[np.generic]] = {
    "pixels": np.uint16, "extent": np.int32, "slope": np.float32, "intercept": np.float32,
    "low": np.float32, "high": np.float32, "hu": np.bool_,
}  # fmt: skip


def canvas_size(largest: tuple[int, int], canvas: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width that every slice fits into; `canvas` itself where it is given.

    Args:
      largest: greatest height and width of a slice, px.

    Raises:
      UserError: a slice is larger than `canvas`.
    """
    height, width = largest
    if canvas is None:
        return height, width
    if height > canvas[0] or width > canvas[1]:
        raise UserError(
            f"slices of up to {height}x{width} px do not fit the canvas {canvas[0]}x{canvas[1]}; "
            f"set --config.data.canvas=({height},{width}) or build the shards with --size={min(canvas)}"
        )
    return canvas[0], canvas[1]


def spread(bag: Int64[np.ndarray, " n"], most: int) -> Int64[np.ndarray, " m"]:
    """At most so many slices of a bag: the middles of as many equal parts of it."""
    if len(bag) <= most:
        return bag
    return bag[np.round((np.arange(most) + 0.5) * len(bag) / most - 0.5).astype(np.int64)]


def example_slices(source: Slices, first: int, count: int, *, seed: int) -> Int64[np.ndarray, " count"]:
    """Slice numbers of the examples first … first + count - 1 of a run."""
    if isinstance(source, Mixture):
        return source.slice_numbers(first, count, seed=seed)
    return slice_numbers(first, count, slices=len(source), seed=seed)


# Slices that are tried in the place of a damaged one; their orders are those of epochs that no run reaches.
_ATTEMPTS, _REPLACEMENTS = 16, 2**40


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
    replace_damaged: bool = False,
) -> Iterator[HostBatch]:
    """This host's part of every global batch from example number `examples_seen` on, without end.

    Args:
      source: slices of the training split.
      batch_size: global; must divide by `process_count`.
      canvas: height and width of the pixels in a batch.
      threads, prefetch: reading threads, and examples read ahead, per worker; at least one batch per thread is read ahead.
      workers: reading processes; 0 reads in this process.
      replace_damaged: another slice takes the place of one that cannot be read; which one follows from its number and the seed.

    Raises:
      UserError: the batch does not divide over the hosts.
      DataError: a slice cannot be read, and is not to be replaced or cannot be.
    """
    part = part_of_host(batch_size, process_count)
    load = _LoadBatch(source, seed, examples_seen + process_index * part, batch_size, part, canvas, replace_damaged)
    return read_ahead(load, batches=max(threads, -(-prefetch // part)), threads=threads, workers=workers)


def part_of_host(batch_size: int, process_count: int) -> int:
    """Examples of a global batch that each host reads.

    Raises:
      UserError: the batch does not divide over the hosts.
    """
    if batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} does not divide over {process_count} hosts; choose a multiple of {process_count}"
        )
    return batch_size // process_count


# Threads that read what is evaluated: one core is left to dispatch, and more than eight cost memory for what they read ahead.
READERS = max(1, min(8, (os.cpu_count() or 2) - 1))


def read_ahead(
    load: Callable[[int], LoadedBatch], *, batches: int, threads: int, workers: int, count: int = 2**32
) -> Iterator[LoadedBatch]:
    """The batches 0, 1, 2, …

    Args:
      load: batch number -> batch; called in threads, and pickled for worker processes.
      batches: read ahead per worker.
      threads: per worker.
      workers: reading processes; 0 reads in this process.
      count: how many there are; without end unless given.
    """
    # 2**32 batches are "without end": a Grain range needs a stop. One of Grain's elements is a whole batch, because Grain's
    # overhead per element would exceed the decoding of a small slice.
    dataset = grain.MapDataset.range(count).map(load)
    read = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=batches))
    if not workers:
        return iter(read)
    # Grain's workers read absl flags, which only programs started through absl have parsed.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    read = read.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    # Small fields are sent: by default Grain makes shared memory for each, which costs more.
    options = grain.experimental.DatasetOptions(min_shm_size=2**16)
    return _from_workers(iter(grain.experimental.WithOptionsIterDataset(read, options)))


class _LoadBatch:
    """Batch number -> this host's part of it. A class, because Grain pickles it for its worker processes."""

    def __init__(
        self, source: Slices, seed: int, first: int, batch_size: int, part: int, canvas: tuple[int, int], replace: bool
    ) -> None:
        self._source, self._seed = source, seed
        self._first, self._batch_size, self._part = first, batch_size, part
        self._shape, self._replace = (part, *canvas), replace
        self._pool: BufferPool | SharedBufferPool = BufferPool(self._shape)

    def __call__(self, batch: int) -> HostBatch:
        """In a worker process, `pixels` is the SharedBuffer that holds them (see `_from_workers`)."""
        first = self._first + batch * self._batch_size
        numbers = example_slices(self._source, first, self._part, seed=self._seed)
        if isinstance(self._pool, BufferPool):
            return self._filled(numbers, self._pool.take())
        pixels, buffer = self._pool.take()
        return cast(HostBatch, self._filled(numbers, pixels) | {"pixels": buffer})

    def _filled(
        self, numbers: Int64[np.ndarray, " batch"], pixels: UInt16[np.ndarray, "batch height width"]
    ) -> HostBatch:
        damaged = np.full(len(numbers), -1)
        try:
            return {**read(self._source, numbers, pixels), "damaged": damaged}
        except DataError:
            if not self._replace:
                raise
        readable = numbers.copy()
        for place, number in enumerate(numbers):
            readable[place] = self._readable(number, pixels[place : place + 1])
        return {**read(self._source, readable, pixels), "damaged": np.where(readable != numbers, numbers, damaged)}

    def _readable(self, number: np.int64, pixels: UInt16[np.ndarray, "1 height width"]) -> np.int64:
        """The slice itself, or the first readable one of those of its folder that may take its place."""
        begin, count = (
            self._source.folder_range(int(number)) if isinstance(self._source, Mixture) else (0, len(self._source))
        )
        tried = np.array([number])
        for attempt in range(_ATTEMPTS):
            try:
                self._source.read_into(tried.tolist(), pixels)
                return tried[0]
            except DataError:
                if attempt == _ATTEMPTS - 1:
                    raise
            tried = begin + shuffled(np.array([number - begin]), count, self._seed, _REPLACEMENTS + attempt)
        raise AssertionError

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a worker process."""
        processes.die_with_parent()
        self.__dict__.update(state)
        self._pool = (SharedBufferPool if SharedBufferPool.supported() else BufferPool)(self._shape)


def _from_workers(batches: Iterator[LoadedBatch]) -> Iterator[LoadedBatch]:
    """Batches of worker processes, with their shared buffers opened."""
    reader = SharedBufferReader()
    for batch in batches:
        if isinstance(batch["pixels"], SharedBuffer):
            batch = cast(LoadedBatch, {**batch, "pixels": reader.open(batch["pixels"])})
        yield batch
        del batch  # or its buffer would stay in use until the next batch is there


def evaluation_batches(
    source: Slices, slices: Sequence[int] | Int64[np.ndarray, " slices"], *, batch_size: int, canvas: tuple[int, int],
    masks: Callable[[Sequence[int], Bool[np.ndarray, "batch height width"]], None] | None = None,
) -> Iterator[HostBatch]:  # fmt: skip
    """Batches of the given slice numbers, in order. The last one is padded by repetition; `valid` is False there.

    Where there is more than one, the next ones are read by READERS threads while a batch is used.

    Args:
      masks: (slice numbers, canvas) writes the region of each slice to the canvas; None where there are no regions.
    """
    pool = BufferPool((batch_size, *canvas))

    def load(batch: int) -> HostBatch:
        numbers = np.asarray(slices[batch * batch_size : (batch + 1) * batch_size], np.int64)
        valid = np.arange(batch_size) < len(numbers)
        numbers = np.pad(numbers, (0, batch_size - len(numbers)), mode="edge")
        found: HostBatch = {**read(source, numbers, pool.take()), "valid": valid}
        if masks is not None:
            found["mask"] = np.empty((batch_size, *canvas), bool)
            masks(numbers.tolist(), found["mask"])
        return found

    count = -(-len(slices) // batch_size)
    if count <= 1:
        return map(load, range(count))
    return read_ahead(load, batches=READERS + 1, threads=READERS, workers=0, count=count)


def read(
    source: Slices, numbers: Int64[np.ndarray, " batch"], pixels: UInt16[np.ndarray, "batch height width"]
) -> HostBatch:
    """The batch of these slices, its pixels written to `pixels`."""
    sizes, facts = source.read_into(numbers.tolist(), pixels)
    slope, intercept, low, high, hu = zip(*facts, strict=True)
    return {
        "pixels": pixels, "extent": np.array(sizes, np.int32),
        "slope": np.array(slope, np.float32), "intercept": np.array(intercept, np.float32),
        "low": np.array(low, np.float32), "high": np.array(high, np.float32), "hu": np.array(hu, np.bool_),
        "slice": numbers,
    }  # fmt: skip


def to_devices(batch: HostBatch, sharding: Sharding) -> Batch:
    """The device fields of every host's part as global arrays, split as `sharding` says. Does not block."""
    arrays = {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in DEVICE_FIELDS}
    return cast(Batch, arrays)


class Damage:
    """Counts the slices of a source that could not be read.

    Args:
      share: of the slices that may be damaged before the run ends.
    """

    def __init__(self, source: SliceSource | Mixture, share: int | float) -> None:
        self._source, self._share = source, share
        self._found: set[int] = set()

    def note(self, batch: HostBatch) -> None:
        """Names the damaged slices of a batch that are new.

        Raises:
          DataError: they are too many.
        """
        for number in sorted({*batch.get("damaged", np.empty(0, np.int64)).tolist()} - self._found - {-1}):
            self._found.add(number)
            place, count, slices = self._source.place(number), len(self._found), len(self._source)
            if count > self._share * slices:
                raise DataError(
                    f"{place} is damaged; that makes {count:,} of {slices:,} slices, more than the share of "
                    f"{self._share:g} that --config.data.damaged_share allows; copy the dataset again or allow more"
                )
            logger.warning(f"{place} is damaged: another slice is in its place ({count:,} of {slices:,} slices so far)")


class ShardCheck:
    """Compares all shards with their digests once, in the background.

    Args:
      first: number of the shard to begin with; another one at each start, so that a run which is often restarted gets to all.
    """

    def __init__(self, source: SliceSource | Mixture, first: int) -> None:
        self._source, self._first = source, first
        self._problem: str | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="shard check", daemon=True).start()

    def _run(self) -> None:
        for problem in self._source.check_shards(self._first):
            if problem is not None and self._problem is None:
                self._problem = problem
            if self._ended.is_set():
                return
        self._ended.set()

    def wait(self) -> None:
        """Returns when all shards are compared."""
        self._ended.wait()

    def close(self) -> None:
        """Ends it after the shard that it is reading."""
        self._ended.set()

    def check(self) -> None:
        """Raises DataError where a shard was found damaged."""
        if self._problem is not None:
            raise DataError(self._problem)
