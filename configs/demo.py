"""The demo's run: a small ViT-MAE on 4 simulated CPU devices, through the code path that a pod runs.

Purpose: the whole way from exams to scored weights, on any machine. Cost: 3 to 5 minutes on 2 cores.
Expected result: a loss well below that of predicting each patch's mean; the model is too small to be of use.
"""

import ml_collections
from curia_jax.configs import base  # pyright: ignore[reportMissingImports] - this folder, as it is installed


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.batch_size = 32
    config.duration = "1500 steps"
    config.warmup = "10 %"
    config.save_every = "25 %"
    config.log_every = "20 steps"

    config.model.size = "custom"
    config.model.width = 128
    config.model.depth = 6
    config.model.heads = 4
    config.model.mlp_width = 512
    config.model.image_size = (64, 64)
    config.model.patch_size = (8, 8)
    config.model.decoder_width = 64
    config.model.decoder_depth = 2
    config.model.decoder_heads = 2
    config.model.norm_pix = False
    config.model.activation = "gelu"
    config.model.dtype = "float32"
    config.model.attention = "xla"
    config.model.unroll = 1

    config.data.threads = 1
    config.data.workers = 0

    config.augment.crop_scale = (0.35, 1.0)

    config.optimizer.base_learning_rate = 6e-3

    config.mesh.data = 2
    config.mesh.fsdp = 2

    config.devices.platform = "cpu"
    config.devices.cpu_count = 4
    config.devices.multihost = False
    return config
