"""Worker processes and semaphores after their parent was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curia_common import processes

# Reads with two processes as training does, and says their ids; a second start of the same owner only names its semaphores.
READER = """
import multiprocessing, sys, time
import numpy as np
from curia_common import processes
from curia_jax import data

class Slices:
    sizes = np.full((64, 2), 8)
    def __len__(self):
        return 64
    def read_into(self, numbers, pixels):
        pixels[:] = 1
        return [(8, 8)] * len(numbers), [(1.0, 0.0, 0.0, 1.0, True)] * len(numbers)

if __name__ == "__main__":
    processes.name_semaphores(sys.argv[1])
    if len(sys.argv) > 2:
        batches = data.training_batches(Slices(), batch_size=4, canvas=(8, 8), seed=0, threads=1, workers=2)
        next(batches)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(1000)
"""


def exists(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent to notice."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.long
@pytest.mark.skipif(not processes.SHARED_MEMORY.is_dir(), reason="semaphores have no files here")
def test_semaphores_of_a_killed_reader_go_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "reader.py").write_text(READER)
    command = [sys.executable, str(tmp_path / "reader.py"), str(tmp_path / "run")]
    before = set(processes.SHARED_MEMORY.glob("sem.curia-*"))
    reader = subprocess.Popen([*command, "start"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert reader.stdout is not None
    children = [int(word) for word in reader.stdout.readline().split()]
    assert len(children) >= 2 and all(exists(child) for child in children)
    left = set(processes.SHARED_MEMORY.glob("sem.curia-*")) - before
    assert left
    # With the helper of Python's that would unlink the semaphores, as a container's end does.
    trackers = [
        int(pid)
        for pid in subprocess.run(["pgrep", "-s", str(reader.pid)], capture_output=True, text=True).stdout.split()
    ]
    for process in {reader.pid, *trackers} - set(children):
        os.kill(process, signal.SIGKILL)
    reader.wait()
    deadline = time.monotonic() + 60
    while any(exists(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(exists(child) for child in children)
    subprocess.run(command, check=True)
    assert not left & set(processes.SHARED_MEMORY.glob("sem.curia-*"))
