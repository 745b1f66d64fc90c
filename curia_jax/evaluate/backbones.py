"""Backbones: where features come from. Each states the weights it has and how it prepares pixels."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from curia_common import logs
from curia_common.errors import UserError
from curia_jax import augment, checkpoint, data, storage, trained_model
from curia_jax.convert import reading
from curia_jax.evaluate import features, preparation, token_backbone, torch_backbones, user_backbone
from curia_jax.evaluate.preparation import Preparation
from curia_jax.evaluate.results import FLOORS, HISTOGRAM, PIXELS, RANDOM, Provenance
from curia_jax.models import mae, vit
from curia_jax.models.params import Params
from curia_jax.settings import Augment

log = logs.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class JaxBackbone:
    """A backbone whose features are a JAX function of a batch, computed on all local devices.

    Attributes:
      name: as in results.
      view: from pixels to features.
      provenance: its weights and its preparation of pixels.
    """

    name: str
    view: features.View
    provenance: Provenance

    @property
    def digest(self) -> str:
        """Digest of everything that determines its features, including the code version; 16 hex digits."""
        return token_backbone.digest(self.provenance)

    @property
    def devices(self) -> int:
        return len(jax.local_devices())

    @functools.cached_property
    def _shardings(self) -> tuple[NamedSharding, NamedSharding]:
        devices = jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,))
        return NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    @functools.cached_property
    def _compiled(self) -> tuple[jax.stages.Wrapped, object]:
        return jax.jit(self.view.compute), jax.device_put(self.view.params, self._shardings[1])

    @functools.cached_property
    def _compiled_tokens(self) -> jax.stages.Wrapped:
        assert self.view.tokens is not None
        return jax.jit(self.view.tokens, static_argnums=2)

    def on_devices(self, batch: data.HostBatch) -> augment.Batch:
        """The fields that its program takes, split over the devices. Does not block."""
        split = self._shardings[0]
        on_devices = data.to_devices(batch, split)
        if "mask" in batch:
            on_devices["mask"] = jax.device_put(batch["mask"], split)
        return on_devices

    def features(self, batch: data.HostBatch) -> dict[str, Float[Array, "batch _features"]]:
        """Features of a batch by the name of their readout. Returns before they are computed."""
        compute, params = self._compiled
        return compute(params, self.on_devices(batch))

    def tokens(self, batch: data.HostBatch, *, before_norm: bool) -> dict[str, Shaped[Array, "batch tokens ..."]]:
        """`tokens`, float32, and which of them are `inside` the mask. Returns before they are computed.

        The token of what has no patches (pixels, histogram) is its features of the whole slice.

        Args:
          before_norm: the output of the last block instead of that of the final norm.
        """
        if self.view.tokens is None:
            (values,) = self.features(batch).values()
            return {"tokens": values[:, None, :], "inside": jnp.ones((len(values), 1), bool)}
        values, inside = self._compiled_tokens(self._compiled[1], self.on_devices(batch), before_norm)
        return {"tokens": values, "inside": inside}


# package.module:function, or module:function
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """An encoder of ours, of a run or of an export.

    Attributes:
      random: makes other weights of its shape, not those that its training started from.
    """

    config: vit.ViTConfig
    params: Params
    augment: Augment
    step: int
    examples_seen: int
    random: Callable[[], Params]


def open_backbones(
    given: Sequence[str], floors: Sequence[str], *, readouts: Sequence[features.Readout],
    image_sizes: Sequence[tuple[int, int]] = (),
) -> list[features.Backbone]:  # fmt: skip
    """The backbones that a user named, then the floors.

    Args:
      given: work directories of curia_jax.pretrain, folders of a step or of curia_jax.convert, folders that transformers reads,
        hf:NAME, timm:NAME, open_clip:NAME@TAG, package.module:function; each is its own name in the results.
      floors: of FLOORS. The random encoder is of the shape of the first given one; pixels are prepared as for the first of ours.
      readouts: of the encoders; see `features.encoder_view`.
      image_sizes: of our encoders; others have a size of their own.

    Raises:
      UserError: there is no such checkpoint, model or readout, or a package is missing.
      DataError: a checkpoint is damaged.
    """
    ours: dict[str, _Encoder] = {}
    made: list[features.Backbone] = []

    def from_encoder(name: str, encoder: _Encoder, *, trained: bool) -> JaxBackbone:
        view = features.encoder_view(
            encoder.config, encoder.params, encoder.augment, readouts=readouts, image_sizes=image_sizes
        )
        size = encoder.config.image_size
        provenance = Provenance(
            weights_sha256=trained_model.digest(encoder.params), preparation=Preparation.of(encoder.augment, size).to_json(),
            readouts=tuple(map(str, readouts)), image_size=size, image_sizes=tuple(image_sizes),
            step=encoder.step if trained else None, examples_seen=encoder.examples_seen if trained else None,
        )  # fmt: skip
        return JaxBackbone(name, view, provenance)

    for word in given:
        if _is_foreign(word):
            opened = torch_backbones.open_backbone(_of_library(word), readouts)
            made.append(dataclasses.replace(opened, name=word))
        elif _is_function(word):
            made.append(user_backbone.open_backbone(word, readouts))
        else:
            ours[word] = _load(word)
            made.append(from_encoder(word, ours[word], trained=True))
    first = next(iter(ours.values()), None)
    if RANDOM in floors:
        foreign = next((word for word in given if _is_foreign(word)), None)
        if first:
            made.append(from_encoder(RANDOM, dataclasses.replace(first, params=first.random()), trained=False))
        elif foreign:
            made.append(torch_backbones.open_backbone(_of_library(foreign), readouts, name=RANDOM))
        else:
            log.warning("no floor 'random': the architecture of a function is not known; the other floors are there")
    # Without a checkpoint of ours, the preparation that a run has by default.
    settings = first.augment if first else preparation.default_settings()
    for name, view, side in (
        (PIXELS, features.pixel_view, features.PIXELS), (HISTOGRAM, features.histogram_view, features.COUNTED)
    ):  # fmt: skip
        if name in floors:
            stated = Preparation.of(settings, (side, side)).to_json()
            made.append(JaxBackbone(name, view(settings), Provenance(name, stated)))
    return made


def check(given: Sequence[str]) -> None:
    """Raises UserError if a backbone that the user named does not exist, without loading it."""
    for word in given:
        if _is_foreign(word) or _is_function(word):
            continue
        if not storage.root(word).exists():
            raise UserError(
                f"no backbone {word!r}: it is neither a folder nor one of the floors, which are always there "
                f"({', '.join(FLOORS)}); name a work directory of curia_jax.pretrain, the folder of a step or of curia_jax.convert, "
                "hf:NAME, timm:NAME, open_clip:NAME@TAG or package.module:function"
            )


def _is_foreign(word: str) -> bool:
    """Whether another library loads the backbone: LIBRARY:NAME, or a folder that transformers reads and that is not an export of ours."""
    if word.partition(":")[0] in torch_backbones.LIBRARIES and ":" in word:
        return True
    # A work directory of pretrain has a config.json too.
    folder = Path(word)
    is_run = (folder / checkpoint.FOLDER).is_dir()
    return "://" not in word and (folder / "config.json").is_file() and not is_run and not reading.is_export(folder)


def _of_library(word: str) -> str:
    return word if word.partition(":")[0] in torch_backbones.LIBRARIES else f"{torch_backbones.HF}:{word}"


def _is_function(word: str) -> bool:
    return _FUNCTION.fullmatch(word) is not None and not Path(word).exists()


def _load(path: str) -> _Encoder:
    """The encoder of a run, or of an export."""
    if "://" not in path and reading.is_export(Path(path)):
        export = reading.read(Path(path))
        settings = export.augment(preparation.default_settings())
        config = export.config
        found = _Encoder(
            config,
            export.params,
            settings,
            export.step,
            export.examples_seen,
            lambda: jax.jit(vit.init, static_argnums=0)(config, jax.random.key(1)),
        )
    else:
        model = trained_model.load(path)
        found = _Encoder(
            model.config.encoder, model.params["encoder"], model.augment, model.step, model.examples_seen,
            lambda: jax.jit(mae.init, static_argnums=0)(model.config, jax.random.key(model.seed + 1))["encoder"],
        )  # fmt: skip
    if found.config.channels != 1:
        raise UserError(
            f"the encoder of {path} takes {found.config.channels} channels, but a slice has 1; "
            "score a checkpoint that was trained with --config.model.channels=1"
        )
    return found
