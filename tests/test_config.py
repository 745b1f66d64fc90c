"""Loading configs by path and by name, overrides, checkpoints of earlier versions, and every named run as a golden file.

CURIA_WRITE_GOLDEN=1 python -m pytest tests/test_config.py      writes tests/golden/configs anew
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from curia_common.errors import UserError
from curia_jax import config as configs
from curia_jax.models import mae, vit

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "configs"
NAMED = sorted(file.stem for file in (ROOT / "configs").glob("*.py") if file.stem not in ("__init__", "base"))
SMALL = {"image_size": [16, 16], "patch_size": [8, 8], "unroll": 1}


# ---- named runs


@pytest.mark.parametrize("name", NAMED)
def test_named_config_equals_its_golden_file(name: str) -> None:
    """A changed default shows in review, in every run that it changes."""
    text = "".join(f"{field} = {value!r}\n" for field, value in configs.flatten(configs.load(name)).items())
    golden = GOLDEN / f"{name}.txt"
    if "CURIA_WRITE_GOLDEN" in os.environ:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMED)
def test_named_config_has_every_base_field_and_makes_a_model(name: str) -> None:
    config, base = configs.load(name), configs.flatten(configs.load("base")).keys()
    if name.startswith("finetune"):
        vit.config(**config.model)
        fields = {field for field in configs.flatten(config) if not field.startswith("finetune.")}
        decoder = {field for field in base if field.startswith(("model.decoder", "model.mask", "model.norm"))}
        assert fields == base - decoder
    else:
        mae.config(**config.model)
        assert configs.flatten(config).keys() == base
    assert (
        "@" not in (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    )  # nothing to fill in


def test_pretraining_configs_are_what_their_names_say() -> None:
    for name in NAMED:
        if match := re.fullmatch(r"pretrain_vit_([blh])16_(\d+)", name):
            size, pixels = match.groups()
            config = configs.load(name)
            encoder = mae.config(**config.model).encoder
            assert encoder.describe() == f"ViT-{size.upper()}/16"
            assert (encoder.image_size, encoder.channels) == ((int(pixels),) * 2, 1)
            assert encoder.unroll == encoder.depth
            assert config.mesh.replica == 1 and config.mesh.data == -1 and 256 % config.mesh.fsdp == 0  # on v5e:16x16
            assert config.batch_size % 256 == 0 and config.batch_size <= 16_384


@pytest.mark.parametrize(("name", "group"), [("base", ""), ("finetune_vit", "finetune.")])
def test_every_field_has_a_comment(name: str, group: str) -> None:
    source = (ROOT / f"configs/{name}.py").read_text(encoding="utf-8")
    comments = re.findall(r"^    config\.([\w.]+) = .*?  # .*$", source, flags=re.MULTILINE)
    assert set(comments) >= {field for field in configs.flatten(configs.load(name)) if field.startswith(group)}


def test_path_and_name_load_the_same_config() -> None:
    assert configs.load("configs/demo.py").to_dict() == configs.load("demo").to_dict()


def test_installed_package_loads_named_configs_without_a_checkout(tmp_path: Path) -> None:
    """As `pip install` puts it on a pod, in a folder that has no configs."""
    source, target, empty = tmp_path / "source", tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    for name in ("curia_common", "curia_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", target, source], capture_output=True, text=True
    )
    if "No module named pip" in pip.stderr:
        pytest.skip("pip is not installed")
    assert pip.returncode == 0, pip.stderr
    code = (
        "import curia_jax; from curia_jax import config; c = config.load('pretrain_vit_l16_512', ['--config.keep=5']);"
        "print(curia_jax.__file__, c.model.size, c.keep)"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=empty, env=environment, capture_output=True, text=True, check=True
    )
    file, size, keep = out.stdout.split()
    assert Path(file).is_relative_to(target) and (size, keep) == ("L", "5")


def test_checkout_that_is_not_installed_loads_configs(tmp_path: Path) -> None:
    for name in ("curia_common", "curia_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()];"
        "from curia_jax import config; print(config.load('configs/demo.py').model.width, config.load('demo').batch_size)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.split() == ["64", "32"], out.stderr


# ---- config files


def write(folder: Path, text: str) -> str:
    path = folder / "own.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_config_file_overrides_the_base(tmp_path: Path) -> None:
    own = write(
        tmp_path,
        "from curia_jax.configs import base\n\ndef get_config():\n    config = base.get_config()\n"
        "    config.model.size = 'L'\n    config.optimizer.clip_norm = 1\n    config.data.canvas = (64, 96)\n"
        "    config.compiler_options.xla_flag = 'true'\n    return config\n",
    )
    config = configs.load(own, ["--config.batch_size=64"])
    assert (config.model.size, config.optimizer.clip_norm, config.data.canvas) == ("L", 1.0, (64, 96))
    assert (config.batch_size, config.compiler_options.xla_flag) == (64, "true")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "own.py, line 1: SyntaxError"),
        ("x = 1\n", "defines no get_config()"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError"),
        ("def get_config():\n    return {}['a']\n", "own.py, line 2: KeyError"),
        (
            "from curia_jax.configs import base\ndef get_config():\n    config = base.get_config()\n"
            "    config.model.siez = 'B'\n",
            "own.py, line 4: AttributeError",
        ),
    ],
)
def test_broken_config_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        configs.load(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_missing_config_lists_names_and_files() -> None:
    with pytest.raises(UserError, match=r"named runs are base, demo, .*files beside it are .*configs/demo\.py"):
        configs.load("configs/no_such.py")
    with pytest.raises(UserError, match="no config file or name 'pretrain_vit_g'; named runs are"):
        configs.load("pretrain_vit_g")


# ---- overrides


def test_overrides_change_fields_of_every_type() -> None:
    config = configs.load(
        "demo",
        ["--config.batch_size=32", "--config.model.norm_pix=false", "--config.data.canvas=(64, 96)", "--config.data.shards=2024",
         "--config.optimizer.weight_decay=0", "--config.augment.crop_scale=[0.5,1]", "--config.model.patch_size=16",
         "--config.optimizer.clip_norm=1", "--config.data.additions=2", "--config.compiler_options.xla_a=true",
         "--config.compiler_options.xla_b=none"],
    )  # fmt: skip
    assert (config.batch_size, config.model.norm_pix, config.data.shards) == (32, False, "2024")
    assert (config.data.canvas, config.augment.crop_scale, config.model.patch_size) == ((64, 96), (0.5, 1.0), (16, 16))
    numbers = (config.optimizer.weight_decay, config.optimizer.clip_norm, *config.augment.crop_scale)
    assert [type(number) for number in numbers] == [float] * 4
    assert (config.data.additions, config.compiler_options.to_dict()) == (2, {"xla_a": "true", "xla_b": None})


def test_optional_fields_take_none() -> None:
    config = configs.load("pretrain_vit_b16_224", ["--config.data.canvas=none", "--config.optimizer.clip_norm=None"])
    assert (config.data.canvas, config.optimizer.clip_norm) == (None, None)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.model.mask_ration=0.5", "did you mean --config.model.mask_ratio?"),
        ("--config.mask_ratio=0.5", "did you mean --config.model.mask_ratio?"),
        ("--config.batch_size=many", "is a str, but the field takes a int"),
        ("--config.batch_size=none", "is a NoneType, but the field takes a int"),
        ("--config.batch_size=1.5", "is a float, but the field takes a int"),
        ("--config.optimizer.clip_norm=abc", "is a str, but the field takes a float (now None)"),
        ("--config.data.additions=1.5", "is a float, but the field takes a int (now None)"),
        ("--config.model.image_size=(1,2,3)", "is not of the form (64, 64), which the field takes"),
        ("--config.data.canvas=wide", "is not of the form (0, 0), which the field takes"),
        ("--config.batch_size.x=1", "no config field 'batch_size.x'"),
        ("--config.model=B", "is a group of fields"),
        ("--config.compiler_options=x", "is a group of fields"),
        ("--batch_size=3", "overrides are written --config.field=value"),
        ("--config.model.attention=kernel", "is now called pallas; write --config.model.attention=pallas"),
    ],
)
def test_wrong_override_says_what_to_write(word: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        configs.load("demo", [word])
    assert "\n" not in str(error.value)


def test_named_size_replaces_the_dimensions_of_the_file() -> None:
    for file in ("demo", "tests/configs/tiny.py"):
        config = configs.load(file, ["--config.model.size=B"])
        assert mae.config(**config.model).encoder.width == 768
        assert (config.model.width, config.model.depth, config.model.heads, config.model.mlp_width) == (None,) * 4


def test_named_size_with_own_dimensions_is_refused() -> None:
    for words in (["--config.model.size=B", "--config.model.width=64"], ["--config.model.width=64"]):
        with pytest.raises(
            UserError, match="size=B sets width, .*leave out --config.model.width=64, or write .*size=custom"
        ):
            configs.load("pretrain_vit_b16_224", words)


def test_dimensions_of_a_custom_model_can_be_changed() -> None:
    config = configs.load("demo", ["--config.model.width=96"])
    assert mae.config(**config.model).encoder.width == 96


# ---- checkpoints of earlier versions


def test_old_checkpoint_config_loads_with_current_names() -> None:
    """Of a demo run and of a named run, as they were saved before some fields and values had their names."""
    old = {"batch_size": 32, "model": {"size": "Ti", "width": 128, "depth": 6, "heads": 4, "mlp_width": 512, **SMALL}}
    config = configs.from_checkpoint(json.loads(json.dumps(old)))
    assert mae.config(**config.model).encoder.width == 128
    assert (config.model.size, config.model.activation, config.model.attention) == ("custom", "gelu", "xla")
    assert config.model.image_size == (16, 16)
    config = configs.from_checkpoint({"model": {"size": "B", "attention": "kernel"}})
    assert (config.model.size, config.model.attention) == ("B", "pallas")
    assert old["model"]["size"] == "Ti"


def test_old_config_file_loads_with_current_names(tmp_path: Path) -> None:
    own = write(
        tmp_path,
        "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'model': {'size': 'Ti', 'width': 16,"
        " 'depth': 2, 'heads': 2, 'attention': 'kernel'}})\n",
    )
    model = configs.load(own).model
    assert (model.size, model.attention) == ("custom", "pallas")


def test_resuming_the_same_run_shows_no_changes() -> None:
    config = configs.load("demo")
    plain = json.loads(config.to_json_best_effort())
    plain["model"]["attention"] = {"pallas": "kernel"}.get(config.model.attention, config.model.attention)
    saved = configs.from_checkpoint(plain)
    assert configs.changes(saved, config) == {}
    assert configs.changes(saved, json.loads(config.to_json_best_effort())) == {}


def test_changes_name_old_and_new_values() -> None:
    config = configs.load("demo", ["--config.batch_size=64", "--config.compiler_options.xla_a=1"])
    assert configs.changes(configs.load("demo"), config) == {
        "batch_size": (32, 64),
        "compiler_options.xla_a": (None, "1"),
    }


# ---- durations


@pytest.mark.parametrize(
    ("duration", "expected"),
    [("500 steps", 500), ("1 step", 1), ("94000 examples", 1469), ("2 epochs", 62), ("10 %", 100)],
)
def test_duration_is_converted_to_steps(duration: str, expected: int) -> None:
    assert configs.steps(duration, batch_size=64, examples=2000, total=1000) == expected


@pytest.mark.parametrize("duration", ["500", "many steps", "5 hours", ""])
def test_unreadable_duration_is_refused(duration: str) -> None:
    with pytest.raises(UserError, match="duration"):
        configs.steps(duration, batch_size=64, examples=2000)
