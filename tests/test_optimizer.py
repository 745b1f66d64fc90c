"""AdamW, its schedule and which parameters decay."""

import jax
import numpy as np
import pytest

from curia_jax import config as configs
from curia_jax import optimizer, sharding
from curia_jax.models import mae


def test_weight_decay_is_decided_by_parameter_name() -> None:
    params = jax.eval_shape(lambda: mae.init(mae.config(size="Ti"), jax.random.key(0)))
    decayed = {path for path, yes in sharding.paths(optimizer.decay_mask(params)).items() if yes}
    everything = set(sharding.paths(params))
    # Biases and norms of stacked blocks have two dimensions; they must not decay nevertheless.
    assert decayed == {p for p in everything if p.endswith(("kernel", "cls_token", "mask_token"))}
    assert not any("bias" in p or "scale" in p for p in decayed)
    assert "encoder/blocks/attn/qkv/kernel" in decayed


def test_schedule_warms_up_linearly_and_ends_at_zero() -> None:
    rate = optimizer.schedule(1e-3, warmup_steps=10, total_steps=110)
    assert float(rate(0)) == 0.0
    np.testing.assert_allclose([rate(5), rate(10), rate(60), rate(110)], [5e-4, 1e-3, 5e-4, 0.0], atol=1e-9)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_update_is_adamw_by_its_formula(clip: float | None) -> None:
    """AdamW by its formula (Loshchilov and Hutter 2019), with the learning rate scaled by batch / 256."""
    settings = configs.load("configs/demo.py", [f"--config.optimizer.clip_norm={clip}"]).optimizer
    transform, rate = optimizer.make(settings, batch_size=512, warmup_steps=1, total_steps=100)
    params = {"layer": {"kernel": np.full((2, 2), 3.0, np.float32), "bias": np.full(2, 3.0, np.float32)}}
    gradients = {"layer": {"kernel": np.full((2, 2), 2.0, np.float32), "bias": np.full(2, -2.0, np.float32)}}
    state = transform.init(params)
    _, state = transform.update(gradients, state, params)  # the first step has rate 0
    updates, _ = transform.update(gradients, state, params)
    peak = settings.base_learning_rate * 2
    assert float(rate(1)) == pytest.approx(peak)
    # With constant gradients m / sqrt(v) is the gradient's sign, whatever the clipping.
    np.testing.assert_allclose(updates["layer"]["kernel"], -peak * (1 + settings.weight_decay * 3.0), rtol=1e-4)
    np.testing.assert_allclose(updates["layer"]["bias"], peak, rtol=1e-4)
