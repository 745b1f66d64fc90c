"""The loader's benchmark at tiny sizes, and what holds on any machine: flat memory, a first batch soon."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loader
from data_pipeline.format.shards import SliceSource


@pytest.mark.long
def test_loader_is_compared_with_every_contender(tiny_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    words = ["--batch=8", "--rounds=1", "--seconds=0.05", "--workers=0", f"--json={out}"]
    assert loader.main([f"--shards={tiny_shards}", *words]) == 0
    rows = {row["contender"]: row for row in json.loads(out.read_text())}
    assert set(rows) == set(loader.CONTENDERS) - (set() if find_spec("torch") else {"png"})
    assert all(row["slices_per_second"] > 0 and row["slices_per_cpu_second"] > 0 for row in rows.values())
    assert rows["loader"]["loader_ratio"] == rows["loader"]["loader_ratio_per_cpu_second"] == 1
    for name in set(rows) - {"loader"}:
        wanted = rows["loader"]["slices_per_second"] / rows[name]["slices_per_second"]
        assert rows[name]["loader_ratio"] == pytest.approx(wanted)


def test_other_contenders_read_the_same_slices(tiny_shards: Path, tmp_path: Path) -> None:
    source = SliceSource(tiny_shards, "train")
    loader.write_png(source, tmp_path / "png")
    others = [
        loader.PngFolder(tmp_path / "png", source.largest),
        loader.TfdsSource(tiny_shards, "train", source.largest),
    ]
    for other in others:
        assert len(other) == len(source)
        for number in (0, 17, len(source) - 1):
            wanted, found = source[number], other[number]
            np.testing.assert_array_equal(found["pixels"], wanted.pixels)
            np.testing.assert_allclose(found["facts"], wanted.facts, rtol=1e-6)


def test_soak_shows_flat_memory(tiny_shards: Path) -> None:
    """200 batches of 16 slices of 32 px, 2 MB of pixels each: if every tenth batch leaked, memory would grow by 32 MB."""
    found = loader.soak(tiny_shards, "train", minutes=0, workers=0, batch=16, limit=200, canvas=(256, 256))
    assert found.batches == 200
    assert found.grown_mb < 8


def test_first_batch_opens_only_the_shards_it_reads(tmp_path: Path) -> None:
    """A batch of 64 slices from 10,000 shards of one slice; the loader reads a batch or two ahead."""
    made = loader.many_shards(tmp_path, 10_000)
    found = loader.first_batch(made, "train", 0, 64)
    assert found.shards == 10_000
    assert 64 <= found.opened <= 4 * 64


def test_wrong_arguments_are_refused(tiny_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loader.main([f"--shards={tiny_shards}", "--batch=100"]) == 2
    assert "48 slices in train are less than a batch; choose --batch=48" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        loader.main(["--contenders=loader,dali"])
    assert stop.value.code == 2
