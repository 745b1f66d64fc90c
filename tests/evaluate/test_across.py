"""Heads that learn from one modality, scanner or site and are scored on another."""

import dataclasses

import numpy as np
import pytest

from curia_common.errors import UserError
from curia_jax.evaluate import across, labels, results
from curia_jax.evaluate.labels import Labelled
from curia_jax.evaluate.tokens import Tokens

PATIENTS = {"train": 12, "validation": 6, "test": 12}
SIDES = ("CT", "MR")
OPTIONS = {
    "heads": ["ridge"], "unit": "slice", "draws": 200, "seed": 0, "few": (1.0,), "data_sha256": "", "readouts": (),
}  # fmt: skip


def study(*, together: bool = False, shift: float = 0.0, noise: float = 0.6) -> across.Inputs:
    """Three classes of 2 slices of each patient and modality; of MR the third feature points the other way.

    Args:
      together: the same patients have CT and MR.
      shift: of the features of MR.
    """
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 6))
    splits, features, sides = {}, {}, {}
    for split, count in PATIENTS.items():
        of, names, patients, values = [], [], [], []
        for side in SIDES:
            for patient in range(count):
                for label in range(3):
                    of.append(side)
                    names.append("abc"[label])
                    patients.append(f"{split} {'' if together else side}{patient}")
                    turned = centres[label] * np.array([1, 1, -1 if side == "MR" else 1, 1, 1, 1])
                    values.append(turned + shift * (side == "MR") + noise * rng.normal(size=6))
        numbers = np.arange(len(of))
        splits[split] = Labelled(numbers, *(np.array(c) for c in (names, patients, [f"{split} {n}" for n in numbers])))
        features[split] = {
            "run": {"mean": np.array(values, np.float32)},
            "pixels": {"raw": np.array(values, np.float32)[:, :3]},
        }
        sides[split] = np.array(of)
    return across.Inputs(labels.Task("organ", ("a", "b", "c"), (), splits), features, None, sides)


def rows_of(inputs: across.Inputs, **changes) -> list[dict]:
    return [dict(row) for row in results.rows(across.score(inputs, "modality", **{**OPTIONS, **changes})[0])]


def pick(rows: list[dict], trained: str, tested: str, against: str | None = None, **wanted) -> dict:
    wanted = {"backbone": "run", "metric": "accuracy", "head": "ridge", **wanted}
    wanted |= {"trained_on": trained, "tested_on": tested, "against": against}
    (found,) = (row for row in rows if all(row[name] == value for name, value in wanted.items()))
    return found


def accuracy(table, trained: str, tested: str) -> float:
    own = [
        case["predicted"] == case["target"]
        for case in table.to_pylist()
        if (case["backbone"], case["trained_on"], case["tested_on"]) == ("run", trained, tested)
    ]
    return float(np.mean(own))


def test_four_directions_are_scored_on_the_cases_of_what_is_tested() -> None:
    scores, table = across.score(study(), "modality", **OPTIONS)
    rows = [dict(row) for row in results.rows(scores)]
    for trained in SIDES:
        for tested in SIDES:
            row = pick(rows, trained, tested)
            assert row["value"] == pytest.approx(accuracy(table, trained, tested), abs=1e-12)
            assert (row["n"], row["patients"], row["train_n"], row["train_patients"]) == (36, 12, 54, 18)
            assert row["low"] <= row["value"] <= row["high"]
    # A feature that points the other way costs much, and the same on both ways.
    assert min(pick(rows, side, side)["value"] for side in SIDES) > 0.9
    assert max(pick(rows, "CT", "MR")["value"], pick(rows, "MR", "CT")["value"]) < 0.8


def test_losses_are_differences_of_the_figures_with_their_intervals() -> None:
    rows = rows_of(study())
    for trained, tested in (("CT", "MR"), ("MR", "CT")):
        for against, other in (
            (f"trained on {tested}", (tested, tested)),
            (f"tested on {trained}", (trained, trained)),
        ):
            for metric in ("accuracy", "auroc", "balanced_accuracy", "brier"):
                loss = pick(rows, trained, tested, against, metric=metric)
                wanted = (
                    pick(rows, trained, tested, metric=metric)["value"] - pick(rows, *other, metric=metric)["value"]
                )
                assert loss["value"] == pytest.approx(wanted, abs=1e-12)
            lost = pick(rows, trained, tested, against)
            assert lost["low"] <= lost["value"] <= lost["high"] < 0 and lost["p"] < 0.05


def test_head_never_sees_the_other_modality() -> None:
    """Neither its training nor its validation cases decide anything."""
    inputs = study()
    other = dict(inputs.features)
    for split in ("train", "validation"):
        mr = inputs.sides[split] == "MR"
        values = inputs.features[split]["run"]["mean"].copy()
        values[mr] = np.random.default_rng(1).normal(size=values[mr].shape)
        other[split] = {**inputs.features[split], "run": {"mean": values}}
    changed = rows_of(dataclasses.replace(inputs, features=other))
    rows = rows_of(inputs)
    for tested in SIDES:
        assert pick(rows, "CT", tested) == pick(changed, "CT", tested)
    assert pick(rows, "MR", "MR")["value"] != pick(changed, "MR", "MR")["value"]


def test_patients_with_both_modalities_pair_the_loss() -> None:
    """The same cases twice: the head that learned from both alike loses nothing in any draw."""
    inputs = study(together=True)
    twins = {}
    for split, by in inputs.features.items():
        ct = by["run"]["mean"][inputs.sides[split] == "CT"]
        twins[split] = {"run": {"mean": np.concatenate([ct, ct])}}
    loss = pick(rows_of(dataclasses.replace(inputs, features=twins)), "CT", "MR", "tested on CT")
    assert (loss["value"], loss["low"], loss["high"]) == (0, 0, 0)


def test_classes_that_one_side_lacks_are_left_out(caplog) -> None:
    inputs = study()
    test_and_train = {
        split: (inputs.sides[split] == "CT") | (part.names != "c") | (split == "test")
        for split, part in inputs.task.splits.items()
    }
    rows = rows_of(inputs.restricted(test_and_train))
    assert pick(rows, "CT", "MR")["classes"] == ("a", "b") and pick(rows, "CT", "MR")["n"] == 24
    assert "organ across modality: 2 classes are shared; left out are c" in caplog.text


def test_side_without_test_cases_is_left_out_and_one_alone_is_refused(caplog) -> None:
    inputs = study()
    sides = {split: np.where(np.arange(len(of)) % 6 < 3, of, "US") for split, of in inputs.sides.items()}
    keep = {split: (of != "US") | (split != "test") for split, of in sides.items()}
    three = dataclasses.replace(inputs, sides=sides).restricted(keep)
    assert {row["trained_on"] for row in rows_of(three)} == {"CT", "MR"}
    assert "left out are US (the test split has no slice with a value" in caplog.text
    lonely = {split: np.where(of == "MR", "unknown", of) for split, of in inputs.sides.items()}
    with pytest.raises(UserError, match=r"across modality, which takes two values .*; found: CT, unknown \(no value\)"):
        across.score(dataclasses.replace(inputs, sides=lonely), "modality", **OPTIONS)


def test_modalities_that_share_one_class_are_refused() -> None:
    inputs = study()
    apart = {
        split: (inputs.sides[split] == "CT") & (part.names != "c") | (inputs.sides[split] == "MR") & (part.names != "a")
        for split, part in inputs.task.splits.items()
    }
    with pytest.raises(UserError, match="CT and MR share 1 classes to learn; 2 are needed"):
        across.score(inputs.restricted(apart), "modality", **OPTIONS)


def test_values_and_few_labels_and_tokens_are_scored_too() -> None:
    inputs = study()
    age = {
        split: dataclasses.replace(part, names=np.array([str(30 + 10 * "abc".index(name)) for name in part.names]))
        for split, part in inputs.task.splits.items()
    }
    values = dataclasses.replace(inputs, task=labels.Task("age", (), (), age, is_value=True))
    assert pick(rows_of(values), "MR", "CT", metric="rmse")["value"] > 0
    few = rows_of(inputs, few=(0.5,))
    assert {(row["labels"], row["seed"]) for row in few} == {("50 %", 0), ("50 %", 1), ("50 %", 2)}
    # Half of the patients of CT, not of all.
    assert {row["train_patients"] for row in few if row["trained_on"] == "CT"} == {9}
    lists = {
        split: {name: Tokens.of([row[None] for row in values["run"]["mean"]]) for name in ("run",)}
        for split, values in inputs.features.items()
    }
    only = {split: {"run": by["run"]} for split, by in inputs.features.items()}
    found = rows_of(dataclasses.replace(inputs, features=only, tokens=lists), heads=["efficient"], draws=20)
    assert pick(found, "CT", "CT", head="efficient")["value"] > 0.8
