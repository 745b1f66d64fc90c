"""Low-rank adapters (LoRA, Hu et al. 2021) of an encoder: y = x kernel + bias + (alpha / rank) x a b, with the kernel frozen.

  adapters = lora.init(config, encoder, key)                  {"blocks": {"attn": {"qkv": {"a", "b"}, …}, …}}, float32
  lora.attach(vit.bind(model, encoder), config, adapters)     an encoder that computes with them
  lora.merged(encoder, config, adapters)                      parameters of a plain encoder that computes the same

The fused projection has one `a` for q, k and v, and the columns of its `b` are [q | k | v]: as adapters of separate projections
these are three of the same rank with equal `a`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Key

from curia_jax.models import vit
from curia_jax.models.params import Params

TARGETS = {
    "qkv": "attn",
    "proj": "attn",
    "fc1": "mlp",
    "fc2": "mlp",
}  # linear layers, and the part of the block they are in


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which layers have adapters.

    Attributes:
      rank: 0 for no adapters.
      alpha: the product of an adapter counts alpha / rank.
      targets: of TARGETS.

    Raises:
      ValueError: a field has a value that it may not have.
    """

    rank: int
    alpha: int | float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}; it has to be at least 0")
        wrong = [name for name in self.targets if name not in TARGETS]
        if wrong or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets is {'+'.join(self.targets)!r}; it may be some of {'+'.join(TARGETS)}, each once")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0


def init(config: LoRAConfig, encoder: Params, key: Key[jax.Array, ""]) -> Params:
    """New adapters, which change nothing: `a` uniform within 1 / sqrt(inputs), as in peft, `b` zero. None at rank 0.

    Args:
      encoder: its parameters, or their shapes.
    """
    if not config.rank:
        return {}
    blocks: dict[str, dict[str, Params]] = {}
    for name, each in zip(config.targets, jax.random.split(key, len(config.targets)), strict=True):
        depth, inputs, outputs = encoder["blocks"][TARGETS[name]][name]["kernel"].shape
        bound = inputs**-0.5
        a = jax.random.uniform(each, (depth, inputs, config.rank), jnp.float32, minval=-bound, maxval=bound)
        blocks.setdefault(TARGETS[name], {})[name] = {
            "a": a,
            "b": jnp.zeros((depth, config.rank, outputs), jnp.float32),
        }
    return {"blocks": blocks}


def attach(encoder: vit.ViT, config: LoRAConfig, adapters: Params) -> vit.ViT:
    """The encoder itself, with these adapters in its linear layers."""
    for part, layers in adapters.get("blocks", {}).items():
        for name, adapter in layers.items():
            layer = getattr(getattr(encoder.blocks, part), name)
            layer.adapter = vit.Adapter(adapter["a"], adapter["b"], config.scale)
    return encoder


def merged(encoder: Params, config: LoRAConfig, adapters: Params) -> Params:
    """Parameters of an encoder without adapters that computes the same: kernels + (alpha / rank) a b, in float32."""
    blocks = {part: dict(layers) for part, layers in encoder["blocks"].items()}
    for part, layers in adapters.get("blocks", {}).items():
        for name, adapter in layers.items():
            change = jnp.matmul(adapter["a"], adapter["b"], precision="highest") * config.scale
            blocks[part][name] = {**blocks[part][name], "kernel": blocks[part][name]["kernel"] + change}
    return {**encoder, "blocks": blocks}
