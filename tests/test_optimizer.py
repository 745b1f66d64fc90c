"""AdamW, its schedule and which parameters decay."""

import jax
import numpy as np
import pytest

from curia_jax import config as configs
from curia_jax import optimizer, sharding
from curia_jax.models import mae, vit


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


def test_layer_scales_are_those_of_the_mae_code() -> None:
    """Transcription of facebookresearch/mae, util/lr_decay.py, for the names of timm; `norm` and `head` are after the blocks."""
    depth, decay = 3, 0.65

    def layer_of(name: str) -> int:
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1

    scale_of = [decay ** (depth + 1 - layer) for layer in range(depth + 2)]
    model = vit.config("custom", width=8, depth=depth, heads=2, image_size=8, patch_size=4)
    params = {
        "encoder": jax.eval_shape(lambda: vit.init(model, jax.random.key(0))),
        "head": {"kernel": np.zeros((8, 2))},
    }
    found = sharding.paths(optimizer.layer_scales(params, decay))
    assert found.keys() == sharding.paths(params).keys()
    for path, scales in found.items():
        timm = path.removeprefix("encoder/").replace("/", ".")
        if "blocks" in path:
            names = [timm.replace("blocks.", f"blocks.{block}.") for block in range(depth)]
            np.testing.assert_allclose(np.ravel(scales), [scale_of[layer_of(name)] for name in names], rtol=1e-6)
        else:
            assert float(scales) == pytest.approx(scale_of[layer_of(timm)])


def test_layer_decay_multiplies_the_whole_update() -> None:
    """Weight decay too, as a learning rate of its own for each group does in PyTorch."""
    settings = configs.load("configs/demo.py").optimizer
    model = vit.config("custom", width=8, depth=2, heads=2, image_size=8, patch_size=4)
    params = {"encoder": vit.init(model, jax.random.key(0)), "head": {"kernel": np.ones((8, 2), np.float32)}}
    gradients = jax.tree.map(np.ones_like, params)
    updates = []
    for decay in (1, 0.5):
        transform, _ = optimizer.make(settings, batch_size=64, warmup_steps=1, total_steps=10, layer_decay=decay)
        state = transform.update(gradients, transform.init(params), params)[1]
        updates.append(sharding.paths(transform.update(gradients, state, params)[0]))
    plain, decayed = updates
    for path, scale in {
        "head/kernel": 1, "encoder/norm/scale": 1, "encoder/patch_embed/kernel": 1 / 8, "encoder/cls_token": 1 / 8,
    }.items():  # fmt: skip
        np.testing.assert_allclose(decayed[path], scale * plain[path], rtol=1e-6, err_msg=path)
    kernel = "encoder/blocks/attn/qkv/kernel"
    np.testing.assert_allclose(decayed[kernel][0], plain[kernel][0] / 4, rtol=1e-6)
    np.testing.assert_allclose(decayed[kernel][1], plain[kernel][1] / 2, rtol=1e-6)
