"""Reports the state of a run and the command that resumes it. Changes nothing, and needs no accelerator.

Every checkpoint is compared with its digests, so this takes as long as reading them. Works on a running run too.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from curia_common import cli, logs
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode

if TYPE_CHECKING:
    from etils import epath

State = Literal["running", "finished", "stopped", "diverged", "interrupted", "not started"]
WORDS: dict[State, str] = {
    "running": "is running",
    "finished": "has finished",
    "stopped": "was stopped and has saved",
    "diverged": "diverged",
    "interrupted": "ended without saving: it was killed, or failed",
    "not started": "has not taken a step",
}
LAST_EVENTS: dict[str, State] = {"finished": "finished", "preempted": "stopped", "non-finite": "diverged"}
_ERROR = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ERROR \S+: (?:error: )?(.*)$", re.MULTILINE)

log = logs.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What is known of a run.

    Attributes:
      steps, total_steps: of the newest whole checkpoint, and of the run; None where nothing says.
      last_step: last one in its log.
      checkpoints: steps of the whole ones.
      torn: names of folders in checkpoints/ that are not whole -> what is wrong with them.
      examples_seen: by the newest whole checkpoint: where the data continues.
      goodput: share of the time of all starts that went into steps which count; None without a ledger.
      owner: host and process that hold the lock.
      last_error: newest one in the hosts' logs, with its host and time.
      next_command: continues the run; None where it has finished or is running.
    """

    state: State
    steps: int | None
    total_steps: int | None
    last_step: int | None
    checkpoints: tuple[int, ...]
    torn: dict[str, str]
    examples_seen: int | None
    goodput: float | None
    owner: str | None
    last_error: str | None
    next_command: str | None


def parser() -> argparse.ArgumentParser:
    made = cli.parser(
        "python -m curia_jax.doctor", __doc__, examples="""
python -m curia_jax.doctor --workdir=runs/first
python -m curia_jax.doctor --workdir=runs/first --json=state.json""",
        codes=(ExitCode.DATA,),
    )  # fmt: skip
    made.add_argument("--workdir", required=True, help="work directory of curia_jax.pretrain")
    fields = ", ".join(field.name for field in dataclasses.fields(Diagnosis))
    cli.add_json(made, f"the diagnosis ({fields})")
    return made


def examine(workdir: str) -> tuple[Diagnosis, str | None]:
    """The diagnosis, and the line of the goodput.

    Raises:
      UserError: there is no such folder, or no run in it.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    from curia_jax import checkpoint, goodput, lease, storage, telemetry

    folder = storage.root(workdir)
    if not folder.is_dir():
        raise UserError(f"no folder {workdir}; --workdir takes the work directory of curia_jax.pretrain")
    events = telemetry.events(workdir)
    verdicts = checkpoint.examine(workdir)
    if not events and not verdicts and not (folder / logs.FOLDER).is_dir():
        raise UserError(f"{workdir} holds no run; --workdir takes the work directory of curia_jax.pretrain")

    whole = sorted(int(verdict.path.rsplit("/", 1)[1]) for verdict in verdicts if verdict.problem is None)
    torn = {verdict.path.rsplit("/", 1)[1]: verdict.problem for verdict in verdicts if verdict.problem is not None}
    newest = folder / checkpoint.FOLDER / str(whole[-1]) if whole else None
    starts = [event for event in events if event.get("event") in ("started", "resumed")]
    owner = lease.owner(workdir)
    last = str(events[-1].get("event")) if events else ""
    state: State = "not started" if not starts else "interrupted"
    state = "running" if owner else LAST_EVENTS.get(last, state)
    commands = [event["command"] for event in reversed(starts) if isinstance(event.get("command"), str)]
    command = next((one for one in commands if one.isprintable()), None)
    ledger = goodput.read(workdir)
    summary = goodput.summarise(ledger) if ledger else None
    found = Diagnosis(
        state=state, steps=whole[-1] if whole else None, total_steps=_whole(starts[-1].get("total_steps")) if starts else None,
        last_step=_whole(telemetry.last_metrics(workdir).get("step")), checkpoints=tuple(whole), torn=torn,
        examples_seen=checkpoint.read_meta(newest).examples_seen if newest else None,
        goodput=round(summary.goodput, 4) if summary else None, owner=owner, last_error=last_error(folder / logs.FOLDER),
        next_command=None if state in ("running", "finished") else command,
    )  # fmt: skip
    return found, summary.text() if summary else None


def _whole(value: Any) -> int | None:
    from curia_jax import json_records

    return int(value) if json_records.is_number(value) else None


def last_error(folder: "epath.Path") -> str | None:
    """The newest error in the logs of all hosts, with its host and time. Hosts that ended because of another one do not count."""
    errors = []
    for path in sorted(folder.glob("host-*.log")) if folder.is_dir() else ():
        for when, text in _ERROR.findall(path.read_bytes().decode("utf-8", "replace")):
            if "ends because host" not in text:
                errors.append((when, f"{path.stem.replace('-', ' ')}, {when}: {text}"))
    return max(errors)[1] if errors else None


def describe(found: Diagnosis, workdir: str, spent: str | None) -> list[str]:
    """The diagnosis, a line for each fact."""
    lines = [f"{workdir} {WORDS[found.state]}" + (f" as {found.owner}" if found.owner else "")]
    of = f" of {found.total_steps:,}" if found.total_steps is not None else ""
    if found.last_step is not None:
        lines.append(f"last step in its log: {found.last_step:,}{of}")
    if found.steps is None:
        lines.append("checkpoints: none that is whole; the run starts from step 0")
    else:
        lines.append(f"checkpoints: {len(found.checkpoints)} whole, the newest of step {found.steps:,}{of}")
        lines.append(f"data: {found.examples_seen:,} examples seen there; the next one comes next")
    lines += [f"torn: checkpoints/{name}: {problem}" for name, problem in found.torn.items()]
    lines += [f"last error: {found.last_error}"] if found.last_error else []
    lines += [spent] if spent else []
    if found.next_command is not None:
        lines.append(f"continue with: {found.next_command}")
    elif found.state not in ("running", "finished"):
        lines.append("continue with the command that started it, which its log does not name")
    return lines


def doctor(args: argparse.Namespace) -> int:
    """Runs the command."""
    found, spent = examine(args.workdir)
    for line in describe(found, args.workdir, spent):
        print(line)
    cli.write_json(args.json, dataclasses.asdict(found))
    return ExitCode.DATA if found.torn and not found.checkpoints and found.state != "running" else ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), doctor, argv, stopped="stopped; nothing was changed")


if __name__ == "__main__":
    sys.exit(main())
