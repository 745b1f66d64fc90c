"""A run before its objective is known, the same for both stages: its settings, devices, examples and newest checkpoint.

  this = run.prepare(config, workdir, run.open_shards)
  objective = mae.make(config, this.mesh, …)
  outcome = trainer.train(this, objective, run.batches)

Nothing is written before `trainer.train`.
"""

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from curia_common import launching, logs, mixtures, processes
from curia_common.errors import DataError, UserError
from curia_jax import (
    checkpoint,
    compilations,
    data,
    hosts,
    preflight,
    sharding,
    storage,
    training,
)
from curia_jax import config as configs
from curia_jax import origin as origins
from curia_jax import workdir as workdirs
from curia_jax.mixture import Mixture, open_slices
from curia_jax.objectives import base
from curia_jax.settings import Data, Devices, Settings
from data_pipeline.format.shards import SliceSource

logger = logs.get_logger(__name__)
NO_WATCHDOG_SECONDS = 86_400  # that a host waits for another one where the watchdog is off


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a run learns from.

    Attributes:
      dataset: its identity; `slices` is the number of examples in an epoch.
      noun: what an example is, in the plural.
      largest: greatest height and width of the pixels, px.
      start: examples that were seen before training on them began; they count from there.
      source: the shards that they are read from; None where they are not.
      described: what the saved config says of them beside `config`.
    """

    dataset: checkpoint.Dataset
    noun: str
    largest: tuple[int, int]
    start: int = 0
    source: SliceSource | Mixture | None = None
    described: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return self.dataset.slices


# From the settings and the checkpoint that is resumed to the examples. Raises UserError or DataError.
OpenExamples = Callable[[Settings, checkpoint.Meta | None], Examples]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before its objective is known.

    Attributes:
      config: the whole config as plain JSON, which is saved with every checkpoint.
      canvas: height and width of the pixels in a batch.
      warmup_steps: of this batch size; from the run's beginning.
      save_every, log_every: steps.
      keep_every: checkpoints at multiples of so many steps stay for good; None for none.
      began: when this start did, seconds since 1970.
      saved_steps: steps of which the work directory had checkpoints.
      step_examples: what a step in `config.duration` stands for, whatever the batch size is now.
      step_offset: see optimizer.make.
      skipped: windows of the data stream that are not trained on.
      origin: whose weights the run started from, or is to start from; None for random ones.
      changes: fields of the config that differ from the checkpoint's: dotted name -> (then, now).
    """

    config: Mapping[str, Any]
    settings: Settings
    workdir: str
    examples: Examples
    canvas: tuple[int, int]
    mesh: Mesh
    schedule: training.Schedule
    warmup_steps: int | float
    step_offset: int | float
    save_every: int
    log_every: int
    keep_every: int | None
    saved_steps: tuple[int, ...]
    began: float
    changes: Mapping[str, tuple[Any, Any]]
    step_examples: int
    skipped: tuple[checkpoint.Window, ...] = ()
    origin: checkpoint.Origin | None = None

    def meta(self, examples_seen: int) -> checkpoint.Meta:
        """What is saved with the state that has seen so many examples."""
        return checkpoint.Meta(
            self.config, examples_seen, self.examples.dataset, self.examples.start,
            step_examples=self.step_examples, skipped=self.skipped, origin=self.origin,
        )  # fmt: skip

    @property
    def position(self) -> int:
        """Number of the next example, counted from where training on these examples began."""
        return self.meta(self.schedule.examples_seen).position - self.examples.start


def prepare(
    config: ml_collections.ConfigDict, workdir: str, open_examples: OpenExamples, start_from: str | None = None,
    *, complete: Callable[[ml_collections.ConfigDict, checkpoint.Meta | None], None] = lambda config, meta: None,
) -> Run:  # fmt: skip
    """Checks the settings, sets up the devices, opens the examples and finds the newest checkpoint. Writes nothing.

    Args:
      open_examples: such as `open_shards`.
      start_from: a run, checkpoint or export whose weights a new run starts from, instead of random ones. A run that is resumed
        has them.
      complete: changes fields of the config that follow from the weights or from the checkpoint that is resumed, once the
        devices are set up.

    Raises:
      UserError: a setting is wrong, or does not fit the devices or the examples.
      DataError: the examples are not those of the checkpoint.
    """
    began = time.time()
    settings = Settings.of(config)
    use_devices(settings.devices)
    mesh_sizes: Any = config.mesh
    mesh = sharding.make_mesh(**mesh_sizes)
    sharding.check_batch(settings.batch_size, mesh)
    data.part_of_host(settings.batch_size, hosts.count())
    saved_steps = workdirs.saved_steps(workdir)
    step, meta = checkpoint.latest(workdir) or (0, None)
    if meta is None:
        workdirs.check_new(workdir)
    complete(config, meta)
    settings, plain = Settings.of(config), json.loads(config.to_json_best_effort())
    origin = origins.find(start_from, plain, resumed=meta)
    examples = open_examples(settings, meta)
    plain |= examples.described
    canvas = data.canvas_size(examples.largest, settings.data.canvas)
    workdirs.check(workdir)

    # A duration in steps stands for the examples of the first start: another batch size changes neither the end of the run nor
    # the schedule of its learning rate, which both follow the examples.
    batch_size = settings.batch_size
    step_examples = batch_size
    seen = 0
    if meta is not None:
        step_examples, seen = meta.step_examples or int(meta.config.get("batch_size", batch_size)), meta.examples_seen
    first_steps = configs.steps(settings.duration, batch_size=step_examples, examples=len(examples))
    whole_run = round(
        configs.count(settings.duration, batch_size=step_examples, examples=len(examples)) * step_examples
    )
    total_steps = step + max(0, round((whole_run - seen) / batch_size))
    if total_steps < 1:
        raise UserError(f"duration {settings.duration!r} is less than one step of {batch_size} examples")
    warmup = configs.steps(settings.warmup, batch_size=step_examples, examples=len(examples), total=first_steps)

    def steps(duration: str) -> int:
        found = configs.steps(duration, batch_size=batch_size, examples=len(examples), total=total_steps)
        return max(1, found)

    save_every = steps(settings.save_every)
    keep_every = None
    if settings.keep_every:  # only what is saved can stay: the next multiple of save_every
        keep_every = -(-steps(settings.keep_every) // save_every) * save_every
    return Run(
        config=plain,
        settings=settings,
        workdir=workdir,
        examples=examples,
        canvas=canvas,
        mesh=mesh,
        schedule=training.Schedule(step, total_steps, batch_size, seen),
        warmup_steps=_quotient(max(1, warmup) * step_examples, batch_size),
        step_offset=_quotient(seen - step * batch_size, batch_size),
        save_every=save_every,
        log_every=steps(settings.log_every),
        keep_every=keep_every,
        saved_steps=saved_steps,
        began=began,
        changes=configs.changes(configs.from_checkpoint(meta.config), plain) if meta else {},
        step_examples=step_examples,
        skipped=meta.skipped if meta else (),
        origin=origin,
    )


def _quotient(number: int, by: int) -> int | float:
    """A whole number where it is one, so that an unchanged batch size gives the same program."""
    return number // by if number % by == 0 else number / by


def use_devices(devices: Devices) -> None:
    """Applies `config.devices`. Has to come before anything that touches a device.

    Raises:
      UserError: the platform or the other hosts cannot be found.
    """
    launched = preflight.expected()
    if devices.platform != "auto":
        jax.config.update("jax_platforms", devices.platform)
    if devices.cpu_count:
        jax.config.update("jax_num_cpu_devices", devices.cpu_count)
    if devices.multihost:
        hosts.connect(devices)
        hosts.check_attempt(launched.attempt if launched else "", devices.watchdog_seconds or NO_WATCHDOG_SECONDS)
    elif os.environ.get(launching.COUNT, "1") != "1":
        raise UserError(
            f"{launching.COUNT} is {os.environ[launching.COUNT]} but devices.multihost is False, so that each host would train alone in the same "
            "work directory; set --config.devices.multihost=true"
        )
    try:
        jax.device_count()  # starts the devices
    except RuntimeError as error:
        raise UserError(f"devices.platform is {devices.platform!r}: {error}") from error
    if launched is not None:
        preflight.check_devices(launched)
    compilations.keep(devices.compilation_cache)
    if not hosts.is_first():
        logs.configure(logging.WARNING)


def open_shards(settings: Settings, meta: checkpoint.Meta | None) -> Examples:
    """The slices of `config.data.shards`.

    Raises:
      UserError: there is no such dataset or split.
      DataError: they are not the slices of the checkpoint, and `data.on_change` does not allow that.
    """
    wanted = settings.data
    if not wanted.shards:
        raise UserError(
            "no shards given; name the folder that data_pipeline.build wrote with --config.data.shards=FOLDER"
        )
    source = open_slices(wanted.shards, wanted.split, additions=wanted.additions)
    dataset = checkpoint.Dataset(source.fingerprint, source.additions, len(source), wanted.split)

    def remedy(then: checkpoint.Dataset) -> str:
        with contextlib.suppress(UserError):
            if open_slices(wanted.shards, then.split, additions=then.additions).fingerprint == then.fingerprint:
                split = f"--config.data.split={then.split} " if then.split != wanted.split else ""
                return f"{split}--config.data.additions={then.additions} trains on the same slices as before"
        return "the slices that it was trained on are no longer there"

    start = start_of(dataset, meta, wanted, wanted.shards, remedy)
    return Examples(dataset, "slices", source.largest, start, source)


def start_of(
    dataset: checkpoint.Dataset, meta: checkpoint.Meta | None, wanted: Data, place: str,
    remedy: Callable[[checkpoint.Dataset], str],
) -> int:  # fmt: skip
    """Examples seen before training on a dataset began.

    Args:
      meta: of the checkpoint that is resumed.
      place: the dataset's, for messages.
      remedy: from the dataset of then to what can be done.

    Raises:
      DataError: it is not the dataset of the checkpoint, and `data.on_change` does not allow that.
    """
    if meta is None:
        return 0
    then = meta.dataset
    if then is None:
        logger.info("this checkpoint does not name its dataset; not checked")
        return meta.dataset_start
    if then.fingerprint == dataset.fingerprint:
        return meta.dataset_start
    names = [name for name in ("slices", "additions", "split") if getattr(then, name) != getattr(dataset, name)]
    changes = [f"{name} {getattr(then, name)} -> {getattr(dataset, name)}" for name in names]
    weights = [_weights(text) for text in (meta.config.get("data", {}).get("shards", ""), wanted.shards)]
    if weights[0] != weights[1]:
        changes.append(f"weights of the folders {weights[0]} -> {weights[1]}")
    change = ", ".join(changes) or "the same number of slices with other contents"
    if wanted.on_change == "new_epoch":
        logger.info(f"the dataset changed ({change}); starting a new epoch on it")
        return meta.position
    raise DataError(
        f"{place} is not the dataset that the checkpoint of example {meta.examples_seen:,} was trained on: {change}; "
        f"{remedy(then)}; --config.data.on_change=new_epoch starts a new epoch on the dataset as it is now"
    )


def _weights(text: str) -> str:
    """What share of the examples comes from each folder of `data.shards`, in their order."""
    return ":".join(f"{float(share):.6g}" for share in mixtures.shares(mixtures.parse(text)))


def batches(run: Run) -> Iterator[base.Batch]:
    """Global batches on the devices, from the example after the checkpoint's on."""
    wanted, source = run.settings, run.examples.source
    assert source is not None
    name_semaphores(run)
    on_host = data.training_batches(
        source, batch_size=wanted.batch_size, canvas=run.canvas, seed=wanted.seed, examples_seen=run.position,
        process_index=hosts.number(), process_count=hosts.count(),
        threads=wanted.data.threads, prefetch=wanted.data.prefetch, workers=wanted.data.workers,
        replace_damaged=wanted.data.damaged_share > 0,
    )  # fmt: skip
    split, damage = sharding.batch_sharding(run.mesh), data.Damage(source, wanted.data.damaged_share)
    for batch in on_host:
        damage.note(batch)
        yield data.to_devices(batch, split)


def name_semaphores(run: Run) -> None:
    """Removes semaphores that reading processes of an earlier start have left."""
    processes.name_semaphores(f"{storage.root(run.workdir)} {hosts.number()}")
