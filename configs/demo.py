"""The demo's run: a small ViT-MAE on 4 simulated CPU devices, through the code path that a pod runs.

Purpose: the whole way from exams to scored weights, on any machine. Cost: 9 core minutes, on 2 cores.
Expected result: features that tell the situs of the phantom's patients better than those of an untrained encoder and than
pixels do. The model is too small to be of use.
"""

import ml_collections
from curia_jax.configs import base  # pyright: ignore[reportMissingImports] - this folder, as it is installed


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.batch_size = 32
    config.duration = "3000 steps"
    config.warmup = "10 %"
    config.save_every = "25 %"
    config.log_every = "20 steps"

    # Many steps of a small model learn more in these minutes than few of a larger one.
    config.model.size = "custom"
    config.model.width = 64
    config.model.depth = 4
    config.model.heads = 2
    config.model.mlp_width = 256
    config.model.image_size = (64, 64)
    config.model.patch_size = (8, 8)
    config.model.decoder_width = 32
    config.model.decoder_depth = 1
    config.model.decoder_heads = 2
    config.model.norm_pix = False
    config.model.activation = "gelu"
    config.model.dtype = "float32"
    config.model.attention = "xla"
    config.model.unroll = 1

    config.data.threads = 1
    config.data.workers = 0

    # From fat to enhanced vessels: in a window of 2000 HU the organs of the abdomen are one grey, and their places not worth
    # learning.
    config.augment.hu_window = (-200.0, 300.0)
    config.augment.reading_window_probability = 0.0
    config.augment.crop_scale = (0.6, 1.0)

    config.optimizer.base_learning_rate = 1e-2

    config.mesh.data = 2
    config.mesh.fsdp = 2

    config.devices.platform = "cpu"
    config.devices.cpu_count = 4
    config.devices.multihost = False
    return config
