"""Ends a process that makes no progress, with the stacks of all its threads in its log file.

Heartbeats between hosts come from a thread of their own: without a watchdog a host whose main thread hangs looks healthy, and the others
wait for it forever.
"""

import faulthandler
import signal
import threading
import time

from curia_common import cli, logs
from curia_common.exit_codes import ExitCode
from curia_jax import hosts

TICK = 0.5  # seconds


class Watchdog:
    """Watches from its start to the end of the block.

    Args:
      seconds: time without progress after which the process is ended; 0 never ends it.
      log: gets the stacks; also when the process receives SIGUSR1, which ends nothing, and when it crashes.
    """

    def __init__(self, seconds: int | float, log: logs.LogFile) -> None:
        self._seconds, self._log = seconds, log
        self._phase, self._last = "starting", time.monotonic()
        self._done = threading.Event()

    def __enter__(self) -> "Watchdog":
        if cli.owns_process():
            faulthandler.enable(self._log.stream)
            faulthandler.register(signal.SIGUSR1, self._log.stream)
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()

    def beat(self, phase: str) -> None:
        """Reports progress; `phase` names what follows ("compiling")."""
        self._phase, self._last = phase, time.monotonic()

    def _watch(self) -> None:
        tick = time.monotonic()
        while not self._done.wait(TICK):
            now = time.monotonic()
            if now - tick > 10 * TICK:  # the whole process or machine was suspended, and has to catch up first
                self._last += now - tick
            tick = now
            if now - self._last > self._seconds:
                cli.leave(
                    ExitCode.RESTART,
                    f"error: {hosts.name()} made no progress for {self._seconds:g} s while {self._phase}; the stacks of its threads "
                    f"are in {self._log.path}; rerun the same command, with a larger --config.devices.watchdog_seconds if it was only slow",
                    self._dump,
                )

    def _dump(self) -> None:
        self._log.write(f"stacks of {hosts.name()} while {self._phase}:")
        faulthandler.dump_traceback(self._log.stream)
