"""The weights that a run starts from where they are not random: those of another run."""

from collections.abc import Mapping
from typing import Any

from curia_common import logs
from curia_common.errors import DataError, UserError
from curia_jax import checkpoint, saving, trained_model
from curia_jax import config as configs
from curia_jax.models.params import Params

logger = logs.get_logger(__name__)
# Weights of one value of these fields mean something else under another.
_CHECKED = ("model.", "augment.hu_window", "augment.image_mean", "augment.image_std")
_NEW = "choose another --workdir for a new run"


def find(place: str | None, config: Mapping[str, Any], *, resumed: checkpoint.Meta | None) -> checkpoint.Origin | None:
    """Where the weights of a run come from; None where they are random.

    Args:
      place: what the user names: a work directory, its `checkpoints` folder, or the folder of a step.
      config: of the run, as plain JSON.
      resumed: of the checkpoint from which the run resumes.

    Raises:
      UserError: there is no such checkpoint, or the run that is resumed started from other weights.
      DataError: the checkpoint is damaged.
    """
    if resumed is not None:
        _check_same(place, resumed.origin)
        return resumed.origin
    if place is None:
        return None
    loaded = checkpoint.load(place)
    for name, (then, now) in configs.changes(configs.from_checkpoint(loaded.config), config).items():
        if name.startswith(_CHECKED):
            logger.warning(f"{name} is {now!r}, but {then!r} in {place}, whose weights this run starts from")
    return _origin(place, loaded)


def _origin(place: str, loaded: checkpoint.Loaded) -> checkpoint.Origin:
    return checkpoint.Origin(place, loaded.step, loaded.examples_seen, trained_model.digest(loaded.params))


def _check_same(place: str | None, origin: checkpoint.Origin | None) -> None:
    if place is None or (origin is not None and place == origin.place):
        return
    if origin is None:
        raise UserError(
            f"--from={place}: the run in --workdir started from random weights; leave --from out to resume it, or {_NEW}"
        )
    if _origin(place, checkpoint.load(place)).weights != origin.weights:
        raise UserError(
            f"--from={place}: the run in --workdir started from {origin.place}, step {origin.step:,}; leave --from out to resume it, "
            f"or {_NEW}"
        )


def weights(origin: checkpoint.Origin, abstract: Params) -> Params:
    """The parameters that a run starts from, as numpy.

    Args:
      abstract: their shapes in this run.

    Raises:
      UserError: the model of the run has other tensors.
      DataError: they are no longer those that the run found at its first start.
    """
    loaded = checkpoint.load(origin.place, origin.step)
    if (found := trained_model.digest(loaded.params)) != origin.weights:
        raise DataError(
            f"{loaded.path} has the weights {found}, but {origin.weights} when this run started; bring them back, or {_NEW}"
        )
    params = {"params": loaded.params}
    saving.check_tensors(
        loaded.path, saving.tensors(params), {"params": abstract}, "Use the --config.model it was trained with"
    )
    logger.info(
        f"starting from the weights of {origin.place}, step {origin.step:,}, {origin.examples_seen:,} examples seen"
    )
    return loaded.params
