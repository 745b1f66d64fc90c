"""Runs tasks one after the other and writes their rows as they come.

The output folder holds results.json and results.csv, the rows of all tasks of the command and of the earlier ones into this
folder; and for each task a folder with its rows and its predictions. A task whose rows are there and whose inputs have not changed is not run again.
"""

import dataclasses
import hashlib
import json
import secrets
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from curia_common import logs
from curia_common.errors import DataError, StorageError, UserError, fault_location
from curia_common.exit_codes import ExitCode
from curia_jax.evaluate import statistics
from curia_jax.evaluate.corpus import Corpus
from curia_jax.evaluate.pictures import Picture
from curia_jax.evaluate.results import (
    FAILED,
    NOT_RUN,
    OK,
    RESULTS,
    TABLE,
    NotScored,
    Row,
    Score,
    Study,
    file_stem,
    predictions_path,
    read_rows,
    rows,
    to_csv,
)
from curia_jax.evaluate.subgroups import Column
from data_pipeline.format import files

CACHE = "cache"

log = logs.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tasks are scored.

    Attributes:
      heads: of scoring.HEADS.
      cases: "slice", or "series" where scores are averaged over its slices.
      draws, seed: of the bootstrap; the seed also decides the folds.
      few: how many labels heads learn from; see scoring.score.
      batch_size: slices at a time.
      subgroups: columns by which test cases are grouped; see subgroups.Column.
      corpora: in which the images of tasks are looked for.
      readouts: features that heads of the protocol `ours` may get, by name.
      across: column whose values heads of the protocol `ours` learn from one by one; see across.py. None takes all cases together.
      class_map: file of the map of shared classes; see class_map.py. None takes that of this package.
    """

    heads: tuple[str, ...]
    cases: str
    draws: int
    seed: int
    few: tuple[int | float, ...]
    batch_size: int
    subgroups: tuple[Column, ...] = ()
    corpora: tuple[Corpus, ...] = ()
    readouts: tuple[str, ...] = ()
    across: Column | None = None
    class_map: str | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """A task by one protocol.

    Attributes:
      task, protocol, across: as in results.
      key: text that changes with everything that decides the result.
      run: gives the scores and the predictions of the test cases; raises UserError where the task cannot be scored.
      not_run: why it is not run; None if it is.
      pictures: from numbers of test cases to what the report shows of them; None where they are read otherwise.
    """

    task: str
    protocol: str
    key: str = ""
    run: Callable[[], tuple[list[Score], pa.Table]] | None = None
    not_run: str | None = None
    across: str | None = None
    pictures: Callable[[Sequence[int]], Sequence[Picture]] | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcomes of the jobs.

    Attributes:
      rows: of all jobs, in their order, then those of other tasks that earlier commands left in the folder.
      own: how many of the rows are of the jobs.
      exit_code: DONE, or what the worst failure says.
    """

    rows: list[Row]
    own: int
    exit_code: ExitCode


def check_output(folder: Path) -> None:
    """Makes the output folder, and refuses one that cannot be written, before work is spent.

    Raises:
      UserError: it is a file, or nothing can be written in it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output={folder} is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{secrets.token_hex(4)}"
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise UserError(f"--output={folder} cannot be written ({error.strerror}); name another folder") from error


def run(jobs: Sequence[Job], output: Path) -> Outcome:
    """Runs the jobs that are not done; a job that fails is a row, and the others continue.

    Raises:
      OSError: the disk is full.
    """
    found: list[Row] = []
    earlier = _earlier(jobs, output)
    exit_code = ExitCode.DONE
    for number, job in enumerate(jobs, start=1):
        log.info(f"[{number}/{len(jobs)}] {job.task}, protocol {job.protocol}")
        try:
            found += _rows(job, output)
        except StorageError:
            raise
        except UserError as error:
            log.info(f"failed: {error}")
            found += rows([NotScored(job.task, job.protocol, FAILED, str(error), job.across)])
            exit_code = exit_code or ExitCode.DATA
        except (OSError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - one task must not end the others
            print("".join(traceback.format_exception(error)), end="", file=sys.stderr)
            log.info(f"failed: unforeseen fault ({fault_location(error)}); please report it")
            reason = f"unforeseen fault ({fault_location(error)})"
            found += rows([NotScored(job.task, job.protocol, FAILED, reason, job.across)])
            exit_code = ExitCode.FAULT
        _publish(with_holm([*found, *earlier]), output)
    return Outcome(with_holm([*found, *earlier]), len(found), exit_code)


def _earlier(jobs: Sequence[Job], output: Path) -> list[Row]:
    """Rows of results.json that none of the jobs makes: of other tasks, protocols, or across another column."""
    try:
        before = read_rows(output / RESULTS)
        for row in before:
            if row["status"] == OK:
                Score.from_row(row)
        known = {(job.task, job.protocol, job.across) for job in jobs}
        return [row for row in before if (row["task"], row["protocol"], row["across"]) not in known]
    except FileNotFoundError:
        return []
    except (DataError, KeyError, ValueError) as error:
        log.warning(f"{output / RESULTS} has rows that cannot be kept beside new ones ({error}); it is written anew")
        return []


def _rows(job: Job, output: Path) -> list[Row]:
    if job.run is None:
        log.info(f"not run: {job.not_run}")
        return rows([NotScored(job.task, job.protocol, NOT_RUN, job.not_run or "", job.across)])
    folder = output / job.task
    done = _done(output, job.task, job.protocol, job.across)
    key = hashlib.sha256(job.key.encode()).hexdigest()
    if done.is_file():
        try:
            before = json.loads(done.read_text(encoding="utf-8"))
            if before["key"] == key:
                log.info("done before")
                return before["rows"]
        except (ValueError, KeyError, TypeError):
            log.warning(f"{done} is damaged; the task is scored again")
    scores, predictions = job.run()
    made = rows(scores)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_table(predictions_path(output, scores[0].study), predictions)
    files.write_text(done, json.dumps({"key": key, "rows": made}, indent=1) + "\n")
    return made


def _done(output: Path, task: str, protocol: str, across: str | None) -> Path:
    return output / task / f"{file_stem(protocol, across)}.json"


def key_of(output: Path, study: Study) -> str:
    """The digest of everything that decided the results of a task that lie in the output folder; empty where none do."""
    try:
        return str(
            json.loads(_done(output, study.task, study.protocol, study.across).read_text(encoding="utf-8"))["key"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def with_holm(rows: Sequence[Row]) -> list[Row]:
    """The rows with `p_holm`: corrected over the tasks of the folder that compare the same two backbones by the same head and metric."""
    families: dict[tuple[Any, ...], list[int]] = {}
    for number, row in enumerate(rows):
        if row.get("p") is not None:
            family = tuple(
                row[name] for name in ("protocol", "backbone", "against", "head", "metric", "labels", "seed")
            )
            families.setdefault(family, []).append(number)
    corrected = list(rows)
    for members in families.values():
        for number, p in zip(members, statistics.holm([rows[member]["p"] for member in members]), strict=True):
            corrected[number] = {**rows[number], "p_holm": p}
    return corrected


def _publish(found: Sequence[Row], output: Path) -> None:
    files.write_text(output / RESULTS, json.dumps(list(found), indent=2) + "\n")
    files.write_text(output / TABLE, to_csv(found))
