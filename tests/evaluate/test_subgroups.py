"""Groups of test cases, and their scores."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from curia_common.errors import UserError
from curia_jax.evaluate import __main__ as evaluate
from curia_jax.evaluate import results, subgroups
from curia_jax.evaluate.subgroups import Column
from tests.evaluate import published
from tests.evaluate.test_command import save_checkpoint


def test_values_are_groups_and_numbers_bands() -> None:
    assert Column.parse("scanner").groups(["A", None, "B", ""]).tolist() == ["A", "unknown", "B", "unknown"]
    ages = Column.parse("age:10").groups([59.9, 60, "70", None, math.nan])
    assert ages.tolist() == ["50 to 60", "60 to 70", "70 to 80", "unknown", "unknown"]
    assert Column.parse("grade").groups([1.0, 2.0, 10.0]).tolist() == ["1", "2", "10"]
    assert subgroups.in_order(np.array(["unknown", "100 to 110", "90 to 100", "100 to 110"])) == [
        "90 to 100", "100 to 110", "unknown"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "values", "line"),
    [
        ("age:0", [], "write a column, or a column of numbers with the width"),
        ("age:ten", [], "write a column, or a column of numbers with the width"),
        ("age", list(range(40)), "40 different groups, more than 30; give the width of bands"),
        ("sex:10", ["f"], "a value of the column is not a number"),
    ],
)
def test_column_that_makes_no_groups_is_refused(word: str, values: list, line: str) -> None:
    with pytest.raises(UserError, match=line):
        Column.parse(word).groups(values)


@pytest.mark.long
@pytest.mark.parametrize("protocol", ["ours", "official"])
def test_every_group_is_a_row_with_its_own_n_and_the_metric_of_its_cases(tmp_path, protocol: str) -> None:
    splits = published.task(per_patient=1)
    for rows in splits.values():
        for number, row in enumerate(rows):
            row["image"] += np.random.default_rng(number).normal(0, 400, row["image"].shape).astype(np.float32)
            row |= {"scanner": "rare" if number < 1 else "A" if number % 3 else "B", "age": 40 + 3.0 * number}
    published.write(tmp_path / "data/ich", splits)
    save_checkpoint(tmp_path / "run")
    words = [*published.words(tmp_path), "--tasks=ich"]
    words += ["--floors=histogram", "--heads=ridge", "--features=mean", "--draws=200", f"--protocol={protocol}"]
    assert evaluate.main([*words, "--subgroups=scanner,age:20,ward"]) == 0
    rows = json.loads((tmp_path / "out/results.json").read_text())
    cases = [
        c
        for c in pq.read_table(tmp_path / f"out/ich/{protocol}-predictions.parquet").to_pylist()
        if c["backbone"] == "histogram"
    ]
    by_group = {
        r["subgroup"]: r for r in rows if r["subgroup"] and (r["backbone"], r["metric"]) == ("histogram", "accuracy")
    }
    assert [(name, row["n"]) for name, row in by_group.items()] == [
        ("scanner=A", 8), ("scanner=B", 3), ("scanner=rare", 1), ("age=40 to 60", 7), ("age=60 to 80", 5)
    ]  # fmt: skip
    for name, row in by_group.items():
        column, value = name.split("=")
        inside = [
            case for case in cases
            if (splits["test"][case["slice"]]["scanner"] == value if column == "scanner"
                else int(value.split()[0]) <= splits["test"][case["slice"]]["age"] < int(value.split()[2]))
        ]  # fmt: skip
        truth, decided = [c["target"] for c in inside], [c["predicted"] for c in inside]
        assert row["value"] == pytest.approx(accuracy_score(truth, decided)) and row["events"] == truth.count("1")
        area = next(r for r in rows if r["subgroup"] == name and (r["backbone"], r["metric"]) == ("histogram", "auroc"))
        if len(set(truth)) == 2:
            assert area["value"] == pytest.approx(
                roc_auc_score([t == "1" for t in truth], [c["scores"][1] for c in inside])
            )
        else:
            assert area["value"] is None
    assert by_group["scanner=rare"]["low"] is None  # one patient
    assert "too few for an interval" in by_group["scanner=B"]["doubt"]
    # What reads results has the scores of all cases alone; the page has both.
    assert all(score.study.subgroup is None for score in results.read(tmp_path / "out/results.json"))
    page = (tmp_path / "out/report.html").read_text()
    assert "<td>40 to 60</td>" in page and "<td>rare</td>" in page
