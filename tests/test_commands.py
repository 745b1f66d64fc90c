"""Every command at its front door: --help, and the exit code of each kind of wrong input, always with one line."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from curia_common.exit_codes import MEANINGS, ExitCode
from tests.test_architecture import COMMANDS, module_of

ROOT = Path(__file__).resolve().parents[1]
NAMES = [module_of(path) for path in COMMANDS]


def main_of(name: str) -> Callable[[list[str]], int]:
    folder = ROOT / name.replace(".", "/")
    return importlib.import_module(f"{name}.__main__" if folder.is_dir() else name).main


@pytest.mark.parametrize("name", NAMES)
def test_help_teaches_by_example_and_lists_exit_codes(name: str, capsys) -> None:
    assert main_of(name)(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m {name}")
    assert f"\nexamples:\n  python -m {name}" in text
    for code in (ExitCode.DONE, ExitCode.FAULT, ExitCode.USAGE, ExitCode.RESTART):
        assert f"{code:<4d}{MEANINGS[code]}" in text


@pytest.mark.parametrize("name", NAMES)
def test_unknown_option_exits_2_and_names_it(name: str, capsys) -> None:
    assert main_of(name)(["--no-such-option"]) == 2
    assert "usage: " in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_command_runs_as_a_module_from_an_empty_folder(name: str, tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, "-m", name, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


TRAIN = "--config=configs/demo.py --workdir={tmp}/run --config.data.shards={shards}"
SCORE = "--tasks=shards/modality --data={shards} --output={tmp}/scores"
# command, its words, exit code, what the one line has to name
WRONG = [
    ("data_pipeline.build", "--input {tmp}/missing --output {tmp}/out", 2, "missing"),
    ("data_pipeline.build", "--input {tmp} --output {tmp}/out --workers=0", 2, "--workers"),
    ("data_pipeline.build", "--input {tmp} --output {tmp}/out --planes=diagonal", 2, "diagonal"),
    ("data_pipeline.build", "--input {tmp}/text --output {tmp}/out", 65, "no"),
    ("data_pipeline.verify", "{tmp}/missing", 2, "missing"),
    ("data_pipeline.verify", "{damaged}", 65, "damaged"),
    ("data_pipeline.inspect", "{tmp}/missing", 2, "missing"),
    ("data_pipeline.inspect", "{shards} --count=0", 2, "--count"),
    ("data_pipeline.phantom", "--output {tmp}/text", 2, "not empty"),
    ("data_pipeline.phantom", "--output {tmp}/new --patients=0", 2, "--patients"),
    ("curia_jax.pretrain", "--config=configs/none.py --workdir={tmp}/run", 2, "configs/none.py"),
    ("curia_jax.pretrain", TRAIN + " --config.model.channels=3", 2, "channels"),
    ("curia_jax.pretrain", TRAIN + " --config.batch_size=0", 2, "batch_size"),
    ("curia_jax.pretrain", TRAIN + " --config.seed=-1", 2, "seed"),
    ("curia_jax.pretrain", TRAIN + " --config.optimizer.clip_norm=abc", 2, "clip_norm"),
    ("curia_jax.pretrain", TRAIN + " --config.optimzer.b1=0.9", 2, "optimizer.b1"),
    ("curia_jax.pretrain", TRAIN + " --config.model.mask_ratio=1.5", 2, "mask_ratio"),
    ("curia_jax.pretrain", TRAIN + " --config.duration=soon", 2, "soon"),
    ("curia_jax.pretrain", "--config=configs/demo.py --workdir={tmp}/run --config.data.shards={damaged}", 65, "shard"),
    ("curia_jax.plan", "--config=pretrain_vit_b16_224 --topology=v5e:3x5", 2, "v5e:3x5"),
    ("launch", "--target=local --topology=v5e-250 -- pretrain --config=demo --workdir={tmp}/run", 2, "v5e-256"),
    (
        "launch",
        "--target=local --topology=cpu:2x2 -- pretrain --config=demo --workdir={tmp}/run --config.devices.multihost=False",
        2,
        "multihost",
    ),
    ("launch", "status no-such-run", 2, "no-such-run"),
    ("curia_jax.convert", "--checkpoint={tmp}/missing --output={tmp}/out --layout=vit", 2, "missing"),
    ("curia_jax.convert", "--checkpoint={tmp} --output={tmp}/out --layout=vit", 2, "checkpoint"),
    ("curia_jax.finetune", "--config=finetune_vit --task=ich --workdir={tmp}/run", 2, "--data"),
    ("curia_jax.finetune", "--config=finetune_vit --task=ich --data={tmp}/missing --workdir={tmp}/run", 2, "missing"),
    ("curia_jax.finetune", "--config=finetune_vit --task=ihc --data={tmp} --workdir={tmp}/run", 2, "ihc"),
    ("curia_jax.finetune", "--config=demo --task=ich --data={tmp} --workdir={tmp}/run", 2, "finetune"),
    ("curia_jax.predict", "--weights={tmp}/missing --input={tmp}/text --output={tmp}/p.parquet", 2, "missing"),
    ("curia_jax.evaluate", SCORE + " --backbones={tmp}/missing", 2, "missing"),
    ("curia_jax.evaluate", SCORE + " --backbones={tmp} --batch-size=0", 2, "--batch-size"),
    ("curia_jax.evaluate", SCORE + " --backbones={tmp} --draws=0", 2, "--draws"),
    (
        "curia_jax.report",
        "--run={tmp}/missing --shards={shards} --results={tmp}/r.json --output={tmp}/p.html",
        2,
        "missing",
    ),
    ("curia_jax.doctor", "--workdir={tmp}/missing", 2, "missing"),
    ("curia_jax.doctor", "--workdir={tmp}/text", 2, "text"),
    ("curia_jax.demo", "--data={tmp}/missing --output={tmp}/demo", 2, "missing"),
]


@pytest.fixture(scope="module")
def damaged(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny dataset with one shard cut short."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(tiny_shards, folder)
    shard = sorted(folder.glob("*.array_record*"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(("name", "words", "code", "names"), WRONG)
def test_wrong_input_is_one_line_and_its_exit_code(
    name: str, words: str, code: int, names: str, tmp_path: Path, tiny_shards: Path, damaged: Path
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    filled = words.format(tmp=tmp_path, shards=tiny_shards, damaged=damaged).split()
    found = subprocess.run([sys.executable, "-m", name, *filled], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == code, found.stderr
    # verify's answer about a dataset is its result, not an error of the command.
    errors = [line for line in found.stderr.splitlines() if "error: " in line or line.startswith("damaged: ")]
    assert "Traceback" not in found.stderr and len(errors) == 1 and names in errors[0], found.stderr


@pytest.mark.long
def test_diverged_training_exits_64_and_names_the_last_good_checkpoint(tmp_path: Path, tiny_shards: Path) -> None:
    words = TRAIN.format(tmp=tmp_path, shards=tiny_shards).split()
    words += ["--config.duration=20 steps", "--config.batch_size=8", "--config.optimizer.base_learning_rate=1e30"]
    words += ["--config.warmup=1 steps", "--config.save_every=1 steps", f"--json={tmp_path}/result.json"]
    found = subprocess.run(
        [sys.executable, "-m", "curia_jax.pretrain", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 64, found.stderr
    assert "last good checkpoint is step" in found.stderr.splitlines()[-1]


def test_every_command_is_walked_through() -> None:
    assert set(NAMES) == {name for name, *_ in WRONG}


def test_json_result_is_written(tmp_path: Path, tiny_shards: Path) -> None:
    assert main_of("data_pipeline.verify")([str(tiny_shards), f"--json={tmp_path}/found.json"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["problems"] == []
