"""Preflight: what is not as launched, or not the same on all hosts, ends a run before anything is compiled."""

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import pytest

from curia_common.errors import DoesNotFitError
from curia_common.launching import Contract
from curia_jax import preflight, run, settings
from data_pipeline.format.shards import SliceSource
from tests import two_hosts

HERE = Contract("b16", "3", "cpu", processes=1, devices=8)


def test_devices_as_launched_pass() -> None:
    preflight.check_devices(HERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platform": "tpu"}, "JAX runs on cpu, but attempt 3 of run b16 is for tpu: it found no such device, or another process"),
        ({"processes": 4}, "JAX found 1 processes, but attempt 3 of run b16 has 4; launch with the topology of the machines"),
        ({"devices": 16}, "JAX found 8 devices, but attempt 3 of run b16 has 16"),
    ],
)  # fmt: skip
def test_devices_other_than_launched_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(DoesNotFitError, match=message):
        preflight.check_devices(dataclasses.replace(HERE, **changes))


def test_run_checks_its_contract_before_it_uses_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = settings.Devices("auto", 0, False, "")
    for name, value in dataclasses.replace(HERE, platform="tpu").environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DoesNotFitError, match="JAX runs on cpu"):
        run.use_devices(devices)
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "elsewhere")
    with pytest.raises(DoesNotFitError, match="MEGASCALE_COORDINATOR_ADDRESS is set"):
        run.use_devices(devices)


def test_probe_leaves_nothing_in_the_work_directory(tmp_path: Path) -> None:
    with preflight.probing(str(tmp_path)):
        preflight.check_shared(str(tmp_path))
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_work_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = "host 0 of 1 cannot write, read and delete files in .*file: Not a directory; give every host access"
    with pytest.raises(DoesNotFitError, match=message), preflight.probing(f"{tmp_path}/file"):
        pass


def test_shard_that_cannot_be_read_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_shards, tmp_path / "shards")
    source = SliceSource(tmp_path / "shards", "train")
    preflight.check_dataset(source)
    for shard in (tmp_path / "shards").glob("*.array_record*"):
        shard.unlink()
    with pytest.raises(
        DoesNotFitError, match="host 0 of 1 cannot read .*array_record.*: No such file or directory; mount"
    ):
        preflight.check_dataset(source)


def test_build_names_what_computes_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = preflight.build()
    assert f"jax {jax.__version__}" in facts["packages"] and re.fullmatch("[0-9a-f]{12}", facts["code"])
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    assert preflight.build() == {**facts, "compiler flags": "--xla_a=1"}


def test_host_with_another_work_directory_is_refused_with_66(tmp_path: Path) -> None:
    ends = two_hosts.run(tmp_path, "elsewhere")
    assert [end.code for end in ends] == [66, 66]
    assert "host 1 of 2 does not see what host 0 wrote in " in ends[1].err
