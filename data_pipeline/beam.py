"""The conversion on Apache Beam: Create(places in the plan) | Reshuffle | Map(convert one shard).

An element is where a shard's line stands in the plan, two numbers, so the graph of 100,000 shards has about a megabyte and no
pixel, path or header value is ever in Beam's hands. Workers read the plan and the inputs and publish shards and reports in
the output folder, which all of them see under the paths that the build has. What is published is all that the build looks at:
it counts reports, and stops when a worker leaves word of what went wrong.

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
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from curia_common.errors import UserError, fault_location
from data_pipeline import workers
from data_pipeline.format import files, shards
from data_pipeline.stages import assignment as plan
from data_pipeline.stages import commit, convert

# Named in full, because Beam's "DirectRunner" downloads a program (Prism) where it can.
LOCAL = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
FAILED = ".failed"  # ending of the word that a worker leaves beside the reports
EVERY = 0.5  # seconds between two looks at the reports
GRACE = 60.0  # seconds that a runner has to cancel its job

_idle: list[Any] = []
_one_at_a_time = threading.Lock()


def _end_children() -> None:
    # Python would send them SIGTERM, which they leave to their parent, and wait.
    for child in multiprocessing.active_children():
        child.kill()


atexit.register(_end_children)


def options(text: str, workers: int) -> list[str]:
    """Words for Beam's PipelineOptions.

    Args:
      text: what the user says, "--runner=FlinkRunner --flink_master=…"; without a runner it is Beam's own local one, with
        processes.
      workers: processes of the local one.

    Raises:
      UserError: Beam is not installed, or quotes are left open.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError("--runner=beam needs Apache Beam: pip install 'apache-beam>=2.70,<3' (the extra `beam`)")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--beam-options cannot be taken apart: {error}") from error
    # A worker converts one shard at a time; more threads would only hold shards that another could have.
    given = [word for word in words if word.startswith("--number_of_worker_harness_threads")]
    words += [] if given else ["--number_of_worker_harness_threads=1"]
    runner = [n for n, word in enumerate(words) if word == "--runner" or word.startswith("--runner=")]
    if not runner:
        words += [f"--runner={LOCAL}", f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing"]
    return words


def build_graph(pipeline: Any, places: Sequence[Sequence[int]], common: Mapping[str, Any]) -> None:
    """Adds the conversion to a Beam pipeline.

    Args:
      places: where the lines of the shards are, as plan.write says.
      common: see convert_one.
    """
    import apache_beam as beam

    every = pipeline | "shards" >> beam.Create([tuple(at) for at in places], reshuffle=False)
    _ = every | beam.Reshuffle() | "convert" >> beam.Map(convert_one, dict(common))


def convert_one(at: Sequence[int], common: Mapping[str, Any]) -> None:
    """Converts a shard unless it is finished, in a process that may hang or die; runs on a Beam worker.

    Args:
      at: the place of the shard in the plan.
      common: what convert.publish takes, but for the place, and "timeout" and "memory" of workers.run.

    Raises:
      RuntimeError: it failed, so that the runner tries it again if it does such things; the text quotes no data.
    """
    from apache_beam.metrics import Metrics

    task = {name: value for name, value in common.items() if name not in ("timeout", "memory")} | {"at": list(at)}
    with _one_at_a_time:
        if not os.path.isdir(task["sidecars"]):
            raise RuntimeError(f"this worker sees no folder {task['sidecars']}; mount the output there on every worker")
        note = None
        try:
            shard = plan.read_shard(task["lines"], at)
            name = shards.file_name(task["name"], shard["split"], shard["number"])
            note = Path(task["sidecars"], name + FAILED)
            if commit.is_finished(Path(task["sidecars"]), Path(task["output"], name), task["plan"]):
                Metrics.counter("data_pipeline", "shards that were finished").inc()
                return
            running = workers.run(
                convert.publish, [task], workers=1, timeout=common["timeout"], memory=common["memory"], idle=_idle
            )
            with contextlib.closing(running):
                for message in running:
                    if isinstance(message, workers.Progress):
                        Metrics.counter("data_pipeline", "files").inc()
            Metrics.counter("data_pipeline", "shards converted").inc()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told without data
            known = isinstance(error, (UserError, workers.TaskFault))
            text = str(error) if known else fault_location(error)
            word = {"text": text, "user": isinstance(error, UserError), "item": getattr(error, "item", None)}
            if note is not None:
                with contextlib.suppress(OSError):
                    files.write_text(note, json.dumps(word), private=True)
            raise RuntimeError(text) from None


def run(common: Mapping[str, Any], places: Sequence[Sequence[int]], words: Sequence[str], log: Path) -> Iterator[int]:
    """Runs the conversion of the shards at `places` to its end; who stops iterating stops it.

    Args:
      common: see convert_one.
      words: from options().
      log: where Beam and its runner write what they have to say; the owner's alone.

    Yields:
      How many shards were published since it last said so.

    Raises:
      TaskError, TaskFault: as workers.run does, with what a worker has left word of.
      UserError: the runner failed, or a shard is missing in the end.
    """
    sidecars = Path(common["sidecars"])
    before = _reports(sidecars)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe(duplex=False)
    os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    driver = context.Process(target=_drive, args=(dict(common), list(places), list(words), str(log), theirs))
    driver.start()
    theirs.close()
    done, pause, ended = 0, EVERY, False
    try:
        while not ended:
            ended = bool(wait([pipe, driver.sentinel], timeout=pause))
            began = time.monotonic()
            now = len(_reports(sidecars) - before)
            # On far folders a look takes long; it is done for a tenth of the time at most.
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
            word = json.loads(note.read_text(encoding="utf-8"))
            return workers.TaskError(word["text"], word["item"]) if word["user"] else workers.TaskFault(word["text"])
    return UserError(f"the Beam runner failed ({problem}); what it said is in {log}")


def _stop(driver: Any) -> None:
    if driver.is_alive():
        driver.terminate()
        driver.join(GRACE)
    if driver.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.kill()
    driver.join()


# ---- the process that holds the runner


def _drive(
    common: dict[str, Any], places: list[Any], words: list[str], log: str, pipe: Connection
) -> None:  # pragma: no cover - in a process of its own
    # A group of its own: whatever a local runner has started ends with it, in whatever way it ends.
    os.setpgid(0, 0)
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A job elsewhere is cancelled; what runs here is ended at once.
    signal.signal(signal.SIGTERM, _kill_group if f"--runner={LOCAL}" in words else _cancel)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    result = None
    problem: str | None = "stopped"
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners.runner import PipelineState

        pipeline = beam.Pipeline(options=PipelineOptions(words))
        build_graph(pipeline, places, common)
        result = pipeline.run()
        state = result.wait_until_finish()
        problem = None if state in (None, PipelineState.DONE) else f"its job ended as {state}"
    except _Cancelled:
        with contextlib.suppress(Exception):
            result.cancel()
    except Exception as error:  # noqa: BLE001 - told to the build; Beam's own text stands in the log
        import traceback

        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    with contextlib.suppress(OSError):
        pipe.send(problem)
    pipe.close()
    os.killpg(0, signal.SIGKILL)


class _Cancelled(BaseException):
    pass


def _cancel(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Cancelled


def _kill_group(number: int, frame: Any) -> None:
    os.killpg(0, signal.SIGKILL)


def _end_with(parent: Any) -> None:
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)
