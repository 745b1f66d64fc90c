"""Worker processes that may hang, crash or run out of memory without taking the run with them.

A task is a list of items. The worker says before each item which one it is about to read. A worker that stays on one item
for too long, or dies on it, is replaced, and its task starts again without that item. Memory beyond a worker's limit is
refused to it, so that a damaged header that promises a terabyte fails in the reader at once.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from curia_common import processes
from curia_common.errors import RemoteFault, UserError, fault_location
from curia_common.exit_codes import ExitCode
from data_pipeline.sources.base import Heartbeat

# function(task, skip, heartbeat) -> result; `skip` maps items that must not be read to the reason.
Work = Callable[[Any, Mapping[str, str], Heartbeat], Any]


class Progress(NamedTuple):
    """A worker is about to read an item; reported once for each, however often its task starts again."""

    item: str


class Done(NamedTuple):
    """A task is finished; `number` is its place among the tasks."""

    number: int
    result: Any


class TaskError(UserError):
    """A task failed in a way that the user can fix.

    Attributes:
      item: what the worker was reading, or None.
    """

    def __init__(self, text: str, item: str | None, exit_code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(text)
        self.item, self.exit_code = item, exit_code


class _Beat(NamedTuple):
    """From a worker: it is about to read an item, or, with None, reads nothing."""

    item: str | None


class _Failure(NamedTuple):
    """From a worker: the task itself raised; `exit_code` is None for an unexpected error."""

    text: str
    exit_code: ExitCode | None


def _serve(function: Work, pipe: Connection, memory: int | None) -> None:
    # Decoders in C print to standard error, header values among it. What matters goes through the pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if memory is not None:
        # Heap and anonymous mappings. Systems without this limit raise or ignore it.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    processes.die_with_parent()  # a worker that outlives a killed build could publish a shard under the next one

    def heartbeat(item: str | None) -> None:
        pipe.send(_Beat(item))

    while (job := pipe.recv()) is not None:
        task, skip = job
        try:
            message = Done(0, function(task, skip, heartbeat))
        except UserError as error:
            message = _Failure(str(error), ExitCode(error.exit_code))
        except MemoryError:
            message = _Failure("a worker needs more memory than it may take; raise --memory-gb", ExitCode.USAGE)
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            message = _Failure(
                f"{error.strerror or error}{where}; fix that and rerun the same command", ExitCode.RESTART
            )
        except Exception as error:  # noqa: BLE001 - raised again in the parent
            message = _Failure(fault_location(error), None)
        pipe.send(message)


class Worker:
    """A process that works on one task at a time.

    Attributes:
      task: number of its task, or None.
      item, since: what it is reading, and since when.
    """

    def __init__(self, function: Work, memory: int | None) -> None:
        # A fork would copy the parent's locks in whatever state the progress display's thread has them.
        context = multiprocessing.get_context("spawn")
        # Arrow's own pool reserves a gigabyte of addresses, which counts as memory taken.
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs, memory), daemon=True)
        # Ctrl-C and a cluster's SIGTERM reach the whole process group. Only the parent reacts and stops its workers; a worker
        # that died of one would look like a decoder that crashed.
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
    idle: list[Worker] | None = None,
) -> Generator[Progress | Done, None, None]:  # fmt: skip
    """Runs `function` on every task, `workers` at a time.

    Args:
      tasks: anything that can be pickled.
      timeout: seconds an item may take.
      memory: bytes that a worker may take, its libraries (0.2 GB) included; None for no limit.
      idle: for callers that get their tasks one at a time: workers of an earlier call with the same function and memory,
        to be reused. After a call without errors it holds the workers of this call, and the caller stops them.

    Yields:
      Progress before an item is read and Done with each result, in the order in which they happen.

    Raises:
      TaskError: a task failed in a way the user can fix (such as a full disk), or a worker died while it read nothing.
      RemoteFault: a task raised anything else.
    """
    pool = _Pool(function, tasks, memory)
    if idle:
        pool.workers, idle[:] = list(idle), []
    try:
        while pool.waiting or any(worker.task is not None for worker in pool.workers):
            pool.dispatch(workers)
            for pipe in wait([worker.pipe for worker in pool.workers if worker.task is not None], timeout=0.2):
                worker = next(worker for worker in pool.workers if worker.pipe is pipe)
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    pool.replace_dead_worker(worker)
                    continue
                if isinstance(message, _Beat):
                    worker.item, worker.since = message.item, time.monotonic()
                    if message.item is not None and pool.is_first_read(worker, message.item):
                        yield Progress(message.item)
                elif isinstance(message, Done):
                    yield Done(pool.finish(worker), message.result)
                elif message.exit_code is not None:
                    raise TaskError(message.text, worker.item, message.exit_code)
                else:
                    raise RemoteFault(message.text)
            for worker in list(pool.workers):
                # Messages wait while the caller works on a result: `since` is that of the last one received.
                stuck = worker.item is not None and time.monotonic() - worker.since > timeout and not worker.pipe.poll()
                if worker.task is not None and stuck:
                    worker.stop()
                    pool.restart_without_item(worker, f"reading it took more than {timeout:g} s")
        if idle is not None:
            idle[:], pool.workers = pool.workers, []
    finally:
        for worker in pool.workers:
            worker.stop()


class _Pool:
    def __init__(self, function: Work, tasks: Sequence[Any], memory: int | None) -> None:
        self._function, self._tasks, self._memory = function, tasks, memory
        self.workers: list[Worker] = []
        self.waiting = list(range(len(tasks)))[::-1]
        self._skips: list[dict[str, str]] = [{} for _ in tasks]
        self._reported: dict[int, set[str]] = {}  # items of the tasks that are not finished
        self._killed: set[str] = set()

    def dispatch(self, count: int) -> None:
        """Gives waiting tasks to idle workers; starts workers until there are `count`."""
        while self.waiting and len(self.workers) < count:
            self.workers.append(Worker(self._function, self._memory))
        for worker in self.workers:
            if worker.task is None and self.waiting:
                worker.task, worker.item, worker.since = self.waiting.pop(), None, time.monotonic()
                self._reported.setdefault(worker.task, set())
                with contextlib.suppress(BrokenPipeError):  # it died while idle; the next read of the pipe shows that
                    worker.pipe.send((self._tasks[worker.task], self._skips[worker.task]))

    def is_first_read(self, worker: Worker, item: str) -> bool:
        """Whether the worker's task reads this item for the first time."""
        reported = self._reported[_task(worker)]
        first = item not in reported
        reported.add(item)
        return first

    def finish(self, worker: Worker) -> int:
        """Frees a worker; returns the number of its task."""
        number, worker.task = _task(worker), None
        del self._reported[number]
        return number

    def replace_dead_worker(self, worker: Worker) -> None:
        """Puts the task of a worker that died back, without the item that it died on unless it was killed from outside."""
        worker.process.join()
        code = worker.process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        worker.stop()
        if worker.item is None:
            raise TaskError(
                f"a worker process ended ({name}) while it read no file; the machine may be out of memory: try fewer --workers", None
            )  # fmt: skip
        if name == "SIGKILL" and worker.item not in self._killed:
            # Killed from outside, as a rule because memory ran out, which need not be due to this item: one more try.
            self._killed.add(worker.item)
            self.workers.remove(worker)
            self.waiting.append(_task(worker))
        else:
            self.restart_without_item(worker, f"the decoder crashed on it ({name})")

    def restart_without_item(self, worker: Worker, reason: str) -> None:
        """Puts the task of a stopped worker back, without the item that it was reading."""
        self.workers.remove(worker)
        self._skips[_task(worker)][str(worker.item)] = reason
        self.waiting.append(_task(worker))


def _task(worker: Worker) -> int:
    assert worker.task is not None  # it has sent a message about one, or died on it
    return worker.task
