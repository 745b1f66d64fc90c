"""Ranks and the LaTeX table of several backbones on several tasks."""

import dataclasses

import pytest

from curia_jax.evaluate.results import Score
from curia_jax.report import comparison
from tests.scores import make_score


def with_selection(value: float, selection: float, **settings) -> Score:
    score = make_score(value=value, **settings)
    assert score.fit is not None
    return dataclasses.replace(score, fit=dataclasses.replace(score.fit, selection_loss=selection))


def scores() -> list[Score]:
    """Task a: ours, then pixels and random equal. Task b: pixels, then ours; random undefined. Task c: an error."""
    made = []
    for task, metric, values in (
        ("shards/a", "auroc", {"run": 0.9, "random": 0.6, "pixels": 0.6}),
        ("b_1", "auroc", {"run": 0.7, "random": None, "pixels": 0.8}),
        ("age", "rmse", {"run": 4.0, "random": 9.0, "pixels": 6.0}),
    ):
        made += [
            make_score(task=task, backbone=name, metric=metric, value=value, low=0.1, high=9.5)
            for name, value in values.items()
        ]
        made.append(make_score(task=task, backbone="majority", head="none", metric=metric, value=0.5))
    return made


def test_ranks_follow_the_value_and_equal_values_share_one() -> None:
    (found,) = comparison.compare(scores())
    assert [line.ranks for line in found.lines] == [
        {"run": 1, "random": 2, "pixels": 2}, {"run": 2, "pixels": 1}, {"run": 1, "random": 3, "pixels": 2},
    ]  # fmt: skip
    assert [line.title for line in found.lines] == ["a", "b_1", "age"]


def test_mean_rank_is_over_tasks_with_all_backbones() -> None:
    (found,) = comparison.compare(scores())
    assert [found.mean_rank(name) for name in found.backbones] == [1.0, 2.5, 2.0, None]


def test_clinical_variables_are_not_ranked_and_do_not_narrow_the_mean_rank() -> None:
    clinical = make_score(task="age", backbone="clinical", metric="rmse", value=1.0)
    (found,) = comparison.compare([*scores(), clinical])
    assert "clinical" not in found.lines[2].ranks and found.lines[2].scores["clinical"].value == 1.0
    assert [found.mean_rank(name) for name in found.backbones] == [1.0, 2.5, 2.0, None, None]


def test_head_is_chosen_on_the_held_out_cases_not_on_the_test() -> None:
    found = [
        with_selection(0.99, 0.8, head="knn"), with_selection(0.7, 0.6, head="ridge"),
        make_score(backbone="majority", head="none", value=0.5),
    ]  # fmt: skip
    assert comparison.chosen_head(found, "run") == "ridge"
    (line,) = comparison.compare(found)[0].lines
    assert line.scores["run"].value == 0.7 and "majority" not in line.ranks


def test_protocols_are_never_in_one_table() -> None:
    made = [make_score(protocol="ours"), make_score(protocol="official", value=0.9)]
    assert [(c.protocol, c.lines[0].scores["run"].value) for c in comparison.compare(made)] == [
        ("ours", 0.7), ("official", 0.9),
    ]  # fmt: skip


def test_differences_are_not_compared() -> None:
    (found,) = comparison.compare([make_score(), make_score(against="pixels", value=0.1, low=-0.1, high=0.2)])
    assert found.lines[0].scores["run"].value == 0.7


def test_latex_marks_the_best_and_escapes_names() -> None:
    lines = comparison.latex(comparison.compare(scores())).splitlines()
    assert lines[0] == "% protocol ours; value [95 % interval]"
    assert lines[1] == r"\begin{tabular}{llllll}"
    assert (
        r"a & auroc & \textbf{0.900} [0.100, 9.500] & 0.600 [0.100, 9.500] & 0.600 [0.100, 9.500] & 0.500 [0.600, 0.800] \\"
        in lines
    )
    assert any(line.startswith(r"b\_1 & auroc & 0.700") and "& -- &" in line for line in lines)
    assert lines[-3] == r"mean rank &  & 1.00 & 2.50 & 2.00 & -- \\"
    assert lines[-1] == r"\end{tabular}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50 % & more", r"50 \% \& more"), ("a\\b~{c}^", r"a\textbackslash{}b\textasciitilde{}\{c\}\textasciicircum{}")],
)
def test_latex_escapes_every_special_sign(text: str, expected: str) -> None:
    made = comparison.latex(comparison.compare([make_score(task=text)]))
    assert f"{expected} & auroc" in made
