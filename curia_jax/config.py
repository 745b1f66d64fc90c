"""Run configurations: a named run or a Python file with `get_config()`, changed by `--config.field=value`.

Fields and their meaning: configs/base.py.
"""

import ast
import difflib
import importlib
import importlib.util
import pkgutil
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, FieldReference

from curia_common.errors import DataError, UserError

PACKAGE = "curia_jax.configs"
SIZE, CUSTOM, DIMENSIONS = "model.size", "custom", ("width", "depth", "heads", "mlp_width")
# Values that have another name since: field -> old -> new. Checkpoints and config files with the old ones load.
RENAMED = {"model.attention": {"kernel": "pallas"}}
# What it means that a field is missing from a checkpoint: what runs did before the field existed.
MISSING = {
    "keep_every": "", "keep_best": "", "save_patience": 60.0, "model.activation": "gelu", "model.attention": "xla", "model.width": None, "model.depth": None,
    "model.heads": None, "model.mlp_width": None, "data.additions": None, "data.on_change": "refuse", "data.damaged_share": 0.0,
    "data.check_shards": False,
    "augment.reading_window_probability": 0.0, "augment.intensity_jitter": 0.0, "augment.crop_scale": (1.0, 1.0),
    "augment.crop_ratio": (1.0, 1.0), "augment.flip": False, "devices.heartbeat_seconds": 60,
    "devices.watchdog_seconds": 1800, "devices.check_every": 0,
}  # fmt: skip


def load(path_or_name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a config and applies overrides.

    Args:
      path_or_name: a Python file that defines `get_config() -> ConfigDict`, or the name of an installed run
        ("pretrain_vit_b16_224").
      overrides: command line words `--config.field=value`; a value is a Python literal, anything else is a string.

    Returns:
      The config, locked: only `compiler_options` takes new fields.

    Raises:
      UserError: no such file or name, a file that cannot be read, an unknown field (the nearest one is suggested), a value of
        another type than the field's, or a model of a named size with dimensions of its own.
    """
    get_config = _get_config(path_or_name)
    try:
        config: Any = get_config()
    except Exception as error:
        raise UserError(_fault(path_or_name, error)) from error
    _use_new_values(config)
    config.lock()
    if "compiler_options" in config:
        config.compiler_options.unlock()
    changed = [_override(config, word) for word in overrides]
    _check_size(config, changed)
    return config


def from_checkpoint(plain: Mapping[str, Any]) -> ConfigDict:
    """The config of a checkpoint, of this version or an earlier one, with the fields and values of this version.

    Args:
      plain: as it was saved, with lists for tuples.

    Raises:
      DataError: it is no config.
    """
    try:
        config = ConfigDict({name: _with_tuples(value) for name, value in plain.items()})
        for field, value in MISSING.items():
            group, name = _find(config, field)
            if group is not None and name not in group:
                group[name] = value
        _use_new_values(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # ConfigDict raises them all
        raise DataError("the config of the checkpoint is damaged; copy the checkpoint again") from error
    return config


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """All fields by their dotted names, in alphabetical order."""
    fields: dict[str, Any] = {}
    for key in config:
        value: Any = config[key]
        if isinstance(value, ConfigDict):
            fields.update(flatten(value, f"{prefix}{key}."))
        else:
            fields[f"{prefix}{key}"] = value
    return fields


def changes(old: Mapping[str, Any] | ConfigDict, new: Mapping[str, Any] | ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Fields that differ between two configs: dotted name -> (old, new); None where there is none."""
    before, after = (flatten(_with_tuples(config)) for config in (old, new))
    names = dict.fromkeys([*before, *after])
    return {n: (before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)}


def steps(duration: str, *, batch_size: int, examples: int, total: int | None = None) -> int:
    """Turns a duration into optimizer steps, rounded; see `count`."""
    return round(count(duration, batch_size=batch_size, examples=examples, total=total))


def count(duration: str, *, batch_size: int, examples: int, total: int | None = None) -> float:
    """Turns a duration into optimizer steps.

    Args:
      duration: "500 steps", "94000 examples", "800 epochs" or, where `total` is given, "5 %" of it.
      batch_size: examples per step, over all hosts.
      examples: examples in an epoch.
      total: steps that 100 % stands for.

    Raises:
      UserError: the text is none of these forms.
    """
    match = re.fullmatch(r"\s*(\d+(?:_\d+)*(?:\.\d*)?(?:e\+?\d+)?)\s*(steps?|examples?|epochs?|%)\s*", duration)
    if match is None or (match[2] == "%" and total is None):
        raise UserError(f"cannot read the duration {duration!r}: write '500 steps', '94000 examples' or '800 epochs'")
    number = float(match[1])
    unit = match[2].rstrip("s")
    per_unit = {"step": 1.0, "example": 1 / batch_size, "epoch": examples / batch_size, "%": (total or 0) / 100}[unit]
    return number * per_unit


# ---- config files


def _package() -> ModuleType:
    """The installed configs; in a checkout that is not installed, the folder `configs` under the name of the package."""
    try:
        return importlib.import_module(PACKAGE)
    except ModuleNotFoundError:
        folder = Path(__file__).resolve().parents[1] / "configs"
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or not folder.is_dir():
            raise
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        return sys.modules[PACKAGE]


def _get_config(path_or_name: str) -> Callable[[], ConfigDict]:
    package, file = _package(), Path(path_or_name)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    try:
        if path_or_name in names:
            found = vars(importlib.import_module(f"{PACKAGE}.{path_or_name}"))
        elif file.is_file():
            found = runpy.run_path(str(file))
        else:
            beside = sorted(p.as_posix() for p in file.parent.glob("*.py")) if file.suffix == ".py" else []
            raise UserError(
                f"no config file or name {path_or_name!r}; named runs are {', '.join(names)}"
                + (f"; files beside it are {', '.join(beside)}" if beside else "")
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(_fault(path_or_name, error)) from error
    if "get_config" not in found:
        raise UserError(f"{path_or_name} defines no get_config(); configs/base.py shows how a config file is written")
    return found["get_config"]


def _fault(path: str, error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if Path(frame.filename).stem == Path(path).stem]
    line = error.lineno if isinstance(error, SyntaxError) else (own or [0])[-1]
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"cannot read the config {path}, line {line}: {type(error).__name__}: {text}"


def _with_tuples(value: Any) -> Any:
    """JSON has lists where a config has tuples."""
    if isinstance(value, ConfigDict | Mapping):
        return ConfigDict({name: _with_tuples(value[name]) for name in value})
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value


def _use_new_values(config: ConfigDict) -> None:
    """Replaces values of earlier versions in `config`."""
    for field, values in RENAMED.items():
        group, name = _find(config, field)
        if group is not None and name in group:
            group[name] = values.get(group[name], group[name])
    # Dimensions once went before the named size; a size with dimensions of its own is custom.
    model: Any = config.get("model")
    if isinstance(model, ConfigDict) and all(model.get(name) is not None for name in DIMENSIONS[:3]):
        model.size = CUSTOM


# ---- overrides


def _find(config: ConfigDict, field: str) -> tuple[Any, str]:
    """The group of a dotted field, None if there is no such group, and the field's name in it."""
    *groups, name = field.split(".")
    group: Any = config
    for part in groups:
        group = group[part] if isinstance(group, ConfigDict) and part in group else None
    return group if isinstance(group, ConfigDict) else None, name


def _override(config: ConfigDict, word: str) -> str:
    """Applies `--config.field=value` and returns the field."""
    match = re.fullmatch(r"--config\.([\w.]+)=(.*)", word, flags=re.DOTALL)
    if match is None:
        raise UserError(f"cannot read {word!r}: overrides are written --config.field=value")
    field, text = match[1], match[2]
    group, name = _find(config, field)
    if group is None or (name not in group and group.is_locked):
        raise UserError(_unknown(field, list(flatten(config))))
    if isinstance(group.get(name), ConfigDict):
        names = ", ".join(f"{field}.{key}" for key in group[name])
        raise UserError(f"--config.{field} is a group of fields; set one of: {names or f'{field}.…'}")
    if text in RENAMED.get(field, {}):
        new = RENAMED[field][text]
        raise UserError(f"--config.{field}={text} is now called {new}; write --config.{field}={new}")
    group[name] = _parse(group, name, field, text)
    return field


def _unknown(field: str, known: list[str]) -> str:
    name = field.split(".")[-1]
    close = difflib.get_close_matches(field, known, n=1, cutoff=0.5) or difflib.get_close_matches(
        name, [k.split(".")[-1] for k in known], n=1, cutoff=0.6
    )
    hint = next((k for k in known if close and (k == close[0] or k.endswith("." + close[0]))), None)
    if hint is None:
        return f"no config field '{field}'; fields are: {', '.join(known)}"
    return f"no config field '{field}'; did you mean --config.{hint}?"


def _parse(group: Any, name: str, field: str, text: str) -> Any:
    """The value that `text` stands for, of the type of the field."""
    if name not in group:
        return None if text.lower() == "none" else text
    old: Any = group[name]
    wanted: type = group.get_type(name)
    optional = isinstance(dict(group.items(preserve_field_references=True))[name], FieldReference)
    value: Any
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if wanted is str:
        return text  # model.remat=none and data.shards=2024 are words
    if value is None and (optional or old is None):
        return None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is tuple:
        like = old or (0, 0)  # those that may be None are sizes
        if isinstance(value, int | float):
            value = (value,) * len(like)
        if isinstance(value, list | tuple) and len(value) == len(like):
            number = float if isinstance(like[0], float) else int
            if all(isinstance(one, int | number) and not isinstance(one, bool) for one in value):
                return tuple(map(number, value))
        raise UserError(f"--config.{field}={text} is not of the form {like!r}, which the field takes")
    if wanted is not type(None) and type(value) is not wanted:
        raise UserError(
            f"--config.{field}={text} is a {type(value).__name__}, but the field takes a {wanted.__name__} (now {old!r})"
        )
    return value


def _check_size(config: ConfigDict, changed: Sequence[str]) -> None:
    """A named size on the command line takes the place of the file's dimensions; size and dimensions together are refused."""
    model: Any = config.get("model")
    if not isinstance(model, ConfigDict) or "size" not in model or model.size == CUSTOM:
        return
    given = [name for name in DIMENSIONS if model.get(name) is not None]
    if SIZE in changed:
        for name in [name for name in given if f"model.{name}" not in changed]:
            model[name] = None
            given.remove(name)
    if given:
        words = " ".join(f"--config.model.{name}={model[name]}" for name in given)
        raise UserError(
            f"model.size={model.size} sets width, depth, heads and mlp_width; leave out {words}, or write "
            f"--config.{SIZE}={CUSTOM} with width, depth and heads"
        )
