"""Models of transformers, timm and open_clip with random weights, against direct calls of these libraries.

The images of the direct calls are made by PyTorch's own antialiased resize, one slice at a time.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from curia_common.errors import UserError
from curia_jax import data
from curia_jax.evaluate import backbones, features, preparation, torch_backbones
from curia_jax.evaluate.preparation import Preparation
from tests.evaluate.test_features import Slices

READOUTS = [features.Readout.parse(word) for word in ("cls", "mean", "mean+std")]
WITH_BLOCKS = [*READOUTS, features.Readout.parse("mean@1+last")]
COUNT = 5
HU = preparation.default_settings().hu_window
# float32 through two blocks, on values of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
PROCESSOR = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True,
             "image_mean": [0.48, 0.45, 0.40], "image_std": [0.22, 0.23, 0.24], "resample": 3}  # fmt: skip


def batches(masks: bool = False) -> list[data.HostBatch]:
    made = list(features.ShardImages(Slices(COUNT)).batches(np.arange(COUNT), 3))
    for batch in made:
        if masks:
            batch["mask"] = np.zeros(batch["pixels"].shape, np.float32)
            batch["mask"][:, :6, 3:9] = 1
    return made


def found(backbone: features.Backbone, *, masks: bool = False) -> dict[str, np.ndarray]:
    parts = [(batch["valid"], backbone.features(batch)) for batch in batches(masks)]
    return {name: np.concatenate([values[name][valid] for valid, values in parts]) for name in parts[0][1]}


def images(wanted: Preparation):
    """The input by PyTorch: one slice after the other."""
    import torch

    made = []
    for number in range(COUNT):
        one = Slices(COUNT)[number]
        values = torch.from_numpy(one.pixels.astype(np.float32)) + one.facts.intercept
        if wanted.intensities == preparation.WINDOW:
            low, high = HU if one.facts.hu else (one.facts.low, one.facts.high)
            values = ((values - low) / (high - low)).clamp(0, 1)
        resized = torch.nn.functional.interpolate(
            values[None, None], wanted.size, mode=wanted.resample, antialias=True, align_corners=False
        )
        if wanted.intensities == preparation.STANDARD:
            resized = (resized - resized.mean()) / resized.std()
        mean, std = (torch.tensor(ends).reshape(1, -1, 1, 1) for ends in (wanted.mean, wanted.std))
        made.append((resized.repeat(1, wanted.channels, 1, 1) - mean) / std)
    return torch.cat(made).float()


def assert_features_are_of(block, tokens, values) -> None:
    """Those of the last tokens, and of the first block's and the last ones together; each with one CLS token."""
    for name, wanted in wanted_features(tokens, 1).items():
        np.testing.assert_allclose(values[name], wanted, **CLOSE, err_msg=name)
    both = [t[:, 1:].mean(1).numpy() for t in (block, tokens)]
    np.testing.assert_allclose(values["mean@1+last"], np.concatenate(both, axis=1), **CLOSE)


def wanted_features(tokens, prefix: int) -> dict[str, np.ndarray]:
    tokens = tokens.detach().numpy()
    patches = tokens[:, prefix:]
    mean, std = patches.mean(axis=1), patches.std(axis=1)
    return {"cls": tokens[:, 0], "mean": mean, "mean+std": np.concatenate([mean, std], axis=1)}


def opened(word: str, readouts=READOUTS) -> features.Backbone:
    (made,) = backbones.open_backbones([word], [], readouts=readouts)
    assert made.name == word
    return made


def of(made: features.Backbone) -> Preparation:
    return Preparation.from_json(made.provenance.preparation)


# ---- transformers


def save(folder: Path, kind: str, processor: dict | None = PROCESSOR, **changes):
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


@pytest.mark.torch
@pytest.mark.parametrize(("kind", "prefix"), [("Dinov2", 1), ("Dinov2WithRegisters", 5), ("ViT", 1), ("ViTMAE", 1)])
def test_transformers_features_equal_direct_calls(tmp_path, kind: str, prefix: int) -> None:
    import torch

    model = save(tmp_path, kind)
    made = opened(str(tmp_path), WITH_BLOCKS)
    assert of(made) == Preparation(
        "window", HU, (32, 32), "bicubic", 3, tuple(PROCESSOR["image_mean"]), tuple(PROCESSOR["image_std"])
    )
    extra = {}
    if kind == "ViTMAE":
        model.config.mask_ratio = 0.0
        extra = {"noise": torch.arange(16.0).repeat(COUNT, 1)}
    with torch.no_grad():
        output = model(images(of(made)), output_hidden_states=True, **extra)
    tokens, values = output.last_hidden_state, found(made)
    for name, wanted in wanted_features(tokens, prefix).items():
        np.testing.assert_allclose(values[name], wanted, **CLOSE, err_msg=name)
    both = [t[:, prefix:].mean(1).numpy() for t in (output.hidden_states[1], tokens)]
    np.testing.assert_allclose(values["mean@1+last"], np.concatenate(both, axis=1), **CLOSE)


@pytest.mark.torch
def test_curia_processor_is_recognised_and_standardises_each_image(tmp_path) -> None:
    import torch

    processor = {
        "image_processor_type": "CuriaImageProcessor",
        "crop_size": 24,
        "do_resize": True,
        "do_normalize": True,
    }
    model = save(tmp_path, "Dinov2", processor, num_channels=1, image_size=24, use_swiglu_ffn=True)
    made = opened(f"hf:{tmp_path}")
    assert (of(made).intensities, of(made).size, of(made).channels) == ("standard", (24, 24), 1)
    with torch.no_grad():
        tokens = model(images(of(made))).last_hidden_state
    np.testing.assert_allclose(found(made)["mean"], wanted_features(tokens, 1)["mean"], **CLOSE)


@pytest.mark.torch
def test_processor_of_our_exports_keeps_its_window(tmp_path) -> None:
    processor = {
        "image_processor_type": "CuriaJaxImageProcessor", "hu": "auto", "hu_window": [-200.0, 300.0], "percentiles": [0.5, 99.5],
        "size": {"height": 24, "width": 24}, "resample": "bilinear", "image_mean": [0.3], "image_std": [0.25],
    }  # fmt: skip
    save(tmp_path, "Dinov2", processor, num_channels=1, image_size=24)
    wanted = Preparation("window", (-200.0, 300.0), (24, 24), "bilinear", 1, (0.3,), (0.25,))
    assert of(opened(f"hf:{tmp_path}")) == wanted


@pytest.mark.torch
def test_siglip_has_no_cls_and_a_convolutional_network_has_a_map(tmp_path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    siglip = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=small, vision_config={**small, "image_size": 32, "patch_size": 8})
    ).eval()
    siglip.save_pretrained(tmp_path / "siglip")
    values = found(made := opened(f"hf:{tmp_path / 'siglip'}"))
    assert set(values) == {"mean", "mean+std"}
    with torch.no_grad():
        tokens = siglip.vision_model(images(of(made))).last_hidden_state
    np.testing.assert_allclose(values["mean"], tokens.mean(1).numpy(), **CLOSE)

    network = transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))
    network.eval().save_pretrained(tmp_path / "convnext")
    (tmp_path / "convnext/preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32}}))
    values = found(made := opened(f"hf:{tmp_path / 'convnext'}"))
    with torch.no_grad():
        output = network(images(of(made))).last_hidden_state
    np.testing.assert_allclose(values["mean"], output.mean((2, 3)).numpy(), **CLOSE)


@pytest.mark.torch
def test_mask_restricts_patch_statistics_to_the_patches_inside(tmp_path) -> None:
    import torch

    model = save(tmp_path, "Dinov2", patch_size=16)
    made = opened(str(tmp_path))
    with torch.no_grad():
        tokens = model(images(of(made))).last_hidden_state.numpy()
    # Rows 0 to 5 and columns 3 to 8 of up to 20x24 px: the first of four patches in slices of 20 px height and of 16 px.
    np.testing.assert_allclose(found(made, masks=True)["mean"], tokens[:, 1], **CLOSE)


@pytest.mark.torch
def test_random_floor_has_the_shape_of_the_model_and_other_weights(tmp_path) -> None:
    save(tmp_path, "Dinov2")
    trained, floor = backbones.open_backbones([str(tmp_path)], ["random"], readouts=READOUTS)
    assert floor.name == "random" and floor.provenance.preparation == trained.provenance.preparation
    assert floor.digest != trained.digest
    mine, other = found(trained)["mean"], found(floor)["mean"]
    assert mine.shape == other.shape and not np.allclose(mine, other)


@pytest.mark.torch
def test_model_that_cannot_be_used_is_one_line(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder has no config.json; name one that save_pretrained"):
        opened(f"hf:{tmp_path / 'empty'}")
    save(tmp_path / "dino", "Dinov2")
    with pytest.raises(UserError, match="no layer 3; the encoder of .* has layers 1 to 2"):
        opened(f"hf:{tmp_path / 'dino'}", [features.Readout.parse("mean@3")])
    with pytest.raises(UserError, match="cannot be loaded: .*; check the name, and that its files are on this machine"):
        opened("hf:nobody/nothing")
    import safetensors.numpy

    weights = tmp_path / "dino/model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    del tensors["layernorm.weight"]
    safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="the weights lack layernorm.weight, which would be random"):
        opened(f"hf:{tmp_path / 'dino'}")


def test_missing_package_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r"needs the package torch, which cannot be imported .*curia-jax\[backbones\]"):
        torch_backbones.open_backbone("timm:vit_tiny_patch16_224", READOUTS)


# ---- timm and open_clip


@pytest.mark.backbones
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_timm_features_equal_direct_calls(tmp_path, pool: str) -> None:
    import timm
    import torch

    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": pool}
    told = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, pretrained_cfg_overlay=told, **args).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=args)
    made = opened(f"timm:local-dir:{tmp_path}", WITH_BLOCKS)
    assert of(made) == Preparation("window", HU, (32, 32), "bicubic", 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with torch.no_grad():
        tokens = model.forward_features(images(of(made)))
        block = model.blocks[0](model.norm_pre(model._pos_embed(model.patch_embed(images(of(made))))))
    assert_features_are_of(block, tokens, found(made))


@pytest.mark.backbones
@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_timm_networks_with_a_map_give_its_mean(monkeypatch, name: str) -> None:
    import timm
    import torch

    create = timm.create_model

    def seeded(name: str, *, pretrained: bool, **args):
        torch.manual_seed(0)
        return create(name, pretrained=False, **args)

    monkeypatch.setattr(timm, "create_model", seeded)  # no weights of these are on this machine
    made = opened(f"timm:{name}", [features.Readout.parse("mean")])
    model = seeded(name, pretrained=False, num_classes=0).eval()
    with torch.no_grad():
        wanted = model.forward_features(images(of(made)))
    wanted = wanted.mean((2, 3) if name == "resnet10t" else (1, 2)).numpy()
    np.testing.assert_allclose(found(made)["mean"], wanted, rtol=1e-4, atol=1e-5)


CLIP = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}}  # fmt: skip


def save_clip(folder: Path, model_config: dict):
    import open_clip
    import torch

    (folder / "open_clip_config.json").write_text(
        json.dumps(
            {"model_cfg": model_config, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "interpolation": "bilinear"}}
        )
    )
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model


@pytest.mark.backbones
def test_open_clip_features_equal_direct_calls(tmp_path) -> None:
    import open_clip
    import torch

    visual = save_clip(tmp_path, CLIP).visual
    made = opened(f"open_clip:local-dir:{tmp_path}", WITH_BLOCKS)
    std = tuple(open_clip.OPENAI_DATASET_STD)
    assert of(made) == Preparation("window", HU, (32, 32), "bilinear", 3, (0.5, 0.4, 0.3), std)
    with torch.no_grad():
        embedded = visual._embeds(images(of(made)))
        block = visual.transformer.resblocks[0](embedded)
        tokens = visual.ln_post(visual.transformer(embedded))
    assert_features_are_of(block, tokens, found(made))


@pytest.mark.backbones
def test_open_clip_with_a_timm_trunk_as_biomedclip_has_equals_direct_calls(tmp_path) -> None:
    import torch

    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear",
              "image_size": 224}  # fmt: skip
    visual = save_clip(tmp_path, CLIP | {"vision_cfg": vision}).visual
    made = opened(f"open_clip:local-dir:{tmp_path}")
    with torch.no_grad():
        tokens = visual.trunk.forward_features(images(of(made)))
    for name, wanted in wanted_features(tokens, 1).items():
        np.testing.assert_allclose(found(made)[name], wanted, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.backbones
def test_open_clip_model_without_weights_is_refused() -> None:
    with pytest.raises(UserError, match=r"names no weights; write open_clip:ViT-B-32@TAG"):
        opened("open_clip:ViT-B-32")
