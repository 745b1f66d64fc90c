"""The CPU's benchmark at a tiny size: every side has the same model and trains it."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import cpu, mae_step
from benchmarks.mae_step import Side, Spec
from curia_jax import config as configs

TINY = [
    "--config.model.width=16", "--config.model.depth=1", "--config.model.heads=2", "--config.model.mlp_width=32",
    "--config.model.decoder_width=16", "--config.model.decoder_depth=1", "--config.model.image_size=(16, 16)",
]  # fmt: skip


def test_sides_of_the_same_size_are_compared(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "figures.json"
    words = ["--tasks=train", "--batch=2", "--rounds=1", "--steps=2", "--cores=1", f"--json={out}"]
    assert cpu.main([*words, "--others=transformers,timm", *TINY]) == 0
    rows = {row["side"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"jax", "transformers", "timm"}
    assert len({row["parameters"] for row in rows.values()}) == 1
    assert all(row["images_per_second"] > 0 and row["images_per_cpu_second"] > 0 for row in rows.values())
    assert rows["timm"]["ratio"] == pytest.approx(rows["jax"]["images_per_second"] / rows["timm"]["images_per_second"])


@pytest.mark.parametrize("name", ["jax", "transformers", "timm"])
def test_every_side_learns(name: str) -> None:
    """120 steps on 2 fixed images: each side's loss falls, so its step is a step."""
    if name != "jax":
        pytest.importorskip("torch")
    model = json.loads(configs.load(str(cpu.CONFIG), TINY).model.to_json())
    side = Side(Spec(name, "train", model, batch=2, cores=1), os.environ)
    try:
        losses = [side.run(120)["value"] for _ in range(2)]
        assert losses[-1] < 0.98 * side.facts["value"], (side.facts, losses)
    finally:
        side.close()


def test_without_torch_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mae_step, "find_spec", lambda name: None)
    assert cpu.main([]) == 2
    assert "pip install 'curia-jax[torch]'" in capsys.readouterr().err
