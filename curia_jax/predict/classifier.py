"""A fine-tuned model, of a run or of an export, as a function of slices."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from curia_common.errors import UserError
from curia_jax import augment, data, trained_model
from curia_jax.convert import reading
from curia_jax.models import head, vit
from curia_jax.models.head import HeadConfig
from curia_jax.models.params import Params
from curia_jax.settings import Augment

SIDE = 128  # px; canvases are multiples of it, so that exams of a few sizes share a compiled program


class Scores(NamedTuple):
    """What a model says of cases.

    Attributes:
      outputs: probabilities of classes or labels, a value in its units, or a log hazard.
      by_slice: the same of each slice alone; of an attentive head its share in the decision, whatever the output.
    """

    outputs: Float[np.ndarray, "cases outputs"]
    by_slice: Float[np.ndarray, "cases slices outputs"]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A fine-tuned model on all local devices.

    Attributes:
      config: of the encoder, in float32.
      params: {"encoder": …, "head": …}.
      settings: how pixels are prepared.
      slices: most slices of a case; 1 of a model that was trained on single ones.
      step: of the run.
      digest: of all weights.
    """

    config: vit.ViTConfig
    head: HeadConfig
    params: Params
    settings: Augment
    slices: int
    step: int
    digest: str

    def scores(
        self, source: data.Slices, cases: list[Int[np.ndarray, " _slices"]], *, together: int, canvas: tuple[int, int]
    ) -> Scores:
        """Scores of cases.

        Args:
          cases: slice numbers of each, at most `slices`.
          together: cases at a time, over all devices; rounded up to a multiple of their number.
          canvas: height and width, px, that every slice fits into.

        Raises:
          DataError: a slice cannot be read.
        """
        count = len(jax.local_devices())
        together = -(-together // count) * count
        found: list[Scores] = []
        waiting: tuple[tuple[Array, Array], int] | None = None
        for start in range(0, len(cases), together):
            some = cases[start : start + together]
            numbers = np.zeros((together, self.slices), np.int64)
            valid = np.zeros((together, self.slices), bool)
            for place in range(together):
                one = some[min(place, len(some) - 1)]  # the last one fills the batch
                numbers[place] = np.pad(one, (0, self.slices - len(one)), mode="edge")
                valid[place, : len(one)] = True
            (batch,) = data.evaluation_batches(source, numbers.ravel(), batch_size=numbers.size, canvas=canvas)
            split = self._shardings[0]
            result = self._compiled(self._on_devices, data.to_devices(batch, split), jax.device_put(valid, split))
            if waiting is not None:
                found.append(self._fetched(*waiting))
            waiting = result, len(some)  # computed while the next slices are read
        if waiting is not None:
            found.append(self._fetched(*waiting))
        return Scores(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    @staticmethod
    def _fetched(computed: tuple[Array, Array], count: int) -> Scores:
        """The scores of the first cases of a batch, on the host."""
        return Scores(*(np.asarray(values)[:count] for values in jax.device_get(computed)))

    @functools.cached_property
    def _shardings(self) -> tuple[NamedSharding, NamedSharding]:
        devices = jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))
        return NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    @functools.cached_property
    def _on_devices(self) -> Params:
        return jax.device_put(self.params, self._shardings[1])

    @functools.cached_property
    def _compiled(self) -> jax.stages.Wrapped:
        return jax.jit(self._compute)

    def _compute(
        self, params: Params, batch: augment.Batch, valid: Bool[Array, "cases slices"]
    ) -> tuple[Float[Array, "cases outputs"], Float[Array, "cases slices outputs"]]:
        images = augment.evaluation_view(batch, self.settings, self.config.image_size)
        tokens = vit.bind(self.config, params["encoder"])(images)
        bound = head.bind(self.head, self.config.width, params["head"])
        cases, slices = valid.shape
        logits = bound(tokens.reshape(cases, slices, *tokens.shape[1:]), valid)
        if self.head.kind == "attentive":
            by_slice = jnp.broadcast_to(logits.attention[:, :, None], (cases, slices, self.head.outputs))
        else:
            alone = bound(tokens[:, None], jnp.ones((len(tokens), 1), bool)).outputs
            by_slice = self._units(alone).reshape(cases, slices, -1)
        return self._units(logits.outputs), jnp.where(valid[:, :, None], by_slice, -jnp.inf)

    def _units(self, outputs: Float[Array, "cases outputs"]) -> Float[Array, "cases outputs"]:
        if self.head.target == "classes":
            return jax.nn.softmax(outputs)
        if self.head.target == "labels":
            return jax.nn.sigmoid(outputs)
        return self.head.mean + self.head.scale * outputs


def canvas_of(source: data.Slices) -> tuple[int, int]:
    """A canvas that every slice of the source fits into."""
    height, width = (-(-side // SIDE) * SIDE for side in source.largest)
    return height, width


def load(weights: str, step: int | None = None, *, otherwise: Augment) -> Classifier:
    """The model of a fine-tuned run, or of a classifier that curia_jax.convert wrote.

    Args:
      step: of a run; the newest unless given.
      otherwise: settings of the preparation that an export does not state and that evaluation does not use.

    Raises:
      UserError: there is no such run or export, it has no head, or its head needs region masks.
      DataError: it is damaged.
    """
    if "://" not in weights and reading.is_export(Path(weights)):
        if step is not None:
            raise UserError(f"--step is of a work directory, but {weights} is an export; leave it out")
        export = reading.read(Path(weights))
        found, config, encoder, settings = export, export.config, export.params, export.augment(otherwise)
        masked, slices = False, export.slices
    else:
        run = trained_model.load(weights, step)
        found, config, encoder, settings = run, run.config.encoder, run.params["encoder"], run.augment
        masked, slices = bool(run.task.get("masked", False)), int(run.task.get("slices", 1))
    if found.head is None or found.head_params is None:
        raise UserError(
            f"--weights={weights} has no head: it is an encoder; name a work directory of curia_jax.finetune, or an export of one "
            "with a layout of a classifier"
        )
    if masked:
        raise UserError(
            f"--weights={weights} was trained with region masks, which exams do not have; score it with curia_jax.finetune or "
            "evaluate on tasks that have them"
        )
    if config.channels != 1:
        raise UserError(f"--weights={weights} takes {config.channels} channels, but a slice has 1")
    params = {"encoder": encoder, "head": found.head_params}
    return Classifier(config, found.head, params, settings, slices, found.step, trained_model.digest(params))
