"""Checks of a command's config against its machines and its work directory, before anything is created.

The fields are asked of the command itself (`--fields`), so that they are what it will read: config file, overrides and defaults.
"""

import ast
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curia_common.errors import UserError
from launch.spec import COMMANDS, LaunchSpec

CONFIG = "config.json"
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


def check(spec: LaunchSpec, platform: str, *, allow_changes: bool = False) -> None:
    """Compares the config of a launch with its machines, and with the run that its work directory has.

    Args:
      platform: JAX backend of the processes.
      allow_changes: the work directory may be that of a run with other values.

    Raises:
      UserError: they do not go together, or the command refuses the config.
    """
    if not COMMANDS[spec.command].has_fields:
        return
    fields = fields_of(spec)
    _check_devices(spec, fields, platform)
    _check_mesh(spec, fields)
    if not allow_changes:
        _check_workdir(spec, fields)


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


def _check_devices(spec: LaunchSpec, fields: Mapping[str, Any], platform: str) -> None:
    there = spec.topology
    each = there.devices // there.hosts
    if there.hosts > 1 and not fields["devices.multihost"]:
        raise UserError(
            f"devices.multihost is False, but {there} has {there.hosts} hosts; add --config.devices.multihost=True"
        )
    if fields["devices.platform"] not in ("auto", platform):
        raise UserError(
            f"devices.platform is {fields['devices.platform']!r}, but {spec.target} runs on {platform}; add --config.devices.platform=auto"
        )
    if fields["devices.cpu_count"] not in (0, each if platform == "cpu" else 0):
        raise UserError(
            f"devices.cpu_count is {fields['devices.cpu_count']}, but {there} has {each} devices per host; add --config.devices.cpu_count=0"
        )


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


def _check_workdir(spec: LaunchSpec, fields: Mapping[str, Any]) -> None:
    """A work directory in a bucket is not looked at: the run itself compares it with its checkpoints."""
    path = Path(spec.workdir or "", CONFIG)
    if not spec.workdir or not path.is_file():
        return
    try:
        then = _flat(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); choose another --workdir, or delete that file to resume"
        ) from error
    now = json.loads(json.dumps(fields))  # tuples as lists, as they were written
    other = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name) and not name.startswith(_FREE)]
    if other:
        changes = ", ".join(f"{name} {then.get(name)!r} -> {now.get(name)!r}" for name in other[:3])
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise UserError(
            f"{spec.workdir} is the work directory of another config ({changes}{more}); choose another --workdir, or resume that run with "
            "these changes: --allow-changes"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names; as `--fields` writes them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
