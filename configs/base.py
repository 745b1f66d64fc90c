"""Every field of a run, once: its default, meaning, unit and choices. The other config files override some of them.

As it stands this is ViT-B/16 at 224 px with the recipe of the MAE paper (He et al. 2021, appendix A.1) on one TPU slice v5e:16x16.
Differences from the paper: one channel; windows and intensities of CT and MR as augmentation; statistics shared by all images
instead of ImageNet's; and, for the TPU's sake, a decoder with 4 heads of 128 instead of 16 of 32 and the GELU with tanh, which
exported weights name.

A config of your own is a Python file:

    from curia_jax.configs import base

    def get_config():
        config = base.get_config()
        config.model.size = "L"
        return config
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
    """The defaults, locked: a field that does not exist cannot be set. `placeholder` is a field that may be None."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of initial weights, order of the slices, views and masks; 0 or more
    config.batch_size = 16_384  # examples per step, over all devices
    # Durations are written "94000 examples", "600 steps", "800 epochs" or, but for `duration` itself, "5 %" of it.
    config.duration = "800 epochs"  # of the run
    config.warmup = "5 %"  # of the learning rate, linear; the paper has 40 of 800 epochs
    config.save_every = "1 %"  # between checkpoints
    config.log_every = "50 steps"  # between lines of metrics
    config.keep = 3  # newest checkpoints that are kept; at least 1
    config.keep_every = ""  # between checkpoints that are kept for good, a duration; "" keeps the newest alone
    config.keep_best = ""  # keep the checkpoint with the lowest value of this metric too, such as loss; "": no such
    config.save_patience = 60.0  # minutes for which training continues while saves fail, on a full disk for example

    config.model = ml_collections.ConfigDict()
    config.model.size = "B"  # Ti, S, B, L, H, or custom with width, depth and heads
    config.model.width = placeholder(int)  # of the encoder's tokens; a multiple of 4 and of heads; None: the size's
    config.model.depth = placeholder(int)  # encoder blocks; None: the size's
    config.model.heads = placeholder(int)  # of the encoder's attention; None: the size's
    config.model.mlp_width = placeholder(int)  # hidden width of the encoder's MLPs; None: 4 x width
    config.model.image_size = (224, 224)  # height and width of a view, px; a multiple of patch_size
    config.model.patch_size = (16, 16)  # height and width, px
    config.model.channels = 1  # of a view
    config.model.decoder_width = 512  # of the decoder's tokens
    config.model.decoder_depth = 8  # decoder blocks
    config.model.decoder_heads = 4  # of the decoder's attention; heads of 128 fill a TPU's matrix unit
    config.model.mask_ratio = 0.75  # share of the patches that is hidden
    config.model.norm_pix = True  # predict patches standardised by their own mean and deviation; pays in long runs
    config.model.norm_pix_eps = 1e-6  # added to a patch's variance; 1e-2 gives air little weight
    config.model.activation = "gelu_tanh"  # or gelu, exact
    config.model.dtype = "bfloat16"  # or float32; of matmuls: parameters, norms, softmax and loss are always float32
    config.model.attention = "pallas"  # for TPUs and NVIDIA GPUs; xla for any device
    config.model.remat = "none"  # none, matmuls (keep those alone), full: what the backward pass computes again
    # The whole depth leaves no loop, which would store and read back what the backward pass needs.
    config.model.unroll = 12  # blocks per iteration of the loop over depth; a divisor of depth

    config.data = ml_collections.ConfigDict()
    config.data.shards = ""  # dataset folder that data_pipeline.build wrote; several with weights: "ct:0.7,mr:0.3"
    config.data.split = "train"  # of the dataset; several with a plus: train+validation
    config.data.canvas = placeholder(tuple)  # height and width of the pixels in a batch; None: the largest slice's
    config.data.threads = 4  # reading threads per worker
    config.data.prefetch = 128  # examples read ahead per worker
    config.data.workers = 16  # reading processes per host; 0 reads in the training process
    config.data.additions = placeholder(int)  # use the first build and this many additions of the dataset; None: all
    config.data.on_change = "refuse"  # or new_epoch: what resuming does where the dataset is not the checkpoint's
    config.data.damaged_share = 0.001  # of the slices that may be damaged, others take their place; 0: none may be
    config.data.check_shards = True  # compare every shard with its digest once per start, in the background

    config.augment = ml_collections.ConfigDict()
    config.augment.hu_window = (-1000.0, 1000.0)  # lower and upper edge, HU
    config.augment.reading_window_probability = 0.5  # of a lung, soft tissue or bone window instead, for slices in HU
    config.augment.intensity_jitter = 0.1  # of the window width: how far its edges move, for slices that are not in HU
    config.augment.crop_scale = (0.2, 1.0)  # smallest and largest share of the slice in a crop
    config.augment.crop_ratio = (0.75, 4 / 3)  # smallest and largest aspect ratio of a crop
    config.augment.flip = True  # left and right in half of the views
    config.augment.resample = "bicubic"  # or bilinear
    config.augment.image_mean = 0.3  # subtracted from values between 0 and 1, the edges of the window
    config.augment.image_std = 0.25  # divides what is left

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.base_learning_rate = 1.5e-4  # x batch_size / 256
    config.optimizer.b1 = 0.9  # of AdamW
    config.optimizer.b2 = 0.95  # of AdamW
    config.optimizer.weight_decay = 0.05  # of weights and tokens; none for biases and norms
    config.optimizer.clip_norm = placeholder(float)  # largest norm of the gradients; None: any

    # An update is not applied where the loss or the norm of the gradients is not finite, or too large.
    config.guard = ml_collections.ConfigDict()
    config.guard.factor = 10.0  # x the running mean of the norm, x the loss of the first step: more is too large
    config.guard.patience = 20  # refused updates in a row, then back to the last good checkpoint with later examples
    config.guard.rollbacks = 3  # how often in a run, then it ends with exit code 64

    config.mesh = ml_collections.ConfigDict()
    config.mesh.replica = 1  # TPU slices
    config.mesh.data = -1  # groups of devices with the parameters in common; -1: what is left, 16 on v5e:16x16
    # 32 is faster on v6e and on several TPU slices.
    config.mesh.fsdp = 16  # devices over which parameters, moments and the optimizer's work are split

    config.devices = ml_collections.ConfigDict()
    config.devices.platform = "auto"  # cpu, gpu or tpu; auto takes the accelerator
    config.devices.cpu_count = 0  # simulated CPU devices; 0: as they are
    config.devices.multihost = True  # connect to the other hosts of the run
    config.devices.heartbeat_seconds = 60  # silence after which a host is lost and the others end; at least 10
    config.devices.watchdog_seconds = 1800  # without progress after which a host ends with its stacks; 0: never
    # Costs a step, and memory for a second state.
    config.devices.check_every = 0  # steps between checks for chips that compute wrongly; 0: never
    # The cloud's word that it takes the machine away stops a run as SIGTERM does; auto: where the machine is Google Cloud's.
    config.devices.preemption_notice = "auto"  # or google, none: whose
    # JAX_COMPILATION_CACHE_DIR takes precedence; several simulated devices never use a cache.
    config.devices.compilation_cache = "~/.cache/curia_jax/compilations"  # folder of compiled programs; "": none

    # Flags beside those of xla_flags.py for the chip: --config.compiler_options.xla_some_flag=value; None removes one.
    config.compiler_options = ml_collections.ConfigDict()
    config.lock()
    config.compiler_options.unlock()
    return config
