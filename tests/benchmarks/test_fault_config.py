"""The config of the fault benchmark injects the faults that FAULTS names, at their moments, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fault_config import Fault

# Opens a file three times; what it has printed says how far it came.
PROGRAM = """
import sys
from benchmarks import fault_config
fault_config.get_config()
for number in range(1, 4):
    with open(sys.argv[1], "w") as file:
        file.write("x" * 9000)
    print(number, flush=True)
"""


def run(tmp_path: Path, *faults: Fault) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "FAULTS": json.dumps([vars(fault) for fault in faults]), "FAULT_TIME": str(tmp_path / "moments"),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "marker.txt")],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_without_faults_nothing_happens(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert (found.returncode, found.stdout.split()) == (0, ["1", "2", "3"])
    assert not (tmp_path / "moments").exists()


@pytest.mark.parametrize(
    ("fault", "code", "reached"),
    [
        (Fault("open marker.txt", "SIGKILL", nth=2), -signal.SIGKILL, ["1"]),
        (Fault("open marker.txt", "SIGTERM"), -signal.SIGTERM, []),
        (Fault("open another.txt", "SIGKILL"), 0, ["1", "2", "3"]),
        (Fault("open marker.txt", "raise", nth=3), 1, ["1", "2"]),
    ],
)
def test_fault_happens_at_the_nth_event(fault: Fault, code: int, reached: list[str], tmp_path: Path) -> None:
    found = run(tmp_path, fault)
    assert (found.returncode, found.stdout.split()) == (code, reached), found.stderr
    assert (tmp_path / "moments").exists() == (code != 0)


def test_full_disk_stops_writing_until_it_is_freed(tmp_path: Path) -> None:
    full = run(tmp_path, Fault("open marker.txt", "full", nth=2))
    assert full.returncode != 0 and full.stdout.split() == ["1"]
    freed = run(tmp_path, Fault("open marker.txt", "full", nth=2), Fault("open marker.txt", "free", nth=2))
    assert (freed.returncode, freed.stdout.split()) == (0, ["1", "2", "3"]), freed.stderr
