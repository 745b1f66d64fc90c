"""Runs on GKE: what is rendered, and a cluster that creates, fails, and deletes them."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from curia_common.errors import UserError
from launch import __main__ as command
from launch import gke, jobset
from launch import spec as specs
from launch.rendering import Rendering
from tests.launch import fake_cloud
from tests.launch.clouds import IMAGE, check_scripts, make_cloud, spec_of
from tests.launch.fake_cloud import Cloud

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "launch"
# Every chip, one and several TPU slices, one and several hosts, every way to pay.
RENDERED = {
    "v4_2x2x4": spec_of("gke", "v4:2x2x4"),
    "v5e_2x2": spec_of("gke", "v5e:2x2", "--config.data.shards=gs://data/ct", shards_cache_gib=64),
    "v5e_16x16_two_slices_spot": spec_of("gke", "v5e:16x16", slices=2, spot=True, queue="radiology"),
    "v5p_4x4x8_reserved": spec_of("gke", "v5p:4x4x8", reserved=True, reservation="ours", service_account="trainer"),
    "v6e_4x4_reserved": spec_of("gke", "v6e:4x4", reserved=True),
    "v7x_4x4x4": spec_of("gke", "v7x:4x4x4"),
}


def text_of(rendering: Rendering) -> str:
    """All that a rendering sends, in one text."""
    parts = [f"# ---- {name}\n{text}" for name, text in sorted(rendering.files.items())]
    return "\n".join([*parts, f"# ---- commands.sh\n{rendering.script}"])


@pytest.mark.parametrize("name", RENDERED)
def test_rendering_is_that_of_the_golden_file(name: str) -> None:
    """A change of what is sent shows in review; CURIA_WRITE_GOLDEN=1 writes it."""
    path, text = GOLDEN / f"gke_{name}.txt", text_of(gke.render(RENDERED[name]))
    if os.environ.get("CURIA_WRITE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize("name", RENDERED)
def test_manifest_is_yaml_of_the_jobset(name: str) -> None:
    spec = RENDERED[name]
    assert yaml.safe_load(gke.render(spec).files["jobset.yaml"]) == jobset.build(spec)


@pytest.mark.parametrize("name", RENDERED)
def test_scripts_pass_shellcheck(name: str, tmp_path: Path) -> None:
    rendering = gke.render(RENDERED[name])
    rendering.write(tmp_path / "out", RENDERED[name])
    scripts = sorted((tmp_path / "out").glob("*.sh"))
    assert [path.name for path in scripts] == ["commands.sh", "nodepools.sh"]
    check_scripts(*scripts)


@pytest.mark.parametrize("name", RENDERED)
def test_node_pool_commands_are_understood_and_run_once(name: str, tmp_path: Path, monkeypatch) -> None:
    cloud, spec = make_cloud(tmp_path, monkeypatch), RENDERED[name]
    gke.render(spec).write(tmp_path / "out", spec)
    subprocess.run([tmp_path / "out" / "nodepools.sh"], check=True)
    made = cloud.calls("gcloud container node-pools create")
    assert len(made) == spec.topology.slices
    options = fake_cloud.values_of(made[0])
    assert (options["num-nodes"], options["min-nodes"]) == ("0", "0")  # machines cost while they are there
    assert options["max-nodes"] == str(spec.topology.hosts_per_slice)
    assert options["machine-type"] == spec.topology.generation.machine_type  # pyright: ignore[reportOptionalMemberAccess]
    policies = cloud.calls("gcloud compute resource-policies create workload-policy")
    assert len(policies) == (spec.topology.kind == "v7x")
    # One host needs no topology; v7x has it from the policy.
    assert ("tpu-topology" in options) == (spec.topology.hosts_per_slice > 1 and not policies)
    assert ("placement-policy" in options) == bool(policies)


@pytest.mark.parametrize(
    ("topology", "options", "message"),
    [
        ("gpu:4x8", {}, "has no TPUs, which --target=gke is for; take --target=slurm"),
        ("v5e:2x2", {"slices": 2}, "GKE joins TPU slices of several hosts alone"),
        ("v5e:4x4", {"grace_seconds": 1}, "jobset.yaml is invalid: --grace is 1 s"),
        ("v5e:4x4", {"shards_cache_gib": 9}, "--shards-cache=9 is for shards in a bucket"),
    ],
)
def test_spec_that_gke_does_not_serve_is_refused(topology: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gke.render(spec_of("gke", topology, **options))


def test_work_directory_of_one_pod_is_refused() -> None:
    with pytest.raises(UserError, match="--workdir=runs/first is a folder of one pod"):
        gke.render(spec_of("gke", "v5e:4x4", "--workdir=runs/first"))


def test_output_of_a_command_in_a_pod_is_refused() -> None:
    words = ["evaluate", "--suite=curiabench", "--data=a", "--output=b"]
    with pytest.raises(UserError, match="evaluate writes to a folder of the pod, which is gone when that ends"):
        gke.render(specs.make(target="gke", topology="v5e:2x2", command=words))


def test_location_of_the_cluster_is_given_or_the_region_of_the_zone() -> None:
    assert gke.location_of(spec_of("gke", "v5e:4x4", cluster="curia")) == ("us-east5", "curia")
    assert gke.location_of(spec_of("gke", "v5e:4x4", cluster="us-east5-b/curia")) == ("us-east5-b", "curia")


def test_other_launchers_restart_at_75_and_not_at_final_codes() -> None:
    """Each is one line with flags that it has; xpk's own default would end a run at 75."""
    text = gke.render(RENDERED["v5e_16x16_two_slices_spot"]).files["other_launchers.txt"]
    xpk, toolkit = map(shlex.split, text.splitlines())
    for words, name in ((xpk, "xpk workload create"), (toolkit, "gcluster job submit")):
        given = fake_cloud.values_of(words)
        assert set(given) <= {flag.lstrip("-") for flag in fake_cloud.FLAGS[name]}
        codes = {int(code) for code in given["restart-on-exit-codes"].split(",")}
        assert {1, 75} <= codes and not {0, 2, 64, 65, 66} & codes
        assert given["num-slices"] == "2" and "JAX_PLATFORMS=tpu,cpu" in shlex.split(given["command"])
    assert fake_cloud.values_of(xpk)["tpu-type"] == "v5litepod-256"


# ---- the command, with a cluster


WORDS = [
    "--target=gke",
    "--topology=v5e:4x4",
    "--run=first",
    f"--image={IMAGE}",
    "--project=p",
    "--zone=us-east5-b",
    "--cluster=curia",
]
TRAIN = ["--", "pretrain", "--config=demo", "--workdir=gs://bucket/first"]


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    return make_cloud(tmp_path, monkeypatch)


def launch(*words: str) -> int:
    return command.main([*WORDS, "--yes", "--allow-dirty", *words, *TRAIN])


def test_dry_run_needs_no_cloud_and_marks_what_is_missing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    words = ["--target=gke", "--topology=v5e-256", "--slices=2", "--spot", "--dry-run", f"--output={tmp_path / 'out'}"]
    assert command.main([*words, *TRAIN]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["commands.sh", "jobset.yaml", "nodepools.sh", "other_launchers.txt", "spec.json"]
    assert "placeholders, which a submission needs: --image, --project, --zone, --cluster" in capsys.readouterr().err


def test_submission_with_placeholders_is_refused(cloud: Cloud, capsys) -> None:
    assert command.main(["--target=gke", "--topology=v5e-256", "--yes", "--allow-dirty", *TRAIN]) == 2
    assert "needed to submit: --image=…, --project=…, --zone=…, --cluster=…" in capsys.readouterr().err
    assert cloud.calls() == []


def test_run_is_submitted_shown_and_stopped(cloud: Cloud, capsys) -> None:
    assert launch() == 0
    said = capsys.readouterr().err
    assert "logs: https://console.cloud.google.com/logs/query" in said and "cluster: https://" in said
    [create] = cloud.calls("kubectl create")
    assert "--context=gke_p_us-east5_curia" in create  # whatever the current context is
    assert yaml.safe_load(cloud.state()["jobset"]["manifest"])["metadata"]["name"] == "first"

    cloud.set(pods=["Running"] * 3 + ["Pending"])
    assert command.main(["status", "first"]) == 0
    assert "pods: 1 pending, 3 running of 4" in capsys.readouterr().out
    assert command.main(["logs", "first"]) == 0
    assert command.main(["stop", "first"]) == 0
    assert "first has ended; its work directory and its node pools are as they were" in capsys.readouterr().out
    assert cloud.state()["jobset"] is None
    assert command.main(["stop", "first"]) == 0
    assert "nothing to stop" in capsys.readouterr().out


def test_second_run_of_the_name_does_not_replace_the_first(cloud: Cloud, capsys) -> None:
    assert launch() == 0
    assert launch() == 2
    assert "the cluster has a JobSet first already" in capsys.readouterr().err


def test_status_of_a_failed_run_has_reason_and_restarts(cloud: Cloud, capsys) -> None:
    assert launch() == 0
    failed = {"type": "Failed", "status": "True", "message": "applying FailJobSet failure policy action"}
    cloud.set(jobset={"status": {"conditions": [failed], "restarts": 7, "restartsCountTowardsMax": 3}})
    assert command.main(["status", "first"]) == 0
    said = capsys.readouterr().out
    assert "first: failed" in said and "reason: applying FailJobSet" in said
    assert "restarts: 3 of 50, and 4 after preemptions" in said


def test_status_says_when_pods_wait_for_nodes(cloud: Cloud, capsys) -> None:
    assert launch() == 0
    cloud.set(pods=["Pending"] * 4)
    assert command.main(["status", "first"]) == 0
    assert "they wait for nodes; if there are no node pools: " in capsys.readouterr().out


def test_restart_submits_the_same_run_again(cloud: Cloud) -> None:
    assert launch() == 0
    before = cloud.state()["jobset"]["manifest"]
    assert command.main(["restart", "first"]) == 0
    assert cloud.state()["jobset"]["manifest"] == before
    assert len(cloud.calls("kubectl create")) == 2 and len(cloud.calls("kubectl delete jobset first")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [(fake_cloud.LOGGED_OUT, "log in: gcloud auth login"), (fake_cloud.PERMISSION, "ask the owner of the project")],
)
def test_refusal_of_the_cloud_is_one_line(cloud: Cloud, capsys, text: str, message: str) -> None:
    cloud.fail("gcloud container clusters get-credentials", text)
    assert launch() == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert cloud.state()["jobset"] is None
