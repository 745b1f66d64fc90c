"""AdamW with the schedule, weight-decay mask and, for fine-tuning, layer decay of the MAE paper (He et al. 2021, appendix A)."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, PyTree

from curia_jax import settings

# The reference decays parameters with more than one dimension in PyTorch. Here names decide, because biases of stacked blocks
# have two dimensions too. cls_token and mask_token are (1, 1, width) in the reference and therefore decayed; so are the matrices of
# attentive heads and of adapters.
DECAYED = ("kernel", "cls_token", "mask_token", "queries", "value", "a", "b")


def decay_mask(params: PyTree) -> PyTree[bool]:
    """True for the parameters with weight decay, in the tree of `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def schedule(peak: float, warmup_steps: int | float, total_steps: int | float) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then half a cosine to 0, per step."""
    steps: Any = warmup_steps, max(total_steps, warmup_steps + 1)  # Optax's annotation has whole numbers alone
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=steps[0],
        decay_steps=steps[1],
        end_value=0.0,
    )


def layer_scales(params: PyTree, decay: int | float) -> PyTree[Float[Array, "..."]]:
    """What multiplies the learning rate of each parameter, to be broadcast to it, in the tree of `params`.

    As in facebookresearch/mae, `util/lr_decay.py`: decay^(depth - i) for block i of the encoder, from 0; decay^(depth + 1) for what
    comes before the blocks; 1 for what comes after them.
    """
    depth = params["encoder"]["blocks"]["norm1"]["scale"].shape[0]

    def scale(path: tuple[Any, ...], leaf: Any) -> Array:
        group, *rest = (part.key for part in path)
        if group != "encoder" or rest[0] == "norm":
            return jnp.ones(())
        if rest[0] != "blocks":
            return jnp.asarray(float(decay) ** (depth + 1), jnp.float32)
        powers = [float(decay) ** (depth - block) for block in range(depth)]
        return jnp.asarray(powers, jnp.float32).reshape(depth, *[1] * (len(leaf.shape) - 1))

    return jax.tree_util.tree_map_with_path(scale, params)


def make(
    config: settings.Optimizer | ml_collections.ConfigDict,
    *,
    batch_size: int,
    warmup_steps: int | float,
    total_steps: int | float,
    step_offset: int | float = 0,
    layer_decay: int | float = 1,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW; the peak learning rate is `base_learning_rate` x batch_size / 256 (Goyal et al. 2017).

    Args:
      config: the settings, or `config.optimizer` of a run, which is checked.
      step_offset: steps of this batch size that the examples of the run so far would make, less the steps it took; not 0 where an
        earlier start had another batch size. The schedule follows the examples.
      layer_decay: of fine-tuning, see `layer_scales`; 1 is one learning rate for all.

    Returns:
      The transformation and its learning-rate schedule (step -> rate).

    Raises:
      UserError: a setting of the wrong type or out of its range.
    """
    chosen = config if isinstance(config, settings.Optimizer) else settings.Optimizer.of(config)
    rate = schedule(chosen.base_learning_rate * batch_size / 256, warmup_steps, total_steps + step_offset)
    if step_offset:
        by_position, rate = rate, lambda count: by_position(count + step_offset)
    adamw = optax.adamw(rate, b1=chosen.b1, b2=chosen.b2, weight_decay=chosen.weight_decay, mask=decay_mask)
    # The state is that of AdamW alone, so that clipping can be turned on and off in a run.
    clip = None if chosen.clip_norm is None else optax.clip_by_global_norm(chosen.clip_norm)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if clip is not None:
            updates = clip.update(updates, optax.EmptyState())[0]
        updates, state = adamw.update(updates, state, params)
        if layer_decay != 1:
            updates = jax.tree.map(jnp.multiply, updates, layer_scales(params, layer_decay))
        return updates, state

    return optax.GradientTransformation(adamw.init, update), rate
