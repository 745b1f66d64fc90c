"""python -m launch with tests.launch.worker in place of pretrain, and without pauses between attempts."""

import sys

from launch import __main__, local, spec

spec.COMMANDS["pretrain"] = spec.Command("tests.launch.worker", many_hosts=True)
local.FIRST_PAUSE = 0.01

if __name__ == "__main__":
    sys.exit(__main__.main())
