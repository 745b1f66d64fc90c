"""Processes that may hang or die without taking the work with them.

A task is a list of items that a worker goes through, saying before each one which it is about to touch. A worker that
stays on one item for too long, or dies on it, is replaced, and its task starts again without that item.
"""

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from data_pipeline.errors import UserError

# function(task, skip, touch) -> result; `skip` maps items to the reason why they are left out.
Work = Callable[[Any, dict[str, str], Callable[[str], None]], Any]


@dataclasses.dataclass
class Progress:
    """A worker is about to touch an item."""

    item: str


@dataclasses.dataclass
class Done:
    """A task is finished."""

    number: int
    result: Any


@dataclasses.dataclass
class _Failure:
    """The task itself raised: not one item's fault."""

    text: str
    user: bool


def _serve(function: Work, pipe: Connection) -> None:
    # Decoders in C print to standard error, header values among it. What matters goes through the pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while (job := pipe.recv()) is not None:
        task, skip = job
        try:
            message: Any = Done(0, function(task, skip, lambda item: pipe.send(Progress(item))))
        except (UserError, OSError) as error:
            message = _Failure(str(error), True)
        except Exception as error:  # noqa: BLE001 - it is passed on and raised in the parent
            message = _Failure(f"{type(error).__name__}: {error}", False)
        pipe.send(message)


class _Worker:
    def __init__(self, function: Work) -> None:
        # A fork would copy the parent's locks in whatever state the progress display's thread has them.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.task: int | None = None
        self.item: str | None = None
        self.since = 0.0

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run(function: Work, tasks: Sequence[Any], *, workers: int, timeout: float) -> Iterator[Progress | Done]:
    """Runs `function` on every task, `workers` at a time.

    Args:
      tasks: anything that can be pickled.
      timeout: seconds an item may take.

    Yields:
      Progress whenever an item is touched, Done with each result, in the order in which they happen.

    Raises:
      UserError: a task failed in a way the user can mend (a full disk, say).
      RuntimeError: a task raised anything else.
    """
    skips: list[dict[str, str]] = [{} for _ in tasks]
    waiting = list(range(len(tasks)))[::-1]
    pool: list[_Worker] = []
    try:
        while waiting or any(w.task is not None for w in pool):
            while waiting and len(pool) < workers:
                pool.append(_Worker(function))
            for worker in pool:
                if worker.task is None and waiting:
                    worker.task, worker.item, worker.since = waiting.pop(), None, time.monotonic()
                    worker.pipe.send((tasks[worker.task], skips[worker.task]))
            for pipe in wait([w.pipe for w in pool if w.task is not None], timeout=0.2):
                worker = next(w for w in pool if w.pipe is pipe)
                try:
                    message = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    _replace(pool, worker, skips, waiting, "the decoder crashed on it")
                    continue
                if isinstance(message, Progress):
                    worker.item, worker.since = message.item, time.monotonic()
                    yield message
                elif isinstance(message, Done):
                    number, worker.task = worker.task, None
                    yield Done(number, message.result)
                else:
                    raise UserError(message.text) if message.user else RuntimeError(message.text)
            for worker in list(pool):
                if worker.task is not None and worker.item is not None and time.monotonic() - worker.since > timeout:
                    _replace(pool, worker, skips, waiting, f"reading it took more than {timeout:g} s")
    finally:
        for worker in pool:
            worker.stop()


def _replace(
    pool: list[_Worker], worker: _Worker, skips: list[dict[str, str]], waiting: list[int], reason: str
) -> None:
    worker.stop()
    pool.remove(worker)
    if worker.item is None:
        raise RuntimeError("a worker died before it touched anything; is the machine out of memory?")
    skips[worker.task][worker.item] = reason
    waiting.append(worker.task)
