"""Shards in a Cloud Storage bucket, as a read-only mount on every host.

Training reads records in random order, each 40 to 210 kB (docs/loader.md). Without a cache that is one request per image and epoch: at
$0.0004 per 1,000 requests and 100,000 images a second $144 an hour, and twenty times the rate at which a bucket starts. With
a cache that holds the dataset, each host reads every shard once.
"""

import posixpath
from typing import NamedTuple

from curia_common import mixtures
from curia_common.errors import UserError
from launch.spec import LaunchSpec

SHARDS_OPTION = mixtures.OPTION
PATH = "/mnt/curia-shards"
SCHEME = "gs://"


class Mount(NamedTuple):
    """A folder of a bucket, and where hosts see it.

    Attributes:
      folder: inside the bucket; "" for all of it.
      cache_gib: memory of each host that keeps shards; 0 for none.
    """

    bucket: str
    folder: str
    path: str
    cache_gib: int

    def options(self) -> dict[str, str]:
        """Options of gcsfuse in the form of its config file, section:option. github.com/GoogleCloudPlatform/gcsfuse, cfg/params.yaml"""
        chosen = {
            "implicit-dirs": "true",  # folders that were uploaded without an object of their own
            "metadata-cache:ttl-secs": "-1",  # shards never change
            "metadata-cache:stat-cache-max-size-mb": "-1",
            "metadata-cache:type-cache-max-size-mb": "-1",
        }
        if self.folder:
            chosen["only-dir"] = self.folder
        if self.cache_gib:
            chosen |= {
                "file-cache:max-size-mb": str(self.cache_gib * 1024),
                "file-cache:cache-file-for-range-read": "true",  # the first record that is read fetches its shard
                "file-cache:enable-parallel-downloads": "true",
            }
        return chosen


def shards_of(spec: LaunchSpec) -> Mount | None:
    """The mount for the shards that a command reads; None where they are not in a bucket. Of a mixture, the folder that holds all.

    Raises:
      UserError: an address names no bucket, or the folders of a mixture are in several buckets, or not all in one.
    """
    text = spec.option(SHARDS_OPTION)
    addresses = [part.folder for part in mixtures.parse(text)] if text else []
    if not any(address.startswith(SCHEME) for address in addresses):
        return None
    places = [address.removeprefix(SCHEME).partition("/") for address in addresses]
    if not all(address.startswith(SCHEME) for address in addresses) or len({bucket for bucket, *_ in places}) > 1:
        raise UserError(f"{SHARDS_OPTION}={text}: one bucket is mounted; copy all folders of the mixture to one")
    bucket = places[0][0]
    if not bucket:
        raise UserError(f"{SHARDS_OPTION}={text} names no bucket; write gs://BUCKET/FOLDER")
    folder = posixpath.commonpath([folder.strip("/") for _, _, folder in places])
    return Mount(bucket, folder, PATH, spec.shards_cache_gib)


def check(spec: LaunchSpec) -> tuple[str, ...]:
    """Refuses shards that hosts of the cloud cannot read.

    Returns:
      What the user should know before a submission: that each image will be a request.

    Raises:
      UserError: shards that are not in a bucket, or a cache without shards in a bucket.
    """
    shards = shards_of(spec)
    folder = spec.option(SHARDS_OPTION)
    if folder and shards is None:
        raise UserError(
            f"{SHARDS_OPTION}={folder} is a folder that hosts of the cloud do not have; write gs://BUCKET/FOLDER"
        )
    if shards is None and spec.shards_cache_gib:
        raise UserError(f"--shards-cache={spec.shards_cache_gib} is for shards in a bucket; set {SHARDS_OPTION}=gs://…")
    if shards is None or shards.cache_gib:
        return ()
    return (
        f"each image will be a request to gs://{shards.bucket}; --shards-cache=GIB of at least the size of the shards avoids that",
    )


def argv_of(spec: LaunchSpec) -> tuple[str, ...]:
    """The command of every process, which reads shards where they are mounted."""
    shards = shards_of(spec)
    if shards is None:
        return spec.argv
    top = f"{SCHEME}{shards.bucket}/{shards.folder}"
    mounted = [
        part._replace(folder=posixpath.normpath(f"{PATH}/{posixpath.relpath(part.folder, top)}"))
        for part in mixtures.parse(spec.option(SHARDS_OPTION) or "")
    ]
    return (*spec.argv, f"{SHARDS_OPTION}={mixtures.write(mounted)}")  # the last one counts
