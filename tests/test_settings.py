"""Settings are checked whole, before any work is done."""

import dataclasses
from typing import Any

import ml_collections
import pytest

from curia_common.errors import UserError
from curia_jax import config as configs
from curia_jax import settings


def loaded(**values: Any) -> ml_collections.ConfigDict:
    """The demo's config with values of any type, as config files can set them; `section__field` is section.field."""
    config = configs.load("demo")
    for name, value in values.items():
        *section, field = name.split("__")
        place = config[section[0]] if section else config
        with place.ignore_type():
            place[field] = value
    return config


def test_settings_are_those_of_the_config() -> None:
    found = settings.Settings.of(
        loaded(
            data__canvas=[64, 48], optimizer__clip_norm=1, compiler_options__xla_a="true", compiler_options__xla_b=None
        )
    )
    wanted = configs.load("demo")
    assert (found.batch_size, found.duration, found.seed) == (wanted.batch_size, wanted.duration, wanted.seed)
    assert (found.data.canvas, found.optimizer.clip_norm) == ((64, 48), 1)
    assert found.compiler_options == {"xla_a": "true", "xla_b": None}
    assert dataclasses.asdict(found.augment) == wanted.augment.to_dict()
    assert dataclasses.asdict(found.devices) == wanted.devices.to_dict()


def test_fields_that_an_older_config_lacks_have_their_default() -> None:
    config = configs.load("demo").to_dict()
    for name in ("additions", "on_change"):
        del config["data"][name]
    for name in ("keep_every", "compiler_options"):
        del config[name]
    found = settings.Settings.of(config)
    assert (found.data.additions, found.data.on_change) == (None, "refuse")
    assert (found.keep_every, found.compiler_options) == ("", {})


@pytest.mark.parametrize(("train", "rate"), [("full", 5e-4), ("lora", 5e-3), ("head", 5e-2)])
def test_rate_of_a_fine_tuning_is_that_of_what_it_trains(train: str, rate: float) -> None:
    words = [f"--config.finetune.train={train}"]
    assert settings.Settings.of(configs.load("finetune_vit", words)).optimizer.base_learning_rate == rate
    config = configs.load("finetune_vit", [*words, "--config.optimizer.base_learning_rate=0.25"])
    assert settings.Settings.of(config).optimizer.base_learning_rate == 0.25


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("seed", -1, "a whole number of at least 0"),
        ("batch_size", 0, "a whole number of at least 1"),
        ("batch_size", True, "a whole number of at least 1"),
        ("duration", 800, "a duration such as '800 epochs'"),
        ("keep", 1.5, "a whole number of at least 1"),
        ("compiler_options", "xla_a", "a group of option names and values"),
        ("optimizer.base_learning_rate", float("nan"), "a number above 0"),
        ("optimizer.base_learning_rate", None, "a number above 0"),  # pretraining has no default
        ("optimizer.b2", 1.0, "a number from 0 to below 1"),
        ("optimizer.weight_decay", -0.1, "a number of at least 0"),
        ("optimizer.clip_norm", "abc", "a number above 0, or None"),
        ("augment.hu_window", (100.0, -100.0), "two numbers, the lower first"),
        ("augment.hu_window", (-100.0, 0.0, 100.0), "two numbers, the lower first"),
        ("augment.reading_window_probability", 1.1, "a number from 0 to 1"),
        ("augment.crop_scale", (1.0, 0.2), "two numbers above 0 and up to 1, the lower first"),
        ("augment.crop_ratio", (0.0, 1.0), "two numbers above 0, the lower first"),
        ("augment.flip", 1, "True or False"),
        ("augment.resample", "nearest", "bicubic or bilinear"),
        ("augment.image_std", 0.0, "a number above 0"),
        ("data.split", "", "a split such as train"),
        ("data.canvas", (64, 0), "a height and width in px, or None"),
        ("data.threads", 0, "a whole number of at least 1"),
        ("data.additions", -1, "a whole number of at least 0, or None"),
        ("data.on_change", "ignore", "refuse or new_epoch"),
        ("devices.cpu_count", 2.0, "a whole number of at least 0"),
        ("devices.platform", None, "a platform such as cpu, or auto"),
    ],
)
def test_wrong_value_is_one_line_with_what_is_wanted(field: str, value: object, wanted: str) -> None:
    with pytest.raises(UserError) as error:
        settings.Settings.of(loaded(**{field.replace(".", "__"): value}))
    assert str(error.value) == f"{field} is {value!r}; it has to be {wanted}; set --config.{field}"
