"""curia_jax.pretrain, with what happens to it in a test of the launcher.

FAULTS is "ATTEMPT:PROCESS:BATCH:WHAT …": when that process of that attempt has made so many batches, it is killed (kill), or sends
SIGTERM to its launcher (stop).
"""

import os
import signal
import sys

from curia_jax import data, pretrain

to_devices = data.to_devices
_made = 0


def faulty(batch, sharding):
    global _made
    _made += 1
    for word in os.environ.get("FAULTS", "").split():
        attempt, process, count, what = word.split(":")
        if (attempt, process, int(count)) == (os.environ["CURIA_LAUNCH_ATTEMPT"], os.environ["JAX_PROCESS_ID"], _made):
            os.kill(*((os.getpid(), signal.SIGKILL) if what == "kill" else (os.getppid(), signal.SIGTERM)))
    return to_devices(batch, sharding)


if __name__ == "__main__":
    data.to_devices = faulty
    sys.exit(pretrain.main())
