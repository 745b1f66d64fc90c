"""Rows of results: written and read back as JSON and CSV."""

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest

from curia_common.errors import DataError, UserError
from curia_jax.evaluate import results
from tests.scores import make_score

PROVENANCE = results.Provenance("0" * 16, "{}", ("mean", "cls@2"), (16, 16), ((16, 16), (24, 24)), 7, 56)
SCORES = [
    make_score(provenance=PROVENANCE),
    make_score(value=None, low=None, high=None),
    make_score(against="random", value=0.1, low=-0.1, high=0.2),
    make_score(backbone="pixels", provenance=results.Provenance("pixels", "{}")),
    make_score(backbone="majority", head="none"),
]
NOT_SCORED = results.NotScored("registration", "official", "not_run", "dense tasks do not exist yet")


def test_scores_survive_a_round_trip_through_json(tmp_path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(results.rows([*SCORES, NOT_SCORED])))
    assert results.read(tmp_path / "rows.json") == SCORES


def test_rows_have_every_column_and_null_where_none_applies() -> None:
    rows = results.rows([*SCORES, NOT_SCORED])
    assert all(tuple(row)[: len(results.COLUMNS)] == results.COLUMNS for row in rows)
    checkpoint, undefined, difference, pixels, majority, not_run = rows
    assert checkpoint["features"] == "mean" and checkpoint["against"] is None and checkpoint["events"] == 25
    assert undefined["value"] is None and undefined["selection_auroc"] is None
    assert (difference["metric"], difference["against"]) == ("auroc", "random")
    assert "selection" not in difference and pixels["step"] is None and checkpoint["step"] == 7
    assert "selection" not in majority and majority["features"] is None
    assert not_run["status"] == "not_run" and not_run["reason"] == NOT_SCORED.reason and not_run["value"] is None


def test_csv_has_the_columns_of_every_row() -> None:
    text = results.to_csv(results.rows([*SCORES, NOT_SCORED]))
    lines = list(csv.DictReader(io.StringIO(text)))
    assert tuple(lines[0]) == results.COLUMNS and len(lines) == 6
    assert (lines[0]["value"], lines[0]["status"], lines[1]["value"]) == ("0.7", "ok", "")
    assert (lines[5]["task"], lines[5]["reason"]) == ("registration", NOT_SCORED.reason)


def test_rows_name_what_intervals_are_over() -> None:
    unknown = make_score(patients=80, groups="files (patients unknown)")
    assert results.rows([unknown])[0]["interval"] == "95 % percentile bootstrap over files (patients unknown)"
    assert unknown.study.count_groups(80) == "80 files (patients unknown)"
    known = SCORES[0]
    assert results.rows([known])[0]["interval"] == "95 % percentile bootstrap over patients"
    assert [known.study.count_groups(n) for n in (1, 12)] == ["1 patient", "12 patients"]


def test_title_of_a_label_has_no_prefix() -> None:
    study = dataclasses.replace(SCORES[0].study, task="shards/lesion")
    assert (study.title, SCORES[0].study.title) == ("lesion", "lesion")


def test_texts_have_sign_for_differences_and_words_for_undefined() -> None:
    texts = [f"{score.value_text} {score.interval_text}" for score in SCORES[:3]]
    assert texts == ["0.700 [0.600, 0.800]", "undefined [no interval]", "+0.100 [-0.100, +0.200]"]


@pytest.mark.parametrize("text", ["[{", '{"rows": []}', '[{"task": "lesion"}]', '[{"status": "ok"}]', "[1]"])
def test_read_rejects_other_files(tmp_path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match="rows.json"):
        results.read(tmp_path / "rows.json")


def test_read_names_missing_file(tmp_path) -> None:
    with pytest.raises(UserError, match="no file .*none.json"):
        results.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("labels", "text"),
    [("100 %", ""), ("10 %", ", 10 % of the labels (seed 2)"), ("k=1", ", 1 labels of every class (seed 2)")],
)
def test_few_labels_are_named(labels, text: str) -> None:
    assert make_score(labels=labels, seed=2).study.few_text == text


@pytest.mark.parametrize(
    ("amount", "text"), [(1.0, "100 %"), (1, "k=1"), (0.25, "25 %"), (0.01, "1 %"), (0.005, "0.5 %"), (16, "k=16")]
)
def test_labels_tell_a_share_from_a_number_of_cases(amount: int | float, text: str) -> None:
    assert results.labels_text(amount) == text
    read = results.labels_amount(text)
    assert read == pytest.approx(amount) and type(read) is type(amount)


def test_title_and_files_name_the_column_across_which_a_task_is_scored(tmp_path: Path) -> None:
    pooled, modality, age = (
        make_score("shards/lesion", across=across, trained_on=trained, tested_on=tested).study
        for across, trained, tested in (
            (None, None, None),
            ("modality", "CT", "MR"),
            ("age:20", "20 to 40", "40 to 60"),
        )
    )
    assert [one.title for one in (pooled, modality, age)] == [
        "lesion", "lesion, CT to MR", "lesion, age 20 to 40 to 40 to 60",
    ]  # fmt: skip
    assert [results.predictions_path(tmp_path, one).name for one in (pooled, modality, age)] == [
        "ours-predictions.parquet", "ours-across-modality-predictions.parquet", "ours-across-age-20-predictions.parquet",
    ]  # fmt: skip
