"""The benchmark of faults: a handful of them on one process and on two, and its sums."""

import json
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.faults import Fault, Try


@pytest.mark.long
def test_handful_of_faults_is_survived(tiny_shards: Path, tmp_path: Path) -> None:
    kinds = ["SIGKILL before the commit marker", "checkpoint: arrays cut", "checkpoints: all damaged"]
    words = [f"--folder={tmp_path}/faults", f"--shards={tiny_shards}", f"--json={tmp_path}/rows.json", "--storage=disk"]
    assert faults.main([f"--only={','.join(kinds)}", "--processes=1", *words]) == 0
    rows = {row["fault"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows.keys() == {*kinds}
    assert [rows[kind]["survived"] for kind in kinds] == [rows[kind]["tried"] for kind in kinds] == [2, 1, 1]
    assert [rows[kind]["identical"] for kind in kinds] == [True, True, None]
    # A killed save costs the steps since the one before; the damaged checkpoint was of step 14, the one before it of step 12.
    assert (
        faults.SAVE_EVERY <= rows[kinds[0]]["lost_steps"] <= 2 * faults.SAVE_EVERY + 2
        and rows[kinds[1]]["lost_steps"] == 2
    )
    assert all(row["lost_examples"] == 0 and row["processes"] == 1 for row in rows.values())

    # What is finished is not done again; one host of two fails.
    before = (tmp_path / "faults" / faults.TRIES).read_text()
    assert faults.main([f"--only={kinds[1]}", "--processes=1", *words]) == 0
    assert (tmp_path / "faults" / faults.TRIES).read_text() == before
    assert faults.main(["--only=exception", "--processes=2", *words]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["processes"], row["survived"], row["identical"], row["lost_examples"]) == (2, 1, True, 0)


@pytest.mark.long
@pytest.mark.bucket
def test_run_in_a_bucket_survives_a_kill_before_the_marker(tiny_shards: Path, tmp_path: Path) -> None:
    words = [f"--folder={tmp_path}/faults", f"--shards={tiny_shards}", f"--json={tmp_path}/rows.json"]
    assert faults.main(["--only=SIGKILL before the commit marker", "--storage=bucket", *words]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["storage"], row["tried"], row["survived"], row["identical"]) == ("bucket", 1, 1, True)
    # The killed save is that of step 4 or 8, so that the run takes those steps again since the start or the save before; of them
    # only those are known whose lines of metrics were uploaded before the kill.
    assert row["lost_steps"] <= 2 * faults.SAVE_EVERY + 2


def test_fault_that_is_not_survived_is_shown_and_exit_code_1(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = iter(
        [Try(True, 3, 0, True, 1.0, 4.0), Try(False, 5, 32, False, 2.0, None, "it started again at step 0")]
    )
    monkeypatch.setattr(faults, "FAULTS", {"flood": Fault(lambda place: [next(outcomes)], {1: (2, 2)})})
    monkeypatch.setattr(faults, "NAMES", ["flood"])
    words = [f"--folder={tmp_path}/faults", f"--shards={tiny_shards}", "--workers=1", f"--json={tmp_path}/rows.json"]
    assert faults.main(words) == 1
    rows = json.loads((tmp_path / "rows.json").read_text())
    # One lies on the disk and one in memory, where there is such a file system.
    assert sum(row["tried"] for row in rows) == 2 and sum(row["survived"] for row in rows) == 1
    shown = capsys.readouterr().out
    assert faults.main([*words, "--show"]) == 1  # and injects nothing
    assert "1 of 2 survived" in capsys.readouterr().out
    assert "flood, 1 processes" in shown and "it started again at step 0" in shown and "1 of 2 survived" in shown


def test_rows_add_up_the_tries_of_a_fault() -> None:
    tries = [Try(True, 3, 0, True, 1.0, 4.0), Try(True, 5, 0, True, 3.0, None), Try(False, 0, 32, False, None, 6.0)]
    refused = [Try(True, seconds_to_stop=2.0)]
    found = faults.rows(
        [("SIGTERM", 2, "ext4", tries[:2]), ("exception", 1, "ext4", refused), ("SIGTERM", 2, "ext4", tries[2:])]
    )
    assert found == [
        faults.Row("SIGTERM", 2, "ext4", 3, 2, 5, 32, False, 2.0, 5.0),
        faults.Row("exception", 1, "ext4", 1, 1, 0, 0, None, 2.0, None),
    ]
    assert faults.table(found).splitlines()[-1] == "| exception | 1 | ext4 | 1 | 1 | 0 | 0 | – | 2.0 | – |"
