"""Scores of synthetic features: their rows, differences and independence of the test labels."""

import json

import numpy as np
import pyarrow as pa
import pytest

from curia_common.errors import UserError
from curia_jax.evaluate import labels, results, scoring

SLICES = {"train": 90, "validation": 45, "test": 60}
BACKBONES = {"run": 0.8, "random": 2.0, "pixels": 4.0}  # noise around the class centres


def a_study(classes: int = 3, per_series: int = 3, seed: int = 0):
    """A task and features of it; every series is a patient of one class."""
    rng = np.random.default_rng(seed)
    rows, features = [], {}
    centres = rng.normal(size=(classes, 8))
    for split, count in SLICES.items():
        series = np.arange(count) // per_series
        label = series % classes
        rows += [
            {"split": split, "patient": f"{split}{s}", "series": f"{split}{s}", "label_kind": f"class {c}"}
            for s, c in zip(series, label, strict=True)
        ]
        features[split] = {
            name: {"mean": (centres[label] + noise * rng.normal(size=(count, 8))).astype(np.float32)}
            for name, noise in BACKBONES.items()
        }
    return labels.task(pa.Table.from_pylist(rows), "kind"), features


def pick(rows, **wanted):
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def test_rows_have_documented_fields_in_order() -> None:
    task, features = a_study()
    rows = results.rows(scoring.score(task, features)[0])
    json.dumps(rows, allow_nan=False)
    assert len(rows) == (3 * 3 + 2 * 3 + 1) * 3
    for row in rows:
        assert tuple(row)[:17] == results.COLUMNS and row["status"] == "ok" and row["reason"] is None
        assert row["low"] <= row["value"] <= row["high"]
        assert (row["task"], row["n"], row["patients"], row["draws"]) == ("kind", 60, 20, 2000)
    assert {row["metric"] for row in rows} == {"auroc", "accuracy", "balanced_accuracy"}


def test_differences_are_those_of_values() -> None:
    task, features = a_study()
    rows = results.rows(scoring.score(task, features)[0])
    for head in scoring.HEADS:
        ours, theirs = (pick(rows, backbone=b, head=head, metric="auroc", against=None)[0] for b in ("run", "random"))
        difference = pick(rows, against="random", head=head, metric="auroc")[0]
        assert difference["backbone"] == "run"
        assert difference["value"] == pytest.approx(ours["value"] - theirs["value"], abs=1e-12)
        assert difference["low"] > 0
        # Paired, so no wider than two separate intervals laid end to end.
        assert difference["high"] - difference["low"] < (ours["high"] - ours["low"]) + (theirs["high"] - theirs["low"])


def test_class_frequencies_are_a_row() -> None:
    task, features = a_study()
    rows = results.rows(scoring.score(task, features, heads=["ridge"])[0])
    (accuracy,) = pick(rows, backbone="majority", metric="accuracy")
    assert (
        accuracy["head"] == "none"
        and accuracy["features"] is None
        and accuracy["value"] == pytest.approx(1 / 3, abs=0.1)
    )
    assert pick(rows, backbone="majority", metric="auroc")[0]["value"] == 0.5


def test_predictions_do_not_depend_on_test_labels() -> None:
    task, features = a_study()
    test = task.splits["test"]
    shuffled = labels.Labelled(test.slices, np.roll(test.names, 3), test.patients, test.series)
    other = labels.Task(task.name, task.classes, task.unseen, {**task.splits, "test": shuffled})
    scores, table = scoring.score(task, features)
    other_scores, other_table = scoring.score(other, features)
    assert table.column("scores").equals(other_table.column("scores"))
    assert [score.fit for score in scores] == [score.fit for score in other_scores]
    assert scores[0].value != other_scores[0].value


def test_same_seed_gives_same_json() -> None:
    task, features = a_study()
    first, again = (json.dumps(results.rows(scoring.score(task, features, seed=3)[0])) for _ in range(2))
    assert first == again


def test_series_score_is_mean_of_its_slices() -> None:
    task, features = a_study()
    by_slice, slices = scoring.score(task, features, heads=["logistic"])
    by_series, series = scoring.score(task, features, heads=["logistic"], unit="series")
    assert {score.study.n for score in by_series} == {20}
    first = np.array(slices.column("scores").to_pylist()[:60]).reshape(20, 3, 3).mean(axis=1)
    order = np.argsort(np.array(slices.column("series").to_pylist()[:60:3]))
    np.testing.assert_allclose(np.array(series.column("scores").to_pylist()[:20]), first[order], atol=1e-12)
    better, worse = (
        pick(results.rows(scores), backbone="run", metric="auroc")[0]["value"] for scores in (by_series, by_slice)
    )
    assert better >= worse


def test_series_of_two_classes_is_refused() -> None:
    task, features = a_study()
    test = task.splits["test"]
    mixed = labels.Labelled(test.slices, np.roll(test.names, 1), test.patients, test.series)
    with pytest.raises(UserError, match="series test.* have different values of 'kind'.*--cases=slice"):
        scoring.score(labels.Task("kind", task.classes, (), {**task.splits, "test": mixed}), features, unit="series")


def test_settings_come_from_folds_without_validation() -> None:
    task, features = a_study()
    nothing = labels.Labelled(*(part[:0] for part in vars(task.splits["validation"]).values()))
    alone = labels.Task("kind", task.classes, (), {**task.splits, "validation": nothing})
    del features["validation"]
    scores, _ = scoring.score(alone, features, heads=["ridge"])
    assert {score.fit.selection for score in scores if score.fit} == {"5-fold over patients"}


def test_intervals_and_folds_are_over_files_where_patients_are_unknown() -> None:
    task, features = a_study()
    nothing = labels.Labelled(*(part[:0] for part in vars(task.splits["validation"]).values()))
    unknown = "files (patients unknown)"
    alone = labels.Task("kind", task.classes, (), {**task.splits, "validation": nothing}, unknown)
    del features["validation"]
    scores, _ = scoring.score(alone, features, heads=["ridge"])
    assert {score.fit.selection for score in scores if score.fit} == {f"5-fold over {unknown}"}
    assert {row["interval"] for row in results.rows(scores)} == {f"95 % percentile bootstrap over {unknown}"}


def test_class_of_test_split_alone_counts_as_wrong() -> None:
    task, features = a_study()
    test = task.splits["test"]
    renamed = labels.Labelled(
        test.slices, np.where(test.names == "class 2", "class 9", test.names), test.patients, test.series
    )
    new = labels.Task("kind", task.classes, ("class 9",), {**task.splits, "test": renamed})
    scores, table = scoring.score(new, features, heads=["ridge"])
    (accuracy,) = pick(results.rows(scores), backbone="run", metric="accuracy", against=None)
    assert accuracy["classes_not_learned"] == ("class 9",) and accuracy["value"] <= 2 / 3 + 0.05
    right = np.array(table.column("target").to_pylist()) == np.array(table.column("predicted").to_pylist())
    assert accuracy["value"] == pytest.approx(right[:60].mean())


def test_readout_is_chosen_on_validation() -> None:
    task, features = a_study()
    rng = np.random.default_rng(1)
    for split, by_name in features.items():
        good, noise = by_name["run"]["mean"], rng.normal(size=(SLICES[split], 8)).astype(np.float32)
        # On the test split the other readout is the better one, which must not decide.
        by_name["run"] = {"cls": noise, "mean": good} if split != "test" else {"cls": good, "mean": noise}
    scores, _ = scoring.score(task, features, heads=["ridge"])
    ours = [score for score in scores if score.backbone == "run" and score.metric == "auroc"]
    assert {score.features for score in ours} == {"mean"} and len(ours) == 3
    assert ours[0].value is not None and ours[0].value < 0.75


def test_floors_alone_are_compared_with_nothing() -> None:
    task, features = a_study()
    floors = {split: {"pixels": by_name["pixels"]} for split, by_name in features.items()}
    scores, _ = scoring.score(task, floors, heads=["ridge"])
    assert {(score.backbone, score.against) for score in scores} == {("pixels", None), ("majority", None)}


def test_events_are_the_positive_test_cases() -> None:
    task, features = a_study(classes=2)
    scores, _ = scoring.score(task, features, heads=["ridge"])
    assert {(score.study.n, score.study.events) for score in scores} == {(60, 30)}
