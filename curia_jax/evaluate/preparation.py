"""The pixel preparation of a backbone: a record of its settings, and the function that applies them."""

import dataclasses
import json

import jax.numpy as jnp
from jaxtyping import Array, Float

from curia_jax import augment, config, json_records
from curia_jax.settings import Augment

WINDOW, STANDARD = "window", "standard"
_SMALLEST_STD = 1e-6  # of an image; flatter ones are centred alone, as by Curia's processor
_PLAIN = {"image_mean": 0.0, "image_std": 1.0}


@dataclasses.dataclass(frozen=True)
class Preparation:
    """From a slice in real values to an encoder's input. The whole slice is resized to `size`, with antialiasing.

    Attributes:
      intensities: WINDOW: HU within `hu_window`, other values between the slice's 0.5 and 99.5 percentiles, scaled to [0, 1], then
        minus `mean`, divided by `std`. STANDARD: real values, resized, then minus the image's own mean and divided by its own
        standard deviation (raidium-med/curia, CuriaImageProcessor).
      hu_window: lower and upper edge, HU.
      size: height and width, px.
      resample: "bicubic" or "bilinear".
      channels: the slice is repeated in each.
      mean, std: of each channel; one number is for all.
    """

    intensities: str
    hu_window: tuple[int | float, int | float]
    size: tuple[int, int]
    resample: str = "bicubic"
    channels: int = 1
    mean: tuple[int | float, ...] = (0.0,)
    std: tuple[int | float, ...] = (1.0,)

    @classmethod
    def of(cls, settings: Augment, size: tuple[int, int], channels: int = 1) -> "Preparation":
        """The preparation of this project's encoders."""
        return cls(
            WINDOW, settings.hu_window, size, settings.resample, channels, (settings.image_mean,), (settings.image_std,)
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Preparation":
        """Reads what `to_json` wrote."""
        return json_records.record(cls, json.loads(text))

    def __str__(self) -> str:
        low, high = self.hu_window
        values = "the image's own mean and deviation"
        if self.intensities == WINDOW:
            numbers = (", ".join(f"{value:.4g}" for value in dict.fromkeys(values)) for values in (self.mean, self.std))
            values = "HU {:g} to {:g}, other values 0.5 to 99.5 percentile; mean {}, deviation {}".format(
                low, high, *numbers
            )
        channels = f"{self.channels} channel{'s' if self.channels > 1 else ''}"
        return f"{self.size[0]}x{self.size[1]} px, {self.resample}, {channels}; {values}"


def default_settings() -> Augment:
    """The preparation that a run has by default; backbones without an intensity window of their own use its window."""
    return Augment.of(config.load("base").augment)


def prepare(batch: augment.Batch, wanted: Preparation) -> Float[Array, "batch height width channels"]:
    """The input of an encoder. Pure."""
    if wanted.intensities == STANDARD:
        real = batch["pixels"].astype(jnp.float32) * batch["slope"][:, None, None] + batch["intercept"][:, None, None]
        box = jnp.concatenate([jnp.zeros_like(batch["extent"]), batch["extent"]], axis=1).astype(jnp.float32)
        image = augment.resize(real, batch["extent"], box, wanted.size, wanted.resample)
        std = jnp.std(image, axis=(1, 2), ddof=1, keepdims=True)
        image = (image - image.mean(axis=(1, 2), keepdims=True)) / jnp.where(std < _SMALLEST_STD, 1.0, std)
        return jnp.repeat(image[..., None], wanted.channels, axis=-1)
    settings = dataclasses.replace(
        default_settings(), hu_window=wanted.hu_window, resample=wanted.resample, **_PLAIN
    )  # fmt: skip
    image = augment.evaluation_view(batch, settings, wanted.size)
    return (image - jnp.asarray(wanted.mean)) / jnp.asarray(wanted.std) * jnp.ones(wanted.channels)
