"""Stands for a command of the project in tests of the launcher: what a process of it does, the words of the test say.

--workdir=FOLDER   where attempts leave notes, and checkpoints/<step> where a test asks for progress
ATTEMPT:PROCESS:WHAT …
                   in that attempt ("*": each), that process does WHAT: exit=CODE, kill, save=STEP, hang, deaf (ignores
                   SIGTERM), orphan (leaves a child); without any it says so and ends with 0
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1].partition("=")[2])
    attempt, me = os.environ["CURIA_LAUNCH_ATTEMPT"], os.environ["JAX_PROCESS_ID"]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
    started = folder / f"starting-{attempt}-{me}"
    started.write_text(str(os.getpid()))
    started.rename(folder / f"started-{attempt}-{me}")  # whole, whenever a test looks
    for word in sys.argv[2:]:
        which, who, what = word.split(":")
        if which not in ("*", attempt) or who not in ("*", me):
            continue
        what, _, value = what.partition("=")
        if what == "exit":
            print(f"error: exit code {value} after {time.monotonic():.6f} s", flush=True)
            print("[Gloo] Rank 0 is connected to 1 peer ranks.", flush=True)
            sys.exit(int(value))
        elif what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "save":
            (folder / "checkpoints" / value).mkdir(parents=True)
            (folder / "checkpoints" / value / "commit_success.txt").touch()
        elif what == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif what == "orphan":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (folder / "child").write_text(str(child.pid))
        elif what == "hang":
            print("hanging", flush=True)
            time.sleep(600)
    print(f"process {me} of attempt {attempt} is done", flush=True)


if __name__ == "__main__":
    main()
