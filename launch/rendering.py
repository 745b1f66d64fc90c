"""The rendering of a LaunchSpec, and the interface of a target."""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from curia_common.errors import UserError
from launch.spec import OPEN, LaunchSpec, option_name

COMMANDS_FILE, SPEC_FILE = "commands.sh", "spec.json"
_PLACEHOLDER = re.compile(f"<({'|'.join(OPEN)})>")


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Everything that a submission sends, complete and validated.

    Attributes:
      files: name -> text; commands name them relative to the folder that they are written to.
      commands: what a submission runs there, in order: argument lists.
      links: title -> address of logs and dashboards, for printing.
      notes: what the user should know before a submission, a line each.
      lacking: what this machine does not have and a submission needs, with the remedy; "" for nothing.
    """

    files: Mapping[str, str]
    commands: tuple[tuple[str, ...], ...]
    links: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    lacking: str = ""

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Fields of the spec that were not given and stand as `<field>` in files or commands."""
        texts = [*self.files.values(), *(word for command in self.commands for word in command)]
        found = {name for text in texts for name in _PLACEHOLDER.findall(text)}
        return tuple(name for name in OPEN if name in found)

    @property
    def script(self) -> str:
        """The text of commands.sh."""
        lines = "".join(f"{shlex.join(command)}\n" for command in self.commands)
        return f'#!/bin/sh\nset -eu\ncd "$(dirname "$0")"\n{lines}'

    def write(self, folder: Path, spec: LaunchSpec) -> None:
        """Writes all files, commands.sh and spec.json.

        Raises:
          UserError: the folder holds something else.
        """
        texts = {**self.files, COMMANDS_FILE: self.script, SPEC_FILE: spec.to_json()}
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output={folder} is a file; name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / SPEC_FILE).is_file():
            raise UserError(f"--output={folder} is not empty and no folder of an earlier dry run; name another folder")
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            if name.endswith(".sh"):
                (folder / name).chmod(0o755)

    def check_complete(self) -> None:
        """Raises UserError where a placeholder is left, which a submission cannot send, or this machine lacks something."""
        if self.placeholders:
            missing = ", ".join(f"{option_name(name)}=…" for name in self.placeholders)
            raise UserError(f"not given, and needed to submit: {missing}; --dry-run goes without")
        if self.lacking:
            raise UserError(self.lacking)


def bash_array(name: str, words: Sequence[str]) -> str:
    """An assignment to an array of bash, a word in a line."""
    quoted = ("'" + word.replace("'", "'\\''") + "'" for word in words)
    return "\n  ".join([f"{name}=(", *quoted]) + "\n)\n"


@runtime_checkable
class Target(Protocol):
    """A module of launch/ that brings runs to one kind of machines. launch.__main__ lists them in TARGETS.

    `render` contacts nothing and has no effect. The others get the spec as it was submitted (launch.records keeps it).
    """

    def render(self, spec: LaunchSpec) -> Rendering:
        """Renders the spec and validates what it rendered.

        Raises:
          UserError: this target cannot serve the spec, or what came out is invalid.
        """
        ...

    def submit(self, spec: LaunchSpec, rendering: Rendering) -> int:
        """Sends a complete rendering; the user has agreed, and the record is written. Returns the exit code of the launch."""
        ...

    def status(self, spec: LaunchSpec) -> str:
        """The state of the run, a line for each fact."""
        ...

    def logs(self, spec: LaunchSpec, *, follow: bool) -> int:
        """Prints what the processes wrote; `follow` continues until the run has ended. Returns an exit code."""
        ...

    def stop(self, spec: LaunchSpec) -> str:
        """Asks the run to save and end, and waits until no process is left. Returns what happened, one line."""
        ...

    def restart(self, spec: LaunchSpec) -> int:
        """Stops the run where it is alive, then submits it again, with new restart budgets. Returns an exit code."""
        ...
