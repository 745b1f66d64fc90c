"""Runs that were launched from this machine: a folder for each, below ~/.local/state/curia_jax/launch (XDG_STATE_HOME).

spec.json   the LaunchSpec
others      a target's own
"""

import difflib
import os
from pathlib import Path

from curia_common.errors import UserError
from launch.rendering import SPEC_FILE
from launch.spec import LaunchSpec


def folder_of(run: str) -> Path:
    """Folder of a run; it may not exist."""
    return _root() / run


def read(run: str) -> LaunchSpec:
    """The spec of a run that was launched.

    Raises:
      UserError: no such run, or its record is damaged.
    """
    path = folder_of(run) / SPEC_FILE
    if not path.is_file():
        names = sorted(other.parent.name for other in _root().glob(f"*/{SPEC_FILE}"))
        near = difflib.get_close_matches(run, names, n=3, cutoff=0.0)
        known = f"the nearest of {len(names)} are: {', '.join(near)}" if names else "none was launched from here"
        raise UserError(f"no run {run!r} was launched from this machine; {known}")
    try:
        return LaunchSpec.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); launch the run again with its command") from error


def write(spec: LaunchSpec) -> None:
    """Records a spec.

    Raises:
      UserError: a run of this name has another target, or another work directory or output.
    """
    folder = folder_of(spec.run)
    if (folder / SPEC_FILE).is_file():
        known = read(spec.run)
        if (known.target, known.place) != (spec.target, spec.place):
            raise UserError(
                f"run {spec.run} was launched on {known.target} with {known.place or known.command}; give this one another name with --run=NAME"
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SPEC_FILE).write_text(spec.to_json(), encoding="utf-8")


def _root() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state, "curia_jax", "launch")
