"""Worker processes that end with their parent, and clean-up of their semaphores."""

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
    """Prefixes the names of semaphores that this process creates from now on with a hash of the owner, and removes those left by an
    earlier process of the same owner: Python unlinks them at exit, but not after SIGKILL.

    Args:
      owner: something that only one process at a time can be, such as host 0 of the run in a work directory.
    """
    prefix = f"curia-{hashlib.sha256(owner.encode()).hexdigest()[:10]}"
    process.current_process()._config["semprefix"] = f"/{prefix}"  # pyright: ignore[reportAttributeAccessIssue] - no public name
    for path in SHARED_MEMORY.glob(f"sem.{prefix}-*"):
        with contextlib.suppress(OSError):
            path.unlink()
