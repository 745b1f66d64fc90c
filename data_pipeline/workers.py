"""Processes that may hang, die or ask for too much memory without taking the work with them.

A task is a list of items that a worker goes through, saying before each one which it is about to touch. A worker that
stays on one item for too long, or dies on it, is replaced, and its task starts again without that item. What a worker asks
for beyond its memory is refused to it, so that a damaged header which promises a terabyte fails in the reader at once.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from curia_common.errors import UserError, fault_location
from data_pipeline.sources.base import Heartbeat

# function(task, skip, touch) -> result; `skip` maps items to the reason why they are left out, and none of them is touched.
Work = Callable[[Any, Mapping[str, str], Heartbeat], Any]


@dataclasses.dataclass
class Progress:
    """A worker is about to touch an item; said once for each, however often its task has to start again."""

    item: str


@dataclasses.dataclass
class Done:
    """A task is finished."""

    number: int
    result: Any


class TaskError(UserError):
    """A task failed in a way that the user can mend.

    Attributes:
      item: what the worker had in hand, or None.
    """

    def __init__(self, text: str, item: str | None) -> None:
        super().__init__(text)
        self.item = item


class TaskFault(RuntimeError):
    """A task raised what no user can mend; the text says where, and quotes no data."""


@dataclasses.dataclass
class _Failure:
    """The task itself raised: not one item's fault."""

    text: str
    user: bool


def _die_with(parent: Any) -> None:
    # A worker that outlives a killed build could publish a shard under the next one.
    wait([parent.sentinel])
    os._exit(1)


def _serve(function: Work, pipe: Connection, memory: int | None) -> None:
    # Decoders in C print to standard error, header values among it. What matters goes through the pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if memory is not None:
        # Heap and anonymous mappings. Systems without this limit say so or ignore it.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    threading.Thread(target=_die_with, args=(multiprocessing.parent_process(),), daemon=True).start()

    def touch(item: str | None) -> None:
        pipe.send(Progress(item))

    while (job := pipe.recv()) is not None:
        task, skip = job
        try:
            message: Any = Done(0, function(task, skip, touch))
        except UserError as error:
            message = _Failure(str(error), True)
        except MemoryError:
            message = _Failure("a worker needs more memory than it may take; give it more with --memory-gb", True)
        except OSError as error:
            message = _Failure(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), True)
        except Exception as error:  # noqa: BLE001 - it is passed on and raised in the parent
            message = _Failure(fault_location(error), False)
        pipe.send(message)


class _Worker:
    def __init__(self, function: Work, memory: int | None) -> None:
        # A fork would copy the parent's locks in whatever state the progress display's thread has them.
        context = multiprocessing.get_context("spawn")
        # Arrow's own pool sets a gigabyte of addresses aside, which counts as memory taken.
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs, memory), daemon=True)
        # Ctrl-C and a cluster's SIGTERM reach the whole process group. Only the parent answers them and ends its workers;
        # a worker that died of one would look like a decoder that crashed.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.task: int | None = None
        self.item: str | None = None
        self.since = 0.0

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run(
    function: Work, tasks: Sequence[Any], *, workers: int, timeout: float, memory: int | None = None,
    idle: list[Any] | None = None,
) -> Iterator[Progress | Done]:  # fmt: skip
    """Runs `function` on every task, `workers` at a time.

    Args:
      tasks: anything that can be pickled.
      timeout: seconds an item may take.
      memory: bytes that a worker may take, its libraries (0.2 GB) included; None for no limit.
      idle: workers of an earlier call with the same function and memory, which are used again; when all went well it holds
        those of this call, and whoever gave it stops them. For callers that get their tasks one at a time.

    Yields:
      Progress whenever an item is touched, Done with each result, in the order in which they happen.

    Raises:
      TaskError: a task failed in a way the user can mend (a full disk, say), or a worker died with no item in hand.
      TaskFault: a task raised anything else.
    """
    pool = _Pool(function, tasks, memory)
    if idle:
        pool.workers, idle[:] = list(idle), []
    try:
        while pool.waiting or any(w.task is not None for w in pool.workers):
            pool.give_out(workers)
            for pipe in wait([w.pipe for w in pool.workers if w.task is not None], timeout=0.2):
                worker = next(w for w in pool.workers if w.pipe is pipe)
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    pool.bury(worker)
                    continue
                if isinstance(message, Progress):
                    worker.item, worker.since = message.item, time.monotonic()
                    if message.item is not None and pool.is_new(worker.task, message.item):
                        yield message
                elif isinstance(message, Done):
                    yield Done(pool.finish(worker), message.result)
                elif message.user:
                    raise TaskError(message.text, worker.item)
                else:
                    raise TaskFault(message.text)
            for worker in list(pool.workers):
                if worker.task is not None and worker.item is not None and time.monotonic() - worker.since > timeout:
                    worker.stop()
                    pool.again_without(worker, f"reading it took more than {timeout:g} s")
        if idle is not None:
            idle[:], pool.workers = pool.workers, []
    finally:
        for worker in pool.workers:
            worker.stop()


class _Pool:
    def __init__(self, function: Work, tasks: Sequence[Any], memory: int | None) -> None:
        self._function, self._tasks, self._memory = function, tasks, memory
        self.workers: list[_Worker] = []
        self.waiting = list(range(len(tasks)))[::-1]
        self._skips: list[dict[str, str]] = [{} for _ in tasks]
        self._touched: dict[int, set[str]] = {}  # of the tasks that had to start again
        self._killed: set[str] = set()

    def give_out(self, count: int) -> None:
        while self.waiting and len(self.workers) < count:
            self.workers.append(_Worker(self._function, self._memory))
        for worker in self.workers:
            if worker.task is None and self.waiting:
                worker.task, worker.item, worker.since = self.waiting.pop(), None, time.monotonic()
                self._touched.setdefault(worker.task, set())
                with contextlib.suppress(BrokenPipeError):  # it died while it waited; the next read of the pipe says so
                    worker.pipe.send((self._tasks[worker.task], self._skips[worker.task]))

    def is_new(self, task: int, item: str) -> bool:
        before = len(self._touched[task])
        self._touched[task].add(item)
        return len(self._touched[task]) > before

    def finish(self, worker: _Worker) -> int:
        number, worker.task = worker.task, None
        del self._touched[number]
        return number

    def bury(self, worker: _Worker) -> None:
        """Replaces a worker that died."""
        worker.process.join()
        code = worker.process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        worker.stop()
        if worker.item is None:
            raise TaskError(
                f"a worker process ended ({name}) with no file in hand; the machine may be out of memory: try fewer --workers",
                None,
            )
        if name == "SIGKILL" and worker.item not in self._killed:
            # Killed from outside, as a rule for want of memory, which need not be this item's fault: one more try.
            self._killed.add(worker.item)
            self.workers.remove(worker)
            self.waiting.append(worker.task)
        else:
            self.again_without(worker, f"the decoder crashed on it ({name})")

    def again_without(self, worker: _Worker, reason: str) -> None:
        self.workers.remove(worker)
        self._skips[worker.task][worker.item] = reason
        self.waiting.append(worker.task)
