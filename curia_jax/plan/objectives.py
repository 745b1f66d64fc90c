"""The objective that a config is of: pretraining or fine-tuning."""

import functools
from collections.abc import Callable

import ml_collections

from curia_jax.models import head as heads
from curia_jax.objectives import base, mae, supervised
from curia_jax.settings import Finetune


def maker(config: ml_collections.ConfigDict, bag: int = 1) -> Callable[..., base.Objective]:
    """What builds the objective of a config: (config, mesh, canvas, warmup_steps, total_steps) -> objective.

    Args:
      config: of fine-tuning where it has the group finetune; then for two classes and without masks, which hardly matters: the
        encoder is what a step costs.
      bag: slices of a case, of fine-tuning.

    Raises:
      UserError: a setting is wrong.
    """
    if Finetune.section not in config:
        return mae.make
    tune = Finetune.of(config[Finetune.section])
    head = heads.HeadConfig(tune.head, tune.pooling, "classes", ("no", "yes"))
    return functools.partial(supervised.make, head=head, slices=bag, masked=False)
