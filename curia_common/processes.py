"""What worker processes leave behind when their parent is killed: nothing."""

import contextlib
import hashlib
import multiprocessing
import os
import threading
from multiprocessing import connection, process
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps named semaphores


def die_with_parent() -> None:
    """Ends this worker process as soon as its parent has ended, however that was. Does nothing outside a worker process."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="die_with_parent", daemon=True).start()


def name_semaphores(owner: str) -> None:
    """Names the semaphores that this process makes from now on after their owner, and removes those that an earlier process of
    the same owner left: Python unlinks them at its end, which SIGKILL does not let it reach.

    Args:
      owner: of which one process at a time exists, such as a host of a run in a work directory.
    """
    prefix = f"curia-{hashlib.sha256(owner.encode()).hexdigest()[:10]}"
    process.current_process()._config["semprefix"] = f"/{prefix}"  # pyright: ignore[reportAttributeAccessIssue] - no public name
    for path in SHARED_MEMORY.glob(f"sem.{prefix}-*"):
        with contextlib.suppress(OSError):
            path.unlink()
