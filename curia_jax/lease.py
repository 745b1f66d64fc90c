"""One run at a time in a work directory.

`lock.json` is created if absent, renewed during the run and removed at its end. A lock that is no longer renewed belongs
to a run that has ended. Each change is conditional on the version that was read, which file systems and buckets guarantee, so
only one of two competing runs gets the lock.
"""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorstore as ts

from curia_common import cli, logs
from curia_common.errors import RestartError
from curia_common.exit_codes import ExitCode
from curia_jax import json_records, storage

FILE = "lock.json"
LEASE_SECONDS = 60.0  # without a renewal; an owner on this machine that has died is known at once
RENEW_SECONDS = 10.0
RELEASE_SECONDS = 3.0

logger = logs.get_logger(__name__)


@contextlib.contextmanager
def holding(workdir: str) -> Iterator[None]:
    """Holds the lock of a work directory inside the block.

    Raises:
      RestartError: another run holds it; names its host and process.
    """
    lock = _Lock(workdir)
    lock.acquire()
    ended = threading.Event()
    renewing = threading.Thread(target=lock.keep, args=(ended,), name="lease", daemon=True)
    renewing.start()
    cli.on_end(lambda code, line: lock.release())
    try:
        yield
    finally:
        ended.set()
        lock.release()


def owner(workdir: str) -> str | None:
    """Host and process that hold the lock, as messages call them; None where nobody does."""
    found = _Lock(workdir).read()
    return describe(found.value) if found.state == "value" and not _ended(found.value) else None


class _Lock:
    def __init__(self, workdir: str) -> None:
        self._workdir = workdir
        self._store = ts.KvStore.open(_place(workdir)).result()
        self._me = {"host": socket.gethostname(), "boot": _boot(), "process": os.getpid(), "began": time.time()}
        self._version: bytes | None = None  # of the file as this process wrote it
        self._using = threading.Lock()

    def read(self) -> Any:
        return self._store.read(FILE).result()

    def acquire(self) -> None:
        found, since = self.read(), time.monotonic()
        if found.state == "value" and not _ended(found.value):
            logger.info(
                f"waiting up to {LEASE_SECONDS:g} s for {describe(found.value)}, which held {self._workdir} last"
            )
        while True:
            free = found.state == "missing" or _ended(found.value) or time.monotonic() - since > LEASE_SECONDS
            if free and self._write(found.stamp.generation):
                return
            time.sleep(min(1.0, LEASE_SECONDS / 10))
            now = self.read()
            if now.stamp.generation == found.stamp.generation:
                continue
            if now.state == "value" and found.state == "value":
                raise RestartError(
                    f"{self._workdir} is in use by {describe(now.value)}; stop that run, or choose another --workdir"
                )
            found, since = now, time.monotonic()

    def keep(self, ended: threading.Event) -> None:
        """Renews the lock until the event. Ends the process where another run has taken it."""
        while not ended.wait(RENEW_SECONDS):
            try:
                with self._using:
                    if self._version is None or self._write(self._version):
                        continue
                    found = self.read()
                    if found.state == "value" and _facts(found.value).items() >= self._me.items():
                        self._version = found.stamp.generation  # an earlier renewal was written although it failed
                        continue
            except Exception as error:  # noqa: BLE001 - storage that fails for a while must not end a run
                logger.warning(f"the lock of {self._workdir} was not renewed ({type(error).__name__}); trying again")
                continue
            whose = describe(found.value) if found.state == "value" else "nobody: it was deleted"
            cli.leave(
                ExitCode.RESTART,
                f"error: the lock of {self._workdir} now belongs to {whose}; this run ends, so that two do not write there",
            )

    def release(self) -> None:
        """Removes the lock, unless storage is stuck: it runs out by itself."""
        if self._using.acquire(timeout=RELEASE_SECONDS):
            with contextlib.suppress(Exception):
                if self._version is not None:
                    self._store.write(FILE, None, if_equal=self._version).result(timeout=RELEASE_SECONDS)
            self._version = None
            self._using.release()

    def _write(self, version: bytes) -> bool:
        """Writes the lock over this version of it; False where it is another by now."""
        content = json.dumps({**self._me, "renewed": time.time()}).encode()
        written = self._store.write(FILE, content, if_equal=version).result().generation
        if not written:
            return False
        self._version = written
        return True


def _place(workdir: str) -> dict[str, str]:
    """The work directory as tensorstore names it."""
    folder = storage.root(workdir)
    if not storage.is_bucket(folder):
        return {"driver": "file", "path": f"{folder}/"}
    bucket, _, path = str(folder).removeprefix(storage.SCHEME).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}


def describe(content: bytes) -> str:
    """Whose lock this is, as messages call them."""
    facts = _facts(content)
    with contextlib.suppress(ValueError, OverflowError, OSError):  # of a time that no clock shows
        renewed = facts.get("renewed")
        if json_records.is_number(renewed):
            when = datetime.datetime.fromtimestamp(renewed).astimezone().strftime("%-d %B %H:%M:%S %Z")
            return f"process {ascii(facts.get('process'))} on {facts.get('host')!a} (alive on {when})"
    return "a process that its damaged lock does not name"


def _facts(content: bytes) -> dict[str, Any]:
    """What the lock says; nothing where it is damaged, which has to wait until the lease runs out."""
    try:
        facts = json_records.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _ended(content: bytes) -> bool:
    """Whether the lock is of a process of this machine that no longer exists."""
    facts = _facts(content)
    if (facts.get("host"), facts.get("boot")) != (socket.gethostname(), _boot()):
        return False
    process = facts.get("process")
    if process == os.getpid():
        return True  # of an earlier container with the same name, where this was the first process too
    try:
        if isinstance(process, int) and process > 0:
            os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _boot() -> str:
    """Identifies this start of this machine, as far as the system says."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
