"""Predictions as they are made: in parts beside the output, so that a stopped command resumes."""

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
    """A private folder beside the output, which is removed when that is written.

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
    def files(self) -> dict[str, FileOutcome]:
        """Outcomes of the files of all parts."""
        return {path: one for part in self._known.values() for path, one in part.files.items()}

    def write(self, wanted: Collection[str], schema: pa.Schema) -> int:
        """Writes the output from the predictions of the wanted exams; returns its rows. Keeps the parts."""

        def tables() -> Iterator[pa.Table]:
            for path, part in self._known.items():
                table = pq.read_table(path.with_suffix(".parquet"))
                series = [one for identity, one in part.exams.items() if identity in wanted]
                yield table.filter(pc.field("series").isin(series)).cast(schema)

        cli.commit()
        return files.write_tables(self._output, schema, tables())

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def finished(output: Path, request: str) -> bool:
    """Whether the output is there already.

    Raises:
      UserError: a file of this name is something else.
    """
    if not output.exists():
        return False
    try:
        found = (pq.read_schema(output).metadata or {}).get(METADATA)
    except (OSError, pa.ArrowException):
        found = None
    if found is not None and found.decode(errors="replace") == request:
        return True
    what = "predictions of other weights, inputs or options" if found is not None else "something else"
    raise UserError(f"--output={output} holds {what}; name another one, or remove it")


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
