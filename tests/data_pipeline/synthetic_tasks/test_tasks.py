"""Which tasks there are, and what follows from a seed."""

import numpy as np
import pytest

from curia_common.errors import UserError
from data_pipeline.synthetic_tasks import tasks
from data_pipeline.synthetic_tasks.pictures import Picture

TASKS = {task.config: task for task in tasks.TASKS}


def drawn(config: str, split: str, *, seed: int = 0, patients: int = 3) -> list[list[Picture]]:
    return list(tasks.draw(TASKS[config], split, patients, seed=seed, size=32))


def test_three_patients_show_all_organs() -> None:
    task, shown = TASKS["anatomy-ct"], drawn("anatomy-ct", "val")
    assert [len(pictures) for pictures in shown] == [18, 18, 18]
    every = [picture for pictures in shown for picture in pictures]
    assert {picture.columns["organ"] for picture in every} == set(task.classes)
    assert all(task.classes[int(picture.target or 0)] == picture.columns["organ"] for picture in every)


def test_same_seed_draws_the_same_pictures_and_another_seed_others() -> None:
    first, second, other = (drawn("kits", "test", seed=seed) for seed in (1, 1, 2))
    assert len(first) == 3
    for (a, *_), (b, *_), (c, *_) in zip(first, second, other, strict=True):
        assert a.target == b.target
        np.testing.assert_array_equal(a.image, b.image)
        assert not np.array_equal(a.image, c.image)


def test_no_picture_is_in_two_splits() -> None:
    images = [pictures[0].image.tobytes() for split in tasks.SPLITS for pictures in drawn("covidx-ct", split)]
    assert len(images) == 3 * 3 + 3 + 3 == len(set(images))


def test_classes_have_their_shares_of_the_patients() -> None:
    # Two malignant lesions for each benign one, whatever the order.
    targets = [pictures[0].target for pictures in drawn("kits", "train", patients=4)]
    assert sorted(map(int, targets)) == [0] * 4 + [1] * 8


def test_patients_of_a_split_follow_from_those_of_the_test_split() -> None:
    found = [tasks.patients(TASKS["ich"], split, 5) for split in tasks.SPLITS]
    assert found == [30, 10, 10]  # twice as many as other tasks


@pytest.mark.parametrize(
    ("names", "chosen"), [(None, list(TASKS)), ("ich", ["ich"]), ("oasis,ich,oasis", ["oasis", "ich"])]
)
def test_choose_takes_names_with_commas(names: str | None, chosen: list[str]) -> None:
    assert [task.config for task in tasks.choose(names)] == chosen


@pytest.mark.parametrize(
    ("names", "message"), [("", "--tasks is empty; there are: anatomy-ct, "), ("ich,x", "no task 'x'; there are: ")]
)
def test_choose_refuses_unknown_names_and_lists_the_known(names: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tasks.choose(names)
