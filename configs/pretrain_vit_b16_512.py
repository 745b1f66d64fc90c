"""ViT-B/16 at 512 px, ViT-MAE, one channel, bf16, on one TPU slice v5e:16x16.

Purpose: whole slices at full resolution, for segmentation and small lesions. Recipe and mesh: configs/pretrain_vit.py.
Cost, by the planner's estimate: 3.2 h for 800 epochs of 1,281,167 slices, 820 chip-hours, 990 USD at 1.20 USD a chip-hour;
346 images/s a chip, MFU 0.61, 3.9 GiB a chip (docs/performance.md).
Expected result: not measured yet.
"""

import runpy
from pathlib import Path

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return runpy.run_path(str(Path(__file__).with_name("pretrain_vit.py")))["get_config"]("B", 512)
