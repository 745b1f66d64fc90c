"""Scores of synthetic features: their rows, differences and independence of the test labels."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from curia_common.errors import UserError
from curia_jax.evaluate import labels, results, scoring, statistics
from curia_jax.evaluate.tokens import Tokens

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
    assert len(rows) == (3 * 3 + 2 * 3 + 1) * 4
    for row in rows:
        assert tuple(row)[: len(results.COLUMNS)] == results.COLUMNS and row["status"] == "ok" and row["reason"] is None
        assert row["low"] <= row["value"] <= row["high"]
        assert (row["task"], row["n"], row["patients"], row["draws"]) == ("kind", 60, 20, 2000)
    assert {row["metric"] for row in rows} == {"auroc", "accuracy", "balanced_accuracy", "brier"}


def test_differences_are_those_of_values() -> None:
    task, features = a_study()
    rows = results.rows(scoring.score(task, features)[0])
    for head in ("knn", "ridge", "logistic"):
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
    nothing = labels.Labelled(*(part[:0] for part in vars(task.splits["validation"]).values() if part is not None))
    alone = labels.Task("kind", task.classes, (), {**task.splits, "validation": nothing})
    del features["validation"]
    scores, _ = scoring.score(alone, features, heads=["ridge"])
    assert {score.fit.selection for score in scores if score.fit} == {"5-fold over patients"}


def test_intervals_and_folds_are_over_files_where_patients_are_unknown() -> None:
    task, features = a_study()
    nothing = labels.Labelled(*(part[:0] for part in vars(task.splits["validation"]).values() if part is not None))
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


# ---- values


def ages(seed: int = 0):
    """A task whose label is a number, and features that show it."""
    rng = np.random.default_rng(seed)
    rows, features = [], {}
    direction = rng.normal(size=8)
    for split, count in SLICES.items():
        age = np.round(rng.uniform(20, 90, count // 3), 1).repeat(3)
        rows += [
            {"split": split, "patient": f"{split}{i // 3}", "series": f"{split}{i // 3}", "label_age": str(age[i])}
            for i in range(count)
        ]
        made = {
            name: age[:, None] / 20 * direction + noise * rng.normal(size=(count, 8))
            for name, noise in BACKBONES.items()
        }
        features[split] = {name: {"mean": values.astype(np.float32)} for name, values in made.items()}
    return labels.task(pa.Table.from_pylist(rows), "age:value", "shards/age:value"), features


def test_value_is_predicted_and_its_error_is_in_its_unit() -> None:
    task, features = ages()
    scores, table = scoring.score(task, features)
    rows = results.rows(scores)
    assert {row["head"] for row in rows} == {"knn", "ridge", "none"}
    assert {row["metric"] for row in rows} == {"rmse", "mae", "r2"} and {row["events"] for row in rows} == {None}
    mine = [case for case in table.to_pylist() if (case["backbone"], case["head"]) == ("run", "ridge")]
    errors = np.array([float(case["target"]) - case["scores"][0] for case in mine])
    found = {row["metric"]: row for row in pick(rows, backbone="run", head="ridge", against=None)}
    assert found["rmse"]["value"] == pytest.approx(np.sqrt(np.mean(errors**2)))
    assert found["mae"]["value"] == pytest.approx(np.mean(np.abs(errors)))
    assert found["r2"]["value"] > 0.8 > 0.1 > pick(rows, backbone="majority", metric="r2")[0]["value"]
    assert pick(rows, backbone="majority", metric="mae")[0]["value"] == pytest.approx(
        np.mean(np.abs(task.targets("test") - np.r_[task.targets("train"), task.targets("validation")].mean()))
    )
    json.dumps(rows, allow_nan=False)


def test_value_without_a_head_for_it_is_refused() -> None:
    task, features = ages()
    with pytest.raises(UserError, match="age:value is a value, which knn, ridge, efficient can learn"):
        scoring.score(task, features, heads=["logistic"])


# ---- few labels


def test_few_labels_are_three_subsets_the_same_for_every_backbone() -> None:
    task, features = a_study()
    scores, table = scoring.score(task, features, heads=["ridge"], few=(0.5, 1.0), draws=100)
    rows = [row for row in results.rows(scores) if row["metric"] == "auroc" and row["against"] is None]
    assert {(row["labels"], row["seed"]) for row in rows} == {("50 %", 0), ("50 %", 1), ("50 %", 2), ("100 %", 0)}
    # 30 and 15 patients of three classes: 5 and 3 of each, three slices a patient.
    assert {row["train_patients"] for row in rows if row["labels"] == "50 %"} == {24}
    assert {row["train_n"] for row in rows if row["labels"] == "50 %"} == {72}
    alone, _ = scoring.score(task, features, heads=["ridge"], draws=100)
    everything = [row for row in rows if row["labels"] == "100 %"]
    assert [row["value"] for row in everything] == [
        row["value"] for row in results.rows(alone) if row["metric"] == "auroc" and row["against"] is None
    ]
    halves = {row["seed"]: row["value"] for row in rows if row["labels"] == "50 %" and row["backbone"] == "random"}
    assert len(set(halves.values())) == 3
    assert set(zip(table["labels"].to_pylist(), table["seed"].to_pylist(), strict=True)) == {
        ("50 %", 0), ("50 %", 1), ("50 %", 2), ("100 %", 0)
    }  # fmt: skip


def test_shots_learn_from_so_many_cases_of_each_class() -> None:
    task, features = a_study()
    scores, _ = scoring.score(task, features, heads=["ridge"], few=(4, 1), draws=50)
    rows = results.rows(scores)
    assert {(row["labels"], row["train_n"], row["train_patients"]) for row in rows} == {("k=4", 12, 12), ("k=1", 3, 3)}
    chosen = {row["labels"]: row["selection"] for row in rows if "selection" in row}
    assert chosen == {"k=4": "4-fold over patients", "k=1": "default settings (too few patients to choose)"}
    json.dumps(rows, allow_nan=False)


def test_shots_of_a_value_are_refused() -> None:
    task, features = ages()
    with pytest.raises(UserError, match="5 cases of every class: the label has no classes"):
        scoring.score(task, features, few=(5,))


# ---- differences


def test_difference_has_a_p_value_and_a_value_has_none() -> None:
    task, features = a_study()
    scores, _ = scoring.score(task, features, heads=["ridge"])
    for score in scores:
        assert (score.p is None) == (score.against is None)
    clear = next(s for s in scores if s.against == "pixels" and s.metric == "auroc")
    assert clear.low and clear.low > 0 and clear.p == pytest.approx(2 / 2001)


def test_delong_decides_where_every_patient_has_one_case() -> None:
    task, features = a_study(classes=2, per_series=1)
    scores, table = scoring.score(task, features, heads=["ridge"])
    found = next(s for s in scores if s.against == "random" and s.metric == "auroc")
    by_backbone = {
        name: np.array([case["scores"][1] for case in table.to_pylist() if case["backbone"] == name])
        for name in ("run", "random")
    }
    wanted = statistics.delong(task.targets("test") == 1, by_backbone["run"], by_backbone["random"])
    assert found.p == pytest.approx(wanted.p, rel=1e-9)


def test_few_test_patients_make_the_interval_doubtful() -> None:
    task, features = a_study(per_series=10)
    scores, _ = scoring.score(task, features, heads=["ridge"])
    assert {s.doubt for s in scores if s.backbone == "run"} == {
        "6 resampled groups, and 2 of the rarest class are too few for an interval"
    }


# ---- times to an event


def survival_times(seed: int = 0):
    """Times whose hazard the features of `run` show; those of `clinical` show a part of it."""
    rng = np.random.default_rng(seed)
    splits, features = {}, {}
    for split, count in SLICES.items():
        risk = rng.normal(size=count)
        time, end = rng.exponential(np.exp(-1.5 * risk)), rng.exponential(3.0, count)
        who = np.array([f"{split}{n}" for n in range(count)])
        names = np.minimum(time, end).astype(str)
        splits[split] = labels.Labelled(np.arange(count), names, who, who, time <= end)
        features[split] = {
            name: {"mean": (risk[:, None] + noise * rng.normal(size=(count, 4))).astype(np.float32)}
            for name, noise in {"run": 0.3, "clinical": 3.0}.items()
        }
    return labels.Task("tcia-survival", (), (), splits, is_time=True), features


def test_times_are_scored_by_concordance_with_their_events() -> None:
    from sksurv.metrics import concordance_index_censored

    task, features = survival_times()
    scores, table = scoring.score(task, features, draws=200)
    rows = results.rows(scores)
    assert {(row["head"], row["metric"]) for row in rows} == {("cox", "c_index"), ("none", "c_index")}
    times = task.targets("test")
    assert {row["events"] for row in rows} == {int(times.event.sum())}
    (ours,), (clinical,) = (pick(rows, backbone=name, against=None) for name in ("run", "clinical"))
    mine = [row for row in table.to_pylist() if row["backbone"] == "run"]
    wanted = concordance_index_censored(times.event, times.time, np.array([row["scores"][0] for row in mine]))[0]
    assert ours["value"] == pytest.approx(wanted, abs=1e-9) and ours["value"] > clinical["value"] > 0.5
    assert pick(rows, backbone="majority")[0]["value"] == 0.5
    assert pick(rows, against="clinical")[0]["value"] == pytest.approx(ours["value"] - clinical["value"])
    assert [row["target"].endswith("+") for row in mine] == (~times.event).tolist()
    json.dumps(rows, allow_nan=False)


def test_times_without_an_event_in_the_test_are_refused() -> None:
    task, _ = survival_times()
    test = task.splits["test"]
    censored = dataclasses.replace(test, events=np.zeros(len(test.slices), bool))
    none = dataclasses.replace(task, splits={**task.splits, "test": censored})
    assert labels.obstacle_of(none) == "the test split has no event, so that the order of no two times is known"


# ---- tokens


def test_efficient_probing_learns_from_tokens_beside_heads_of_features() -> None:
    task, features = a_study(classes=2)
    rng = np.random.default_rng(5)
    tokens = {}
    for split, count in SLICES.items():
        signal = 6.0 * (np.arange(count) // 3 % 2) - 3.0
        values = rng.normal(size=(count, 5, 8)).astype(np.float32)
        values[np.arange(count), rng.integers(0, 5, count), 0] += signal  # one token of five tells the class
        lists = Tokens.of_slices(values, np.ones((count, 5), bool), np.arange(count))
        tokens[split] = dict.fromkeys(features[split], lists)
    scores, table = scoring.score(task, features, heads=["ridge", "efficient"], draws=50, tokens=tokens)
    rows = results.rows(scores)
    (found,) = pick(rows, backbone="pixels", head="efficient", metric="auroc", against=None)
    assert found["value"] > 0.9 > pick(rows, backbone="pixels", head="ridge", metric="auroc", against=None)[0]["value"]
    assert (found["features"], found["dimension"], found["selection"]) == ("tokens", 8, "validation split")
    assert set(table.column("head").to_pylist()) == {"ridge", "efficient"}
