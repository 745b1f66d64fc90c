"""Runs on TPU VMs of the Cloud TPU API, v4 to v6e, by queued resources.

Every TPU VM runs launch/worker.sh at each boot, which starts the container, and starts it again after a failure. What it cannot do is to
replace machines that were preempted. A supervisor does: it looks at the queued resource and at the records in the work
directory, takes one step, and keeps no state. It may be killed at any time, and started again with the same command.

Two sets of workers never run at once: a request can be made under the name of the run only when the old one is gone, and its VMs with it.
"""

import json
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from curia_common import cli, launching, signals, tpu_environment
from curia_common.errors import UserError
from curia_common.exit_codes import FINAL, ExitCode
from launch import buckets, records, tools
from launch.rendering import Rendering, bash_array
from launch.spec import ALIKE, FAST_SECONDS, LaunchSpec

STARTUP, SHUTDOWN = "startup.sh", "shutdown.sh"
CACHE = "/dev/shm/curia-shards"  # memory
BODY = Path(__file__).with_name("worker.sh")
POLL_SECONDS = 30.0
FAILURES_IN_A_ROW = 5
LINGER_SECONDS = 600
# States of a queued resource: cloud.google.com/tpu/docs/queued-resources. One that is not listed is waited for.
LOST = ("SUSPENDED", "FAILED")  # never comes back by itself
GOING = ("SUSPENDING", "DELETING")
HEALTHY = (
    "READY",
    "CREATING",
    "STARTING",
    "REPAIRING",
    "RESTARTING",
    "REIMAGING",
)  # states of a TPU VM that may work again

Action = Literal["create", "wait", "delete", "finish"]
Pause = Callable[[float], object]


class Seen(NamedTuple):
    """The state of the run as the supervisor reads it.

    Attributes:
      state: of the queued resource; None where there is none.
      problem: what the cloud says about a failed one.
      lost_nodes: TPU VMs that will not work again, although the state is ACTIVE.
      outcomes: number of a worker -> its exit code, and why it gave up.
      generation: number of starts of all workers there were.
    """

    state: str | None
    problem: str = ""
    lost_nodes: tuple[str, ...] = ()
    outcomes: Mapping[int, tuple[int, str]] = {}
    generation: int = 0


class End(NamedTuple):
    """How a run ended."""

    code: int
    why: str


def render(spec: LaunchSpec) -> Rendering:
    """The scripts of the TPU VMs, and the command that asks for them.

    Raises:
      UserError: the Cloud TPU API does not serve the spec.
    """
    spec.refuse_unused(
        "image", "project", "zone", "service_account", "shards_cache_gib", "environment", "spot", "reserved"
    )
    there = spec.topology
    if there.generation is None:
        raise UserError(f"{there} has no TPUs, which queued resources are; take --target=slurm for GPUs, or local")
    if there.generation.runtime is None:
        raise UserError(f"the Cloud TPU API does not serve {there.kind}; --target=gke does")
    if spec.workdir is None or not spec.workdir.startswith(buckets.SCHEME):
        raise UserError(
            f"--workdir is {spec.workdir or 'missing'}; workers and supervisor meet in a bucket there: write gs://BUCKET/FOLDER"
        )
    notes = buckets.check(spec)
    return Rendering(
        files={STARTUP: _startup(spec), SHUTDOWN: _shutdown(spec)},
        commands=(create_command(spec, generation=0),),
        links=_links(spec),
        notes=notes,
    )


def submit(spec: LaunchSpec, rendering: Rendering) -> int:
    """Supervises the run until it has ended; takes over a queued resource that already exists."""
    folder = records.folder_of(spec.run)
    rendering.write(folder, spec)
    seen = look(spec)
    end = _end_of(seen.outcomes, spec)
    if end is not None and seen.state is None:
        raise UserError(
            f"{spec.run} has ended already ({end.why}); start it again with: python -m launch restart {spec.run}"
        )
    tools.logger.info(f"supervising {spec.run}; this command may be stopped and rerun; the run continues")
    with signals.receiving() as received:
        received.on_stop = lambda: cli.leave(
            ExitCode.RESTART,
            f"no longer supervised, but still running: {spec.run}; rerun the same command to supervise it",
        )
        end = supervise(spec, folder)
    tools.logger.info(f"{spec.run} ended: {end.why}")
    return end.code


def supervise(spec: LaunchSpec, folder: Path, pause: Pause = time.sleep) -> End:
    """Takes steps until the run has ended and its machines are gone.

    Args:
      folder: of the rendered files.
      pause: waits so many seconds.

    Raises:
      UserError: the cloud refuses: no permission, no quota, or requests that fail again and again.
    """
    failed, before = 0, ""
    while True:
        seen = look(spec)
        action = decide(seen, spec)
        if seen.state != before:
            nodes = f"; lost: {', '.join(seen.lost_nodes)}" if seen.lost_nodes else ""
            tools.logger.info(f"{spec.run}: {seen.state or 'no queued resource'}{nodes}")
        if seen.state == "ACTIVE":
            failed = 0
        elif seen.state == "FAILED" and before != "FAILED":
            failed += 1
            if failed == FAILURES_IN_A_ROW:
                raise UserError(
                    f"{spec.run}: {failed} requests in a row failed, the last one with: {seen.problem or 'no reason'}"
                )
        before = seen.state
        if action == "finish":
            end = _end_of(seen.outcomes, spec)
            assert end is not None
            return end
        if action == "create":
            try:
                tools.run(create_command(spec, generation=seen.generation), folder=folder)
            except tools.ToolError as error:
                if error.problem != "exists":  # of another supervisor: look again
                    raise
        elif action == "delete":
            _delete(spec)
        pause(POLL_SECONDS)


def decide(seen: Seen, spec: LaunchSpec) -> Action:
    """The next step."""
    ended = _end_of(seen.outcomes, spec) is not None
    if seen.state is None:
        return "finish" if ended else "create"
    if seen.state in GOING:
        return "wait"
    return "delete" if ended or seen.state in LOST or seen.lost_nodes else "wait"


def look(spec: LaunchSpec) -> Seen:
    """The present state. Outcomes are read after the state, so that a run that ends in between is not started again."""
    try:
        text = tools.run(_gcloud(spec, "queued-resources", "describe", spec.run, "--format=json"))
    except tools.ToolError as error:
        if error.problem != "absent":
            raise
        found = {}
    else:
        found = json.loads(text)
    state = found.get("state", {})
    nodes = _lost_nodes(spec) if state.get("state") == "ACTIVE" else ()
    outcomes = _outcomes(spec)
    problem = state.get("failedData", {}).get("error", {}).get("message", "")
    generation = 0 if found else int(_read(spec, "generation") or 0)
    return Seen(state.get("state", "CREATING") if found else None, problem, nodes, outcomes, generation)


def status(spec: LaunchSpec) -> str:
    """State of the queued resource, and the outcomes of the workers."""
    seen = look(spec)
    lines = [f"{spec.run}: {seen.state or 'no queued resource'}" + (f" ({seen.problem})" if seen.problem else "")]
    lines += [f"lost: {node}" for node in seen.lost_nodes]
    lines += [f"starts of all workers: {_read(spec, 'generation') or 0}"]
    if end := _end_of(seen.outcomes, spec):
        lines.append(f"ended: {end.why}")
        if seen.state is not None:
            lines.append(f"its machines still cost; end them with: python -m launch stop {spec.run}")
    return "\n".join(lines)


def logs(spec: LaunchSpec, *, follow: bool) -> int:
    """What the containers wrote, from Cloud Logging; every minute's where it follows."""
    shown = ""
    while True:
        query = f'logName:"gcplogs-docker-driver" jsonPayload.container.name="/{spec.run}"'
        if shown:
            query += f' timestamp>"{shown}"'
        text = tools.run(
            (
                "gcloud",
                "logging",
                "read",
                query,
                f"--project={spec.project}",
                "--order=asc",
                "--freshness=30d",
                "--format=json",
            )
        )
        for entry in json.loads(text or "[]"):
            payload, shown = entry.get("jsonPayload", {}), entry.get("timestamp", shown)
            print(f"[{payload.get('instance', {}).get('name', '?')}] {payload.get('message', '')}", flush=True)
        if not follow or _end_of(_outcomes(spec), spec) is not None:
            return ExitCode.DONE
        time.sleep(60)


def stop(spec: LaunchSpec, pause: Pause = time.sleep) -> str:
    """Asks the workers to save and end, waits for that as long as a save may take, and deletes the machines."""
    seen = look(spec)
    outcomes, how = seen.outcomes, "has ended"
    if _end_of(outcomes, spec) is None:
        if seen.state == "ACTIVE":
            _write(spec, "stop", "stop")
            for _ in range(int((spec.grace_seconds + 240) // POLL_SECONDS) + 1):
                if 0 in (outcomes := _outcomes(spec)):
                    break
                pause(POLL_SECONDS)
        if 0 not in outcomes:  # which keeps a supervisor from asking for machines again
            _write(spec, "outcome-0", f"0 {int(ExitCode.RESTART)} stopped")
            how = "was stopped without a save; it resumes from its newest checkpoint"
    while (seen := look(spec)).state is not None:
        if seen.state not in GOING:
            _delete(spec)
        pause(POLL_SECONDS)
    return f"{spec.run} {how}; its machines are gone, its work directory is as it was"


def restart(spec: LaunchSpec) -> int:
    """Stops the run where it is alive, and launches it anew."""
    print(stop(spec))
    for name in ("stop", "outcome-*"):
        try:
            tools.run(("gcloud", "storage", "rm", f"{_records(spec)}/{name}"))
        except tools.ToolError as error:
            if error.problem != "absent":
                raise
    return submit(spec, render(spec))


def _end_of(outcomes: Mapping[int, tuple[int, str]], spec: LaunchSpec) -> End | None:
    """How the run ended; None while it is running."""
    for number, (code, why) in sorted(outcomes.items()):
        if code != ExitCode.DONE:
            return End(code, f"worker {number} ended with exit code {code}" + (f": {why}" if why else ""))
    return End(ExitCode.DONE, "done") if len(outcomes) == spec.topology.hosts else None


# ---- records in the work directory


def _records(spec: LaunchSpec) -> str:
    return f"{(spec.workdir or '').rstrip('/')}/{launching.RECORDS}"


def _read(spec: LaunchSpec, name: str) -> str | None:
    try:
        return tools.run(("gcloud", "storage", "cat", f"{_records(spec)}/{name}")).strip()
    except tools.ToolError as error:
        if error.problem == "absent":
            return None
        raise


def _write(spec: LaunchSpec, name: str, text: str) -> None:
    folder = records.folder_of(spec.run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    tools.run(("gcloud", "storage", "cp", name, f"{_records(spec)}/{name}"), folder=folder)


def _outcomes(spec: LaunchSpec) -> dict[int, tuple[int, str]]:
    """Number of a worker -> its exit code, and why it gave up."""
    found: dict[int, tuple[int, str]] = {}
    for line in (_read(spec, "outcome-*") or "").splitlines():
        number, code, *why = line.split(" ", 2)
        found[int(number)] = int(code), " ".join(why)
    return found


# ---- the cloud


def _gcloud(spec: LaunchSpec, *words: str) -> tuple[str, ...]:
    return ("gcloud", "compute", "tpus", *words, f"--project={spec.filled('project')}", f"--zone={spec.filled('zone')}")


def create_command(spec: LaunchSpec, *, generation: int) -> tuple[str, ...]:
    """Asks for the TPU VMs.

    Args:
      generation: starts of all workers there were before; see worker.sh.
    """
    there = spec.topology
    assert there.generation is not None and there.generation.runtime is not None
    nodes = (
        (f"--node-id={spec.run}",)
        if there.slices == 1
        else (f"--node-prefix={spec.run}", f"--node-count={there.slices}")
    )
    paid = {"spot": ("--spot",), "reserved": ("--reserved",), "on-demand": ()}[spec.capacity]
    account = (f"--service-account={spec.service_account}",) if spec.service_account else ()
    return _gcloud(
        spec, "queued-resources", "create", spec.run, *nodes, f"--accelerator-type={there.api_type}",
        f"--runtime-version={there.generation.runtime}", *paid, *account, "--scopes=cloud-platform", f"--labels=curia-run={spec.run}",
        f"--metadata=curia-generation={generation}",
        f"--metadata-from-file=startup-script={STARTUP},shutdown-script={SHUTDOWN}", "--quiet",
    )  # fmt: skip


def _delete(spec: LaunchSpec) -> None:
    try:
        tools.run(_gcloud(spec, "queued-resources", "delete", spec.run, "--force", "--async", "--quiet"))
    except tools.ToolError as error:
        if error.problem != "absent":
            raise


def _lost_nodes(spec: LaunchSpec) -> tuple[str, ...]:
    """TPU VMs of the run that are gone or broken for good, with their states."""
    text = tools.run(_gcloud(spec, "tpu-vm", "list", f"--filter=labels.curia-run={spec.run}", "--format=json"))
    nodes = {node["name"].rpartition("/")[2]: node.get("state", "") for node in json.loads(text or "[]")}
    lost = [f"{name} ({state})" for name, state in sorted(nodes.items()) if state not in HEALTHY]
    missing = spec.topology.slices - len(nodes)
    return (*lost, *([f"{missing} of {spec.topology.slices} TPU slices"] if missing > 0 else []))


def _links(spec: LaunchSpec) -> dict[str, str]:
    project = spec.filled("project")
    console = "https://console.cloud.google.com"
    query = f"jsonPayload.container.name%3D%22%2F{spec.run}%22"
    return {
        "logs": f"{console}/logs/query;query={query}?project={project}",
        "machines": f"{console}/compute/tpus/details/{spec.filled('zone')}/{spec.run}?project={project}",
    }


# ---- scripts of the TPU VMs


def _startup(spec: LaunchSpec) -> str:
    """worker.sh with the header that it needs."""
    there, shards = spec.topology, buckets.shards_of(spec)
    contract = spec.contract(
        "-"
    )  # the attempt is each start's own; JAX asks the metadata server of a TPU VM for the coordinator
    variables = {**tpu_environment.of(there.slices), **contract.environment(), **dict(spec.environment)}
    del variables[f"{launching.PREFIX}ATTEMPT"]
    options = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
    if shards:
        options += ["--volume", f"{shards.path}:{shards.path}:ro"]
    values = {
        "RUN": spec.run,
        "PROJECT": spec.filled("project"),
        "ZONE": spec.filled("zone"),
        "IMAGE": spec.filled("image"),
        "REGISTRY": spec.filled("image").partition("/")[0],
        "RECORDS": _records(spec),
        "HOSTS_PER_SLICE": str(there.hosts_per_slice),
        "GRACE": str(spec.grace_seconds),
        "MAX_RESTARTS": str(spec.max_restarts),
        "FINAL": " ".join(str(int(code)) for code in (ExitCode.DONE, *FINAL)),
        "ALIKE": str(ALIKE),
        "FAST": str(FAST_SECONDS),
        "PAUSE": "15",
        "LINGER": str(LINGER_SECONDS),
        "STATE": "/var/lib/curia",
        "DEVICES": "/dev",
        "TEMPORARY": "/tmp",
        "HUGE_PAGES": "/sys/kernel/mm/transparent_hugepage/enabled",
        "BUCKET": shards.bucket if shards else "",
        "MOUNT": shards.path if shards else "",
        "CACHE": CACHE,
        "MOUNT_CONFIG": _mount_config(shards) if shards else "",
    }
    header = "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
    header += bash_array("DOCKER_OPTIONS", options) + bash_array("COMMAND", ("python", *buckets.argv_of(spec)))
    return f"#!/bin/bash\n{header}\n{BODY.read_text(encoding='utf-8')}"


def _mount_config(shards: buckets.Mount) -> str:
    """The options of the mount as a config file of gcsfuse."""
    content: dict[str, Any] = {"cache-dir": CACHE} if shards.cache_gib else {}
    for name, value in shards.options().items():
        section, _, option = name.rpartition(":")
        inner = content.setdefault(section, {}) if section else content
        inner[option] = value if option == "only-dir" else yaml.safe_load(value)
    return yaml.safe_dump(content, sort_keys=False)


def _shutdown(spec: LaunchSpec) -> str:
    """Shutdown script of a VM: runs after a preemption notice, before the processes are killed."""
    return f"#!/bin/sh\n# The machine goes away: SIGTERM to the run, which saves and ends.\nexec docker stop --time {spec.grace_seconds} {spec.run}\n"
