"""ViT-L/16 at 512 px, ViT-MAE, one channel, bf16, on one TPU slice v5e:16x16.

Purpose: whole slices at full resolution with a large encoder. Recipe: configs/pretrain_vit.py; this file has what differs.
Cost: not planned yet; python -m curia_jax.plan --config=configs/pretrain_vit_l16_512.py --topology=v5e:16x16 says it.
Expected result: not measured yet.
"""

import runpy
from pathlib import Path

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("pretrain_vit.py")))["get_config"]("L", 512)
    config.model.unroll = 24  # no loop, which would store and read back what the backward pass needs
    config.model.remat = "full"  # 1,025 tokens: what the layers keep for the backward pass would not fit
    config.mesh.data = 16
    config.mesh.fsdp = 16  # parameters and moments are split, and so is the optimizer's work
    return config
