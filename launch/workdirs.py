"""What a launcher reads from a work directory: a folder of this machine, or a place in a Cloud Storage bucket.

The names are those of curia_jax.checkpoint and curia_jax.workdir, which a launcher does not import.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

from curia_common.errors import StorageError, UserError

SCHEME = "gs://"
CHECKPOINTS, MARKER = "checkpoints", "commit_success.txt"  # the marker is written last, when a checkpoint is whole
LOOK_SECONDS = 30  # gcsfs would try for minutes
CONFIG, EVENTS = "config.json", "events.jsonl"


def is_bucket(workdir: str) -> bool:
    """Whether this is a place in a bucket."""
    return workdir.startswith(SCHEME)


def may_look(workdir: str, *, contact: bool) -> bool:
    """Whether a check before the launch looks into a work directory: a bucket where the cloud may be contacted and gcsfs is installed."""
    return "://" not in workdir or (contact and is_bucket(workdir) and importlib.util.find_spec("gcsfs") is not None)


def newest_checkpoint(workdir: str | None) -> int | None:
    """Step of the newest checkpoint that was finished; None where there is none.

    Raises:
      StorageError: the bucket cannot be read now.
      UserError: what reads buckets is not installed.
    """
    if workdir is None:
        return None
    if is_bucket(workdir):
        found = _in_bucket(workdir, "glob", f"{CHECKPOINTS}/*/{MARKER}")
    else:
        found = Path(workdir, CHECKPOINTS).glob(f"*/{MARKER}")
    folders = (Path(path).parent.name for path in found)
    return max((int(name) for name in folders if name.isdecimal()), default=None)


def read(workdir: str, name: str) -> str | None:
    """Text of a file of a work directory; None where there is none.

    Raises:
      StorageError, UserError: as `newest_checkpoint`.
    """
    try:
        if is_bucket(workdir):
            return _in_bucket(workdir, "cat_file", name).decode()
        return Path(workdir, name).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError(
            f"cannot read {workdir}/{name} ({error.strerror}); give this account access to it"
        ) from error


def _in_bucket(workdir: str, method: str, name: str) -> Any:
    """What a method of gcsfs says of a name below the work directory, past its cache of listings."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{SCHEME} needs the package gcsfs; pip install 'curia-jax[cloud]'")
    import gcsfs

    # At every call it says that it cannot find out which kind of bucket this is, where nobody has logged in.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        return getattr(gcsfs.GCSFileSystem(use_listings_cache=False), method)(
            f"{workdir.rstrip('/')}/{name}", timeout=LOOK_SECONDS
        )
    except FileNotFoundError:
        raise
    except Exception as error:  # gcsfs raises what its libraries do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise StorageError(
            f"cannot look into {workdir} ({reason}); is there such a bucket, and may this account read it: gcloud auth application-default login"
        ) from error
