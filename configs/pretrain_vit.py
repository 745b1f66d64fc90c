"""What the named pretraining runs have in common: the recipe of the MAE paper (He et al. 2021, appendix A.1) on slices.

Purpose: the one place of the recipe; the files pretrain_vit_{b16,l16,h16}_{224,512}.py say what each run changes. As it
stands this is ViT-B/16 at 224 px. Differences from the paper: one channel, windows and intensities of CT and MR as
augmentation, statistics shared by all images instead of ImageNet's; and, for the TPU's sake, a decoder with 4 heads of 128
instead of 16 of 32 and the GELU with tanh, which the exported weights name. Cost and expected result: see the named runs.
"""

import ml_collections

DEPTH = {"B": 12, "L": 24, "H": 32}


def get_config(size: str = "B", image_size: int = 224) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    # Global, over all devices. 64 images of 224 px a chip: the optimizer and the gradients' way cost the same for few and
    # many. With 512 px an image has five times the tokens, and the paper's batch does.
    config.batch_size = 16_384 if image_size < 512 else 4096
    config.duration = "800 epochs"  # or "94000 examples", "600 steps"
    config.warmup = "5 %"  # 40 of 800 epochs
    config.save_every = "1 %"
    config.log_every = "50 steps"
    config.keep = 3  # checkpoints

    config.model = ml_collections.ConfigDict()
    config.model.size = size  # B, L, H
    config.model.image_size = (image_size, image_size)
    config.model.patch_size = (16, 16)
    config.model.channels = 1
    config.model.decoder_width = 512
    config.model.decoder_depth = 8
    config.model.decoder_heads = 4  # of 128, as many as a TPU's matrix unit takes at a time
    config.model.mask_ratio = 0.75
    config.model.norm_pix = True
    config.model.norm_pix_eps = 1e-6
    config.model.activation = "gelu_tanh"  # or "gelu", exact
    config.model.dtype = "bfloat16"  # of matrix products; parameters, norms, softmax and loss are float32 in any case
    config.model.attention = "kernel"  # for TPUs and NVIDIA GPUs; "xla" for any device
    config.model.remat = "none"  # none, matmuls, full
    config.model.unroll = DEPTH[size]  # no loop, which would store and read back what the backward pass needs

    config.data = ml_collections.ConfigDict()
    config.data.shards = ""
    config.data.split = "train"
    config.data.canvas = (512, 512)  # (height, width) in px; None takes the largest slice's
    config.data.threads = 4
    config.data.prefetch = 128
    config.data.workers = 16

    config.augment = ml_collections.ConfigDict()
    config.augment.hu_window = (-1000.0, 1000.0)
    config.augment.reading_window_probability = 0.5
    config.augment.intensity_jitter = 0.1
    config.augment.crop_scale = (0.2, 1.0)
    config.augment.crop_ratio = (0.75, 4 / 3)
    config.augment.flip = True
    config.augment.resample = "bicubic"
    config.augment.image_mean = 0.3  # of values between 0 and 1, the edges of the window
    config.augment.image_std = 0.25

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.base_learning_rate = 1.5e-4  # x batch_size / 256
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = None

    config.mesh = ml_collections.ConfigDict()
    config.mesh.replica = 1  # TPU slices
    config.mesh.data = -1  # what is left: 16 on v5e:16x16
    # Parameters and moments are split, and so is the optimizer's work. 32 is faster on v6e and several TPU slices.
    config.mesh.fsdp = 16

    config.devices = ml_collections.ConfigDict()
    config.devices.platform = "auto"  # the accelerator
    config.devices.cpu_count = 0
    config.devices.multihost = True
    config.devices.compilation_cache = "~/.cache/curia_jax/compilations"
    return config
