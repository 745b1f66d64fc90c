"""ViT-B/16 at 224 px, ViT-MAE, one channel, bf16, on one TPU slice v5e:16x16.

Purpose: the first run on a new archive, and the size that most evaluators know. Recipe and mesh: configs/pretrain_vit.py.
Cost, by the planner's estimate: 0.6 h for 800 epochs of 1,281,167 slices, 142 chip-hours, 170 USD at 1.20 USD a chip-hour;
2,012 images/s a chip, MFU 0.59, 3.1 GiB a chip (docs/performance.md).
Expected result: not measured yet.
"""

import runpy
from pathlib import Path

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return runpy.run_path(str(Path(__file__).with_name("pretrain_vit.py")))["get_config"]("B", 224)
