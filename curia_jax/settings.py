"""The settings of a run as typed records. `Settings.of(config)` checks a whole config in one place, before any work is done.

A model's own fields are checked where its shapes are: models/vit.py, models/mae.py.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import ml_collections

from curia_common.errors import UserError

Number = int | float
Record = TypeVar("Record", bound="_Section")


def _field(wanted: str, accepts: Callable[[Any], bool], default: Any = dataclasses.MISSING) -> Any:
    metadata = {"wanted": wanted, "accepts": accepts}
    if default == {}:
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, low: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _pair(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(accepts, value))


class _Section:
    """Base of the records."""

    section: ClassVar[str] = ""

    @classmethod
    def of(cls: type[Record], config: ml_collections.ConfigDict | Mapping[str, Any]) -> Record:
        """The record of a section of a config. Fields that an older config lacks have their default.

        Raises:
          UserError: a value of the wrong type or out of its range.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType] - every subclass is a dataclass
            if field.name not in config:
                continue
            value = config[field.name]
            if "accepts" in field.metadata and not field.metadata["accepts"](value):
                name = f"{cls.section}.{field.name}" if cls.section else field.name
                raise UserError(f"{name} is {value!r}; it has to be {field.metadata['wanted']}; set --config.{name}")
            values[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Optimizer(_Section):
    """AdamW (optimizer.py). `base_learning_rate` is for a batch of 256; `clip_norm` limits the norm of all gradients."""

    section = "optimizer"
    base_learning_rate: Number = _field("a number above 0", lambda v: _number(v) and v > 0)
    b1: Number = _field("a number from 0 to below 1", lambda v: _number(v) and 0 <= v < 1)
    b2: Number = _field("a number from 0 to below 1", lambda v: _number(v) and 0 <= v < 1)
    weight_decay: Number = _field("a number of at least 0", lambda v: _number(v) and v >= 0)
    clip_norm: Number | None = _field("a number above 0, or None", lambda v: v is None or (_number(v) and v > 0))


@dataclasses.dataclass(frozen=True)
class Augment(_Section):
    """What happens to pixels on the device (augment.py). Probability, jitter, crops and flip are of training views alone.

    Attributes:
      hu_window: lower and upper edge of the window through which slices in HU are seen, HU.
      reading_window_probability: share of slices in HU that are seen through one of augment.READING_WINDOWS instead.
      intensity_jitter: both window edges of slices that are not in HU move by up to this share of the window width.
      crop_scale: smallest and largest share of the slice that a crop covers.
      crop_ratio: smallest and largest aspect ratio of a crop.
      flip: mirror left and right in half of the images.
      resample: "bicubic" or "bilinear", both antialiased.
      image_mean, image_std: subtracted from, and divided by, after scaling to [0, 1]: the same for every image, so that what an
        image's mean and contrast say, HU above all, stays in it.
    """

    section = "augment"
    hu_window: tuple[Number, Number] = _field(
        "two numbers, the lower first", lambda v: _pair(v, _number) and v[0] < v[1]
    )
    reading_window_probability: Number = _field("a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1)
    intensity_jitter: Number = _field("a number of at least 0", lambda v: _number(v) and v >= 0)
    crop_scale: tuple[Number, Number] = _field(
        "two numbers above 0 and up to 1, the lower first", lambda v: _pair(v, _number) and 0 < v[0] <= v[1] <= 1
    )
    crop_ratio: tuple[Number, Number] = _field(
        "two numbers above 0, the lower first", lambda v: _pair(v, _number) and 0 < v[0] <= v[1]
    )
    flip: bool = _field("True or False", lambda v: isinstance(v, bool))
    resample: Literal["bicubic", "bilinear"] = _field("bicubic or bilinear", lambda v: v in ("bicubic", "bilinear"))
    image_mean: Number = _field("a number", _number)
    image_std: Number = _field("a number above 0", lambda v: _number(v) and v > 0)


@dataclasses.dataclass(frozen=True)
class Data(_Section):
    """Which slices, and how they are read (data.py).

    Attributes:
      shards: a folder, or folders with weights (mixture.py).
      canvas: height and width of the pixels in a batch; None takes those of the largest slice.
      additions: train on the first build and this many additions to it, of every folder; None takes all.
      damaged_share: share of the slices that may be damaged; others take their place. 0 ends the run at the first.
      check_shards: compare the shards with their digests in the background.
      on_change: where the dataset is not the checkpoint's: refuse it, or start a new epoch on it.
    """

    section = "data"
    shards: str = _field("a folder", lambda v: isinstance(v, str))
    split: str = _field("a split such as train", lambda v: isinstance(v, str) and v != "")
    canvas: tuple[int, int] | None = _field(
        "a height and width in px, or None", lambda v: v is None or _pair(v, lambda side: _whole(side, 1))
    )
    threads: int = _field("a whole number of at least 1", lambda v: _whole(v, 1))
    prefetch: int = _field("a whole number of at least 1", lambda v: _whole(v, 1))
    workers: int = _field("a whole number of at least 0", _whole)
    additions: int | None = _field("a whole number of at least 0, or None", lambda v: v is None or _whole(v), None)
    on_change: Literal["refuse", "new_epoch"] = _field(
        "refuse or new_epoch", lambda v: v in ("refuse", "new_epoch"), "refuse"
    )
    damaged_share: Number = _field("a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1, 0)
    check_shards: bool = _field("True or False", lambda v: isinstance(v, bool), True)


@dataclasses.dataclass(frozen=True)
class Devices(_Section):
    """Platform and hosts (run.use_devices).

    Attributes:
      cpu_count: number of devices to simulate on a CPU; 0 simulates none.
      heartbeat_seconds: silence after which a host counts as lost.
      watchdog_seconds: time without progress after which a process ends; 0 never.
      check_every: steps between checks for chips that compute wrongly (corruption.py); 0 never.
      preemption_notice: whose notices that a machine is taken away stop the run (preemption.py).
    """

    section = "devices"
    platform: str = _field("a platform such as cpu, or auto", lambda v: isinstance(v, str) and v != "")
    cpu_count: int = _field("a whole number of at least 0", _whole)
    multihost: bool = _field("True or False", lambda v: isinstance(v, bool))
    compilation_cache: str = _field("a folder", lambda v: isinstance(v, str))
    heartbeat_seconds: int = _field("a whole number of at least 10", lambda v: _whole(v, 10), 60)
    watchdog_seconds: Number = _field("a number of at least 0", lambda v: _number(v) and v >= 0, 1800)
    check_every: int = _field("a whole number of at least 0", _whole, 0)
    preemption_notice: Literal["auto", "google", "none"] = _field(
        "auto, google or none", lambda v: v in ("auto", "google", "none"), "auto"
    )


@dataclasses.dataclass(frozen=True)
class Guard(_Section):
    """Which updates are not applied, and when a run goes back (objectives/base.py, run.py).

    Attributes:
      factor: an update is refused where the norm of its gradients is above `factor` times the running mean of that norm, or the loss
        above `factor` times that of the first step. None refuses what is not finite alone, and allows any trend.
      patience: updates refused in a row after which a run goes back to its last good checkpoint.
      rollbacks: how often it does that before it gives up.
    """

    section = "guard"
    factor: Number | None = _field("a number above 1, or None", lambda v: v is None or (_number(v) and v > 1), 10)
    patience: int = _field("a whole number of at least 1", lambda v: _whole(v, 1), 20)
    rollbacks: int = _field("a whole number of at least 0", _whole, 3)


@dataclasses.dataclass(frozen=True)
class Finetune(_Section):
    """What fine-tuning trains, and how (objectives/supervised.py, finetune.py).

    Attributes:
      train: "full", all parameters; "lora", adapters of the encoder and the head; "head" alone.
      head, pooling: `kind` and `pooling` of the head, see models.head.HeadConfig.
      slices: most slices of a bag; a case with more gets that many, evenly spaced.
      sampling: "natural", or "balanced", every class equally often.
      class_weights: "none", or "balanced": n / (classes x cases of the class).
      layer_decay: the learning rate of a block is this times that of the block after it; of full fine-tuning.
      drop_path: probability with which a slice skips the branches of the last block; linear over the depth, from 0.
      label_smoothing: share of a target that is spread evenly; of classes and labels.
      mixup: alpha of the Beta distribution that two cases of a batch are mixed by; 0 mixes none.
      average: decay of the running mean of the weights, see objectives.base.moving_average; 0 keeps none.
      lora_rank, lora_alpha, lora_targets: see models.lora.LoRAConfig; targets are joined by a plus.
    """

    section = "finetune"
    train: Literal["full", "lora", "head"] = _field("full, lora or head", lambda v: v in ("full", "lora", "head"))
    head: Literal["linear", "attentive"] = _field("linear or attentive", lambda v: v in ("linear", "attentive"))
    pooling: Literal["cls", "mean", "cls_mean"] = _field(
        "cls, mean or cls_mean", lambda v: v in ("cls", "mean", "cls_mean")
    )
    slices: int = _field("a whole number of at least 1", lambda v: _whole(v, 1))
    sampling: Literal["natural", "balanced"] = _field("natural or balanced", lambda v: v in ("natural", "balanced"))
    class_weights: Literal["none", "balanced"] = _field("none or balanced", lambda v: v in ("none", "balanced"))
    layer_decay: Number = _field("a number above 0 and up to 1", lambda v: _number(v) and 0 < v <= 1)
    drop_path: Number = _field("a number from 0 to below 1", lambda v: _number(v) and 0 <= v < 1)
    label_smoothing: Number = _field("a number from 0 to below 1", lambda v: _number(v) and 0 <= v < 1)
    mixup: Number = _field("a number of at least 0", lambda v: _number(v) and v >= 0)
    average: Number = _field("a number from 0 to below 1", lambda v: _number(v) and 0 <= v < 1)
    lora_rank: int = _field("a whole number of at least 0", _whole)
    lora_alpha: Number = _field("a number above 0", lambda v: _number(v) and v > 0)
    lora_targets: str = _field("names joined by +, such as qkv+proj", lambda v: isinstance(v, str))


# Base learning rates of fine-tuning where the config has none. Of all parameters: He et al. 2021, table 9. Adapters learn best at ten
# times that rate (Schulman et al. 2025, "LoRA Without Regret"). A head alone has a linear model to fit, and takes a hundred times.
FINETUNING_RATES = {"full": 5e-4, "lora": 5e-3, "head": 5e-2}


@dataclasses.dataclass(frozen=True)
class Settings(_Section):
    """What both stages need to know of a run's config.

    Attributes:
      batch_size: global.
      duration, warmup, save_every, log_every: as config.steps reads them; all but the first may be a share of the first.
      keep: newest checkpoints that stay.
      keep_every: distance between checkpoints that stay for good; empty for none.
      keep_best: metric whose lowest value's checkpoint stays for good; empty for none.
      save_patience: minutes for which training continues while saves fail.
      compiler_options: XLA options that this run changes, by name; None removes one (xla_flags.py).
      finetune: None in configs of pretraining.
    """

    optimizer: Optimizer
    augment: Augment
    data: Data
    devices: Devices
    guard: Guard
    seed: int = _field("a whole number of at least 0", _whole)
    batch_size: int = _field("a whole number of at least 1", lambda v: _whole(v, 1))
    duration: str = _field("a duration such as '800 epochs'", lambda v: isinstance(v, str))
    warmup: str = _field("a duration such as '5 %'", lambda v: isinstance(v, str))
    save_every: str = _field("a duration such as '1 %'", lambda v: isinstance(v, str))
    log_every: str = _field("a duration such as '50 steps'", lambda v: isinstance(v, str))
    keep: int = _field("a whole number of at least 1", lambda v: _whole(v, 1))
    keep_every: str = _field("a duration such as '10 %', or an empty text", lambda v: isinstance(v, str), "")
    keep_best: str = _field("the name of a metric, or an empty text", lambda v: isinstance(v, str), "")
    save_patience: Number = _field("a number of at least 0", lambda v: _number(v) and v >= 0, 60)
    compiler_options: Mapping[str, str | int | float | bool | None] = _field(
        "a group of option names and values",
        lambda v: isinstance(v, dict) and all(one is None or isinstance(one, str | int | float) for one in v.values()),
        {},
    )
    finetune: Finetune | None = None

    @classmethod
    def of(cls, config: ml_collections.ConfigDict | Mapping[str, Any]) -> "Settings":
        """The settings of a whole config."""
        fields: dict[str, Any] = {name: config[name] for name in config}
        if isinstance(options := fields.get("compiler_options"), ml_collections.ConfigDict):
            fields["compiler_options"] = options.to_dict()
        found: dict[str, Any] = {}
        if Finetune.section in fields:
            found[Finetune.section] = tune = Finetune.of(fields[Finetune.section])
            optimizer = dict(fields.get(Optimizer.section, {}))
            if optimizer.get("base_learning_rate") is None:
                fields[Optimizer.section] = {**optimizer, "base_learning_rate": FINETUNING_RATES[tune.train]}
        records = (Optimizer, Augment, Data, Devices, Guard)
        sections = {record.section: record.of(fields.get(record.section, {})) for record in records} | found
        return super().of({**fields, **sections})
