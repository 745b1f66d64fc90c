"""What happens to pixels on the device: rescale, window, crop, flip, normalise; from a key alone.

A batch comes as stored integers on a canvas (see data.py):

  pixels     uint16  (batch, canvas height, canvas width)   the slice in the upper left corner
  extent     int32   (batch, 2)                             height and width of the slice on the canvas, px
  slope, intercept   float32 (batch,)                       real value = stored * slope + intercept
  low, high  float32 (batch,)                               0.5 and 99.5 percentile of the slice, real values
  hu         bool    (batch,)                               real values are Hounsfield units
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, Key, Shaped

Batch = Mapping[str, Shaped[Array, "..."]]

# Lower and upper edge in HU of the usual reading windows (centre -600 width 1500 for lung, 40/400 for soft tissue,
# 400/1800 for bone).
READING_WINDOWS = {"lung": (-1350.0, 150.0), "soft tissue": (-160.0, 240.0), "bone": (-500.0, 1300.0)}


def evaluation_view(
    batch: Batch, config: ml_collections.ConfigDict, size: tuple[int, int]
) -> Float[Array, "batch height width 1"]:
    """The deterministic view that features are extracted from: the whole slice, resized to `size`, normalised.

    HU are clipped to `config.hu_window`, other values to the slice's own 0.5 and 99.5 percentiles; both are scaled to
    [0, 1], resized (antialiased, `config.resample`) and normalised with `config.image_mean` and `config.image_std`. The
    same numbers for every image: what an image's mean and contrast say, HU above all, stays in it.
    """
    count = batch["pixels"].shape[0]
    low = jnp.where(batch["hu"], config.hu_window[0], batch["low"])
    high = jnp.where(batch["hu"], config.hu_window[1], batch["high"])
    box = jnp.concatenate([jnp.zeros((count, 2)), batch["extent"]], axis=1)
    image = resize(_unit_interval(batch, low, high), batch["extent"], box, size, config.resample)
    return (image - config.image_mean)[..., None] / config.image_std


def training_view(
    batch: Batch, key: Key[Array, ""], config: ml_collections.ConfigDict, size: tuple[int, int]
) -> Float[Array, "batch height width 1"]:
    """A random view: a window, a random resized crop, a flip; then as `evaluation_view`.

    With probability `config.reading_window_probability` a slice in HU is seen through one of READING_WINDOWS instead
    of `config.hu_window`. Values that are not HU have both window edges moved by up to `config.intensity_jitter` of
    the window width. The crop covers a share of the slice drawn from `config.crop_scale` with an aspect ratio drawn
    log-uniformly from `config.crop_ratio`; a draw that does not fit is cut to the slice. `config.flip` mirrors left and
    right in half of the images.
    """
    count = batch["pixels"].shape[0]
    keys = jax.random.split(key, 6)
    low, high = _random_window(batch, keys[0], config)

    extent = batch["extent"].astype(jnp.float32)
    area = jax.random.uniform(keys[1], (count,), minval=config.crop_scale[0], maxval=config.crop_scale[1]) * jnp.prod(
        extent, axis=1
    )
    log_ratio = jnp.log(jnp.asarray(config.crop_ratio))
    ratio = jnp.exp(jax.random.uniform(keys[2], (count,), minval=log_ratio[0], maxval=log_ratio[1]))
    crop = jnp.minimum(jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=1), extent)
    start = jax.random.uniform(keys[3], (count, 2)) * (extent - crop)
    box = jnp.concatenate([start, start + crop], axis=1)

    image = resize(_unit_interval(batch, low, high), batch["extent"], box, size, config.resample)
    if config.flip:
        mirrored = jax.random.bernoulli(keys[4], shape=(count,))
        image = jnp.where(mirrored[:, None, None], image[:, :, ::-1], image)
    return (image - config.image_mean)[..., None] / config.image_std


def _random_window(
    batch: Batch, key: Key[Array, ""], config: ml_collections.ConfigDict
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    count = batch["pixels"].shape[0]
    keys = jax.random.split(key, 3)
    windows = jnp.asarray(list(READING_WINDOWS.values()))
    reading = windows[jax.random.randint(keys[0], (count,), 0, len(windows))]
    seen = jax.random.bernoulli(keys[1], config.reading_window_probability, (count,))
    hu = jnp.where(seen[:, None], reading, jnp.asarray(config.hu_window))
    own = jnp.stack([batch["low"], batch["high"]], axis=1)
    width = (own[:, 1] - own[:, 0])[:, None]
    own += width * config.intensity_jitter * jax.random.uniform(keys[2], (count, 2), minval=-1.0, maxval=1.0)
    edges = jnp.where(batch["hu"][:, None], hu, own)
    return edges[:, 0], edges[:, 1]


def _unit_interval(
    batch: Batch, low: Float[Array, " batch"], high: Float[Array, " batch"]
) -> Float[Array, "batch rows columns"]:
    """Stored integers to [0, 1] between the window edges `low` and `high` (real values)."""
    # One multiplication and one addition a pixel: stored * (slope / width) + (intercept - low) / width.
    width = jnp.maximum(high - low, 1e-6)
    gain, offset = batch["slope"] / width, (batch["intercept"] - low) / width
    return jnp.clip(batch["pixels"].astype(jnp.float32) * gain[:, None, None] + offset[:, None, None], 0.0, 1.0)


def resize(
    image: Float[Array, "batch rows columns"],
    extent: Shaped[Array, "batch 2"],
    box: Float[Array, "batch 4"],
    size: tuple[int, int],
    method: str,
) -> Float[Array, "batch height width"]:
    """Resamples a box of each image to `size`, antialiased, without reading beyond the image's extent.

    Args:
      image: canvas; what lies outside `extent` has no influence on the result.
      extent: rows and columns of the image proper.
      box: top, left, bottom, right in px, half-open, fractions allowed.
      size: rows and columns of the result.
      method: "bicubic" (Keys 1981, a = -0.5, as PIL's BICUBIC) or "bilinear".
    """
    rows = _weights(box[:, 0], box[:, 2], extent[:, 0], image.shape[1], size[0], method)
    columns = _weights(box[:, 1], box[:, 3], extent[:, 1], image.shape[2], size[1], method)
    image = jnp.einsum("boh,bhw->bow", rows, image, precision="highest")
    return jnp.einsum("bow,bpw->bop", image, columns, precision="highest")


def _weights(
    start: Float[Array, " batch"],
    stop: Float[Array, " batch"],
    extent: Shaped[Array, " batch"],
    n_in: int,
    n_out: int,
    method: str,
) -> Float[Array, "batch out in"]:
    kernel, radius = {"bicubic": (_cubic, 2.0), "bilinear": (_triangle, 1.0)}[method]
    scale = (stop - start) / n_out
    # Centre of each output pixel in input pixels; the kernel widens with the reduction, which is the antialiasing.
    centre = start[:, None] + (jnp.arange(n_out) + 0.5) * scale[:, None] - 0.5
    width = jnp.maximum(scale, 1.0)[:, None, None]
    position = jnp.arange(n_in)
    distance = (position - centre[:, :, None]) / width
    weight = jnp.where(jnp.abs(distance) < radius, kernel(distance), 0.0)
    weight = jnp.where(position < extent[:, None, None], weight, 0.0)
    return weight / jnp.sum(weight, axis=-1, keepdims=True)


def _cubic(x: Float[Array, "..."]) -> Float[Array, "..."]:
    x = jnp.abs(x)
    return jnp.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)


def _triangle(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return 1 - jnp.abs(x)
