"""Backbones of transformers, timm and open_clip, run by PyTorch in float32 on its GPU if there is one.

Each has its own preparation of pixels: size, channels, mean, deviation and resampling. What none of them knows is how HU
and MR values become [0, 1]; that is the window of our own runs (configs/base.py), except for Curia's models, which standardise.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curia_common.errors import DataError, UserError
from curia_jax import data, json_records
from curia_jax.evaluate import preparation, token_backbone
from curia_jax.evaluate.features import LAST, Readout
from curia_jax.evaluate.preparation import Preparation
from curia_jax.evaluate.results import Provenance
from curia_jax.evaluate.token_backbone import TokenBackbone, Tokens

HF, TIMM, OPEN_CLIP = LIBRARIES = ("hf", "timm", "open_clip")
Tensor = Any
Model = Any  # torch.nn.Module
_PIL = {2: "bilinear", 3: "bicubic"}  # numbers of resampling filters in preprocessor_config.json
_SEED = 1  # of random weights

# (images on the device, blocks) -> tokens by layer
Encode = Callable[[Tensor, Sequence[int]], Mapping[int | str, Tokens]]


@dataclasses.dataclass(frozen=True)
class _Opened:
    model: Model
    depth: int  # blocks that tokens can be taken after; 0 for none
    preparation: Preparation
    encode: Encode


def open_backbone(word: str, readouts: Sequence[Readout], *, name: str | None = None) -> TokenBackbone:
    """A model of one of LIBRARIES.

    Args:
      word: library:model as the user typed it.
      name: of the result; with one the model has random weights, by which it is a floor.

    Raises:
      UserError: a package is missing, there is no such model, its weights cannot be had, or it has no such layer.
    """
    library, _, model = word.partition(":")
    torch = token_backbone.package("torch", word)
    trained = name is None
    openers = {HF: _transformers, TIMM: _timm, OPEN_CLIP: _open_clip}
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        try:
            opened = openers[library](model, word, trained)
        except (UserError, DataError):
            raise
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--backbones={word} cannot be loaded: {token_backbone.first_line(error)}; check the name, and that its files are on "
                "this machine or the hub can be reached"
            ) from error
    for readout in readouts:
        for layer in readout.layers:
            if isinstance(layer, int) and not 1 <= layer <= opened.depth:
                layers = f"layers 1 to {opened.depth}" if opened.depth else "none but the last"
                raise UserError(f"no layer {layer}; the encoder of {word} has {layers}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened.model.eval().float().to(device)

    def forward(batch: data.HostBatch, blocks: Sequence[int]) -> Mapping[int | str, Tokens]:
        images = torch.from_numpy(token_backbone.prepared(batch, opened.preparation)).to(device)
        with torch.inference_mode():
            return opened.encode(images, blocks)

    state = ((key, values.detach().cpu().numpy()) for key, values in sorted(opened.model.state_dict().items()))
    provenance = Provenance(
        weights_sha256=token_backbone.digest_of_arrays(state), preparation=opened.preparation.to_json(),
        readouts=tuple(map(str, readouts)), image_size=opened.preparation.size,
    )  # fmt: skip
    return TokenBackbone(name or word, tuple(readouts), provenance, forward, depth=opened.depth)


def _split(tokens: Tensor, grid: tuple[int, int], word: str, *, has_cls: bool = True) -> Tokens:
    """Tokens of a sequence: first CLS and registers, if there are any, then the patches row by row."""
    count, length, width = tokens.shape
    prefix = length - grid[0] * grid[1]
    if prefix < 0:
        raise DataError(
            f"{word} gives {length} tokens for {grid[0]}x{grid[1]} patches; it is not a ViT that can be read"
        )
    patches = tokens[:, prefix:].reshape(count, *grid, width)
    return Tokens(tokens[:, 0] if prefix and has_cls else None, patches)


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


# ---- transformers


def _transformers(name: str, word: str, trained: bool) -> _Opened:
    transformers = token_backbone.package("transformers", word)
    _check_folder(name, word)
    config = transformers.AutoConfig.from_pretrained(name)
    masked = config.model_type == "vit_mae"
    if masked:
        config.mask_ratio = 0.0  # otherwise it hides most of the slice
    if trained:
        model, report = transformers.AutoModel.from_pretrained(name, config=config, output_loading_info=True)
        missing = sorted(key for key in map(str, report["missing_keys"]) if "pooler" not in key)
        if missing:
            raise UserError(
                f"--backbones={word}: the weights lack {missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which would be random; name a whole model"
            )
    else:
        model = transformers.AutoModel.from_config(config)
    model = getattr(model, "vision_model", model)  # of CLIP and SigLIP
    config = model.config
    prepared = _of_processor(name, config)
    patch = getattr(config, "patch_size", None)
    takes = inspect.signature(model.forward).parameters
    other_size = prepared.size != _pair(getattr(config, "image_size", None) or prepared.size)
    extra = {"interpolate_pos_encoding": True} if other_size and "interpolate_pos_encoding" in takes else {}

    def encode(images: Tensor, blocks: Sequence[int]) -> Mapping[int | str, Tokens]:
        more = dict(extra)
        if masked:  # patches stay in their order
            count = prepared.size[0] // _pair(patch)[0] * (prepared.size[1] // _pair(patch)[1])
            more["noise"] = images.new_tensor(np.tile(np.arange(count), (len(images), 1)))
        output = model(images, output_hidden_states=bool(blocks), return_dict=True, **more)
        last = output.last_hidden_state
        if last.ndim == 4:  # of a convolutional network
            return {LAST: Tokens(None, last.permute(0, 2, 3, 1))}
        if patch is None:
            raise DataError(f"{word} gives a sequence of tokens, but its config names no patch_size; it cannot be read")
        grid = prepared.size[0] // _pair(patch)[0], prepared.size[1] // _pair(patch)[1]
        outputs = {LAST: last, **{block: output.hidden_states[block] for block in blocks}}
        return {layer: _split(tokens, grid, word) for layer, tokens in outputs.items()}

    depth = getattr(config, "num_hidden_layers", 0) if patch else 0
    return _Opened(model, depth, prepared, encode)


def _check_folder(name: str, word: str) -> None:
    """Raises UserError where a folder is not a model that transformers reads."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"--backbones={word}: the folder has no config.json; name one that save_pretrained or the hub wrote"
        )


def _of_processor(name: str, config: Any) -> Preparation:
    """The preparation that preprocessor_config.json states, read without running any code of the model's; else what the config says."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )  # fmt: skip
    said: Mapping[str, Any] = {}
    if path is not None:
        content = json_records.loads(Path(path).read_bytes())
        said = content if isinstance(content, dict) else {}
    channels = getattr(config, "num_channels", 3)
    settings = preparation.default_settings()
    size = said.get("crop_size") if said.get("do_center_crop", "crop_size" in said) else None
    size = size or said.get("size") or getattr(config, "image_size", None) or 224
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        size = (size["height"], size["width"]) if "height" in size else side
    if said.get("image_processor_type") == "CuriaJaxImageProcessor":  # an export of ours
        window = said["hu_window"]
        return Preparation(
            preparation.WINDOW, (window[0], window[1]), _pair(size), said["resample"], channels, tuple(said["image_mean"]),
            tuple(said["image_std"]),
        )  # fmt: skip
    if "curia" in json.dumps([said.get("image_processor_type"), said.get("auto_map")]).lower():
        return Preparation(preparation.STANDARD, settings.hu_window, _pair(size), "bicubic", channels)
    normalise = said.get("do_normalize", True)
    mean = said.get("image_mean", [0.5] * channels) if normalise else [0.0]
    std = said.get("image_std", [0.5] * channels) if normalise else [1.0]
    return Preparation(
        preparation.WINDOW, settings.hu_window, _pair(size), _PIL.get(said.get("resample", 3), "bicubic"), channels,
        tuple(mean), tuple(std),
    )  # fmt: skip


# ---- timm


def _timm(name: str, word: str, trained: bool) -> _Opened:
    timm = token_backbone.package("timm", word)
    model = timm.create_model(name, pretrained=trained, num_classes=0)
    return _Opened(
        model, _timm_depth(model), _of_timm(timm.data.resolve_model_data_config(model)), _timm_encode(model, word)
    )


def _of_timm(told: Mapping[str, Any]) -> Preparation:
    channels, *size = told["input_size"]
    return Preparation(
        preparation.WINDOW, preparation.default_settings().hu_window, _pair(size),
        "bilinear" if told["interpolation"] == "bilinear" else "bicubic", channels, tuple(told["mean"]), tuple(told["std"]),
    )  # fmt: skip


def _timm_depth(model: Model) -> int:
    return len(model.blocks) if hasattr(model, "blocks") and hasattr(model, "num_prefix_tokens") else 0


def _timm_encode(model: Model, word: str) -> Encode:
    """Tokens after `forward_features`, with the norm that this model has there; those of blocks without any."""

    def encode(images: Tensor, blocks: Sequence[int]) -> Mapping[int | str, Tokens]:
        if not blocks:
            last, between = model.forward_features(images), []
        else:
            last, between = model.forward_intermediates(
                images,
                indices=[block - 1 for block in blocks],
                return_prefix_tokens=True,
                norm=False,
                output_fmt="NCHW",
            )
        if last.ndim == 4:  # of a convolutional or hierarchical network; channels come first or last
            channels_last = last.shape[-1] == model.num_features and last.shape[1] != model.num_features
            return {LAST: Tokens(None, last if channels_last else last.permute(0, 2, 3, 1))}
        grid = _pair(model.patch_embed.grid_size)
        has_cls = getattr(model, "cls_token", None) is not None
        found: dict[int | str, Tokens] = {LAST: _split(last, grid, word, has_cls=has_cls)}
        for block, (patches, prefix) in zip(blocks, between, strict=True):
            found[block] = Tokens(prefix[:, 0] if has_cls else None, patches.permute(0, 2, 3, 1))
        return found

    return encode


# ---- open_clip


def _open_clip(name: str, word: str, trained: bool) -> _Opened:
    """MODEL@TAG, hf-hub:OWNER/NAME or local-dir:FOLDER."""
    open_clip = token_backbone.package("open_clip", word)
    known = name.startswith(("hf-hub:", "local-dir:"))
    architecture, _, tag = (name, "", "") if known else name.partition("@")
    if not known and not tag:
        raise UserError(
            f"--backbones={word} names no weights; write open_clip:{name}@TAG (open_clip.list_pretrained() shows the tags), "
            "open_clip:hf-hub:OWNER/NAME or open_clip:local-dir:FOLDER"
        )
    model = open_clip.create_model(
        architecture, pretrained=(tag or None) if trained else None, load_weights=trained, require_pretrained=trained,
        pretrained_text=False,
    )  # fmt: skip
    told = open_clip.get_model_preprocess_cfg(model)
    visual = model.visual
    size = _pair(told.get("size", getattr(visual, "image_size", 224)))
    prepared = Preparation(
        preparation.WINDOW, preparation.default_settings().hu_window, size,
        "bilinear" if told.get("interpolation") == "bilinear" else "bicubic", 3,
        tuple(told.get("mean", open_clip.OPENAI_DATASET_MEAN)), tuple(told.get("std", open_clip.OPENAI_DATASET_STD)),
    )  # fmt: skip
    if hasattr(visual, "trunk"):  # a model of timm, as in BiomedCLIP
        return _Opened(visual, _timm_depth(visual.trunk), prepared, _timm_encode(visual.trunk, word))
    if not hasattr(visual, "transformer"):  # a ResNet, which pools its map by attention
        return _Opened(visual, 0, prepared, lambda images, blocks: {LAST: Tokens(visual(images), None)})
    depth = len(visual.transformer.resblocks)

    def encode(images: Tensor, blocks: Sequence[int]) -> Mapping[int | str, Tokens]:
        def after(indices: list[int], norm: bool) -> list[Tokens]:
            found = visual.forward_intermediates(
                images, indices=indices, normalize_intermediates=norm, intermediates_only=True, output_extra_tokens=True
            )
            pairs = zip(found["image_intermediates_prefix"], found["image_intermediates"], strict=True)
            return [Tokens(prefix[:, 0], patches.permute(0, 2, 3, 1)) for prefix, patches in pairs]

        last = {LAST: after([depth - 1], norm=True)[0]}
        return last | (dict(zip(blocks, after([b - 1 for b in blocks], norm=False), strict=True)) if blocks else {})

    return _Opened(visual, depth, prepared, encode)
