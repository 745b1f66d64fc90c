"""Signals of a command that saves its work before it ends, from its first line to its last.

Python runs a signal handler between two bytecodes of the main thread. In a compiler or a library that is minutes later, and an
exception out of a handler can be swallowed there, or crash it. So a thread of its own receives the signals of such a command:

  STOPPING  asks to stop. What that means changes while the command runs: see `Received.on_stop`.
  SIGUSR2   calls `Received.on_request`.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from curia_common import logs
from curia_common.exit_codes import ExitCode

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_current: "Received | None" = None


class Received:
    """The signals that this process has received.

    Args:
      threaded: receive in a thread too. Without, only the main thread does, and a second Ctrl-C raises KeyboardInterrupt.

    Attributes:
      on_stop: called once, at the first signal that asks to stop.
      on_request: called at each SIGUSR2.
      on_abort: called before a second Ctrl-C ends the process at once.
    """

    def __init__(self, *, threaded: bool) -> None:
        self.on_stop: Callable[[], None] = lambda: None
        self.on_request: Callable[[], None] = lambda: None
        self.on_abort: Callable[[], None] = lambda: None
        self._threaded = threaded
        self._first_stop = threading.Lock()  # held from then on

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has asked to stop."""
        return self._first_stop.locked()

    def stop(self) -> None:
        """Requests a stop for another reason than a signal; from any thread."""
        if self._first_stop.acquire(blocking=False):
            self.on_stop()

    def install(self) -> None:
        """Installs the handlers, again where a library has replaced them. Leaves a SIGHUP that nohup ignores ignored."""
        for number in (*STOPPING, signal.SIGUSR2):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two of its bytecodes. Whichever thread comes first does what the signal asks for."""
        if number == signal.SIGUSR2:
            if not self._threaded:
                self.on_request()
        elif self._first_stop.acquire(blocking=False):
            self.on_stop()
        elif number == signal.SIGINT and not self._threaded:
            raise KeyboardInterrupt

    def _receive_all(self, pipe: int) -> None:
        stops = 0
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number == signal.SIGUSR2:
                    self.on_request()
                if number not in STOPPING:
                    continue
                stops += 1
                if self._first_stop.acquire(blocking=False):
                    self.on_stop()
                elif number == signal.SIGINT and stops > 1:
                    self.on_abort()
                    logs.say("interrupted again: stopped at once; the same command resumes from what is saved")
                    os._exit(ExitCode.INTERRUPTED)


@contextlib.contextmanager
def receiving(*, threaded: bool = False) -> Iterator[Received]:
    """Receives signals inside the block. A block inside another one shares its `Received`.

    Outside the main thread no signal is received: whoever owns the signals keeps them.
    """
    global _current
    if _current is not None:
        yield _current
        return
    received = Received(threaded=threaded)
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGUSR2)}
    pipe = None
    if threaded:
        pipe = os.pipe()
        os.set_blocking(pipe[1], False)
        signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=received._receive_all, args=(pipe[0],), name="signals", daemon=True).start()
    _current = received
    received.install()
    try:
        yield received
    finally:
        _current = None
        if pipe is not None:  # the command is at its end, and with it the process
            signal.set_wakeup_fd(-1)
            os.close(pipe[1])
        else:
            for number, handler in before.items():
                signal.signal(number, handler)


def ignore_stops() -> None:
    """Ignores signals that ask to stop from now on."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
