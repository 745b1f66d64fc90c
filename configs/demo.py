"""The demo's run: a small ViT-MAE on 4 simulated CPU devices, through the code path that a pod runs.

Purpose: show the way from exams to scored weights on any machine. Cost: 3 to 5 minutes on 2 cores.
Expected result: a loss well below that of predicting each patch's mean; it is no model to use.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.batch_size = 32  # global, over all devices
    config.duration = "1500 steps"  # or "94000 examples", "800 epochs"
    config.warmup = "10 %"
    config.save_every = "25 %"
    config.log_every = "20 steps"
    config.keep = 3  # checkpoints

    config.model = ml_collections.ConfigDict()
    config.model.size = "Ti"  # Ti, S, B, L, H; what follows makes it smaller still
    config.model.width = 128
    config.model.depth = 6
    config.model.heads = 4
    config.model.mlp_width = 512
    config.model.image_size = (64, 64)
    config.model.patch_size = (8, 8)
    config.model.channels = 1
    config.model.decoder_width = 64
    config.model.decoder_depth = 2
    config.model.decoder_heads = 2
    config.model.mask_ratio = 0.75
    config.model.norm_pix = False  # True predicts patches standardised by themselves, which pays in long runs
    config.model.norm_pix_eps = 1e-6
    config.model.dtype = "float32"  # of matrix products; parameters, norms, softmax and loss are float32 in any case
    config.model.remat = "none"
    config.model.unroll = 1

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
    config.mesh.data = 2
    config.mesh.fsdp = 2

    config.devices = ml_collections.ConfigDict()
    config.devices.platform = "cpu"  # "auto" takes the accelerator
    config.devices.cpu_count = 4  # simulated devices; 0 leaves it alone
    config.devices.multihost = False
    # Folder of compiled programs, which make the next start quicker; "" for none. The variable JAX_COMPILATION_CACHE_DIR
    # goes before it; several simulated devices never use one.
    config.devices.compilation_cache = "~/.cache/curia_jax/compilations"
    return config
