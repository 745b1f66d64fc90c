"""data_pipeline.build on Beam's runners: the options as Beam itself reads them, and the build that the launch supervises."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from apache_beam.options import pipeline_options
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, WorkerOptions

from curia_common.errors import UserError
from data_pipeline import beam as engine
from data_pipeline import build
from launch import __main__ as command
from launch import beam, records
from launch import spec as specs
from launch.spec import LaunchSpec
from tests.launch.clouds import IMAGE

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"
WORDS = ("build", "--input", "/mnt/exams", "--output", "/mnt/ct-shards")
DATAFLOW = {"runner": "DataflowRunner", "topology": "cpu:50x8", "project": "p-1", "zone": "us-central1-b", "image": IMAGE,
            "temp_location": "gs://bucket/tmp"}  # fmt: skip
FLINK = {"runner": "FlinkRunner", "topology": "cpu:16x8", "cluster": "flink:8081"}
SPARK = {"runner": "SparkRunner", "topology": None, "cluster": "spark://spark:7077"}
RUNNERS = {"dataflow": DATAFLOW, "flink": FLINK, "spark": SPARK}


def spec_of(*words: str, **options: object) -> LaunchSpec:
    return specs.make(target="beam", command=[*WORDS, *words], **options)  # pyright: ignore[reportArgumentType]


def options_of(*words: str, **options: object) -> PipelineOptions:
    """Beam's options as the launched build hands them to Beam."""
    argv = beam.on_this_machine(spec_of(*words, **options), attempt=3).argv
    assert argv[:2] == ("-m", "data_pipeline.build")
    args = build.parser().parse_args(argv[2:])
    assert args.runner == "beam" and args.output == "/mnt/ct-shards"
    return PipelineOptions(engine.options(args.beam_options, workers=1))


@pytest.mark.parametrize("name", RUNNERS)
def test_commands_are_those_of_the_golden_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    text = beam.render(spec_of(**RUNNERS[name])).script
    path = GOLDEN / f"beam_{name}.txt"
    if os.environ.get("CURIA_WRITE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text


def test_dataflow_gets_workers_image_place_and_account() -> None:
    options = options_of("--scratch=/tmp", "--memory-gb=3", service_account="a@p-1.iam.gserviceaccount.com", **DATAFLOW)
    worker, cloud = options.view_as(WorkerOptions), options.view_as(GoogleCloudOptions)
    assert (worker.max_num_workers, worker.machine_type, worker.disk_size_gb) == (50, "n2d-standard-8", 110)
    assert (worker.sdk_container_image, worker.worker_zone) == (IMAGE, "us-central1-b")
    assert (cloud.project, cloud.region, cloud.temp_location) == ("p-1", "us-central1", "gs://bucket/tmp")
    assert (cloud.job_name, cloud.labels) == ("ct-shards-3", ["curia-run=ct-shards"])
    assert cloud.service_account_email == "a@p-1.iam.gserviceaccount.com"
    assert options.view_as(pipeline_options.StandardOptions).runner == "DataflowRunner"


def test_dataflow_without_a_zone_chooses_one_of_the_region() -> None:
    options = options_of(**DATAFLOW | {"zone": "europe-west4"})
    assert options.view_as(GoogleCloudOptions).region == "europe-west4"
    assert options.view_as(WorkerOptions).worker_zone is None


@pytest.mark.parametrize(
    ("words", "machine"),
    [((), "n2d-highmem-8"), (("--memory-gb=3",), "n2d-standard-8"), (("--memory-gb=8",), "n2d-highmem-8")],
)
def test_dataflow_machine_has_the_memory_of_a_conversion_for_each_vcpu(words: tuple[str, ...], machine: str) -> None:
    assert options_of(*words, **DATAFLOW).view_as(WorkerOptions).machine_type == machine


@pytest.mark.parametrize(("name", "parallelism"), [("flink", 128), ("spark", -1)])
def test_flink_and_spark_get_master_worker_pools_and_parallelism(name: str, parallelism: int) -> None:
    found = options_of(**RUNNERS[name]).get_all_options()
    masters = {"flink": found["flink_master"], "spark": found["spark_master_url"]}
    assert masters[name] == RUNNERS[name]["cluster"]
    assert (found["environment_type"], found["environment_config"]) == ("EXTERNAL", "localhost:50000")
    assert (found["parallelism"], found["job_name"]) == (parallelism, "ct-shards-3")


def test_options_of_the_build_for_beam_are_kept() -> None:
    found = options_of("--beam-options=--flink_version=1.20", **FLINK).get_all_options()
    assert (found["flink_version"], found["flink_master"]) == ("1.20", "flink:8081")


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ((), {"topology": "cpu:1x8"}, "--runner is missing; add one of --runner=DataflowRunner, "),
        ((), {**FLINK, "topology": None}, "--topology is missing"),
        ((), {**SPARK, "topology": "cpu:2x2"}, "--topology=cpu:2x2 means nothing with --runner=SparkRunner"),
        ((), {**FLINK, "topology": "v5e:2x2"}, "v5e:2x2 is not of CPUs; write workers x vCPUs, such as --topology=cpu:16x8"),
        ((), {**DATAFLOW, "topology": "cpu:50x7"}, "no n2d machine with 7 vCPUs; the nearest have 2, 4, 8: write --topology=cpu:50x8"),
        ((), {**DATAFLOW, "project": "123"}, r"Invalid Project ID \(123\)"),
        ((), {**DATAFLOW, "temp_location": "/tmp"}, r"Invalid GCS path \(/tmp\), given for the option: temp_location"),
        ((), {**DATAFLOW, "cluster": "c", "environment": ["A=b"]}, "--cluster, --env means nothing with --target=beam"),
        ((), {**FLINK, "image": IMAGE}, "--image means nothing with --target=beam"),
        ((), {**FLINK, "cluster": "flink"}, "--cluster=flink is no address of a master for FlinkRunner; write HOST:8081"),
        ((), {**SPARK, "cluster": "spark:7077"}, "write spark://HOST:7077"),
        (("--memory-gb=9",), DATAFLOW, "--memory-gb=9 is more than a vCPU of n2d has .* take at most --memory-gb=8"),
        (("--runner=local",), FLINK, "--runner=local of build is set by the launch; leave it out"),
        (("--beam-options=--parallelism=2",), FLINK, "--beam-options has --parallelism, which the launch sets"),
        (("--beam-options='",), FLINK, "--beam-options cannot be parsed"),
        (("--beam-options=--flink_versio=1.20",), FLINK, "Beam has no option --flink_versio;"),
        (("--beam-options=--flink_version=9",), FLINK, "Beam refuses its options: argument --flink_version: invalid choice: '9'"),
    ],
)  # fmt: skip
def test_spec_that_beam_does_not_serve_is_refused(words: tuple[str, ...], options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        beam.render(spec_of(*words, **options))


def test_other_commands_and_targets_are_refused(capsys) -> None:
    options = {"runner": "FlinkRunner", "topology": "cpu:1x8", "cluster": "flink:8081"}
    convert = ["--target=beam", "--run=x", "--dry-run", "--runner=FlinkRunner", "--topology=cpu:1x8", "--", "convert"]
    assert command.main(convert) == 2
    gke = [
        "--target=gke",
        "--topology=v5e-16",
        "--runner=FlinkRunner",
        "--dry-run",
        "--",
        "pretrain",
        "--workdir=gs://b/r",
    ]
    assert command.main(gke) == 2
    assert beam.render(spec_of(**options))


def test_submission_is_refused_where_this_machine_lacks_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beam.shutil, "which", lambda program: None)
    with pytest.raises(
        UserError, match="FlinkRunner starts Beam's job server, a Java program, and java is not on the PATH"
    ):
        beam.render(spec_of(**FLINK)).check_complete()
    monkeypatch.setattr(beam, "_installed", lambda module: module == "apache_beam")
    with pytest.raises(UserError, match=r"client for Dataflow is not installed; pip install 'apache-beam\[gcp\]'"):
        beam.render(spec_of(**DATAFLOW)).check_complete()
    monkeypatch.setattr(beam, "_installed", lambda module: False)
    with pytest.raises(UserError, match=r"Beam is not installed; pip install 'curia-jax\[beam\]'"):
        beam.render(spec_of(**SPARK)).check_complete()


def test_links_lead_to_the_jobs_of_every_attempt() -> None:
    assert beam.render(spec_of(**FLINK)).links == {"jobs": "http://flink:8081"}
    assert beam.render(spec_of(**SPARK)).links == {"jobs": "http://spark:8080"}
    links = beam.render(spec_of(**DATAFLOW)).links
    assert links["jobs"].endswith("dataflow/jobs?project=p-1") and "%5Ect-shards-" in links["logs of workers"]


# ---- the supervised build


class Builds:
    """Launches of a build that stands in for data_pipeline.build."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._told = folder / "told"
        monkeypatch.setenv("XDG_STATE_HOME", str(folder))
        monkeypatch.setenv("TOLD", str(self._told))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setenv("MODULE", "tests.launch.build")
        self._monkeypatch = monkeypatch

    def start(self, codes: str, *words: str) -> subprocess.Popen[str]:
        """Launches with these exit codes of the attempts; without words, on Flink."""
        self._monkeypatch.setenv("CODES", codes)
        options = ["--target=beam", "--runner=FlinkRunner", "--topology=cpu:2x4", "--cluster=flink:8081"]
        words = words or (*options, "--yes", "--allow-dirty", "--", *WORDS)
        return subprocess.Popen(
            [sys.executable, "-m", "tests.launch.launcher", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, codes: str, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        process = self.start(codes, *words)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    @property
    def jobs(self) -> list[str]:
        """Names of the jobs that were submitted."""
        lines = self._told.read_text().splitlines() if self._told.exists() else []
        return [flag for line in lines for flag in shlex.split(line) if flag.startswith("--job_name=")]


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(tmp_path, monkeypatch)


def test_build_starts_again_with_a_job_of_its_own_until_it_is_done(builds: Builds) -> None:
    code, out, err = builds.run("75 1 0")
    assert code == 0, err
    assert builds.jobs == ["--job_name=ct-shards-1", "--job_name=ct-shards-2", "--job_name=ct-shards-3"]
    assert "jobs: http://flink:8081" in err
    assert "[launch] attempt 3: 1 process\n[launch] finished\n" in out
    assert records.read("ct-shards").topology.devices == 8
    code, out, _ = builds.run("", "status", "ct-shards")
    assert out.startswith("run ct-shards: finished, attempt 3") and "checkpoint" not in out
    assert "workers of FlinkRunner: 2 x 4 vCPU at most" in out and "jobs: http://flink:8081" in out
    code, out, err = builds.run("", "logs", "ct-shards")
    assert code == 0 and "error: exit code 1" in out and "jobs: http://flink:8081" in err


@pytest.mark.parametrize("final", [2, 65])
def test_final_exit_code_of_the_build_is_that_of_the_launch(final: int, builds: Builds) -> None:
    code, _, err = builds.run(str(final))
    assert code == final and len(builds.jobs) == 1
    assert f"process 0 ended with exit code {final}" in err


def test_stopped_build_is_restarted_by_name(builds: Builds) -> None:
    process = builds.start("hang 0")
    deadline = time.monotonic() + 60
    while not builds.jobs:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert out.endswith("[launch] stopped; python -m launch restart ct-shards\n")
    assert builds.run("", "stop", "ct-shards")[1] == "run ct-shards was not running\n"
    code, out, err = builds.run("hang 0", "restart", "ct-shards")
    assert code == 0, err
    assert builds.jobs[1] == "--job_name=ct-shards-2"
