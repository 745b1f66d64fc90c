"""Environment variables of processes on TPUs, each with its reason.

They are few, and the same for every chip. What differs by chip is what the compiler does, and that is decided by `compiler_options` of
the config (curia_jax/xla_flags.py), which are checked, and recorded with every checkpoint. Here is what libtpu and JAX read before there is a
config. libtpu ends a process whose LIBTPU_INIT_ARGS has an unknown flag; the tests load it with these.
"""

from collections.abc import Mapping
from typing import NamedTuple

LIBTPU_FLAGS = "LIBTPU_INIT_ARGS"


class Setting(NamedTuple):
    """A variable, or a flag of libtpu, and why it is set."""

    name: str
    value: str
    reason: str


VARIABLES = (
    Setting("JAX_PLATFORMS", "tpu,cpu", "a TPU that is busy or broken raises, where JAX would fall back to the CPU"),
    Setting("TPU_STDERR_LOG_LEVEL", "0", "libtpu's own account of a failure reaches the log of the host"),
    Setting("TPU_MIN_LOG_LEVEL", "0", "without it the variable above has nothing to show"),
)
# Between TPU slices alone. Source of the names and values: github.com/AI-Hypercomputer/maxtext and github.com/apple/axlearn.
SEVERAL_SLICES = (
    Setting(
        "megascale_graph_hang_threshold", "10m", "hosts wait for the slowest one's compilation, which takes minutes"
    ),
    Setting("megascale_error_reporter_abort_on_hang", "true", "a hang ends the process, so that the run starts again"),
    Setting("megascale_error_reporter_abort_on_error", "true", "a lost TPU slice does the same"),
)


def of(slices: int) -> Mapping[str, str]:
    """Variable -> value for the processes of a run on so many TPU slices."""
    found = {setting.name: setting.value for setting in VARIABLES}
    if slices > 1:
        found[LIBTPU_FLAGS] = " ".join(f"--{setting.name}={setting.value}" for setting in SEVERAL_SLICES)
    return found
