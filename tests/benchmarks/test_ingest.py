import sys
from pathlib import Path

import pytest

from benchmarks import ingest

LIMIT_MB = 1500


@pytest.mark.slow
@pytest.mark.parametrize("kind", ingest.LONG)
def test_worker_memory_does_not_grow_with_series_length(real_data: Path, kind: str) -> None:
    found = ingest.long_series(real_data, kind, 3000)
    assert found["slices"] == 3000
    assert found["mb"] < LIMIT_MB


@pytest.mark.long
def test_long_series_have_the_slices_they_should(real_data: Path) -> None:
    for kind in ("frames-packed", "nifti-across", "nrrd-gz"):
        assert ingest.long_series(real_data, kind, 40)["slices"] == 40


@pytest.mark.long
def test_stages_and_syntaxes_print_their_tables(real_data: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(ingest, "SYNTAXES", {name: ingest.SYNTAXES[name] for name in ("explicit VR", "RLE")})
    monkeypatch.setattr(ingest, "COPIES", 1)
    monkeypatch.setattr(ingest, "ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["ingest", "--data", str(real_data), "--only", "syntaxes", "stages"])
    assert ingest.main() == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    table = {row[0].strip(): row[1:] for row in rows}
    assert all(0 < float(table[name][1].replace(",", "")) for name in ("explicit VR", "RLE"))
    assert float(table["whole"][0]) > float(table["encode"][0]) > 0
