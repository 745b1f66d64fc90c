"""AdamW with the schedule and the weight-decay mask of the MAE paper (He et al. 2021, appendix A.1)."""

from typing import Any

import jax
import ml_collections
import optax
from jaxtyping import PyTree

from curia_jax import settings

# The reference decays parameters with more than one dimension in PyTorch. Here names decide, because biases of stacked blocks
# have two dimensions too. cls_token and mask_token are (1, 1, width) in the reference and therefore decayed.
DECAYED = ("kernel", "cls_token", "mask_token")


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


def make(
    config: settings.Optimizer | ml_collections.ConfigDict,
    *,
    batch_size: int,
    warmup_steps: int | float,
    total_steps: int | float,
    step_offset: int | float = 0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW; the peak learning rate is `base_learning_rate` x batch_size / 256 (Goyal et al. 2017).

    Args:
      config: the settings, or `config.optimizer` of a run, which is checked.
      step_offset: steps of this batch size that the examples of the run so far would make, less the steps it took; not 0 where an
        earlier start had another batch size. The schedule follows the examples.

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
    if chosen.clip_norm is None:
        return adamw, rate
    clip = optax.clip_by_global_norm(chosen.clip_norm)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return adamw.update(clip.update(updates, optax.EmptyState())[0], state, params)

    # The state is that of AdamW alone, so that clipping can be turned on and off in a run.
    return optax.GradientTransformation(adamw.init, update), rate
