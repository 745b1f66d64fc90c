"""Backbones: where features come from. Each states the weights it has and how it prepares pixels."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

import curia_common
from curia_common.errors import UserError
from curia_jax import config, data, storage, trained_model
from curia_jax.evaluate import features
from curia_jax.evaluate.results import FLOORS, HISTOGRAM, PIXELS, RANDOM, Provenance
from curia_jax.models import mae
from curia_jax.settings import Augment


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
        """Of everything that decides its features, this version of the code included; 16 hex digits."""
        stated = dataclasses.asdict(self.provenance) | {"version": curia_common.__version__}
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]

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

    def features(self, batch: data.HostBatch) -> dict[str, Float[Array, "batch _features"]]:
        """Features of a batch by the name of their readout. Returns before they are computed."""
        compute, params = self._compiled
        split = self._shardings[0]
        on_devices = data.to_devices(batch, split)
        if "mask" in batch:
            on_devices["mask"] = jax.device_put(batch["mask"], split)
        return compute(params, on_devices)


def open_backbones(
    given: Sequence[str], floors: Sequence[str], *, readouts: Sequence[features.Readout],
    image_sizes: Sequence[tuple[int, int]] = (),
) -> list[JaxBackbone]:  # fmt: skip
    """The backbones that a user named, then the floors.

    Args:
      given: work directories of curia_jax.pretrain, or folders of a step; each is its own name in the results.
      floors: of FLOORS. The random encoder has the shape of the first given one and the floors prepare pixels as it does.
      readouts, image_sizes: of the encoders; see `features.encoder_view`.

    Raises:
      UserError: there is no such checkpoint or readout, or its encoder takes other images than slices.
      DataError: a checkpoint is damaged.
    """
    models = {name: _load(name) for name in given}
    # Without a checkpoint of ours, the preparation that a run has by default.
    first = next(iter(models.values()), None)
    settings = first.augment if first else Augment.of(config.load("base").augment)
    about = {"readouts": tuple(map(str, readouts)), "image_sizes": tuple(image_sizes)}
    made = [
        JaxBackbone(
            name,
            features.encoder_view(
                model.config.encoder, model.params["encoder"], model.augment, readouts=readouts, image_sizes=image_sizes
            ),
            Provenance(
                weights_sha256=trained_model.digest(model.params["encoder"]), preparation=_preparation(model.augment),
                image_size=model.config.encoder.image_size, step=model.step, examples_seen=model.examples_seen, **about,
            ),
        )
        for name, model in models.items()
    ]  # fmt: skip
    if RANDOM in floors and first:
        # Another seed than the checkpoint's, so that these are not the weights that its training started from.
        params = mae.init(first.config, jax.random.key(first.seed + 1))["encoder"]
        view = features.encoder_view(
            first.config.encoder, params, settings, readouts=readouts, image_sizes=image_sizes
        )  # fmt: skip
        provenance = Provenance(
            weights_sha256=trained_model.digest(params), preparation=_preparation(settings),
            image_size=first.config.encoder.image_size, **about,
        )  # fmt: skip
        made.append(JaxBackbone(RANDOM, view, provenance))
    for name, view in ((PIXELS, features.pixel_view), (HISTOGRAM, features.histogram_view)):
        if name in floors:
            made.append(JaxBackbone(name, view(settings), Provenance(name, _preparation(settings))))
    return made


def check(given: Sequence[str]) -> None:
    """Raises UserError where a backbone that a user named is not there. Quick."""
    for path in given:
        if not storage.root(path).exists():
            raise UserError(
                f"no backbone {path!r}: it is neither a folder nor one of the floors, which are always there "
                f"({', '.join(FLOORS)}); name a work directory of curia_jax.pretrain, or the folder of a step"
            )


def _load(path: str) -> trained_model.TrainedModel:
    model = trained_model.load(path)
    if model.config.encoder.channels != 1:
        raise UserError(
            f"the encoder of {path} takes {model.config.encoder.channels} channels, but a slice has 1; "
            "score a checkpoint that was trained with --config.model.channels=1"
        )
    return model


def _preparation(settings: Augment) -> str:
    return json.dumps(dataclasses.asdict(settings), sort_keys=True)
