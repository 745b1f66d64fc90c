"""Inputs in object storage, s3://bucket/… and gs://bucket/…: listed once, then read by range requests, each a file of its own.

An object is replaced, never changed, and every answer of the storage names by its ETag the version that it is of. So what is
read is what the inventory saw, or an error, without asking before and after.

Credentials, endpoint and region come from where each store's own programs have them: the environment, ~/.aws, gcloud's
application-default credentials, the machine's role. AWS_SKIP_SIGNATURE=true or GOOGLE_SKIP_SIGNATURE=true reads public buckets.
"""

import contextlib
import datetime
import errno
import functools
import hashlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from curia_common.errors import UserError
from data_pipeline.sources.base import Heartbeat

SCHEMES = ("s3", "gs")
HEADER_BYTES = 1 << 16  # of a first request: most headers are shorter
LARGEST = 1 << 23  # bytes of a request
# Of a request. What is still down after this is asked for again by retry.retry_transient.
RETRIES = {
    "max_retries": 6,
    "retry_timeout": datetime.timedelta(seconds=60),
    "backoff": {"init_backoff": datetime.timedelta(milliseconds=200), "max_backoff": datetime.timedelta(seconds=10), "base": 2},
}  # fmt: skip
CREDENTIALS_LAST = datetime.timedelta(minutes=5)  # botocore renews those that expire within ten
REQUEST_TIMEOUT = datetime.timedelta(seconds=60)
CHANGED = "an input changed while the build ran; start the build again"


class Object(NamedTuple):
    """An object as a listing has it.

    Attributes:
      path: its address.
      modified_ns: a number made of its ETag, which tells versions apart as a file's time does.
    """

    path: str
    size: int
    modified_ns: int


def is_address(path: str) -> bool:
    return path.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def absolute(path: str) -> str:
    """A path in the one form under which it is known: an address without slashes at its end, everything else absolute."""
    return path.rstrip("/") if is_address(path) else os.path.abspath(path)


def find(address: str) -> list[Object]:
    """What lies under an address, or the object that it names, in the order of the names. Hidden ones are left out.

    Raises:
      UserError: there is nothing, it may not be listed, or the storage does not answer.
    """
    store, key = _store(address), _split(address)[1]  # says it where the extra is missing
    import obstore

    top = address[: len(address) - len(key)] if key else f"{address.rstrip('/')}/"
    found = []
    try:
        with _told():
            for batch in obstore.list(store, key or None, chunk_size=1000):
                found += [_object(top + one["path"], one) for one in batch if not _is_hidden(one["path"], key)]
    except OSError as error:
        raise UserError(
            _SAID.get(error.errno, "{address}: {error}").format(address=address, error=error.strerror)
        ) from error
    # Some programs leave empty objects behind that stand for folders.
    if empty := {one.path for one in found if not one.size}:
        folders = {one.path[: slash.start()] for one in found for slash in re.finditer("/", one.path)} & empty
        found = [one for one in found if one.path not in folders]
    if not found and key:
        with contextlib.suppress(FileNotFoundError):
            found.append(head(address.rstrip("/")))
    if not found:
        raise UserError(f"no such input: {address}; there is no object under this address")
    return sorted(found)


_SAID = {
    errno.ENOENT: "no such input: {address}; there is no bucket of this name",
    errno.EACCES: "{address}: no permission to list it; the credentials in use have to allow listing the bucket and reading its objects",
}


def _is_hidden(key: str, top: str) -> bool:
    return any(part.startswith(".") for part in key[len(top.rstrip("/")) :].split("/"))


def head(path: str) -> Object:
    """An object as it is now.

    Raises:
      OSError: it is not there, may not be read, or the storage does not answer.
    """
    import obstore

    with _told():
        return _object(path, obstore.head(_store(path), _split(path)[1]))


def _object(path: str, meta: Any) -> Object:
    # Listings and answers differ in whether they quote an ETag and call it a weak one.
    tag = (meta["e_tag"] or meta["last_modified"].isoformat()).removeprefix("W/").strip('"')
    return Object(path, meta["size"], int.from_bytes(hashlib.sha256(tag.encode()).digest()[:7], "big"))


class Reader(io.RawIOBase):
    """The bytes of an object.

    Reading raises:
      UserError: it is another version than `source` says.
      OSError: with errno, as a file's.
    """

    name, mode = "", "rb"  # pydicom asks for a name; files have a mode

    def __init__(self, source: Object, touch: Heartbeat, item: str, first: int = HEADER_BYTES) -> None:
        """Args:
        touch, item: while the storage is waited for, `item` is out of hand: its time limit is for decoders.
        first: bytes of the first request; where reading goes on after it the next ones are larger.
        """
        self._source, self._touch, self._item, self._first = source, touch, item, first
        self._at, self._start, self._data = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._source.size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        want = min(len(buffer), self._source.size - self._at)
        if want <= 0:
            return 0
        end = self._start + len(self._data)
        if not self._start <= self._at < end:
            ahead = 4 * len(self._data) if self._at == end and self._data else self._first
            length = min(max(ahead, want), LARGEST, self._source.size - self._at)
            self._start, self._data = self._at, self._fetch(self._at, length)
        part = self._data[self._at - self._start :][:want]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _fetch(self, start: int, length: int) -> memoryview:
        import obstore

        self._touch(None)
        try:
            with _told():
                answer = obstore.get(
                    _store(self._source.path), _split(self._source.path)[1], options={"range": (start, start + length)}
                )
                data = memoryview(answer.bytes())
        finally:
            self._touch(self._item)
        if _object(self._source.path, answer.meta) != self._source:
            raise UserError(CHANGED)
        return data


# ---- stores


def _split(address: str) -> tuple[str, str]:
    """Bucket and key."""
    bucket, _, key = address.split("://", 1)[1].partition("/")
    return bucket, key


def _store(address: str) -> Any:
    return _open_store(address.split("://", 1)[0], _split(address)[0])


@functools.cache
def _open_store(scheme: str, bucket: str) -> Any:
    """Of this process: connections are kept and used again.

    Raises:
      UserError: the extra is not installed, the address is none, or there are no credentials.
    """
    try:
        import boto3
        import botocore.exceptions
        import obstore.exceptions
        from obstore.auth.boto3 import Boto3CredentialProvider
        from obstore.store import GCSStore, S3Store
    except ImportError as error:
        raise UserError(
            f"{scheme}://{bucket} needs the extra `cloud`: pip install 'curia-jax[ingest,cloud]'; or mount the bucket and name the folder (see docs/ingest.md)"
        ) from error
    if not bucket or "@" in bucket:
        raise UserError(
            f"an address is {scheme}://bucket/folder, without credentials in it; they come from the environment"
        )
    endpoint = os.environ.get("GOOGLE_BASE_URL" if scheme == "gs" else "AWS_ENDPOINT_URL", "")
    settings = {
        "client_options": {"timeout": REQUEST_TIMEOUT, "allow_http": endpoint.startswith("http://")}, "retry_config": RETRIES,
    }  # fmt: skip
    unsigned = f"{'GOOGLE' if scheme == 'gs' else 'AWS'}_SKIP_SIGNATURE"
    public = os.environ.get(unsigned, "").lower() in ("1", "true")
    try:
        if scheme == "gs":
            config = {"google_skip_signature": public} | ({"google_base_url": endpoint} if endpoint else {})
            return GCSStore(bucket, config=config, **settings)
        provider = None if public else Boto3CredentialProvider(boto3.Session(), ttl=CREDENTIALS_LAST)
        config = {"aws_skip_signature": public}
        if region := os.environ.get("AWS_REGION"):  # before the region of a profile, which need not be the bucket's
            config["aws_region"] = region
        return S3Store(bucket, config=config, credential_provider=provider, **settings)
    except (ValueError, botocore.exceptions.BotoCoreError) as error:
        raise UserError(f"{scheme}://{bucket}: {NO_CREDENTIALS} ({type(error).__name__})") from error
    except obstore.exceptions.BaseError as error:
        raise UserError(f"{scheme}://{bucket} cannot be opened: {_reason(str(error))}") from error


NO_CREDENTIALS = (
    "no credentials are found; sign in as the store's own programs want it (aws configure, gcloud auth application-default "
    "login), or set AWS_SKIP_SIGNATURE=true or GOOGLE_SKIP_SIGNATURE=true for a public bucket"
)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the store's errors say, as an OSError that names no object and has the errno of a file's."""
    import obstore.exceptions as exceptions

    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
    except (exceptions.InvalidPathError, ValueError):
        raise OSError(
            errno.EINVAL,
            "a name in it is no path (it has //, /./ or /../ in it); rename that object, or mount the bucket",
        ) from None
    except exceptions.BaseError as error:
        if "<Code>NoSuchBucket</Code>" in str(error):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        if re.search(r"status code: 40[13]", str(error)):  # of a listing
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
        raise OSError(errno.EIO, _reason(str(error))) from None


def _reason(text: str) -> str:
    """What can be told of a store's message: it quotes names of objects."""
    if "configured region" in text:
        return "the bucket is in another region; name it in AWS_REGION"
    if "token request" in text or "credential" in text.lower():
        return NO_CREDENTIALS
    status, code = re.search(r"status code: (\d{3} [A-Z][A-Za-z ]*)", text), re.search(r"<Code>(\w+)</Code>", text)
    if status:
        return f"the object storage answers {status[1].strip()}" + (f", {code[1]}" if code else "")
    return "the object storage cannot be reached" if "error sending request" in text else "the object storage fails"
