"""Tensor names, shapes and settings of each layout, and the models that it cannot hold."""

import re
from typing import Any

import jax
import numpy as np
import pytest

from curia_common.errors import UserError
from curia_jax.convert import __main__ as convert
from curia_jax.convert import layouts
from curia_jax.models import mae
from tests.convert.cases import CASES, CLASSIFIERS
from tests.models import make_references as reference

D, INNER, DD, DINNER, C, P, L = 16, 32, 12, 24, 3, 5, 9  # of the case three_channels


@pytest.mark.parametrize("grid", range(2, 66))
def test_evaluator_obstacle_names_grids_that_its_pooling_does_not_give(grid: int) -> None:
    """As max-pooling with kernel and stride of 512 // grid cuts masks of 512 px."""
    config = mae.config(**{**CASES["square"], "image_size": (grid * 8, grid * 8)})
    pooled = len(range(0, 512 - 512 // grid + 1, 512 // grid))
    message = layouts.evaluator_obstacle(config)
    if pooled == grid:
        assert message is None
        return
    assert message is not None and f"on {grid}x{grid} patches: it pools masks of 512 px to {pooled}x{pooled}" in message
    size = int(re.findall(r"--image-size=(\d+)", message)[0])
    assert layouts.evaluator_obstacle(mae.config(**{**CASES["square"], "image_size": (size, size)})) is None


def both(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vit_block(name: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    attention = f"{name}.attention"
    return {
        **norm(f"{name}.layernorm_before", width),
        **both(f"{attention}.attention.query", width, width),
        **both(f"{attention}.attention.key", width, width),
        **both(f"{attention}.attention.value", width, width),
        **both(f"{attention}.output.dense", width, width),
        **norm(f"{name}.layernorm_after", width),
        **both(f"{name}.intermediate.dense", inner, width),
        **both(f"{name}.output.dense", width, inner),
    }


def vit(prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}embeddings.cls_token": (1, 1, D),
        f"{prefix}embeddings.position_embeddings": (1, 1 + L, D),
        f"{prefix}embeddings.patch_embeddings.projection.weight": (D, C, P, P),
        f"{prefix}embeddings.patch_embeddings.projection.bias": (D,),
        **vit_block(f"{prefix}encoder.layer.0", D, INNER),
        **vit_block(f"{prefix}encoder.layer.1", D, INNER),
        **norm(f"{prefix}layernorm", D),
    }


def dinov2_block(name: str) -> dict[str, tuple[int, ...]]:
    return {
        **norm(f"{name}.norm1", D),
        **both(f"{name}.attention.attention.query", D, D),
        **both(f"{name}.attention.attention.key", D, D),
        **both(f"{name}.attention.attention.value", D, D),
        **both(f"{name}.attention.output.dense", D, D),
        f"{name}.layer_scale1.lambda1": (D,),
        **norm(f"{name}.norm2", D),
        **both(f"{name}.mlp.fc1", INNER, D),
        **both(f"{name}.mlp.fc2", D, INNER),
        f"{name}.layer_scale2.lambda1": (D,),
    }


def timm_block(name: str) -> dict[str, tuple[int, ...]]:
    return {
        **norm(f"{name}.norm1", D),
        **both(f"{name}.attn.qkv", 3 * D, D),
        **both(f"{name}.attn.proj", D, D),
        **norm(f"{name}.norm2", D),
        **both(f"{name}.mlp.fc1", INNER, D),
        **both(f"{name}.mlp.fc2", D, INNER),
    }


KEYS = {
    "vit_mae": {
        **vit("vit."),
        "decoder.mask_token": (1, 1, DD),
        "decoder.decoder_pos_embed": (1, 1 + L, DD),
        **both("decoder.decoder_embed", DD, D),
        **vit_block("decoder.decoder_layers.0", DD, DINNER),
        **norm("decoder.decoder_norm", DD),
        **both("decoder.decoder_pred", P * P * C, DD),
    },
    "vit": vit(""),
    "dinov2": {
        "embeddings.cls_token": (1, 1, D),
        "embeddings.mask_token": (1, D),
        "embeddings.position_embeddings": (1, 1 + L, D),
        "embeddings.patch_embeddings.projection.weight": (D, C, P, P),
        "embeddings.patch_embeddings.projection.bias": (D,),
        **dinov2_block("encoder.layer.0"),
        **dinov2_block("encoder.layer.1"),
        **norm("layernorm", D),
    },
    "timm": {
        "cls_token": (1, 1, D),
        "pos_embed": (1, 1 + L, D),
        "patch_embed.proj.weight": (D, C, P, P),
        "patch_embed.proj.bias": (D,),
        **timm_block("blocks.0"),
        **timm_block("blocks.1"),
        **norm("norm", D),
    },
}


def setup(name: str = "three_channels", **changes: Any) -> tuple[mae.MAEConfig, dict[str, Any]]:
    config = mae.config(**{**CASES[name], **changes})
    return config, reference.random_params(config, seed=1)


def test_command_offers_every_layout() -> None:
    assert convert.LAYOUT_NAMES == tuple(layouts.LAYOUTS) == (*KEYS, *CLASSIFIERS)


@pytest.mark.parametrize("layout", KEYS)
def test_tensor_names_and_shapes_are_those_of_loaders(layout: str) -> None:
    config, params = setup()
    tensors, trained = layouts.tensors(layouts.LAYOUTS[layout], config, params)
    assert {name: values.shape for name, values in tensors.items()} == KEYS[layout]
    for name, values in tensors.items():
        assert values.dtype == np.float32 and values.flags.c_contiguous, name
    parts = params if layout == "vit_mae" else params["encoder"]
    assert trained == sum(leaf.size for leaf in jax.tree.leaves(parts))


@pytest.mark.parametrize("layout", KEYS)
def test_every_parameter_goes_to_exactly_one_tensor(layout: str) -> None:
    config, params = setup()
    made = layouts.LAYOUTS[layout]
    entries = layouts.entries(made, params)
    assert len({entry.name for entry in entries}) == len(entries)
    tensors = [entry.read(params, config) for entry in entries]
    ours = [leaf for part in made.parts for leaf in jax.tree.leaves(params[part])]
    gathered = np.sort(np.concatenate([values.ravel() for values in tensors]))
    np.testing.assert_array_equal(gathered, np.sort(np.concatenate([leaf.ravel() for leaf in ours])))


def test_kernels_become_weights_and_convolutions() -> None:
    config, params = setup()
    tensors, _ = layouts.tensors(layouts.LAYOUTS["timm"], config, params)
    attention = params["encoder"]["blocks"]["attn"]["qkv"]["kernel"][1]
    np.testing.assert_array_equal(tensors["blocks.1.attn.qkv.weight"], attention.T)
    kernel = params["encoder"]["patch_embed"]["kernel"]
    convolution = tensors["patch_embed.proj.weight"]
    for row, column, channel in ((0, 0, 0), (1, 3, 2), (4, 2, 1)):
        np.testing.assert_array_equal(convolution[:, channel, row, column], kernel[(row * P + column) * C + channel])
    for part, letter in enumerate(("query", "key", "value")):
        split, _ = layouts.tensors(layouts.LAYOUTS["vit"], config, params)
        weight = split[f"encoder.layer.1.attention.attention.{letter}.weight"]
        np.testing.assert_array_equal(weight, attention[:, part * D : (part + 1) * D].T)


def test_dinov2_layer_scale_and_mask_token_are_neutral() -> None:
    config, params = setup()
    tensors, _ = layouts.tensors(layouts.LAYOUTS["dinov2"], config, params)
    scales = [values for name, values in tensors.items() if "lambda1" in name]
    assert len(scales) == 4 and all((values == 1).all() for values in scales)
    assert not tensors["embeddings.mask_token"].any()


def test_entries_reject_unnamed_parameter_and_unused_name() -> None:
    _, params = setup()
    params["encoder"]["register_tokens"] = np.zeros((1, 4, D), np.float32)
    with pytest.raises(ValueError, match="layout vit has no name for encoder/register_tokens"):
        layouts.entries(layouts.LAYOUTS["vit"], params)
    del params["encoder"]["register_tokens"], params["encoder"]["norm"]
    with pytest.raises(ValueError, match="layout vit names encoder/norm, which the model does not have"):
        layouts.entries(layouts.LAYOUTS["vit"], params)


# ---- config.json


def types(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: type(value) for key, value in tree.items()}


def test_settings_have_types_that_transformers_5_requires() -> None:
    """transformers 5 refuses mlp_ratio 4.0, layerscale_value 1, mask_ratio 1 and floats for sizes."""
    config, _ = setup()
    counts = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "num_channels")
    for name in ("vit_mae", "vit", "dinov2"):
        found = types(layouts.LAYOUTS[name].config(config))
        assert {found[key] for key in counts} == {int}
        assert found["layer_norm_eps"] is float and found["qkv_bias"] is bool and found["hidden_act"] is str
    dinov2 = layouts.LAYOUTS["dinov2"].config(config)
    assert types(dinov2)["mlp_ratio"] is int and types(dinov2)["layerscale_value"] is float
    assert types(layouts.LAYOUTS["vit_mae"].config(config))["mask_ratio"] is float


def test_settings_are_those_of_training() -> None:
    config, _ = setup("square", layer_norm_eps=1e-5, activation="gelu_tanh", norm_pix=False, mask_ratio=0.6)
    for name in ("vit_mae", "vit", "dinov2"):
        settings = layouts.LAYOUTS[name].config(config)
        assert (settings["layer_norm_eps"], settings["hidden_act"]) == (1e-5, "gelu_pytorch_tanh")
    settings = layouts.LAYOUTS["vit_mae"].config(config)
    assert (settings["mask_ratio"], settings["norm_pix_loss"]) == (0.6, False)
    assert settings["decoder_intermediate_size"] == DINNER and settings["intermediate_size"] == INNER
    assert layouts.LAYOUTS["dinov2"].config(config)["mlp_ratio"] == 2
    assert layouts.LAYOUTS["timm"].config(config)["model_args"]["act_layer"] == "gelu_tanh"
    assert layouts.LAYOUTS["vit"].config(setup("square")[0])["hidden_act"] == "gelu"


def test_sizes_that_are_not_square_are_height_and_width() -> None:
    config, _ = setup("patches_not_square")
    settings = layouts.LAYOUTS["vit"].config(config)
    assert (settings["image_size"], settings["patch_size"]) == ([16, 24], [8, 4])
    settings = layouts.LAYOUTS["timm"].config(config)
    assert settings["pretrained_cfg"]["input_size"] == [3, 16, 24]
    assert (settings["model_args"]["img_size"], settings["model_args"]["patch_size"]) == ([16, 24], [8, 4])


def test_timm_mlp_ratio_gives_exact_mlp_width() -> None:
    """timm takes int(width x mlp_ratio), and the quotient of two integers may round down."""
    for width in range(4, 400, 12):
        for mlp_width in range(1, 3 * width, 7):
            config = mae.config("Ti", image_size=16, patch_size=8, width=width, heads=1, mlp_width=mlp_width)
            ratio = layouts.LAYOUTS["timm"].config(config)["model_args"]["mlp_ratio"]
            assert int(width * ratio) == mlp_width


def test_timm_model_args_lack_number_of_classes() -> None:
    """transformers' AutoModel passes num_classes beside model_args, and a second one raises."""
    content = layouts.LAYOUTS["timm"].config(setup()[0])
    assert "num_classes" not in content["model_args"]
    assert content["num_classes"] == content["pretrained_cfg"]["num_classes"] == 0


@pytest.mark.parametrize(("size", "name"), [("Ti", "tiny"), ("S", "small"), ("B", "base"), ("L", "large")])
def test_timm_architecture_is_of_nearest_size(size: str, name: str) -> None:
    assert layouts.LAYOUTS["timm"].config(mae.config(size))["architecture"] == f"vit_{name}_patch16_224"


# ---- models that a layout cannot hold


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("vit_mae", {"image_size": (16, 24)}, "ViTMAEForPreTraining takes square images, but this model's are 16x24 px; use --layout=vit or timm"),
        ("vit_mae", {"patch_size": (8, 4)}, "ViTMAEForPreTraining takes square patches, but this model's are 8x4 px"),
        ("vit_mae", {"norm_pix_eps": 1e-2}, "has a fixed norm_pix_eps of 1e-06, but this model was trained with 0.01, so that its loss would differ; .* use --layout=vit, dinov2 or timm"),
        ("dinov2", {"image_size": (16, 24)}, "Dinov2Model takes square images"),
        ("dinov2", {"patch_size": (4, 8), "image_size": (12, 24)}, "takes square patches, .* it takes square images"),
        ("dinov2", {"mlp_width": 40}, "takes an MLP width that is a multiple of the width, but this model's are 40 and 16; use --layout=vit"),
        ("timm", {"layer_norm_eps": 1e-5}, "timm's VisionTransformer has a fixed layer_norm_eps of 1e-06, .* trained with 1e-05; use --layout=vit"),
    ],
)  # fmt: skip
def test_layout_refuses_model_it_cannot_hold(layout: str, changes: dict[str, Any], message: str) -> None:
    config, _ = setup("square", **changes)
    with pytest.raises(UserError, match=f"--layout={layout} cannot hold this model: .*{message}"):
        layouts.LAYOUTS[layout].check(config)
    if remedy := re.search(r"--layout=(\w+)", message.split("cannot hold")[-1]):
        layouts.LAYOUTS[remedy[1]].check(config)


def test_vit_mae_ignores_norm_pix_eps_without_norm_pix() -> None:
    config, _ = setup("square", norm_pix=False, norm_pix_eps=1e-2)
    layouts.LAYOUTS["vit_mae"].check(config)
