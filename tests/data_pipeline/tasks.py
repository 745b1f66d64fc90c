"""Work for test_workers.py: worker processes import it by name."""

import os
import signal
import time

from curia_common.errors import UserError


def work(task, skip, touch):
    """Goes through items; returns what it did with each."""
    done = []
    for item in task:
        if item in skip:
            done.append((item, skip[item]))
            continue
        touch(item)
        if item.startswith("hang"):
            time.sleep(1000)
        if item.startswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if item.startswith("killed once") and not os.path.exists(item.split(":")[1]):
            open(item.split(":")[1], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if item.startswith("killed always"):
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "user":
            raise UserError("mend this")
        if item == "disk":
            raise OSError(28, "No space left on device", "/out/shard")
        if item == "bug":
            raise ValueError("a header value")
        done.append((item, "done"))
    touch(None)
    if task and task[-1] == "slow end":
        time.sleep(1.5)
    if task and task[-1] == "dead end":
        os.kill(os.getpid(), signal.SIGKILL)
    return done


def pid_then_wait(task, skip, touch):
    touch("a")
    with open(task, "w") as file:
        file.write(str(os.getpid()))
    os.rename(task, task + ".pid")
    time.sleep(1000)


def signals(task, skip, touch):
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    return "alive"


def hungry(task, skip, touch):
    """Asks for a terabyte, then for a tenth of a gigabyte; or raises MemoryError where nobody expects it."""
    touch("a")
    try:
        return bytearray(task)
    except MemoryError:
        touch("b")
        if task > 10**12:
            raise
        return len(bytearray(100_000_000))


def pid(task, skip, touch):
    touch(task)
    if task == "bug":
        raise ValueError
    touch(None)
    return os.getpid()


def table_and_bytes(task, skip, touch):
    """Room that is left once Arrow is in use."""
    import pyarrow as pa

    table = pa.table({"a": [1]})
    return len(table) and len(bytearray(task))
