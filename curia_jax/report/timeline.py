"""What was run, with which commands, and how long it took: the record that `curia_jax.demo` keeps and the report shows."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from curia_common.errors import DataError, UserError
from curia_jax import json_records


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage that was begun.

    Attributes:
      key: hash of everything that decides its result; a stage with another key is done again.
      done: finished.
      seconds: spent, over all attempts.
      title: for people.
      commands: of the latest attempt, as typed.
    """

    key: str
    done: bool
    seconds: float
    title: str
    commands: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The record of a series of stages.

    Attributes:
      data: folder of the user's exams as it stands in the commands; None for the phantom.
      cores: CPU cores of the machine.
      peak_bytes: memory of the largest process.
      stages: by name, in order.
      not_probed: label -> the reason.
      next: pairs of a purpose and the words to type.
    """

    data: str | None
    cores: int
    peak_bytes: int = 0
    stages: Mapping[str, Stage] = dataclasses.field(default_factory=dict)
    not_probed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    next: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(stage.seconds for stage in self.stages.values())

    def with_stage(self, name: str, stage: Stage | None) -> "Timeline":
        """Another timeline, with a stage added, replaced or (None) removed."""
        stages = {key: value for key, value in {**self.stages, name: stage}.items() if value is not None}
        return dataclasses.replace(self, stages=stages)

    def write(self, path: Path) -> None:
        """Replaces the file in one step."""
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def read(path: str | Path) -> Timeline:
    """A timeline that `write` wrote.

    Raises:
      UserError: no such file.
      DataError: it holds something else.
    """
    try:
        return json_records.record(Timeline, json_records.loads(Path(path).read_bytes()))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (ValueError, IsADirectoryError) as error:
        raise DataError(f"{path} is not the record that curia_jax.demo writes: {error}") from error
