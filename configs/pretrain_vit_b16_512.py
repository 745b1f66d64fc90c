"""ViT-B/16 at 512 px, ViT-MAE, one channel, bf16, on one TPU slice v5e:16x16.

Purpose: whole slices at full resolution, for segmentation and small lesions. Recipe and mesh: configs/pretrain_vit.py.
Cost: not planned yet; python -m curia_jax.plan --config=configs/pretrain_vit_b16_512.py --topology=v5e:16x16 says it.
Expected result: not measured yet.
"""

import runpy
from pathlib import Path

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return runpy.run_path(str(Path(__file__).with_name("pretrain_vit.py")))["get_config"]("B", 512)
