"""ViT-B/16 at 224 px, ViT-MAE, one channel, bf16, on one TPU slice v5e:16x16.

Purpose: the first run on a new archive, and the size that most evaluators know. Recipe and mesh: configs/base.py.
Cost, by the planner's estimate: 0.6 h for 800 epochs of 1,281,167 slices, 141 chip-hours, 169 USD at 1.20 USD a chip-hour;
2,017 images/s a chip, MFU 0.59, 3.1 GiB a chip (docs/performance.md).
Expected result: not measured yet.
"""

import ml_collections
from curia_jax.configs import base  # pyright: ignore[reportMissingImports] - this folder, as it is installed


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.batch_size = 16_384  # 64 images a chip: optimizer and gradient transfers cost the same for few and many
    config.data.canvas = (512, 512)
    return config
