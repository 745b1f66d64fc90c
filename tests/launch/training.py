"""curia_jax.pretrain, with what happens to it in a test of the launcher.

FAULTS is "ATTEMPT:PROCESS:NUMBER:WHAT …": when that process of that attempt has made NUMBER batches, it is killed (kill), or sends
SIGTERM to its launcher (stop). With "torn" it is killed when it is about to write the commit marker of the checkpoint with that step.
"""

import os
import signal
import sys

from etils import epath

from curia_jax import checkpoint, data, pretrain

to_devices = data.to_devices
Place = type(epath.Path("gs://bucket/run"))
write_text = Place.write_text
_made = 0


def meets(number: int | str, *kinds: str) -> None:
    """Lets the fault happen that the test wants of this process now."""
    for word in os.environ.get("FAULTS", "").split():
        attempt, process, wanted, what = word.split(":")
        me = os.environ["CURIA_LAUNCH_ATTEMPT"], os.environ["JAX_PROCESS_ID"], str(number)
        if what in kinds and (attempt, process, wanted) == me:
            os.kill(*((os.getppid(), signal.SIGTERM) if what == "stop" else (os.getpid(), signal.SIGKILL)))


def faulty_batch(batch, sharding):
    global _made
    _made += 1
    meets(_made, "kill", "stop")
    return to_devices(batch, sharding)


def faulty_write(path, *args, **kwargs):
    if path.name == checkpoint.COMMITTED:
        meets(path.parent.name, "torn")
    return write_text(path, *args, **kwargs)


if __name__ == "__main__":
    data.to_devices = faulty_batch
    Place.write_text = faulty_write  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(pretrain.main())
