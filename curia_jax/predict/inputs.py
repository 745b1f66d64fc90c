"""What is predicted: the series of exams or of a shard folder, a few at a time."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from curia_jax.predict import table
from data_pipeline.format import shards
from data_pipeline.format.shards import SliceSource
from data_pipeline.stages import exams
from data_pipeline.stages.exams import FileOutcome

SERIES_TOGETHER = 64  # of shards


class Part(NamedTuple):
    """Some series.

    Attributes:
      series: by identity, which changes with their slices.
      slices: of these and perhaps of other series; None where no slice is left.
      paths: of the series, where they come from exams.
      files: outcomes of their files, by path.
    """

    series: Mapping[str, str]
    slices: SliceSource | None
    paths: Mapping[str, str]
    files: Mapping[str, FileOutcome]


class Input(Protocol):
    """Series to predict.

    Attributes:
      series: all of them, by identity.
      files: all files, sorted by path; None for those whose outcome `read` tells.
    """

    series: Mapping[str, str]
    files: Mapping[str, FileOutcome | None]

    def read(self, without: Collection[str]) -> Iterator[Part]:
        """The series but for those with these identities. The slices of a part are there until the next one is asked for."""
        ...


class Shards:
    """All splits of a shard folder.

    Raises:
      UserError, DataError: as SliceSource.
    """

    def __init__(self, folder: str) -> None:
        splits = sorted(set(shards.read_shards(Path(folder))["split"].to_pylist()))
        self._source = SliceSource(folder, "+".join(splits))
        digest = self._source.fingerprint[:16]
        self.series: Mapping[str, str] = {f"{digest}/{series}": series for series in table.series_of(self._source)}
        self.files: Mapping[str, FileOutcome | None] = {}

    def read(self, without: Collection[str]) -> Iterator[Part]:
        """As Input."""
        todo = [item for item in self.series.items() if item[0] not in without]
        for start in range(0, len(todo), SERIES_TOGETHER):
            yield Part(dict(todo[start : start + SERIES_TOGETHER]), self._source, {}, {})


class Exams:
    """Exams below the inputs; see `exams.find` and `exams.read` for what they raise."""

    def __init__(self, inputs: Sequence[str], options: exams.Options, leave_out: Collection[str]) -> None:
        self._found, self._options = exams.find(inputs, options, leave_out), options
        self.series: Mapping[str, str] = {exam.identity: exam.series for exam in self._found.exams}
        self.files: Mapping[str, FileOutcome | None] = self._found.files

    def read(self, without: Collection[str]) -> Iterator[Part]:
        """As Input."""
        todo = [exam for exam in self._found.exams if exam.identity not in without]
        for group in exams.read(todo, self._options):
            series = {exam.identity: exam.series for exam in group.exams}
            yield Part(series, group.slices, {exam.series: exam.path for exam in group.exams}, group.files)
