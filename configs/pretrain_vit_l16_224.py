"""ViT-L/16 at 224 px, ViT-MAE, one channel, bf16, on one TPU slice v5e:16x16.

Purpose: the size of the published radiology models; the default for a full archive. Recipe and mesh: configs/base.py.
Cost, by the planner's estimate: 1.0 h for 800 epochs of 1,281,167 slices, 268 chip-hours, 322 USD at 1.20 USD a chip-hour;
1,061 images/s a chip, MFU 0.66, 5.0 GiB a chip (docs/performance.md).
Expected result: not measured yet.
"""

import ml_collections
from curia_jax.configs import base  # pyright: ignore[reportMissingImports] - this folder, as it is installed


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.model.size = "L"
    config.model.unroll = 24
    config.batch_size = 16_384  # 64 images a chip: optimizer and gradient transfers cost the same for few and many
    config.data.canvas = (512, 512)
    return config
