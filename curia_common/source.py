"""The version of the running code."""

import os
import subprocess
from pathlib import Path

from curia_common import __version__

ROOT = Path(__file__).resolve().parents[1]
DIRTY = "-dirty"
REVISION = "CURIA_REVISION"  # set by the Dockerfile


def describe() -> str:
    """Commit of the checkout that this package is in, with DIRTY where tracked files differ from it; in a container image the one that it
    was built from; the version elsewhere."""
    if not (ROOT / ".git").exists():
        return os.environ.get(REVISION) or __version__
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", f"--dirty={DIRTY}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return __version__
