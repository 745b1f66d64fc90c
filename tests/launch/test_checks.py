"""The config of a launch against its machines and its work directory: one line before anything is created."""

import json
from pathlib import Path

import pytest

from curia_common.errors import UserError
from launch import __main__ as command
from launch import checks, spec
from tests.launch.test_spec import made

TINY = "pretrain --config=tests/configs/tiny.py --workdir={run}"
MANY = " --config.devices.multihost=True --config.devices.cpu_count=0"


@pytest.fixture(autouse=True)
def fields(monkeypatch: pytest.MonkeyPatch, no_fields: None) -> None:
    monkeypatch.setitem(spec.COMMANDS, "pretrain", spec.Command("curia_jax.pretrain", many_hosts=True, has_fields=True))


def check(words: str, topology: str, platform: str, **changes) -> None:
    checks.check(made(words.format(run="runs/none"), target="local", topology=topology, **changes), platform)


def test_config_that_fits_its_machines_passes() -> None:
    check("pretrain --config=pretrain_vit_b16_224 --workdir=a", "v5e-256", "tpu")
    check("pretrain --config=pretrain_vit_b16_224 --config.mesh.replica=2 --workdir=a", "v5e-256", "tpu", slices=2)
    check(TINY + MANY, "cpu:2x2", "cpu")


@pytest.mark.parametrize(
    ("words", "topology", "platform", "slices", "message"),
    [
        (TINY, "cpu:2x2", "cpu", 1, r"devices.multihost is False, but cpu:2x2 has 2 hosts; add --config.devices.multihost=True"),
        (TINY + MANY, "v5e:2x4", "tpu", 1, r"devices.platform is 'cpu', but local runs on tpu; add --config.devices.platform=auto"),
        (TINY, "cpu:1x2", "cpu", 1, r"devices.cpu_count is 4, but cpu:1x2 has 2 devices per host; add --config.devices.cpu_count=0"),
        (TINY + MANY, "cpu:4x2", "cpu", 1, r"mesh 1 x 2 x 2 .* does not make the 8 devices of cpu:4x2; add .*--config.mesh.fsdp=2"),
        (TINY + MANY, "v5e:2x4", "cpu", 2, r"mesh.replica is 1, but there are 2 TPU slices; add --config.mesh.replica=2"),
        (TINY + MANY + " --config.batch_size=10", "cpu:2x2", "cpu", 1, r"batch_size 10 is not a multiple of the 4 .* --config.batch_size=8"),
        (TINY + " --config.batchsize=1", "cpu:1x4", "cpu", 1, r"pretrain refuses its options: .*batchsize"),
    ],
)  # fmt: skip
def test_config_that_does_not_fit_is_refused_with_a_remedy(
    words: str, topology: str, platform: str, slices: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(words, topology, platform, slices=slices)


def test_work_directory_of_another_config_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = tmp_path / "run"
    run.mkdir()
    words = TINY.format(run=run) + MANY
    fields = checks.fields_of(made(words))
    sections: dict = {}
    for name, value in fields.items():
        *parents, last = name.split(".")
        section = sections
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    (run / "config.json").write_text(json.dumps(sections))
    options = ["--target=local", "--topology=cpu:2x2", "--dry-run"]
    assert command.main([*options, "--", *words.split(), "--config.mesh.fsdp=4", "--config.mesh.data=1"]) == 0
    assert command.main([*options, "--", *words.split(), "--config.seed=5", "--config.model.depth=3"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"{run} is the work directory of another config (model.depth 2 -> 3, seed 0 -> 5); choose another --workdir"
        in line
    )
    assert command.main([*options, "--allow-changes", "--", *words.split(), "--config.seed=5"]) == 0
