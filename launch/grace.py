"""Whether the time from SIGTERM to SIGKILL is enough for a save: measured where the run has saved before, else estimated from its plan.

What is measured are saves in the background, beside training, of the same state; a save on SIGTERM has the storage to itself.
"""

import json

from curia_common import logs
from curia_common.errors import StorageError, UserError
from launch import workdirs
from launch.cost import Plan
from launch.spec import COMMANDS, LaunchSpec

NEWEST = 20  # saves that are looked at
# What a host writes to a bucket or a shared disk. An assumption, on the slow side; `python -m benchmarks.checkpoint --workdir=…` measures it.
BYTES_PER_SECOND = 100e6

logger = logs.get_logger(__name__)


def measured_seconds(spec: LaunchSpec) -> float | None:
    """The slowest of the newest saves in the work directory; None where none was timed, or the directory cannot be read now."""
    try:
        text = workdirs.read(spec.workdir, workdirs.EVENTS) if spec.workdir else None
    except StorageError:  # launch.checks has said so
        return None
    found: list[float] = []
    for line in (text or "").splitlines():
        try:
            event = json.loads(line)
            if event["event"] == "saved":
                found.append(float(event["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue  # a torn line, another event, or a save of a version that did not time it
    return max(found[-NEWEST:], default=None)


def estimated_seconds(spec: LaunchSpec, plan: Plan) -> float:
    """Each host writes its share of the state."""
    return plan.state_bytes / spec.topology.hosts / BYTES_PER_SECOND


def check(spec: LaunchSpec, plan: Plan | None, *, contact: bool) -> None:
    """Refuses a grace period shorter than a measured save; warns if it is shorter than an estimated one.

    Args:
      contact: a work directory in a bucket may be looked at.

    Raises:
      UserError: the message has the figure.
    """
    if not COMMANDS[spec.command].many_hosts or spec.workdir is None:
        return
    measured = measured_seconds(spec) if workdirs.may_look(spec.workdir, contact=contact) else None
    if measured is not None:
        if spec.grace_seconds < measured:
            raise UserError(
                f"--grace is {spec.grace_seconds} s, but a save of this run took {measured:.0f} s, so that the one on SIGTERM would be lost; "
                f"add --grace={_rounded(measured)}"
            )
        return
    if plan is not None and spec.grace_seconds < (estimated := estimated_seconds(spec, plan)):
        logger.warning(
            f"--grace is {spec.grace_seconds} s, but a save may take {estimated:.0f} s: {plan.state_bytes / 1e9:.1f} GB "
            f"over {spec.topology.hosts} hosts at {BYTES_PER_SECOND / 1e6:.0f} MB/s each; consider --grace={_rounded(estimated)}"
        )


def _rounded(seconds: float) -> int:
    """Half as much again, in tens of seconds."""
    return int(1.5 * seconds // 10 + 1) * 10
