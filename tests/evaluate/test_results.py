"""Rows of results: written and read back as JSON."""

import dataclasses
import json

import pytest

from curia_common.errors import DataError, UserError
from curia_jax.evaluate import results
from tests.scores import make_score

PROVENANCE = results.Provenance("mean", "last", 7, 56, "0" * 16, (16, 16), ((16, 16), (24, 24)), "1" * 16)
SCORES = [
    make_score(provenance=PROVENANCE),
    make_score(value=None, low=None, high=None),
    make_score(against="random", value=0.1, low=-0.1, high=0.2),
    make_score(backbone="pixels", provenance=dataclasses.replace(PROVENANCE, features=None, layers=None)),
    make_score(backbone="none", head="majority"),
]


def test_scores_survive_a_round_trip_through_json(tmp_path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(results.rows(SCORES)))
    assert results.read(tmp_path / "rows.json") == SCORES


def test_rows_omit_fields_that_do_not_apply() -> None:
    checkpoint, undefined, difference, pixels, majority = results.rows(SCORES)
    assert checkpoint["features"] == "mean" and "against" not in checkpoint
    assert undefined["value"] is None and undefined["selection_auroc"] is None
    assert (difference["metric"], difference["against"]) == ("auroc_difference", "random")
    assert "selection" not in difference and "features" not in pixels and pixels["step"] == 7
    assert "selection" not in majority


def test_rows_name_what_intervals_are_over() -> None:
    unknown = make_score(patients=80, groups="files (patients unknown)")
    assert results.rows([unknown])[0]["interval"] == "95 % percentile bootstrap over files (patients unknown)"
    assert unknown.study.count_groups(80) == "80 files (patients unknown)"
    known = SCORES[0]
    assert results.rows([known])[0]["interval"] == "95 % percentile bootstrap over patients"
    assert [known.study.count_groups(n) for n in (1, 12)] == ["1 patient", "12 patients"]


def test_rows_of_older_versions_are_over_patients() -> None:
    row = {name: value for name, value in results.rows(SCORES[:1])[0].items() if name != "groups"}
    assert results.Score.from_row(row) == SCORES[0]


def test_texts_have_sign_for_differences_and_words_for_undefined() -> None:
    texts = [f"{score.value_text} {score.interval_text}" for score in SCORES[:3]]
    assert texts == ["0.700 [0.600, 0.800]", "undefined [no interval]", "+0.100 [-0.100, +0.200]"]


@pytest.mark.parametrize("text", ["[{", '{"rows": []}', '[{"task": "lesion"}]', "[1]"])
def test_read_rejects_other_files(tmp_path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match="rows.json"):
        results.read(tmp_path / "rows.json")


def test_read_names_missing_file(tmp_path) -> None:
    with pytest.raises(UserError, match="no file .*none.json"):
        results.read(tmp_path / "none.json")
