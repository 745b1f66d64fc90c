"""Several folders as one source: shares, epochs, hosts, resuming, damage."""

import pickle
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from curia_common.errors import DataError, UserError
from curia_jax import data
from curia_jax.mixture import Mixture, open_slices
from data_pipeline.format.records import DecodedSlice, SliceFacts
from data_pipeline.format.shards import SliceSource
from tests.slices import FakeSlices, decoded_slice


class Folder(FakeSlices):
    """Slice n is filled with `start` + n; some cannot be read."""

    def __init__(self, count: int, start: int, fingerprint: str, damaged: Sequence[int] = ()) -> None:
        self._count, self._start, self._damaged = count, start, damaged
        self.split, self.fingerprint, self.additions = "train", fingerprint, start // 100
        self.largest = (4 + start // 100, 6)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> DecodedSlice:
        if number in self._damaged:
            raise DataError(f"slice {self._start + number} is damaged")
        facts = SliceFacts(1.0, 0.0, low=0.0, high=1.0, hu=False)
        return decoded_slice(np.full((4, 6), self._start + number, np.uint16), facts)

    def place(self, number: int) -> str:
        return f"folder {self._start}, slice {number},"


SHARES = (Fraction(7, 10), Fraction(3, 10))


def mixed(damaged: Sequence[int] = (), shares: Sequence[Fraction] = SHARES) -> Mixture:
    """Slices 0 to 29 with a share of 0.7, and 100 to 106 with 0.3."""
    return Mixture([Folder(30, 0, "a"), Folder(7, 100, "b", damaged)], shares)


def values(source: Mixture, batches: int, **settings) -> np.ndarray:
    """The pixel value of each example."""
    stream = data.training_batches(source, canvas=(6, 8), seed=3, **settings)
    return np.concatenate([next(stream)["pixels"][:, 0, 0] for _ in range(batches)])


def test_every_folder_has_its_share_of_every_batch() -> None:
    small = values(mixed(), 40, batch_size=10).reshape(40, 10) >= 100
    assert (small.sum(axis=1) == 3).all()


def test_every_folder_has_epochs_of_its_own_in_new_orders() -> None:
    found = values(mixed(), 30, batch_size=10)
    for folder, count, whole in ((found[found < 100], 30, 7), (found[found >= 100], 7, 12)):
        epochs = folder[: whole * count].reshape(whole, count)
        assert all(len(set(epoch)) == count for epoch in epochs.tolist())
        assert not np.array_equal(epochs[0], epochs[1])


def test_folders_of_one_size_have_different_orders() -> None:
    twins = Mixture([Folder(30, 0, "a"), Folder(30, 100, "b")], (Fraction(1, 2),) * 2)
    found = values(twins, 3, batch_size=20)
    assert not np.array_equal(found[found < 100], found[found >= 100] - 100)


def test_examples_are_the_same_in_every_version() -> None:
    """A run that an earlier version began resumes in its order."""
    assert mixed().slice_numbers(0, 12, seed=7).tolist() == [14, 30, 18, 26, 27, 32, 28, 8, 35, 1, 17, 36]
    assert mixed().slice_numbers(10**12 + 3, 6, seed=0).tolist() == [6, 29, 35, 19, 13, 34]


@pytest.mark.parametrize(("hosts", "batch_size", "workers"), [(1, 10, 2), (2, 20, 0), (4, 8, 0)])
def test_resume_with_other_hosts_or_batch_continues_the_examples(hosts: int, batch_size: int, workers: int) -> None:
    whole = values(mixed(), 20, batch_size=10)
    steps = 120 // batch_size
    parts = [
        values(mixed(), steps, batch_size=batch_size, examples_seen=80, process_index=p, process_count=hosts, workers=workers)
        for p in range(hosts)
    ]  # fmt: skip
    after = np.concatenate([part.reshape(steps, -1) for part in parts], axis=1).ravel()
    np.testing.assert_array_equal(after, whole[80:])


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_slice_is_replaced_from_its_own_folder(workers: int) -> None:
    whole = values(mixed(), 20, batch_size=10)
    found = values(mixed(damaged=[2, 5]), 20, batch_size=10, replace_damaged=True, workers=workers)
    lost = np.isin(whole, (102, 105))
    np.testing.assert_array_equal(found[~lost], whole[~lost])
    assert lost.sum() > 10 and ((found[lost] >= 100) & ~np.isin(found[lost], (102, 105))).all()
    with pytest.raises(DataError, match="slice 10[25] is damaged"):
        values(mixed(damaged=[2, 5]), 20, batch_size=10)


def test_slices_are_those_of_the_folders_in_turn() -> None:
    source = pickle.loads(pickle.dumps(mixed()))
    assert (len(source), source.largest, source.additions) == (37, (5, 6), 1)
    images = np.empty((3, 5, 6), np.uint16)
    source.read_into([29, 30, 36], images)
    assert images[:, 0, 0].tolist() == [29, 100, 106]
    assert source.place(36) == "folder 100, slice 6,"
    with pytest.raises(IndexError):
        source.read_into([37], images)


def test_fingerprint_follows_folders_and_shares() -> None:
    other = Mixture([Folder(30, 0, "a"), Folder(7, 100, "c")], SHARES)
    turned = Mixture([Folder(7, 100, "b"), Folder(30, 0, "a")], SHARES[::-1])
    found = [one.fingerprint for one in (mixed(), mixed(shares=(Fraction(1, 2),) * 2), other, turned)]
    assert len(set(found)) == 4 and mixed().fingerprint == found[0]


def test_folder_alone_is_opened_as_before(tiny_shards: Path) -> None:
    source = open_slices(str(tiny_shards), "train")
    assert type(source) is SliceSource and source.fingerprint == SliceSource(tiny_shards, "train").fingerprint


def test_mixture_of_shards_reads_their_slices(tiny_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to(tiny_shards)
    source = open_slices(f"{tiny_shards}:1,{tmp_path / 'b'}:3", "train")
    assert isinstance(source, Mixture) and len(source) == 96
    images = np.zeros((2, *source.largest), np.uint16)
    source.read_into([5, 53], images)
    np.testing.assert_array_equal(images[0], images[1])
    assert images.any() and list(source.check_shards()) == [None] * (2 * len(list(tiny_shards.glob("*array_record*"))))
    source.check_access()
    with pytest.raises(UserError, match=f"no shards in {tmp_path / 'none'}"):
        open_slices(f"{tiny_shards}:1,{tmp_path / 'none'}:3", "train")
