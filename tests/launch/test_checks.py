"""The config of a launch against its machines and its work directory: one line before anything is created."""

import dataclasses
import json
from pathlib import Path

import pytest

from curia_common.errors import UserError
from launch import __main__ as command
from launch import checks, spec
from tests.launch.test_spec import made

PARSE_WORDS = checks.parse_words
TINY = "pretrain --config=tests/configs/tiny.py --workdir={run}"


@pytest.fixture(autouse=True)
def fields(monkeypatch: pytest.MonkeyPatch, no_fields: None) -> None:
    monkeypatch.setitem(spec.COMMANDS, "pretrain", dataclasses.replace(spec.COMMANDS["pretrain"], has_fields=True))


def check(words: str, topology: str, platform: str, **changes) -> spec.LaunchSpec:
    return checks.check(made(words.format(run="runs/none"), target="local", topology=topology, **changes), platform)


def test_config_that_fits_its_machines_passes() -> None:
    check("pretrain --config=pretrain_vit_b16_224 --workdir=a", "v5e-256", "tpu")
    check("pretrain --config=pretrain_vit_b16_224 --config.mesh.replica=2 --workdir=a", "v5e-256", "tpu", slices=2)
    check(TINY, "cpu:1x4", "cpu")


def test_launch_sets_what_its_machines_decide(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    added = ("--config.devices.multihost=True", "--config.devices.cpu_count=0")
    assert check(TINY, "cpu:2x2", "cpu").words[-2:] == added
    assert f"added for cpu:2x2: {' '.join(added)}" in caplog.text
    assert check(TINY, "v5e:2x2", "tpu").words[-2:] == (
        "--config.devices.platform=auto",
        "--config.devices.cpu_count=0",
    )
    words = f"{TINY} {' '.join(added)}"
    assert check(words, "cpu:2x2", "cpu").words == made(words.format(run="runs/none")).words


def test_all_that_was_typed_for_other_machines_is_named_at_once() -> None:
    typed = " --config.devices.multihost=False --config.devices.cpu_count=4"
    with pytest.raises(
        UserError,
        match=r"multihost=False, devices.cpu_count=4, but cpu:2x2 has 2 hosts of 2 devices \(cpu\); leave --config.devices.multihost and --config.devices.cpu_count out",
    ):
        check(TINY + typed, "cpu:2x2", "cpu")


@pytest.mark.parametrize(
    ("words", "topology", "platform", "slices", "message"),
    [
        (TINY, "cpu:4x2", "cpu", 1, r"mesh 1 x 2 x 2 .* does not make the 8 devices of cpu:4x2; add .*--config.mesh.fsdp=2"),
        (TINY, "v5e:2x4", "cpu", 2, r"mesh.replica is 1, but there are 2 TPU slices; add --config.mesh.replica=2"),
        (TINY + " --config.batch_size=10", "cpu:2x2", "cpu", 1, r"batch_size 10 is not a multiple of the 4 .* --config.batch_size=8"),
        (TINY + " --config.batchsize=1", "cpu:1x4", "cpu", 1, r"pretrain refuses its options: .*batchsize"),
    ],
)  # fmt: skip
def test_config_that_does_not_fit_is_refused_with_a_remedy(
    words: str, topology: str, platform: str, slices: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(words, topology, platform, slices=slices)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("build --inptu=a --output=b", "build refuses its options: the following arguments are required: --input"),
        ("convert --checkpoint=a --output=b --layout=vit --huu", "convert refuses its options: unrecognized arguments: --huu"),
        ("evaluate --protocol=none", "evaluate refuses its options: argument --protocol: invalid choice: 'none'"),
    ],
)  # fmt: skip
def test_options_that_a_command_without_fields_refuses_are_one_line(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        PARSE_WORDS(made(words, topology="cpu:1x1"))
    assert "\n" not in str(raised.value)


def test_options_of_a_command_are_parsed_and_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PARSE_WORDS(made("build --input=nowhere --output=b", topology="cpu:1x1"))
    assert not list(tmp_path.iterdir())


def test_submission_without_shards_is_refused_and_a_dry_run_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    words = TINY.format(run="runs/none")
    check(words, "cpu:1x4", "cpu")
    missing = "--config.data.shards is missing; add --config.data.shards=… after pretrain"
    assert f"a submission would end with: {missing}" in caplog.text
    with pytest.raises(UserError, match=missing):
        checks.check(made(words, target="local", topology="cpu:1x4"), "cpu", contact=True)


def test_data_of_a_fine_tuning_is_its_option_data(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    words = "finetune --config=tests/configs/finetune_tiny.py --workdir=runs/none --task=ich --from=none"
    with pytest.raises(UserError, match="^--data is missing; add --data=… after finetune"):
        checks.check(made(words, target="local", topology="cpu:1x1"), "cpu", contact=True)
    found = checks.check(made(f"{words} --data=d", target="local", topology="cpu:1x1"), "cpu", contact=True)
    assert not any(word.startswith("--config.data.shards") for word in found.words)


def test_shards_of_the_config_file_become_an_option(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from curia_jax.configs import demo\n\n\ndef get_config():\n    config = demo.get_config()\n"
        "    config.data.shards = 'gs://data/ct'\n    return config\n"
    )
    found = check(f"pretrain --config={tmp_path}/own.py --workdir=a", "cpu:1x4", "cpu")
    assert found.words[-1] == "--config.data.shards=gs://data/ct"
    found = check(f"pretrain --config={tmp_path}/own.py --workdir=a --config.data.shards=b", "cpu:1x4", "cpu")
    assert found.words[-1] == "--config.data.shards=b"


def test_work_directory_of_another_config_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = tmp_path / "run"
    run.mkdir()
    words = TINY.format(run=run)
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


def test_what_a_fine_tuning_fills_in_itself_is_no_other_config(tmp_path: Path, monkeypatch, capsys) -> None:
    """The encoder of the weights, the task and the head are in its config.json and not in its config file."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    words = f"finetune --config=tests/configs/finetune_tiny.py --workdir={tmp_path} --task=ich --data=d --from=runs/b16"
    fields = checks.fields_of(made(words))
    saved = {name: value for name, value in fields.items() if "." not in name} | {"keep_best": "validation_loss"}
    groups = {name.split(".")[0] for name in fields if "." in name}
    for group in groups:
        saved[group] = {name.split(".")[1]: value for name, value in fields.items() if name.startswith(f"{group}.")}
    saved["model"]["depth"] = 12
    saved |= {"head": {"kind": "linear"}, "task": {"name": "ich"}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    options = ["--target=local", "--topology=cpu:1x1", "--dry-run"]
    assert command.main([*options, "--", *words.split()]) == 0
    assert command.main([*options, "--", *words.split(), "--config.finetune.train=lora"]) == 2
    assert "another config (finetune.train 'full' -> 'lora')" in capsys.readouterr().err


@pytest.mark.bucket
def test_bucket_with_a_run_of_another_config_is_looked_at_in_a_launch_alone(bucket: str) -> None:
    from curia_jax import storage

    (storage.root(bucket) / "config.json").write_text(json.dumps({"seed": 7}))
    words = TINY.format(run=bucket)
    checks.check(made(words, target="local", topology="cpu:1x4"), "cpu")  # a dry run contacts nothing
    with pytest.raises(UserError, match=f"{bucket} is the work directory of another config"):
        checks.check(made(f"{words} --config.data.shards=a", target="local", topology="cpu:1x4"), "cpu", contact=True)
