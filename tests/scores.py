"""Scores as `curia_jax.evaluate` writes them, for tests of what reads them."""

from typing import Any

from curia_jax.evaluate.results import Fit, Score, Study


def make_score(task: str = "lesion", backbone: str = "run", head: str = "ridge", **changes: Any) -> Score:
    """A score of 60 slices of 12 patients; `changes` are fields of Score or of its Study."""
    study = {
        "task": task, "n": 60, "patients": 12, "unit": "slice", "classes": ("no", "yes"), "classes_not_learned": (),
        "draws": 2000, "seed": 0, "train_n": 200, "train_patients": 40, "groups": "patients", "events": 25,
        "labels": "100 %", "protocol": "ours", "data_sha256": "", "across": None, "trained_on": None, "tested_on": None,
    }  # fmt: skip
    study |= {name: changes.pop(name) for name in tuple(changes) if name in study}
    if study["trained_on"] and study["across"] is None:
        study["across"] = "modality"
    fields = {
        "metric": "auroc",
        "value": 0.7,
        "low": 0.6,
        "high": 0.8,
        "degenerate_draws": 3,
        "draws_without_a_class": 0,
    }
    fields |= changes
    if backbone != "majority":
        fields["features"] = "mean"
    if "against" not in fields and backbone != "majority":
        fields["fit"] = Fit(32, "validation split", 0.5, fields["value"], {"penalty_per_case": 1.0})
    return Score(study=Study(**study), backbone=backbone, head=head, **fields)
