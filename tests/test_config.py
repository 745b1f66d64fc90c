import pytest

from curia_jax import config as configs
from data_pipeline.errors import UserError


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
