"""Frozen features of slices: from an encoder's tokens, or the pixels themselves."""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import rich.progress
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from curia_common.errors import UserError
from curia_jax import augment, data
from curia_jax.models import mae, vit
from data_pipeline.format.shards import SliceSource

POOLINGS = ("mean", "std", "cls")
LAST = "last"
# Side of the pixel baseline's image.
PIXELS = 32


@dataclasses.dataclass(frozen=True)
class View:
    """A way from pixels to features.

    Attributes:
      of: (params, batch) -> features; pure.
      params: what `of` needs, passed along so that weights are arguments of the compiled program, not part of it.
    """

    of: Callable[[Any, augment.Batch], Float[Array, "batch features"]]
    params: Any


def model(settings: Mapping[str, Any], params: Mapping[str, Any]) -> mae.MAEConfig:
    """The model of a checkpoint, to compute in float32 whatever it was trained in.

    Args:
      settings: `model` part of the run's config, as read from JSON.
      params: tensors of the checkpoint.

    Raises:
      UserError: the settings are no model of this version, do not fit the tensors, or take more than one channel.
    """
    try:
        config = mae.config(**{**settings, "dtype": "float32", "remat": "none"})
        mae.bind(config, params)
    except (TypeError, ValueError) as error:
        raise UserError(f"the checkpoint does not hold the model of its config: {error}") from error
    if config.encoder.channels != 1:
        raise UserError(
            f"the checkpoint's encoder takes {config.encoder.channels} channels, but a slice has 1; "
            "score a checkpoint that was trained with --config.model.channels=1"
        )
    return config


def encoder_view(
    config: vit.ViTConfig,
    params: Mapping[str, Any],
    settings: ml_collections.ConfigDict,
    *,
    pooling: str = "mean",
    layers: Sequence[int | str] = (LAST,),
    image_sizes: Sequence[tuple[int, int]] = (),
) -> View:
    """Features of an encoder.

    Args:
      config, params: the encoder.
      settings: the `augment` part of the run's config; the pixels are prepared as they were for it.
      pooling: of POOLINGS, several joined by "+": "cls"; the "mean" of the patch tokens; their standard deviation, "std",
        which says how much of what the mean blurs there is (with the mean: Snyder et al. 2018, doi
        10.1109/ICASSP.2018.8461375).
      layers: outputs that are pooled and concatenated: LAST, the final norm's, or numbers of blocks from 1 to depth,
        whose outputs are taken before any norm.
      image_sizes: (height, width) in px of the images that the encoder sees; the features of several are concatenated.
        The encoder's own unless given. Training crops show things larger than the whole slice does at the same size, so
        that a larger one can serve better (Touvron et al. 2019, arXiv 1906.06423).

    Raises:
      UserError: there is no such pooling or layer, or a size is no multiple of the patch.
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
        # No parameter depends on the size: positions are computed.
        encoders = [dataclasses.replace(config, image_size=size) for size in image_sizes or (config.image_size,)]
    except ValueError as error:
        raise UserError(f"--image-sizes: {error}") from error

    def of(params: Any, batch: augment.Batch) -> Float[Array, "batch features"]:
        parts = []
        for encoder_config in encoders:
            images = augment.evaluation_view(batch, settings, encoder_config.image_size)
            encoder = vit.bind(encoder_config, params)
            last, hidden = encoder.encode(encoder.embed(images), [block - 1 for block in blocks])
            outputs = {LAST: last, **dict(zip(blocks, hidden, strict=True))}
            parts += [pool(outputs[layer]) for layer in layers]
        return jnp.concatenate(parts, axis=1)

    return View(of, params)


def pixel_view(settings: ml_collections.ConfigDict) -> View:
    """The slice itself, prepared as for the encoder, in PIXELS x PIXELS values."""

    def of(_: Any, batch: augment.Batch) -> Float[Array, "batch features"]:
        return augment.evaluation_view(batch, settings, (PIXELS, PIXELS)).reshape(len(batch["pixels"]), -1)

    return View(of, {})


class Progress:
    """Slices done, rate and time left on standard error: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, what: str, total: int, seconds_between_lines: float = 10.0) -> None:
        self._what, self._total, self._every = what, total, seconds_between_lines
        self._done, self._first = 0, time.monotonic()
        self._last = self._first
        console = Console(stderr=True)
        self._bar = rich.progress.Progress(
            TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=total, rate="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, slices: int) -> None:
        """Counts slices that are done."""
        self._done += slices
        now = time.monotonic()
        rate = self._done / max(now - self._first, 1e-9)
        if not self._bar.disable:
            self._bar.update(self._task, completed=self._done, rate=f"{rate:,.0f} slices/s")
        elif now - self._last >= self._every or self._done == self._total:
            self._last = now
            left = (self._total - self._done) / rate
            line = f"{self._what} {self._done}/{self._total}  {rate:,.0f} slices/s  {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)


def extract(
    source: SliceSource,
    slices: Int[np.ndarray, " n"],
    views: Mapping[str, View],
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda slices: None,
) -> dict[str, Float[np.ndarray, "n features"]]:
    """Float32 features of slices for each of the views, from one pass over the pixels, on all local devices.

    Args:
      slices: slice numbers of `source`.
      batch_size: slices at a time, over all devices; rounded up to a multiple of their number.
      progress: told how many slices were done, batch by batch.

    Raises:
      UserError: a feature is not finite.
    """
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))
    batch_size = -(-batch_size // len(devices)) * len(devices)
    split = NamedSharding(mesh, P("data"))
    params = jax.device_put({name: view.params for name, view in views.items()}, NamedSharding(mesh, P()))
    compute = jax.jit(lambda params, batch: {name: view.of(params[name], batch) for name, view in views.items()})
    canvas = data.canvas_size(source, None)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in views}
    for batch in data.evaluation_batches(source, slices, batch_size=batch_size, canvas=canvas):
        features = jax.device_get(compute(params, data.to_devices(batch, split)))
        for name, values in features.items():
            values = values[batch["valid"]]
            if not np.isfinite(values).all():
                slice_number = batch["slice"][batch["valid"]][~np.isfinite(values).all(axis=1)][0]
                raise UserError(
                    f"the {name} features of slice {slice_number} of split {source.split!r} are not finite; "
                    "check the checkpoint's loss curve, and the slice's slope and intercept in index.parquet"
                )
            parts[name].append(values)
        progress(int(batch["valid"].sum()))
    return {name: np.concatenate(values) for name, values in parts.items()}


def digest(params: Any) -> str:
    """First 16 hex digits of the SHA-256 of all tensors and their names: which weights these are, wherever they lie."""
    result = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        result.update(jax.tree_util.keystr(path).encode())
        result.update(np.ascontiguousarray(leaf).tobytes())
    return result.hexdigest()[:16]
