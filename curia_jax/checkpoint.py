"""Checkpoints: what is saved and how it is found again.

`<workdir>/checkpoints/<step>/` holds two items: `state`, the arrays of the train state, and `meta`, a small JSON (`Meta`).
The number of examples seen, together with the dataset it counts in, is the whole data state, so a run may be resumed with
another number of hosts or chips, or another batch size.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

import curia_common
from curia_common.errors import DataError, UserError

FOLDER = "checkpoints"
# Orbax writes it last, on every file system. It takes a folder without it, half copied say, for a checkpoint.
COMMITTED = "commit_success.txt"
State = TypeVar("State")


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


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself.

    Attributes:
      config: the run's config as plain JSON.
      examples_seen: examples that the steps consumed.
      dataset: what the run trained on; None in checkpoints of versions before 0.2.
      dataset_start: value of examples_seen at which training on `dataset` began.
      version: of this package when the checkpoint was saved; None in checkpoints of versions before 0.2.
    """

    config: Mapping[str, Any]
    examples_seen: int
    dataset: Dataset | None = None
    dataset_start: int = 0
    version: str | None = curia_common.__version__

    def to_json(self) -> dict[str, Any]:
        dataset = self.dataset and self.dataset._asdict()
        return {**vars(self), "config": dict(self.config), "dataset": dataset}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Meta":
        known = {field.name: content[field.name] for field in dataclasses.fields(cls) if field.name in content}
        dataset = content.get("dataset")
        return cls(**{"version": None, **known, "dataset": dataset and Dataset(**dataset)})


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint read without an accelerator.

    Attributes:
      params: nested dict of float32 numpy arrays.
      config: the run's config as a plain dict; `config["model"]` are the arguments of `mae.config`.
      step: optimizer steps taken.
      examples_seen: examples that the steps consumed.
      path: folder of this step.
    """

    params: dict[str, Any]
    config: dict[str, Any]
    step: int
    examples_seen: int
    path: str


class Checkpointer:
    """Saves and restores the train state of a work directory.

    Args:
      workdir: folder of the run.
      keep: newest checkpoints that stay.
      keep_every_steps: checkpoints at multiples of this stay for good; None for none.
    """

    def __init__(self, workdir: str, *, keep: int = 3, keep_every_steps: int | None = None) -> None:
        policies: list[Any] = [ocp.training.preservation_policies.LatestN(keep)]
        if keep_every_steps is not None:
            policies.append(ocp.training.preservation_policies.EveryNSteps(keep_every_steps))
        # The annotations of Orbax 0.12's policies contradict each other.
        any_policy: Any = ocp.training.preservation_policies.AnyPreservationPolicy(policies)
        # Without this Orbax takes `meta` for a tree of arrays and writes each of its numbers as one.
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
        # Orbax accepts a relative path here and fails at the first save.
        self._folder = epath.Path(workdir).expanduser().absolute() / FOLDER
        self._orbax = ocp.training.Checkpointer(
            self._folder, context=context, preservation_policy=any_policy, cleanup_tmp_directories=True
        )

    @property
    def latest_step(self) -> int | None:
        """Newest finished checkpoint."""
        return max(_finished_steps(self._folder), default=None)

    def save(self, step: int, state: PyTree, meta: Meta) -> None:
        """Starts saving in the background; waits first for a save that is still running."""
        # A folder of this step that exists is half written: a finished step is never saved again.
        items = {"state": state, "meta": meta.to_json()}
        self._orbax.save_checkpointables_async(step, items, force=True, overwrite=True)

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._orbax.wait()

    def restore(self, abstract: State) -> State:
        """The newest state, on the devices.

        Args:
          abstract: ShapeDtypeStructs with shardings; any mesh will do, whatever the one it was saved from.

        Raises:
          UserError: the checkpoint holds other tensors than `abstract` (another model size, say).
          DataError: the checkpoint cannot be read.
        """
        folder = self._folder / str(self.latest_step)
        _check_shapes(folder, abstract)
        with _reading(folder):
            return ocp.load_checkpointables(folder, {"state": abstract})["state"]

    def close(self) -> None:
        self._orbax.close()


@contextlib.contextmanager
def _reading(folder: epath.Path) -> Iterator[None]:
    """Raises DataError where a checkpoint cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"checkpoint {folder} is damaged ({reason}); remove this folder to resume from the one before"
        ) from error


def _read_meta(folder: epath.Path) -> Meta:
    with _reading(folder):
        return Meta.from_json(ocp.load_checkpointables(folder, {"meta": None})["meta"])


def _saved_tree(folder: epath.Path) -> Any:
    """Shapes and dtypes of the saved state."""
    with _reading(folder):
        tree = ocp.metadata(folder).metadata
        if tree is None:
            raise ValueError("its arrays are not readable")
        return tree


def _finished_steps(folder: epath.Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / COMMITTED).exists())


def _tensors(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    # A restored tree has plain containers where the live one has named tuples: compare names without the brackets.
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): tuple(leaf.shape)
        for path, leaf in leaves
    }


def check_fits(workdir: str, abstract: PyTree) -> None:
    """Raises UserError where the newest checkpoint holds other tensors than `abstract` (another model size, say)."""
    _check_shapes(find(workdir), abstract)


def _check_shapes(folder: epath.Path, abstract: PyTree) -> None:
    found = _tensors(_saved_tree(folder))
    wanted = _tensors(abstract)
    wrong = [
        f"{name} is {found[name]} in the checkpoint, {shape} in the config"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    missing = [f"{name} is not in the checkpoint" for name in wanted if name not in found]
    extra = [f"{name} is in the checkpoint alone" for name in found if name not in wanted]
    # Moments differ where their parameters do.
    problems = sorted(wrong + missing + extra, key=lambda problem: not problem.startswith("params/"))
    if problems:
        raise UserError(
            f"checkpoint {folder} does not fit this config's model (tensors that differ: {len(problems)}): {'; '.join(problems[:3])}"
            f"{'; …' if len(problems) > 3 else ''}. Use the config it was trained with, or another --workdir"
        )


def find(path: str, step: int | None = None) -> epath.Path:
    """The folder of one step.

    Args:
      path: a work directory, its `checkpoints` folder, or the folder of a step.
      step: the newest unless given.

    Raises:
      UserError: there is no finished checkpoint, or not of this step.
    """
    folder = epath.Path(path).expanduser().absolute()
    if not folder.exists():
        raise UserError(f"no checkpoint at {path}: there is no such folder")
    if (folder / FOLDER).exists():
        folder /= FOLDER
    if folder.name.isdigit() and (folder / COMMITTED).exists():
        if step not in (None, int(folder.name)):
            raise UserError(
                f"{path} is the checkpoint of step {folder.name}, not of {step}; leave --step out or name the work directory"
            )
        return folder
    steps = _finished_steps(folder)
    if not steps:
        raise UserError(
            f"no finished checkpoint in {path}; a work directory of curia_jax.pretrain has some in its folder {FOLDER}/"
        )
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {path}; there are: {', '.join(map(str, steps))}")
    return folder / str(steps[-1] if step is None else step)


def latest(workdir: str) -> tuple[int, Meta] | None:
    """Step of the newest checkpoint of a work directory, and what it says of itself; None where there is none.

    Raises:
      DataError: the checkpoint cannot be read.
    """
    folder = epath.Path(workdir).expanduser().absolute() / FOLDER
    steps = _finished_steps(folder)
    return (steps[-1], _read_meta(folder / str(steps[-1]))) if steps else None


def load(path: str | Path, step: int | None = None) -> Loaded:
    """Reads parameters and config as numpy, whatever mesh they were saved from. Needs no accelerator.

    Args:
      path: a work directory, its `checkpoints` folder, or the folder of a step.
      step: the newest unless given.

    Raises:
      UserError: there is no finished checkpoint, or not of this step.
      DataError: the checkpoint cannot be read.
    """
    folder = find(str(path), step)
    meta, shapes = _read_meta(folder), _saved_tree(folder)["params"]
    abstract = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context, _reading(folder):
        params = ocp.load_checkpointables(folder, {"state": {"params": abstract}})["state"]["params"]
    return Loaded(params, dict(meta.config), int(folder.name), meta.examples_seen, str(folder))
