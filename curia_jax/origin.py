"""The weights that a run starts from where they are not random: those of another run, or of an export."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from curia_common import logs
from curia_common.errors import DataError, UserError
from curia_jax import checkpoint, saving, storage, trained_model, workdir
from curia_jax import config as configs
from curia_jax.convert import reading
from curia_jax.models.params import Params

logger = logs.get_logger(__name__)
SCRATCH = "none"  # what a user names for random weights
# Weights of one value of these fields mean something else under another.
_CHECKED = ("model.", "augment.hu_window", "augment.image_mean", "augment.image_std")
# Fields of the encoder and of the preparation of pixels that a fine-tuning takes over from its origin.
_OF_ENCODER = (
    *(f"model.{name}" for name in ("size", *configs.DIMENSIONS, "patch_size", "channels", "activation", "unroll")),
    *(f"augment.{name}" for name in ("hu_window", "image_mean", "image_std", "resample")),
)  # fmt: skip
_IMAGE_SIZE = "model.image_size"
_NEW = "choose another --workdir for a new run"


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Weights that a user names.

    Attributes:
      params: parts of a model by name: `encoder` and, of a pretraining run, `decoder`.
      config: fields of the config that they were trained with, by their dotted names.
      path: where they are, for messages.
    """

    params: Params
    config: Mapping[str, Any]
    step: int
    examples_seen: int
    path: str


def _read(place: str, step: int | None = None) -> _Weights:
    """The weights of a run, a checkpoint or an export. Of a fine-tuned run they are its encoder's, as it is exported.

    Raises:
      UserError: there is no such checkpoint.
      DataError: it is damaged.
    """
    if not storage.is_bucket(place) and reading.is_export(Path(place)):
        export = reading.read(Path(place))
        encoder, recipe = export.config, export.recipe
        fields = {
            "model.size": configs.CUSTOM, "model.width": encoder.width, "model.depth": encoder.depth,
            "model.heads": encoder.heads, "model.mlp_width": encoder.mlp_width, "model.image_size": encoder.image_size,
            "model.patch_size": encoder.patch_size, "model.channels": encoder.channels,
            "model.activation": encoder.activation, "model.unroll": encoder.depth,
            **{f"augment.{name}": recipe[name] for name in ("hu_window", "image_mean", "image_std", "resample")},
        }  # fmt: skip
        fields["augment.hu_window"] = tuple(fields["augment.hu_window"])
        return _Weights({"encoder": export.params}, fields, export.step, export.examples_seen, place)
    if step is None and (selected := workdir.selected(place)) is not None:
        step = selected.step
    loaded = checkpoint.load(place, step)
    fields = configs.flatten(configs.from_checkpoint(loaded.config))
    params = trained_model.load(place, step).params if "head" in loaded.params else loaded.params
    return _Weights(params, fields, loaded.step, loaded.examples_seen, loaded.path)


def find(place: str | None, config: Mapping[str, Any], *, resumed: checkpoint.Meta | None) -> checkpoint.Origin | None:
    """Where the weights of a run come from; None where they are random.

    Args:
      place: what the user names: a work directory, its `checkpoints` folder, the folder of a step, an export, or SCRATCH.
      config: of the run, as plain JSON.
      resumed: of the checkpoint from which the run resumes.

    Raises:
      UserError: there is no such checkpoint, or the run that is resumed started from other weights.
      DataError: the checkpoint is damaged.
    """
    if resumed is not None:
        _check_same(place, resumed.origin)
        return resumed.origin
    if place in (None, SCRATCH):
        return None
    found = _read(place)
    now = configs.flatten(configs.from_checkpoint(config))
    for name, then in found.config.items():
        if name.startswith(_CHECKED) and now.get(name, then) != then:
            logger.warning(f"{name} is {now[name]!r}, but {then!r} in {place}, whose weights this run starts from")
    return _origin(place, found)


def adopt(
    config: ml_collections.ConfigDict, overrides: Sequence[str], place: str | None, resumed: Mapping[str, Any] | None
) -> None:
    """Takes the shape of the encoder and the preparation of pixels over from the weights that a run starts from, or from the
    checkpoint that it resumes; but for fields on the command line, and an image size that is not the default, which may be another.

    Args:
      config: is changed.
      overrides: words `--config.field=value` of the command line.
      resumed: the config of the checkpoint that is resumed.

    Raises:
      UserError, DataError: as `find`.
    """
    if resumed is not None:
        found = configs.flatten(configs.from_checkpoint(resumed))
    elif place is None or place == SCRATCH:
        return
    else:
        found = _read(place).config
    typed = {word.removeprefix("--config.").partition("=")[0] for word in overrides}
    model: Any = config.model
    same_size = model.image_size == configs.flatten(configs.load("base"))[_IMAGE_SIZE]
    for name in (*_OF_ENCODER, *([_IMAGE_SIZE] if same_size else [])):
        if name in found and name not in typed:
            group, _, field = name.partition(".")
            config[group][field] = found[name]


def _origin(place: str, found: _Weights) -> checkpoint.Origin:
    return checkpoint.Origin(place, found.step, found.examples_seen, trained_model.digest(found.params))


def _check_same(place: str | None, origin: checkpoint.Origin | None) -> None:
    if place is None or (origin is not None and place == origin.place) or (place == SCRATCH and origin is None):
        return
    if origin is None:
        raise UserError(
            f"--from={place}: the run in --workdir started from random weights; leave --from out to resume it, or {_NEW}"
        )
    if place == SCRATCH or _origin(place, _read(place)).weights != origin.weights:
        raise UserError(
            f"--from={place}: the run in --workdir started from {origin.place}, step {origin.step:,}; leave --from out to resume it, "
            f"or {_NEW}"
        )


def weights(origin: checkpoint.Origin, abstract: Params) -> Params:
    """The parts of a model that a run starts from, as numpy: those of its parts that the origin has. The others are random.

    Args:
      abstract: shapes of the run's parameters.

    Raises:
      UserError: a part has other tensors in the run.
      DataError: they are no longer those that the run found at its first start.
    """
    found = _read(origin.place, origin.step)
    if (digest := trained_model.digest(found.params)) != origin.weights:
        raise DataError(
            f"{found.path} has the weights {digest}, but {origin.weights} when this run started; bring them back, or {_NEW}"
        )
    both = [name for name in abstract if name in found.params]
    params = {name: found.params[name] for name in both}
    saving.check_tensors(
        found.path, saving.tensors({"params": params}), {"params": {name: abstract[name] for name in both}},
        "Use the --config.model it was trained with",
    )  # fmt: skip
    random = [name for name in abstract if name not in both]
    logger.info(
        f"starting from the weights of {origin.place}, step {origin.step:,}, {origin.examples_seen:,} examples seen"
        + (f"; {' and '.join(random)}: new" if random else "")
    )
    return params
