"""Fine-tuning of a pretrained ViT for a clinical task: all parameters, with layer decay, drop path and averaged weights.

Purpose: a classifier, a regression or a survival model from a pretraining run and a labelled set. Recipe: fine-tuning in the MAE
paper (He et al. 2021, table 9) without mixup, cutmix and random erasing, which mix or hide findings; flips are off, because sides
matter; batches are small, as labelled sets are. --config.finetune.train=lora or head trains fewer parameters.
The encoder's dimensions, and how pixels are prepared, are those of the run it starts from; `model` and `augment` here are those of
training from scratch.
Cost, by the planner's estimate, on v5e:4x4: 0.09 USD for 100,000 cases of one slice, 1.17 USD for 100,000 bags of 32 slices
(docs/performance.md). Expected result: not measured at this size; a small encoder on two real sets is in docs/finetune.md.
"""

import ml_collections
from curia_jax.configs import base  # pyright: ignore[reportMissingImports] - this folder, as it is installed
from ml_collections.config_dict import placeholder

OF_THE_DECODER = (
    "decoder_width", "decoder_depth", "decoder_heads", "mask_ratio", "norm_pix", "norm_pix_eps",
)  # fmt: skip


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.unlock()
    for name in OF_THE_DECODER:
        del config.model[name]
    config.batch_size = 64  # cases
    config.duration = "50 epochs"
    config.warmup = "10 %"
    config.save_every = "1 epoch"  # and measure on validation
    config.keep = 1
    config.keep_best = "validation_loss"

    config.finetune = ml_collections.ConfigDict()
    config.finetune.train = "full"  # or lora, adapters and the head; head, that alone
    config.finetune.head = "linear"  # or attentive, which weighs the patches of all slices of a case
    config.finetune.pooling = "cls"  # of a linear head: cls, mean (of the patches) or cls_mean, both
    config.finetune.slices = 32  # most slices of a bag
    config.finetune.sampling = "natural"  # or balanced, every class equally often
    config.finetune.class_weights = "none"  # or balanced, n / (classes x cases of the class)
    config.finetune.layer_decay = 0.65  # of the learning rate from block to block, towards the input; of train=full
    config.finetune.drop_path = 0.1  # probability of skipping the last block's branches; of train=full
    config.finetune.label_smoothing = 0.1  # share of a class or label that is spread evenly
    config.finetune.mixup = 0.0  # alpha of the Beta distribution that cases are mixed by; 0: none are
    config.finetune.average = 0.999  # decay of the running mean of the weights, which is measured and exported; 0: none
    config.finetune.lora_rank = 8  # of train=lora
    config.finetune.lora_alpha = 16.0  # an adapter counts alpha / rank
    config.finetune.lora_targets = "qkv+proj+fc1+fc2"  # linear layers that have adapters

    config.augment.crop_scale = (0.6, 1.0)  # a finding may be anywhere
    config.augment.flip = False

    config.optimizer.base_learning_rate = placeholder(float)  # None: settings.FINETUNING_RATES, by what is trained
    config.optimizer.b2 = 0.999
    # Losses near zero and those of a few cases vary by more than in pretraining.
    config.guard.factor = placeholder(float)  # None: what is finite is applied

    config.data.workers = 0  # labelled sets are small, and images of published tasks are decoded once
    config.devices.multihost = False  # a labelled set needs one machine; a launch on several sets it

    # All devices: with a few images each, an optimizer that does all of its work on every device takes as long as the encoder.
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.lock()
    config.compiler_options.unlock()
    return config
