"""The demo's config with a model that compiles in seconds."""

import ml_collections
from curia_jax.configs import demo


def get_config() -> ml_collections.ConfigDict:
    config = demo.get_config()
    config.batch_size = 16
    config.duration = "12 steps"
    config.save_every = "4 steps"
    config.log_every = "1 step"
    config.model.width = 32
    config.model.depth = 2
    config.model.heads = 2
    config.model.mlp_width = 64
    config.model.image_size = (16, 16)
    config.model.patch_size = (4, 4)
    config.model.decoder_width = 16
    config.model.decoder_depth = 1
    config.model.decoder_heads = 2
    config.data.prefetch = 16
    return config
