"""The GPU benchmark without a GPU: it runs at a tiny size on a CPU, and reports a missing card."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.mae_step import Spec


@pytest.mark.long
@pytest.mark.torch
@pytest.mark.parametrize(
    "how", [pytest.param([], marks=pytest.mark.slow, id="search"), pytest.param(["--batch=2"], id="together")]
)
def test_tiny_benchmark_runs_on_a_cpu(how: list[str], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    assert gpu.main(["--platform=cpu", "--tiny", "--sides=jax,timm", f"--json={out}", *how]) == 0
    rows = {row["side"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"jax", "timm"}
    assert rows["timm"]["ratio_to_torch"] == 1
    assert rows["jax"]["ratio_to_torch"] > 0
    assert len({row["parameters"] for row in rows.values()}) == 1
    assert rows["jax"]["mfu"] is None  # no data sheet lists this CPU


def test_best_batch_doubles_until_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {8: 100.0, 16: 180.0, 32: 175.0}
    monkeypatch.setattr(
        gpu, "measure", lambda spec, seconds: {"images_per_second": rates[spec.batch]} if spec.batch in rates else None
    )

    def make(batch: int) -> Spec:
        return Spec("jax", "train", {}, batch)

    wanted: tuple[int, dict[str, Any]] = (16, {"images_per_second": 180.0})
    assert gpu.best_batch(make, first=8, most=1024, seconds=1) == wanted
    with pytest.raises(gpu.UserError, match="jax does not fit with a batch of 64; choose a smaller --first-batch"):
        gpu.best_batch(make, first=64, most=1024, seconds=1)


def test_wrong_number_of_batches_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--batch=256,x,64,32"]) == 2
    assert "--batch=256,x,64,32 has to name one batch for each of 4 configs" in capsys.readouterr().err


def test_missing_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: no NVIDIA GPU found")
