"""Google Cloud's notice that a machine is about to be taken away or maintained: a reason to stop as good as SIGTERM, and often earlier.

The metadata server of every machine says so at two addresses, which answer when their value changes
(cloud.google.com/compute/docs/metadata/querying-metadata#waitforchange):

  instance/preempted           TRUE: a Spot machine ends within 30 s
  instance/maintenance-event   TERMINATE_ON_HOST_MAINTENANCE: a machine with accelerators will be stopped; minutes to an hour before

Live migration does not stop a run. Neither does maintenance that had been announced before the run began: stopping for it would
restart the run into the same notice, and SIGTERM comes when it is time.
"""

import contextlib
import http.client
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal, NamedTuple

from curia_common import logs, signals
from curia_jax import hosts

HOST = "GCE_METADATA_HOST"  # as Google's own libraries read it: host and port of another metadata server
PRODUCT = Path("/sys/class/dmi/id/product_name")
WAIT_SECONDS = 60  # for one change; then it is asked again
RETRY_SECONDS = 10.0  # after an answer that failed
_FLAVOR = {"Metadata-Flavor": "Google"}

logger = logs.get_logger(__name__)


class Notice(NamedTuple):
    """One of the two addresses.

    Attributes:
      stops: the value that is a reason to stop.
      at_start: also where it had this value before the run began.
    """

    path: str
    stops: str
    at_start: bool
    text: str


NOTICES = (
    Notice("instance/preempted", "TRUE", True, "this machine is being preempted"),
    Notice(
        "instance/maintenance-event",
        "TERMINATE_ON_HOST_MAINTENANCE",
        False,
        "this machine will be stopped for maintenance",
    ),
)


def on_google_cloud() -> bool:
    """Whether this machine is one of Google Cloud's. Asks no network, as it is tested by Google's own libraries."""
    if os.environ.get(HOST):
        return True
    with contextlib.suppress(OSError):
        return PRODUCT.read_text(encoding="utf-8").startswith("Google")
    return False


class Watch:
    """Waits for a notice in the background, from its start to the end of the block, and then stops the run as SIGTERM does.

    Args:
      wanted: `devices.preemption_notice`.
    """

    def __init__(self, wanted: Literal["auto", "google", "none"], received: signals.Received) -> None:
        self._on = wanted == "google" or (wanted == "auto" and on_google_cloud())
        self._server = os.environ.get(HOST) or "metadata.google.internal"
        self._received, self._done = received, threading.Event()
        # The server is on this machine: no proxy leads to it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> "Watch":
        for notice in NOTICES if self._on else ():
            threading.Thread(target=self._follow, args=(notice,), name=notice.path, daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()  # a thread that waits for an answer ends with the process

    def _follow(self, notice: Notice) -> None:
        """Polls the metadata server until the notice comes or the block ends."""
        tag, failing = None, False
        while not self._done.is_set():
            try:
                value, new = self._ask(notice.path, tag)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not failing:
                    logger.warning(
                        f"{self._server} does not say {notice.path} ({type(error).__name__}); retrying, and SIGTERM still stops the run"
                    )
                failing = True
                self._done.wait(RETRY_SECONDS)
                continue
            first, tag, failing = tag is None, new, False
            if value == notice.stops and (notice.at_start or not first) and not self._done.is_set():
                self._received.stop()
                logger.warning(f"Google Cloud's notice to {hosts.name()}: {notice.text}; saving")
                return

    def _ask(self, path: str, tag: str | None) -> tuple[str, str]:
        """The value at an address, and its tag: at once without one, else when the value has changed or after WAIT_SECONDS.

        Raises:
          OSError, HTTPException: no answer.
          ValueError: an answer that does not come from a metadata server.
        """
        wait = "" if tag is None else f"?wait_for_change=true&timeout_sec={WAIT_SECONDS}&last_etag={tag}"
        request = urllib.request.Request(f"http://{self._server}/computeMetadata/v1/{path}{wait}", headers=_FLAVOR)
        with self._opener.open(request, timeout=WAIT_SECONDS + 30) as answer:
            if answer.headers.get("Metadata-Flavor") != "Google" or not (new := answer.headers.get("ETag")):
                raise ValueError("not a metadata server")
            return answer.read(256).decode().strip(), new
