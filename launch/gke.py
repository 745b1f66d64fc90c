"""Runs on TPU slices of a Google Kubernetes Engine cluster, v4 to v7x: a JobSet (launch/jobset.py), and node pools for it.

The JobSet controller of the cluster starts the pods again; nothing of this project has to stay alive for that.

  jobset.yaml    the run
  nodepools.sh   makes the node pools where they are missing. Once for each topology; runs share them, and they shrink to nothing when idle
  other_launchers.txt   the same run as one command of xpk, and of Cluster Toolkit
"""

import json
import shlex
import signal
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any

import yaml

from curia_common import tpu_environment
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode
from launch import buckets, jobset, records, tools
from launch.rendering import Rendering
from launch.spec import LaunchSpec

MANIFEST, NODE_POOLS, OTHERS = "jobset.yaml", "nodepools.sh", "other_launchers.txt"
WORKLOAD_POLICY = ("v7x",)  # chips whose TPU slices are made by a placement policy instead of --tpu-topology


def render(spec: LaunchSpec) -> Rendering:
    """The JobSet, the node-pool commands, and what a submission runs.

    Raises:
      UserError: GKE does not serve the spec, or the manifest is invalid.
    """
    spec.refuse_unused(
        "image", "project", "zone", "cluster", "queue", "service_account", "shards_cache_gib", "environment", "spot", "reserved",
    )  # fmt: skip
    there = spec.topology
    if there.generation is None:
        raise UserError(f"{there} has no TPUs, which --target=gke is for; take --target=slurm for GPUs, or local")
    if there.slices > 1 and there.hosts_per_slice == 1:
        raise UserError(
            f"GKE joins TPU slices of several hosts alone, and those of {there} have one; take a larger topology"
        )
    if spec.workdir is not None and "://" not in spec.workdir:
        raise UserError(
            f"--workdir={spec.workdir} is a folder of one pod, which is gone when that ends; write gs://BUCKET/FOLDER"
        )
    if spec.workdir is None:
        raise UserError(
            f"{spec.command} writes to a folder of the pod, which is gone when that ends; run it where the folder stays: --target=slurm, or "
            f"local, or without launch: {spec.command_line}"
        )
    notes = buckets.check(spec)
    manifest = jobset.build(spec)
    if wrong := jobset.problems(manifest, spec):
        raise UserError(f"{MANIFEST} is invalid: {wrong[0]}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""))
    return Rendering(
        files={
            MANIFEST: yaml.safe_dump(manifest, sort_keys=False, width=1000),
            NODE_POOLS: _script(_node_pools(spec)),
            OTHERS: _other_launchers(spec),
        },
        commands=(_credentials(spec), _kubectl(spec, "create", f"--filename={MANIFEST}")),
        links=_links(spec),
        notes=notes,
    )


def submit(spec: LaunchSpec, rendering: Rendering) -> int:
    """Creates the JobSet; the cluster takes care of it from then on."""
    folder = records.folder_of(spec.run)
    rendering.write(folder, spec)
    for command in rendering.commands:
        try:
            tools.run(command, folder=folder)
        except tools.ToolError as error:
            if error.problem == "exists":
                raise UserError(
                    f"the cluster has a JobSet {spec.run} already; see python -m launch status {spec.run}, or name this run with --run"
                ) from error
            raise
    pools = folder / NODE_POOLS
    tools.logger.info(f"submitted; where the cluster has no node pools of this topology yet: {shlex.quote(str(pools))}")
    return ExitCode.DONE


def status(spec: LaunchSpec) -> str:
    """State of the JobSet, its restarts, and its pods by phase."""
    found = _read(spec)
    if found is None:
        return f"{spec.run}: the cluster has no such JobSet; it was stopped, or never submitted"
    state = found.get("status", {})
    conditions = {one["type"]: one for one in state.get("conditions", ()) if one.get("status") == "True"}
    now = next((name for name in ("Completed", "Failed", "Suspended") if name in conditions), "Running")
    lines = [f"{spec.run}: {now.lower()}"]
    if "message" in conditions.get(now, {}):
        lines.append(f"reason: {conditions[now]['message']}")
    counted, every = state.get("restartsCountTowardsMax", 0), state.get("restarts", 0)
    lines.append(f"restarts: {counted} of {spec.max_restarts}, and {every - counted} after preemptions")
    pods = json.loads(
        tools.run(_kubectl(spec, "get", "pods", f"--selector={jobset.NAME_LABEL}={spec.run}", "--output=json"))
    )
    phases = [pod.get("status", {}).get("phase", "Unknown") for pod in pods["items"]]
    counts = ", ".join(f"{phases.count(phase)} {phase.lower()}" for phase in sorted(set(phases)))
    lines.append(f"pods: {counts or 'none'} of {spec.topology.hosts}")
    if now == "Running" and phases.count("Pending") == len(phases):
        lines.append(f"they wait for nodes; if there are no node pools: {records.folder_of(spec.run) / NODE_POOLS}")
    return "\n".join(lines)


def logs(spec: LaunchSpec, *, follow: bool) -> int:
    """The logs of the pods there are now; those of earlier starts are behind the link."""
    command = _kubectl(
        spec, "logs", f"--selector={jobset.NAME_LABEL}={spec.run}", f"--container={jobset.CONTAINER}", "--prefix", "--tail=-1",
        f"--max-log-requests={spec.topology.hosts}", "--ignore-errors", *(["--follow"] if follow else []),
    )  # fmt: skip
    tools.stream(command)
    print(f"earlier starts: {_links(spec)['logs']}", file=sys.stderr)
    return ExitCode.DONE


def stop(spec: LaunchSpec) -> str:
    """Deletes the JobSet: its pods get SIGTERM, save, and end; waits for that."""
    if _read(spec) is None:
        return f"{spec.run} is not in the cluster; nothing to stop"
    wait = spec.grace_seconds + 240
    tools.run(_kubectl(spec, "delete", "jobset", spec.run, "--cascade=foreground", "--wait", f"--timeout={wait}s"))
    return f"{spec.run} has ended; its work directory and its node pools are as they were"


def restart(spec: LaunchSpec) -> int:
    """Stops the run where it is alive, and submits it anew."""
    print(stop(spec))
    return submit(spec, render(spec))


def _read(spec: LaunchSpec) -> dict[str, Any] | None:
    """The JobSet as the cluster has it."""
    tools.run(_credentials(spec))
    try:
        return json.loads(tools.run(_kubectl(spec, "get", "jobset", spec.run, "--output=json")))
    except tools.ToolError as error:
        if error.problem == "absent":
            return None
        raise


# ---- commands


def location_of(spec: LaunchSpec) -> tuple[str, str]:
    """Location and name of the cluster: of "us-east5/curia", or of "curia", which is in the region of the zone."""
    location, _, name = spec.filled("cluster").rpartition("/")
    return location or spec.filled("zone").rpartition("-")[0] or spec.filled("zone"), name


def _credentials(spec: LaunchSpec) -> tuple[str, ...]:
    location, name = location_of(spec)
    return (
        "gcloud", "container", "clusters", "get-credentials", name, f"--location={location}", f"--project={spec.filled('project')}",
    )  # fmt: skip


def _kubectl(spec: LaunchSpec, *words: str) -> tuple[str, ...]:
    """A command for the cluster of the spec, whatever kubectl's current one is."""
    location, name = location_of(spec)
    return ("kubectl", *words, f"--context=gke_{spec.filled('project')}_{location}_{name}", "--namespace=default")


def node_pool_of(spec: LaunchSpec, index: int) -> str:
    """Name of a node pool, at most 40 characters: the same for all runs of a topology and capacity."""
    return f"{spec.topology.kind}-{spec.topology.shape_text}-{spec.capacity}-{index}"


def _node_pools(spec: LaunchSpec) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Pairs of commands for each node pool or cluster resource: one checks that it exists, one creates it."""
    there = spec.topology
    assert there.generation is not None
    location, cluster = location_of(spec)
    project, zone = f"--project={spec.filled('project')}", spec.filled("zone")
    multiple = there.hosts_per_slice > 1
    shaping: list[str] = [f"--tpu-topology={there.shape_text}"] if multiple else []
    if multiple and there.kind in WORKLOAD_POLICY:
        policy = f"{there.kind}-{there.shape_text}"
        region = f"--region={zone.rpartition('-')[0] or zone}"
        policies = ("gcloud", "compute", "resource-policies")
        yield (
            (*policies, "describe", policy, region, project),
            (
                *policies, "create", "workload-policy", policy, "--type=HIGH_THROUGHPUT", f"--accelerator-topology={there.shape_text}",
                region, project,
            ),
        )  # fmt: skip
        shaping = [f"--placement-policy={policy}"]
    paid: dict[str, list[str]] = {
        "spot": ["--spot"],
        "reserved": ["--reservation-affinity=specific", f"--reservation={spec.reservation}"]
        if spec.reservation
        else ["--reservation-affinity=any"],
        "on-demand": ["--reservation-affinity=none"],
    }
    where = [f"--cluster={cluster}", f"--location={location}", project]
    for index in range(there.slices):
        name, pools = node_pool_of(spec, index), ("gcloud", "container", "node-pools")
        yield (
            (*pools, "describe", name, *where),
            (
                *pools, "create", name, *where, f"--node-locations={zone}", f"--machine-type={there.generation.machine_type}",
                *shaping, *paid[spec.capacity], "--num-nodes=0", "--enable-autoscaling", "--min-nodes=0",
                f"--max-nodes={there.hosts_per_slice}", "--enable-gvnic", "--scopes=cloud-platform",
                # Pods that are started again find the image there.
                "--enable-image-streaming", "--disk-size=200",
                *([] if jobset.uses_host_network(spec) else ["--workload-metadata=GKE_METADATA"]),
            ),
        )  # fmt: skip


def _script(steps: Iterator[tuple[tuple[str, ...], tuple[str, ...]]]) -> str:
    lines = ["#!/bin/sh", "# Makes what is missing; may be run again.", "set -eu"]
    for ask, make in steps:
        lines.append(f"{shlex.join(ask)} >/dev/null 2>&1 ||\n  {shlex.join(make)}")
    return "\n".join(lines) + "\n"


def _other_launchers(spec: LaunchSpec) -> str:
    """The run as one command of other launchers, for clusters that they have made.

    Both restart at exit codes that they are told, and count preemptions as restarts. Flags: github.com/AI-Hypercomputer/xpk 1.16
    (src/xpk/parser/workload.py) and github.com/GoogleCloudPlatform/cluster-toolkit of June 2026 (cmd/job).
    """
    there, (location, cluster) = spec.topology, location_of(spec)
    variables = {**tpu_environment.of(there.slices), **dict(spec.environment)}
    command = shlex.join(
        ("env", *(f"{name}={value}" for name, value in variables.items()), "python", *buckets.argv_of(spec))
    )
    project, zone, image = spec.filled("project"), spec.filled("zone"), spec.filled("image")
    paid = {
        "spot": ["--spot"],
        "reserved": [f"--reservation={spec.reservation or '<reservation>'}"],
        "on-demand": ["--on-demand"],
    }
    xpk = (
        "xpk", "workload", "create", f"--cluster={cluster}", f"--project={project}", f"--zone={zone}", f"--workload={spec.run}",
        f"--tpu-type={there.api_type}", f"--num-slices={there.slices}", f"--docker-image={image}", f"--max-restarts={spec.max_restarts}",
        # Beside 42 and 127 to 255, at which it restarts anyway.
        f"--restart-on-exit-codes={int(ExitCode.FAULT)},{int(ExitCode.RESTART)}",
        f"--termination-grace-period-seconds={spec.grace_seconds}", *paid[spec.capacity], f"--command={command}",
    )  # fmt: skip
    codes = (
        ExitCode.FAULT,
        ExitCode.RESTART,
        *(128 + number for number in (signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)),
    )
    toolkit = (
        "gcluster", "job", "submit", f"--cluster={cluster}", f"--location={location}", f"--project={project}", f"--name={spec.run}",
        f"--compute-type={there.api_type}", f"--topology={there.shape_text}", f"--num-slices={there.slices}", f"--image={image}",
        f"--restarts={spec.max_restarts}", f"--restart-on-exit-codes={','.join(str(int(code)) for code in codes)}",
        f"--grace-period={spec.grace_seconds}s", *([f"--queue={spec.queue}"] if spec.queue else []), f"--command={command}",
    )  # fmt: skip
    mount = (
        f"# Mount the shards at {buckets.PATH} by its own means (xpk: --storage, gcluster: --mount).\n"
        if buckets.shards_of(spec)
        else ""
    )
    return f"{mount}{shlex.join(xpk)}\n{shlex.join(toolkit)}\n"


def _links(spec: LaunchSpec) -> dict[str, str]:
    query = f'resource.type="k8s_container" labels."k8s-pod/jobset_sigs_k8s_io/jobset-name"="{spec.run}"'
    project = urllib.parse.quote(spec.filled("project"), safe="<>")
    location, name = location_of(spec)
    console = "https://console.cloud.google.com"
    return {
        "logs": f"{console}/logs/query;query={urllib.parse.quote(query, safe='')}?project={project}",
        "cluster": f"{console}/kubernetes/clusters/details/{location}/{name}/details?project={project}",
    }
