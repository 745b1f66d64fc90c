"""JobSet manifests for TPU slices on GKE, and their validation.

One Job for each TPU slice, one pod for each host. A pod that fails ends its Job, and a Job that fails is decided by the failure policy of
the JobSet, in this order (kubernetes-sigs/jobset, KEP-262; rules with message patterns since v0.10):

  a final exit code        fails the JobSet: a restart would fail in the same way
  an evicted pod            preemption, maintenance: restarts all pods, as often as it happens
  anything else            restarts all pods, up to max_restarts times

The first two reach the JobSet with the same reason, PodFailurePolicy, and differ only in the message that Kubernetes writes.
Only what JobSet offers without a feature gate is used.
"""

import re
from collections.abc import Iterator
from typing import Any

from curia_common import launching, tpu_environment
from curia_common.exit_codes import FINAL
from curia_common.topologies import CHIPS_PER_HOST
from launch import buckets
from launch.spec import LaunchSpec

API = "jobset.x-k8s.io/v1alpha2"
JOB, CONTAINER = "slice", "worker"
NODE_POOL = "cloud.google.com/gke-nodepool"
ACCELERATOR, SHAPE = "cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"
SPOT, RESERVATION = "cloud.google.com/gke-spot", "cloud.google.com/reservation-name"
TPU = "google.com/tpu"
NAME_LABEL = "jobset.sigs.k8s.io/jobset-name"
ATTEMPT_LABELS = ("jobset.sigs.k8s.io/jobset-uid", "jobset.sigs.k8s.io/restart-attempt")
COORDINATOR_PORT = 8476
PORTS = {"coordinator": COORDINATOR_PORT, "tpu": 8471, "megascale": 8080, "metrics": 8431}
# What a save on SIGTERM takes: a step, until the hosts agree; then each writes its share of the state. That of L/16 is 4 GB, 0.25 GB for
# each of 16 hosts. Not measured on a pod; `python -m benchmarks.checkpoint --workdir=…` measures it on the storage of a run.
SHORTEST_GRACE_SECONDS = 15
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def build(spec: LaunchSpec) -> dict[str, Any]:
    """The JobSet of a run, as plain JSON."""
    there = spec.topology
    return {
        "apiVersion": API,
        "kind": "JobSet",
        "metadata": {
            "name": spec.run,
            "labels": {"app.kubernetes.io/name": "curia-jax"}
            | ({"kueue.x-k8s.io/queue-name": spec.queue} if spec.queue else {}),
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": NODE_POOL,  # one TPU slice is one node pool
                "curia-jax/source": spec.source,
                "curia-jax/command": spec.command_line,
            },
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All"},
            "failurePolicy": {
                "maxRestarts": spec.max_restarts,
                "restartStrategy": "BlockingRecreate",  # every pod of the old start is gone before the new one begins
                "rules": [
                    {
                        "name": "finalExitCode",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": [rf"exit code ({'|'.join(str(int(code)) for code in FINAL)})\b"],
                    },
                    {
                        "name": "disruption",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": ["condition DisruptionTarget"],
                    },
                ],
            },
            "replicatedJobs": [
                {"name": JOB, "replicas": there.slices, "template": {"spec": _job(spec)}},
            ],
        },
    }


def _job(spec: LaunchSpec) -> dict[str, Any]:
    hosts = spec.topology.hosts_per_slice
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": CONTAINER,
                        "operator": "In",
                        "values": [int(code) for code in FINAL],
                    },
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": {"annotations": _pod_annotations(spec)}, "spec": _pod(spec)},
    }


def _pod_annotations(spec: LaunchSpec) -> dict[str, str]:
    found = {"kubectl.kubernetes.io/default-container": CONTAINER}
    if buckets.shards_of(spec):
        # The sidecar that mounts the bucket; its cache is memory that counts as its own, so it has no limits.
        found |= {"gke-gcsfuse/volumes": "true"}
        found |= {f"gke-gcsfuse/{what}-limit": "0" for what in ("cpu", "memory", "ephemeral-storage")}
    return found


def _pod(spec: LaunchSpec) -> dict[str, Any]:
    there = spec.topology
    assert there.generation is not None  # gke.render has checked
    selector = {ACCELERATOR: there.generation.label, SHAPE: there.shape_text}
    tolerations = [{"key": TPU, "operator": "Exists", "effect": "NoSchedule"}]
    if spec.capacity == "spot":
        selector[SPOT] = "true"
        tolerations.append({"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    if spec.reservation:
        selector[RESERVATION] = spec.reservation
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    mounts: list[dict[str, Any]] = [
        {"name": "shared-memory", "mountPath": "/dev/shm"}
    ]  # batches of the reading processes
    if shards := buckets.shards_of(spec):
        volumes += _bucket_volumes(shards, host_network=uses_host_network(spec))
        mounts.append({"name": "shards", "mountPath": shards.path, "readOnly": True})
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": spec.grace_seconds,
        "nodeSelector": selector,
        "tolerations": tolerations,
        # The metadata server by its address: hundreds of pods that start together overload the DNS of a cluster.
        "hostAliases": [{"ip": "169.254.169.254", "hostnames": ["metadata", "metadata.google.internal"]}],
        "containers": [
            {
                "name": CONTAINER,
                "image": spec.filled("image"),
                # Python itself, without a shell in front that would keep SIGTERM for itself.
                "command": ["python", *buckets.argv_of(spec)],
                "env": list(_variables(spec)),
                "ports": [{"name": name, "containerPort": port} for name, port in PORTS.items()],
                "resources": {"limits": {TPU: str(CHIPS_PER_HOST)}},
                "securityContext": {"privileged": True},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if spec.service_account:
        pod["serviceAccountName"] = spec.service_account
    if uses_host_network(spec):
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return pod


def uses_host_network(spec: LaunchSpec) -> bool:
    """Several TPU slices talk over the data-centre network, which is faster without the pods' own. It costs Workload Identity:
    such pods have the rights of the nodes' service account."""
    return spec.topology.slices > 1


def coordinator_of(spec: LaunchSpec) -> str:
    """host:port of the first process, by the name that JobSet gives its pod: <run>-<job>-<index of job>-<index of pod>.<run>"""
    return f"{spec.run}-{JOB}-0-0.{spec.run}:{COORDINATOR_PORT}"


def _variables(spec: LaunchSpec) -> Iterator[dict[str, Any]]:
    """Environment of the container. $(NAME) is what Kubernetes replaces by a variable above."""
    parts = ("CURIA_JOBSET_ID", "CURIA_JOBSET_RESTART")
    for name, label in zip(parts, ATTEMPT_LABELS, strict=True):
        yield {"name": name, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}}
    contract = spec.contract(".".join(f"$({name})" for name in parts), coordinator_of(spec))
    values = {
        **tpu_environment.of(spec.topology.slices),
        **contract.environment(),
        **({"JAX_COORDINATOR_BIND_ADDRESS": f"0.0.0.0:{COORDINATOR_PORT}"} if uses_host_network(spec) else {}),
        **dict(spec.environment),
    }
    for name, value in values.items():
        yield {"name": name, "value": value}


def _bucket_volumes(shards: buckets.Mount, *, host_network: bool) -> list[dict[str, Any]]:
    def text(name: str, value: str) -> str:
        return name if value == "true" and ":" not in name else f"{name}{':' if ':' in name else '='}{value}"

    attributes = {"bucketName": shards.bucket, "mountOptions": ",".join(text(*one) for one in shards.options().items())}
    if host_network:
        attributes["hostNetworkPodKSA"] = "true"
    found: list[dict[str, Any]] = [
        {
            "name": "shards",
            "csi": {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": attributes},
        }
    ]
    if shards.cache_gib:  # the driver takes the volume of this name for its cache
        memory = {"medium": "Memory", "sizeLimit": f"{shards.cache_gib}Gi"}
        found.append({"name": "gke-gcsfuse-cache", "emptyDir": memory})
    return found


# ---- validation


class _Several(dict[str, Any]):
    """Schema of each element of a list."""


# The fields of JobSet that are used (api/jobset/v1alpha2/jobset_types.go and its webhook, v0.10): a type, a pattern, or the allowed values.
# What is below `template` is a Kubernetes Job; the tests validate it with Kubernetes' own schema.
_NAME = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
_SCHEMA: dict[str, Any] = {
    "apiVersion": (API,),
    "kind": ("JobSet",),
    "metadata": {"name": _NAME, "labels": dict, "annotations": dict},
    "spec": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "successPolicy": {"operator": ("All", "Any")},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": ("Recreate", "BlockingRecreate"),
            "rules": _Several(
                name=r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?",
                action=("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                onJobFailureReasons=list,
                onJobFailureMessagePatterns=list,
            ),
        },
        "replicatedJobs": _Several(name=_NAME, replicas=int, template={"spec": dict}),
    },
}


def problems(manifest: dict[str, Any], spec: LaunchSpec) -> list[str]:
    """Problems of a manifest for this spec; empty if it is valid."""
    found = list(_differences(manifest, _SCHEMA, ""))
    return found or list(_violations(manifest, spec))


def _differences(value: Any, schema: Any, where: str) -> Iterator[str]:
    """Differences between a value and the schema."""
    if isinstance(schema, _Several):
        if not isinstance(value, list):
            yield f"{where} is not a list"
        for index, one in enumerate(value if isinstance(value, list) else ()):
            yield from _differences(one, dict(schema), f"{where}[{index}]")
    elif isinstance(schema, dict):
        if not isinstance(value, dict):
            yield f"{where} is not a mapping"
            return
        yield from (f"{where}.{name} is not a field" for name in value if name not in schema)
        for name, inner in schema.items():
            if name in value:
                yield from _differences(value[name], inner, f"{where}.{name}".lstrip("."))
            else:
                yield f"{where}.{name} is missing".lstrip(".")
    elif isinstance(schema, tuple):
        if value not in schema:
            yield f"{where} is {value!r}; it has to be {' or '.join(map(str, schema))}"
    elif isinstance(schema, str):
        if not isinstance(value, str) or not re.fullmatch(schema, value):
            yield f"{where} is {value!r}; it has to match {schema}"
    elif not isinstance(value, schema) or (schema is int and isinstance(value, bool)):
        yield f"{where} is {value!r}; it has to be of type {schema.__name__}"


def _violations(manifest: dict[str, Any], spec: LaunchSpec) -> Iterator[str]:
    """Violations of rules that a schema cannot express."""
    there, [replicated] = spec.topology, manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    containers = {container["name"]: container for container in pod["containers"]}
    selector, tolerated = pod["nodeSelector"], {one["key"] for one in pod["tolerations"]}
    chips = replicated["replicas"] * job["parallelism"] * int(containers[CONTAINER]["resources"]["limits"][TPU])
    variables = {one["name"]: one.get("value", "") for one in containers[CONTAINER]["env"]}

    if chips != there.chips:
        yield f"its pods have {chips} chips, and {there} has {there.chips}"
    if job["parallelism"] != job["completions"]:
        yield f"{job['parallelism']} pods run at a time, and {job['completions']} have to complete"
    if int(variables[launching.COUNT]) != replicated["replicas"] * job["parallelism"]:
        yield f"{launching.COUNT} is {variables[launching.COUNT]}, which is not the number of pods"
    if variables["JAX_PLATFORMS"].split(",")[0] != "tpu":
        yield "JAX_PLATFORMS does not begin with tpu, so that a broken TPU would train on the CPU"
    host = variables[launching.ADDRESS].partition(":")[0]
    if host != f"{manifest['metadata']['name']}-{replicated['name']}-0-0.{manifest['metadata']['name']}":
        yield f"the coordinator {host} is not the first pod"
    last = f"{spec.run}-{replicated['name']}-{replicated['replicas'] - 1}-{job['completions'] - 1}-abcde"
    if not _LABEL.fullmatch(last):
        yield f"the name of its last pod, {last}, is no DNS label of up to 63 characters; give the run a shorter --run"
    codes: set[int] = set()
    for rule in job["podFailurePolicy"]["rules"]:
        named = rule.get("onExitCodes", {})
        codes |= set(named.get("values", ()))
        if named and named["containerName"] not in containers:
            yield f"podFailurePolicy names the container {named['containerName']}, which the pod does not have"
    if codes != {int(code) for code in FINAL}:
        yield f"podFailurePolicy knows the exit codes {sorted(codes)}, and final are {sorted(map(int, FINAL))}"
    if spec.grace_seconds < SHORTEST_GRACE_SECONDS:
        yield f"--grace is {spec.grace_seconds} s, and a save may take {SHORTEST_GRACE_SECONDS} s; raise it"
    if (SPOT in selector) != (SPOT in tolerated):
        yield "the selector of spot nodes and the toleration of their taint do not come together"
    if TPU not in tolerated:
        yield f"the taint {TPU} of TPU nodes is not tolerated"
    image = containers[CONTAINER]["image"]
    if spec.image is not None and "@sha256:" not in image:
        yield f"the image {image} has no digest"
    names = {volume["name"] for volume in pod["volumes"]}
    yield from (
        f"the volume {mount['name']} is mounted and not defined"
        for mount in containers[CONTAINER]["volumeMounts"]
        if mount["name"] not in names
    )
