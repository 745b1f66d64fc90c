"""ViT-L/16 at 224 px, ViT-MAE, one channel, bf16, on one TPU slice v5e:16x16.

Purpose: the size of the published radiology models; the default for a full archive. Recipe and mesh: configs/pretrain_vit.py.
Cost: not planned yet; python -m curia_jax.plan --config=configs/pretrain_vit_l16_224.py --topology=v5e:16x16 says it.
Expected result: not measured yet.
"""

import runpy
from pathlib import Path

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return runpy.run_path(str(Path(__file__).with_name("pretrain_vit.py")))["get_config"]("L", 224)
