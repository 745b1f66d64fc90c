"""A low-rank adapter in the form of peft: adapter_config.json and adapter_model.safetensors, for a classifier of transformers.

An adapter of ours adds (alpha / rank) x a b to x kernel, with a (inputs, rank) and b (rank, outputs); peft computes the same with
lora_A.weight = a' and lora_B.weight = b'. The fused projection of q, k and v has one a, and columns of b for each: three adapters of the
same rank with equal lora_A. Nothing is approximated.

peft finds layers by their names in memory, which transformers 5 changed, and does not rename those of an adapter (0.21), so that an
adapter is written for one of the two versions.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float

from curia_jax.convert.folder import Json
from curia_jax.convert.layouts import Layout
from curia_jax.models.lora import TARGETS, LoRAConfig
from curia_jax.models.params import Params

LAYOUTS = ("vit_classifier", "dinov2_classifier")
VERSIONS = (4, 5)  # of transformers
_PREFIX = "base_model.model."  # of the wrapped model's names in a file of peft
# Names in memory of version 5; those of version 4 are the layouts' own.
_BLOCKS_5 = {"vit_classifier": "vit.layers.{}", "dinov2_classifier": "dinov2.encoder.layer.{}"}
_MODULES_5 = {
    "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "proj": ("attention.o_proj",), "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}  # fmt: skip


def _names(layout: Layout, module: str, version: int) -> tuple[str, ...]:
    """Of a layer's parts, with "{}" for the block."""
    if version == 5:
        return tuple(f"{_BLOCKS_5[layout.name]}.{name}" for name in _MODULES_5[module])
    names = layout.table[f"encoder/blocks/{TARGETS[module]}/{module}"]
    return (names,) if isinstance(names, str) else tuple(names)


def tensors(
    layout: Layout, config: LoRAConfig, adapters: Params, head: Params, version: int
) -> dict[str, Float[np.ndarray, "..."]]:
    """The content of adapter_model.safetensors: the adapters of every block, and the head, which is trained as a whole.

    Args:
      adapters: {"blocks": {part: {module: {"a": (depth, inputs, rank), "b": (depth, rank, outputs)}}}}.
      head: kernel and bias, as `Layout.own_head` gives them.
      version: of transformers, in whose names; of VERSIONS.
    """
    found: dict[str, np.ndarray] = {}
    for module in config.targets:
        part, names = TARGETS[module], _names(layout, module, version)
        a, b = (np.asarray(adapters["blocks"][part][module][name], np.float32) for name in ("a", "b"))
        for block in range(len(a)):
            for name, columns in zip(names, np.split(b[block], len(names), axis=-1), strict=True):
                place = f"{_PREFIX}{name.format(block)}"
                found[f"{place}.lora_A.weight"] = np.ascontiguousarray(a[block].T)
                found[f"{place}.lora_B.weight"] = np.ascontiguousarray(columns.T)
    name = f"{_PREFIX}{layout.table['head']}"
    found[f"{name}.weight"] = np.ascontiguousarray(np.asarray(head["kernel"], np.float32).T)
    found[f"{name}.bias"] = np.ascontiguousarray(np.asarray(head["bias"], np.float32))
    return found


def config_json(layout: Layout, config: LoRAConfig, version: int) -> Json:
    """adapter_config.json. The base model is not named: a user loads it from wherever it is."""
    modules = [
        name.replace(".", r"\.").format(r"\d+") for module in config.targets for name in _names(layout, module, version)
    ]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": "|".join(modules),  # a pattern that matches whole names
        "modules_to_save": [layout.table["head"]],
    }


def merged(
    base: Mapping[str, np.ndarray], adapter: Mapping[str, np.ndarray], content: Json, renamed: Mapping[str, str]
) -> dict[str, Float[np.ndarray, "..."]]:
    """What peft computes with, tensor by tensor: the base model with both files of the adapter merged into it.

    Args:
      base: tensors of the base model.
      adapter: of adapter_model.safetensors.
      content: of adapter_config.json.
      renamed: module as the adapter names it -> as the base does.

    Raises:
      KeyError: the adapter names a module that the base has not, or lacks half of a pair.
    """
    found = dict(base)
    scale = content["lora_alpha"] / content["r"]
    for name, values in adapter.items():
        place, ending = name.removeprefix(_PREFIX), ".lora_A.weight"
        if place.endswith(ending):
            module = place.removesuffix(ending)
            change = adapter[f"{_PREFIX}{module}.lora_B.weight"].astype(np.float64) @ values.astype(np.float64)
            weight = f"{renamed[module]}.weight"
            found[weight] = (found[weight] + scale * change).astype(np.float32)
        elif not place.endswith(".lora_B.weight"):
            if place not in found:
                raise KeyError(place)
            found[place] = values
    return found


def renamed(layout: Layout, config: LoRAConfig, depth: int, version: int) -> dict[str, str]:
    """Adapted modules as this version of transformers names them -> as the files of the base model do."""

    def pairs() -> Iterator[tuple[str, str]]:
        for module in config.targets:
            for theirs, own in zip(_names(layout, module, version), _names(layout, module, 4), strict=True):
                for block in range(depth):
                    yield theirs.format(block), own.format(block)

    return dict(pairs())
