"""Google Cloud's notices, from a metadata server on loopback that answers as the real one is documented to."""

import contextlib
import http.server
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from curia_common import signals
from curia_jax import checkpoint, preemption, trainer
from curia_jax import config as configs
from curia_jax import run as runs
from curia_jax.objectives import mae

ROOT = Path(__file__).resolve().parents[1]
PREEMPTED, MAINTENANCE = "instance/preempted", "instance/maintenance-event"
TERMINATE = "TERMINATE_ON_HOST_MAINTENANCE"


class MetadataServer:
    """Values by path; `asked` counts the requests for each. A request that waits is answered when the value has changed."""

    def __init__(self) -> None:
        self.values = {PREEMPTED: "FALSE", MAINTENANCE: "NONE"}
        self.versions = dict.fromkeys(self.values, 1)
        self.asked = dict.fromkeys(self.values, 0)
        self.failures = 0  # answers with 503 before the first value
        self.flavor = "Google"
        self.changed = threading.Condition()

    def set(self, path: str, value: str) -> None:
        with self.changed:
            self.values[path], self.versions[path] = value, self.versions[path] + 1
            self.changed.notify_all()

    def wait_until_asked(self, path: str, times: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.asked[path] >= times, 60)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        url = urllib.parse.urlsplit(request.path)
        path, query = url.path.removeprefix("/computeMetadata/v1/"), urllib.parse.parse_qs(url.query)
        with self.changed:
            self.asked[path] += 1
            self.changed.notify_all()
            if request.headers.get("Metadata-Flavor") != "Google" or self.failures:
                self.failures -= 1
                request.send_error(503)
                return
            if query.get("wait_for_change") == ["true"]:
                known = query["last_etag"][0]
                self.changed.wait_for(lambda: known != f"tag{self.versions[path]}", float(query["timeout_sec"][0]))
            body, tag = self.values[path].encode(), f"tag{self.versions[path]}"
        request.send_response(200)
        for name, value in (("Metadata-Flavor", self.flavor), ("ETag", tag), ("Content-Length", str(len(body)))):
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataServer]:
    made = MetadataServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):  # whoever asked is gone
                made.answer(self)

        def log_message(self, *unused: Any) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    listening.daemon_threads = True
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setenv(preemption.HOST, f"localhost:{listening.server_port}")
    monkeypatch.setenv("http_proxy", "http://localhost:1")  # which does not lead there
    monkeypatch.setattr(preemption, "RETRY_SECONDS", 0.05)
    try:
        yield made
    finally:
        for path in made.values:
            made.set(path, "the end")  # answers who still waits
        listening.shutdown()
        listening.server_close()


@pytest.fixture
def received() -> signals.Received:
    return signals.Received(threaded=False)


def stopped(received: signals.Received, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not received.stop_requested and time.monotonic() < deadline:
        time.sleep(0.01)
    return received.stop_requested


@pytest.mark.parametrize(("path", "value"), [(PREEMPTED, "TRUE"), (MAINTENANCE, TERMINATE)])
def test_notice_stops_the_run(path: str, value: str, server: MetadataServer, received: signals.Received) -> None:
    asked = []
    received.on_stop = lambda: asked.append(path)
    with preemption.Watch("auto", received):
        server.wait_until_asked(path, 2)  # the value there is, and a change
        assert not received.stop_requested
        server.set(path, value)
        assert stopped(received)
    assert asked == [path]


def test_live_migration_and_other_changes_stop_nothing(server: MetadataServer, received: signals.Received) -> None:
    with preemption.Watch("auto", received):
        for number, value in enumerate(["MIGRATE_ON_HOST_MAINTENANCE", "NONE"], start=2):
            server.wait_until_asked(MAINTENANCE, number)
            server.set(MAINTENANCE, value)
        server.wait_until_asked(MAINTENANCE, 4)  # both were read, and the next is waited for
        assert not received.stop_requested


def test_notice_before_the_start_stops_where_the_machine_goes_at_once(
    server: MetadataServer, received: signals.Received
) -> None:
    server.set(MAINTENANCE, TERMINATE)
    with preemption.Watch("auto", received):
        server.wait_until_asked(MAINTENANCE, 2)
        assert not received.stop_requested  # or every start until then would end at its first step
        server.set(PREEMPTED, "TRUE")
        assert stopped(received)


def test_server_that_fails_for_a_while_is_asked_again(
    server: MetadataServer, received: signals.Received, caplog: pytest.LogCaptureFixture
) -> None:
    server.failures = 4
    server.set(PREEMPTED, "TRUE")
    with preemption.Watch("auto", received):
        assert stopped(received)
    assert sum("does not say instance/preempted (HTTPError)" in message for message in caplog.messages) == 1


def test_answer_of_another_server_is_no_notice(
    server: MetadataServer, received: signals.Received, caplog: pytest.LogCaptureFixture
) -> None:
    server.flavor = "captive portal"
    server.set(PREEMPTED, "TRUE")
    with preemption.Watch("auto", received):
        server.wait_until_asked(PREEMPTED, 3)
    assert not received.stop_requested


@pytest.mark.parametrize(
    ("product", "wanted", "asks"),
    [("Google Compute Engine\n", "auto", True), ("Google\n", "none", False), ("KVM\n", "auto", False), ("KVM\n", "google", True),
     (None, "auto", False)],
)  # fmt: skip
def test_only_machines_of_google_cloud_are_watched(
    product: str | None,
    wanted: Any,
    asks: bool,
    received: signals.Received,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv(preemption.HOST, raising=False)
    monkeypatch.setattr(preemption, "PRODUCT", tmp_path / "product_name")
    if product is not None:
        (tmp_path / "product_name").write_text(product)
    asked = threading.Event()

    def ask(self: preemption.Watch, path: str, tag: str | None) -> tuple[str, str]:
        asked.set()
        return "TRUE", "1"

    monkeypatch.setattr(preemption.Watch, "_ask", ask)
    with preemption.Watch(wanted, received):
        assert stopped(received, 30 if asks else 0.2) == asks
    assert asked.is_set() == asks


@pytest.mark.usefixtures("one_device")
def test_run_saves_and_ends_with_75_at_a_notice(
    server: MetadataServer, tiny_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configs.load(str(ROOT / "tests/configs/resumable.py"), [f"--config.data.shards={tiny_shards}"])
    this = runs.prepare(config, str(tmp_path / "run"), runs.open_shards)
    objective = mae.make(config, this.mesh, canvas=this.canvas, warmup_steps=this.warmup_steps, total_steps=6)

    def batches(this: runs.Run) -> Iterator[Any]:
        for number, batch in enumerate(runs.batches(this), start=1):
            if number == 3:
                server.set(PREEMPTED, "TRUE")
                wait(
                    lambda: (
                        "Google Cloud's notice to host 0 of 1: this machine is being preempted; saving" in caplog.text
                    )
                )
            yield batch

    assert trainer.train(this, objective, batches).exit_code == 75
    assert (checkpoint.latest(str(tmp_path / "run")) or (0,))[0] == 3


def wait(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)
