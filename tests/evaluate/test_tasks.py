"""The records of the 19 tasks, and how a task is found."""

from pathlib import Path

import pytest

from curia_common.errors import UserError
from curia_jax.evaluate import tasks

OWN = """
from curia_jax.evaluate.tasks import CT, IMAGE, Task

TASK = Task(name="ward", title="x", origin="x", licence="x", access="x", modality=CT, form=IMAGE, classes=2)
"""


def test_there_are_19_tasks_with_names_of_their_own() -> None:
    assert len(tasks.CURIABENCH) == 19 == len({task.name for task in tasks.CURIABENCH})
    assert tasks.SUITES["curiabench"] is tasks.CURIABENCH


@pytest.mark.parametrize("task", tasks.CURIABENCH, ids=lambda task: task.name)
def test_record_is_whole(task: tasks.Task) -> None:
    assert task.title and task.origin and task.licence and task.access
    assert task.modality in (tasks.CT, tasks.MR, tasks.BOTH)
    assert (task.not_run is not None) == (task.form == tasks.PAIR)
    if task.target == tasks.VALUE:
        assert task.metrics == ("rmse", "mae", "r2")
    if task.target == tasks.TIME:
        assert task.metrics == ("c_index",) and task.clinical
    if task.official is not None and task.official.head == "attention":
        assert task.volume  # over the tokens of several slices


@pytest.mark.parametrize(
    ("form", "masked", "volume"),
    [
        (tasks.IMAGE, False, False), (tasks.MASKED_IMAGE, True, False), (tasks.IMAGE_OR_MASKED, None, False),
        (tasks.VOLUME, False, True), (tasks.MASKED_VOLUME, True, True), (tasks.VOLUME_OR_MASKED, None, True),
    ],
)  # fmt: skip
def test_form_says_whether_there_is_a_mask_and_several_slices(form: str, masked: bool | None, volume: bool) -> None:
    task = tasks.Task("x", "x", "x", "x", "x", tasks.CT, form)
    assert task.masked is masked and task.volume is volume


def test_task_is_found_by_name_or_in_a_file(tmp_path: Path) -> None:
    assert tasks.find("ich").title == "intracranial haemorrhage"
    (tmp_path / "ward.py").write_text(OWN)
    assert tasks.find(str(tmp_path / "ward.py")).name == "ward"


@pytest.mark.parametrize(
    ("word", "content", "message"),
    [
        ("ihc", None, "no task 'ihc'; --list shows those of CuriaBench"),
        ("none.py", None, "no file .*none.py; a task of your own is a Python file that sets TASK"),
        ("three.py", "TASK = 3", "sets no TASK of type curia_jax.evaluate.tasks.Task"),
        ("empty.py", "", "sets no TASK of type curia_jax.evaluate.tasks.Task"),
    ],
)
def test_what_is_no_task_is_refused(word: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / word).write_text(content)
    with pytest.raises(UserError, match=message):
        tasks.find(str(tmp_path / word) if word.endswith(".py") else word)
