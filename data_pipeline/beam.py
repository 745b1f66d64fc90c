"""The conversion on Apache Beam: Create(places in the plan) | Reshuffle | Map(convert one shard).

An element says where the line of a shard is in the plan, in two numbers, so that the graph of 100,000 shards has about a
megabyte and no pixel, path or header value is ever in Beam's hands. Workers read the plan and the inputs, and publish shards and reports in
the output folder, which all of them see under the same paths as the build. The build looks at nothing but what is published:
it counts reports, and stops when a worker leaves a note of what went wrong.

Every Beam worker hands its shard to a process of workers.py, as the local runner does: a decoder that hangs or crashes costs
its file, and the Beam worker lives on.
"""

import atexit
import contextlib
import importlib.util
import json
import multiprocessing
import os
import shlex
import signal
import threading
import time
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from curia_common.errors import RemoteFault, UserError, fault_location
from curia_common.exit_codes import ExitCode
from data_pipeline import workers
from data_pipeline.format import files, shards
from data_pipeline.stages import assignment, commit, convert
from data_pipeline.stages.assignment import ShardPlace

if TYPE_CHECKING:  # imported where it is used, because it is an extra and takes seconds
    from apache_beam import Pipeline

# Named in full, because Beam's "DirectRunner" downloads a program (Prism) where it can.
LOCAL = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
FAILED = ".failed"  # ending of the note that a worker leaves beside the reports
EVERY = 0.5  # seconds between two looks at the reports
GRACE = 60.0  # seconds that a runner has to cancel its job

_idle: list[workers.Worker] = []
_one_at_a_time = threading.Lock()


def _end_children() -> None:
    # Python would send them SIGTERM, which they ignore, and wait.
    for child in multiprocessing.active_children():
        child.kill()


atexit.register(_end_children)


class Limits(NamedTuple):
    """Of a worker process: seconds that a file may take, and bytes of memory."""

    timeout: float
    memory: int


def options(text: str, workers: int) -> list[str]:
    """Flags for Beam's PipelineOptions.

    Args:
      text: of the user, "--runner=FlinkRunner --flink_master=…"; without a runner it is Beam's own local one, with processes.
      workers: processes of the local runner.

    Raises:
      UserError: Beam is not installed, or a quotation is not closed.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError("--runner=beam needs Apache Beam: pip install 'apache-beam>=2.70,<3' (the extra `beam`)")
    try:
        flags = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--beam-options cannot be parsed: {error}") from error
    # A worker converts one shard at a time; more threads would only hold shards that another worker could have.
    if not any(flag.startswith("--number_of_worker_harness_threads") for flag in flags):
        flags.append("--number_of_worker_harness_threads=1")
    if not any(flag == "--runner" or flag.startswith("--runner=") for flag in flags):
        flags += [f"--runner={LOCAL}", f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing"]
    return flags


def build_graph(pipeline: "Pipeline", places: Sequence[ShardPlace], job: convert.Job, limits: Limits) -> None:
    """Adds the conversion of the shards at `places` to a Beam pipeline."""
    import apache_beam as beam

    every = pipeline | "shards" >> beam.Create([place.at for place in places], reshuffle=False)
    _ = every | beam.Reshuffle() | "convert" >> beam.Map(convert_one, job, limits)


def convert_one(at: tuple[int, int], job: convert.Job, limits: Limits) -> None:
    """Converts a shard unless it is finished, in a process that may hang or die; runs on a Beam worker.

    Args:
      at: offset and length of the shard's line in the plan, bytes.

    Raises:
      RuntimeError: it failed, so that the runner tries it again if it does such things; the text quotes no data.
    """
    from apache_beam.metrics.metric import Metrics

    with _one_at_a_time:
        if not os.path.isdir(job.sidecars):
            raise RuntimeError(f"this worker sees no folder {job.sidecars}; mount the output there on every worker")
        note = None
        try:
            shard = assignment.read_shard(job.lines, at)
            name = shards.file_name(job.conversion.name, shard.split, shard.number)
            note = Path(job.sidecars, name + FAILED)
            if commit.is_finished(Path(job.sidecars), Path(job.output, name), job.plan):
                Metrics.counter("data_pipeline", "shards that were finished").inc()
                return
            running = workers.run(
                convert.publish, [convert.ShardTask(job, at)], workers=1, timeout=limits.timeout, memory=limits.memory,
                idle=_idle,
            )  # fmt: skip
            with contextlib.closing(running):
                for message in running:
                    if isinstance(message, workers.Progress):
                        Metrics.counter("data_pipeline", "files").inc()
            Metrics.counter("data_pipeline", "shards converted").inc()
        except Exception as error:  # noqa: BLE001 - every error is reported without data
            text, code = fault_location(error), None
            if isinstance(error, UserError):
                text, code = str(error), int(error.exit_code)
            content = {"text": text, "exit_code": code, "item": getattr(error, "item", None)}
            if note is not None:
                with contextlib.suppress(OSError):
                    files.write_text(note, json.dumps(content), private=True)
            raise RuntimeError(text) from None


def run(
    job: convert.Job, limits: Limits, places: Sequence[ShardPlace], flags: Sequence[str], log: Path
) -> Generator[int, None, None]:
    """Runs the conversion of the shards at `places` to its end; closing the iterator stops it.

    Args:
      flags: from options().
      log: where Beam and its runner log; readable by the owner alone.

    Yields:
      How many shards were published since the last time.

    Raises:
      TaskError, RemoteFault: as workers.run, from the note that a worker has left.
      UserError: the runner failed.
    """
    sidecars = Path(job.sidecars)
    before = _reports(sidecars)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe(duplex=False)
    os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    driver = context.Process(target=_drive, args=(job, limits, list(places), list(flags), str(log), theirs))
    driver.start()
    theirs.close()
    done, pause, ended = 0, EVERY, False
    try:
        while not ended:
            ended = bool(wait([pipe, driver.sentinel], timeout=pause))
            began = time.monotonic()
            now = len(_reports(sidecars) - before)
            # Listing a remote folder takes long; at most a tenth of the time goes into it.
            pause = min(max(EVERY, 9 * (time.monotonic() - began)), 60.0)
            if now > done:
                yield now - done
                done = now
        problem = pipe.recv()
    except EOFError:
        problem = "it was killed"
    finally:
        _stop(driver)
        pipe.close()
    if problem is not None:
        raise _failure(sidecars, problem, log)


def _reports(sidecars: Path) -> set[str]:
    with os.scandir(sidecars) as found:
        return {
            entry.name for entry in found if entry.name.endswith(".json") and not entry.name.endswith(".final.json")
        }


def _failure(sidecars: Path, problem: str, log: Path) -> Exception:
    for note in sorted(sidecars.glob(f"*{FAILED}")):
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(note.read_text(encoding="utf-8"))
            if content["exit_code"] is None:
                return RemoteFault(content["text"])
            return workers.TaskError(content["text"], content["item"], ExitCode(content["exit_code"]))
    return UserError(f"the Beam runner failed ({problem}); its log is {log}")


def _stop(driver: BaseProcess) -> None:
    if driver.is_alive():
        driver.terminate()
        driver.join(GRACE)
    if driver.is_alive() and driver.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.kill()
    driver.join()


# ---- the process that holds the runner


def _drive(
    job: convert.Job, limits: Limits, places: list[ShardPlace], flags: list[str], log: str, pipe: Connection
) -> None:  # pragma: no cover - in a process of its own
    # In a process group of its own, so that whatever a local runner has started ends with it.
    os.setpgid(0, 0)
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A remote job is cancelled; a local one is killed at once.
    signal.signal(signal.SIGTERM, _kill_group if f"--runner={LOCAL}" in flags else _cancel)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    result = None
    problem: str | None = "stopped"
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners.runner import PipelineState

        pipeline = beam.Pipeline(options=PipelineOptions(flags))
        build_graph(pipeline, places, job, limits)
        result = pipeline.run()
        state = result.wait_until_finish()
        problem = None if state in (None, PipelineState.DONE) else f"its job ended as {state}"
    except _Cancelled:
        if result is not None:
            with contextlib.suppress(Exception):
                result.cancel()
    except Exception as error:  # noqa: BLE001 - reported to the build; Beam's own text is in the log
        import traceback

        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    with contextlib.suppress(OSError):
        pipe.send(problem)
    pipe.close()
    os.killpg(0, signal.SIGKILL)


class _Cancelled(BaseException):
    pass


def _cancel(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Cancelled


def _kill_group(number: int, frame: FrameType | None) -> None:
    os.killpg(0, signal.SIGKILL)


def _end_with(parent: BaseProcess) -> None:
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)
