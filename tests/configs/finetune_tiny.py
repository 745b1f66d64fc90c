"""configs/finetune_vit.py with a model that compiles in seconds, on one device of the test's process."""

import ml_collections
from curia_jax.configs import finetune_vit


def get_config() -> ml_collections.ConfigDict:
    config = finetune_vit.get_config()
    config.batch_size = 8
    config.duration = "4 epochs"
    config.warmup = "2 steps"
    config.log_every = "1 step"
    config.model.width = 16
    config.model.size = "custom"
    config.model.depth = 2
    config.model.heads = 2
    config.model.mlp_width = 32
    config.model.image_size = (16, 16)
    config.model.patch_size = (8, 8)
    config.model.dtype = "float32"
    config.model.attention = "xla"
    config.model.unroll = 1
    config.data.threads = 1
    config.data.workers = 0
    config.data.prefetch = 8
    config.optimizer.base_learning_rate = 0.1
    config.mesh.data = 1
    config.devices.multihost = False
    config.devices.compilation_cache = ""
    return config
