"""Stage one: the loss of a masked autoencoder on random views, its sharding rows and its FLOPs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from curia_common.errors import UserError
from curia_jax import augment, optimizer, sharding
from curia_jax.models import mae
from curia_jax.objectives import base
from curia_jax.settings import Settings

RULES: sharding.Rules = (
    *sharding.encoder_rules("encoder"),
    *sharding.block_rules("decoder"),
    (r"decoder/(embed|pred)/kernel", P("fsdp", None)),
    (r"decoder/(embed|pred)/bias|decoder/mask_token", P()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAEObjective(base.Objective):
    """An Objective, and the configuration of its model."""

    model: mae.MAEConfig


def make(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    *,
    canvas: tuple[int, int],
    warmup_steps: int | float,
    total_steps: int | float,
    step_offset: int | float = 0,
) -> MAEObjective:
    """The objective of a run's config on a mesh.

    Args:
      config: a run's config; all of it is checked.
      canvas: height and width of the pixels in a batch.
      warmup_steps, total_steps, step_offset: of the learning rate, see optimizer.make.

    Raises:
      UserError: a setting is wrong, or image, patch, batch and mesh sizes do not fit together.
    """
    chosen = Settings.of(config)
    model_fields: Any = config.model
    try:
        model = mae.config(**model_fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.model: {error}") from error
    if model.encoder.channels != 1:
        raise UserError(
            f"config.model: channels is {model.encoder.channels}, but CT and MR slices have 1; set --config.model.channels=1"
        )
    transform, learning_rate = optimizer.make(
        chosen.optimizer, batch_size=chosen.batch_size, warmup_steps=warmup_steps, total_steps=total_steps,
        step_offset=step_offset,
    )  # fmt: skip

    def views_and_noise(
        batch: base.Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, "batch rows columns 1"], Float[Array, "batch patches"]]:
        view_key, mask_key = jax.random.split(key)
        with jax.named_scope("augment"):
            images = augment.training_view(batch, view_key, chosen.augment, model.encoder.image_size)
        return images, jax.random.uniform(mask_key, (images.shape[0], model.encoder.patches))

    def loss(
        params: base.Params, images: Float[Array, "batch rows columns 1"], noise: Float[Array, "batch patches"]
    ) -> tuple[Float[Array, ""], base.Metrics]:
        output = mae.bind(model, params)(images, noise)
        # Loss of predicting 0: the mean of each patch with norm_pix, `augment.image_mean` without.
        baseline = jnp.sum(jnp.mean(jnp.square(output.target), axis=-1) * output.mask) / jnp.sum(output.mask)
        return output.loss, {"baseline_loss": baseline}

    objective = base.make(
        init=lambda key: mae.init(model, key),
        prepare=views_and_noise,
        loss=loss,
        rules=RULES,
        optimizer=transform,
        learning_rate=learning_rate,
        mesh=mesh,
        batch_size=chosen.batch_size,
        example=base.slice_fields(canvas),
        seed=chosen.seed,
        gradient_dtype=jnp.dtype(model.encoder.dtype),
        # The backward pass has two matmuls for each of the forward pass.
        flops_per_example=3 * mae.flops(model),
        compiler_options=chosen.compiler_options,
        guard=chosen.guard,
        progress_format="loss {loss:.4f} (mean predictor {baseline_loss:.4f})",
    )
    return MAEObjective(**vars(objective), model=model)
