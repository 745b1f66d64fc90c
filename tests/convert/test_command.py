"""python -m curia_jax.convert on tiny checkpoints."""

import dataclasses
import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import curia_common
from curia_jax import checkpoint
from curia_jax import config as configs
from curia_jax.convert import __main__ as convert
from curia_jax.convert import checks, layouts
from curia_jax.settings import Augment
from curia_jax.trained_model import digest
from tests import checkpoints
from tests.convert.cases import CASES, ENCODERS, EXPORTS, HAS_TORCH

AUGMENT = Augment.of(configs.load("demo").augment)


def run(workdir: Path, output: Path, layout: str, *words: str) -> int:
    return convert.main([f"--checkpoint={workdir}", f"--output={output}", f"--layout={layout}", *words])


# ---- what is written


def test_json_describes_the_written_folder(runs, converted) -> None:
    loaded = checkpoint.load(runs("square"))
    for layout in ENCODERS:
        folder, result = converted("square", layout)
        files = {path.name: path for path in folder.iterdir()}
        for name in ("preprocessor_config.json", "image_processing_curia_jax.py"):
            assert (name in files) == (layout != "timm")
        assert {file["name"]: (file["bytes"], file["sha256"]) for file in result["files"]} == {
            name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in files.items()
        }
        with safetensors.safe_open(files["model.safetensors"], framework="numpy") as file:
            header, names = file.metadata(), list(file.keys())
        assert (result["layout"], result["step"], result["examples_seen"]) == (layout, 7, 56)
        assert result["encoder_sha256"] == digest(loaded.params["encoder"]) == header["curia_jax.encoder_sha256"]
        assert result["tensors"] == len(names)
        assert header["format"] == "pt" and header["curia_jax.step"] == "7" and header["curia_jax.layout"] == layout
        assert header["curia_jax.patch_order"] == "row, column, channel"
        assert header["curia_jax.gelu"] == "exact (erf)" and header["curia_jax.hu_window"] == "[-200.0, 300.0]"
        own = json.loads(files["config.json"].read_text())["curia_jax"]
        assert (own["run"], own["step"], own["layout"]) == ("ward-seven", 7, layout)
        version = curia_common.__version__
        assert own["version"] == header["curia_jax.version"] == result["version"] == version
        assert f"converted with curia_jax {version}" in files["README.md"].read_text()


@pytest.mark.parametrize(("name", "layout"), EXPORTS)
def test_every_check_is_within_its_limit(name: str, layout: str, converted) -> None:
    _, result = converted(name, layout)
    features = ["features", "loss", "mask", "prediction"] if layout == "vit_mae" else ["features"]
    wanted = [("file", ["tensors"]), ("NumPy", features)]
    if HAS_TORCH and layout != "timm":
        wanted.append(("transformers", sorted(["keys", "pixels", *features])))
    elif layout == "timm" and "timm" not in result["not_run"]:
        wanted.append(("timm", ["features", "keys"]))
    assert len(result["checks"]) == sum(len(whats) for _, whats in wanted)
    for by, whats in wanted:
        found = [check for check in result["checks"] if check["by"].split()[0] == by]
        assert sorted(check["what"] for check in found) == whats
        for check in found:
            assert (
                check["difference"]
                <= check["allowed"]
                == {"tensors": 0, "keys": 0, "mask": 0, "pixels": 1e-4}.get(check["what"], 1e-5)
            )


def test_written_files_contain_no_path_of_this_machine(runs, converted) -> None:
    place = str(runs("square").parents[1])
    for layout in ENCODERS:
        folder, result = converted("square", layout)
        for path in folder.iterdir():
            assert place.encode() not in path.read_bytes() and b"/tmp" not in path.read_bytes(), path.name
        assert "/" not in json.dumps(result["checks"])


def test_messages_go_to_standard_error_and_list_checks(runs, tmp_path, capfd) -> None:
    assert run(runs("square"), tmp_path / "vit", "vit") == 0
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "step 7, 56 examples seen: 2 blocks of width 16, images of 24x24 px, patches of 8x8"
    (summary,) = (line for line in lines if line.startswith("checked"))
    assert re.search(r"file \(tensors equal\); NumPy \(features \d\.\de-0[678]\)", summary)
    assert ("; transformers " in summary) == HAS_TORCH


def test_convert_without_pytorch_reports_skipped_check(runs, tmp_path, capfd, monkeypatch) -> None:
    find_spec = checks.importlib.util.find_spec
    monkeypatch.setattr(
        checks.importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
    )
    words = [runs("square"), tmp_path / "vit", "vit", f"--json={tmp_path / 'result.json'}"]
    assert run(*words) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["not_run"] == {"transformers": "torch is not installed"}
    assert {check["by"] for check in result["checks"]} == {"file", "NumPy"}
    assert "; NOT transformers: torch is not installed" in capfd.readouterr().err


def test_newest_step_is_converted_by_default(save, tmp_path) -> None:
    workdir = save(CASES["square"], steps=(3, 5))
    values = {}
    for name, words in {"newest": [], "named": ["--step=3"]}.items():
        assert run(workdir, tmp_path / name, "timm", *words) == 0
        with safetensors.safe_open(tmp_path / name / "model.safetensors", framework="numpy") as file:
            values[name] = file.get_tensor("cls_token")
            assert file.metadata()["curia_jax.step"] == {"newest": "5", "named": "3"}[name]
    np.testing.assert_array_equal(values["newest"], 0.5 * values["named"])


def test_convert_replaces_its_own_folder(runs, tmp_path) -> None:
    output = tmp_path / "weights"
    assert run(runs("square"), output, "vit") == 0
    assert run(runs("square"), output, "timm") == 0
    assert json.loads((output / "config.json").read_text())["curia_jax"]["layout"] == "timm"
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(("words", "setting"), [([], "auto"), (["--hu=true"], True), (["--hu=false"], False)])
def test_hu_option_is_the_setting_of_the_image_processor(words: list[str], setting, runs, tmp_path) -> None:
    assert run(runs("square"), tmp_path / "vit", "vit", *words) == 0
    assert json.loads((tmp_path / "vit/preprocessor_config.json").read_text())["hu"] == setting


def test_grid_that_masks_of_the_evaluator_do_not_fit_is_warned_of(runs, tmp_path, capfd) -> None:
    assert run(runs("square"), tmp_path / "dinov2", "dinov2", "--image-size=216") == 0
    assert (
        "CuriaBench's official evaluator cannot score tasks with masks on 27x27 patches: it pools masks of 512 px to 28x28; "
        "try --image-size=224, 28x28 patches" in capfd.readouterr().err
    )
    assert run(runs("square"), tmp_path / "dinov2", "dinov2", "--image-size=64") == 0
    assert "CuriaBench" not in capfd.readouterr().err


# ---- failures


def test_failed_check_exits_65_and_writes_nothing(runs, tmp_path, capfd, monkeypatch) -> None:
    right = layouts.LAYOUTS["vit"]
    query, key, value = right.table["encoder/blocks/attn/qkv"]
    wrong = dataclasses.replace(right, table={**right.table, "encoder/blocks/attn/qkv": (key, query, value)})
    monkeypatch.setitem(layouts.LAYOUTS, "vit", wrong)
    words = [runs("square"), tmp_path / "deep" / "vit", "vit", f"--json={tmp_path / 'result.json'}"]
    assert run(*words) == 65
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"error: NumPy and the trained model differ: features by \d\.\de[-+]0\d, allowed are 1e-05, at image \d, token \d, "
        r"channel \d+ \(image \d is (random|half constant|zeros)\)\. Nothing was written to .*deep/vit",
        error,
    )
    assert list(tmp_path.iterdir()) == []


def test_failed_check_keeps_previous_folder(runs, tmp_path, monkeypatch) -> None:
    assert run(runs("square"), tmp_path / "vit", "vit") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "vit").iterdir()}
    right = layouts.LAYOUTS["vit"]
    positions = {name: lambda config, make=make: -make(config) for name, make in right.constants.items()}
    monkeypatch.setitem(layouts.LAYOUTS, "vit", dataclasses.replace(right, constants=positions))
    assert run(runs("square"), tmp_path / "vit", "vit") == 65
    assert {path.name: path.read_bytes() for path in (tmp_path / "vit").iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_that_a_library_swallows_publishes_nothing(number: int, runs, tmp_path, capfd, monkeypatch) -> None:
    compare = checks.compare_file

    def swallow(*words: Any) -> checks.Check:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except KeyboardInterrupt:
            pass
        return compare(*words)

    monkeypatch.setattr(checks, "compare_file", swallow)
    assert run(runs("square"), tmp_path / "vit", "timm") == 75
    assert capfd.readouterr().err.splitlines()[-1] == "stopped; nothing was written to --output"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint={empty}/none"], "no checkpoint at .*none: there is no such folder"),
        (["--checkpoint={empty}"], "no finished checkpoint in .*; a work directory of curia_jax.pretrain has some"),
        (["--step=8"], "no checkpoint of step 8 in .*; there are: 7"),
        (["--image-size=big"], "--image-size=big: write a number of px, or height x width such as 384x512"),
        (["--image-size=20"], r"--image-size=20x20: image size \(20, 20\) is not a multiple of the patch size \(8, 8\); nearest that is: \(16, 16\)"),
        (["--image-size=8"], "--image-size=8x8: mask_ratio 0.75 leaves 0 of 1 patches visible"),
        (["--image-size=16x24", "--layout=dinov2"], "--layout=dinov2 cannot hold this model: Dinov2Model takes square images, but this model's are 16x24"),
        (["--output={foreign}"], "foreign holds notes.txt, which this command did not write"),
        (["--output={foreign}/notes.txt"], "notes.txt is a file; name a folder"),
        (["--output={foreign}/notes.txt/vit"], "foreign/notes.txt is a file; name a folder with --output"),
        (["--json={empty}/none/result.json"], "there is no folder .*none"),
        (["--hu=true", "--layout=timm"], "--hu sets the image processor of transformers, which --layout=timm has not; leave it out"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exits_2(words: list[str], message: str, runs, tmp_path, capfd) -> None:
    empty, foreign = tmp_path / "empty", tmp_path / "foreign"
    empty.mkdir()
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    given = [word.format(empty=empty, foreign=foreign) for word in words]
    arguments = {"--checkpoint": str(runs("square")), "--output": str(tmp_path / "vit"), "--layout": "vit"}
    arguments |= dict(word.split("=", 1) for word in given)
    assert convert.main([f"{key}={value}" for key, value in arguments.items()]) == 2
    out, err = capfd.readouterr()
    assert out == "" and re.fullmatch(f"error: .*{message}.*", err.splitlines()[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "foreign"]
    assert (foreign / "notes.txt").read_text() == "mine" and not list(empty.iterdir())


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("wide", "vit_mae", "ViTMAEForPreTraining takes square images, but this model's are 8x32 px"),
        ("patches_not_square", "dinov2", "Dinov2Model takes square patches, but this model's are 8x4 px"),
    ],
)
def test_convert_refuses_model_that_layout_cannot_hold(name, layout, message, runs, tmp_path, capfd) -> None:
    assert run(runs(name), tmp_path / "weights", layout) == 2
    assert re.search(f"error: --layout={layout} cannot hold this model: {message}", capfd.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_another_model_exits_65(save, tmp_path, capfd) -> None:
    workdir = save(CASES["square"])
    params = {"encoder": {"norm": {"scale": jnp.ones(16), "bias": jnp.ones(16)}}}
    config = {"model": CASES["square"], "augment": dataclasses.asdict(AUGMENT), "seed": 0}
    checkpoints.save(workdir, {9: {"params": params}}, config=config)
    assert run(workdir, tmp_path / "vit", "vit") == 65
    assert (
        "error: the checkpoint does not hold the model of its config: parameters do not fit" in capfd.readouterr().err
    )


def test_unknown_layout_lists_known_ones(runs, tmp_path, capfd) -> None:
    assert run(runs("square"), tmp_path / "vit", "vit,clip") == 2
    assert "--layout=vit,clip: no layout 'clip'; there are vit_mae, vit, dinov2, timm, vit_cl" in capfd.readouterr().err


def test_help_has_examples_that_parse(capfd) -> None:
    assert convert.main(["--help"]) == 0
    out = capfd.readouterr().out
    for word in ("ViTMAEForPreTraining", "Dinov2Model", "exit codes", "--image-size=512", "not_run"):
        assert word in out
    examples = re.findall(r"^  python -m curia_jax\.convert (.*)$", out, flags=re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        convert.parser().parse_args(example.split())
