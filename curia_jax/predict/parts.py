"""Predictions as they are made: in parts beside the output, so that a stopped command resumes."""

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curia_common import cli
from curia_common.errors import UserError
from data_pipeline.format import files
from data_pipeline.stages.exams import FileOutcome

METADATA = b"curia_jax.predict"  # key in the output's own metadata


class _Part(NamedTuple):
    """What is known of a part beside its rows: identity -> series of its exams, and outcomes of files by path."""

    exams: Mapping[str, str]
    files: Mapping[str, FileOutcome]


class Parts:
    """A private folder beside the output. A context manager, which removes it at the end unless it is left by an exception while it
    has parts.

    Args:
      output: the table to write in the end.
      request: text that decides all predictions; parts of another one are removed.

    Attributes:
      folder: for temporary files too.
      done: identities of the exams that are predicted.
      restarted: parts of another request were there, and are gone.
    """

    def __init__(self, output: Path, request: str) -> None:
        self._output, self._request = output, request
        self.folder = output.absolute().with_name(f".{output.name}.unfinished")
        name = self.folder / "request.json"
        self.restarted = False
        if self.folder.exists() and (not name.is_file() or name.read_text(encoding="utf-8") != request):
            self.restarted = any(self.folder.glob("part-*.json"))
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write beside --output={output}: {error.strerror}; name another one") from error
        files.write_text(name, request, private=True)
        self._known = {path: self._read(path) for path in sorted(self.folder.glob("part-*.json"))}
        self.done = {identity for part in self._known.values() for identity in part.exams}

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        if kind is None or not self._known:
            shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _read(path: Path) -> _Part:
        content = json.loads(path.read_bytes())
        return _Part(content["exams"], {name: FileOutcome(**one) for name, one in content["files"].items()})

    def add(self, exams: Mapping[str, str], rows: pa.Table, outcomes: Mapping[str, FileOutcome]) -> None:
        """Keeps the predictions of some exams.

        Args:
          exams: identity -> series.
          outcomes: of their files, by path.
        """
        path = self.folder / f"part-{len(self._known):06d}.json"
        files.write_table(path.with_suffix(".parquet"), rows, private=True)
        content = {"exams": dict(exams), "files": {name: one._asdict() for name, one in outcomes.items()}}
        files.write_text(path, json.dumps(content), private=True)
        self._known[path] = _Part(exams, outcomes)
        self.done |= set(exams)

    @property
    def outcomes(self) -> dict[str, FileOutcome]:
        """Outcomes of the files of all parts."""
        return {path: one for part in self._known.values() for path, one in part.files.items()}

    def count(self, wanted: Collection[str]) -> tuple[int, int]:
        """Rows that there are of the wanted exams, and series that have any."""
        series = [one for table in self._tables(wanted) for one in table["series"].to_pylist()]
        return len(series), len(set(series))

    def write(self, wanted: Collection[str], schema: pa.Schema) -> None:
        """Writes the output from the predictions of the wanted exams."""
        cli.commit()
        files.write_tables(self._output, schema, (table.cast(schema) for table in self._tables(wanted)))

    def _tables(self, wanted: Collection[str]) -> Iterator[pa.Table]:
        for path, part in self._known.items():
            series = [one for identity, one in part.exams.items() if identity in wanted]
            yield pq.read_table(path.with_suffix(".parquet")).filter(pc.field("series").isin(series))


def request_of(output: Path) -> str | None:
    """What decided the predictions of a finished table; None where there is none.

    Raises:
      UserError: a file of this name is something else.
    """
    if not output.exists():
        return None
    found = None
    with contextlib.suppress(OSError, pa.ArrowException):
        found = (pq.read_schema(output).metadata or {}).get(METADATA)
    if found is None:
        raise UserError(f"--output={output} holds something else; name another one, or remove it")
    return found.decode(errors="replace")


def left_out_path(output: Path) -> Path:
    """Where the files that were not predicted are listed."""
    return output.with_name(f"{output.stem}.left_out.csv")


def write_left_out(output: Path, outcomes: Mapping[str, FileOutcome], *, paths: bool) -> int:
    """Lists the files that are not kept; returns how many there are.

    Args:
      outcomes: of all files, by path, sorted; a file is named by its number among them, from 1.
      paths: names their paths too.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("number", "fate", "reason", *(("path",) if paths else ())))
    rows = [
        (number, one.fate, one.reason, *((os.fsencode(path).decode(errors="replace"),) if paths else ()))
        for number, (path, one) in enumerate(outcomes.items(), 1)
        if one.fate != "kept"
    ]
    writer.writerows(rows)
    target = left_out_path(output)
    if rows:
        files.write_text(target, text.getvalue())
    else:
        target.unlink(missing_ok=True)
    return len(rows)
