"""A checkpoint as the model it holds: its config checked against its weights, ready to compute in float32."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from curia_common.errors import DataError
from curia_jax import checkpoint
from curia_jax import config as configs
from curia_jax.models import mae
from curia_jax.models.params import Params
from curia_jax.settings import Augment


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model, read without an accelerator.

    Attributes:
      config: float32 without rematerialisation, whatever it was trained in.
      params: weights of the encoder and the decoder.
      augment: how pixels are prepared.
      seed: of the run.
      step: optimizer steps taken.
      examples_seen: examples that these steps consumed.
      path: folder of the step.
      origin: whose weights the run started from; None where they were random.
    """

    config: mae.MAEConfig
    params: Params
    augment: Augment
    seed: int
    step: int
    examples_seen: int
    path: epath.Path
    origin: checkpoint.Origin | None = None

    @property
    def run_name(self) -> str | None:
        """Name of the work directory; None where the step's folder was copied out of one."""
        return self.path.parent.parent.name if self.path.parent.name == checkpoint.FOLDER else None


def load(path: str | Path, step: int | None = None) -> TrainedModel:
    """Reads a checkpoint.

    Args:
      path: a work directory, its `checkpoints` folder, or the folder of a step.
      step: the newest unless given.

    Raises:
      UserError: there is no finished checkpoint, or not of this step.
      DataError: the config names no model of this version, or its weights are of another model.
    """
    loaded = checkpoint.load(path, step)
    config: Any = configs.from_checkpoint(loaded.config)  # its fields have no static types
    known = {*config, *configs.flatten(config)}
    wanted = ("model", "seed", *(f"augment.{field.name}" for field in dataclasses.fields(Augment)))
    if missing := [name for name in wanted if name not in known]:
        raise DataError(
            f"the config of checkpoint {loaded.path} has no {missing[0]}; convert it with the version that trained it"
        )
    if not isinstance(config.model, ml_collections.ConfigDict) or type(config.seed) is not int:
        raise DataError(
            f"the config of checkpoint {loaded.path} is damaged: model or seed is of another type; copy it again"
        )
    return TrainedModel(
        config=model_config(config.model, loaded.params),
        params=loaded.params,
        augment=Augment.of(config.augment),
        seed=config.seed,
        step=loaded.step,
        examples_seen=loaded.examples_seen,
        path=epath.Path(loaded.path),
        origin=loaded.origin,
    )


def model_config(settings: ml_collections.ConfigDict, params: Params) -> mae.MAEConfig:
    """The model that weights belong to.

    Args:
      settings: the run's `model` settings, the arguments of `mae.config`.

    Raises:
      DataError: there is no such model, or its weights are not these.
    """
    try:
        config = mae.config(**{**settings.to_dict(), "dtype": "float32", "remat": "none"})
        mae.bind(config, params)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise DataError(f"the checkpoint does not hold the model of its config: {checkpoint.reason(error)}") from error
    return config


def digest(params: Params) -> str:
    """First 16 hex digits of the SHA-256 of all arrays and their names: equal for equal weights, wherever they are."""
    result = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        result.update(jax.tree_util.keystr(path).encode())
        result.update(np.ascontiguousarray(leaf).tobytes())
    return result.hexdigest()[:16]
