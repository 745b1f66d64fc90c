"""The run behind docs/results.md: ViT-Ti on 96 px slices of a few thousand public CT and MR images.

Purpose: show that pretraining learns from real slices within the patience of a laptop. Cost: 40 minutes on 2 cores.
Expected result: docs/results.md; `python benchmarks/real_data.py` makes it.

Raw pixels are predicted, not pixels standardised by patch: in a run this short, standardised targets leave the model
predicting each patch's mean for most of its steps. Batches are small because steps, not samples, are what is scarce.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 32  # global, over all devices
    config.duration = "105000 examples"  # or "3000 steps", "800 epochs"
    config.warmup = "5 %"
    config.save_every = "10 %"
    config.log_every = "20 steps"
    config.keep = 3  # checkpoints

    config.model = ml_collections.ConfigDict()
    config.model.size = "Ti"  # Ti, S, B, L, H
    config.model.image_size = (96, 96)
    config.model.patch_size = (8, 8)
    config.model.channels = 1
    config.model.decoder_width = 128
    config.model.decoder_depth = 2
    config.model.decoder_heads = 2
    config.model.mask_ratio = 0.75
    config.model.norm_pix = False
    config.model.norm_pix_eps = 1e-2
    config.model.dtype = "float32"  # of matrix products; parameters, norms, softmax and loss are float32 in any case
    config.model.activation = "gelu"
    config.model.remat = "none"
    config.model.unroll = 12

    config.data = ml_collections.ConfigDict()
    config.data.shards = ""
    config.data.split = "train"
    config.data.canvas = None  # (height, width) in px; None takes the largest slice's
    config.data.threads = 1
    config.data.prefetch = 128
    config.data.workers = 0

    config.augment = ml_collections.ConfigDict()
    config.augment.hu_window = (-1000.0, 1000.0)
    config.augment.reading_window_probability = 0.5
    config.augment.intensity_jitter = 0.1
    config.augment.crop_scale = (0.35, 1.0)
    config.augment.crop_ratio = (0.75, 4 / 3)
    config.augment.flip = True
    config.augment.resample = "bicubic"
    config.augment.image_mean = 0.3  # of values between 0 and 1, the edges of the window
    config.augment.image_std = 0.25

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.base_learning_rate = 6e-3  # x batch_size / 256
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = None

    config.mesh = ml_collections.ConfigDict()
    config.mesh.replica = 1
    config.mesh.data = 1
    config.mesh.fsdp = 1

    config.devices = ml_collections.ConfigDict()
    config.devices.platform = "cpu"  # "auto" takes the accelerator
    config.devices.cpu_count = 1  # simulated devices; 0 leaves it alone
    config.devices.multihost = False
    config.devices.compilation_cache = ""
    return config
