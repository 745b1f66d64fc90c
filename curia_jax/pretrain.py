"""Pretrains a ViT-MAE on slice shards, from one CPU to a multi-slice pod.

The work directory holds everything a run leaves: config.json, checkpoints/, metrics.jsonl, events.jsonl and tensorboard/.
The same command started again goes on after the newest checkpoint, with the very next example, on any number of hosts
and chips.

exit codes:
  0   finished
  1   stopped: a loss or norm is not finite (the line says which, and the last good checkpoint)
  2   wrong usage or configuration; nothing was changed
  75  saved because SIGTERM or Ctrl-C asked to stop; start the same command again
  130 interrupted by Ctrl-C before the first step or by a second one; nothing was saved for it
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m curia_jax.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m curia_jax.pretrain --config=configs/demo.py --workdir=runs/first --config.data.shards=demo/shards
  python -m curia_jax.pretrain --config=configs/demo.py --workdir=runs/b --config.model.size=B --config.batch_size=256
  python -m curia_jax.pretrain --config=configs/demo.py --fields          list every field and its value""",
    )
    parser.add_argument(
        "--config", required=True, help="config file, one of configs/*.py; --config.field=value changes a field"
    )
    parser.add_argument("--workdir", help="folder of this run; one that holds checkpoints is gone on with")
    parser.add_argument("--fields", action="store_true", help="print the config's fields and values and exit")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the outcome here: finished, step, examples_seen, the last loss and baseline_loss, and over all steps of "
        "this start images_per_second, mfu and the stalls",
    )
    args, rest = parser.parse_known_args(argv)
    for word in rest:
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word}")
    if not args.fields and not args.workdir:
        parser.error("the following arguments are required: --workdir")
    return args, rest


def main(argv: list[str] | None = None) -> int:
    args, overrides = parse(argv)

    from curia_common.errors import UserError
    from curia_jax import config as configs
    from curia_jax import training

    try:
        config = configs.load(args.config, overrides)
        if args.fields:
            for field, value in configs.flatten(config).items():
                print(f"{field} = {value!r}")
            return 0
        return run(config, args.workdir, args.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except training.NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the newest checkpoint", file=sys.stderr)
        return 130


def use_devices(settings) -> None:
    """Applies `config.devices`. Has to come before anything that touches a device.

    Raises:
      UserError: the platform or the other hosts cannot be found.
    """
    import jax

    from curia_common.errors import UserError

    if settings.platform != "auto":
        jax.config.update("jax_platforms", settings.platform)
    if settings.cpu_count:
        jax.config.update("jax_num_cpu_devices", settings.cpu_count)
    # On Cloud TPU everything is found out; elsewhere these variables tell it.
    told = {
        "coordinator_address": "JAX_COORDINATOR_ADDRESS",
        "num_processes": "JAX_NUM_PROCESSES",
        "process_id": "JAX_PROCESS_ID",
    }
    given = {name: os.environ[variable] for name, variable in told.items() if variable in os.environ}
    if settings.multihost:
        try:
            jax.distributed.initialize(
                **{name: value if name == "coordinator_address" else int(value) for name, value in given.items()}
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"devices.multihost: {error}; set {', '.join(told.values())} on every host, or --config.devices.multihost=false"
            ) from error
    elif given.get("num_processes", "1") != "1":
        raise UserError(
            f"JAX_NUM_PROCESSES is {given['num_processes']} but devices.multihost is False, so that each host would train alone in "
            "the same work directory; set --config.devices.multihost=true"
        )
    try:
        devices = jax.device_count()
    except RuntimeError as error:
        raise UserError(f"devices.platform is {settings.platform!r}: {error}") from error
    if jax.default_backend() == "cpu" and devices > 1:
        # XLA forgets the order of a CPU program's collectives when it reads the program from the cache (jaxlib 0.10.2):
        # simulated devices then wait for one another for ever.
        jax.config.update("jax_enable_compilation_cache", False)
    elif settings.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(settings.compilation_cache))


def check_places(workdir: str, json_file: str | None) -> None:
    """Raises UserError where the results could not be written, before hours are spent on them."""
    from curia_common.errors import UserError

    if "://" in workdir:
        raise UserError(
            f"--workdir={workdir} is an address, not a folder; mount the bucket (Cloud Storage: gcsfuse --rename-dir-limit=100000) "
            "and name the folder where it is mounted"
        )
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the work directory {workdir}: {error.strerror}; choose another --workdir"
        ) from error
    if not os.access(workdir, os.W_OK):
        raise UserError(f"cannot write to the work directory {workdir}; choose another --workdir")
    if json_file and not Path(json_file).absolute().parent.is_dir():
        raise UserError(f"--json={json_file}: there is no folder {Path(json_file).parent}; make it first")


def run(config, workdir: str, json_file: str | None) -> int:
    import jax

    use_devices(config.devices)
    first_host = jax.process_index() == 0

    def say(text: str) -> None:
        if first_host:
            print(text, file=sys.stderr, flush=True)

    from curia_common.errors import UserError
    from curia_jax import checkpoint, data, sharding, telemetry, training
    from curia_jax import config as configs
    from curia_jax.models import mae
    from curia_jax.objectives import mae as objective
    from data_pipeline.format.shards import SliceSource

    # ---- shards, mesh, shapes
    if not config.data.shards:
        raise UserError(
            "no shards given; name the folder that data_pipeline.build wrote with --config.data.shards=FOLDER"
        )
    if config.keep < 1:
        raise UserError(f"keep is {config.keep}; at least 1 checkpoint has to stay, or nothing can go on")
    check_places(workdir, json_file)
    source = SliceSource(config.data.shards, config.data.split)
    mesh = sharding.make_mesh(**config.mesh)
    canvas = data.canvas_size(source, config.data.canvas)
    total_steps = configs.steps(config.duration, batch_size=config.batch_size, examples=len(source))
    share = {"batch_size": config.batch_size, "examples": len(source), "total": total_steps}
    warmup_steps, save_every, log_every = (
        max(1, configs.steps(d, **share)) for d in (config.warmup, config.save_every, config.log_every)
    )
    if total_steps < 1:
        raise UserError(f"duration {config.duration!r} is less than one step of {config.batch_size} examples")
    job = objective.make(config, mesh, canvas=canvas, warmup_steps=warmup_steps, total_steps=total_steps)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(job.abstract_state["params"]))
    say(
        f"{len(source):,} slices, canvas {canvas[0]}x{canvas[1]}; {parameters / 1e6:.2f} M parameters; "
        f"{mesh.size} x {jax.devices()[0].device_kind} as {dict(mesh.shape)}; {total_steps:,} steps of {config.batch_size}"
    )
    plain_config = json.loads(config.to_json_best_effort())

    with contextlib.ExitStack() as closing:
        # ---- state: new, or the newest checkpoint's
        checkpointer = checkpoint.Checkpointer(workdir, keep=config.keep)
        closing.callback(checkpointer.close)
        start_step, examples_seen, changes = checkpointer.latest_step or 0, 0, {}
        if checkpointer.latest_step is None:
            state = job.initial_state(config.seed)
        else:
            state, meta = checkpointer.restore(job.abstract_state)
            examples_seen = int(meta["examples_seen"])
            changes = configs.changes(meta["config"], plain_config)
            say(f"going on after step {start_step:,} with example number {examples_seen:,}")
            if changes:
                say("changed since: " + ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items()))
        if start_step >= total_steps:
            say(
                f"nothing to do: {workdir} has reached step {start_step:,} of {total_steps:,}; a longer --config.duration goes on from there"
            )
            if json_file and first_host:
                _write_outcome(json_file, True, workdir, telemetry.last_metrics(workdir), start_step, examples_seen)
            return 0

        # ---- compile
        began = time.perf_counter()
        train_step = job.compile()
        memory = train_step.memory_analysis()
        say(
            f"compiled in {time.perf_counter() - began:.1f} s; per device {memory.argument_size_in_bytes / 2**20:,.0f} MiB arguments, "
            f"{memory.temp_size_in_bytes / 2**20:,.0f} MiB temporaries"
        )

        # ---- input
        host_batches = data.training_batches(
            source, batch_size=config.batch_size, canvas=canvas, seed=config.seed, examples_seen=examples_seen,
            process_index=jax.process_index(), process_count=jax.process_count(),
            threads=config.data.threads, prefetch=config.data.prefetch, workers=config.data.workers,
        )  # fmt: skip
        split = sharding.batch_sharding(mesh)
        batches = (data.to_devices(batch, split) for batch in host_batches)

        # ---- loop
        flops = 3 * mae.flops(job.model)
        peak, peak_source = telemetry.peak_flops()
        meter = telemetry.Meter(flops_per_image=flops, peak=peak)
        log = progress = None
        if first_host:
            log = telemetry.Log(workdir, start_step=start_step)
            closing.callback(log.close)
            progress = telemetry.ProgressLine(start_step=start_step, total_steps=total_steps)
            closing.callback(progress.close)
            text = json.dumps(plain_config, indent=2) + "\n"
            Path(workdir, "config.json").write_text(text, encoding="utf-8")
            log.event(
                "resumed" if start_step else "started", step=start_step, examples_seen=examples_seen, total_steps=total_steps,
                slices=len(source), parameters=parameters, mesh=dict(mesh.shape), hosts=jax.process_count(),
                device=jax.devices()[0].device_kind, jax=jax.__version__, train_flops_per_image=flops, peak_flops=peak,
                peak_source=peak_source, **({"changes": changes} if changes else {}),
            )  # fmt: skip
        state, finished = training.fit(
            state, train_step, batches,
            start_step=start_step, total_steps=total_steps, batch_size=config.batch_size, examples_seen=examples_seen,
            save_every_steps=save_every, log_every_steps=log_every, config=plain_config, checkpointer=checkpointer,
            meter=meter, log=log, progress=progress,
        )  # fmt: skip
        step = int(jax.device_get(state["step"]))
        seen = examples_seen + (step - start_step) * config.batch_size
        if log is not None:
            log.event("finished" if finished else "preempted", step=step, examples_seen=seen)

    if json_file and first_host:
        _write_outcome(json_file, finished, workdir, telemetry.last_metrics(workdir) | meter.total(), step, seen)
    if finished:
        say(f"finished at step {step:,} after {seen:,} examples; checkpoints are in {workdir}/{checkpoint.FOLDER}")
        return 0
    say(
        f"stopped and saved at step {step:,} of {total_steps:,} after {seen:,} examples; start the same command again to go on"
    )
    return training.EXIT_PREEMPTED


def _write_outcome(file: str, finished: bool, workdir: str, metrics: dict, step: int, examples_seen: int) -> None:
    outcome = {"finished": finished, "workdir": workdir, **metrics, "step": step, "examples_seen": examples_seen}
    Path(file).write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
