"""Run configurations: a Python file with `get_config()`, changed by `--config.field=value` on the command line."""

import ast
import difflib
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from curia_common.errors import UserError


def load(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Reads a config file and applies overrides.

    Args:
      path: a Python file that defines `get_config() -> ml_collections.ConfigDict`.
      overrides: command line words `--config.field=value`; a value is a Python literal, anything else is a string.

    Returns:
      The config, locked: a field that the file does not define cannot be added.

    Raises:
      UserError: no such file, no `get_config` in it, an unknown field (the nearest one is suggested), or a value
        of another type than the one in the file.
    """
    file = Path(path)
    if not file.is_file():
        nearby = sorted(p.as_posix() for p in (file.parent if file.parent.is_dir() else Path("configs")).glob("*.py"))
        raise UserError(f"no config file {path}; there are: {', '.join(nearby) or 'none beside it'}")
    get_config = runpy.run_path(str(file)).get("get_config")
    if get_config is None:
        raise UserError(f"{path} defines no get_config(); see configs/demo.py for the form of a config file")
    config = get_config()
    config.lock()
    for word in overrides:
        match = re.fullmatch(r"--config\.([\w.]+)=(.*)", word, flags=re.DOTALL)
        if match is None:
            raise UserError(f"cannot read {word!r}: overrides are written --config.field=value")
        _set(config, match[1], match[2])
    return config


def _set(config: ml_collections.ConfigDict, field: str, text: str) -> None:
    *parents, name = field.split(".")
    node = config
    for depth, part in enumerate([*parents, name]):
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            known = flatten(config)
            close = difflib.get_close_matches(field, known, n=1, cutoff=0.5) or difflib.get_close_matches(
                name, [k.split(".")[-1] for k in known], n=1, cutoff=0.6
            )
            hint = next((k for k in known if close and (k == close[0] or k.endswith("." + close[0]))), None)
            raise UserError(
                f"no config field '{field}'; did you mean --config.{hint}?"
                if hint
                else f"no config field '{field}'; fields are: {', '.join(known)}"
            )
        if depth < len(parents):
            node = node[part]
    old = node[name]
    if isinstance(old, ml_collections.ConfigDict):
        raise UserError(f"--config.{field} is a group of fields; set one of: {', '.join(f'{field}.{k}' for k in old)}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(old, str) and not isinstance(value, str):
        value = text  # model.remat=none and data.shards=2024 are words
    if isinstance(old, tuple) and isinstance(value, int | float):
        value = (value,) * len(old)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if old is not None and value is not None and type(old) is not type(value):
        raise UserError(
            f"--config.{field}={text} is a {type(value).__name__}, but the field takes a {type(old).__name__} (now {old!r})"
        )
    with node.ignore_type():
        node[name] = value


def flatten(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, object]:
    """All fields by their dotted names, in the order of the file."""
    fields: dict[str, object] = {}
    for key in config:
        value = config[key]
        if isinstance(value, ml_collections.ConfigDict):
            fields.update(flatten(value, f"{prefix}{key}."))
        else:
            fields[f"{prefix}{key}"] = value
    return fields


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ between two configs as plain dicts: dotted name -> (old, new); None where there is none."""
    before, after = (flatten(ml_collections.ConfigDict(plain)) for plain in (old, new))
    names = dict.fromkeys([*before, *after])
    return {n: (before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)}


def steps(duration: str, *, batch_size: int, examples: int, total: int | None = None) -> int:
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
    return round(number * per_unit)
