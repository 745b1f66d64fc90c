"""Object storage on the loopback for the tests: moto's S3 server, of which requests are written down and can be made to fail.

Google Cloud Storage has the same XML interface, which is what its reader here speaks, so the server stands for both."""

import contextlib
import dataclasses
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

NAME = "archive1"  # moto does not know names as Google's client escapes them


@dataclasses.dataclass
class Bucket:
    """A bucket, and how to get at it.

    Attributes:
      environment: variables under which it is found.
      asked: method, path and range of every request.
      fault: called with method and path; the status to answer with instead, or 0.
    """

    environment: dict[str, str]
    client: Any
    asked: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    fault: Callable[[str, str], int] = lambda method, path: 0

    def put(self, key: str, data: bytes, *, acl: str = "public-read") -> str:
        self.client.put_object(Bucket=NAME, Key=key, Body=data, ACL=acl)
        return f"s3://{NAME}/{key}"

    def put_folder(self, folder: Path, top: str) -> str:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{top}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{NAME}/{top}"

    def gets(self) -> list[tuple[str, str]]:
        """Path and range of requests for objects."""
        return [(path, span) for method, path, span in self.asked if method == "GET" and path.count("/") > 1]


class _Silent(WSGIRequestHandler):
    def log(self, *unused: Any) -> None:
        pass


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    moto = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        bucket.asked.append((method, path, environ.get("HTTP_RANGE", "")))
        if status := bucket.fault(method, path):
            start(f"{status} Fault", [("Content-Length", "0")])
            return [b""]
        return moto(environ, start)

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_Silent)
    url = f"http://127.0.0.1:{server.server_port}"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    client = boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
    )
    environment = {**keys, "AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true"}
    bucket = Bucket(environment, client)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()  # of earlier tests
    bucket.asked.clear()
    client.create_bucket(Bucket=NAME)
    try:
        yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
