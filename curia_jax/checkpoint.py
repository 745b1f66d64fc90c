"""Checkpoints: what is saved, how it is found again, and whether it is whole.

`<workdir>/checkpoints/<step>/` holds two items, `state`, the arrays of the train state, and `meta`, a small JSON (`Meta`); and
`digests.json`, the SHA-256 of every file of them. The first host writes it after Orbax has committed the checkpoint, in the
background. Digests of files belong to no mesh, so that hosts can share the work of checking them, whatever their number.

The number of examples seen, together with the dataset it counts in, is the whole data state, so a run may be resumed with
another number of hosts or chips, or another batch size.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

import curia_common
from curia_common import logs
from curia_common.errors import DataError, UserError
from curia_jax import json_records, storage

logger = logs.get_logger(__name__)

FOLDER = "checkpoints"
# Orbax writes it last, on every file system. It takes a folder without it, half copied say, for a checkpoint.
COMMITTED = "commit_success.txt"
DIGESTS = "digests.json"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not committed
# Arrays of zeros are compressed best, those of a state at its start say: 1,300 times.
_MOST_COMPRESSION, _ALWAYS_FITS = 5_000, 64 << 20


class Dataset(NamedTuple):
    """Identity of the slices that a run trains on.

    Attributes:
      fingerprint: SliceSource.fingerprint, over names, digests and counts of the shards.
      additions: newest addition among them; 0 where there is the first build alone.
      slices: their number.
    """

    fingerprint: str
    additions: int
    slices: int
    split: str


class Window(NamedTuple):
    """Examples `start` … `end` - 1 of the data stream, which a rolled back run does not train on."""

    start: int
    end: int


class Origin(NamedTuple):
    """The checkpoint whose weights a run started from.

    Attributes:
      place: as the user named it.
      step, examples_seen: of that checkpoint.
      weights: trained_model.digest of its parameters.
    """

    place: str
    step: int
    examples_seen: int
    weights: str


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself.

    Attributes:
      config: the run's config as plain JSON.
      examples_seen: examples that the steps consumed.
      dataset: what the run trained on; None in checkpoints of versions before 0.2.
      dataset_start: value of examples_seen at which training on `dataset` began.
      step: optimizer steps taken; None in checkpoints of versions before 0.3.
      step_examples: examples that a step in `config.duration` and `config.warmup` stands for: the batch size of the run's first
        start. None in checkpoints of versions before 0.3.
      skipped: windows of the data stream that the run jumped over; the stream is this much further than `examples_seen`.
      metrics: of the last step.
      origin: whose weights the run started from; None where they were random.
      version: of this package when the checkpoint was saved; None in checkpoints of versions before 0.2.
    """

    config: Mapping[str, Any]
    examples_seen: int
    dataset: Dataset | None = None
    dataset_start: int = 0
    step: int | None = None
    step_examples: int | None = None
    skipped: tuple[Window, ...] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    origin: Origin | None = None
    version: str | None = curia_common.__version__

    @property
    def position(self) -> int:
        """Examples of the data stream that are behind the run: seen or skipped."""
        return self.examples_seen + sum(window.end - window.start for window in self.skipped)

    def to_json(self) -> dict[str, Any]:
        # JSON has no NaN and no infinity.
        metrics = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        changed = {
            "config": dict(self.config),
            "dataset": self.dataset and self.dataset._asdict(),
            "origin": self.origin and self.origin._asdict(),
            "metrics": metrics,
        }
        return {**vars(self), **changed, "skipped": [list(window) for window in self.skipped]}

    @classmethod
    def from_json(cls, content: Any) -> "Meta":
        """Reads what `to_json` made, of this version or an earlier one.

        Raises:
          ValueError: a field is missing, of another type or below 0.
        """
        found = json_records.record(_SavedMeta, content)
        counts = (
            found.examples_seen,
            found.dataset_start,
            found.step or 0,
            *(end for window in found.skipped for end in window),
        )
        if min(counts) < 0 or any(start > end for start, end in found.skipped):
            raise ValueError("it counts fewer than 0 examples or steps")
        if found.step_examples is not None and found.step_examples < 1:
            raise ValueError(f"step_examples is {found.step_examples}")
        windows = tuple(Window(*window) for window in found.skipped)
        return cls(**{**vars(found), "skipped": windows})


@dataclasses.dataclass(frozen=True)
class _SavedMeta(Meta):
    """As JSON has it, where checkpoints before 0.2 have no version."""

    skipped: tuple[tuple[int, int], ...] = ()  # pyright: ignore[reportIncompatibleVariableOverride] - of Window
    version: str | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint read without an accelerator.

    Attributes:
      params: nested dict of float32 numpy arrays.
      config: the run's config as a plain dict; `config["model"]` are the arguments of `mae.config`.
      step: optimizer steps taken.
      examples_seen: examples that the steps consumed.
      path: folder of this step.
      origin: whose weights the run started from; None where they were random.
      average: the parts of the parameters that the run averages over its steps; empty where it does not.
    """

    params: dict[str, Any]
    config: dict[str, Any]
    step: int
    examples_seen: int
    path: str
    origin: Origin | None = None
    average: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def averaged(self) -> dict[str, Any]:
        """The parameters that count: averaged where the run averages."""
        return {**self.params, **self.average}


class Verdict(NamedTuple):
    """Whether the folder of a checkpoint holds what was saved.

    Attributes:
      problem: None where it does.
      checked: its files were compared with their digests; False in checkpoints of versions before 0.3, and where a run was killed
        before it wrote them.
    """

    path: str
    problem: str | None
    checked: bool


# ---- reading


def quiet() -> None:
    """Orbax raises what it also logs, there with hundreds of lines of stack per file."""
    logging.getLogger("absl").setLevel(logging.CRITICAL + 1)


@contextlib.contextmanager
def own_process(*, partial: bool = False) -> Iterator[None]:
    """Reading without waiting for the other hosts: one that fails must be able to say so."""
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    if jax.distributed.is_initialized():
        number = jax.process_index()
        context.multiprocessing.primary_host = number
        context.multiprocessing.active_processes = {number}
        context.multiprocessing.barrier_sync_key_prefix = f"host{number}"
    quiet()
    with context:
        yield


def reason(error: BaseException) -> str:
    """First line of an error, without the addresses and addenda of the libraries; the kind where there is no text."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0][:400]


@contextlib.contextmanager
def reading(folder: epath.Path) -> Iterator[None]:
    """Raises DataError where a checkpoint cannot be read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - Orbax and tensorstore raise all kinds
        raise DataError(
            f"checkpoint {folder} is damaged ({reason(error)}); copy it again or remove this folder to use the one before"
        ) from error


def read_meta(folder: epath.Path) -> Meta:
    with reading(folder):
        return Meta.from_json(json_records.loads((folder / "meta" / "data.json").read_bytes()))


def saved_tree(folder: epath.Path) -> Any:
    """Shapes and dtypes of the saved state."""
    with reading(folder):
        tree = ocp.metadata(folder).metadata
        if tree is None:
            raise ValueError("its arrays are not readable")
        return tree


def _step_folders(folder: epath.Path) -> list[int]:
    """Steps that have a folder, finished or not."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def finished_steps(folder: epath.Path) -> list[int]:
    return [step for step in _step_folders(folder) if (folder / str(step) / COMMITTED).exists()]


# ---- whether a checkpoint is whole


class _Digests(NamedTuple):
    """Size and SHA-256 of each file."""

    files: Mapping[str, tuple[int, str]]


def sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType] - epath says only IO


def check(folder: str | Path | epath.Path, *, part: int = 0, parts: int = 1) -> Verdict:
    """Compares the files of a checkpoint with their digests. Needs no accelerator.

    Args:
      folder: of a step.
      part, parts: compares every `parts`-th file, from number `part` on; the sizes of all.
    """
    root, meta = storage.root(folder), None
    if not (root / COMMITTED).exists():
        return Verdict(str(root), "it was not finished", checked=False)
    try:
        meta = read_meta(root)
        if root.name.isdigit() and meta.step not in (None, int(root.name)):
            raise ValueError(f"it holds step {meta.step}: its folder has to be called {meta.step}")
        if meta.step is not None and meta.examples_seen < meta.step:
            raise ValueError(f"it says {meta.examples_seen} examples after {meta.step} steps")
        if not (root / DIGESTS).exists():
            _read_state(root)
            return Verdict(str(root), None, checked=False)
        rows = json_records.record(_Digests, {"files": json_records.loads((root / DIGESTS).read_bytes())}).files
        for name, (size, _) in rows.items():
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"{DIGESTS} names a file outside it")
            if not (root / name).is_file():
                raise ValueError(f"{name} is missing")
            if (found := (root / name).stat().length) != size:
                raise ValueError(f"{name} has {found:,} bytes instead of {size:,}")
        mine = sorted(rows)[part::parts]
        with concurrent.futures.ThreadPoolExecutor() as threads:
            for name, digest in zip(mine, threads.map(lambda name: sha256(root / name), mine), strict=True):
                if digest != rows[name][1]:
                    raise ValueError(f"{name} has other bytes than were saved")
    except DataError as error:
        return Verdict(str(root), reason(error.__cause__ or error), checked=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, this one cannot be used
        return Verdict(str(root), reason(error), checked=True)
    return Verdict(str(root), None, checked=True)


def examine(workdir: str) -> list[Verdict]:
    """Every checkpoint of a work directory, the newest first, and then what was not finished."""
    folder = storage.root(workdir) / FOLDER
    steps = finished_steps(folder)
    rest = [p for p in folder.iterdir() if p.is_dir() and p.name not in map(str, steps)] if folder.is_dir() else []
    return [check(folder / str(step)) for step in reversed(steps)] + [
        Verdict(str(path), "it was not finished", checked=False) for path in sorted(rest)
    ]


def _first_whole(folders: Sequence[epath.Path], where: str) -> epath.Path:
    """The first checkpoint that is whole; those before it are named in the log. All hosts find the same.

    Raises:
      DataError: none is.
    """
    hosts, number = (jax.process_count(), jax.process_index()) if jax.distributed.is_initialized() else (1, 0)
    problems: list[str] = []
    for folder in folders:
        verdict = check(folder, part=number, parts=hosts)
        problem = verdict.problem
        if hosts > 1 and not multihost_utils.process_allgather(np.array(problem is None)).all():
            problem = problem or "another host found damage"
        if problem is None:
            for line in problems:
                logger.warning(f"skipped a damaged checkpoint: {line}; using step {folder.name}")
            if not verdict.checked:
                logger.info(f"checkpoint {folder} has no digests: not checked")
            return folder
        problems.append(f"{folder}: {problem}")
    raise DataError(f"no checkpoint in {where} is whole: {'; '.join(problems)}; copy one of them again")


# ---- finding


def find(path: str, step: int | None = None) -> epath.Path:
    """The folder of one step.

    Args:
      path: a work directory, its `checkpoints` folder, or the folder of a step, wherever it was copied.
      step: the newest unless given.

    Raises:
      UserError: there is no finished checkpoint, or not of this step.
    """
    return _candidates(path, step)[0]


def _candidates(path: str, step: int | None) -> list[epath.Path]:
    """The folders that may be meant, the first choice first."""
    folder = storage.root(path)
    if not folder.exists():
        raise UserError(f"no checkpoint at {path}: there is no such folder")
    if (folder / FOLDER).exists():
        folder /= FOLDER
    if (folder / COMMITTED).exists() and (folder / "meta").is_dir():
        if step is not None and step != (own := _step_of(folder, read_meta(folder))):
            raise UserError(
                f"{path} is the checkpoint of step {own}, not of {step}; leave --step out or name the work directory"
            )
        return [folder]
    steps = finished_steps(folder)
    if not steps:
        raise UserError(
            f"no finished checkpoint in {path}; a work directory of curia_jax.pretrain has some in its folder {FOLDER}/"
        )
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {path}; there are: {', '.join(map(str, steps))}")
    return [folder / str(one) for one in ([step] if step is not None else reversed(steps))]


def _step_of(folder: epath.Path, meta: Meta) -> int:
    """The step of a checkpoint. Those of versions before 0.3 have it in the name of their folder alone."""
    if meta.step is not None:
        return meta.step
    if not folder.name.isdigit():
        raise UserError(
            f"the checkpoint {folder} does not say its step; its folder has to be called by it, such as 800"
        )
    return int(folder.name)


def latest(workdir: str, *, good: bool = False) -> tuple[int, Meta] | None:
    """Step of the newest whole checkpoint of a work directory, and what it says of itself; None where nothing was saved.

    Args:
      good: the newest whose last update was applied.

    Where several hosts call it together they share the work and find the same.

    Raises:
      DataError: there are checkpoints, and none is whole.
    """
    folder = storage.root(workdir) / FOLDER
    finished = finished_steps(folder)
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        # A file system may show a new folder to one host before the others.
        newest = int(multihost_utils.broadcast_one_to_all(np.int32(finished[-1] if finished else -1)))
        finished = [step for step in finished if step < newest] + ([newest] if newest >= 0 else [])
    if good:
        finished = [step for step in finished if not read_meta(folder / str(step)).metrics.get("refused_updates", 0)]
    if not finished:
        return None
    for step in _step_folders(folder):
        if step > finished[-1]:
            logger.warning(f"skipped an unfinished checkpoint: {folder / str(step)}; using an older one")
    found = _first_whole([folder / str(step) for step in reversed(finished)], str(folder))
    return int(found.name), read_meta(found)


def _read_state(folder: epath.Path, *, only: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The saved state as numpy: all of it, or some of its parts."""
    tree = saved_tree(folder)
    with own_process(partial=True), reading(folder):
        wanted = {name: part for name, part in tree.items() if only is None or name in only}
        _check_claims(folder, wanted)
        abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), wanted)
        return ocp.load_checkpointables(folder, {"state": abstract})["state"]


def _check_claims(folder: epath.Path, tree: Any) -> None:
    """Raises ValueError where arrays are far larger than the files can hold: reading them would fill the memory."""
    claimed = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
    stored = sum(file.path.stat().length or 0 for file in storage.files(folder))
    if claimed > _ALWAYS_FITS + _MOST_COMPRESSION * stored:
        raise ValueError(f"its arrays claim {claimed:,} bytes, its files have {stored:,}")


def load(path: str | Path | epath.Path, step: int | None = None) -> Loaded:
    """Reads parameters and config as numpy, whatever mesh they were saved from. Needs no accelerator.

    Args:
      path: a work directory, its `checkpoints` folder, or the folder of a step, wherever it was copied.
      step: the newest whole one unless given.

    Raises:
      UserError: there is no finished checkpoint, or not of this step.
      DataError: the checkpoint is damaged.
    """
    folder = _first_whole(_candidates(str(path), step), str(path))
    meta = read_meta(folder)
    state = _read_state(folder, only=("params", "average", "step"))
    found = _step_of(folder, meta)
    if "params" not in state or np.shape(state.get("step", 0)) != ():
        raise DataError(f"checkpoint {folder} has no params, or more than one step; copy it again")
    if int(state.get("step", found)) != found:
        raise DataError(
            f"checkpoint {folder} says step {found}, but its state has taken {state['step']} steps; copy it again"
        )
    return Loaded(
        state["params"],
        dict(meta.config),
        found,
        meta.examples_seen,
        str(folder),
        meta.origin,
        state.get("average", {}),
    )
