"""Inputs in object storage, s3://bucket/… and gs://bucket/…: listed once, then read by range requests, one file per object.

An object is replaced, never changed, and every answer of the storage carries the ETag of the version it comes from. So either
the version that the inventory saw is read, or an error is raised, without requests before and after.

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
from typing import TYPE_CHECKING, Any, NamedTuple

from curia_common.errors import DataError, StorageError, UserError
from data_pipeline.sources.base import Heartbeat

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSConfig, RetryConfig, S3Config

SCHEMES = ("s3", "gs")
HEADER_BYTES = 1 << 16  # of a first request: most headers are shorter
LARGEST = 1 << 23  # bytes of a request
# Of a request; failures after these are retried by retry_transient.
RETRIES: "RetryConfig" = {
    "max_retries": 6,
    "retry_timeout": datetime.timedelta(seconds=60),
    "backoff": {"init_backoff": datetime.timedelta(milliseconds=200), "max_backoff": datetime.timedelta(seconds=10), "base": 2},
}  # fmt: skip
CREDENTIALS_LAST = datetime.timedelta(minutes=5)  # botocore renews those that expire within ten
REQUEST_TIMEOUT = datetime.timedelta(seconds=60)
CHANGED = "an input changed while the build ran; rerun the same command"


class Object(NamedTuple):
    """A file of the inputs, as a rule an object of a bucket.

    Attributes:
      path: its address.
      modified_ns: of an object, a number made of its ETag, which distinguishes versions as a file's time does.
    """

    path: str
    size: int
    modified_ns: int


def is_address(path: str) -> bool:
    return path.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def absolute(path: str) -> str:
    """A path in its one normal form: an address without trailing slashes, everything else absolute."""
    return path.rstrip("/") if is_address(path) else os.path.abspath(path)


def find(address: str) -> list[Object]:
    """The objects under an address, or the one that it names, sorted by name, without hidden ones.

    Raises:
      UserError: there are none, or they may not be listed.
      StorageError: the storage does not answer.
    """
    store, key = _store(address)  # before the import: it explains a missing extra
    import obstore

    top = address[: len(address) - len(key)] if key else f"{address.rstrip('/')}/"
    found = []
    try:
        with _translated_errors():
            for batch in obstore.list(store, key or None, chunk_size=1000):
                found += [_object(top + one["path"], one) for one in batch if not _is_hidden(one["path"], key)]
    except FileNotFoundError as error:
        raise UserError(f"no such input: {address}; there is no bucket of this name") from error
    except PermissionError as error:
        raise UserError(
            f"{address}: no permission to list it; the credentials in use have to allow listing the bucket and reading its objects"
        ) from error
    except OSError as error:
        failed = error.errno == errno.EIO and error.strerror not in (OTHER_REGION, NO_CREDENTIALS)
        raise (StorageError if failed else UserError)(f"{address}: {error.strerror}") from error
    # Some programs leave empty objects as folders.
    if empty := {one.path for one in found if not one.size}:
        folders = {one.path[: slash.start()] for one in found for slash in re.finditer("/", one.path)} & empty
        found = [one for one in found if one.path not in folders]
    if not found and key:
        with contextlib.suppress(FileNotFoundError):
            found.append(head(address.rstrip("/")))
    if not found:
        raise UserError(f"no such input: {address}; there is no object under this address")
    return sorted(found)


def _is_hidden(key: str, top: str) -> bool:
    return any(part.startswith(".") for part in key[len(top.rstrip("/")) :].split("/"))


def head(path: str) -> Object:
    """The current version of an object.

    Raises:
      OSError: it does not exist, may not be read, or the storage does not answer.
    """
    import obstore

    with _translated_errors():
        return _object(path, obstore.head(*_store(path)))


def _object(path: str, meta: Any) -> Object:
    # Listings and responses differ in whether they quote an ETag and mark it as weak.
    tag = (meta["e_tag"] or meta["last_modified"].isoformat()).removeprefix("W/").strip('"')
    return Object(path, meta["size"], int.from_bytes(hashlib.sha256(tag.encode()).digest()[:7], "big"))


class Seekable(io.RawIOBase):
    """Base of what is read at any position without being a file; subclasses have readinto()."""

    name, mode = "", "rb"  # pydicom asks for a name; files have a mode

    def __init__(self, size: int) -> None:
        self._at, self._size = 0, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at


class Reader(Seekable):
    """The bytes of an object.

    Reading raises:
      DataError: it is another version than `source`.
      OSError: with errno, as a file's.
    """

    def __init__(self, source: Object, heartbeat: Heartbeat, item: str, first: int = HEADER_BYTES) -> None:
        """Args:
        heartbeat, item: waiting for the storage does not count against the time limit of `item`.
        first: bytes of the first request; the requests after it are larger while reading is sequential.
        """
        super().__init__(source.size)
        self._source, self._heartbeat, self._item, self._first = source, heartbeat, item, first
        self._start, self._data = 0, b""

    def readinto(self, buffer: Any, /) -> int:
        want = min(len(buffer), self._size - self._at)
        if want <= 0:
            return 0
        end = self._start + len(self._data)
        if not self._start <= self._at < end:
            ahead = 4 * len(self._data) if self._at == end and self._data else self._first
            length = min(max(ahead, want), LARGEST, self._size - self._at)
            self._start, self._data = self._at, self._fetch(self._at, length)
        part = self._data[self._at - self._start :][:want]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _fetch(self, start: int, length: int) -> memoryview:
        import obstore

        self._heartbeat(None)
        try:
            with _translated_errors():
                answer = obstore.get(*_store(self._source.path), options={"range": (start, start + length)})
                data = memoryview(answer.bytes())
        finally:
            self._heartbeat(self._item)
        if _object(self._source.path, answer.meta) != self._source:
            raise DataError(CHANGED)
        return data


# ---- stores


def _store(address: str) -> tuple[Any, str]:
    """Store and key."""
    scheme, _, place = address.partition("://")
    bucket, _, key = place.partition("/")
    return open_store(scheme, bucket), key


@functools.cache
def open_store(scheme: str, bucket: str) -> Any:
    """One per process and bucket, so that connections are reused.

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
            f"{scheme}://{bucket} needs the extra `cloud`: pip install 'curia-jax[ingest,cloud]'; or mount the bucket and name the folder (see docs/ingest_scale.md)"
        ) from error
    if not bucket or "@" in bucket:
        raise UserError(
            f"an address is {scheme}://bucket/folder, without credentials in it; they come from the environment"
        )
    endpoint = os.environ.get("GOOGLE_BASE_URL" if scheme == "gs" else "AWS_ENDPOINT_URL", "")
    client: ClientConfig = {"timeout": REQUEST_TIMEOUT, "allow_http": endpoint.startswith("http://")}
    unsigned = f"{'GOOGLE' if scheme == 'gs' else 'AWS'}_SKIP_SIGNATURE"
    public = os.environ.get(unsigned, "").lower() in ("1", "true")
    try:
        if scheme == "gs":
            google: GCSConfig = {"skip_signature": public}
            if endpoint:
                google["base_url"] = endpoint
            return GCSStore(bucket, config=google, client_options=client, retry_config=RETRIES)
        provider = None if public else Boto3CredentialProvider(boto3.Session(), ttl=CREDENTIALS_LAST)
        amazon: S3Config = {"skip_signature": public}
        if region := os.environ.get("AWS_REGION"):  # before the region of a profile, which need not be the bucket's
            amazon["region"] = region
        return S3Store(bucket, config=amazon, credential_provider=provider, client_options=client, retry_config=RETRIES)
    except (ValueError, botocore.exceptions.BotoCoreError) as error:
        raise UserError(f"{scheme}://{bucket}: {NO_CREDENTIALS} ({type(error).__name__})") from error
    except obstore.exceptions.BaseError as error:
        raise UserError(f"{scheme}://{bucket} cannot be opened: {_reason(str(error))}") from error


OTHER_REGION = "the bucket is in another region; name it in AWS_REGION"
NO_CREDENTIALS = (
    "no credentials are found; sign in as the store's own programs want it (aws configure, gcloud auth application-default "
    "login), or set AWS_SKIP_SIGNATURE=true or GOOGLE_SKIP_SIGNATURE=true for a public bucket"
)


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    """Raises errors of the store as OSErrors that name no object and have the errno that a file's would have."""
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
            "a name in it is not a path (it has //, /./ or /../ in it); rename that object, or mount the bucket",
        ) from None
    except exceptions.BaseError as error:
        if "<Code>NoSuchBucket</Code>" in str(error):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        if re.search(r"status code: 40[13]", str(error)):  # of a listing
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
        raise OSError(errno.EIO, _reason(str(error))) from None


def _reason(text: str) -> str:
    """The part of a store's message that quotes no object names."""
    if "configured region" in text:
        return OTHER_REGION
    if "token request" in text or "credential" in text.lower():
        return NO_CREDENTIALS
    status, code = re.search(r"status code: (\d{3} [A-Z][A-Za-z ]*)", text), re.search(r"<Code>(\w+)</Code>", text)
    if status:
        return f"the object storage answers {status[1].strip()}" + (f", {code[1]}" if code else "")
    return "the object storage cannot be reached" if "error sending request" in text else "the object storage fails"
