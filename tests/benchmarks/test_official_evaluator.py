"""The comparison with the official evaluator, with a script in its place that keeps its command line and files."""

import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import official_evaluator as benchmark

# What it gets is what it reports: the test reads both.
STAND_IN = """
import argparse, pathlib, yaml
parser = argparse.ArgumentParser()
parser.add_argument("--config", required=True)
config = yaml.safe_load(open(parser.parse_args().config))
if not pathlib.Path(config["dataset_name"], "ich").is_dir():
    raise SystemExit("no such dataset")
share = len(config["model"]["model_name"]) / 1000
text = "{'eval_loss': 0.5, 'eval_accuracy': np.float64(%r), 'eval_auc': nan, 'epoch': 1.0}" % share
pathlib.Path(config["output_dir"], "test_results.txt").write_text(text)
"""
SETTINGS = {
    "model": {"model_name": "theirs", "num_classes": 2}, "dataset_name": "theirs", "dataset_config": "ich", "epochs": 10,
    "batch_size": 64, "learning_rate": 0.002, "num_workers": 8, "eval_steps": 200, "output_dir": "./results/ich",
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "evaluator"
    (folder / "configs").mkdir(parents=True)
    (folder / "trainer.py").write_text(STAND_IN)
    (folder / "configs/ich.yaml").write_text(yaml.safe_dump(SETTINGS))
    (tmp_path / "data/ich").mkdir(parents=True)
    return folder


def run(checkout: Path, data: Path, place: Path) -> dict[str, float]:
    # The stand-in needs no torch, which sitecustomize.py imports.
    return benchmark.run_official(
        checkout, "ich", weights=Path("/weights/dinov2"), data=data, place=place, python=sys.executable, processes=0
    )


def test_evaluator_gets_our_folders_and_its_own_settings(checkout, tmp_path) -> None:
    before = benchmark.digest(checkout)
    found = run(checkout, tmp_path / "data", tmp_path / "run")
    assert found["accuracy"] == pytest.approx(0.015) and found["auc"] != found["auc"]  # nan
    given = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    kept = {name for name in SETTINGS if given[name] == SETTINGS[name]}
    assert kept == {"dataset_config", "epochs", "batch_size", "learning_rate", "eval_steps"}
    assert given["model"] == {"model_name": "/weights/dinov2", "num_classes": 2} and given["num_workers"] == 1
    assert benchmark.digest(checkout) == before and not list(checkout.rglob("__pycache__"))


@pytest.mark.torch
def test_failed_evaluator_ends_with_its_last_lines(checkout, tmp_path) -> None:
    with pytest.raises(SystemExit, match="the evaluator failed on ich .*\n.*no such dataset"):
        run(checkout, tmp_path / "elsewhere", tmp_path / "run")


def test_edited_checkout_has_another_digest(checkout) -> None:
    before = benchmark.digest(checkout)
    (checkout / "trainer.py").write_text(STAND_IN + "\n")
    assert benchmark.digest(checkout) != before


@pytest.mark.parametrize(
    ("text", "accuracy", "auc"),
    [
        ("{'eval_accuracy': 0.75, 'eval_auc': np.float64(0.875)}", 0.75, 0.875),
        ("{'eval_loss': 1e-05, 'eval_auc': 1.0, 'eval_accuracy': 2.5e-01}", 0.25, 1.0),
    ],
)
def test_results_are_read_from_a_dict_as_text(text: str, accuracy: float, auc: float) -> None:
    assert benchmark.results_of(text) == {"accuracy": accuracy, "auc": auc}


def test_means_agree_within_the_spread_over_seeds(capsys) -> None:
    # Standard deviations of (0.8, 0.9, 1.0) and (0.7, 0.8, 0.9) are 0.1.
    assert benchmark.compare([0.8, 0.9, 1.0], [0.7, 0.8, 0.9]) == pytest.approx((0.9, 0.8, 0.2))
    assert benchmark.compare([0.8, 0.9, 1.0], [0.6, 0.7, 0.8]).agrees
    assert not benchmark.compare([0.8, 0.9, 1.0], [0.5, 0.6, 0.7]).agrees
    assert not benchmark.compare([0.9, 0.9], [0.89, 0.89]).agrees
    same = {"ich": {"accuracy": [0.9, 0.9]}}
    assert benchmark.print_table(same, same) == 0
    assert benchmark.print_table(same, {"ich": {"accuracy": [0.8, 0.8]}}) == 1
    assert "| `ich` | accuracy | 0.900 | 0.800 | +0.100 | 0.000 | NO |" in capsys.readouterr().out


def test_nan_of_the_evaluator_does_not_agree() -> None:
    assert not benchmark.compare([float("nan")] * 2, [0.9, 0.9]).agrees
