"""Frozen features of slices: from the tokens of an encoder, or the pixels themselves."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from curia_common.errors import DataError, UserError
from curia_jax import augment, data
from curia_jax.models import vit
from curia_jax.models.params import Params
from curia_jax.settings import Augment
from data_pipeline.format.shards import SliceSource

POOLINGS = ("mean", "std", "cls")
LAST = "last"
# Side of the pixel baseline's image.
PIXELS = 32


@dataclasses.dataclass(frozen=True)
class View:
    """A function from pixels to features.

    Attributes:
      compute: (params, batch) -> features; pure.
      params: first argument of `compute`, so that weights are not constants of the compiled program.
    """

    compute: Callable[[Params, augment.Batch], Float[Array, "batch features"]]
    params: Params


def encoder_view(
    config: vit.ViTConfig,
    params: Params,
    settings: Augment,
    *,
    pooling: str = "mean",
    layers: Sequence[int | str] = (LAST,),
    image_sizes: Sequence[tuple[int, int]] = (),
) -> View:
    """Features of an encoder.

    Args:
      config, params: the encoder.
      settings: the run's `augment` settings; pixels are prepared in the same way.
      pooling: of POOLINGS, several joined by "+": "cls"; the "mean" of the patch tokens; their standard deviation, "std",
        which keeps some of what the mean loses (both together: Snyder et al. 2018, doi 10.1109/ICASSP.2018.8461375).
      layers: outputs that are pooled and concatenated: LAST, that of the final norm, or numbers of blocks from 1 to depth,
        whose outputs are taken before any norm.
      image_sizes: (height, width) in px of the encoder's images; the features of several are concatenated. Default is the
        size of the training. Objects look larger in training crops than in a whole slice of the same size, so that a
        larger size can be better (Touvron et al. 2019, arXiv 1906.06423).

    Raises:
      UserError: there is no such pooling or layer, or a size is not a multiple of the patch.
    """
    statistics = pooling.split("+")
    if unknown := [name for name in statistics if name not in POOLINGS]:
        raise UserError(f"no features {unknown[0]!r}; there are: {', '.join(POOLINGS)}, and several joined by +")
    blocks = [layer for layer in layers if isinstance(layer, int)]
    wrong = [block for block in blocks if not 1 <= block <= config.depth]
    if wrong:
        raise UserError(f"no layer {wrong[0]}; this encoder has layers 1 to {config.depth}")

    def pool(tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch features"]:
        patches = tokens[:, 1:]
        parts = {"cls": tokens[:, 0], "mean": patches.mean(axis=1), "std": patches.std(axis=1)}
        return jnp.concatenate([parts[name] for name in statistics], axis=1)

    try:
        # The shape of no parameter depends on the size: positions are computed.
        encoders = [dataclasses.replace(config, image_size=size) for size in image_sizes or (config.image_size,)]
    except ValueError as error:
        raise UserError(f"--image-sizes: {error}") from error

    def compute(params: Params, batch: augment.Batch) -> Float[Array, "batch features"]:
        parts = []
        for encoder_config in encoders:
            images = augment.evaluation_view(batch, settings, encoder_config.image_size)
            encoder = vit.bind(encoder_config, params)
            last, hidden = encoder.encode(encoder.embed(images), [block - 1 for block in blocks])
            outputs: dict[int | str, Float[Array, "batch tokens width"]] = {LAST: last}
            outputs |= dict(zip(blocks, hidden, strict=True))
            parts += [pool(outputs[layer]) for layer in layers]
        return jnp.concatenate(parts, axis=1)

    return View(compute, params)


def pixel_view(settings: Augment) -> View:
    """The slice itself, prepared as for the encoder, in PIXELS x PIXELS values."""

    def compute(_: Params, batch: augment.Batch) -> Float[Array, "batch features"]:
        return augment.evaluation_view(batch, settings, (PIXELS, PIXELS)).reshape(len(batch["pixels"]), -1)

    return View(compute, {})


def extract(
    source: SliceSource,
    slices: Int[np.ndarray, " n"],
    views: Mapping[str, View],
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda slices: None,
) -> dict[str, Float[np.ndarray, "n features"]]:
    """Float32 features of slices for each view, from one pass over the pixels, on all local devices.

    Args:
      slices: slice numbers of `source`.
      batch_size: slices at a time, over all devices; rounded up to a multiple of their number.
      progress: called with the number of slices of each finished batch.

    Raises:
      DataError: a feature is not finite.
    """
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))
    batch_size = -(-batch_size // len(devices)) * len(devices)
    split = NamedSharding(mesh, P("data"))
    params = jax.device_put({name: view.params for name, view in views.items()}, NamedSharding(mesh, P()))
    compute = jax.jit(lambda params, batch: {name: view.compute(params[name], batch) for name, view in views.items()})
    canvas = data.canvas_size(source, None)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in views}
    for batch in data.evaluation_batches(source, slices, batch_size=batch_size, canvas=canvas):
        valid = batch.get("valid", np.ones(batch_size, bool))
        features = jax.device_get(compute(params, data.to_devices(batch, split)))
        for name, values in features.items():
            values = values[valid]
            if not np.isfinite(values).all():
                slice_number = batch["slice"][valid][~np.isfinite(values).all(axis=1)][0]
                raise DataError(
                    f"the {name} features of slice {slice_number} of split {source.split!r} are not finite; "
                    "check the checkpoint's loss curve, and the slice's slope and intercept in index.parquet"
                )
            parts[name].append(values)
        progress(int(valid.sum()))
    return {name: np.concatenate(values) for name, values in parts.items()}
