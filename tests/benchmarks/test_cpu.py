"""The CPU benchmark at a tiny size: every side trains the same model."""

import json
from pathlib import Path

import pytest

from benchmarks import cpu, mae_step

TINY = [
    "--config.model.width=16", "--config.model.depth=1", "--config.model.heads=2", "--config.model.mlp_width=32",
    "--config.model.decoder_width=16", "--config.model.decoder_depth=1", "--config.model.image_size=(16, 16)",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.torch
def test_compare_gives_rates_for_the_same_model(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    words = ["--tasks=train", "--batch=2", "--rounds=1", "--steps=2", "--cores=1", f"--json={out}"]
    assert cpu.main([*words, "--others=transformers,timm", *TINY]) == 0
    rows = {row["side"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"jax", "transformers", "timm"}
    assert len({row["parameters"] for row in rows.values()}) == 1
    assert all(row["images_per_second"] > 0 and row["images_per_cpu_second"] > 0 for row in rows.values())
    assert rows["timm"]["ratio"] == pytest.approx(rows["jax"]["images_per_second"] / rows["timm"]["images_per_second"])


def test_missing_torch_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mae_step, "find_spec", lambda name: None)
    assert cpu.main([]) == 2
    assert "pip install 'curia-jax[torch]'" in capsys.readouterr().err
