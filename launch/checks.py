"""Checks of a command's config against its machines and its work directory, before anything is created.

What a launch decides, how many processes and devices there are, it sets itself where the config is for other machines.

The launcher gets the fields from the command itself (`--fields`), so that they are what it will read: config file, overrides and defaults.
Of commands without fields it lets their own parser read the options.
"""

import ast
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from curia_common import logs, mixtures
from curia_common.errors import StorageError, UserError
from launch import workdirs
from launch.spec import COMMANDS, LaunchSpec

# A run may resume with other values of these: they change how it runs, not what it computes.
_FREE = (
    "mesh.",
    "devices.",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "data.check_shards",
    "log_every",
    "keep",
    "save_",
)
_AXES = ("replica", "data", "fsdp")
SHARDS = "data.shards"
# Parses the words of a command; nothing else of it runs.
_PARSE = """
import importlib, importlib.util, sys
name = sys.argv[1]
if importlib.util.find_spec(name).submodule_search_locations is not None:
    name += ".__main__"
parser = getattr(importlib.import_module(name), "parser", None)
if parser is not None:
    parser().parse_args(sys.argv[2:])
"""

logger = logs.get_logger(__name__)


def check(spec: LaunchSpec, platform: str, *, allow_changes: bool = False, contact: bool = False) -> LaunchSpec:
    """Compares the config of a launch with its machines, and with the run that its work directory has.

    Args:
      platform: JAX backend of the processes.
      allow_changes: the work directory may be that of a run with other values.
      contact: a work directory in a bucket may be looked at; what cannot be looked at is compared by the run itself.

    Returns:
      The spec, with the words that make the config one for these machines.

    Raises:
      UserError: they do not go together, or the command refuses the config.
    """
    if not COMMANDS[spec.command].has_fields:
        parse_words(spec)
        return spec
    fields = fields_of(spec)
    added = (*_decided(spec, fields, platform), *_shards(spec, fields, contact=contact))
    _check_mesh(spec, fields)
    if not allow_changes and spec.workdir and workdirs.may_look(spec.workdir, contact=contact):
        _check_workdir(spec, spec.workdir, fields)
    if added:
        logger.info(f"added for {spec.topology}: {' '.join(added)}")
    return dataclasses.replace(spec, words=(*spec.words, *added))


def fields_of(spec: LaunchSpec) -> dict[str, Any]:
    """Every field of the config of a launch, by its dotted name.

    Raises:
      UserError: what the command says of a config that it refuses.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *spec.argv, "--fields"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if found.returncode:
        lines = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
        raise UserError(f"{spec.command} refuses its options: {lines[-1].removeprefix('error: ')}")
    pairs = (line.partition(" = ") for line in found.stdout.splitlines())
    return {name: ast.literal_eval(value) for name, _, value in pairs}


def parse_words(spec: LaunchSpec) -> None:
    """Lets a command parse its options, and do nothing else.

    Raises:
      UserError: what it says of those that it refuses.
    """
    command = [sys.executable, "-c", _PARSE, COMMANDS[spec.command].module, *spec.words]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        lines = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
        raise UserError(f"{spec.command} refuses its options: {lines[-1].rpartition('error: ')[2]}")


def _shards(spec: LaunchSpec, fields: Mapping[str, Any], *, contact: bool) -> tuple[str, ...]:
    """The shards of the config file as an option, which the targets look at.

    Raises:
      UserError: a submission without data.
    """
    if spec.option(spec.data_option) is not None:
        return ()
    if spec.data_option == mixtures.OPTION and fields[SHARDS]:
        return (f"{mixtures.OPTION}={fields[SHARDS]}",)
    missing = (
        f"{spec.data_option} is missing; add {spec.data_option}=… after {spec.command}, the folder of its training data"
    )
    if contact:
        raise UserError(missing)
    logger.info(f"a submission would end with: {missing}")
    return ()


def _decided(spec: LaunchSpec, fields: Mapping[str, Any], platform: str) -> tuple[str, ...]:
    """Words that set what the machines decide, where the config has it for other ones.

    Raises:
      UserError: what was typed is for other machines; names all of it.
    """
    there = spec.topology
    each = there.devices // there.hosts
    right: dict[str, tuple[Any, ...]] = {  # the first is set where the config has none of them
        "multihost": (True,) if there.hosts > 1 else (fields["devices.multihost"],),
        "platform": ("auto", platform),
        "cpu_count": (0, each) if platform == "cpu" else (0,),
    }
    wrong = {name: values[0] for name, values in right.items() if fields[f"devices.{name}"] not in values}
    typed = [name for name in wrong if spec.option(f"--config.devices.{name}") is not None]
    if typed:
        found = ", ".join(f"devices.{name}={fields[f'devices.{name}']}" for name in typed)
        options = " and ".join(f"--config.devices.{name}" for name in typed)
        raise UserError(
            f"{found}, but {there} has {there.hosts} hosts of {each} devices ({platform}); leave {options} out, the launch sets that"
        )
    return tuple(f"--config.devices.{name}={value}" for name, value in wrong.items())


def _check_mesh(spec: LaunchSpec, fields: Mapping[str, Any]) -> None:
    there = spec.topology
    sizes = [fields[f"mesh.{axis}"] for axis in _AXES]
    written = " x ".join(map(str, sizes))
    if sizes[0] not in (there.slices, -1):
        raise UserError(
            f"mesh.replica is {sizes[0]}, but there are {there.slices} TPU slices; add --config.mesh.replica={there.slices}"
        )
    fixed = math.prod(size for size in sizes if size != -1)
    free = sizes.count(-1)
    if free > 1 or fixed < 1 or there.devices % fixed or (not free and fixed != there.devices):
        fsdp = math.gcd(there.devices // there.slices, max(1, fields["mesh.fsdp"]))
        raise UserError(
            f"mesh {written} (replica x data x fsdp) does not make the {there.devices} devices of {there}; add "
            f"--config.mesh.replica={there.slices} --config.mesh.data=-1 --config.mesh.fsdp={fsdp}"
        )
    if fields["batch_size"] % there.devices:
        near = max(1, round(fields["batch_size"] / there.devices)) * there.devices
        raise UserError(
            f"batch_size {fields['batch_size']} is not a multiple of the {there.devices} devices of {there}; add --config.batch_size={near}"
        )


def _check_workdir(spec: LaunchSpec, workdir: str, fields: Mapping[str, Any]) -> None:
    try:
        text = workdirs.read(workdir, workdirs.CONFIG)
    except StorageError as error:
        if spec.target == "local":
            raise
        logger.info(f"{error}; the run itself compares its config with that of the checkpoints there")
        return
    if text is None:
        return
    path = f"{workdir.rstrip('/')}/{workdirs.CONFIG}"
    try:
        then = _flat(json.loads(text))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); choose another --workdir, or delete that file to resume"
        ) from error
    now = json.loads(json.dumps(fields))  # tuples as lists, as they were written
    free = (*_FREE, *COMMANDS[spec.command].fills)
    other = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name) and not name.startswith(free)]
    if other:
        changes = ", ".join(f"{name} {then.get(name)!r} -> {now.get(name)!r}" for name in other[:3])
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise UserError(
            f"{workdir} is the work directory of another config ({changes}{more}); choose another --workdir, or resume that run with "
            "these changes: --allow-changes"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names; as `--fields` writes them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
