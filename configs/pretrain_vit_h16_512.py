"""ViT-H/16 at 512 px, ViT-MAE, one channel, bf16, on one TPU slice v5e:16x16.

Purpose: the largest encoder at full resolution; for larger pods. Recipe and mesh: configs/pretrain_vit.py.
Cost, by the planner's estimate: 9.6 h for 800 epochs of 1,281,167 slices, 2,450 chip-hours, 2,940 USD at 1.20 USD a chip-hour;
116 images/s a chip, MFU 0.72, 9.1 GiB a chip (docs/performance.md).
Expected result: not measured yet.
"""

import runpy
from pathlib import Path

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return runpy.run_path(str(Path(__file__).with_name("pretrain_vit.py")))["get_config"]("H", 512)
