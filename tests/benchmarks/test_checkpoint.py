"""The benchmark of saving on the smallest model: its figures add up."""

import json
from pathlib import Path

import pytest

from benchmarks import checkpoint


@pytest.mark.long
def test_saves_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "saves.json"
    assert checkpoint.main(["--size=Ti", f"--workdir={tmp_path}", f"--json={out}"]) in (0, 1)  # 1: the machine was busy
    rows = {row["way"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"asynchronous", "synchronous"}
    for row in rows.values():
        # 32 M values of the encoder of 192 and the decoder of 512 each; parameters and two moments, 4 bytes a value.
        assert row["state"] == pytest.approx(12 * 31e6, rel=0.1)
        assert 0 < row["held_up"] <= row["save"] and row["slowed"] >= 0
        assert 0 < row["extra"] < 5
    assert rows["synchronous"]["slowed"] == 0  # no step is taken meanwhile
    assert not list(tmp_path.glob("tmp*"))
