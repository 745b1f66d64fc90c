"""Scores on standard error: one table of values, one of paired differences."""

import pytest

from curia_jax.evaluate import table
from curia_jax.evaluate.results import Score
from tests.scores import make_score


def shown(scores: list[Score], capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The printed lines, each as its cells without the frame."""
    table.show(scores)
    out, err = capsys.readouterr()
    assert out == ""
    lines = [[cell.strip() for cell in line.replace("┃", "│").split("│")] for line in err.splitlines()]
    return [[cell for cell in line if cell] for line in lines]


def test_values_and_differences_are_two_tables(capsys) -> None:
    scores = [
        make_score(value=0.71, low=0.6, high=0.8),
        make_score(metric="balanced_accuracy", value=0.65, low=0.5, high=0.75),
        make_score(backbone="pixels", head="knn", value=0.55, low=0.45, high=0.62),
        make_score(backbone="pixels", head="knn", metric="balanced_accuracy", value=0.5, low=0.4, high=0.6),
        make_score(against="random", value=-0.05, low=-0.11, high=0.02),
    ]
    lines = shown(scores, capsys)
    heading = ["task", "features", "probe", "auroc", "balanced accuracy"]
    assert lines.index(["value [95 % interval]"]) < lines.index(heading)
    assert ["lesion", "run", "ridge", "0.710 [0.600, 0.800]", "0.650 [0.500, 0.750]"] in lines
    assert ["lesion", "pixels", "knn", "0.550 [0.450, 0.620]", "0.500 [0.400, 0.600]"] in lines
    differences = lines[lines.index(["paired difference [95 % interval]"]) :]
    assert ["task", "features", "probe", "auroc"] in differences
    assert ["lesion", "run - random", "ridge", "-0.050 [-0.110, +0.020]"] in differences


def test_tasks_and_probes_have_lines_of_their_own(capsys) -> None:
    scores = [make_score(task, head=head) for task in ("lesion", "region") for head in ("knn", "ridge")]
    lines = shown(scores, capsys)
    found = [line[:3] for line in lines if line[1:2] == ["run"]]
    assert found == [[task, "run", head] for task in ("lesion", "region") for head in ("knn", "ridge")]


def test_undefined_value_is_a_word_and_empty_table_is_left_out(capsys) -> None:
    lines = shown([make_score(value=None, low=None, high=None)], capsys)
    assert ["lesion", "run", "ridge", "undefined [no interval]"] in lines
    assert ["paired difference [95 % interval]"] not in lines
