"""Runs data_pipeline.build here, and its conversion on many machines by Apache Beam: Dataflow, Flink or Spark.

Files are listed and planned, and the dataset is committed, by the build on this machine, supervised as by --target=local: it starts again after
a failure, and skips what is converted. Each start submits a job of its own to the runner. Beam's workers see inputs and output under the
paths that the build sees them under; docs/ingest_scale.md says how.
"""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from curia_common.errors import UserError
from curia_common.topologies import Topology
from launch import local, records
from launch.rendering import Rendering
from launch.spec import BEAM, COMMANDS, RUNNERS, LaunchSpec

DATAFLOW, FLINK, SPARK = RUNNERS
# What each runner has a use for, beside --runner.
USED = {
    DATAFLOW: ("project", "zone", "image", "temp_location", "service_account"),
    FLINK: ("cluster",),
    SPARK: ("cluster",),
}
# Beam's worker pools of Flink and Spark, one on every machine: python -m apache_beam.runners.worker.worker_pool_main --service_port=50000
WORKER_POOL = "localhost:50000"
# The build takes up to 60 s to cancel its job (data_pipeline.beam).
CANCEL_SECONDS = 90
# n2d machines, as docs/ingest_scale.md prices them: vCPUs there are, and GiB of each vCPU. cloud.google.com/compute/docs/general-purpose-machines
SIZES = (2, 4, 8, 16, 32, 48, 64, 80, 96)
MEMORY = {"standard": 4, "highmem": 8}
HARNESS_GB = 0.5  # of each vCPU, for Beam's own process beside the one that converts
DISK_GB, SCRATCH_GB = 30, 10  # of a machine, and of each of its vCPUs where the build keeps temporary files on it
DEFAULT_MEMORY_GB = 4.0  # of data_pipeline.build


def render(spec: LaunchSpec) -> Rendering:
    """The build with Beam's options, which Beam itself parses where it is installed. See rendering.Target.

    Raises:
      UserError: Beam or the runner does not serve the spec, or Beam refuses an option.
    """
    if not COMMANDS[spec.command].on_beam:
        able = ", ".join(name for name, command in COMMANDS.items() if command.on_beam)
        raise UserError(f"{spec.command} does not run on Beam, which --target={BEAM} is for; {able} does")
    if spec.runner is None:
        raise UserError(f"--runner is missing; add one of {', '.join(f'--runner={runner}' for runner in RUNNERS)}")
    spec.refuse_unused("runner", *USED[spec.runner])
    if spec.topology.kind != "cpu":
        raise UserError(f"{spec.topology} is not of CPUs; write workers x vCPUs, such as --topology=cpu:16x8")
    if spec.option("--runner") is not None:
        raise UserError(f"--runner={spec.option('--runner')} of {spec.command} is set by the launch; leave it out")
    parse(_flags(spec, attempt=1))
    return Rendering(
        files={},
        # Its paths may be relative to this folder.
        commands=(("env", f"--chdir={os.getcwd()}", "python", *on_this_machine(spec, attempt=1).argv),),
        links=_links(spec),
        lacking=_lacking(spec.runner),
    )


def submit(spec: LaunchSpec, rendering: Rendering) -> int:
    """Runs the build until it is done, was stopped, or cannot continue. Returns and raises what local.submit does."""
    rendering.write(records.folder_of(spec.run), spec)
    return local.supervise(_patient(spec), os.getcwd(), on_this_machine)


def status(spec: LaunchSpec) -> str:
    """State of the build on this machine, and where the runner shows its jobs."""
    workers = f"{spec.topology.hosts} x {spec.topology.shape[1]} vCPU at most" if spec.runner != SPARK else "its own"
    lines = local.status(on_this_machine(spec, attempt=1)).splitlines()
    lines += [f"workers of {spec.runner}: {workers}"]
    return "\n".join([*lines, *(f"{title}: {address}" for title, address in _links(spec).items())])


def logs(spec: LaunchSpec, *, follow: bool) -> int:
    """What the build wrote; what the workers wrote is behind the links."""
    code = local.logs(spec, follow=follow)
    for title, address in _links(spec).items():
        print(f"{title}: {address}", file=sys.stderr)
    return code


def stop(spec: LaunchSpec) -> str:
    """Asks the build to end; it cancels its job. Finished shards are kept."""
    return local.stop(_patient(spec))


def restart(spec: LaunchSpec) -> int:
    """Stops the build where it is alive, and runs it again."""
    folder = local.folder_of_processes(spec)
    print(stop(spec))
    return local.supervise(_patient(spec), folder, on_this_machine)


def on_this_machine(spec: LaunchSpec, attempt: int) -> LaunchSpec:
    """The build as one process of this machine.

    Args:
      attempt: number of the start; the name of the job has it.
    """
    words = (*spec.words, "--runner=beam", f"--beam-options={shlex.join(_flags(spec, attempt))}")  # the last one counts
    return dataclasses.replace(spec, words=words, topology=Topology("cpu", (1, 1)))


def _patient(spec: LaunchSpec) -> LaunchSpec:
    """With a grace period in which the build can cancel its job."""
    return dataclasses.replace(spec, grace_seconds=max(spec.grace_seconds, CANCEL_SECONDS))


def parse(flags: Sequence[str]) -> None:
    """Lets Beam parse its options, where it is installed, and check those of Dataflow where none is a placeholder. Contacts nothing.

    Raises:
      UserError: Beam has no such option, or refuses its value.
    """
    if not _installed("apache_beam"):
        return
    said = io.StringIO()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Beam warns of optional packages that it does not find
    try:
        from apache_beam.options import pipeline_options
        from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator

        with contextlib.redirect_stderr(said):
            options = pipeline_options.PipelineOptions(list(flags))
            known = options.get_all_options()
            unknown = set(options.get_all_options(retain_unknown_options=True)) - set(known)
    except SystemExit:  # as argparse ends
        reason = (said.getvalue().strip().splitlines() or ["no reason"])[-1].partition("error: ")[2]
        raise UserError(f"Beam refuses its options: {reason}") from None
    finally:
        logging.disable(before)
    if unknown:
        names = ", ".join(f"--{name}" for name in sorted(unknown))
        raise UserError(f"Beam has no option {names}; correct --beam-options of the build")
    if known["runner"] != DATAFLOW or any("<" in flag for flag in flags):
        return
    cloud = options.view_as(pipeline_options.GoogleCloudOptions)
    worker = options.view_as(pipeline_options.WorkerOptions)
    # By itself the validator would look into the bucket.
    validator: Any = PipelineOptionsValidator(options, None)
    problems = [
        *validator.validate_gcs_path(cloud, "temp_location"),
        *validator.validate_cloud_options(cloud),
        *validator.validate_num_workers(worker),
        *validator.validate_worker_region_zone(worker),
    ]
    if problems:
        raise UserError(f"Beam refuses its options: {problems[0]}")


def _flags(spec: LaunchSpec, attempt: int) -> list[str]:
    """Beam's options: those of the launch, and those that the build was given.

    Raises:
      UserError: the build was given one that the launch sets, or a value has not the form that the runner takes.
    """
    made = {DATAFLOW: _dataflow, FLINK: _flink, SPARK: _spark}[spec.runner or ""](spec)
    made = [f"--runner={spec.runner}", f"--job_name={spec.run}-{attempt}", *made]
    try:
        own = shlex.split(spec.option("--beam-options") or "")
    except ValueError as error:
        raise UserError(f"--beam-options cannot be parsed: {error}") from error
    names = {flag.partition("=")[0] for flag in made}
    if twice := [name for name in (flag.partition("=")[0] for flag in own) if name in names]:
        raise UserError(f"--beam-options has {', '.join(twice)}, which the launch sets; leave that out")
    return [*made, *own]


def _dataflow(spec: LaunchSpec) -> list[str]:
    zone = spec.filled("zone")
    region = re.sub(r"-[a-z]$", "", zone)
    workers, size = spec.topology.shape
    account = [f"--service_account_email={spec.service_account}"] if spec.service_account else []
    disk = [f"--disk_size_gb={DISK_GB + SCRATCH_GB * size}"] if spec.option("--scratch") else []
    return [
        f"--project={spec.filled('project')}", f"--region={region}", *([f"--worker_zone={zone}"] if zone != region else []),
        f"--temp_location={spec.filled('temp_location')}",
        # Beam is in the image; it would be installed into it once more.
        f"--sdk_container_image={spec.filled('image')}", "--sdk_location=container",
        f"--worker_machine_type={_machine(spec, size)}", f"--max_num_workers={workers}", *disk, *account, f"--label=curia-run={spec.run}",
    ]  # fmt: skip


def _machine(spec: LaunchSpec, size: int) -> str:
    """The cheapest machine type with so many vCPUs whose memory is enough for one conversion on each."""
    if size not in SIZES:
        near = sorted(SIZES, key=lambda other: abs(other - size))[:3]
        raise UserError(
            f"there is no n2d machine with {size} vCPUs; the nearest have {', '.join(map(str, sorted(near)))}: write "
            f"--topology=cpu:{spec.topology.hosts}x{near[0]}"
        )
    given = spec.option("--memory-gb")
    try:
        wanted = DEFAULT_MEMORY_GB if given is None else float(given)
    except ValueError:
        raise UserError(f"--memory-gb={given} is not a number") from None
    for kind, gib in MEMORY.items():
        if wanted * 1e9 <= gib * 2**30 - HARNESS_GB * 1e9:
            return f"n2d-{kind}-{size}"
    most = max(MEMORY.values())
    raise UserError(
        f"--memory-gb={wanted:g} is more than a vCPU of n2d has ({most} GiB, of them {HARNESS_GB} GB for Beam); take at most "
        f"--memory-gb={most}"
    )


def _flink(spec: LaunchSpec) -> list[str]:
    address = _address(spec, r"(https?://)?[\w.-]+:\d+", "HOST:8081")
    return [f"--flink_master={address}", f"--parallelism={spec.topology.devices}", *_worker_pools()]


def _spark(spec: LaunchSpec) -> list[str]:
    if spec.topology.devices > 1:
        raise UserError(
            f"--topology={spec.topology} means nothing with --runner={SPARK}: its cluster decides how many executors work; leave it out"
        )
    address = _address(spec, r"spark://[\w.-]+:\d+", "spark://HOST:7077")
    return [f"--spark_master_url={address}", *_worker_pools()]


def _worker_pools() -> list[str]:
    return ["--environment_type=EXTERNAL", f"--environment_config={WORKER_POOL}"]


def _address(spec: LaunchSpec, form: str, example: str) -> str:
    """Address of the master, or its placeholder."""
    address = spec.filled("cluster")
    if spec.cluster is not None and not re.fullmatch(form, address):
        raise UserError(f"--cluster={address} is no address of a master for {spec.runner}; write {example}")
    return address


def _lacking(runner: str) -> str:
    if not _installed("apache_beam"):
        return "Apache Beam is not installed; pip install 'curia-jax[beam]'"
    if runner == DATAFLOW and not (_installed("google.cloud.dataflow") and _installed("google.auth")):
        return "Beam's client for Dataflow is not installed; pip install 'apache-beam[gcp]'"
    if runner != DATAFLOW and shutil.which("java") is None:
        return f"{runner} starts Beam's job server, a Java program, and java is not on the PATH; install a Java runtime (11 or newer)"
    return ""


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


def _links(spec: LaunchSpec) -> dict[str, str]:
    if spec.runner == DATAFLOW:
        console, project = "https://console.cloud.google.com", spec.filled("project")
        query = f"resource.type%3D%22dataflow_step%22%20resource.labels.job_name%3D~%22%5E{spec.run}-%5B0-9%5D%2B%24%22"
        return {
            "jobs": f"{console}/dataflow/jobs?project={project}",
            "logs of workers": f"{console}/logs/query;query={query}?project={project}",
        }
    address = spec.filled("cluster")
    if spec.runner == FLINK:
        return {"jobs": address if "://" in address else f"http://{address}"}
    # Where Spark's master shows its applications, unless it was told another port.
    return {"jobs": f"http://{address.removeprefix('spark://').partition(':')[0]}:8080"}
