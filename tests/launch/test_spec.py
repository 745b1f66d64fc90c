"""LaunchSpec: what is typed becomes a checked record, or one line that says what to type instead."""

import dataclasses

import pytest

from curia_common.errors import UserError
from launch import spec as specs

DIGEST = "europe-docker.pkg.dev/p/r/curia@sha256:" + "0a" * 32


def made(words: str = "pretrain --config=demo --workdir=runs/First_Run", **changes) -> specs.LaunchSpec:
    given = {"target": "gke", "topology": "v5e-256", "command": words.split(), "source": "abc"}
    return specs.make(**given | changes)


def test_spec_survives_json() -> None:
    spec = made(slices=2, spot=True, image=DIGEST, environment=["A=b=c"], project="p")
    assert specs.LaunchSpec.from_json(spec.to_json()) == spec
    assert (spec.capacity, spec.environment, spec.topology.hosts) == ("spot", (("A", "b=c"),), 128)


def test_spec_reads_the_options_of_its_command() -> None:
    spec = made("pretrain --config demo --workdir=a --config.data.shards=gs://b/s --config.data.shards=gs://b/t")
    assert (spec.option("--config"), spec.option("--config.data.shards"), spec.option("--json")) == (
        "demo",
        "gs://b/t",
        None,
    )
    assert spec.argv[:2] == ("-m", "curia_jax.pretrain")


def test_open_field_is_a_placeholder() -> None:
    assert made().filled("project") == "<project>" and made(project="p").filled("project") == "p"


@pytest.mark.parametrize(
    ("workdir", "name"),
    [("runs/First_Run", "first-run"), ("gs://bucket/runs/b16/", "b16"), ("/data/2026 b", "run-2026-b"), ("a" * 99, "a" * 40)],
)  # fmt: skip
def test_run_is_named_after_its_work_directory(workdir: str, name: str) -> None:
    assert made(command=["pretrain", f"--workdir={workdir}"]).run == name


def test_run_without_a_work_directory_is_named_after_its_output_or_command() -> None:
    assert made(command=["build", "--output=/mnt/CT_shards"], topology="cpu:1x1").run == "ct-shards"
    assert made(command=["evaluate"], topology="cpu:1x1").run == "evaluate"


@pytest.mark.parametrize("words", ["--task=ich --cache=/tmp/cache", "--task=shards/lesion", "--task=shards/a+b"])
def test_finetune_into_a_bucket_is_taken_with_a_cache_or_shards(words: str) -> None:
    assert made(f"finetune {words} --workdir=gs://b/run").command == "finetune"


def test_contract_has_the_counts_of_all_slices() -> None:
    contract = made(topology="tpu7x-128", slices=2).contract("3", "host:1")
    assert dataclasses.astuple(contract) == ("first-run", "3", "tpu", 32, 256, 2, "host:1")


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ("", {}, "no command to launch; put it after --"),
        ("train --workdir=a", {}, "no command 'train' to launch; there are: pretrain"),
        ("pretrain --config=demo", {}, "pretrain has no --workdir"),
        ("evaluate --checkpoint=a", {}, r"evaluate runs on one host, and v5e:16x16 has 64; .* --topology=v5e:2x2"),
        ("build --output=a", {"topology": "cpu:4x2"}, "--topology=cpu:1x2, or --target=beam --runner=… for many"),
        ("evaluate", {"topology": None}, "--topology is missing"),
        ("pretrain --workdir=a", {"topology": "v5e-250"}, "there is no TPU slice v5e-250; the nearest are v5e-256"),
        ("pretrain --workdir=a", {"topology": "v5e:16x15"}, "there is no TPU slice v5e:16x15"),
        ("finetune --task=ich --workdir=gs://b/run", {}, "finetune --task=ich decodes images .* such as --cache=/tmp/cache"),
        ("pretrain --workdir=s3://b/run", {}, "--workdir=s3://b/run: .* conditional writes, which are tested in gs:// alone; write gs://"),
        ("pretrain --workdir=a", {"spot": True, "reserved": True}, "--spot and --reserved exclude each other"),
        ("pretrain --workdir=a", {"reservation": "r"}, "add --reserved"),
        ("pretrain --workdir=a", {"image": "curia:latest"}, "--image=curia:latest has no digest"),
        ("pretrain --workdir=a", {"run": "First"}, "--run=First cannot name a run; take up to 40 lower-case"),
        ("pretrain --workdir=a", {"environment": ["A"]}, "--env=A is not NAME=value; write --env=NAME=value"),
        ("pretrain --workdir=a", {"max_restarts": -1}, "--max-restarts is -1"),
        ("pretrain --workdir=a", {"grace_seconds": 0}, "--grace is 0"),
    ],
)  # fmt: skip
def test_wrong_launch_is_refused_with_a_remedy(words: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(words, **changes)
