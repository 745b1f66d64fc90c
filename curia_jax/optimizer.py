"""AdamW with the schedule and the weight-decay mask of the MAE paper (He et al. 2021, appendix A.1)."""

from typing import Any

import jax
import ml_collections
import optax

# The reference decays what has more than one dimension in PyTorch. Names decide here, because biases of stacked blocks
# have two dimensions too. cls_token and mask_token are (1, 1, width) in the reference and therefore decayed.
DECAYED = ("kernel", "cls_token", "mask_token")


def decay_mask(params: Any) -> Any:
    """True for the parameters that are decayed, in the tree of `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def schedule(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then half a cosine to 0, per step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=max(total_steps, warmup_steps + 1),
        end_value=0.0,
    )


def make(
    config: ml_collections.ConfigDict, *, batch_size: int, warmup_steps: int, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW; the peak learning rate is `base_learning_rate` x batch_size / 256 (Goyal et al. 2017).

    Args:
      config: `config.optimizer` of a run: base_learning_rate, b1, b2, weight_decay, clip_norm (None for none).

    Returns:
      The transformation and its learning-rate schedule (step -> rate).
    """
    rate = schedule(config.base_learning_rate * batch_size / 256, warmup_steps, total_steps)
    adamw = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decay_mask)
    if config.clip_norm is None:
        return adamw, rate
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw), rate
