import re
from pathlib import Path

import pytest

from curia_common.errors import UserError
from curia_jax import config as configs
from curia_jax.models import mae


@pytest.fixture
def demo() -> str:
    return "configs/demo.py"


def test_overrides_change_fields_of_every_type(demo: str) -> None:
    config = configs.load(
        demo,
        ["--config.batch_size=32", "--config.model.size=B", "--config.model.norm_pix=false", "--config.data.canvas=(64, 96)",
         "--config.optimizer.weight_decay=0", "--config.augment.crop_scale=[0.5,1.0]", "--config.model.patch_size=16"],
    )  # fmt: skip
    assert (config.batch_size, config.model.size, config.model.norm_pix) == (32, "B", False)
    assert (config.data.canvas, config.augment.crop_scale, config.model.patch_size) == ((64, 96), (0.5, 1.0), (16, 16))
    assert isinstance(config.optimizer.weight_decay, float)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.model.mask_ration=0.5", "did you mean --config.model.mask_ratio?"),
        ("--config.mask_ratio=0.5", "did you mean --config.model.mask_ratio?"),
        ("--config.batch_size=many", "is a str, but the field takes a int"),
        ("--config.batch_size.x=1", "no config field 'batch_size.x'"),
        ("--config.model=B", "is a group of fields"),
        ("--batch_size=3", "overrides are written --config.field=value"),
    ],
)
def test_a_wrong_override_says_what_to_write(demo: str, word: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        configs.load(demo, [word])
    assert message in str(error.value)


def test_a_missing_config_file_lists_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"configs/demo\.py"):
        configs.load("configs/no_such.py")


@pytest.mark.parametrize(
    ("duration", "expected"),
    [("500 steps", 500), ("1 step", 1), ("94000 examples", 1469), ("2 epochs", 62), ("10 %", 100)],
)
def test_durations(duration: str, expected: int) -> None:
    assert configs.steps(duration, batch_size=64, examples=2000, total=1000) == expected


@pytest.mark.parametrize("duration", ["500", "many steps", "5 hours", ""])
def test_an_unreadable_duration_is_an_error(duration: str) -> None:
    with pytest.raises(UserError, match="duration"):
        configs.steps(duration, batch_size=64, examples=2000)


@pytest.mark.parametrize("file", sorted(Path("configs").glob("*.py")), ids=lambda file: file.stem)
def test_every_named_config_makes_a_model_and_has_the_fields_of_the_demo(file: Path, demo: str) -> None:
    """So that one command line serves them all."""
    config = configs.load(str(file))
    mae.config(**config.model)
    common = {name for name in configs.flatten(configs.load(demo)) if not name.startswith("model.")}
    assert common <= set(configs.flatten(config))
    assert "@" not in file.read_text(encoding="utf-8").split('"""')[1]  # nothing left to fill in


def test_named_runs_are_what_their_names_say() -> None:
    for file in Path("configs").glob("pretrain_vit_*.py"):
        size, pixels = re.fullmatch(r"pretrain_vit_([blh])16_(\d+)", file.stem).groups()
        config = configs.load(str(file))
        model = mae.config(**config.model)
        assert (config.model.size, model.encoder.image_size) == (size.upper(), (int(pixels),) * 2)
        assert (model.encoder.patch_size, model.encoder.channels) == ((16, 16), 1)
        assert config.mesh.replica == 1 and config.mesh.data == -1 and 256 % config.mesh.fsdp == 0  # on v5e:16x16
        assert config.batch_size % 256 == 0 and config.batch_size <= 16_384
