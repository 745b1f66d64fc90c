"""Runs the clouds' own programs (gcloud, kubectl, sbatch) and classifies their errors."""

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from curia_common import logs
from curia_common.errors import RestartError, UserError

Problem = Literal["absent", "exists", "credentials", "permission", "quota", "transient", "other"]
# In the order in which they are looked for: a quota error also says RESOURCE_EXHAUSTED, as a busy service does.
_SIGNS: tuple[tuple[Problem, str], ...] = (
    ("credentials", r"active account selected|auth login|Reauthentication|Unauthorized|provide credentials|credentials were not"),
    ("permission", r"PERMISSION_DENIED|does not have permission|Forbidden|permission denied|\b403\b"),
    ("quota", r"[Qq]uota|QUOTA_EXCEEDED"),
    ("exists", r"ALREADY_EXISTS|AlreadyExists|already exists"),
    ("absent", r"NOT_FOUND|NotFound|not found|matched no objects|Invalid job id"),
    ("transient", r"\b429\b|\b50[0234]\b|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|INTERNAL|rateLimitExceeded|backendError"
                  r"|[Tt]imed? ?out|[Cc]onnection (?:reset|refused|aborted)|Could not (?:reach|resolve)|Network is unreachable"
                  r"|Temporary failure"),
)  # fmt: skip
_REMEDIES: dict[Problem, str] = {
    "credentials": "log in: gcloud auth login",
    "permission": "ask the owner of the project for that permission",
    "quota": "ask for more of it, or take a smaller topology, another zone or --spot",
}
_PROGRAMS = {
    "gcloud": "install the Google Cloud CLI (cloud.google.com/sdk)",
    "kubectl": "install it with: gcloud components install kubectl gke-gcloud-auth-plugin",
    "sbatch": "launch from a login node of the Slurm cluster",
}
RETRIES = 6
PAUSE_SECONDS = 5.0  # before the first retry; doubles


class ToolError(UserError):
    """A program of a cloud refused."""

    def __init__(self, problem: Problem, text: str) -> None:
        self.problem = problem
        super().__init__(text)


logger = logs.get_logger(__name__)


def run(argv: Sequence[str], *, folder: Path | None = None, pause: Callable[[float], object] = time.sleep) -> str:
    """What a program prints on standard output. Transient errors are retried for about five minutes.

    Args:
      folder: in which it runs.
      pause: waits so many seconds between two tries.

    Raises:
      ToolError: it refused; `problem` says why.
      RestartError: the cloud could not be reached, or is busy.
      UserError: the program is not installed.
    """
    for attempt in range(RETRIES + 1):
        try:
            ended = subprocess.run(argv, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        except FileNotFoundError:
            raise UserError(f"{argv[0]} is not on the PATH; {_PROGRAMS.get(argv[0], 'install it')}") from None
        if ended.returncode == 0:
            return ended.stdout
        problem, line = classify(ended.stderr)
        what = " ".join([argv[0], *_verbs(argv)])
        if problem != "transient":
            remedy = f"; {_REMEDIES[problem]}" if problem in _REMEDIES else ""
            raise ToolError(problem, f"{what}: {line or f'exit code {ended.returncode}'}{remedy}")
        if attempt < RETRIES:
            seconds = PAUSE_SECONDS * 2**attempt
            logger.info(f"{what}: {line}; trying again in {seconds:g} s")
            pause(seconds)
    raise RestartError(f"{what}: {line}; tried {RETRIES + 1} times; run the same command again later")


def classify(stderr: str) -> tuple[Problem, str]:
    """What went wrong, and the line that says so."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for problem, sign in _SIGNS:
        found = next((line for line in lines if re.search(sign, line)), None)
        if found is not None:
            return problem, _shortened(found)
    return "other", _shortened(
        next((line for line in lines if "ERROR" in line or "rror:" in line), lines[-1] if lines else "")
    )


def _shortened(line: str) -> str:
    return re.sub(r"^(?:ERROR|error)[:\s]+|^\([\w.-]+\)\s*", "", re.sub(r"^(?:ERROR|error):\s*", "", line)).rstrip(".")[
        :300
    ]


def _verbs(argv: Sequence[str]) -> list[str]:
    """The words of a command before its first option: "compute tpus queued-resources create"."""
    words: list[str] = []
    for word in argv[1:]:
        if word.startswith("-"):
            break
        words.append(word)
    return words


def stream(argv: Sequence[str]) -> None:
    """Runs a program whose output is this process's own.

    Raises:
      ToolError: it refused; what it said is on standard error.
      UserError: the program is not installed.
    """
    try:
        code = subprocess.run(argv, check=False).returncode
    except FileNotFoundError:
        raise UserError(f"{argv[0]} is not on the PATH; {_PROGRAMS.get(argv[0], 'install it')}") from None
    if code:
        raise ToolError("other", f"{' '.join([argv[0], *_verbs(argv)])}: exit code {code}")
