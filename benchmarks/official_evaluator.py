"""Runs CuriaBench's official evaluator, of a checkout that you name, on an export of ours, beside our protocol `official`.

  python -m benchmarks.official_evaluator --evaluator=curia --checkpoint=runs/b16 --python=evaluator-env/bin/python

The tasks are phantoms in CuriaBench's schema: ich (2D), kits (2D with masks), luna16-3D (3D with masks, features cached). Nothing of the checkout
is edited, which is checked: of its YAML files copies are used that name our folder (model.model_name), the phantom (dataset_name), a
result folder and the processes of the loader. Both are run with several seeds, because the evaluator does not seed its heads; the
means have to differ by no more than the spread over seeds, the standard deviations of both together. Exit code 1 where they do not.

--python needs the evaluator's packages: torch, torchvision, transformers, datasets, accelerate, omegaconf, scikit-learn. Without CUDA, .cuda()
is made to do nothing by a sitecustomize.py on its path.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from curia_jax.convert import __main__ as convert
from curia_jax.evaluate import __main__ as evaluate
from data_pipeline import phantom

TASKS = ("ich", "kits", "luna16-3D")
METRICS = {"accuracy": "accuracy", "auc": "auroc"}  # the evaluator's name -> ours
ON_A_CPU = """import torch

if not torch.cuda.is_available():
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
"""

Figures = Mapping[str, list[float]]  # metric, by the evaluator's name -> one for each seed


class Comparison(NamedTuple):
    """Means over seeds of the evaluator and of ours, and whether they agree within `spread`."""

    official: float
    ours: float
    spread: float

    @property
    def agrees(self) -> bool:
        return abs(self.official - self.ours) <= self.spread + 1e-6  # of equal figures in float32


def compare(official: Sequence[float], ours: Sequence[float]) -> Comparison:
    """Means, and the sum of the standard deviations over seeds."""
    spread = sum(float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in (official, ours))
    return Comparison(float(np.mean(official)), float(np.mean(ours)), spread)


def digest(checkout: Path) -> str:
    """Of the evaluator's code and settings."""
    result = hashlib.sha256()
    for path in sorted((*checkout.glob("*.py"), *checkout.glob("configs/*.yaml"))):
        result.update(path.name.encode() + path.read_bytes())
    return result.hexdigest()


def run_official(
    checkout: Path, task: str, *, weights: Path, data: Path, place: Path, python: str, processes: int
) -> dict[str, float]:
    """One run of the evaluator; accuracy and AUC on the test split.

    Args:
      weights: our export in the layout dinov2.
      data: folder of the tasks.
      place: new folder for the settings and the results.
      python: interpreter with the evaluator's packages.
      processes: of its loader; it fails with 0.

    Raises:
      SystemExit: the evaluator failed; its last lines are shown.
    """
    place.mkdir(parents=True)
    settings = yaml.safe_load((checkout / "configs" / f"{task}.yaml").read_text())
    settings["model"]["model_name"] = str(weights)
    settings |= {"dataset_name": str(data), "output_dir": str(place / "results"), "num_workers": max(1, processes)}
    (place / "results").mkdir()
    (place / "config.yaml").write_text(yaml.safe_dump(settings))
    (place / "sitecustomize.py").write_text(ON_A_CPU)
    environment = os.environ | {
        "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "HF_HOME": str(place.parent / "huggingface"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    words = [python, "trainer.py", f"--config={place / 'config.yaml'}"]
    done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
    result = place / "results" / "test_results.txt"
    if done.returncode or not result.is_file():
        sys.exit(f"the evaluator failed on {task} ({done.returncode}):\n" + "\n".join(done.stderr.splitlines()[-20:]))
    return results_of(result.read_text())


def results_of(text: str) -> dict[str, float]:
    """Accuracy and AUC from test_results.txt, a Python dict as text whose numbers may be NumPy's."""
    found = {name: re.search(rf"'eval_{name}': (?:np\.float\d+\()?([-+.\deinfa]+)", text) for name in METRICS}
    return {name: float(match[1]) if match else float("nan") for name, match in found.items()}


def run_ours(weights: Path, data: Path, place: Path, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy and AUROC of the protocol `official`, by task and the evaluator's name of the metric."""
    words = [
        f"--tasks={','.join(TASKS)}", f"--data={data}", f"--backbones={weights}", "--floors=", "--protocol=official",
        f"--output={place / f'ours-{seed}'}", f"--cache={place / 'cache'}", f"--seed={seed}", "--draws=100",
        f"--json={place / f'ours-{seed}.json'}",
    ]  # fmt: skip
    if evaluate.main(words):
        sys.exit("our evaluation failed")
    rows = json.loads((place / f"ours-{seed}.json").read_text())
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["backbone"] == str(weights) and row["against"] is None and row["subgroup"] is None:
            for name, own in METRICS.items():
                if row["metric"] == own:
                    found.setdefault(row["task"], {})[name] = row["value"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--evaluator", required=True, type=Path, metavar="PATH", help="checkout with trainer.py and configs/"
    )
    parser.add_argument("--checkpoint", required=True, help="work directory of curia_jax.pretrain")
    parser.add_argument("--python", default=sys.executable, help="with the evaluator's packages (default: this one)")
    parser.add_argument(
        "--image-size", help="of the export (default: as trained); masks fit some grids of patches alone"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--patients", type=int, default=12, help="test patients of each task (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="of the phantom's images, px (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="of the evaluator's loader (default: %(default)s)")
    args = parser.parse_args()
    checkout = args.evaluator.resolve()
    if missing := [name for name in ("trainer.py", "configs") if not (checkout / name).exists()]:
        parser.error(f"--evaluator={args.evaluator} has no {missing[0]}: it is no checkout of the evaluator")
    before = digest(checkout)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        data, weights = place / "data", place / "dinov2"
        tasks = [
            "--suite=curiabench",
            f"--tasks={','.join(TASKS)}",
            f"--patients={args.patients}",
            f"--size={args.size}",
        ]
        export = [f"--checkpoint={args.checkpoint}", f"--output={weights}", "--layout=dinov2", "--hu=true"]
        export += [f"--image-size={args.image_size}"] if args.image_size else []
        if phantom.main([f"--output={data}", *tasks]) or convert.main(export):
            sys.exit(1)
        official: dict[str, dict[str, list[float]]] = {task: {name: [] for name in METRICS} for task in TASKS}
        ours: dict[str, dict[str, list[float]]] = {task: {name: [] for name in METRICS} for task in TASKS}
        for seed in range(args.seeds):
            own = run_ours(weights, data, place, seed)
            for task in TASKS:
                found = run_official(
                    checkout, task, weights=weights, data=data, place=place / f"{task}-{seed}", python=args.python, processes=args.processes
                )  # fmt: skip
                for name in METRICS:
                    official[task][name].append(found[name])
                    ours[task][name].append(own[task][name])
                print(f"seed {seed}, {task}: evaluator {found}, ours {own[task]}", file=sys.stderr, flush=True)
    if digest(checkout) != before:
        sys.exit("the checkout was changed while it ran")
    sys.exit(print_table(official, ours))


def print_table(official: Mapping[str, Figures], ours: Mapping[str, Figures]) -> int:
    """Prints means and spreads; returns 1 where a pair does not agree."""
    print(
        "| Task | Metric | Evaluator | Ours | Difference | Spread over seeds | Agree |\n|---|---|---:|---:|---:|---:|---|"
    )
    code = 0
    for task, figures in official.items():
        for name, values in figures.items():
            one = compare(values, ours[task][name])
            code = code if one.agrees else 1
            print(
                f"| `{task}` | {name} | {one.official:.3f} | {one.ours:.3f} | {one.official - one.ours:+.3f} | {one.spread:.3f} | "
                f"{'yes' if one.agrees else 'NO'} |"
            )
    return code


if __name__ == "__main__":
    main()
