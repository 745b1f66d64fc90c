"""The run behind docs/results.md: ViT-Ti on 96 px slices of a few thousand public CT and MR images.

Purpose: show that pretraining learns from real slices, on a laptop. Cost: 40 minutes on 2 cores.
Expected result: docs/results.md, which `python -m benchmarks.real_data` makes.

Raw pixels are predicted, not patches standardised by themselves: in a run this short the model would spend most of its steps
predicting each patch's mean. Batches are small because steps, not examples, are scarce.
"""

import ml_collections
from curia_jax.configs import base  # pyright: ignore[reportMissingImports] - this folder, as it is installed


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.batch_size = 32
    config.duration = "105000 examples"
    config.save_every = "10 %"
    config.log_every = "20 steps"

    config.model.size = "Ti"
    config.model.image_size = (96, 96)
    config.model.patch_size = (8, 8)
    config.model.decoder_width = 128
    config.model.decoder_depth = 2
    config.model.decoder_heads = 2
    config.model.norm_pix = False
    config.model.norm_pix_eps = 1e-2
    config.model.activation = "gelu"
    config.model.dtype = "float32"
    config.model.attention = "xla"

    config.data.threads = 1
    config.data.workers = 0

    config.augment.crop_scale = (0.35, 1.0)

    config.optimizer.base_learning_rate = 6e-3

    config.mesh.data = 1
    config.mesh.fsdp = 1

    config.devices.platform = "cpu"
    config.devices.cpu_count = 1
    config.devices.multihost = False
    config.devices.compilation_cache = ""
    return config
