"""The objective that a config is planned as."""

import jax
import pytest

from curia_common.errors import UserError
from curia_jax import config as configs
from curia_jax import sharding
from curia_jax.models import vit
from curia_jax.objectives.mae import MAEObjective
from curia_jax.objectives.supervised import SupervisedObjective
from curia_jax.plan import objectives

TINY = ("size=custom", "width=16", "depth=2", "heads=2", "image_size=16", "patch_size=8", "unroll=1", "attention=xla")


def made(name: str, *words: str, bag: int = 1):
    config = configs.load(
        name, [f"--config.model.{word}" for word in (*TINY, *words)] + ["--config.batch_size=8", "--config.mesh.fsdp=1"]
    )
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    return objectives.maker(config, bag)(config, mesh, canvas=(20, 20), warmup_steps=1, total_steps=10)


def test_config_of_pretraining_is_planned_as_a_masked_autoencoder() -> None:
    assert isinstance(made("base"), MAEObjective)


@pytest.mark.parametrize("bag", [1, 3])
def test_config_of_fine_tuning_is_planned_with_bags(bag: int) -> None:
    objective = made("finetune_vit", bag=bag)
    assert isinstance(objective, SupervisedObjective)
    assert objective.abstract_batch["pixels"].shape == (8, bag, 20, 20)
    assert objective.flops_per_example == bag * 3 * vit.flops(objective.model)


def test_wrong_setting_of_fine_tuning_is_one_line() -> None:
    config = configs.load("finetune_vit", ["--config.finetune.pooling=max"])
    with pytest.raises(UserError, match="finetune.pooling is 'max'; it has to be cls, mean or cls_mean"):
        objectives.maker(config)
