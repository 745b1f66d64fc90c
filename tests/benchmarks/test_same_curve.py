"""The comparison of the fast and the plain train step runs, and tells another model from rounding."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_fast_step_follows_the_plain_one_within_rounding(tiny_shards: Path, tmp_path: Path) -> None:
    command = ["benchmarks/same_curve.py", f"--shards={tiny_shards}", "--steps=3", "--batch=4", "--depth=1"]
    done = subprocess.run(
        [sys.executable, *command, f"--json={tmp_path}/curves.json"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    plain, fast, other = json.loads((tmp_path / "curves.json").read_text()).values()
    assert len(plain) == 3 and plain[-1] < plain[0]
    # bfloat16 keeps 8 bits; the same model differs by rounding, another model by its initial values.
    assert max(abs(a / b - 1) for a, b in zip(fast, plain, strict=True)) < 5e-3
    assert max(abs(a / b - 1) for a, b in zip(other, plain, strict=True)) > 5e-3
