"""Work for test_workers.py: worker processes import it by name."""

import os
import signal
import time

from curia_common.errors import StorageError, UserError


def work(task, skip, heartbeat):
    """Reads items; returns what became of each."""
    done = []
    for item in task:
        if item in skip:
            done.append((item, skip[item]))
            continue
        heartbeat(item)
        if item.startswith("hang"):
            time.sleep(1000)
        if item.startswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if item.startswith("killed once") and not os.path.exists(item.split(":")[1]):
            open(item.split(":")[1], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if item.startswith("mark:"):
            open(item.split(":")[1], "w").close()
        if item.startswith("killed always"):
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "user":
            raise UserError("fix this")
        if item == "storage":
            raise StorageError("scratch disk is full")
        if item == "disk":
            raise OSError(28, "No space left on device", "/out/shard")
        if item == "bug":
            raise ValueError("a header value")
        done.append((item, "done"))
    heartbeat(None)
    if task and task[-1] == "slow end":
        time.sleep(7.0)  # longer than the time limit of an item
    if task and task[-1] == "dead end":
        os.kill(os.getpid(), signal.SIGKILL)
    return done


def pid_then_wait(task, skip, heartbeat):
    heartbeat("a")
    with open(task, "w") as file:
        file.write(str(os.getpid()))
    os.rename(task, task + ".pid")
    time.sleep(1000)


def signals(task, skip, heartbeat):
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    return "alive"


def hungry(task, skip, heartbeat):
    """Allocates as many bytes as `task` says, then a tenth of a gigabyte; passes a MemoryError on from a terabyte on."""
    heartbeat("a")
    try:
        return bytearray(task)
    except MemoryError:
        heartbeat("b")
        if task > 10**12:
            raise
        return len(bytearray(100_000_000))


def pid(task, skip, heartbeat):
    heartbeat(task)
    if task == "bug":
        raise ValueError
    heartbeat(None)
    return os.getpid()


def table_and_bytes(task, skip, heartbeat):
    """Allocates as many bytes as `task` says while Arrow is in use."""
    import pyarrow as pa

    table = pa.table({"a": [1]})
    return len(table) and len(bytearray(task))
