"""python -m launch with a module of the tests in place of pretrain and build (the variable MODULE), and without pauses between attempts."""

import os
import sys

from launch import __main__, local, spec

spec.COMMANDS["pretrain"] = spec.Command(os.environ["MODULE"], many_hosts=True)
spec.COMMANDS["build"] = spec.Command(os.environ["MODULE"], many_hosts=False, on_beam=True)
local.FIRST_PAUSE = 0.01

if __name__ == "__main__":
    sys.exit(__main__.main())
