"""Order and content of the batches of labelled cases: shuffling, balancing, bags, hosts, resuming, padding."""

import collections

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curia_common.errors import UserError
from curia_jax import examples, order, sharding
from curia_jax.evaluate.targets import Classes, Labels, Times, Values
from curia_jax.examples import Cases
from curia_jax.models.head import HeadConfig
from tests.test_data import Slices

CLASSES = HeadConfig("linear", "cls", "classes", ("a", "b", "c"))
CANVAS = (5, 8)


def cases(labels: list[int], *, lengths: list[int] | None = None, masked: bool = False) -> Cases:
    """Cases of one slice each, or of so many; slice n is filled with n, and its mask is row n mod 4."""
    lengths = lengths or [1] * len(labels)
    bags = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])

    def masks(numbers, canvas) -> None:
        for number, mask in zip(numbers, canvas, strict=True):
            mask[number % 4, :6] = 1

    return Cases(Slices(sum(lengths)), tuple(bags), Classes(np.array(labels), 3), masks if masked else None)


def taken(made: Cases, batches: int, **changes) -> list[examples.CaseBatch]:
    words = {"batch_size": 4, "slices": 1, "canvas": CANVAS, "seed": 3} | changes
    stream = examples.training_batches(made, CLASSES, **words)
    return [next(stream) for _ in range(batches)]


# ---- which case is example g


def test_epoch_has_every_case_once_in_the_order_of_slices() -> None:
    found = np.concatenate([batch["case"] for batch in taken(cases([0, 1, 2] * 4), 6)])
    assert sorted(found[:12]) == sorted(found[12:]) == list(range(12))
    np.testing.assert_array_equal(found, order.slice_numbers(0, 24, slices=12, seed=3))


def test_balanced_sampling_draws_classes_equally_and_cases_in_epochs() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2] * 3)
    members = [np.flatnonzero(labels == label) for label in range(3)]
    found = examples.balanced_numbers(0, 42, members=members, seed=1)
    for start in range(0, 42, 3):  # of any three that follow one another
        assert sorted(labels[found[start : start + 3]]) == [0, 1, 2]
    for label, own in enumerate(members):
        drawn = found[labels[found] == label]
        for start in range(0, len(drawn) - len(own) + 1, len(own)):
            assert sorted(drawn[start : start + len(own)]) == own.tolist()


def test_classes_of_equal_size_are_not_drawn_in_the_same_pairs() -> None:
    members = [np.arange(0, 20), np.arange(20, 40)]
    found = examples.balanced_numbers(0, 80, members=members, seed=0).reshape(-1, 2)
    assert len(set(map(tuple, found.tolist()))) > 30  # 20 where the pairs were the same in both epochs


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10**9), st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(1, 9), min_size=2, max_size=4)
)
def test_balanced_example_follows_from_its_number_alone(first: int, before: int, count: int, sizes: list[int]) -> None:
    members = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    whole = examples.balanced_numbers(first, before + count, members=members, seed=5)
    part = examples.balanced_numbers(first + before, count, members=members, seed=5)
    np.testing.assert_array_equal(whole[before:], part)


def test_balanced_sampling_without_classes_is_refused() -> None:
    with pytest.raises(UserError, match="finetune.sampling is balanced, but the task has no classes; set --config"):
        examples.Order.of(Values(np.arange(4.0)), seed=0, sampling="balanced")


# ---- targets


def test_class_weights_give_every_class_the_same_sum_and_the_mean_1() -> None:
    targets = Classes(np.array([0, 0, 0, 1, 1, 2]), 3)
    weight = examples.target_fields(targets, CLASSES, weights="balanced")["weight"]
    np.testing.assert_allclose(weight, [2 / 3, 2 / 3, 2 / 3, 1, 1, 2], rtol=1e-6)
    assert examples.target_fields(targets, CLASSES)["weight"].tolist() == [1] * 6


def test_targets_have_the_form_that_each_loss_takes() -> None:
    value = HeadConfig("linear", "cls", "value", ("age",), mean=40.0, scale=8.0)
    found = examples.target_fields(Values(np.array([40.0, 56.0])), value)
    assert found["target"].dtype == np.float32 and found["target"].tolist() == [0, 2]
    time = HeadConfig("linear", "cls", "time", ("survival",))
    found = examples.target_fields(Times(np.array([3.5, 2.0]), np.array([True, False])), time)
    assert (found["target"].tolist(), found["event"].tolist()) == ([3.5, 2.0], [True, False])
    labels = HeadConfig("linear", "cls", "labels", ("a", "b"))
    found = examples.target_fields(Labels(np.array([[True, False], [False, False]])), labels)
    assert found["target"].dtype == np.float32 and found["target"].tolist() == [[1, 0], [0, 0]]
    with pytest.raises(UserError, match="finetune.class_weights is balanced, but the task has no classes"):
        examples.target_fields(Values(np.arange(2.0)), value, weights="balanced")


def test_loss_of_labels_is_the_mean_log_loss_of_each() -> None:
    targets = Labels(np.array([[True, False], [False, True]]))
    loss = targets.loss(np.array([[0.8, 0.1], [0.5, 0.25]]))
    assert loss == pytest.approx(-(np.log(0.8) + np.log(0.9) + np.log(0.5) + np.log(0.25)) / 2)


# ---- batches


def test_bag_has_its_slices_and_says_which_places_are_filled() -> None:
    made = cases([0, 1, 2], lengths=[2, 1, 7], masked=True)
    (batch,) = taken(made, 1, batch_size=3, slices=3)
    by_case = {int(case): row for row, case in enumerate(batch["case"])}
    wanted = {0: ([0, 1], [True, True, False]), 1: ([2], [True, False, False]), 2: ([4, 6, 8], [True, True, True])}
    for case, (numbers, valid) in wanted.items():
        row = by_case[case]
        assert batch["valid"][row].tolist() == valid
        for place, number in enumerate(numbers):
            assert batch["pixels"][row, place, :4, :6].tolist() == np.full((4, 6), number).tolist()
            assert not batch["pixels"][row, place, 4:].any() and not batch["pixels"][row, place, :, 6:].any()
            assert batch["low"][row, place] == number and batch["hu"][row, place] == (number % 2 == 0)
            assert np.argwhere(batch["region"][row, place]).tolist() == [[number % 4, x] for x in range(6)]
    assert batch["target"][by_case[2]] == 2 and batch["extent"].shape == (3, 3, 2)


def test_cases_without_regions_have_no_field_region() -> None:
    assert "region" not in taken(cases([0, 1, 2, 0]), 1)[0]


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_resume_with_other_hosts_or_batch_skips_and_repeats_nothing(sampling: str) -> None:
    made = cases([0, 0, 0, 1, 1, 2, 2])
    whole = np.concatenate([batch["case"] for batch in taken(made, 6, batch_size=4, sampling=sampling)])
    parts = [
        taken(made, 2, batch_size=8, sampling=sampling, examples_seen=8, process_index=host, process_count=2)
        for host in (0, 1)
    ]
    found = [part[step]["case"] for step in (0, 1) for part in parts]
    np.testing.assert_array_equal(np.concatenate(found), whole[8:24])


def test_worker_processes_give_the_same_batches() -> None:
    made = cases([0, 1, 2, 0, 1], lengths=[1, 2, 1, 2, 1])
    for here, there in zip(taken(made, 3, slices=2), taken(made, 3, slices=2, workers=1), strict=True):
        assert here.keys() == there.keys()
        for name, value in here.items():
            np.testing.assert_array_equal(value, there[name])


def test_batch_that_does_not_divide_over_hosts_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size 4 does not divide over 3 hosts; choose a multiple of 3"):
        taken(cases([0, 1, 2]), 1, process_count=3)


def test_scoring_has_every_case_once_in_order_and_fills_the_last_batch() -> None:
    made = cases([0, 1, 2, 0, 1])
    found = [
        list(examples.scoring_batches(made, batch_size=4, slices=1, canvas=CANVAS, process_index=host, process_count=2))
        for host in (0, 1)
    ]
    assert [batch["case"].tolist() for batch in found[0]] == [[0, 1], [4, 4]]
    assert [batch["case"].tolist() for batch in found[1]] == [[2, 3], [4, 4]]
    assert "target" not in found[0][0] and "weight" not in found[0][0]


def test_batches_are_split_over_the_mesh_with_the_fields_that_are_wanted() -> None:
    mesh = sharding.make_mesh(data=4, devices=jax.devices()[:4])
    split = sharding.batch_sharding(mesh)
    (batch,) = taken(cases([0, 1, 2, 0]), 1)
    wanted = {
        name: jax.ShapeDtypeStruct(batch[name].shape, batch[name].dtype, sharding=split)
        for name in ("pixels", "target")
    }
    found = examples.to_devices(batch, wanted)
    assert found.keys() == {"pixels", "target"} and found["pixels"].sharding == split
    np.testing.assert_array_equal(found["target"], batch["target"])


def test_order_of_cases_is_evenly_random_in_balanced_sampling() -> None:
    """Each case of a class comes first in its epoch about as often as another."""
    members = [np.arange(4), np.arange(4, 9)]
    first = collections.Counter(
        int(examples.balanced_numbers(0, 1, members=members, seed=seed)[0]) for seed in range(400)
    )
    assert set(first) == {0, 1, 2, 3} and min(first.values()) > 60
