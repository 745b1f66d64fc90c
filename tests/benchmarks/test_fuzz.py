"""A few of the damaged and malicious files of benchmarks/fuzz.py; `make fuzz` builds ten thousand."""

import os
from pathlib import Path

import pytest

from benchmarks import fuzz

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_damaged_and_malicious_files_are_quarantined_one_by_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CURIA_KEY", "a key that everybody may know")
    data = Path(os.environ.get("CURIA_DATA", ROOT.parent / "shared" / "data"))
    sound = fuzz.seeds(data if data.is_dir() else None)
    assert len(sound) >= (28 if data.is_dir() else 26)  # without the data some syntaxes are missing
    (tmp_path / "files").mkdir()
    fuzz.write_files(tmp_path / "files", 6 * len(sound), 11, sound)
    found = fuzz.run(tmp_path / "files", tmp_path / "dataset", workers=2)
    assert fuzz.violations(found) == []
    assert found.fates["kept"] > 20 and found.fates["quarantined"] > 60
    assert len(found.reasons) > 20


def test_fuzzed_files_follow_from_the_seed(tmp_path: Path) -> None:
    sound = {
        name: seed for name, seed in fuzz.seeds(None).items() if name.startswith(("dicom_e", "png", "archive.zip"))
    }
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        fuzz.write_files(tmp_path / place, 60, 5, sound)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / place).rglob("*") if p.is_file()} for place in "ab")
    assert first == second and len(first) == 60
    fuzz.write_files(tmp_path / "b", 60, 6, sound)
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()} != first
