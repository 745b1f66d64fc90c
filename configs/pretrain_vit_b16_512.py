"""ViT-B/16 at 512 px, ViT-MAE, one channel, bf16, on one TPU slice v5e:16x16.

Purpose: whole slices at full resolution, for segmentation and small lesions. Recipe and mesh: configs/base.py.
Cost, by the planner's estimate: 3.3 h for 800 epochs of 1,281,167 slices, 838 chip-hours, 1,006 USD at 1.20 USD a chip-hour;
340 images/s a chip, MFU 0.60, 3.9 GiB a chip (docs/performance.md).
Expected result: not measured yet.
"""

import ml_collections
from curia_jax.configs import base  # pyright: ignore[reportMissingImports] - this folder, as it is installed


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.model.image_size = (512, 512)
    config.batch_size = 4096  # the paper's; an image has five times the tokens of one of 224 px
    config.data.canvas = (512, 512)
    return config
