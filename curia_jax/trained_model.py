"""A checkpoint as the model it holds: its config checked against its weights, ready to compute in float32."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from curia_common.errors import DataError
from curia_jax import checkpoint, json_records, workdir
from curia_jax import config as configs
from curia_jax.models import head as heads
from curia_jax.models import lora, mae, vit
from curia_jax.models.params import Params
from curia_jax.settings import Augment


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What LoRA trained.

    Attributes:
      params: as `lora.init` makes them.
      base_encoder: weights of the encoder without them.
    """

    config: lora.LoRAConfig
    params: Params
    base_encoder: Params


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model, read without an accelerator.

    Attributes:
      config: float32 without rematerialisation, whatever it was trained in. After fine-tuning its fields of the decoder mean nothing.
      params: weights of the encoder and, after pretraining, the decoder; after fine-tuning the averaged ones, with adapters merged.
      augment: how pixels are prepared.
      seed: of the run.
      step: optimizer steps taken.
      examples_seen: examples that these steps consumed.
      path: folder of the step.
      origin: whose weights the run started from; None where they were random.
      head, head_params: of fine-tuning; None after pretraining.
      adapters: None where LoRA has trained none.
      task: what the run was fine-tuned for, `task` of its config; empty after pretraining.
    """

    config: mae.MAEConfig
    params: Params
    augment: Augment
    seed: int
    step: int
    examples_seen: int
    path: epath.Path
    origin: checkpoint.Origin | None = None
    head: heads.HeadConfig | None = None
    head_params: Params | None = None
    adapters: Adapters | None = None
    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def run_name(self) -> str | None:
        """Name of the work directory; None where the step's folder was copied out of one."""
        return self.path.parent.parent.name if self.path.parent.name == checkpoint.FOLDER else None


def load(path: str | Path, step: int | None = None) -> TrainedModel:
    """Reads a checkpoint.

    Args:
      path: a work directory, its `checkpoints` folder, or the folder of a step.
      step: unless given the newest, or of the work directory of a finished fine-tuned run the one that was chosen.

    Raises:
      UserError: there is no finished checkpoint, or not of this step.
      DataError: the config names no model of this version, or its weights are of another model.
    """
    if step is None and (selected := workdir.selected(path)) is not None:
        step = selected.step
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
    params: dict[str, Params] = loaded.averaged
    head, adapters = _head(config, params), _adapters(config, params)
    if adapters is not None:
        params["encoder"] = lora.merged(adapters.base_encoder, adapters.config, adapters.params)
    head_params = None
    if head is not None:
        head_params, params = params["head"], {"encoder": params["encoder"]}
    return TrainedModel(
        config=model_config(config.model, params, encoder_alone=head is not None),
        params=params,
        augment=Augment.of(config.augment),
        seed=config.seed,
        step=loaded.step,
        examples_seen=loaded.examples_seen,
        path=epath.Path(loaded.path),
        origin=loaded.origin,
        head=head,
        head_params=head_params,
        adapters=adapters,
        task=config.task.to_dict() if "task" in config else {},
    )


def _head(config: Any, params: Params) -> heads.HeadConfig | None:
    """The head that a run was fine-tuned with.

    Raises:
      DataError: there is no such head, or its weights are not these.
    """
    if "head" not in config:
        return None
    try:
        head = json_records.record(heads.HeadConfig, config.head.to_dict())
        width = params["encoder"]["patch_embed"]["kernel"].shape[1]
        heads.bind(head, width, params["head"])
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"the checkpoint does not hold the head of its config: {checkpoint.reason(error)}") from error
    return head


def _adapters(config: Any, params: Params) -> Adapters | None:
    if "lora" not in params:
        return None
    try:
        tune = config.finetune
        found = lora.LoRAConfig(tune.lora_rank, tune.lora_alpha, tuple(tune.lora_targets.split("+")))
        wanted = jax.eval_shape(lambda: lora.init(found, params["encoder"], jax.random.key(0)))
        shapes = [jax.tree.map(np.shape, tree) for tree in (wanted, params["lora"])]
        if shapes[0] != shapes[1]:
            raise ValueError("its adapters have other shapes")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"the checkpoint does not hold the adapters of its config: {checkpoint.reason(error)}"
        ) from error
    return Adapters(found, params["lora"], params["encoder"])


def model_config(settings: ml_collections.ConfigDict, params: Params, *, encoder_alone: bool = False) -> mae.MAEConfig:
    """The model that weights belong to.

    Args:
      settings: the run's `model` settings, arguments of `mae.config`.
      encoder_alone: there is no decoder.

    Raises:
      DataError: there is no such model, or its weights are not these.
    """
    try:
        config = mae.config(**{**settings.to_dict(), "dtype": "float32", "remat": "none"})
        if encoder_alone:
            vit.bind(config.encoder, params["encoder"])
        else:
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
