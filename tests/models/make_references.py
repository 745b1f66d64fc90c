"""What transformers' ViTMAE computes for a few tiny models, live and as frozen files.

  python -m tests.models.make_references       writes references/*.safetensors anew; needs PyTorch

Weights, images and noise are drawn from numpy's RandomState, whose stream numpy promises never to change, so that a
frozen file holds results only. The parity tests read the files where PyTorch is not installed; where it is,
they compare with the live run and check that the files still agree with it.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from curia_jax.models import mae

FOLDER = Path(__file__).parent / "references"

TINY = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "decoder_width": 12, "decoder_depth": 1,
        "decoder_heads": 3, "decoder_mlp_width": 24, "dtype": "float32"}  # fmt: skip

# Arguments of mae.config. transformers' ViTMAE can be built for non-square images if the number of patches is a square.
CASES: dict[str, dict[str, Any]] = {
    "square": {**TINY, "image_size": 24, "patch_size": 8},
    "three_channels": {**TINY, "image_size": 15, "patch_size": 5, "channels": 3, "mask_ratio": 0.6},
    "wide": {**TINY, "image_size": (8, 32), "patch_size": 4, "norm_pix": False},
    "tall_tanh": {**TINY, "image_size": (32, 8), "patch_size": 4, "heads": 4, "activation": "gelu_tanh"},
}


def random_params(config: mae.MAEConfig, seed: int) -> dict[str, Any]:
    """Weights of plausible size, none of them zero or one, so that a misplaced tensor changes the results."""
    random = np.random.RandomState(seed)
    shapes = jax.eval_shape(lambda: mae.init(config, jax.random.key(0)))

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = random.standard_normal(leaf.shape)
        kind = path[-1].key
        if kind == "kernel":
            return (values / math.sqrt(leaf.shape[-2])).astype(np.float32)
        return (values * 0.2 + (kind == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def inputs(config: mae.MAEConfig, seed: int, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images and noise. The first image is empty on top, the second altogether: patches without variance."""
    random = np.random.RandomState(seed)
    encoder = config.encoder
    images = random.standard_normal((count, *encoder.image_size, encoder.channels)).astype(np.float32)
    images[0, : encoder.image_size[0] // 2] = 0.5  # sums of it are exact
    images[1] = 0.5
    return images, random.uniform(size=(count, encoder.patches)).astype(np.float32)


def position_table(width: int, grid: tuple[int, int]) -> np.ndarray:
    """The table of facebookresearch/mae, number by number from its definition."""
    table = np.zeros((1 + grid[0] * grid[1], width), np.float32)
    quarter = width // 4
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(quarter):
                frequency = 10000.0 ** (-i / quarter)
                line = table[1 + row * grid[1] + column]
                line[i], line[quarter + i] = math.sin(column * frequency), math.cos(column * frequency)
                line[2 * quarter + i], line[3 * quarter + i] = math.sin(row * frequency), math.cos(row * frequency)
    return table


def torch_names(params: dict[str, Any], config: mae.MAEConfig) -> dict[str, np.ndarray]:
    """Our tree under the names that transformers 5 uses in memory. Linear, so it maps gradients too."""

    def linear(name: str, tree: dict[str, Any]) -> dict[str, np.ndarray]:
        return {f"{name}.weight": np.asarray(tree["kernel"]).T, f"{name}.bias": np.asarray(tree["bias"])}

    def norm(name: str, tree: dict[str, Any]) -> dict[str, np.ndarray]:
        return {f"{name}.weight": np.asarray(tree["scale"]), f"{name}.bias": np.asarray(tree["bias"])}

    def blocks(prefix: str, stack: dict[str, Any]) -> dict[str, np.ndarray]:
        names = {}
        for i in range(len(stack["norm1"]["scale"])):
            block, name = jax.tree.map(lambda x, i=i: np.asarray(x)[i], stack), f"{prefix}.{i}"
            kernels = np.split(block["attn"]["qkv"]["kernel"], 3, axis=1)
            biases = np.split(block["attn"]["qkv"]["bias"], 3)
            for letter, kernel, bias in zip("qkv", kernels, biases, strict=True):
                names |= linear(f"{name}.attention.{letter}_proj", {"kernel": kernel, "bias": bias})
            names |= linear(f"{name}.attention.o_proj", block["attn"]["proj"])
            names |= norm(f"{name}.layernorm_before", block["norm1"]) | norm(f"{name}.layernorm_after", block["norm2"])
            names |= linear(f"{name}.mlp.fc1", block["mlp"]["fc1"]) | linear(f"{name}.mlp.fc2", block["mlp"]["fc2"])
        return names

    encoder, decoder, c = params["encoder"], params["decoder"], config.encoder
    kernel = np.asarray(encoder["patch_embed"]["kernel"]).reshape(*c.patch_size, c.channels, c.width)
    patches = "vit.embeddings.patch_embeddings.projection"
    return {
        "vit.embeddings.cls_token": np.asarray(encoder["cls_token"]),
        f"{patches}.weight": kernel.transpose(3, 2, 0, 1),
        f"{patches}.bias": np.asarray(encoder["patch_embed"]["bias"]),
        **blocks("vit.layers", encoder["blocks"]),
        **norm("vit.layernorm", encoder["norm"]),
        "decoder.mask_token": np.asarray(decoder["mask_token"]),
        **linear("decoder.decoder_embed", decoder["embed"]),
        **blocks("decoder.decoder_layers", decoder["blocks"]),
        **norm("decoder.decoder_norm", decoder["norm"]),
        **linear("decoder.decoder_pred", decoder["pred"]),
    }


def run_torch(name: str) -> dict[str, np.ndarray]:
    """logits, loss, mask, tokens, hidden.N (output of block N, from 0) and grad.<name> of one case, from PyTorch."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

    config = mae.config(**CASES[name])
    encoder = config.encoder
    params = random_params(config, seed=1)
    images, noise = inputs(config, seed=2)
    common = {
        "hidden_size": encoder.width, "num_hidden_layers": encoder.depth, "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_width, "layer_norm_eps": encoder.layer_norm_eps,
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[encoder.activation],
        "image_size": list(encoder.image_size), "patch_size": encoder.patch_size[0], "num_channels": encoder.channels,
    }  # fmt: skip
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            **common, decoder_hidden_size=config.decoder_width, decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_heads, decoder_intermediate_size=config.decoder_mlp_width,
            mask_ratio=config.mask_ratio, norm_pix_loss=config.norm_pix,
        )
    ).eval()  # fmt: skip
    tables = {
        "vit.embeddings.position_embeddings": position_table(encoder.width, encoder.grid)[None],
        "decoder.decoder_pos_embed": position_table(config.decoder_width, encoder.grid)[None],
    }
    tensors = {key: torch.tensor(np.ascontiguousarray(v)) for key, v in (torch_names(params, config) | tables).items()}
    model.load_state_dict(tensors, strict=True)
    # Its own check refuses non-square images; the arithmetic behind the check does not mind them.
    patchify = model.patchify
    model.patchify = lambda pixels, interpolate_pos_encoding: patchify(pixels, interpolate_pos_encoding=True)
    pixels = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    output = model(pixels, noise=torch.tensor(noise))
    output.loss.backward()
    results = {"logits": output.logits, "loss": output.loss, "mask": output.mask}
    results |= {f"grad.{key}": value.grad for key, value in model.named_parameters() if value.requires_grad}

    features = ViTModel(ViTConfig(**common), add_pooling_layer=False).eval()
    own = {key.removeprefix("vit."): value for key, value in tensors.items() if key.startswith("vit.")}
    features.load_state_dict(own, strict=True)
    with torch.no_grad():
        output = features(pixels, output_hidden_states=True)
    results["tokens"] = output.last_hidden_state
    results |= {f"hidden.{i}": hidden for i, hidden in enumerate(output.hidden_states[1:])}
    return {key: value.detach().numpy().copy(order="C") for key, value in results.items()}


def read_frozen(name: str) -> dict[str, np.ndarray]:
    """The results of `run_torch` as they were when the file was written."""
    return safetensors.numpy.load_file(FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    import torch
    import transformers

    FOLDER.mkdir(exist_ok=True)
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__}
    for case in CASES:
        path = FOLDER / f"{case}.safetensors"
        safetensors.numpy.save_file(run_torch(case), path, metadata=made_by)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB", file=sys.stderr)
