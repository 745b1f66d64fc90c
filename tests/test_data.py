"""Order and content of batches: shuffling, hosts, workers, resuming, padding."""

import collections

import jax
import numpy as np
import pytest

from curia_common.errors import DataError, UserError
from curia_jax import data, sharding
from data_pipeline.format.records import DecodedSlice, SliceFacts
from tests.slices import FakeSlices, decoded_slice


class Slices(FakeSlices):
    """Slice n is filled with the number n."""

    def __init__(self, count: int, height: int = 4, width: int = 6) -> None:
        self._count = count
        self.split, self.largest = "train", (height, width)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> DecodedSlice:
        facts = SliceFacts(1.0, -1024.0, low=float(number), high=float(number + 1), hu=number % 2 == 0)
        return decoded_slice(np.full(self.largest, number, np.uint16), facts)


def numbers(source: Slices, batches: int, **settings) -> list[list[int]]:
    stream = data.training_batches(source, canvas=(5, 8), seed=3, **settings)
    return [next(stream)["slice"].tolist() for _ in range(batches)]


def test_epoch_holds_every_example_once_in_a_new_order() -> None:
    source = Slices(20)
    seen = np.concatenate(numbers(source, 12, batch_size=5))
    first, second, third = seen[:20], seen[20:40], seen[40:]
    for epoch in (first, second, third):
        assert sorted(epoch) == list(range(20))
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_hosts_read_disjoint_parts_of_the_same_batches(hosts: int, workers: int) -> None:
    source = Slices(24)
    whole = numbers(source, 6, batch_size=8)
    parts = [
        numbers(source, 6, batch_size=8, process_index=p, process_count=hosts, workers=workers if p == 0 else 0)
        for p in range(hosts)
    ]
    together = [sum((part[b] for part in parts), []) for b in range(6)]
    assert together == whole


@pytest.mark.parametrize(("hosts", "batch_size"), [(1, 8), (2, 8), (4, 4), (1, 12)])
def test_resume_with_other_hosts_or_batch_skips_and_repeats_nothing(hosts: int, batch_size: int) -> None:
    source = Slices(24)
    uninterrupted = np.concatenate(numbers(source, 12, batch_size=8))
    before = np.concatenate(numbers(source, 5, batch_size=8))
    steps = 48 // batch_size
    parts = [
        numbers(source, steps, batch_size=batch_size, examples_seen=40, process_index=p, process_count=hosts)
        for p in range(hosts)
    ]
    after = np.concatenate([sum((part[b] for part in parts), []) for b in range(steps)])
    np.testing.assert_array_equal(np.concatenate([before, after])[:88], uninterrupted[:88])
    assert set(collections.Counter(np.concatenate([before, after])[:72].tolist()).values()) == {3}


class DamagedSlices(Slices):
    """Slices of which some cannot be read."""

    damaged = frozenset({3, 11, 12})

    def __getitem__(self, number: int) -> DecodedSlice:
        if number in self.damaged:
            raise DataError(f"record {number} is damaged")
        return super().__getitem__(number)

    def place(self, number: int) -> str:
        return f"record {number}"


def read(source: Slices, batches: int, **settings) -> list[data.HostBatch]:
    stream = data.training_batches(source, canvas=(5, 8), seed=3, **settings)
    return [next(stream) for _ in range(batches)]


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_slices_are_replaced_and_the_order_of_the_rest_stays(workers: int) -> None:
    whole = np.concatenate(numbers(Slices(24), 6, batch_size=8))
    found = read(DamagedSlices(24), 6, batch_size=8, replace_damaged=True, workers=workers)
    slices, damaged = (np.concatenate([batch[name] for batch in found]) for name in ("slice", "damaged"))
    lost = np.isin(whole, list(DamagedSlices.damaged))
    np.testing.assert_array_equal(slices[~lost], whole[~lost])
    np.testing.assert_array_equal(damaged, np.where(lost, whole, -1))
    assert lost.sum() == 6 and not np.isin(slices, list(DamagedSlices.damaged)).any()
    for batch in found:
        assert (batch["pixels"][:, 0, 0] == batch["slice"]).all() and (batch["low"] == batch["slice"]).all()


def test_replacement_depends_on_neither_batch_nor_hosts() -> None:
    def replaced(**settings) -> dict[int, int]:
        batches = read(DamagedSlices(24), 24 // settings["batch_size"], replace_damaged=True, **settings)
        pairs = [pair for b in batches for pair in zip(b["damaged"].tolist(), b["slice"].tolist(), strict=True)]
        return {number: other for number, other in pairs if number >= 0}

    alone = replaced(batch_size=8)
    assert replaced(batch_size=4) == alone
    hosts = [replaced(batch_size=8, process_index=p, process_count=2) for p in range(2)]
    assert hosts[0] | hosts[1] == alone


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_slice_ends_reading_where_none_is_allowed(workers: int) -> None:
    with pytest.raises(DataError, match="record (3|11|12) is damaged"):
        read(DamagedSlices(24), 3, batch_size=8, workers=workers)


def test_damage_is_counted_once_per_slice_and_limited(caplog: pytest.LogCaptureFixture) -> None:
    source = DamagedSlices(24)
    batches = read(source, 6, batch_size=8, replace_damaged=True)
    allowed = data.Damage(source, 3 / 24)
    for batch in batches:
        allowed.note(batch)
    assert len(caplog.messages) == 3
    assert caplog.messages[-1].endswith("is damaged: another slice is in its place (3 of 24 slices so far)")
    limited = data.Damage(source, 0.1)
    with pytest.raises(DataError, match="that makes 3 of 24 slices, more than the share of 0.1 that") as error:
        for batch in batches:
            limited.note(batch)
    assert error.value.exit_code == 65


def test_batch_holds_slices_on_their_canvas() -> None:
    batch = next(data.training_batches(Slices(8), batch_size=4, canvas=(5, 8), seed=0))
    assert batch["pixels"].shape == (4, 5, 8)
    for row, number in enumerate(batch["slice"]):
        assert (batch["pixels"][row, :4, :6] == number).all()
        assert batch["pixels"][row, 4:].sum() == batch["pixels"][row, :, 6:].sum() == 0
        assert batch["low"][row] == number
        assert batch["hu"][row] == (number % 2 == 0)
    assert {name: batch[name].dtype for name in data.DEVICE_FIELDS} == {
        n: np.dtype(t) for n, t in data.DEVICE_FIELDS.items()
    }
    assert (batch["extent"] == (4, 6)).all()


def test_batch_reaches_every_device_as_integers() -> None:
    mesh = sharding.make_mesh(data=4, fsdp=2)
    host = next(data.training_batches(Slices(8), batch_size=8, canvas=(5, 8), seed=0))
    batch = data.to_devices(host, sharding.batch_sharding(mesh))
    assert set(batch) == set(data.DEVICE_FIELDS)
    assert batch["pixels"].dtype == np.uint16
    assert [s.data.shape for s in batch["pixels"].addressable_shards] == [(1, 5, 8)] * 8
    np.testing.assert_array_equal(jax.device_get(batch["pixels"]), host["pixels"])


def test_evaluation_batches_keep_order_and_mark_padding() -> None:
    batches = list(data.evaluation_batches(Slices(9), np.array([8, 3, 5, 0, 1]), batch_size=4, canvas=(4, 6)))
    assert [b["slice"].tolist() for b in batches] == [[8, 3, 5, 0], [1, 1, 1, 1]]
    assert [b["valid"].tolist() for b in batches] == [[True] * 4, [True, False, False, False]]


def test_canvas_that_does_not_fit_is_refused() -> None:
    assert data.canvas_size(Slices(3).largest, None) == (4, 6)
    assert data.canvas_size(Slices(3).largest, (8, 8)) == (8, 8)
    with pytest.raises(UserError, match=r"4x6 px do not fit the canvas 4x4; set --config.data.canvas=\(4,6\)"):
        data.canvas_size(Slices(3).largest, (4, 4))


def test_batch_that_does_not_divide_over_hosts_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size 9 does not divide over 2 hosts"):
        data.training_batches(Slices(9), batch_size=9, canvas=(4, 6), seed=0, process_count=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_on_a_device_keeps_its_pixels_while_later_ones_are_read(workers: int) -> None:
    """On a CPU device a batch is used in place: its buffer must not be reused while the batch is held."""
    split = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:1]))
    stream = data.training_batches(
        Slices(40), batch_size=4, canvas=(8, 8), seed=0, threads=2, prefetch=8, workers=workers
    )
    held = []
    for batch, _ in zip(stream, range(30), strict=False):
        held.append((batch["slice"], data.to_devices(batch, split)["pixels"]))
    for numbers, pixels in held:
        found = np.asarray(pixels)
        assert (found[:, :4, :6] == numbers[:, None, None]).all()
        assert found[:, 4:].sum() == found[:, :, 6:].sum() == 0


@pytest.mark.parametrize(
    ("slices", "most", "wanted"), [(5, 3, [0, 2, 4]), (2, 3, [0, 1]), (9, 1, [4]), (100, 4, [12, 37, 62, 87])]
)
def test_spread_takes_the_middles_of_equal_parts(slices: int, most: int, wanted: list[int]) -> None:
    assert data.spread(np.arange(slices), most).tolist() == wanted
