"""The masked autoencoder by itself: what is hidden, what is predicted, what is compared, what it costs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax.models import mae, vit
from tests.models.make_references import TINY
from tests.models.test_vit import matmul_flops

SMALL = {**TINY, "image_size": (16, 24), "patch_size": (8, 4)}


def setup(**fields: Any) -> tuple[mae.MAEConfig, dict[str, Any], jax.Array, jax.Array]:
    config = mae.config("Ti", **{**SMALL, **fields})
    random = np.random.RandomState(0)
    images = random.standard_normal((3, *config.encoder.image_size, config.encoder.channels)).astype(np.float32)
    noise = random.uniform(size=(3, config.encoder.patches)).astype(np.float32)
    return config, mae.init(config, jax.random.key(0)), jnp.asarray(images), jnp.asarray(noise)


# ---- masking


def test_each_sample_hides_its_own_patches_with_the_largest_noise() -> None:
    noise = np.random.RandomState(0).uniform(size=(50, 196)).astype(np.float32)
    rank, mask = (np.asarray(x) for x in mae.random_mask(jnp.asarray(noise), 49))
    assert (mask.sum(axis=1) == 147).all()
    assert len(np.unique(mask, axis=0)) == 50
    for sample in range(50):
        assert noise[sample, mask[sample] == 0].max() < noise[sample, mask[sample] == 1].min()
        np.testing.assert_array_equal(rank[sample], np.argsort(np.argsort(noise[sample])))  # as in the reference
        np.testing.assert_array_equal(mask[sample], rank[sample] >= 49)


def test_equal_noise_keeps_the_order_of_the_patches() -> None:
    rank, mask = mae.random_mask(jnp.zeros((1, 6)), 2)
    assert (rank.tolist(), mask.tolist()) == ([[0, 1, 2, 3, 4, 5]], [[0, 0, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"), [(196, 0.75, 49), (1024, 0.75, 256), (9, 0.6, 3), (196, 0.9, 19), (10, 0.25, 7)]
)
def test_visible_patches_are_rounded_as_in_the_reference(patches: int, ratio: float, visible: int) -> None:
    config = mae.config("Ti", image_size=(8, 8 * patches), patch_size=8, mask_ratio=ratio)
    assert config.visible == visible == int(patches * (1 - ratio))


def test_only_visible_pixels_reach_the_prediction() -> None:
    config, params, images, noise = setup()
    predict = jax.jit(lambda images: mae.bind(config, params)(images, noise))
    output = predict(images)
    mask = output.mask[..., None]
    patches = vit.patchify(images, config.encoder.patch_size)
    other_hidden = vit.unpatchify(jnp.where(mask == 1, 99.0, patches), config.encoder)
    np.testing.assert_array_equal(predict(other_hidden).prediction, output.prediction)
    other_visible = vit.unpatchify(jnp.where(mask == 0, 2 * patches, patches), config.encoder)
    assert (jnp.abs(predict(other_visible).prediction - output.prediction).max(axis=(1, 2)) > 1e-3).all()


def test_mask_ratio_that_hides_all_or_nothing_is_refused() -> None:
    for ratio in (0.0, 1.0, -0.5, 0.99):
        with pytest.raises(ValueError, match=f"mask_ratio {ratio} leaves .* at least 1 has to be visible and 1 hidden"):
            mae.config("Ti", image_size=32, patch_size=8, mask_ratio=ratio)


# ---- target and loss


@pytest.mark.parametrize("eps", [1e-6, 0.25])
def test_norm_pix_uses_the_unbiased_variance(eps: float) -> None:
    config, params, images, noise = setup(norm_pix_eps=eps)
    output = mae.bind(config, params)(images, noise)
    patches = np.asarray(vit.patchify(images, config.encoder.patch_size), np.float64)
    wanted = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, keepdims=True, ddof=1) + eps)
    np.testing.assert_allclose(output.target, wanted, atol=2e-6)
    np.testing.assert_allclose(output.patch_loss, ((output.prediction - wanted) ** 2).mean(-1), rtol=2e-5)


def test_loss_is_the_mean_over_hidden_patches_of_the_batch() -> None:
    config, params, images, noise = setup(norm_pix=False, mask_ratio=0.5)
    output = jax.device_get(mae.bind(config, params)(images, noise))
    np.testing.assert_array_equal(output.target, vit.patchify(images, config.encoder.patch_size))
    squared = (output.prediction - output.target).astype(np.float64) ** 2
    assert output.loss == pytest.approx(squared[output.mask == 1].mean(), rel=1e-6)
    assert output.mask.sum(axis=1).tolist() == [6, 6, 6]


def test_loss_of_predicting_the_mean_is_that_of_standardised_noise() -> None:
    """With norm_pix, zero is the mean of every patch: its loss is (n - 1) / n for patches of n noisy values."""
    config, params, images, noise = setup()
    output = mae.bind(config, params)(images, noise)
    baseline = jnp.sum(jnp.mean(jnp.square(output.target), axis=-1) * output.mask) / jnp.sum(output.mask)
    assert baseline == pytest.approx(31 / 32, rel=1e-5)


def test_patch_statistics_turn_a_prediction_back_into_pixels() -> None:
    config, params, images, noise = setup()
    target = mae.bind(config, params)(images, noise).target
    mean, deviation = mae.patch_statistics(vit.patchify(images, config.encoder.patch_size), config.norm_pix_eps)
    np.testing.assert_allclose(vit.unpatchify(target * deviation + mean, config.encoder), images, atol=2e-6)


# ---- precision and programs


def test_bfloat16_keeps_float32_targets_loss_and_gradients() -> None:
    config, params, images, noise = setup(dtype="bfloat16")
    exact = mae.config("Ti", **SMALL)

    def run(config: mae.MAEConfig) -> Any:
        def loss(params: Any) -> Any:
            output = mae.bind(config, params)(images, noise)
            return output.loss, output

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (loss, output), gradients = run(config)
    (wanted_loss, wanted), wanted_gradients = run(exact)
    for leaf in jax.tree.leaves((output, gradients)):
        assert leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all()
    np.testing.assert_array_equal(output.target, wanted.target)
    # A relative rounding of 2^-9 for each of about 12 steps in each of 3 blocks, in quadrature, at three deviations.
    bound = 3 * 2**-9 * math.sqrt(36)
    np.testing.assert_allclose(
        output.prediction, wanted.prediction, atol=bound * float(jnp.abs(wanted.prediction).max())
    )
    assert loss == pytest.approx(float(wanted_loss), rel=bound)

    def norm(tree: Any) -> float:
        return math.sqrt(sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(tree)))

    difference = jax.tree.map(jnp.subtract, gradients, wanted_gradients)
    assert norm(difference) < bound * norm(wanted_gradients)


def test_scanned_and_unrolled_decoders_compute_the_same() -> None:
    config, params, images, noise = setup(decoder_depth=3, depth=4)
    wanted = jax.jit(lambda params: mae.bind(config, params)(images, noise).prediction)(params)
    for unroll in (2, 4):  # 2 does not divide the decoder's 3
        other = mae.config("Ti", **{**SMALL, "decoder_depth": 3, "depth": 4, "unroll": unroll})
        found = jax.jit(lambda params, other=other: mae.bind(other, params)(images, noise).prediction)(params)
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_initial_decoder_has_the_fans_of_the_reference() -> None:
    config = mae.config("Ti", image_size=32, decoder_width=192, decoder_depth=1)
    decoder = mae.init(config, jax.random.key(0))["decoder"]
    for kernel, fans in (
        (decoder["embed"]["kernel"], 192 + 192),
        (decoder["pred"]["kernel"], 192 + 256),
        (decoder["blocks"]["attn"]["qkv"]["kernel"], 192 + 576),
    ):
        assert 0.999 * math.sqrt(6 / fans) < jnp.abs(kernel).max() <= math.sqrt(6 / fans)
    assert jnp.std(decoder["mask_token"]) == pytest.approx(0.02, rel=0.2)


# ---- FLOPs


def test_flops_equal_those_of_the_traced_program() -> None:
    config = mae.config("Ti", **{**SMALL, "unroll": 2, "channels": 3})
    params = jax.eval_shape(lambda: mae.init(config, jax.random.key(0)))
    images, noise = jax.ShapeDtypeStruct((2, 16, 24, 3), jnp.float32), jax.ShapeDtypeStruct((2, 12), jnp.float32)

    def forward(params: Any, images: jax.Array, noise: jax.Array) -> Any:
        return mae.bind(config, params)(images, noise).loss

    # Matmuls that select tokens are not FLOPs of the model: pixels and positions of 3 of 12 patches, forward alone, and the
    # decoder's 13 of 4 tokens, forward and backward.
    pixels = 2 * 3 * 12 * (config.encoder.patch_values + config.encoder.width)
    tokens = 2 * 4 * 13 * config.decoder_width
    assert matmul_flops(forward, params, images, noise) == 2 * (mae.flops(config) + pixels + tokens)
    # The backward pass has two matmuls for each of the forward pass.
    found = matmul_flops(jax.grad(forward), params, images, noise)
    assert found == 2 * (3 * mae.flops(config) + pixels + 2 * tokens)


@pytest.mark.parametrize(
    ("size", "image_size", "encoder", "decoder"),
    [("B", 224, 8.6, 10.6), ("L", 224, 30.4, 10.6), ("B", 512, 46, 69), ("L", 512, 162, 69)],
)
def test_flops_of_named_sizes(size: str, image_size: int, encoder: float, decoder: float) -> None:
    """GFLOP of a forward pass, counted for a prototype of this model by its compiler."""
    config = mae.config(size, image_size=image_size)
    assert vit.flops(config.encoder, config.visible) / 1e9 == pytest.approx(encoder, rel=0.02)
    assert mae.decoder_flops(config) / 1e9 == pytest.approx(decoder, rel=0.02)


def test_description_names_encoder_and_decoder() -> None:
    assert mae.config("L", decoder_depth=4).describe() == "MAE of ViT-L/16, decoder 4 x 512"


# ---- wrong configs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"decoder_width": 100, "decoder_heads": 16},
            r"decoder_width 100 .* decoder_heads \(16\); the next that is: 112",
        ),
        ({"decoder_depth": 0}, "decoder_depth is 0; it has to be at least 1"),
        ({"norm_pix_eps": -1e-6}, "norm_pix_eps is -1e-06; .* has to be 0 or more"),
        ({"image_size": 100}, "nearest that is"),
    ],
)
def test_config_that_does_not_fit_says_what_would(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mae.config("Ti", **fields)


def test_parameters_of_another_shape_are_named() -> None:
    _, params, _, _ = setup()
    with pytest.raises(ValueError, match=r"decoder/pred/bias is \(32,\), wanted \(64,\); decoder/pred/kernel is"):
        mae.bind(mae.config("Ti", **{**SMALL, "patch_size": 8, "channels": 1}), params)
