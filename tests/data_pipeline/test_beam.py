"""Apache Beam as the runner: its local one with processes, and a job service with a worker pool as for Flink and Spark."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import apache_beam
import psutil
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from curia_common.exit_codes import ExitCode
from data_pipeline import beam
from data_pipeline.format import shards
from data_pipeline.stages.assignment import Conversion, ShardPlace
from data_pipeline.stages.convert import Job

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("--validation", 0.25, "--test", 0.25)


# ---- the graph


def test_graph_of_100_000_shards_is_small() -> None:
    # A shard of 500 files has a line of 200 kB in the plan.
    places = [ShardPlace("train", n, 500, (200_000 * n, 200_000)) for n in range(100_000)]
    own = "/mnt/shards/.build/addition-00000"
    job = Job("/mnt/shards", f"{own}/shards", None, "0" * 64, f"{own}/plan-{'0' * 16}.jsonl", Conversion("x"))
    pipeline = apache_beam.Pipeline(options=PipelineOptions(["--runner", beam.LOCAL]))
    beam.build_graph(pipeline, places, job, beam.Limits(60.0, 4_000_000_000))
    graph = pipeline.to_runner_api()
    # Dataflow takes 20 MB.
    assert graph.ByteSize() < 2_000_000
    transforms = graph.components.transforms
    read = {one for transform in transforms.values() for one in transform.inputs.values()}
    (made,) = {one for t in transforms.values() if t.unique_name == "convert" for one in t.outputs.values()}
    assert made not in read
    # The one group-by is that of Reshuffle, over the places.
    groups = [t.unique_name for t in transforms.values() if t.spec.urn == "beam:transform:group_by_key:v1"]
    assert len(groups) == 1 and groups[0].startswith("Reshuffle/")


# ---- what the user says


def test_missing_beam_is_one_line(tmp_path: Path, study: Path, run_build, monkeypatch) -> None:
    monkeypatch.setattr(beam.importlib.util, "find_spec", lambda name: None)
    result = run_build("--input", study / "dicom", "--output", tmp_path / "out", "--runner", "beam")
    assert result.code == 2 and "pip install 'apache-beam" in result.error
    assert not (tmp_path / "out").exists()


def test_beam_options_need_beam_and_closed_quotes(tmp_path: Path, study: Path, run_build) -> None:
    words = ("--input", study / "dicom", "--output", tmp_path / "out", "--beam-options=--runner='Flink")
    assert "--beam-options needs --runner=beam" in run_build(*words).error
    assert "--beam-options cannot be parsed: No closing quotation" in run_build(*words, "--runner=beam").error


def test_default_runner_needs_no_job_server() -> None:
    assert beam.options("--runner=FlinkRunner --flink_master=host:1", 3) == [
        "--runner=FlinkRunner", "--flink_master=host:1", "--number_of_worker_harness_threads=1",
    ]  # fmt: skip
    assert beam.options("--runner SparkRunner --number_of_worker_harness_threads=2", 3) == [
        "--runner", "SparkRunner", "--number_of_worker_harness_threads=2",
    ]  # fmt: skip
    made = PipelineOptions(beam.options("", 3)).get_all_options(drop_default=True)
    assert made["runner"] == beam.LOCAL
    assert (made["direct_num_workers"], made["direct_running_mode"]) == (3, "multi_processing")


def test_failed_runner_is_one_line_and_its_log_is_private(tmp_path: Path, study: Path, run_build) -> None:
    words = ("--input", study / "dicom", "--output", tmp_path / "out", "--runner=beam")
    result = run_build(*words, "--beam-options=--runner=NoSuchRunner")
    log = tmp_path / "out" / ".build" / "beam.log"
    assert result.code == 2 and "error: the Beam runner failed (ValueError: Unexpected pipeline runner" in result.error
    assert result.error.endswith(f"its log is {log}")
    assert "Traceback" in log.read_text() and stat.S_IMODE(log.stat().st_mode) == 0o600


# ---- runs


@pytest.mark.long
def test_beam_gives_the_same_bytes_as_local_processes(
    study: Path, dataset: Path, tmp_path: Path, run_build, contents
) -> None:
    result = run_build(
        "--input", study / "dicom", "--output", tmp_path / "out", "--slices-per-record", 2, *WORDS, "--runner=beam",
        "--scratch", tmp_path / "scratch", processes=2,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "convert: 12 shards in " in result.err
    assert contents(tmp_path / "out") == contents(dataset)
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.long
def test_decoder_hang_or_crash_leaves_beam_worker_alive(tmp_path: Path, exams: Path, start_build, manifest) -> None:
    for name, (patient, number) in {"hang.dcm": (1, 0), "crash.dcm": (2, 3), "bug.dcm": (3, 2)}.items():
        (exams / f"p{patient}" / f"{number:03d}.dcm").rename(exams / f"p{patient}" / name)
    running = start_build(
        "--input", exams, "--output", tmp_path / "out", "--runner=beam", "--workers", 2, "--timeout", 3,
        trouble={"hang.dcm": "hang", "crash.dcm": "crash", "bug.dcm": "bug"},
    )  # fmt: skip
    out, err = running.process.communicate(timeout=200)
    assert (running.process.returncode, out) == (0, ""), err
    assert "57 kept, 3 quarantined" in err and "Traceback" not in err
    rows = {Path(path).name: row for path, row in manifest(tmp_path / "out").items() if row["fate"] == "quarantined"}
    assert rows["hang.dcm"]["reason"] == "reading it took more than 3 s"
    assert rows["crash.dcm"]["reason"] == "the decoder crashed on it (SIGABRT)"
    assert rows["bug.dcm"]["reason"].startswith("the reader failed on it (KeyError at ")


@pytest.mark.long
@pytest.mark.parametrize(("number", "then"), [(signal.SIGKILL, "local"), (signal.SIGTERM, "beam")])
def test_stopped_beam_build_resumes_with_either_runner(
    tmp_path: Path, exams: Path, start_build, run_build, contents, number: int, then: str
) -> None:
    words = ("--input", exams, "--output", tmp_path / "out", "--validation", 0, "--test", 0)
    running = start_build(*words, "--runner=beam", "--workers", 2, trouble={"*": 0.1})
    running.wait_for_shards(1)
    family = psutil.Process(running.process.pid).children(recursive=True)
    assert len(family) >= 5  # the runner, two Beam workers, and a process for each
    code, err = running.stop(number)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else ExitCode.RESTART), err
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    finished = running.finished_shards()
    assert 1 <= len(finished) < 4
    before = {name: (tmp_path / "out" / name).stat() for name in finished}
    again = run_build(*words, "--runner", then, processes=2 if then == "beam" else 0)
    assert again.code == 0, again.err
    assert f"{len(finished)} of 4 shards are finished already" in again.err
    for name, status in before.items():
        now = (tmp_path / "out" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert run_build(*words[:2], "--output", tmp_path / "fresh", *words[4:]).code == 0
    left = {name: data for name, data in contents(tmp_path / "out").items() if name != ".build/beam.log"}
    assert left == contents(tmp_path / "fresh")


@pytest.mark.long
def test_worker_error_ends_beam_build_with_one_line(tmp_path: Path, exams: Path, start_build) -> None:
    running = start_build(
        "--input", exams, "--output", tmp_path / "out", "--runner=beam", "--workers", 2, trouble={"*": 0.1}
    )  # fmt: skip
    running.wait_for_shards(1)
    for path in exams.rglob("*.dcm"):
        os.utime(path, ns=(1, 1))
    _, err = running.process.communicate(timeout=200)
    assert running.process.returncode == ExitCode.DATA
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    where = tmp_path / "out" / ".build" / "failed_on.txt"
    assert "an input changed while the build ran" in line and line.endswith(f"is in {where})")
    assert Path(where.read_text().strip()).name.endswith(".dcm") and str(exams) not in line
    assert "Traceback" not in err


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def _serving(module: str, port: int, *words: str) -> Iterator[None]:
    # The pool starts its workers as "python".
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    with subprocess.Popen(
        [sys.executable, "-m", module, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    ) as server:  # fmt: skip
        try:
            end = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
                    break
                assert server.poll() is None and time.monotonic() < end
                time.sleep(0.1)
            yield
        finally:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.long
def test_job_service_with_worker_pool_gives_the_same_bytes(
    study: Path, dataset: Path, tmp_path: Path, run_build, contents
) -> None:
    """The protocol by which Flink and Spark get a job, and the kind of workers that pods with mounted volumes have."""
    jobs, pool = _free_port(), _free_port()
    with (
        _serving("apache_beam.runners.portability.local_job_service_main", jobs, f"--port={jobs}"),
        _serving("apache_beam.runners.worker.worker_pool_main", pool, f"--service_port={pool}"),
    ):
        result = run_build(
            "--input", study / "dicom", "--output", tmp_path / "out", "--slices-per-record", 2, *WORDS, "--runner=beam",
            f"--beam-options=--runner=PortableRunner --job_endpoint=localhost:{jobs} --environment_type=EXTERNAL "
            f"--environment_config=localhost:{pool}",
        )  # fmt: skip
    assert result.code == 0, result.err
    assert contents(tmp_path / "out") == contents(dataset)
    assert len(shards.SliceSource(tmp_path / "out", "train")) > 0
