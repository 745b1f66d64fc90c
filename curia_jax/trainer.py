"""Trains a run that curia_jax.run has prepared: restores or initialises the state, compiles the step, opens the logs, runs the loop.

The work directory holds everything a run leaves: config.json, checkpoints/, metrics.jsonl, events.jsonl and tensorboard/.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from curia_common import cli, logs, signals
from curia_common.errors import DivergedError, RestartError, UserError
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
    storage,
    telemetry,
    training,
    watchdog,
)
from curia_jax import origin as origins
from curia_jax import workdir as workdirs
from curia_jax.objectives import base
from curia_jax.run import NO_WATCHDOG_SECONDS, Run
from curia_jax.settings import Guard

logger = logs.get_logger(__name__)


class Interrupted(UserError):
    """A second Ctrl-C."""

    exit_code = ExitCode.INTERRUPTED


Beat = Callable[[str], None]  # says what is being done, to the watchdog


@runtime_checkable
class Evaluation(Protocol):
    """What a run does beside training, on all hosts together."""

    def validate(self, state: base.State, beat: Beat) -> Mapping[str, float]:
        """Metrics of a state that is about to be saved, by name; they are saved with it."""
        ...

    def conclude(self, run: Run, beat: Beat) -> None:
        """Once a run has finished; again where it had finished before."""
        ...


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
