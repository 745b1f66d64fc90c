"""Stands in for data_pipeline.build: writes what Beam is told to a line of the file TOLD, and ends with the next of the exit codes in CODES."""

import os
import shlex
import sys
import time
from pathlib import Path

from data_pipeline import build

if __name__ == "__main__":
    told = Path(os.environ["TOLD"])
    with told.open("a") as stream:
        stream.write(f"{build.parser().parse_args().beam_options}\n")
    codes = os.environ["CODES"].split()
    code = codes[len(told.read_text().splitlines()) - 1]
    if code == "hang":
        print(shlex.join(sys.argv[1:]), flush=True)
        time.sleep(120)
    sys.exit(f"error: exit code {code}" if code == "1" else int(code))
