"""What a fine-tuning does beside training: it validates what it saves, and scores the test split once, with the weights chosen."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import pyarrow as pa
import scipy.special
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

import curia_common
from curia_common import logs
from curia_common.errors import DataError
from curia_jax import checkpoint, examples, hosts, storage, trained_model, trainer
from curia_jax import workdir as workdirs
from curia_jax.evaluate import finetuned, labels, metrics, table
from curia_jax.evaluate.preparation import Preparation
from curia_jax.evaluate.results import Fit, Provenance, Score
from curia_jax.evaluate.targets import Classes, Labels
from curia_jax.models.head import HeadConfig
from curia_jax.objectives import base, supervised
from curia_jax.run import Run
from curia_jax.settings import Augment
from curia_jax.task_cases import LabelledTask

LOSS = "validation_loss"  # metric of a checkpoint
_OF_TARGETS = ("target", "event", "weight")  # fields of a batch that predictions do not need

log = logs.get_logger(__name__)


def scores(head: HeadConfig, outputs: Float[np.ndarray, "cases outputs"]) -> Float[np.ndarray, "cases outputs"]:
    """Class probabilities, the probability of each label, values in the unit of the label, or log risks."""
    exact = outputs.astype(np.float64)
    if head.target == "classes":
        return scipy.special.softmax(exact, axis=1)
    if head.target == "labels":
        return scipy.special.expit(exact)
    return head.mean + head.scale * exact


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How the test split is scored.

    Attributes:
      backbone, head: names in the results.
      draws, seed: of the bootstrap.
      others: runs that this one is compared with.
    """

    backbone: str
    head: str
    draws: int
    seed: int
    others: tuple[finetuned.Finished, ...] = ()

    def key(self, chosen: workdirs.Selected) -> str:
        """Changes with everything that decides the results of a run."""
        others = [(other.place, other.backbone, other.data_sha256) for other in self.others]
        what = [
            curia_common.__version__,
            chosen.step,
            chosen.validation_loss,
            self.backbone,
            self.head,
            self.draws,
            self.seed,
            others,
        ]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


class Evaluation:
    """Validation and test of a run; see trainer.Evaluation.

    Args:
      splits: the cases of every split of the task.
      mesh: of the objective.
      slices: places for the slices of a case.
      canvas: height and width of the pixels in a batch.
      batch_size: cases, global.
      augment: how pixels are prepared.
    """

    def __init__(
        self, task: LabelledTask, splits: Mapping[str, examples.Cases], objective: supervised.SupervisedObjective, scoring: Scoring,
        *, mesh: Mesh, slices: int, canvas: tuple[int, int], batch_size: int, augment: Augment,
    ) -> None:  # fmt: skip
        self._task, self._splits, self._objective, self._scoring = task, splits, objective, scoring
        self._slices, self._canvas, self._batch_size, self._augment = slices, canvas, batch_size, augment
        self._mesh = mesh
        self._outputs = jax.jit(
            lambda params, batch: objective.predict(params, batch).outputs, out_shardings=NamedSharding(self._mesh, P())
        )

    def predict(self, params: base.Params, split: str, beat: trainer.Beat) -> Float[np.ndarray, "cases outputs"]:
        """The scores of every case of a split, on every host.

        Args:
          params: on the devices, as the objective has them.
        """
        cases, found = self._splits[split], []
        wanted = {
            name: shape for name, shape in self._objective.abstract_batch.items() if name not in _OF_TARGETS
        }  # fmt: skip
        batches = examples.scoring_batches(
            cases, batch_size=self._batch_size, slices=self._slices, canvas=self._canvas, process_index=hosts.number(),
            process_count=hosts.count(),
        )  # fmt: skip
        waiting = None
        with jax.set_mesh(self._mesh), base.memory_errors():
            for batch in batches:
                started = self._outputs(params, examples.to_devices(batch, wanted))
                if waiting is not None:
                    found.append(np.asarray(jax.device_get(waiting)))
                    beat(f"scoring the {split} split")
                waiting = started
            found.append(np.asarray(jax.device_get(waiting)))
        return scores(self._objective.head, np.concatenate(found)[: len(cases)])

    def validate(self, state: base.State, beat: trainer.Beat) -> Mapping[str, float]:
        """LOSS: mean over the validation cases of the log loss, the squared error, or the negative log partial likelihood."""
        found = self.predict({**state["params"], **state.get("average", {})}, labels.HELD_OUT, beat)
        loss = self._splits[labels.HELD_OUT].targets.loss(found) / len(found)
        if hosts.is_first():
            log.info(f"validation loss {loss:.4f}")
        return {LOSS: loss}

    def conclude(self, run: Run, beat: trainer.Beat) -> None:
        """Scores the test split with the weights of the smallest validation loss, where that has not been done.

        Raises:
          DataError: no checkpoint has one.
        """
        chosen = choose(run.workdir)
        key = self._scoring.key(chosen)
        if workdirs.selected(run.workdir) == chosen._replace(key=key):
            log.info(f"scored before; results are in {run.workdir}")
            return
        beat("scoring the test split")
        loaded = checkpoint.load(run.workdir, chosen.step)
        weights = loaded.averaged
        params = base.place(weights, self._objective.abstract_state["params"])
        held_out, test = (self.predict(params, split, beat) for split in (labels.HELD_OUT, labels.TEST))
        if not hosts.is_first():
            return
        objective = self._objective
        provenance = Provenance(
            weights_sha256=trained_model.digest(weights),
            preparation=Preparation.of(self._augment, objective.model.image_size).to_json(),
            image_size=objective.model.image_size, step=loaded.step, examples_seen=loaded.examples_seen,
        )  # fmt: skip
        found: list[Score] = []
        tables: list[pa.Table] = []
        decisions: dict[str, Float[np.ndarray, " outputs"]] = {}
        for number, one in enumerate(self._task.scored):
            of_test, of_held_out = (self._of_label(values, number) for values in (test, held_out))
            model = finetuned.Model(
                self._scoring.backbone, self._scoring.head, _features(objective.head),
                self._fit(number, of_held_out, chosen), provenance,
            )  # fmt: skip
            of_task, predictions, decisions[one.name] = finetuned.score(
                one, model, held_out=of_held_out, test=of_test, unit=self._task.unit, bagged=self._task.bagged,
                draws=self._scoring.draws, seed=self._scoring.seed, data_sha256=self._task.data_sha256,
                others=self._scoring.others,
            )  # fmt: skip
            found += of_task
            tables.append(predictions)
        finetuned.write(run.workdir, found, tables, decisions)
        selected = json.dumps(chosen._replace(key=key)._asdict(), indent=2) + "\n"
        storage.write_text(storage.root(run.workdir) / workdirs.SELECTED, selected)
        log.info(f"weights of step {chosen.step:,}, with the smallest validation loss, {chosen.validation_loss:.4f}")
        table.show(found)

    def _of_label(self, values: Float[np.ndarray, "cases outputs"], number: int) -> Float[np.ndarray, "cases scores"]:
        """Of several labels, the probabilities that one of them is absent and present."""
        if self._objective.head.target != "labels":
            return values
        present = values[:, [number]]
        return np.concatenate([1 - present, present], axis=1)

    def _fit(self, number: int, held_out: Float[np.ndarray, "cases scores"], chosen: workdirs.Selected) -> Fit:
        targets = self._splits[labels.HELD_OUT].targets
        if isinstance(targets, Labels):
            targets = Classes(targets.present[:, number].astype(np.int64), 2)
        area = float("nan")
        if isinstance(targets, Classes):
            area = float(metrics.auroc(targets.labels, held_out, np.ones((1, len(targets))))[0])
        width = self._objective.head.features(self._objective.model.width)
        loss = targets.loss(held_out) / len(targets)
        return Fit(width, "validation split", loss, area if math.isfinite(area) else None, {"step": chosen.step})


def _features(head: HeadConfig) -> str:
    return "tokens" if head.kind == "attentive" else head.pooling.replace("_", "+")


def choose(workdir: str) -> workdirs.Selected:
    """The checkpoint with the smallest validation loss; of equal ones the earliest.

    Raises:
      DataError: none has one.
    """
    folder = storage.root(workdir) / checkpoint.FOLDER
    found: Sequence[workdirs.Selected] = [
        workdirs.Selected(step, metrics_of[LOSS])
        for step in checkpoint.finished_steps(folder)
        if LOSS in (metrics_of := checkpoint.read_meta(folder / str(step)).metrics)
    ]
    if not found:
        raise DataError(
            f"no checkpoint in {workdir} has a validation loss, so that none can be chosen; fine-tune anew in another --workdir"
        )
    return min(found, key=lambda one: (one.validation_loss, one.step))
