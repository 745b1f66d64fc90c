"""Labelled cases to sharded global batches. One integer, the number of examples seen, is the whole data state.

A case is a bag of slices with one target: a single slice, or some of a volume. Example number g of a run is a fixed case for a
given seed, whatever the batch size and the number of hosts, as in data.py. A batch of C cases has S places for the slices of
each; places that a case does not fill are repetitions, and `valid` is False there.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Int64, Shaped, UInt16

from curia_common.errors import UserError
from curia_jax import data, order
from curia_jax.buffers import BufferPool
from curia_jax.evaluate.targets import Classes, Labels, Times, Values
from curia_jax.models.head import HeadConfig

SAMPLING = NATURAL, BALANCED = ("natural", "balanced")
WEIGHTS = EQUAL, BY_CLASS = ("none", "balanced")
Target = Classes | Labels | Values | Times


class CaseBatch(TypedDict):
    """A host's part of a batch; the fields of a slice as in data.HostBatch, with an axis for the slices of a case.

    Attributes:
      valid: places that the case fills.
      region: 1 inside the region that the task is about; only of tasks that have one.
      target: class number; 0 or 1 of each label; standardised value; or time. Absent where cases are only to be scored.
      event: of times, whether the event was seen.
      weight: of the case in the loss.
      case: case numbers.
    """

    pixels: UInt16[np.ndarray, "cases slices height width"]
    extent: Int32[np.ndarray, "cases slices 2"]
    slope: Float32[np.ndarray, "cases slices"]
    intercept: Float32[np.ndarray, "cases slices"]
    low: Float32[np.ndarray, "cases slices"]
    high: Float32[np.ndarray, "cases slices"]
    hu: Bool[np.ndarray, "cases slices"]
    valid: Bool[np.ndarray, "cases slices"]
    case: Int64[np.ndarray, " cases"]
    region: NotRequired[Float32[np.ndarray, "cases slices height width"]]
    target: NotRequired[Shaped[np.ndarray, "cases ..."]]
    event: NotRequired[Bool[np.ndarray, " cases"]]
    weight: NotRequired[Float32[np.ndarray, " cases"]]


@dataclasses.dataclass(frozen=True)
class Cases:
    """The labelled cases of a split.

    Attributes:
      images: what their slices are read from.
      bags: numbers of the slices of each case, at least one.
      targets: of each case.
      masks: (slice numbers, canvas) writes the region of each slice to the canvas; None where the task has no regions.
    """

    images: data.Slices
    bags: tuple[Int64[np.ndarray, " _slices"], ...]  # of different sizes
    targets: Target
    masks: Callable[[Sequence[int], Float32[np.ndarray, "batch height width"]], None] | None = None

    def __len__(self) -> int:
        return len(self.bags)

    @property
    def slices(self) -> int:
        """Of the largest bag."""
        return max(map(len, self.bags))


# ---- which case is example g


def balanced_numbers(
    first: int, count: int, *, members: Sequence[Int64[np.ndarray, " _cases"]], seed: int
) -> Int64[np.ndarray, " count"]:
    """Case numbers of the examples first … first + count - 1, with every class equally often.

    Example g is of class g mod the number of classes. The cases of a class come in epochs of their own, each a new
    shuffle: every one of them once before any comes again.

    Args:
      members: case numbers of each class, at least one.
    """
    places = np.arange(first, first + count)
    found = np.empty(count, np.int64)
    for number, own in enumerate(members):
        here = np.flatnonzero(places % len(members) == number)
        if len(here):
            # A seed for each class: classes of equal size must not always come in the same pairs.
            epochs, draws = np.divmod(places[here] // len(members), len(own))
            for epoch in np.unique(epochs):
                of_epoch = epochs == epoch
                found[here[of_epoch]] = own[_shuffled(len(own), seed, number, int(epoch))[draws[of_epoch]]]
    return found


@functools.lru_cache(maxsize=64)
def _shuffled(count: int, *seeds: int) -> Int64[np.ndarray, " count"]:
    """A random order. order.slice_numbers needs no table, and for a class of a few cases a hundred times as long."""
    return np.argsort(np.random.SeedSequence(seeds).generate_state(count, np.uint64), kind="stable")


@dataclasses.dataclass(frozen=True)
class Order:
    """Which case an example is.

    Attributes:
      count: number of cases.
      members: case numbers of each class, for balanced sampling; None takes every case once per epoch.
    """

    count: int
    seed: int
    members: tuple[Int64[np.ndarray, " _cases"], ...] | None = None

    @classmethod
    def of(cls, targets: Target, *, seed: int, sampling: str) -> "Order":
        """Raises UserError where there are no classes to balance."""
        if sampling == NATURAL:
            return cls(len(targets), seed)
        if not isinstance(targets, Classes):
            raise UserError(
                f"finetune.sampling is {BALANCED}, but the task has no classes; set --config.finetune.sampling={NATURAL}"
            )
        members = tuple(np.flatnonzero(targets.labels == label) for label in range(targets.count))
        return cls(len(targets), seed, members)

    def __call__(self, first: int, count: int) -> Int64[np.ndarray, " count"]:
        """Case numbers of the examples first … first + count - 1."""
        if self.members is None:
            return order.slice_numbers(first, count, slices=self.count, seed=self.seed)
        return balanced_numbers(first, count, members=self.members, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class _InOrder:
    """Every case once; then the last one again, which fills the last batch."""

    count: int

    def __call__(self, first: int, count: int) -> Int64[np.ndarray, " count"]:
        return np.minimum(np.arange(first, first + count), self.count - 1)


# ---- targets as the loss takes them


def target_fields(targets: Target, head: HeadConfig, *, weights: str = EQUAL) -> dict[str, Shaped[np.ndarray, "n ..."]]:
    """`target`, `weight` and, of times, `event` of every case.

    Args:
      weights: of WEIGHTS; BY_CLASS gives every class the same sum of weights, and cases a mean weight of 1.

    Raises:
      UserError: there are no classes to weigh.
    """
    found: dict[str, Shaped[np.ndarray, "n ..."]] = {"weight": np.ones(len(targets), np.float32)}
    if weights == BY_CLASS:
        if not isinstance(targets, Classes):
            raise UserError(
                f"finetune.class_weights is {BY_CLASS}, but the task has no classes; set --config.finetune.class_weights={EQUAL}"
            )
        frequencies = targets.frequencies[targets.labels]
        found["weight"] = (1 / (len(np.unique(targets.labels)) * frequencies)).astype(np.float32)
    if isinstance(targets, Classes):
        found["target"] = targets.labels.astype(np.int32)
    elif isinstance(targets, Labels):
        found["target"] = targets.present.astype(np.float32)
    elif isinstance(targets, Values):
        found["target"] = ((targets.values - head.mean) / head.scale).astype(np.float32)
    else:
        found |= {"target": targets.time.astype(np.float32), "event": targets.event}
    return found


# ---- batches


class _LoadCases:
    """Batch number -> this host's part of it. A class, because Grain pickles it for its worker processes."""

    def __init__(
        self, cases: Cases, order: Callable[[int, int], Int64[np.ndarray, " count"]],
        fields: Mapping[str, Shaped[np.ndarray, "n ..."]], *, first: int, batch_size: int, part: int,
        slices: int, canvas: tuple[int, int],
    ) -> None:  # fmt: skip
        self._cases, self._order, self._fields = cases, order, fields
        self._first, self._batch_size, self._part = first, batch_size, part
        self._slices, self._canvas = slices, canvas
        self._pool = BufferPool((part * slices, *canvas))

    def __call__(self, batch: int) -> CaseBatch:
        numbers = self._order(self._first + batch * self._batch_size, self._part)
        bags = [data.spread(self._cases.bags[number], self._slices) for number in numbers]
        lengths = np.array([len(bag) for bag in bags])
        flat = np.concatenate([np.pad(bag, (0, self._slices - len(bag)), mode="edge") for bag in bags])
        by_slice = data.read(self._cases.images, flat, self._pool.take())
        found = {
            name: by_slice[name].reshape(self._part, self._slices, *by_slice[name].shape[1:])
            for name in data.DEVICE_FIELDS
        }
        if self._cases.masks is not None:
            region = np.zeros((len(flat), *self._canvas), np.float32)
            self._cases.masks(flat.tolist(), region)
            found["region"] = region.reshape(self._part, self._slices, *self._canvas)
        found["valid"] = np.arange(self._slices) < lengths[:, None]
        found["case"] = numbers
        return cast(CaseBatch, found | {name: values[numbers] for name, values in self._fields.items()})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a worker process, whose batches Grain copies."""
        self.__dict__.update(state)
        self._pool = BufferPool((self._part * self._slices, *self._canvas))


def training_batches(
    cases: Cases, head: HeadConfig, *, batch_size: int, slices: int, canvas: tuple[int, int], seed: int,
    sampling: str = NATURAL, weights: str = EQUAL, examples_seen: int = 0, process_index: int = 0, process_count: int = 1,
    threads: int = 2, prefetch: int = 4, workers: int = 0,
) -> Iterator[CaseBatch]:  # fmt: skip
    """This host's part of every global batch from example number `examples_seen` on, without end.

    Args:
      batch_size: cases, global; must divide by `process_count`.
      slices: places for the slices of a case; a case with more gets that many of them, evenly spaced.
      canvas: height and width of the pixels in a batch.
      sampling, weights: of SAMPLING and WEIGHTS.
      threads, prefetch, workers: as data.training_batches.

    Raises:
      UserError: the batch does not divide over the hosts, or there are no classes to balance.
      DataError: a slice cannot be read.
    """
    part = data.part_of_host(batch_size, process_count)
    load = _LoadCases(
        cases, Order.of(cases.targets, seed=seed, sampling=sampling), target_fields(cases.targets, head, weights=weights),
        first=examples_seen + process_index * part, batch_size=batch_size, part=part, slices=slices, canvas=canvas,
    )  # fmt: skip
    return data.read_ahead(load, batches=max(threads, -(-prefetch // part)), threads=threads, workers=workers)


def scoring_batches(
    cases: Cases, *, batch_size: int, slices: int, canvas: tuple[int, int], process_index: int = 0, process_count: int = 1,
    threads: int = 2,
) -> Iterator[CaseBatch]:  # fmt: skip
    """This host's part of the global batches that have every case once, in order, without targets. The last one is filled with
    repetitions of the last case.

    Raises:
      UserError: the batch does not divide over the hosts.
      DataError: a slice cannot be read.
    """
    part = data.part_of_host(batch_size, process_count)
    load = _LoadCases(
        cases, _InOrder(len(cases)), {}, first=process_index * part, batch_size=batch_size, part=part, slices=slices,
        canvas=canvas,
    )  # fmt: skip
    steps = -(-len(cases) // batch_size)
    return itertools.islice(data.read_ahead(load, batches=min(threads, steps), threads=threads, workers=0), steps)


def to_devices(batch: CaseBatch, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Shaped[Array, "..."]]:
    """The fields of every host's part that a program takes, as global arrays. Does not block.

    Args:
      wanted: name -> shape and sharding of the global batch.
    """
    return {
        name: jax.make_array_from_process_local_data(abstract.sharding, batch[name])
        for name, abstract in wanted.items()
    }
