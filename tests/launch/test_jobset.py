"""JobSet manifests: Kubernetes' own schema, what JobSet allows, and statements that no schema makes."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from curia_common.exit_codes import ExitCode
from launch import jobset
from tests.launch.clouds import IMAGE, spec_of

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install 'curia-jax[test]'")

# (topology, TPU slices) -> (Jobs, pods of each, chips, devices, accelerator). docs: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
SHAPES = {
    ("v4:2x2x4", 1): (1, 4, 16, 16, "tpu-v4-podslice"),
    ("v5e:16x16", 2): (2, 64, 512, 512, "tpu-v5-lite-podslice"),
    ("v5p:4x4x8", 1): (1, 32, 128, 128, "tpu-v5p-slice"),
    ("v6e:16x16", 1): (1, 64, 256, 256, "tpu-v6e-slice"),
    ("v7x:4x4x4", 2): (2, 16, 128, 256, "tpu7x"),
}
# Messages of the Job controller (kubernetes/kubernetes, pkg/controller/job/pod_failure_policy.go) and what has to follow.
MESSAGES = [
    ("Container worker for pod default/first-slice-0-3-x failed with exit code 2 matching FailJob rule at index 0", "FailJobSet"),
    ("Container worker for pod default/first-slice-0-3-x failed with exit code 66 matching FailJob rule at index 0", "FailJobSet"),
    ("Container worker for pod default/first-slice-0-3-x failed with exit code 255 matching FailJob rule at index 0", None),
    ("Pod default/first-slice-0-3-x has condition DisruptionTarget matching FailJob rule at index 1",
     "RestartJobSetAndIgnoreMaxRestarts"),
]  # fmt: skip


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return job_of(manifest)["template"]["spec"]


def job_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def variables_of(manifest: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in pod_of(manifest)["containers"][0]["env"]}


@pytest.mark.parametrize(("topology", "slices"), SHAPES)
def test_jobs_pods_chips_and_devices_are_those_of_the_topology(topology: str, slices: int) -> None:
    spec = spec_of("gke", topology, slices=slices)
    manifest = jobset.build(spec)
    jobs, pods, chips, devices, accelerator = SHAPES[topology, slices]
    assert (manifest["spec"]["replicatedJobs"][0]["replicas"], job_of(manifest)["parallelism"]) == (jobs, pods)
    assert jobs * pods * int(pod_of(manifest)["containers"][0]["resources"]["limits"]["google.com/tpu"]) == chips
    selector = pod_of(manifest)["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert selector["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]
    found = variables_of(manifest)
    assert (found["CURIA_LAUNCH_DEVICES"], found["JAX_NUM_PROCESSES"]) == (str(devices), str(jobs * pods))
    assert found["JAX_COORDINATOR_ADDRESS"] == "first-slice-0-0.first:8476"
    assert jobset.problems(manifest, spec) == []


@pytest.mark.parametrize("words", [(), ("--config.data.shards=gs://data/ct",)], ids=["local", "bucket"])
@pytest.mark.parametrize(("topology", "slices"), [("v5e:2x4", 1), ("v7x:4x4x4", 2)])
def test_embedded_job_is_valid_kubernetes(topology: str, slices: int, words: tuple[str, ...]) -> None:
    cache = 100 if words else 0
    spec = spec_of("gke", topology, *words, slices=slices, spot=True, shards_cache_gib=cache, service_account="trainer")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "first"}, "spec": job_of(jobset.build(spec))}
    kubernetes_validate.validate(job, "1.31", strict=True)
    # The schema does notice: a misspelt field, a number where Kubernetes wants text.
    for path, value in (("restartpolicy", "Never"), ("nodeSelector", {"a": 1})):
        wrong = copy.deepcopy(job)
        wrong["spec"]["template"]["spec"][path] = value
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, "1.31", strict=True)


@pytest.mark.parametrize(("message", "action"), MESSAGES)
def test_failure_policy_tells_user_errors_from_preemptions(message: str, action: str | None) -> None:
    rules = jobset.build(spec_of("gke", "v5e:16x16"))["spec"]["failurePolicy"]["rules"]
    matching = (r["action"] for r in rules if any(re.search(p, message) for p in r["onJobFailureMessagePatterns"]))
    assert next(matching, None) == action


def test_exit_codes_of_the_table_decide_what_ends_a_job() -> None:
    [codes, disruption] = job_of(jobset.build(spec_of("gke", "v5e:16x16")))["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"]["values"] == [2, 64, 65, 66]
    assert not {ExitCode.RESTART, ExitCode.FAULT, ExitCode.INTERRUPTED} & set(codes["onExitCodes"]["values"])
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_attempt_of_a_pod_differs_for_each_restart() -> None:
    found = pod_of(jobset.build(spec_of("gke", "v5e:16x16")))["containers"][0]["env"]
    names = [one["name"] for one in found]
    assert variables_of(jobset.build(spec_of("gke", "v5e:16x16")))["CURIA_LAUNCH_ATTEMPT"] == (
        "$(CURIA_JOBSET_ID).$(CURIA_JOBSET_RESTART)"
    )
    assert names.index("CURIA_JOBSET_RESTART") < names.index(
        "CURIA_LAUNCH_ATTEMPT"
    )  # else Kubernetes leaves $(…) as it is
    assert "jobset.sigs.k8s.io/restart-attempt" in found[1]["valueFrom"]["fieldRef"]["fieldPath"]


def test_spot_reserved_and_queue_reach_the_manifest() -> None:
    spot = pod_of(jobset.build(spec_of("gke", "v5e:16x16", spot=True)))
    assert spot["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in [one["key"] for one in spot["tolerations"]]
    manifest = jobset.build(spec_of("gke", "v5e:16x16", reserved=True, reservation="ours", queue="radiology"))
    assert pod_of(manifest)["nodeSelector"]["cloud.google.com/reservation-name"] == "ours"
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "radiology"


def test_several_slices_use_the_hosts_network_and_one_does_not() -> None:
    one, two = (pod_of(jobset.build(spec_of("gke", "v5e:16x16", slices=n))) for n in (1, 2))
    assert "hostNetwork" not in one
    assert two["hostNetwork"] and two["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert "JAX_COORDINATOR_BIND_ADDRESS" in [each["name"] for each in two["containers"][0]["env"]]


def test_shards_in_a_bucket_are_mounted_and_read_there() -> None:
    words = ("--config.data.shards=gs://data/shards/ct",)
    pod = pod_of(jobset.build(spec_of("gke", "v5e:16x16", *words, shards_cache_gib=100)))
    assert pod["containers"][0]["command"][-1] == "--config.data.shards=/mnt/curia-shards"
    [volume] = [one for one in pod["volumes"] if one["name"] == "shards"]
    attributes = volume["csi"]["volumeAttributes"]
    assert attributes["bucketName"] == "data" and volume["csi"]["readOnly"]
    options = attributes["mountOptions"].split(",")
    assert {"only-dir=shards/ct", "implicit-dirs", "file-cache:cache-file-for-range-read:true"} <= set(options)
    assert "file-cache:max-size-mb:102400" in options
    assert {"name": "gke-gcsfuse-cache", "emptyDir": {"medium": "Memory", "sizeLimit": "100Gi"}} in pod["volumes"]


# What a change of the code could break -> what is said about it.
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "restart_strategy": (lambda m: m["spec"]["failurePolicy"].update(restartStrategy="Blocking"), "restartStrategy is 'Blocking'"),
    "gated_action": (lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="RestartJob"), "action is 'RestartJob'; it has"),
    "rule_name": (lambda m: m["spec"]["failurePolicy"]["rules"][0].update(name="final-code"), "rules[0].name is 'final-code'"),
    "unknown_field": (lambda m: m["spec"].update(sucessPolicy={}), "spec.sucessPolicy is not a field"),
    "missing_field": (lambda m: m["spec"].pop("network"), "spec.network is missing"),
    "replicas_as_text": (lambda m: m["spec"]["replicatedJobs"][0].update(replicas="2"), "replicas is '2'; it has to be of type int"),
    "too_few_pods": (lambda m: job_of(m).update(parallelism=63), "its pods have 252 chips, and v5e:16x16 has 256"),
    "completions": (lambda m: job_of(m).update(completions=1), "64 pods run at a time, and 1 have to complete"),
    "exit_codes": (lambda m: job_of(m)["podFailurePolicy"]["rules"].pop(0), "knows the exit codes [], and final are [2, 64, 65, 66]"),
    "container": (
        lambda m: job_of(m)["podFailurePolicy"]["rules"][0]["onExitCodes"].update(containerName="main"),
        "names the container main",
    ),
    "spot_selector": (lambda m: pod_of(m)["nodeSelector"].pop("cloud.google.com/gke-spot"), "do not come together"),
    "tolerations": (lambda m: pod_of(m)["tolerations"].pop(0), "google.com/tpu of TPU nodes is not tolerated"),
    "digest": (lambda m: pod_of(m)["containers"][0].update(image="curia:latest"), "the image curia:latest has no digest"),
    "volume": (lambda m: pod_of(m)["volumes"].clear(), "the volume shared-memory is mounted and not defined"),
    "platform": (lambda m: pod_of(m)["containers"][0]["env"][2].update(value="cpu"), "JAX_PLATFORMS does not begin with tpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_manifest_is_named(name: str) -> None:
    spec = spec_of("gke", "v5e:16x16", spot=True)
    manifest = copy.deepcopy(jobset.build(spec))
    assert jobset.problems(manifest, spec) == []
    change, message = BROKEN[name]
    change(manifest)
    assert message in "\n".join(jobset.problems(manifest, spec))


def test_short_grace_and_long_name_are_refused() -> None:
    short = spec_of("gke", "v5e:16x16", grace_seconds=5)
    assert "--grace is 5 s" in jobset.problems(jobset.build(short), short)[0]
    assert IMAGE in str(jobset.build(short))
    # The longest name that a spec may have leaves room for what JobSet appends to that of the last pod.
    longest = spec_of("gke", "v5p:16x16x24", slices=1, run="r" * 40)
    assert jobset.problems(jobset.build(longest), longest) == []
