"""Profiles of a running job, asked for from outside: a file `profile.request` in the work directory, or SIGUSR2 to any host.

Every host traces the next steps, as many as the file says (5 by default), to `<workdir>/profiles/step-<n>/host-<n>/`, which
TensorBoard and xprof show. The run continues.
"""

import contextlib
import threading
from pathlib import Path

import jax

from curia_common import logs, signals
from curia_jax import hosts, storage, training

REQUEST, FOLDER = "profile.request", "profiles"
STEPS, MOST_STEPS = 5, 1000
POLL_SECONDS, BUCKET_POLL_SECONDS = 1.0, 10.0
_KEY = "curia/profile"

logger = logs.get_logger(__name__)


class Profiler:
    """Looks for requests from its start to the end of the block; `follow` is its hook of every step.

    Args:
      output: folder of the profiles, if it is not the work directory.
    """

    def __init__(self, workdir: str, received: signals.Received, output: Path | None = None) -> None:
        self._request_file = storage.root(workdir) / REQUEST
        self._poll_seconds = BUCKET_POLL_SECONDS if storage.is_bucket(workdir) else POLL_SECONDS
        self._output = Path(workdir) if output is None else output
        self._wanted = 0  # steps to trace
        self._until: int | None = None  # step after which the trace that is running ends
        self._done = threading.Event()
        self._asked = 0  # requests of this run so far
        received.on_request = self._request
        self._thread = threading.Thread(target=self._poll, name="profiler", daemon=True)

    def __enter__(self) -> "Profiler":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        self._thread.join()
        if self._until is not None:
            self._stop()

    def follow(self, report: training.Report) -> None:
        """Starts and ends traces. A trace that fails is a warning."""
        if self._until is not None:
            if report.step >= self._until:
                self._stop()
        elif self._wanted:
            steps, self._wanted = self._wanted, 0
            folder = self._output / FOLDER / f"step-{report.step + 1}" / f"host-{hosts.number()}"
            try:
                jax.profiler.start_trace(str(folder))
            except Exception as error:  # noqa: BLE001 - a profile must not end a run
                logger.warning(f"cannot profile ({type(error).__name__}: {str(error).splitlines()[0]})")
                return
            self._until = report.step + steps
            logger.info(f"profiling {steps} steps from step {report.step + 1:,} on, to {folder.parent}")

    def _stop(self) -> None:
        self._until = None
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # noqa: BLE001
            logger.warning(f"the profile was not written ({type(error).__name__}: {str(error).splitlines()[0]})")
        else:
            logger.info("profile written")

    def _request(self) -> None:
        """SIGUSR2: the same as the file."""
        with contextlib.suppress(Exception):  # as in `_take_request`
            self._request_file.write_text("")

    def _poll(self) -> None:
        while not self._done.wait(self._poll_seconds):
            if hosts.is_first():
                if steps := self._take_request():
                    hosts.tell(f"{_KEY}/{self._asked}", str(steps))
                    self._asked, self._wanted = self._asked + 1, steps
            elif (steps := hosts.told(f"{_KEY}/{self._asked}")) is not None:
                self._asked, self._wanted = self._asked + 1, int(steps)

    def _take_request(self) -> int:
        """Steps that a request file asks for, which it removes; 0 where there is none."""
        try:
            text = self._request_file.read_bytes().decode("utf-8", "replace").strip()
            self._request_file.unlink()
        except Exception:  # noqa: BLE001 - whatever storage raises; it is looked at again
            return 0
        return min(int(text), MOST_STEPS) if text.isdecimal() and int(text) else STEPS
