"""Frozen features of slices: readouts of an encoder's tokens, or of the pixels themselves."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from curia_common.errors import DataError, UserError
from curia_jax import augment, data
from curia_jax.evaluate.results import Provenance
from curia_jax.models import vit
from curia_jax.models.params import Params
from curia_jax.settings import Augment
from data_pipeline.format.shards import SliceSource

POOLINGS = ("mean", "std", "cls")
LAST, BEFORE_NORM = "last", "prenorm"
# Side of the pixel baseline's image, and of the image whose intensities the histogram counts, in px.
PIXELS, COUNTED = 32, 128
BINS = 64


@dataclasses.dataclass(frozen=True)
class Readout:
    """How the tokens of an encoder become one vector.

    Attributes:
      pooling: statistics that are concatenated, of POOLINGS: "cls"; the "mean" of the patch tokens; their standard deviation,
        "std", which keeps some of what the mean loses (both together: Snyder et al. 2018, doi 10.1109/ICASSP.2018.8461375).
        Where a task has masks, mean and std are over the patches inside; see `augment.patches_inside`.
      layers: outputs that are pooled and concatenated: LAST, that of the final norm, BEFORE_NORM, that of the last block, or numbers
        of blocks from 1 to the depth, whose outputs are taken before any norm.
    """

    pooling: tuple[str, ...]
    layers: tuple[int | str, ...] = (LAST,)

    @classmethod
    def parse(cls, text: str) -> "Readout":
        """Reads "mean+std" or "mean+std@6+last".

        Raises:
          UserError: there is no such pooling, or a layer is no number.
        """
        poolings, _, layers = text.partition("@")
        for name in poolings.split("+"):
            if name not in POOLINGS:
                raise UserError(f"no features {name!r}; there are: {', '.join(POOLINGS)}, and several joined by +")
        words = layers.split("+") if "@" in text else [LAST]
        if not all(word in (LAST, BEFORE_NORM) or word.isdecimal() for word in words):
            raise UserError(
                f"features {text!r}: after @ write {LAST}, {BEFORE_NORM}, or numbers of blocks joined by +, such as @6+12"
            )
        return cls(tuple(poolings.split("+")), tuple(int(word) if word.isdecimal() else word for word in words))

    def __str__(self) -> str:
        layers = "" if self.layers == (LAST,) else "@" + "+".join(map(str, self.layers))
        return "+".join(self.pooling) + layers


@dataclasses.dataclass(frozen=True)
class View:
    """A function from pixels to features.

    Attributes:
      compute: (params, batch) -> features by the name of their readout; pure.
      params: first argument of both, so that weights are not constants of the compiled program.
      tokens: (params, batch, before_norm) -> patch tokens and which of them are inside the mask; None for features that are not of
        patches.
    """

    compute: Callable[[Params, augment.Batch], dict[str, Float[Array, "batch _features"]]]
    params: Params
    tokens: Callable[[Params, augment.Batch, bool], tuple[Float[Array, "b t d"], Bool[Array, "b t"]]] | None = None


def encoder_view(
    config: vit.ViTConfig,
    params: Params,
    settings: Augment,
    *,
    readouts: Sequence[Readout] = (Readout(("mean",)),),
    image_sizes: Sequence[tuple[int, int]] = (),
) -> View:
    """Features of an encoder, all readouts from one forward pass.

    Args:
      config, params: the encoder.
      settings: the run's `augment` settings; pixels are prepared in the same way.
      image_sizes: (height, width) in px of the encoder's images; the features of several are concatenated. Default is the
        size of the training. Objects look larger in training crops than in a whole slice of the same size, so that a
        larger size can be better (Touvron et al. 2019, arXiv 1906.06423).

    Raises:
      UserError: there is no such layer, or a size is not a multiple of the patch.
    """
    layers = {layer for readout in readouts for layer in readout.layers}
    if BEFORE_NORM in layers:
        layers.add(config.depth)
    blocks = sorted(layer for layer in layers if isinstance(layer, int))
    wrong = [block for block in blocks if not 1 <= block <= config.depth]
    if wrong:
        raise UserError(f"no layer {wrong[0]}; this encoder has layers 1 to {config.depth}")

    def pool(
        tokens: Float[Array, "batch tokens width"],
        inside: Bool[Array, "batch patches"] | None,
        statistics: Sequence[str],
    ) -> Float[Array, "batch features"]:
        patches = tokens[:, 1:]
        where = None if inside is None else inside[:, :, None]
        pooled = {
            "cls": lambda: tokens[:, 0],
            "mean": lambda: jnp.mean(patches, axis=1, where=where),
            "std": lambda: jnp.std(patches, axis=1, where=where),
        }
        return jnp.concatenate([pooled[name]() for name in statistics], axis=1)

    try:
        # The shape of no parameter depends on the size: positions are computed.
        encoders = [dataclasses.replace(config, image_size=size) for size in image_sizes or (config.image_size,)]
    except ValueError as error:
        raise UserError(f"--image-sizes: {error}") from error

    def compute(params: Params, batch: augment.Batch) -> dict[str, Float[Array, "batch _features"]]:
        parts: dict[str, list[Float[Array, "batch _features"]]] = {str(readout): [] for readout in readouts}
        for encoder_config in encoders:
            images = augment.evaluation_view(batch, settings, encoder_config.image_size)
            encoder = vit.bind(encoder_config, params)
            inside = (
                augment.patches_inside(batch["mask"], batch["extent"], encoder_config.grid) if "mask" in batch else None
            )
            last, hidden = encoder.encode(encoder.embed(images), [block - 1 for block in blocks])
            outputs: dict[int | str, Float[Array, "batch tokens width"]] = {LAST: last}
            outputs |= dict(zip(blocks, hidden, strict=True))
            if config.depth in outputs:
                outputs[BEFORE_NORM] = outputs[config.depth]
            for readout in readouts:
                parts[str(readout)] += [pool(outputs[layer], inside, readout.pooling) for layer in readout.layers]
        return {name: jnp.concatenate(values, axis=1) for name, values in parts.items()}

    def tokens(
        params: Params, batch: augment.Batch, before_norm: bool
    ) -> tuple[Float[Array, "batch tokens width"], Bool[Array, "batch tokens"]]:
        found, within = [], []
        for encoder_config in encoders:
            images = augment.evaluation_view(batch, settings, encoder_config.image_size)
            encoder = vit.bind(encoder_config, params)
            last, hidden = encoder.encode(encoder.embed(images), [config.depth - 1] if before_norm else [])
            found.append((hidden[0] if before_norm else last)[:, 1:].astype(jnp.float32))
            grid = encoder_config.grid
            within.append(
                augment.patches_inside(batch["mask"], batch["extent"], grid)
                if "mask" in batch
                else jnp.ones((len(images), grid[0] * grid[1]), bool)
            )
        return jnp.concatenate(found, axis=1), jnp.concatenate(within, axis=1)

    return View(compute, params, tokens)


def _coverage(batch: augment.Batch, side: int) -> Float[Array, "batch side side"]:
    """Share of each pixel of the resized slice that is inside the mask; ones without a mask."""
    if "mask" not in batch:
        return jnp.ones((len(batch["pixels"]), side, side))
    box = augment.whole(batch["extent"])
    return augment.resize(batch["mask"].astype(jnp.float32), batch["extent"], box, (side, side), "bilinear")


def pixel_view(settings: Augment) -> View:
    """The slice itself, prepared as for the encoder, in PIXELS x PIXELS values; 0 outside a mask."""

    def compute(_: Params, batch: augment.Batch) -> dict[str, Float[Array, "batch _features"]]:
        image = augment.evaluation_view(batch, settings, (PIXELS, PIXELS)) * _coverage(batch, PIXELS)[..., None]
        return {f"{PIXELS}x{PIXELS} px": image.reshape(len(batch["pixels"]), -1)}

    return View(compute, {})


def histogram_view(settings: Augment) -> View:
    """Shares of the slice's pixels, or of those in the mask, in BINS equal bins of the prepared intensities."""

    def compute(_: Params, batch: augment.Batch) -> dict[str, Float[Array, "batch _features"]]:
        image = augment.evaluation_view(batch, settings, (COUNTED, COUNTED))
        unit = (image * settings.image_std + settings.image_mean).reshape(len(batch["pixels"]), -1)
        # Resampling overshoots a little: what leaves [0, 1] is in the outer bins.
        bins = jnp.clip((unit * BINS).astype(jnp.int32), 0, BINS - 1)
        weights = _coverage(batch, COUNTED).reshape(bins.shape)
        counts = jax.vmap(lambda row, weights: jnp.bincount(row, weights, length=BINS))(bins, weights)
        return {f"{BINS} bins": counts / counts.sum(axis=1, keepdims=True)}

    return View(compute, {})


@runtime_checkable
class Images(Protocol):
    """Numbered images of a split.

    Attributes:
      split: its name.
      fingerprint: changes with the pixels of any image, and with their order.
    """

    @property
    def split(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def batches(self, numbers: Int[np.ndarray, " n"], batch_size: int) -> Iterator[data.HostBatch]:
        """Batches of the images with these numbers, in order; the last is padded, and `valid` is False there."""
        ...


@dataclasses.dataclass(frozen=True)
class ShardImages:
    """The slices of a split of a shard folder."""

    source: SliceSource

    @property
    def split(self) -> str:
        return self.source.split

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def batches(self, numbers: Int[np.ndarray, " n"], batch_size: int) -> Iterator[data.HostBatch]:
        """As `Images` says."""
        canvas = data.canvas_size(self.source.largest, None)
        for batch in data.evaluation_batches(self.source, numbers, batch_size=batch_size, canvas=canvas):
            batch["spacing"] = self._spacing[batch["slice"]]
            yield batch

    @functools.cached_property
    def _spacing(self) -> Float32[np.ndarray, "slices 2"]:
        columns = (self.source.index.column(f"spacing_{axis}").to_numpy() for axis in ("rows", "columns"))
        return np.stack([*columns], axis=1).astype(np.float32)


@runtime_checkable
class Backbone(Protocol):
    """Where features come from; see backbones.py.

    Attributes:
      name: as in results.
      digest: of its weights, its preparation of pixels and its readouts.
      provenance: all of these.
      devices: over which a batch is split evenly.
    """

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def provenance(self) -> Provenance: ...

    @property
    def devices(self) -> int: ...

    def features(self, batch: data.HostBatch) -> Mapping[str, Float[Array | np.ndarray, "batch _features"]]:
        """Features of a batch by the name of their readout. May return before they are computed."""
        ...

    def tokens(
        self, batch: data.HostBatch, *, before_norm: bool
    ) -> Mapping[str, Shaped[Array | np.ndarray, "batch tokens ..."]]:
        """`tokens`, float32 (batch, tokens, width), and which are `inside` the mask, bool (batch, tokens). May return before they are
        computed. What has no patches gives one token, its features of the whole slice.

        Args:
          before_norm: the output of the last block instead of that of the final norm.
        """
        ...


def extract(
    images: Images,
    numbers: Int[np.ndarray, " n"],
    backbone: Backbone,
    *,
    batch_size: int = 64,
    compute: Callable[[data.HostBatch], Mapping[str, Shaped[Array | np.ndarray, "batch ..."]]] | None = None,
) -> Iterator[tuple[Int[np.ndarray, " valid"], dict[str, Shaped[np.ndarray, "valid ..."]]]]:
    """Float32 features of images, batch by batch with the image numbers.

    The next batch is read while the devices compute the last one.

    Args:
      batch_size: images at a time, over all devices; rounded up to a multiple of their number.
      compute: what of a batch; default is `backbone.features`.

    Raises:
      DataError: a feature is not finite.
    """
    compute = compute or backbone.features
    batch_size = -(-batch_size // backbone.devices) * backbone.devices

    def finished(
        batch: data.HostBatch, computed: Mapping[str, Shaped[Array | np.ndarray, "batch ..."]]
    ) -> tuple[Int[np.ndarray, " valid"], dict[str, Shaped[np.ndarray, "valid ..."]]]:
        valid = batch.get("valid", np.ones(len(batch["slice"]), bool))
        values = {name: np.asarray(jax.device_get(array))[valid] for name, array in computed.items()}
        for array in values.values():
            if not np.isfinite(array).all():
                number = batch["slice"][valid][~np.isfinite(array.reshape(len(array), -1)).all(axis=1)][0]
                raise DataError(
                    f"the {backbone.name} features of slice {number} of split {images.split!r} are not finite; "
                    "check the checkpoint's loss curve, and the slice's slope and intercept"
                )
        return batch["slice"][valid], values

    waiting = None
    for batch in images.batches(numbers, batch_size):
        started = batch, compute(batch)
        if waiting is not None:
            yield finished(*waiting)
        waiting = started
    if waiting is not None:
        yield finished(*waiting)
