"""What is launched, and where: the one record that every target renders."""

import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from curia_common import mixtures, topologies
from curia_common.errors import UserError
from curia_common.launching import Contract
from curia_common.topologies import Topology

Capacity = Literal["on-demand", "spot", "reserved"]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the project.

    Attributes:
      module: as `python -m` takes it.
      many_hosts: runs on all hosts of a pod together, and resumes.
      has_fields: prints every field of its config with --fields.
      fills: beginnings of the names of fields that it fills in itself, from the weights and the data that it is given.
      data: the option that names the folder it reads; None where hosts of the cloud do not run it.
      on_beam: hands its work to Apache Beam with --runner=beam.
    """

    module: str
    many_hosts: bool
    has_fields: bool = False
    fills: tuple[str, ...] = ()
    data: str | None = None
    on_beam: bool = False


COMMANDS = {
    "pretrain": Command("curia_jax.pretrain", many_hosts=True, has_fields=True, data=mixtures.OPTION),
    "finetune": Command(
        "curia_jax.finetune",
        many_hosts=True,
        has_fields=True,
        fills=("head.", "task.", "model.", "augment.", "seed", "keep_best"),
        data="--data",
    ),
    "convert": Command("curia_jax.convert", many_hosts=False),
    "predict": Command("curia_jax.predict", many_hosts=False),
    "evaluate": Command("curia_jax.evaluate", many_hosts=False),
    "build": Command("data_pipeline.build", many_hosts=False, on_beam=True),
}
NAME_LENGTH = 40  # leaves room for what targets append; Kubernetes names have at most 63 characters
# Failures in a row with the same exit code, each after less than FAST_SECONDS, after which a run is not started again.
ALIKE, FAST_SECONDS = 5, 600
# Fields that a dry run may lack. `filled` writes them as <name>, and a submission refuses what is left of these.
OPEN = ("image", "project", "zone", "cluster", "temp_location")
# Fields that not every target has a use for; `refuse_unused` names them as the options they come from.
OPTIONAL = (*OPEN, "runner", "queue", "service_account", "shards_cache_gib", "environment")
BEAM = "beam"  # the target whose machines do a part of the work of a command, which itself runs here
# Runners of Apache Beam. Spark's cluster decides how many of its executors work, so that there is no --topology.
RUNNERS = ("DataflowRunner", "FlinkRunner", CLUSTER_DECIDES := "SparkRunner")


@dataclasses.dataclass(frozen=True)
class LaunchSpec:
    """A launch, validated by `make`.

    Attributes:
      target: name of the target, such as gke.
      run: name of the run: a DNS label of up to NAME_LENGTH characters. Resources, records and logs are named after it.
      command: key of COMMANDS.
      words: what follows the command.
      workdir: the command's --workdir; None where it has none.
      capacity: how the machines are paid for.
      reservation: name of the reservation, where there are several.
      image: container image by digest.
      project, zone, cluster: of the cloud; `cluster` is the address of the master where that is Flink or Spark.
      runner: of Apache Beam, such as DataflowRunner; None for other targets.
      temp_location: folder of a bucket where Dataflow keeps temporary files.
      queue: LocalQueue of Kueue, which admits the run; None starts it at once.
      service_account: whose rights the processes have; None takes the default one.
      shards_cache_gib: memory of each host that keeps shards from a bucket, GiB; 0 keeps none.
      max_restarts: how often all processes are started again after a failure; those after a preemption do not count.
      grace_seconds: what processes get to save and end, from SIGTERM to SIGKILL.
      environment: further variables of every process.
      source: commit of the launched code, with "-dirty" where files differ from it; the version where it is not a checkout.
    """

    target: str
    run: str
    command: str
    words: tuple[str, ...]
    topology: Topology
    workdir: str | None
    capacity: Capacity = "on-demand"
    reservation: str | None = None
    image: str | None = None
    project: str | None = None
    zone: str | None = None
    cluster: str | None = None
    runner: str | None = None
    temp_location: str | None = None
    queue: str | None = None
    service_account: str | None = None
    shards_cache_gib: int = 0
    max_restarts: int = 50
    grace_seconds: int = 60
    environment: tuple[tuple[str, str], ...] = ()
    source: str = ""

    @property
    def argv(self) -> tuple[str, ...]:
        """The command of every process, without an interpreter: ("-m", "curia_jax.pretrain", …)."""
        return ("-m", COMMANDS[self.command].module, *self.words)

    @property
    def command_line(self) -> str:
        """The command as one types it."""
        return shlex.join(("python", *self.argv))

    def option(self, name: str) -> str | None:
        """Value of an option of the command, `--config.data.shards` for example; the last one counts. None without."""
        return option_of(self.words, name)

    @property
    def data_option(self) -> str:
        """The option that names the folder that the command reads; "" without one."""
        return COMMANDS[self.command].data or ""

    @property
    def data(self) -> tuple[mixtures.Part, ...]:
        """The folders that the command reads, those of a mixture with their weights.

        Raises:
          UserError: a mixture is not written as one.
        """
        text = self.option(self.data_option)
        if not text:
            return ()
        return mixtures.parse(text) if self.data_option == mixtures.OPTION else (mixtures.Part(text, ""),)

    @property
    def place(self) -> str | None:
        """Where the command keeps what it makes: --workdir, or --output."""
        return self.workdir or self.option("--output")

    def filled(self, field: str) -> str:
        """Value of one of the fields OPEN, or its placeholder, `<project>`."""
        return getattr(self, field) or f"<{field}>"

    def refuse_unused(self, *used: str) -> None:
        """Refuses options that mean nothing for the target.

        Args:
          used: those fields of OPTIONAL, and values of `capacity`, that do.

        Raises:
          UserError: names the others.
        """
        given = [name for name in OPTIONAL if getattr(self, name)]
        given += [self.capacity] if self.capacity != "on-demand" else []
        unused = [option_name(name) for name in given if name not in used]
        if unused:
            raise UserError(f"{', '.join(unused)} means nothing with --target={self.target}; leave it out")

    def contract(self, attempt: str, coordinator: str = "") -> Contract:
        """What the processes of an attempt have to find; see curia_common.launching.

        Args:
          attempt: a text that the target's own machinery may replace by a variable.
          coordinator: host:port of the first process; "" where the cloud tells the hosts of a TPU slice.
        """
        there = self.topology
        return Contract(
            self.run, attempt, there.platform, there.hosts, there.devices, there.slices, coordinator=coordinator
        )

    def to_json(self) -> str:
        """The text of spec.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "LaunchSpec":
        """Reads the text of spec.json.

        Raises:
          ValueError, KeyError, TypeError: it is none.
        """
        found: dict[str, Any] = json.loads(text)
        there = found.pop("topology")
        topology = Topology(there["kind"], tuple(there["shape"]), there["slices"])
        environment = tuple((name, value) for name, value in found.pop("environment"))
        words = tuple(found.pop("words"))
        return cls(topology=topology, environment=environment, words=words, **found)


def make(
    *, target: str, topology: str | None, command: Sequence[str], slices: int = 1, run: str | None = None, spot: bool = False,
    reserved: bool = False, reservation: str | None = None, image: str | None = None, project: str | None = None,
    zone: str | None = None, cluster: str | None = None, runner: str | None = None, temp_location: str | None = None,
    queue: str | None = None, service_account: str | None = None, shards_cache_gib: int = 0, max_restarts: int = 50,
    grace_seconds: int = 60, environment: Sequence[str] = (), source: str = "",
) -> LaunchSpec:  # fmt: skip
    """Checks what was typed, without looking at anything outside.

    Args:
      topology: None for a cluster that decides by itself how many machines work.
      command: what follows `--`.
      environment: "NAME=value" each.

    Raises:
      UserError: a value that no target could use; the target itself checks the rest.
    """
    if not command:
        raise UserError("no command to launch; put it after --, such as: -- pretrain --config=… --workdir=…")
    name, words = command[0], tuple(command[1:])
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r} to launch; there are: {', '.join(COMMANDS)}")
    if topology is None and runner != CLUSTER_DECIDES:
        raise UserError("--topology is missing; see python -m launch --help")
    there = topologies.parse(topology or "cpu:1x1", slices)
    topologies.check_offered(there)
    if there.hosts > 1 and not COMMANDS[name].many_hosts and target != BEAM:
        one = next((f"{there.kind}:{s}" for s in _one_host(there)), f"{there.kind}:1x{there.shape[-1]}")
        many = f", or --target={BEAM} --runner=… for many" if COMMANDS[name].on_beam else ""
        raise UserError(
            f"{name} runs on one host, and {there} has {there.hosts}; take one, such as --topology={one}{many}"
        )
    workdir = option_of(words, "--workdir")
    if COMMANDS[name].many_hosts and not workdir:
        raise UserError(f"{name} has no --workdir, without which it cannot resume; add --workdir=… after {name}")
    if workdir and "://" in workdir and not workdir.startswith("gs://"):
        raise UserError(
            f"--workdir={workdir}: runs lock their work directory and mark their checkpoints by conditional writes, which are tested in "
            "gs:// alone; write gs://BUCKET/FOLDER, or mount that bucket and name the folder"
        )
    # The command refuses it as well, but only on machines that have been paid for.
    decoded = [word for word in (option_of(words, "--task") or "").split(",") if not word.startswith("shards/")]
    if name == "finetune" and workdir and "://" in workdir and any(decoded) and not option_of(words, "--cache"):
        raise UserError(
            f"finetune --task={decoded[0]} decodes images into its work directory, which is a bucket; add a folder of the machines, "
            "such as --cache=/tmp/cache"
        )
    if spot and reserved:
        raise UserError("--spot and --reserved exclude each other; leave one out")
    if reservation and not reserved:
        raise UserError(f"--reservation={reservation} is for reserved machines; add --reserved")
    if image is not None and not re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", image):
        raise UserError(f"--image={image} has no digest, so that hosts could get different ones; write name@sha256:…")
    if max_restarts < 0:
        raise UserError(f"--max-restarts is {max_restarts}; it has to be at least 0")
    if shards_cache_gib < 0:
        raise UserError(f"--shards-cache is {shards_cache_gib}; it has to be at least 0 GiB")
    if grace_seconds < 1:
        raise UserError(f"--grace is {grace_seconds}; it has to be at least 1 s")
    pairs = [word.partition("=") for word in environment]
    for (variable, equals, _), word in zip(pairs, environment, strict=True):
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            raise UserError(f"--env={word} is not NAME=value; write --env=NAME=value")
    return LaunchSpec(
        target=target, run=_run_name(run, workdir or option_of(words, "--output"), name), command=name, words=words, topology=there, workdir=workdir,
        capacity="spot" if spot else "reserved" if reserved else "on-demand", reservation=reservation, image=image,
        project=project, zone=zone, cluster=cluster, runner=runner, temp_location=temp_location, queue=queue, service_account=service_account,
        shards_cache_gib=shards_cache_gib, max_restarts=max_restarts, grace_seconds=grace_seconds,
        environment=tuple((variable, value) for variable, _, value in pairs), source=source,
    )  # fmt: skip


def option_name(field: str) -> str:
    """The option of the launcher from which a field of LaunchSpec comes."""
    renamed = {"shards_cache_gib": "shards-cache", "environment": "env"}
    return f"--{renamed.get(field, field.replace('_', '-'))}"


def option_of(words: Sequence[str], name: str) -> str | None:
    """Value of the last `--name=value` or `--name value` among words."""
    found = None
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word.startswith(f"{name}="):
            found = word.partition("=")[2]
        elif word == name:
            found = following
    return found


def _one_host(topology: Topology) -> list[str]:
    """Shapes of TPU slices with one host."""
    if topology.generation is None:
        return []
    shapes = (Topology(topology.kind, shape) for shape in topologies.offered(topology.kind))
    return [one.shape_text for one in shapes if one.hosts == 1]


def _run_name(given: str | None, place: str | None, command: str) -> str:
    """The name that was given, or one made of that of the folder where the run keeps what it makes."""
    if given is not None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", given) or len(given) > NAME_LENGTH:
            raise UserError(
                f"--run={given} cannot name a run; take up to {NAME_LENGTH} lower-case letters, digits and dashes, a letter first"
            )
        return given
    last = Path(place).name if place else command
    name = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:NAME_LENGTH].rstrip("-")
    return name if name[:1].isalpha() else f"run-{name}"[:NAME_LENGTH].rstrip("-")


def variables_as_words(environment: Mapping[str, str]) -> str:
    """NAME=value words of a shell."""
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
