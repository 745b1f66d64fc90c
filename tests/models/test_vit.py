"""The encoder by itself: positions, patches, initial values, layers, FLOPs, and programs that have to agree."""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax.models import vit
from tests.models.make_references import position_table

SMALL = {"image_size": (16, 24), "patch_size": 8, "width": 16, "depth": 4, "heads": 2, "mlp_width": 32}


def random_images(config: vit.ViTConfig, count: int = 2) -> jax.Array:
    values = np.random.RandomState(0).standard_normal((count, *config.image_size, config.channels))
    return jnp.asarray(values, jnp.float32)


# ---- positions


def test_positions_equal_their_definition() -> None:
    # sin and cos of 64-bit numbers rounded to 32 bits: at most the last bit may differ between two libraries.
    np.testing.assert_allclose(vit.position_table(24, (3, 5)), position_table(24, (3, 5)), rtol=0, atol=6e-8)


def test_positions_of_vit_b_16_have_the_known_hash() -> None:
    """Of the 14 x 14 table of facebookresearch/mae, in steps of 2^-20 so that the last bit does not matter."""
    table = vit.position_table(768, (14, 14))
    assert (table.shape, table.dtype) == ((197, 768), np.float32)
    steps = np.round(table.astype(np.float64) * 2**20).astype("<i4")
    assert hashlib.sha256(steps.tobytes()).hexdigest()[:16] == "aed0319d6e5e3c23"


def test_first_half_of_the_channels_encodes_the_column() -> None:
    table = vit.position_table(32, (4, 6))
    assert not table[0].any()
    rows = table[1:].reshape(4, 6, 32)
    assert (rows[:, :, :16] == rows[:1, :, :16]).all()
    assert (rows[:, :, 16:] == rows[:, :1, 16:]).all()
    assert len(np.unique(rows.reshape(24, 32), axis=0)) == 24


def test_positions_keep_float32_precision_at_large_columns() -> None:
    """Angles are computed in 64 bits: at column 4000 a float32 angle would be off by 1e-4."""
    last = vit.position_table(8, (1, 4001))[-1]
    np.testing.assert_allclose(last[:2], [math.sin(4000.0), math.sin(4000.0 / 100)], rtol=0, atol=6e-8)


# ---- patches


def test_patches_go_row_by_row_and_hold_row_column_channel() -> None:
    image = np.random.RandomState(0).standard_normal((2, 16, 12, 3)).astype(np.float32)
    patches = np.asarray(vit.patchify(jnp.asarray(image), (8, 4)))
    assert patches.shape == (2, 6, 96)
    for sample in range(2):
        for row in range(2):
            for column in range(3):
                box = image[sample, 8 * row : 8 * row + 8, 4 * column : 4 * column + 4]
                np.testing.assert_array_equal(patches[sample, 3 * row + column], box.reshape(-1))


def test_unpatchify_undoes_patchify() -> None:
    config = vit.config("Ti", image_size=(16, 12), patch_size=(8, 4), channels=3)
    images = random_images(config)
    np.testing.assert_array_equal(vit.unpatchify(vit.patchify(images, (8, 4)), config), images)


# ---- initial values


def test_initial_values_are_those_of_the_reference() -> None:
    """xavier-uniform with the fans of the flattened patch and of the fused qkv matrix, N(0, 0.02) tokens."""
    config = vit.config("Ti", image_size=32, patch_size=16, depth=2)
    params = jax.device_get(jax.jit(lambda key: vit.init(config, key))(jax.random.key(0)))

    def check(kernel: np.ndarray, fan_in: int, fan_out: int) -> None:
        assert kernel.shape[-2:] == (fan_in, fan_out)
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.999 * bound < np.abs(kernel).max() <= bound
        assert np.std(kernel) == pytest.approx(bound / math.sqrt(3), rel=0.01)
        assert abs(np.mean(kernel)) < 0.01 * bound

    blocks = params["blocks"]
    check(params["patch_embed"]["kernel"], 256, 192)
    check(blocks["attn"]["qkv"]["kernel"], 192, 576)
    check(blocks["attn"]["proj"]["kernel"], 192, 192)
    check(blocks["mlp"]["fc1"]["kernel"], 192, 768)
    check(blocks["mlp"]["fc2"]["kernel"], 768, 192)
    assert np.std(params["cls_token"]) == pytest.approx(0.02, rel=0.2)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert leaf.dtype == np.float32
        if path[-1].key in ("bias", "scale"):
            assert (leaf == (path[-1].key == "scale")).all(), path
    assert not np.array_equal(*blocks["attn"]["qkv"]["kernel"])


def test_initial_values_follow_from_the_key() -> None:
    config = vit.config("Ti", **SMALL)
    first, again, other = (vit.init(config, jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))
    assert not (first["patch_embed"]["kernel"] == other["patch_embed"]["kernel"]).any()


@pytest.mark.parametrize(("size", "millions"), [("Ti", 5.49), ("S", 21.59), ("B", 85.65), ("L", 303.10), ("H", 630.67)])
def test_sizes_have_their_published_number_of_parameters(size: str, millions: float) -> None:
    """Of ViT/16 with 3 channels: timm's counts (5.72, 22.05, 86.57, 304.33 and, patch 14, 632.05 M) less the head of
    1000 classes and the position table."""
    config = vit.config(size, channels=3)
    shapes = jax.eval_shape(lambda: vit.init(config, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.02)


# ---- one tree, several programs


def loss_and_gradients(images: jax.Array, params: Any, **fields: Any) -> Any:
    config = vit.config("Ti", **SMALL, dtype="float32", **fields)

    def loss(params: Any) -> jax.Array:
        return jnp.mean(jnp.sin(3 * vit.bind(config, params)(images)))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def scanned() -> Any:
    config = vit.config("Ti", **SMALL)
    images, params = random_images(config), vit.init(config, jax.random.key(1))
    return images, params, loss_and_gradients(images, params)


@pytest.mark.parametrize(
    "program", [{"unroll": 4}, {"unroll": 2}, {"remat": "full"}, {"remat": "matmuls", "unroll": 4}], ids=str
)
def test_scan_unrolled_and_remat_compute_the_same(program: dict[str, Any], scanned: Any) -> None:
    images, params, wanted = scanned
    found = loss_and_gradients(images, params, **program)
    # The same sums in another order: rounding of float32 on gradients up to 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, wanted)


def test_remat_policies_recompute_the_matmuls_they_name() -> None:
    """In a block: q k^T and probabilities x v with `matmuls`; qkv, proj and fc1 too with `full`, while fc2's result is not needed."""

    def matmuls(remat: str) -> int:
        """Of one block, which a scan runs for all."""
        config = vit.config("Ti", **SMALL, remat=remat)
        params = jax.eval_shape(lambda: vit.init(config, jax.random.key(0)))
        images = jax.ShapeDtypeStruct((1, 16, 24, 1), jnp.float32)
        loss = jax.grad(lambda params, images: vit.bind(config, params)(images).sum().astype(jnp.float32))
        names = [equation.primitive.name for equation in equations(jax.make_jaxpr(loss)(params, images).jaxpr)]
        return names.count("dot_general")

    assert [matmuls(remat) - matmuls("none") for remat in ("matmuls", "full")] == [2, 5]


def test_unrolled_layers_leave_no_loop_and_stack_gradients_once() -> None:
    config = vit.config("Ti", **SMALL, unroll=4)
    params = jax.eval_shape(lambda: vit.init(config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((1, 16, 24, 1), jnp.float32)
    loss = jax.grad(lambda params, images: vit.bind(config, params)(images).sum().astype(jnp.float32))
    names = [equation.primitive.name for equation in equations(jax.make_jaxpr(loss)(params, images).jaxpr)]
    assert "scan" not in names and "while" not in names
    assert "split" in names
    assert "dynamic_update_slice" not in names and "scatter-add" not in names


def test_hidden_states_come_before_the_final_norm() -> None:
    config = vit.config("Ti", **SMALL, dtype="float32")
    params = vit.init(config, jax.random.key(0))
    images = random_images(config)
    encoder = vit.bind(config, params)
    tokens, (first, last) = encoder.encode(encoder.embed(images), [0, -1])
    assert tokens.shape == first.shape == (2, 7, 16)
    np.testing.assert_allclose(encoder.norm(last), tokens, atol=1e-6)
    shallow = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}
    one = vit.bind(vit.config("Ti", **{**SMALL, "depth": 1}, dtype="float32"), shallow)
    np.testing.assert_allclose(one(images), encoder.norm(first), atol=1e-6)
    np.testing.assert_allclose(encoder(images), tokens, atol=1e-6)


def test_bfloat16_stays_near_float32() -> None:
    config = vit.config("Ti", **SMALL)
    params = vit.init(config, jax.random.key(0))
    images = random_images(config)
    assert config.dtype == "bfloat16"
    found = jax.jit(lambda params: vit.bind(config, params)(images))(params)
    wanted = vit.bind(vit.config("Ti", **SMALL, dtype="float32"), params)(images)
    assert found.dtype == jnp.bfloat16
    # A relative rounding of 2^-9 for each of about 12 steps in each of 4 blocks, in quadrature; values are up to 3.
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=2**-9 * math.sqrt(48) * 3)


# ---- drop path


def test_drop_path_multiplies_as_timm_does() -> None:
    """Rates are linspace(0, rate, depth); what is kept is divided by the share that is."""
    draws = jnp.asarray(np.random.default_rng(0).random((500, 4, 2)))
    found = np.asarray(vit.drop_path(draws, 0.6))
    for block, rate in enumerate(np.linspace(0, 0.6, 4)):
        np.testing.assert_allclose(np.unique(found[:, block]), [0, 1 / (1 - rate)] if block else [1], rtol=1e-5)
        np.testing.assert_array_equal(found[:, block] == 0, draws[:, block] < rate)


@pytest.mark.parametrize(
    "program", [{"unroll": 1}, {"unroll": 4}, {"unroll": 1, "remat": "full"}, {"attention": "pallas"}]
)
def test_drop_path_scales_the_branches_of_each_image(program: dict[str, Any]) -> None:
    """A transcription with one block after the other; of pallas, images are packed into rows of several."""
    config = vit.config("custom", **SMALL, dtype="float32", **program)
    params, images = vit.init(config, jax.random.key(0)), random_images(config, 8)
    kept = jnp.asarray(np.random.default_rng(1).choice([0.0, 0.5, 2.0], (8, 4, 2)), jnp.float32)
    plain = vit.bind(vit.config("custom", **SMALL, dtype="float32"), params)
    x = plain.embed(images)
    x = jnp.concatenate([jnp.broadcast_to(params["cls_token"], (8, 1, 16)), x], axis=1)
    for number in range(4):
        block = vit.Block(16, 2, 32, "gelu", 1e-6, rngs=vit.nnx.Rngs(0))
        block = vit.from_dict(lambda block=block: block, jax.tree.map(lambda leaf, n=number: leaf[n], params["blocks"]))
        x = x + kept[:, number, 0, None, None] * block.attn(block.norm1(x))
        x = x + kept[:, number, 1, None, None] * block.mlp(block.norm2(x))
    found = vit.bind(config, params)(images, kept)
    np.testing.assert_allclose(found, plain.norm(x), atol=2e-5)


# ---- FLOPs


def equations(jaxpr: Any) -> Any:
    """All equations of a program and its inner programs; of a choice by platform only the last, the default."""
    for equation in jaxpr.eqns:
        yield equation
        params = equation.params
        for value in [params["branches"][-1:]] if equation.primitive.name == "cond" else params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def matmul_flops(function: Any, *args: Any) -> int:
    """2 x multiply-adds of all matmuls in a program without loops."""
    total = 0
    for equation in equations(jax.make_jaxpr(function)(*args).jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * equation.outvars[0].aval.size
    return total


def test_flops_equal_those_of_the_traced_program() -> None:
    config = vit.config("Ti", image_size=(32, 48), patch_size=(8, 16), channels=3, depth=2, unroll=2)
    params = jax.eval_shape(lambda: vit.init(config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((2, 32, 48, 3), jnp.float32)

    def forward(params: Any, images: jax.Array) -> jax.Array:
        return vit.bind(config, params)(images)

    assert matmul_flops(forward, params, images) == 2 * vit.flops(config)


def test_flops_agree_with_xla() -> None:
    config = vit.config("Ti", image_size=64, patch_size=16, depth=2, unroll=2, dtype="float32")
    params = jax.eval_shape(lambda: vit.init(config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((1, 64, 64, 1), jnp.float32)
    compiled = jax.jit(lambda params, images: vit.bind(config, params)(images)).lower(params, images).compile()
    # XLA also counts what is not a matmul: some ten operations a value, where a matmul has 2 x 192 and more.
    assert 1.0 < compiled.cost_analysis()["flops"] / vit.flops(config) < 1.08


def test_flops_of_vit_b_16_are_the_published_ones() -> None:
    """17.6 GFLOP of multiply-adds x 2 at 224 px and 3 channels (17.58 GMAC in timm's table); 197 tokens."""
    assert vit.flops(vit.config("B", channels=3)) / 2e9 == pytest.approx(17.56, abs=0.03)


# ---- names


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"size": "B"}, "ViT-B/16"),
        ({"size": "custom", "width": 1024, "depth": 24, "heads": 16, "image_size": 224, "patch_size": 14}, "ViT-L/14"),
        ({"size": "Ti", "image_size": 64, "patch_size": (8, 4)}, "ViT-Ti/8x4"),
        ({"size": "custom", "width": 128, "depth": 6, "heads": 4}, "ViT/16 (width 128, depth 6, heads 4)"),
        ({"size": "B", "mlp_width": 1024}, "ViT/16 (width 768, depth 12, heads 12, MLP width 1024)"),
    ],
)
def test_description_follows_from_the_dimensions(fields: dict[str, Any], name: str) -> None:
    assert vit.config(**fields).describe() == name


# ---- wrong configs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "XL"}, "size is 'XL'; it may be Ti, S, B, L, H, custom"),
        ({"image_size": 100}, r"image size \(100, 100\) is not a multiple .* \(16, 16\); nearest that is: \(96, 96\)"),
        ({"image_size": (8, 232)}, r"nearest that is: \(16, 224\)"),
        ({"image_size": (60, 64)}, r"nearest that is: \(64, 64\)"),
        ({"patch_size": 0}, r"patch_size is \(0, 0\); it has to be at least 1"),
        ({"channels": 0}, "channels is 0; it has to be at least 1"),
        ({"width": 0}, "width is 0; it has to be at least 1"),
        ({"mlp_width": 0}, "mlp_width is 0; it has to be at least 1"),
        ({"width": 100, "heads": 3}, r"width 100 has to be a multiple of 4 and of heads \(3\); the next that is: 108"),
        ({"width": 90, "heads": 3}, "the next that is: 96"),
        ({"size": "custom", "width": 16, "heads": 2}, "a model of size 'custom' needs width, depth and heads"),
        ({"image_size": (8, 8, 8)}, r"a size is a side of a square or \(height, width\), not \(8, 8, 8\)"),
        ({"attention": "kernel"}, "attention is 'kernel'; it may be xla, pallas"),
        ({"activation": "relu"}, "activation is 'relu'; it may be gelu, gelu_tanh"),
        ({"dtype": "float16"}, "dtype is 'float16'; it may be float32, bfloat16"),
        ({"remat": "some"}, "remat is 'some'; it may be none, full, matmuls"),
        ({"unroll": 5}, "unroll 5 does not divide the depth 12; it may be 1, 2, 3, 4, 6, 12"),
    ],
)
def test_config_that_does_not_fit_says_what_would(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vit.config(**{"size": "Ti", **fields})


def test_parameters_of_another_shape_are_named() -> None:
    params = jax.eval_shape(lambda: vit.init(vit.config("Ti"), jax.random.key(0)))
    with pytest.raises(ValueError, match=r"blocks/attn/proj/bias is \(12, 192\), wanted \(12, 384\); .* more"):
        vit.bind(vit.config("S"), params)
    del params["norm"]
    with pytest.raises(ValueError, match=r"norm/bias is missing, wanted \(192,\); norm/scale is missing"):
        vit.bind(vit.config("Ti"), params)


def test_images_of_another_size_are_refused() -> None:
    config = vit.config("Ti", **SMALL)
    with pytest.raises(ValueError, match=r"images are \(24, 16, 1\), the model takes \(16, 24, 1\)"):
        vit.bind(config, vit.init(config, jax.random.key(0)))(jnp.zeros((1, 24, 16, 1)))
