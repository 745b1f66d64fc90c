"""Where a run keeps its files: a folder, or a place in a Cloud Storage bucket, gs://bucket/run.

Both are an `epath.Path`. Both guarantee that `write_text` is atomic and that a listing shows
what was written before. A bucket has no atomic rename, no appending to objects and
no empty folders.
"""

import contextlib
import functools
import importlib.util
import logging
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from etils import epath

from curia_common import logs
from curia_common.errors import UserError

SCHEME = "gs://"
# Between two uploads of a file that grows: seconds at least and at most, and bytes a second in between.
SHORTEST, LONGEST, BYTES_PER_SECOND = 10.0, 60.0, 500_000

logger = logs.get_logger(__name__)


def is_bucket(place: str | Path | epath.Path) -> bool:
    """Whether this is a place in a bucket."""
    return str(place).startswith(SCHEME)


def root(place: str | Path | epath.Path) -> epath.Path:
    """The folder that a user names, absolute.

    Raises:
      UserError: it is an address that no run can use, or what reads buckets is not installed.
    """
    text = str(place)
    if is_bucket(text):
        _prepare()
        return epath.Path(text.rstrip("/"))
    if "://" in text:
        raise UserError(
            f"{text} is an address that runs cannot use: they take folders and {SCHEME}bucket/run; mount the bucket and name the folder"
        )
    return epath.Path(text).expanduser().absolute()


@functools.cache
def _prepare() -> None:
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{SCHEME} needs the package gcsfs; pip install 'curia-jax[cloud]'")
    # At every call it says that it cannot find out which kind of bucket this is, where nobody has logged in.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


class File(NamedTuple):
    """A file below a folder.

    Attributes:
      name: relative to that folder, with slashes.
    """

    name: str
    path: epath.Path


def files(folder: epath.Path, prefix: str = "") -> Iterator[File]:
    """All files below a folder, in the order of their names. A recursive glob is refused by epath in a bucket."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.is_dir():
            yield from files(path, f"{prefix}{path.name}/")
        elif path.name:  # a bucket's folder may be an empty object
            yield File(f"{prefix}{path.name}", path)


def write_text(path: epath.Path, text: str) -> None:
    """Replaces a file in one step."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Replaces a file in one step: by a rename, in a bucket by its nature."""
    if is_bucket(path):
        path.write_bytes(content)
        return
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(content)
    beside.replace(path)


def remove(folder: epath.Path) -> None:
    """Removes a folder and what is in it, if it is there."""
    if folder.exists():
        folder.rmtree(missing_ok=True)


def check_writable(place: str) -> epath.Path:
    """The folder that a user names, made where it is missing.

    Raises:
      UserError: nothing can be written, read and removed there.
    """
    folder = root(place)
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        found = probe.read_text()
        probe.unlink()
    except Exception as error:  # what gcsfs raises, too
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        login = "; is there such a bucket, and may this account write there" if is_bucket(folder) else ""
        raise UserError(
            f"cannot write to the work directory {place} ({reason}){login}; choose another --workdir"
        ) from error
    if found != "x":
        raise UserError(
            f"the work directory {place} does not give back what is written there; choose another --workdir"
        )
    return folder


class Spool:
    """The folder in which a run writes what it appends to: logs, metrics, TensorBoard events and profiles.

    For a bucket it is a temporary folder, whose files are uploaded whole as they grow: at least every 60 s, and at the end. Parts
    that are never written again would be cheaper to upload, but there would be 30,000 of them after three weeks, and no reader of
    metrics.jsonl knows them.

    Args:
      names: files of an earlier start that this one appends to.

    Attributes:
      folder: the work directory itself where that is no bucket.
    """

    current: "Spool | None" = None

    def __init__(self, workdir: str, names: Sequence[str] = ()) -> None:
        self._bucket = root(workdir) if is_bucket(workdir) else None
        self._uploaded: dict[str, tuple[int, int]] = {}  # size and time of change
        self._due: dict[str, float] = {}
        self._uploading, self._done, self._failing = threading.Lock(), threading.Event(), False
        if self._bucket is None:
            self.folder = Path(workdir)
            return
        self.folder = Path(tempfile.mkdtemp(prefix="curia-run-"))
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                content = (self._bucket / name).read_bytes()
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(content)
        Spool.current = self
        threading.Thread(target=self._run, name="spool", daemon=True).start()

    def _run(self) -> None:
        while not self._done.wait(1.0):
            self.upload(wait=False)

    def upload(self, *, wait: bool = True) -> None:
        """Uploads what has changed. What fails is a warning, and tried again.

        Args:
          wait: also what was uploaded a moment ago.
        """
        with self._uploading:
            if self._bucket is None or not self.folder.is_dir():
                return
            try:
                for name, path in files(epath.Path(self.folder)):
                    state = Path(path).stat()
                    change = state.st_size, state.st_mtime_ns
                    if self._uploaded.get(name) == change or not (wait or time.monotonic() >= self._due.get(name, 0.0)):
                        continue
                    (self._bucket / name).write_bytes(path.read_bytes())
                    self._uploaded[name] = change
                    pause = min(max(SHORTEST, state.st_size / BYTES_PER_SECOND), LONGEST)
                    self._due[name] = time.monotonic() + pause
                self._failing = False
            except Exception as error:  # noqa: BLE001 - logs never end a run
                if not self._failing:
                    logger.warning(
                        f"cannot upload logs to {self._bucket} ({type(error).__name__}); the run continues and will try again"
                    )
                self._failing = True

    def close(self) -> None:
        """Uploads what is left, and removes the temporary folder."""
        self._done.set()
        if self._bucket is None:
            return
        self.upload()
        Spool.current = None
        if not self._failing:  # else it is all that is left of them
            shutil.rmtree(self.folder, ignore_errors=True)


def upload_now() -> None:
    """Uploads what the run of this process has logged, if it runs in a bucket."""
    if Spool.current is not None:
        Spool.current.upload()
