"""Masked autoencoder (He et al. 2021), as facebookresearch/mae computes it.

params = mae.init(config, key)
output = mae.bind(config, params)(images, noise)      output.loss, output.prediction, output.mask, …
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from curia_jax.models import ops, vit
from curia_jax.models.params import Params, from_dict, to_dict


@dataclasses.dataclass(frozen=True)
class MAEConfig:
    """Everything that decides the shapes and the arithmetic of a masked autoencoder.

    Attributes:
      decoder_width, decoder_depth, decoder_heads, decoder_mlp_width: the decoder's blocks.
      mask_ratio: share of the patches that is hidden.
      norm_pix: predict patches standardised by their own mean and deviation.
      norm_pix_eps: added to a patch's variance. Pixels have a deviation of about 1: with 1e-6 the noise of air counts as much
        as anatomy, with 1e-2 only patches do that vary by more than a tenth of the image.

    Raises:
      ValueError: sizes that do not fit together.
    """

    encoder: vit.ViTConfig
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    decoder_mlp_width: int
    mask_ratio: float
    norm_pix: bool
    norm_pix_eps: float

    def __post_init__(self) -> None:
        for name in ("decoder_width", "decoder_depth", "decoder_heads", "decoder_mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 1")
        vit.check_width("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        patches = self.encoder.patches
        if not 1 <= self.visible < patches:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} leaves {self.visible} of {patches} patches visible; "
                f"at least 1 has to be visible and 1 hidden"
            )
        if self.norm_pix_eps < 0:
            raise ValueError(f"norm_pix_eps is {self.norm_pix_eps}; it is added to a variance and has to be 0 or more")

    @property
    def visible(self) -> int:
        """Patches that the encoder gets: int(patches (1 - mask_ratio)), rounded as in the reference."""
        return int(self.encoder.patches * (1 - self.mask_ratio))

    def describe(self) -> str:
        """What the model is, by its dimensions: "MAE of ViT-B/16, decoder 8 x 512"."""
        return f"MAE of {self.encoder.describe()}, decoder {self.decoder_depth} x {self.decoder_width}"


def config(
    size: str = "B",
    *,
    image_size: int | Sequence[int] = 224,
    patch_size: int | Sequence[int] = 16,
    channels: int = 1,
    decoder_width: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    decoder_mlp_width: int | None = None,
    mask_ratio: float = 0.75,
    norm_pix: bool = True,
    norm_pix_eps: float = 1e-6,
    **encoder: Any,
) -> MAEConfig:
    """A named size with the reference's decoder; `encoder` changes fields of ViTConfig by name.

    Raises:
      ValueError: what ViTConfig and MAEConfig raise.
    """
    return MAEConfig(
        encoder=vit.config(size, image_size=image_size, patch_size=patch_size, channels=channels, **encoder),
        decoder_width=decoder_width,
        decoder_depth=decoder_depth,
        decoder_heads=decoder_heads,
        decoder_mlp_width=4 * decoder_width if decoder_mlp_width is None else decoder_mlp_width,
        mask_ratio=mask_ratio,
        norm_pix=norm_pix,
        norm_pix_eps=norm_pix_eps,
    )


class MAEOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
      loss: mean squared error over the hidden patches of the batch, float32.
      prediction: for every patch, in the units of `target`.
      target: what the prediction is compared with: pixels, or standardised pixels with norm_pix.
      mask: 1 where a patch was hidden, 0 where it was visible.
      patch_loss: mean squared error of every patch.
    """

    loss: Float[Array, ""]
    prediction: Float[Array, "batch patches values"]
    target: Float[Array, "batch patches values"]
    mask: Float[Array, "batch patches"]
    patch_loss: Float[Array, "batch patches"]


def random_mask(
    noise: Float[Array, "batch patches"], visible: int
) -> tuple[Int[Array, "batch patches"], Float[Array, "batch patches"]]:
    """The patches with the smallest noise stay visible, in the order of their noise; of equal ones, the first.

    Returns:
      For every patch its rank in the order of the noise, and 1 where a patch is hidden.
    """
    rank = ops.ranks(noise)
    return rank, (rank >= visible).astype(jnp.float32)


def patch_statistics(
    patches: Float[Array, "batch patches values"], eps: float
) -> tuple[Float[Array, "batch patches 1"], Float[Array, "batch patches 1"]]:
    """Mean and sqrt(unbiased variance + eps) of each patch: what norm_pix removes and a picture needs back."""
    mean = jnp.mean(patches, axis=-1, keepdims=True)
    variance = jnp.var(patches, axis=-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(variance + eps)


class Decoder(nnx.Module):
    """Visible tokens to a prediction for every patch.

    Parameters: embed, mask_token (1, 1, decoder width), blocks (stacked over depth), norm, pred.
    """

    def __init__(self, config: MAEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        encoder, width = config.encoder, config.decoder_width
        self.embed = vit.Linear(encoder.width, width, rngs=rngs)
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width), jnp.float32))
        self.blocks = vit.stacked_blocks(
            config.decoder_depth, width, config.decoder_heads, config.decoder_mlp_width,
            encoder.activation, encoder.layer_norm_eps, rngs=rngs,
        )  # fmt: skip
        self.norm = vit.LayerNorm(width, encoder.layer_norm_eps)
        self.pred = vit.Linear(width, encoder.patch_values, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "batch visible_and_cls width"], rank: Int[Array, "batch patches"]
    ) -> Float[Array, "batch patches values"]:
        """Predicted values of every patch, in the order of the patches.

        Args:
          tokens: CLS and the visible patches in the order of their rank.
          rank: of every patch, as `random_mask` returns it.
        """
        config, encoder = self.config, self.config.encoder
        x = self.embed(tokens)
        with jax.named_scope("mask"):
            rank = jnp.pad(rank + 1, ((0, 0), (1, 0)))  # CLS stays first
            visible = ops.put_back(ops.selection(rank, x.shape[1], x.dtype), x)
            x = jnp.where((rank < x.shape[1])[:, :, None], visible, self.mask_token[...].astype(x.dtype))
            x = x + vit.position_table(config.decoder_width, encoder.grid).astype(x.dtype)
        x, _ = vit.apply_blocks(self.blocks, x, encoder, unroll=min(encoder.unroll, config.decoder_depth))
        with jax.named_scope("norm"):
            x = self.norm(x)
        with jax.named_scope("pred"):
            return self.pred(x)[:, 1:]


class MAE(nnx.Module):
    """Encoder, decoder and loss."""

    def __init__(self, config: MAEConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = vit.ViT(config.encoder, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch rows columns channels"], noise: Float[Array, "batch patches"]
    ) -> MAEOutput:
        """One pass over normalised images.

        Args:
          noise: one number per patch and image; each image hides the patches with its largest numbers.
        """
        config = self.config
        with jax.named_scope("encoder"):
            with jax.named_scope("mask"):
                rank, mask = random_mask(noise, config.visible)
                chosen = ops.selection(rank, config.visible, vit.DTYPES[config.encoder.dtype])
            tokens, _ = self.encoder.encode(self.encoder.embed(images, chosen))
        with jax.named_scope("decoder"):
            prediction = self.decoder(tokens, rank).astype(jnp.float32)
        with jax.named_scope("loss"):
            target = vit.patchify(images.astype(jnp.float32), config.encoder.patch_size)
            if config.norm_pix:
                mean, deviation = patch_statistics(target, config.norm_pix_eps)
                target = (target - mean) / deviation
            patch_loss = jnp.mean(jnp.square(prediction - target), axis=-1)
            # Over the whole batch: sharded or not, it is one sum and one division.
            loss = jnp.sum(patch_loss * mask) / jnp.sum(mask)
        return MAEOutput(loss, prediction, target, mask, patch_loss)


def init(config: MAEConfig, key: Key[Array, ""]) -> Params:
    """New parameters, {"encoder": …, "decoder": …}, float32."""
    return to_dict(MAE(config, rngs=nnx.Rngs(params=key)))


def bind(config: MAEConfig, params: Params) -> MAE:
    """The model with the given parameters.

    Raises:
      ValueError: the parameters belong to a model of another shape; the first tensors that differ are named.
    """
    return from_dict(lambda: MAE(config, rngs=nnx.Rngs(params=0)), params)


def decoder_flops(config: MAEConfig) -> int:
    """FLOPs of the decoder's matmuls in one forward pass on one image.

    With v visible and n = 1 + all tokens, encoder width D, decoder width d and depth k, P values in a patch:
    2 (1 + v) D d + k vit.block_flops(n, d, decoder_mlp_width) + 2 n d P.
    """
    encoder, width = config.encoder, config.decoder_width
    tokens = 1 + encoder.patches
    embed = 2 * (1 + config.visible) * encoder.width * width
    predict = 2 * tokens * width * encoder.patch_values
    return embed + config.decoder_depth * vit.block_flops(tokens, width, config.decoder_mlp_width) + predict


def flops(config: MAEConfig) -> int:
    """FLOPs of the matmuls of one forward pass on one image: vit.flops on the visible patches + decoder_flops.

    A training step costs three times that: the backward pass has two matmuls for each of the forward pass. Those that only
    select tokens (`ops.selection`) do not count.
    """
    return vit.flops(config.encoder, config.visible) + decoder_flops(config)
