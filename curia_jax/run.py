"""What both stages share around the loop: devices, data, restore, compile, logs.

  this = run.prepare(config, workdir, run.open_shards)
  objective = mae.make(config, this.mesh, …)
  outcome = run.train(this, objective, run.batches)

The work directory holds everything a run leaves: config.json, checkpoints/, metrics.jsonl, events.jsonl and tensorboard/.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import ml_collections
from jax.sharding import Mesh

from curia_common import cli, launching, logs, mixtures, processes, signals
from curia_common.errors import DataError, DivergedError, RestartError, UserError
from curia_common.exit_codes import ExitCode
from curia_common.progress import Progress
from curia_jax import (
    checkpoint,
    corruption,
    data,
    goodput,
    hosts,
    lease,
    preemption,
    preflight,
    profiling,
    saving,
    sharding,
    storage,
    telemetry,
    training,
    watchdog,
)
from curia_jax import config as configs
from curia_jax import origin as origins
from curia_jax import workdir as workdirs
from curia_jax.mixture import Mixture, open_slices
from curia_jax.objectives import base
from curia_jax.settings import Data, Devices, Guard, Settings
from data_pipeline.format.shards import SliceSource

logger = logs.get_logger(__name__)
NO_WATCHDOG_SECONDS = 86_400  # that a host waits for another one where the watchdog is off


class Interrupted(UserError):
    """A second Ctrl-C."""

    exit_code = ExitCode.INTERRUPTED


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


Beat = Callable[[str], None]  # says what is being done, to the watchdog


@runtime_checkable
class Evaluation(Protocol):
    """What a run does beside training, on all hosts together."""

    def validate(self, state: base.State, beat: Beat) -> Mapping[str, float]:
        """Metrics of a state that is about to be saved, by name; they are saved with it."""
        ...

    def conclude(self, run: "Run", beat: Beat) -> None:
        """Once a run has finished; again where it had finished before."""
        ...


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


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      finished: False where a signal asked to stop.
      metrics: the last ones logged, and throughput over all steps of this start.
    """

    finished: bool
    step: int
    examples_seen: int
    metrics: Mapping[str, int | float]

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.DONE if self.finished else ExitCode.RESTART


# ---- before the objective is known


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
        found = jax.device_count()
    except RuntimeError as error:
        raise UserError(f"devices.platform is {devices.platform!r}: {error}") from error
    if launched is not None:
        preflight.check_devices(launched)
    if jax.default_backend() == "cpu" and found > 1:
        # XLA loses the order of a CPU program's collectives when it reads the program from the cache (jaxlib 0.10.2), and
        # simulated devices then deadlock.
        jax.config.update("jax_enable_compilation_cache", False)
    elif devices.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(devices.compilation_cache))
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


# ---- with the objective


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


def _rolled_back(run: Run, diverged: training.Diverged) -> Run:
    """The run from its last good checkpoint on, without the examples since then.

    Raises:
      DivergedError: it went back as often as `guard.rollbacks` allows.
    """
    step, meta = checkpoint.latest(run.workdir, good=True) or (0, checkpoint.Meta(run.config, 0))
    end = run.meta(run.schedule.examples_at(diverged.step)).position
    # Windows of an earlier rollback to the same checkpoint are not in it yet.
    start = run.skipped[-1].end if len(run.skipped) > len(meta.skipped) else meta.position
    skipped = (*run.skipped, checkpoint.Window(start, end))
    good = f"the last good checkpoint is step {step}" if step else "there is no checkpoint yet"
    if len(skipped) > run.settings.guard.rollbacks:
        raise DivergedError(
            f"{diverged}; {good}, and the run went back {run.settings.guard.rollbacks} times. Try a lower "
            "--config.optimizer.base_learning_rate or --config.optimizer.clip_norm=1.0"
        )
    logger.warning(f"{diverged}; going back: {good}; examples {start:,} to {end - 1:,} are skipped")
    schedule = dataclasses.replace(run.schedule, start_step=step, examples_seen=meta.examples_seen)
    return dataclasses.replace(run, schedule=schedule, skipped=skipped)


def train(
    run: Run, objective: base.Objective, batches: Callable[[Run], Iterator[Any]], evaluation: Evaluation | None = None
) -> Outcome:  # fmt: skip
    """Restores or initialises the state, compiles the step, and trains until the end or until a signal asks to stop.

    Args:
      batches: gives the batches of a run; again where it goes back to an earlier checkpoint.
      evaluation: validates what is saved at multiples of `save_every` and at the end.

    Raises:
      UserError: the checkpoint does not fit the objective, or the compiler refuses an option.
      DoesNotFitError: memory is too small.
      DivergedError: the run has gone back to its last good checkpoint as often as it may.
      Interrupted: a second Ctrl-C; nothing is saved for it.
    """
    schedule = run.schedule
    logger.info(
        f"{len(run.examples):,} {run.examples.noun}, canvas {run.canvas[0]}x{run.canvas[1]}; {objective.parameters / 1e6:.2f} M parameters; "
        f"{run.mesh.size} x {jax.devices()[0].device_kind} as {dict(run.mesh.shape)}; {schedule.total_steps:,} steps of "
        f"{schedule.batch_size}"
    )
    if schedule.start_step >= schedule.total_steps:
        return _nothing_to_do(run, objective, evaluation)
    with contextlib.ExitStack() as closing, hosts.leaving_at_once(closing, run.settings.devices.heartbeat_seconds):
        dog, folder = _take_work_directory(run, closing)
        start = _Start(run, objective, closing, dog, folder, evaluation)
        start.restore()
        start.compile()
        start.open_logs()
        outcome = start.end(start.loop(batches))
    if outcome.finished:
        how, then = "finished", f"; checkpoints are in {run.workdir}/{checkpoint.FOLDER}"
    else:
        how, then = "stopped and saved", "; rerun the same command to resume"
    of = "" if outcome.finished else f" of {schedule.total_steps:,}"
    logger.info(f"{how} at step {outcome.step:,}{of} after {outcome.examples_seen:,} examples{then}")
    return outcome


def _first_loss(settings: Guard, guard: base.GuardState) -> float | None:
    """Of the untrained model, see training.Saver. Without a factor any loss is usual: that of a few cases may be near zero."""
    if settings.factor is None:
        return math.inf
    return float(guard["first_loss"]) if guard["applied"] else None


def _patience(run: Run) -> int | float:
    """Seconds that a host waits for another one."""
    return run.settings.devices.watchdog_seconds or NO_WATCHDOG_SECONDS


def _since() -> dict[str, Any]:
    """Parts of the state that checkpoints of earlier versions lack, and what they are there."""
    return {"guard": base.new_guard()}


def _nothing_to_do(run: Run, objective: base.Objective, evaluation: Evaluation | None) -> Outcome:
    """The run has finished before."""
    schedule = run.schedule
    saving.check_fits(run.workdir, objective.abstract_state, since=_since())
    logger.info(
        f"nothing to do: {run.workdir} has reached step {schedule.start_step:,} of {schedule.total_steps:,}; a longer "
        "--config.duration continues from there"
    )
    if evaluation is not None:
        evaluation.conclude(run, lambda doing: None)
    hosts.meet_at_the_end(_patience(run))
    return Outcome(True, schedule.start_step, schedule.examples_seen, telemetry.last_metrics(run.workdir))


def _take_work_directory(run: Run, closing: contextlib.ExitStack) -> tuple[watchdog.Watchdog, Path]:
    """Makes sure that all hosts do the same, and nobody else anything in the work directory; opens this host's log.

    Returns:
      The watchdog, and the folder for what is appended to (see storage.Spool).

    Raises:
      DoesNotFitError: the hosts differ, or one is not as launched.
      RestartError: another run has the work directory, or a host is missing.
    """
    if run.examples.source is not None:
        preflight.check_dataset(run.examples.source)
    with preflight.probing(run.workdir):
        facts = {
            **preflight.build(),
            "config": hosts.digest(json.dumps(run.config, sort_keys=True)),
            "dataset": run.examples.dataset.fingerprint,
            "checkpoint": f"step {run.schedule.start_step}",
            "weights to start from": run.origin.weights if run.origin else "random",
        }
        hosts.check_agreement(facts, _patience(run))
        preflight.check_shared(run.workdir)
        if hosts.is_first():
            closing.enter_context(lease.holding(run.workdir))
            if workdirs.saved_steps(run.workdir) != run.saved_steps:
                raise RestartError(f"another run has just saved in {run.workdir}; rerun the same command")
        hosts.barrier("work directory", _patience(run))
    own_log = f"{logs.FOLDER}/host-{hosts.number()}.log"
    spool = storage.Spool(run.workdir, (own_log, *(workdirs.APPENDED if hosts.is_first() else ())))
    if cli.owns_process():
        cli.on_end(lambda code, line: spool.close())
    closing.callback(spool.upload if cli.owns_process() else spool.close)
    log_file = logs.LogFile(spool.folder, hosts.number(), take_descriptor=cli.owns_process())
    if not cli.owns_process():  # else it is open until the process has ended
        closing.callback(log_file.close)
    return closing.enter_context(watchdog.Watchdog(run.settings.devices.watchdog_seconds, log_file)), spool.folder


class _Start:
    """One start of a run, in the order of its methods. What it opens is closed with `closing`."""

    def __init__(
        self, run: Run, objective: base.Objective, closing: contextlib.ExitStack, dog: watchdog.Watchdog, folder: Path,
        evaluation: Evaluation | None = None,
    ) -> None:  # fmt: skip
        self._run, self._objective, self._closing, self._dog, self._folder = run, objective, closing, dog, folder
        self._evaluation = evaluation

    # ---- state

    def restore(self) -> None:
        """Puts the state of the newest checkpoint, or a new one, on the devices."""
        run = self._run
        self._dog.beat("restoring")
        self._checkpointer = saving.Checkpointer(
            run.workdir,
            keep=run.settings.keep,
            keep_every_steps=run.keep_every,
            keep_best=run.settings.keep_best or None,
        )
        self._closing.callback(self._checkpointer.close)
        self._state = self._restored()
        if run.schedule.start_step:
            logger.info(f"resuming from step {run.schedule.start_step:,} at example {run.schedule.examples_seen:,}")
            if run.changes:
                changes = (f"{name} {then!r} -> {now!r}" for name, (then, now) in run.changes.items())
                logger.info("changed since: " + ", ".join(changes))

    def _restored(self) -> base.State:
        step = self._run.schedule.start_step
        if not step:
            origin, abstract = self._run.origin, self._objective.abstract_state["params"]
            params = origins.weights(origin, abstract) if origin else None
            return self._objective.initial_state(self._run.settings.seed, params)
        return self._checkpointer.restore(self._objective.abstract_state, step=step, since=_since())

    # ---- step

    def compile(self) -> None:
        """Compiles the train step."""
        self._dog.beat("compiling")
        self._open_ledger(self._run.began)
        began = time.perf_counter()
        with self._ledger.spending("compiling"):
            self._train_step = self._objective.compile()
        text = f"compiled in {time.perf_counter() - began:.1f} s"
        if (memory := self._train_step.memory_analysis()) is not None:
            text += f"; per device {memory.argument_size_in_bytes / 2**20:,.0f} MiB arguments, "
            text += f"{memory.temp_size_in_bytes / 2**20:,.0f} MiB temporaries"
        logger.info(text)

    def _checked_step(self) -> corruption.Step:
        """The train step, some of which are checked for chips that compute wrongly."""
        if not (every := self._run.settings.devices.check_every):
            return self._train_step
        start_step = self._run.schedule.start_step
        return corruption.Check(
            self._train_step, self._objective.abstract_state, self._run.mesh, start_step=start_step, every=every
        )

    # ---- logs

    def _open_ledger(self, began: float) -> None:
        start_step = self._run.schedule.start_step
        self._ledger = goodput.Ledger(self._folder, start_step, began, writes=hosts.is_first())
        self._closing.callback(self._ledger.close)

    def open_logs(self) -> None:
        """Opens metrics, events and progress on the first host."""
        run, schedule = self._run, self._run.schedule
        peak, peak_source = telemetry.peak_flops()
        flops = self._objective.flops_per_example
        self._meter = telemetry.Meter(batch_size=schedule.batch_size, flops_per_example=flops, peak=peak)
        self._log: telemetry.Log | None = None
        if hosts.is_first():
            self._log = telemetry.Log(self._folder, start_step=schedule.start_step)
            self._closing.callback(self._log.close)
            text = json.dumps(run.config, indent=2) + "\n"
            storage.write_text(storage.root(run.workdir) / workdirs.CONFIG, text)
            self._log.event(
                "resumed" if schedule.start_step else "started", step=schedule.start_step,
                examples_seen=schedule.examples_seen, total_steps=schedule.total_steps, slices=len(run.examples),
                parameters=self._objective.parameters, mesh=dict(run.mesh.shape), hosts=hosts.count(),
                device=jax.devices()[0].device_kind, jax=jax.__version__, train_flops_per_image=flops, peak_flops=peak,
                peak_source=peak_source, command=cli.command(), **({"changes": dict(run.changes)} if run.changes else {}),
                **({"origin": run.origin._asdict()} if run.origin else {}),
            )  # fmt: skip
        self._progress = self._closing.enter_context(
            Progress("training", schedule.total_steps, "steps", done=schedule.start_step, enabled=hosts.is_first())
        )

    def _measure(self, report: training.Report) -> None:
        """Hook of every step."""
        self._dog.beat(f"taking step {report.step + 1:,}")
        self._meter.finished(input_wait=report.input_wait, save_wait=report.hook_wait)
        self._ledger.waited(report.input_wait, report.hook_wait)

    def _show(self, report: training.Report) -> None:
        """Hook of the steps that are logged."""
        rates = self._meter.read()
        if self._log is not None:
            seen = self._run.schedule.examples_at(report.step)
            spent = self._ledger.write(report.step)
            self._log.metrics(report.step, {"examples_seen": seen, **report.metrics, **rates, "goodput": spent.goodput})
        text = self._objective.progress_format.format(**report.metrics)
        if rates:
            text += f"  {rates['images_per_second']:,.0f} images/s  MFU {rates['mfu']:.1%}"
        self._progress.update(float(report.step), text)

    # ---- loop

    def loop(self, batches: Callable[[Run], Iterator[Any]]) -> bool:
        """Trains; returns whether the run has finished. Where it diverges it goes back and on.

        Raises:
          DivergedError, Interrupted: as `train`.
        """
        take_step, hooks = self._checked_step(), self._hooks()
        self._dog.beat("taking the first step")
        self._ledger.training()
        received = self._closing.enter_context(signals.receiving())
        devices = self._run.settings.devices
        self._closing.enter_context(preemption.Watch(devices.preemption_notice, received))
        profiler = self._closing.enter_context(profiling.Profiler(self._run.workdir, received, self._folder))
        hooks.append(training.Hook(profiler.follow))
        while True:
            run, guard = self._run, jax.device_get(self._state["guard"])
            saver = training.Saver(
                self._checkpointer, run.schedule, run.meta, self._log,
                patience=60 * run.settings.save_patience, refusals=run.settings.guard.patience,
                first_loss=_first_loss(run.settings.guard, guard),
                validate=self._validate if self._evaluation is not None else None,
            )  # fmt: skip
            try:
                with base.memory_errors():
                    self._state, finished = training.fit(
                        self._state, take_step, batches(run), run.schedule, [*saver.hooks(run.save_every), *hooks]
                    )
                return finished
            except training.Diverged as diverged:
                self._go_back(diverged)
            except KeyboardInterrupt:
                raise Interrupted(
                    "second Ctrl-C: stopped at once; the same command resumes from the newest checkpoint"
                ) from None

    def _validate(self, state: base.State) -> Mapping[str, float]:
        assert self._evaluation is not None
        self._dog.beat("validating")
        return self._evaluation.validate(state, self._dog.beat)

    def _hooks(self) -> list[training.Hook | training.StateHook]:
        hooks: list[training.Hook | training.StateHook] = []
        source = self._run.examples.source
        if self._run.settings.data.check_shards and source is not None:
            check = data.ShardCheck(source, first=time.time_ns() % 99_991 + hosts.number())
            self._closing.callback(check.close)
            hooks.append(training.Hook(lambda report: check.check()))
        return [*hooks, training.Hook(self._measure), training.Hook(self._show, every=self._run.log_every)]

    def _go_back(self, diverged: training.Diverged) -> None:
        """To the state of the last good checkpoint.

        Raises:
          DivergedError: it went back as often as it may.
        """
        self._dog.beat("going back to an earlier checkpoint")
        self._checkpointer.wait()
        before = self._run.skipped
        self._run = _rolled_back(self._run, diverged)
        self._ledger.close()  # what is repeated counts as lost between two starts
        self._open_ledger(time.time())
        self._ledger.training()
        step = self._run.schedule.start_step
        if self._log is not None:
            self._log.event(
                "rolled-back", step=diverged.step, reason=diverged.reason, to_step=step, skipped=list(self._run.skipped[len(before)])
            )  # fmt: skip
            self._log.go_back(step)
        self._state = self._restored()

    def end(self, finished: bool) -> Outcome:
        """Writes how it ended, and waits for the other hosts."""
        step = int(jax.device_get(self._state["step"]))
        seen = self._run.schedule.examples_at(step)
        if self._log is not None:
            self._log.event("finished" if finished else "preempted", step=step, examples_seen=seen)
        logger.info(self._ledger.write(step).text())
        del self._state  # its memory is for the weights that are scored
        if finished and self._evaluation is not None:
            self._evaluation.conclude(self._run, self._dog.beat)
        self._dog.beat("waiting for the other hosts to end")
        hosts.meet_at_the_end(_patience(self._run))
        return Outcome(finished, step, seen, telemetry.last_metrics(self._folder) | self._meter.total())
