"""Launches a command of the project on a pod, or as a pod of processes on this machine, and restarts it when machines are lost.

What follows -- is the command as it runs on one machine. Its exit code decides what happens next: 0, 2, 64, 65 and 66 are final;
after any other one all processes restart from the newest checkpoint, up to --max-restarts times, but not after five identical fast
failures in a row. --dry-run contacts nothing: it writes and validates what would be sent.

  status RUN    state of a run that was launched from this machine
  logs RUN      output of its processes (--follow: until it has ended)
  stop RUN      asks it to save and end, and waits
  restart RUN   stops it if it is running, and launches it again
"""

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from curia_common import cli, logs, source
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode
from launch import checks, cost, grace, records
from launch import spec as specs
from launch.rendering import Target
from launch.spec import LaunchSpec, option_name

LOCAL = "local"
TARGETS = {
    LOCAL: "launch.local",
    "gke": "launch.gke",
    "queued-resources": "launch.queued_resources",
    "slurm": "launch.slurm",
    specs.BEAM: "launch.beam",
}  # name -> module that is a rendering.Target
MANAGE = ("status", "logs", "stop", "restart")

logger = logs.get_logger(__name__)


def parser() -> argparse.ArgumentParser:
    made = cli.parser(
        "python -m launch",
        __doc__,
        examples="""
python -m launch --target=local --topology=cpu:1x4 -- pretrain --config=demo --workdir=runs/first --config.data.shards=demo/shards
python -m launch --target=local --topology=v5e:4x4 --dry-run -- pretrain --config=pretrain_vit_b16_224 --workdir=runs/b16
python -m launch --target=gke --topology=v5e-256 --slices=2 --spot --dry-run --output=out -- pretrain --config=… --config.mesh.replica=2 --workdir=gs://bucket/run
python -m launch --target=queued-resources --topology=v4-64 --spot --project=… --zone=… --image=… -- pretrain --config=… --workdir=gs://bucket/run
python -m launch --target=slurm --topology=gpu:4x8 -- pretrain --config=… --workdir=/shared/run --config.data.shards=/shared/shards
python -m launch --target=beam --runner=FlinkRunner --cluster=flink:8081 --topology=cpu:16x8 -- build --input /mnt/exams --output /mnt/shards
python -m launch status first
python -m launch stop first""",
        codes=(ExitCode.DIVERGED, ExitCode.DATA, ExitCode.DOES_NOT_FIT),
    )
    made.add_argument(
        "words",
        nargs="*",
        metavar="-- COMMAND …",
        help=f"{', '.join(specs.COMMANDS)}, with its options; or one of {', '.join(MANAGE)} with RUN",
    )
    made.add_argument(
        "--target",
        choices=TARGETS,
        help="where to run it: this machine, a GKE cluster, TPU VMs, a Slurm cluster, or Apache Beam (build only)",
    )
    made.add_argument(
        "--topology",
        metavar="NAME",
        help="v5e-256 or v5e:16x16, v4 to v7x; gpu:4x8 or cpu:4x2: machines x devices of each, with beam workers x vCPUs",
    )
    made.add_argument("--slices", type=int, default=1, metavar="N", help="TPU slices of that topology (1)")
    made.add_argument(
        "--run", metavar="NAME", help="name of the run (the last part of the command's --workdir or --output)"
    )
    made.add_argument("--spot", action="store_true", help="preemptible machines")
    made.add_argument("--reserved", action="store_true", help="reserved machines")
    made.add_argument("--reservation", metavar="NAME", help="name of the reservation")
    made.add_argument("--image", metavar="NAME@sha256:…", help="container image, by digest")
    made.add_argument("--project", metavar="NAME", help="project of the cloud")
    made.add_argument("--zone", metavar="NAME", help="zone of the cloud")
    made.add_argument(
        "--cluster", metavar="NAME", help="cluster of the project; address of the master of Flink or Spark (beam)"
    )
    made.add_argument("--runner", choices=specs.RUNNERS, help="engine of Apache Beam that build converts on (beam)")
    made.add_argument(
        "--temp-location", metavar="gs://…", help="folder of a bucket for temporary files of Dataflow (beam)"
    )
    made.add_argument("--queue", metavar="NAME", help="LocalQueue of Kueue that admits the run (gke)")
    made.add_argument("--service-account", metavar="NAME", help="service account that the processes run as")
    made.add_argument(
        "--shards-cache",
        type=int,
        default=0,
        metavar="GIB",
        help="cache for shards from gs://… in the memory of each host: at least their size, or 0 for none (0)",
    )
    made.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=value",
        help="environment variable of every process; may be repeated",
    )
    made.add_argument(
        "--max-restarts",
        type=int,
        default=50,
        metavar="N",
        help="restarts after failures; preemptions do not count (50)",
    )
    made.add_argument(
        "--grace", type=int, default=60, metavar="SECONDS", help="time to save between SIGTERM and SIGKILL (60)"
    )
    made.add_argument("--plan", metavar="FILE", help="plan of this run, as written by python -m curia_jax.plan --json")
    made.add_argument(
        "--max-cost", type=float, metavar="AMOUNT", help="refuse a run that costs more, in the currency of the plan"
    )
    made.add_argument("--ignore-fit", action="store_true", help="launch even if the plan does not fit the memory")
    made.add_argument("--allow-dirty", action="store_true", help="launch with uncommitted changes")
    made.add_argument("--allow-changes", action="store_true", help="resume a work directory with another config")
    made.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="render and validate without contacting anything; prints the commands, or writes them to --output",
    )
    made.add_argument("--output", metavar="DIR", help="with --dry-run: folder for all files, commands.sh and spec.json")
    made.add_argument("--follow", action="store_true", help="with logs: follow until the run has ended")
    return made


def launch(args: argparse.Namespace) -> int | None:
    """Runs the command.

    Raises:
      UserError: something typed is wrong; nothing was created.
      DoesNotFitError: the plan says that memory is too small.
    """
    if args.words and args.words[0] in MANAGE:
        return manage(args.words[0], args.words[1:], follow=args.follow)
    if args.target is None:
        raise UserError("--target is missing; see python -m launch --help")
    if args.output and not args.dry_run:
        raise UserError("--output belongs to --dry-run; add that")
    spec = specs.make(
        target=args.target, topology=args.topology, slices=args.slices, command=args.words, run=args.run, spot=args.spot,
        reserved=args.reserved, reservation=args.reservation, image=args.image, project=args.project, zone=args.zone,
        cluster=args.cluster, runner=args.runner, temp_location=args.temp_location, queue=args.queue, service_account=args.service_account, shards_cache_gib=args.shards_cache,
        max_restarts=args.max_restarts, grace_seconds=args.grace, environment=args.env,
        source=source.describe(),
    )  # fmt: skip
    target = _target(spec)
    plan = cost.read(args.plan, spec) if args.plan else None
    cost.check(plan, spec, max_cost=args.max_cost, ignore_fit=args.ignore_fit)
    # What the target cannot serve, or lacks, is refused before the command is asked for its config and a bucket is looked into.
    rendering = target.render(spec)
    if not args.dry_run:
        rendering.check_complete()
        _check_source(spec, allow_dirty=args.allow_dirty)
    platform = "cpu" if spec.target == LOCAL else spec.topology.platform
    spec = checks.check(spec, platform, allow_changes=args.allow_changes, contact=not args.dry_run)
    grace.check(spec, plan, contact=not args.dry_run)
    rendering = target.render(spec)
    for note in rendering.notes:
        logger.info(note)
    if plan is None and cost.can_be_planned(spec) and spec.target != LOCAL:
        logger.info(f"no plan, so memory and cost are not known; plan it: {cost.plan_command(spec)}")
    if args.dry_run:
        if args.output:
            rendering.write(Path(args.output), spec)
            logger.info(
                f"wrote {', '.join(sorted(path.name for path in Path(args.output).iterdir()))} to {args.output}"
            )
        else:
            print(rendering.script, end="", flush=True)
            if rendering.files:
                logger.info(f"--output=DIR writes {', '.join(rendering.files)}, which these commands read")
        if rendering.placeholders:
            logger.info(
                f"placeholders, which a submission needs: {', '.join(map(option_name, rendering.placeholders))}"
            )
        if rendering.lacking:
            logger.info(f"on this machine a submission would end with: {rendering.lacking}")
        return ExitCode.DONE
    if spec.target != LOCAL:
        _ask(spec, plan, yes=args.yes)
    records.write(spec)
    for title, address in rendering.links.items():
        logger.info(f"{title}: {address}")
    if spec.workdir is not None:
        logger.info(f"metrics: tensorboard --logdir={shlex.quote(spec.workdir.rstrip('/') + '/tensorboard')}")
    return target.submit(spec, rendering)


def manage(what: str, names: Sequence[str], *, follow: bool) -> int:
    """Runs the subcommands status, logs, stop and restart of one run."""
    if len(names) != 1:
        raise UserError(f"{what} takes the name of one run: python -m launch {what} RUN")
    spec = records.read(names[0])
    target = _target(spec)
    if what == "logs":
        return target.logs(spec, follow=follow)
    if what == "restart":
        return target.restart(spec)
    print(target.status(spec) if what == "status" else target.stop(spec))
    return ExitCode.DONE


def _target(spec: LaunchSpec) -> Target:
    return importlib.import_module(TARGETS[spec.target])  # pyright: ignore[reportReturnType] - modules that keep the protocol


def _check_source(spec: LaunchSpec, *, allow_dirty: bool) -> None:
    """Raises UserError if files differ from the commit, because nobody could tell later which code ran."""
    if spec.target != LOCAL and spec.source.endswith(source.DIRTY) and not allow_dirty:
        raise UserError(
            f"files differ from commit {spec.source.removesuffix(source.DIRTY)}, so that nobody could tell later what ran; commit them, "
            "or launch all the same with --allow-dirty"
        )


def _ask(spec: LaunchSpec, plan: cost.Plan | None, *, yes: bool) -> None:
    """Prints the cost of the launch, and continues only if the user answers yes."""
    unit = {"tpu": "chips", "gpu": "GPUs"}.get(spec.topology.platform, "cores")
    machines = f"{spec.topology} ({spec.topology.chips:,} {unit}, {spec.capacity})"
    what = f"{spec.command} on {spec.runner if spec.runner == specs.CLUSTER_DECIDES else machines} with {spec.target}"
    logger.info(f"{what}: {plan.text() if plan else 'no plan, so its cost is not known'}")
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("nobody is there to agree to the cost; add --yes")
    if input("launch? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("not launched")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), launch, argv, saves=True)


if __name__ == "__main__":
    sys.exit(main())
