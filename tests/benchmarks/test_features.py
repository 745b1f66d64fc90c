"""The benchmark of feature extraction at a tiny size: every form of input, its rates and their ratios."""

import json
from pathlib import Path

import pytest

from benchmarks import features

TINY = ["--size=Ti", "--image-size=32", "--pixels=32", "--slices=16", "--batch=8", "--rounds=1"]


@pytest.mark.long
def test_every_form_of_input_has_rates_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    assert features.main([*TINY, "--tasks=ich,luna16-3D", f"--json={out}"]) == 0
    rows = json.loads(out.read_text())
    assert [row["input"] for row in rows] == ["ich, 2D", "luna16-3D, 3D + mask", "shards"]
    assert [row["slices"] for row in rows] == [16, 15, 16]  # of volumes three each
    for row in rows:
        # Of one round the medians are the values.
        assert row["ratio"] == pytest.approx(row["extraction"] / row["forward"])
        assert row["device_ratio"] == pytest.approx(row["device"] / row["forward"])
        assert row["read"] > 0 and row["cores"] == pytest.approx(5 * row["read"])
    assert [row["decode"] > 0 for row in rows] == [True, True, False]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 4 and all(line.count("|") == lines[0].count("|") for line in lines)


def test_unknown_encoder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert features.main(["--size=G"]) == 2
    assert "--size" in capsys.readouterr().err
