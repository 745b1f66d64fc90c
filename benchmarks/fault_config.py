"""Config of the runs of benchmarks/faults.py: a model that compiles in seconds, and the faults that its process injects into itself.

The variable FAULTS holds them as JSON, a list of objects with the fields of `Fault`. The moment of the first one is appended to the file that the variable FAULT_TIME names.
"""

import dataclasses
import json
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

import ml_collections
from curia_jax.configs import demo  # pyright: ignore[reportMissingImports] - configs/, as it is installed

FULL = 4096  # bytes, of the largest file while the disk is "full"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault that the process injects into itself.

    Attributes:
      at: "batch" (a batch is pulled), or the name of an audit event of Python and a part of its path: "open commit_success.txt".
        "bucket commit_success.txt" is a request to a bucket that writes an object of this name.
      do: a signal for this process ("SIGKILL"); "raise", "hang"; "nan", which makes values of the batch NaN; "full" and
        "free", which limit the size of a file to FULL bytes and lift the limit.
      nth: number of the batch or event, from 1 on.
      delay: seconds from there to the fault.
      last: last batch of "nan"; None for one batch.
    """

    at: str
    do: str
    nth: int = 1
    delay: float = 0.0
    last: int | None = None


def get_config() -> ml_collections.ConfigDict:
    config = demo.get_config()
    config.batch_size = 16
    config.save_every = "4 steps"
    config.log_every = "1 step"
    config.model.width = 32
    config.model.depth = 1
    config.model.heads = 2
    config.model.mlp_width = 64
    config.model.image_size = (8, 8)
    config.model.patch_size = (4, 4)
    config.model.decoder_width = 16
    config.augment.resample = "bilinear"
    config.data.prefetch = 16
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.devices.cpu_count = 1
    config.devices.heartbeat_seconds = 10
    _inject([Fault(**found) for found in json.loads(os.environ.get("FAULTS", "[]"))])
    return config


def _inject(faults: list[Fault]) -> None:
    """Injects the faults at their moments."""
    at_batches = [fault for fault in faults if fault.at == "batch"]
    at_events = [fault for fault in faults if fault.at != "batch"]
    if at_batches:
        from curia_jax import data

        to_devices, pulled = data.to_devices, 0

        def disturbed(batch: data.HostBatch, sharding: Any) -> Any:
            nonlocal pulled
            pulled += 1
            for fault in at_batches:
                if fault.do == "nan":
                    if fault.nth <= pulled <= (fault.last or fault.nth):
                        batch = {**batch, "slope": batch["slope"] * float("nan")}
                elif fault.nth == pulled:
                    _happen(fault)
            return to_devices(batch, sharding)

        data.to_devices = disturbed
    if any(fault.at.startswith("bucket ") for fault in at_events):
        _audit_bucket_writes()
    if at_events:
        left = [fault.nth for fault in at_events]

        def audited(event: str, values: tuple[Any, ...]) -> None:
            for number, fault in enumerate(at_events):
                name, _, part = fault.at.partition(" ")
                if event == name and left[number] and any(part in str(value) for value in values[:2]):
                    left[number] -= 1
                    if not left[number]:
                        _happen(fault)

        sys.addaudithook(audited)


def _audit_bucket_writes() -> None:
    """Raises the audit event "bucket" with the name of each object before gcsfs writes it."""
    import gcsfs.core

    upload = gcsfs.core.initiate_upload

    async def audited(fs: Any, bucket: str, key: str, *args: Any, **kwargs: Any) -> Any:
        sys.audit("bucket", key)
        return await upload(fs, bucket, key, *args, **kwargs)

    gcsfs.core.initiate_upload = audited


def _happen(fault: Fault) -> None:
    do = fault.do
    if fault.delay:
        threading.Timer(fault.delay, _happen, [dataclasses.replace(fault, delay=0.0)]).start()
        return
    if path := os.environ.get("FAULT_TIME"):
        with open(path, "a") as file:
            file.write(f"{time.time()}\n")
    if do == "raise":
        raise ZeroDivisionError("a bug")
    if do == "hang":
        time.sleep(86_400)
    if do in ("full", "free"):
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL if do == "full" else hard, hard))
    if do.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, do))
