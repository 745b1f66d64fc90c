"""Pretrains a ViT-MAE on slice shards, from one CPU to a multi-slice pod.

The work directory holds everything a run leaves: config.json, checkpoints/, metrics.jsonl, events.jsonl and tensorboard/.
The same command started again goes on after the newest checkpoint, with the very next example, on any number of hosts
and chips.

exit codes:
  0   finished
  1   stopped: a loss or norm is not finite (the line says which, and the last good checkpoint)
  2   wrong usage or configuration; nothing was changed
  75  saved because SIGTERM or Ctrl-C asked to stop; start the same command again
"""

import argparse
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
        help="write the outcome here: step, examples_seen, loss, baseline_loss, images_per_second, mfu",
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

    from curia_jax import config as configs
    from curia_jax import training
    from data_pipeline.errors import UserError

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


def run(config, workdir: str, json_file: str | None) -> int:
    # ---- devices: before anything touches a backend
    import jax

    if config.devices.platform != "auto":
        jax.config.update("jax_platforms", config.devices.platform)
    if config.devices.cpu_count:
        jax.config.update("jax_num_cpu_devices", config.devices.cpu_count)
    if config.devices.compilation_cache:
        cache = os.path.expanduser(config.devices.compilation_cache)
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if config.devices.multihost:
        # On Cloud TPU everything is found out; elsewhere these variables tell it.
        told = {
            "coordinator_address": "JAX_COORDINATOR_ADDRESS",
            "num_processes": "JAX_NUM_PROCESSES",
            "process_id": "JAX_PROCESS_ID",
        }
        given = {name: os.environ[variable] for name, variable in told.items() if variable in os.environ}
        jax.distributed.initialize(
            **{name: value if name == "coordinator_address" else int(value) for name, value in given.items()}
        )
    first_host = jax.process_index() == 0

    def say(text: str) -> None:
        if first_host:
            print(text, file=sys.stderr, flush=True)

    from data_pipeline.shards import SliceSource

    from curia_jax import checkpoint, data, objective, sharding, telemetry, training
    from curia_jax import config as configs
    from curia_jax.models import mae
    from data_pipeline.errors import UserError

    # ---- shards, mesh, shapes
    if not config.data.shards:
        raise UserError(
            "no shards given; name the folder that data_pipeline.build wrote with --config.data.shards=FOLDER"
        )
    source = SliceSource(config.data.shards, config.data.split)
    mesh = sharding.make_mesh(**config.mesh)
    peak, peak_source = telemetry.peak_flops()  # before the mesh is set: it times one device
    jax.set_mesh(mesh)
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
        f"{len(source):,} slices, canvas {canvas[0]}x{canvas[1]}; {parameters / 1e6:.1f} M parameters; "
        f"{mesh.size} x {jax.devices()[0].device_kind} as {dict(mesh.shape)}; {total_steps:,} steps of {config.batch_size}"
    )

    # ---- state: new, or the newest checkpoint's
    checkpointer = checkpoint.Checkpointer(workdir, keep=config.keep)
    start_step = checkpointer.latest_step or 0
    if checkpointer.latest_step is None:
        state, examples_seen = job.initial_state(config.seed), 0
    else:
        state, meta = checkpointer.restore(job.abstract_state)
        examples_seen = int(meta["examples_seen"])
        say(f"going on after step {start_step:,} with example number {examples_seen:,}")
    if start_step >= total_steps:
        say(
            f"nothing to do: {workdir} has reached step {start_step:,} of {total_steps:,}; a longer --config.duration goes on from there"
        )
        checkpointer.close()
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
    plain_config = json.loads(config.to_json_best_effort())
    flops = 3 * mae.flops(job.model)
    log = telemetry.Log(workdir, start_step=start_step) if first_host else None
    progress = telemetry.ProgressLine(start_step=start_step, total_steps=total_steps) if first_host else None
    if log is not None:
        Path(workdir, "config.json").write_text(json.dumps(plain_config, indent=2) + "\n", encoding="utf-8")
        log.event(
            "resumed" if start_step else "started", step=start_step, examples_seen=examples_seen, total_steps=total_steps, slices=len(source),
            parameters=parameters, mesh=dict(mesh.shape), hosts=jax.process_count(), device=jax.devices()[0].device_kind, jax=jax.__version__,
            train_flops_per_image=flops, peak_flops=peak, peak_source=peak_source,
        )  # fmt: skip
    try:
        state, finished = training.fit(
            state, train_step, batches,
            start_step=start_step, total_steps=total_steps, batch_size=config.batch_size, examples_seen=examples_seen,
            save_every_steps=save_every, log_every_steps=log_every, config=plain_config, checkpointer=checkpointer,
            meter=telemetry.Meter(flops_per_image=flops, peak=peak), log=log, progress=progress,
        )  # fmt: skip
    finally:
        if progress is not None:
            progress.close()
        checkpointer.close()
    step = int(jax.device_get(state["step"]))
    seen = examples_seen + (step - start_step) * config.batch_size
    if log is not None:
        log.event("finished" if finished else "preempted", step=step, examples_seen=seen)
        log.close()
    if json_file and first_host:
        last = json.loads(Path(workdir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        Path(json_file).write_text(
            json.dumps({"finished": finished, "workdir": workdir, **last}, indent=2) + "\n", encoding="utf-8"
        )
    if finished:
        say(f"finished at step {step:,} after {seen:,} examples; checkpoints are in {workdir}/{checkpoint.FOLDER}")
        return 0
    say(
        f"stopped and saved at step {step:,} of {total_steps:,} after {seen:,} examples; start the same command again to go on"
    )
    return training.EXIT_PREEMPTED


if __name__ == "__main__":
    sys.exit(main())
