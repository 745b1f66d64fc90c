"""Labels of a shard folder as tasks: what is opened, refused and grouped."""

from pathlib import Path

import numpy as np
import pytest

from curia_common.errors import UserError
from curia_jax.evaluate import labels, shard_tasks
from curia_jax.evaluate.subgroups import Column
from data_pipeline.format import shards
from data_pipeline.format.shards import SliceSource


@pytest.fixture
def dataset(tiny_shards: Path) -> shard_tasks.Dataset:
    """The training slices, in the place of a test split."""
    source = SliceSource(tiny_shards, "train")
    return shard_tasks.Dataset(
        tiny_shards, {labels.TEST: source}, source.index, shards.sha256(tiny_shards / shards.INDEX)
    )


def test_folder_without_test_split_is_refused_with_the_splits_that_it_has(tiny_shards: Path) -> None:
    with pytest.raises(UserError, match=r"has no test split \(it has: train\); build it with --test above 0"):
        shard_tasks.open_dataset(tiny_shards)


def test_unknown_label_is_refused_with_those_that_there_are(dataset: shard_tasks.Dataset) -> None:
    known = labels.available(dataset.index)
    dataset.check(known)
    with pytest.raises(UserError, match=rf"no label 'ward' in the shards; there are: {known[0]}"):
        dataset.check(["ward"])


def test_groups_are_those_of_the_test_slices(dataset: shard_tasks.Dataset) -> None:
    part = labels.Labelled(np.array([3, 1]), *(np.array(["x", "y"]) for _ in range(3)))
    task = labels.Task("shards/plane", ("x", "y"), (), {labels.TEST: part})
    found = shard_tasks.groups(dataset, task, [Column("modality")])
    modality = dataset.index.column("modality").to_pylist()
    assert found["modality"].tolist() == [modality[3], modality[1]]
    with pytest.raises(UserError, match="--subgroups=ward: the shards have no such column; there are: .*modality"):
        shard_tasks.groups(dataset, task, [Column("ward")])


def test_sides_are_those_of_the_slices_of_every_split(dataset: shard_tasks.Dataset) -> None:
    part = labels.Labelled(np.array([3, 1]), *(np.array(["x", "y"]) for _ in range(3)))
    empty = part.restricted(np.zeros(2, bool))
    task = labels.Task("shards/plane", ("x", "y"), (), {labels.FIT: empty, labels.TEST: part})
    found = shard_tasks.sides(dataset, task, Column("modality", option="--across"))
    modality = dataset.index.column("modality").to_pylist()
    assert {split: of.tolist() for split, of in found.items()} == {"train": [], "test": [modality[3], modality[1]]}
    with pytest.raises(UserError, match="--across=ward: the shards have no such column"):
        shard_tasks.sides(dataset, task, Column("ward", option="--across"))
