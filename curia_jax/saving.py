"""Saving checkpoints in the background, which of them stay, and restoring one to the devices."""

import concurrent.futures
import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import optax
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from curia_common.errors import StorageError, UserError
from curia_jax import checkpoint, storage

State = TypeVar("State")
REMOVED = "removed.txt"  # in place of the commit marker while a checkpoint is removed
# Orbax measures its time limit with a clock that may be set, and gives up a save where it jumps. Our limit runs on one that cannot.
_ORBAX_SECONDS, _SAVE_SECONDS = 10 * 86_400, 1200


class Ended(NamedTuple):
    """A save that has ended.

    Attributes:
      problem: None where the checkpoint is on disk.
      seconds: from the request to the end.
    """

    step: int
    examples_seen: int
    problem: str | None
    seconds: float


class Checkpointer:
    """Saves and restores the train state of a work directory.

    Args:
      workdir: folder of the run.
      keep: newest checkpoints that stay.
      keep_every_steps: checkpoints at multiples of this stay for good; None for none.
      keep_best: the checkpoint with the lowest value of this metric stays for good; None for none.
    """

    def __init__(
        self, workdir: str, *, keep: int = 3, keep_every_steps: int | None = None, keep_best: str | None = None
    ) -> None:
        checkpoint.quiet()
        self._keep, self._keep_every, self._keep_best = keep, keep_every_steps, keep_best
        # Orbax accepts a relative path and fails at the first save.
        self._folder = storage.root(workdir) / checkpoint.FOLDER
        # Without this Orbax takes `meta` for a tree of arrays and writes each of its numbers as one.
        self._context = ocp.Context()
        self._context.checkpointables.registry = ocp.handlers.local_registry()
        self._context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
        self._context.asynchronous.timeout_secs = _ORBAX_SECONDS
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: concurrent.futures.Future[Ended] | None = None
        self._ended: list[Ended] = []

    @property
    def latest_step(self) -> int | None:
        """Newest finished checkpoint."""
        return max(checkpoint.finished_steps(self._folder), default=None)

    def save(self, step: int, state: PyTree, meta: checkpoint.Meta) -> None:
        """Starts a save in the background, after waiting for one that is still running. Failures are reported by `ended`.

        Raises:
          StorageError: the previous save does not end.
        """
        self.wait()
        began = time.monotonic()
        items = {"state": state, "meta": dataclasses.replace(meta, step=step).to_json()}
        try:
            if jax.process_index() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                _remove_unfinished(self._folder)
            # A folder of this step that exists is half written: a finished step is never saved again.
            with self._context:
                response = ocp.save_checkpointables_async(self._folder / str(step), items, overwrite=True)
        except Exception as error:  # noqa: BLE001 - Orbax and tensorstore raise all kinds
            seconds = time.monotonic() - began
            self._ended.append(Ended(step, meta.examples_seen, checkpoint.reason(error), seconds))
            return
        self._running = self._background.submit(self._complete, step, meta.examples_seen, response, began)

    def _complete(self, step: int, examples_seen: int, response: Any, began: float) -> Ended:
        """In the background: waits for Orbax, then writes the digests and removes what need not stay."""
        try:
            response.result()  # also ends the thread and closes the files of this save
            if jax.process_index() == 0:
                _write_digests(self._folder / str(step))
                self._remove_old()
        except Exception as error:  # noqa: BLE001
            return Ended(step, examples_seen, checkpoint.reason(error), time.monotonic() - began)
        return Ended(step, examples_seen, None, time.monotonic() - began)

    def ended(self) -> list[Ended]:
        """The saves that have ended since the last call. Does not wait."""
        if self._running is not None and self._running.done():
            self._ended.append(self._running.result())
            self._running = None
        ended, self._ended = self._ended, []
        return ended

    def wait(self) -> None:
        """Returns when no save is running any more.

        Raises:
          StorageError: it does not end, because storage or another host is stuck.
        """
        if self._running is not None:
            try:
                self._ended.append(self._running.result(_SAVE_SECONDS))
            except TimeoutError as error:
                raise StorageError(
                    f"a save to {self._folder} has not ended after {_SAVE_SECONDS // 60} minutes: storage or another host is stuck; "
                    "rerun the same command to resume from the newest checkpoint"
                ) from error
            self._running = None

    def _remove_old(self) -> None:
        steps = checkpoint.finished_steps(self._folder)
        stay = set(steps[-self._keep :])
        if self._keep_every is not None:
            stay.update(step for step in steps if step % self._keep_every == 0)
        if self._keep_best is not None:
            metrics = {step: checkpoint.read_meta(self._folder / str(step)).metrics for step in steps}
            values = {step: found[self._keep_best] for step, found in metrics.items() if self._keep_best in found}
            stay.update(sorted(values, key=lambda step: values[step])[:1])
        for step in steps:
            if step not in stay:
                remove_checkpoint(self._folder / str(step))

    def restore(self, abstract: State, *, step: int | None = None, since: Mapping[str, PyTree] | None = None) -> State:
        """A state on the devices.

        Args:
          abstract: ShapeDtypeStructs with shardings; the mesh may differ from the one it was saved from.
          step: the newest unless given.
          since: top-level parts that checkpoints of earlier versions lack, and what they are taken to be there.

        Raises:
          UserError: the checkpoint holds other tensors than `abstract` (such as those of another model size).
          DataError: the checkpoint cannot be read.
        """
        folder = self._folder / str(self.latest_step if step is None else step)
        layout = _layout(folder, abstract, since or {})
        with checkpoint.own_process(), checkpoint.reading(folder):
            restored = ocp.load_checkpointables(folder, {"state": layout.saved})["state"]
            state = layout.to_current(restored)
            found = int(jax.device_get(state["step"])) if "step" in state else int(folder.name)
            if found != int(folder.name):
                raise ValueError(f"its state has taken {found} steps")
        return state

    def close(self) -> None:
        """Waits for a save that is still running."""
        try:
            self.wait()
        finally:
            self._background.shutdown(wait=self._running is None)


# ---- files


def _remove_unfinished(folder: epath.Path) -> None:
    """Removes what saves and removals that failed or were killed have left."""
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(Exception):  # whatever storage raises: it is tried again at the next save
            if checkpoint.UNFINISHED in path.name:
                storage.remove(path)
            elif path.name.isdigit() and ((path / REMOVED).exists() or _is_unfinished(path)):
                remove_checkpoint(path)


def _is_unfinished(folder: epath.Path) -> bool:
    """Whether this is what a save has left. In a bucket Orbax writes to the folder of the step itself, and its marker last."""
    if storage.is_bucket(folder):
        return not (folder / checkpoint.COMMITTED).exists()
    return not any(folder.iterdir())


def remove_checkpoint(folder: epath.Path) -> None:
    """Removes a checkpoint. Where that is interrupted, what is left does not look like one, and says that it may go."""
    (folder / REMOVED).write_text("")
    (folder / checkpoint.COMMITTED).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            storage.remove(path)
        elif path.name != REMOVED:
            path.unlink()
    storage.remove(folder)


def _write_digests(folder: epath.Path) -> None:
    """Writes the size and the SHA-256 of every file of a checkpoint beside them."""
    files = [file for file in storage.files(folder) if file.path.name != checkpoint.DIGESTS]
    rows = {name: [path.stat().length, checkpoint.sha256(path)] for name, path in files}
    storage.write_text(folder / checkpoint.DIGESTS, json.dumps(rows, indent=0))


# ---- whether it fits


def tensors(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    # A restored tree has plain containers where the live one has named tuples: compare names without the brackets.
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): tuple(leaf.shape)
        for path, leaf in leaves
    }


class _Layout(NamedTuple):
    """How the saved state is arranged, and how it becomes one of this version."""

    saved: Any
    to_current: Any


def _layout(folder: epath.Path, abstract: Any, since: Mapping[str, PyTree]) -> _Layout:
    """The arrangement of a checkpoint, of this version or an earlier one.

    Raises:
      UserError: it holds other tensors than `abstract`.
    """
    found = tensors(checkpoint.saved_tree(folder))
    added = {name: value for name, value in since.items() if not any(path.split("/")[0] == name for path in found)}
    saved = {name: part for name, part in abstract.items() if name not in added}
    # Before 0.3 a run with optimizer.clip_norm had the optimizer's state in a pair, after that of the clipping, which is empty.
    paired = "opt_state" in saved and any(path.startswith("opt_state/1/0/") for path in found)
    if paired:
        saved["opt_state"] = (optax.EmptyState(), saved["opt_state"])

    def to_current(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, **({"opt_state": state["opt_state"][1]} if paired else {}), **added}

    check_tensors(folder, found, saved, "Use the config it was trained with, or another --workdir")
    return _Layout(saved, to_current)


def check_fits(workdir: str, abstract: PyTree, *, since: Mapping[str, PyTree] | None = None) -> None:
    """Raises UserError where the newest checkpoint holds other tensors than `abstract` (such as those of another model size)."""
    _layout(checkpoint.find(workdir), abstract, since or {})


def check_tensors(
    folder: epath.Path | str, found: Mapping[str, tuple[int, ...]], abstract: PyTree, remedy: str
) -> None:
    """Raises UserError, with a remedy, where a checkpoint holds other tensors than `abstract`."""
    wanted = tensors(abstract)
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
            f"{'; …' if len(problems) > 3 else ''}. {remedy}"
        )
