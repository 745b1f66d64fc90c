"""What a launcher and the processes that it starts agree on, as environment variables.

A launcher sets ADDRESS, COUNT and NUMBER, which JAX reads, except where the cloud tells the hosts of a TPU slice, and the variables
of `Contract`. Each process checks them before it compiles anything, so that none trains alone, on a CPU, or with the
processes of an earlier attempt.
"""

import dataclasses
from collections.abc import Mapping

from curia_common.errors import DoesNotFitError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PREFIX = "CURIA_LAUNCH_"
RECORDS = "launch"  # folder in a work directory where launcher and workers leave each other notes
# Set by the cloud for the processes of several TPU slices, and by nobody else.
MEGASCALE = "MEGASCALE_"
MEGASCALE_SLICES = "MEGASCALE_NUM_SLICES"


@dataclasses.dataclass(frozen=True)
class Contract:
    """What a launched process must find. Field `attempt` is the variable CURIA_LAUNCH_ATTEMPT, and so on.

    Attributes:
      run: name of the launched run.
      attempt: differs for each start of all processes together; equal for all processes of one start.
      platform: JAX's backend: cpu, gpu or tpu.
      processes: one per host.
      devices: jax devices of all processes.
      slices: TPU slices; 1 for other machines.
      coordinator: value of ADDRESS, host:port; "" where the hosts of a TPU slice find it by themselves.
    """

    run: str
    attempt: str
    platform: str
    processes: int
    devices: int
    slices: int = 1
    coordinator: str = ""

    def environment(self) -> dict[str, str]:
        """The variables, ADDRESS and COUNT among them where there is a coordinator. NUMBER is each process's own."""
        variables = {f"{PREFIX}{name.upper()}": str(value) for name, value in dataclasses.asdict(self).items()}
        return variables | ({ADDRESS: self.coordinator, COUNT: str(self.processes)} if self.coordinator else {})

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Contract | None":
        """The contract of this process; None where no launcher started it.

        Raises:
          DoesNotFitError: a variable is missing or unreadable.
        """
        found = {
            name.removeprefix(PREFIX).lower(): value for name, value in environment.items() if name.startswith(PREFIX)
        }
        if not found:
            return None
        values: dict[str, str | int] = {}
        for field in dataclasses.fields(cls):
            name, value = f"{PREFIX}{field.name.upper()}", found.get(field.name)
            if value is None:
                raise DoesNotFitError(f"{name} is not set, but other variables of a launcher are; launch the run again")
            if field.type is int and not value.isdecimal():
                raise DoesNotFitError(f"{name} is {value!r}; it has to be a whole number; launch the run again")
            values[field.name] = int(value) if field.type is int else value
        return cls(**values)  # pyright: ignore[reportArgumentType] - of the fields' types

    def check_environment(self, environment: Mapping[str, str]) -> None:
        """Refuses variables that another attempt, or another kind of job, left in the environment.

        Raises:
          DoesNotFitError: names the variable, its value and the one of this attempt.
        """
        where = f"attempt {self.attempt} of run {self.run}"
        left = "it is left from another start; launch the run again in a clean environment"
        for name, wanted in ((ADDRESS, self.coordinator), (COUNT, str(self.processes) if self.coordinator else "")):
            if wanted and (found := environment.get(name)) != wanted:
                raise DoesNotFitError(f"{name} is {found or 'not set'}, but {wanted} for {where}; {left}")
        if (
            self.slices == 1 and environment.get(MEGASCALE_SLICES) != "1"
        ):  # GKE may tell a single TPU slice that it is one
            stale = sorted(name for name in environment if name.startswith(MEGASCALE))
            if stale:
                raise DoesNotFitError(f"{stale[0]} is set, but {where} has one TPU slice; {left}")
        elif self.platform == "tpu" and environment.get(MEGASCALE_SLICES, str(self.slices)) != str(self.slices):
            found = environment[MEGASCALE_SLICES]
            raise DoesNotFitError(f"{MEGASCALE_SLICES} is {found}, but {where} has {self.slices} TPU slices; {left}")
