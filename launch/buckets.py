"""Shards, and the images of tasks, in a Cloud Storage bucket, as a read-only mount on every host.

Training reads records in random order, each 40 to 210 kB (docs/loader.md). Without a cache that is one request per image and epoch: at
$0.0004 per 1,000 requests and 100,000 images a second $144 an hour, and twenty times the rate at which a bucket starts. With
a cache that holds the dataset, each host reads every shard once.
"""

import posixpath
from typing import NamedTuple

from curia_common import mixtures
from curia_common.errors import UserError
from launch.spec import LaunchSpec

PATH = "/mnt/curia-shards"
SCHEME = "gs://"
START, SCRATCH = "--from", "none"  # the weights that a run starts from, and random ones


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
    """The mount for the data that a command reads; None where it is not in a bucket. Of a mixture, the folder that holds all.

    Raises:
      UserError: an address names no bucket, or the folders of a mixture are in several buckets, or not all in one.
    """
    addresses = [part.folder for part in spec.data]
    if not any(address.startswith(SCHEME) for address in addresses):
        return None
    text = f"{spec.data_option}={spec.option(spec.data_option)}"
    places = [address.removeprefix(SCHEME).partition("/") for address in addresses]
    if not all(address.startswith(SCHEME) for address in addresses) or len({bucket for bucket, *_ in places}) > 1:
        raise UserError(f"{text}: one bucket is mounted; copy all folders of the mixture to one")
    bucket = places[0][0]
    if not bucket:
        raise UserError(f"{text} names no bucket; write gs://BUCKET/FOLDER")
    folder = posixpath.commonpath([folder.strip("/") for _, _, folder in places])
    return Mount(bucket, folder, PATH, spec.shards_cache_gib)


def check(spec: LaunchSpec) -> tuple[str, ...]:
    """Refuses data and weights that hosts of the cloud cannot read.

    Returns:
      What the user should know before a submission: that each image will be a request.

    Raises:
      UserError: data or weights that are not in a bucket, or a cache without data in a bucket.
    """
    shards = shards_of(spec)
    weights = spec.option(START)
    places = [(spec.data_option, part.folder) for part in spec.data]
    places += [(START, weights)] if weights and weights != SCRATCH else []
    for option, folder in places:
        if not folder.startswith(SCHEME):
            raise UserError(
                f"{option}={folder} is a folder that hosts of the cloud do not have; write gs://BUCKET/FOLDER"
            )
    if shards is None and spec.shards_cache_gib:
        raise UserError(
            f"--shards-cache={spec.shards_cache_gib} is for shards in a bucket; set {spec.data_option}=gs://…"
        )
    if shards is None or shards.cache_gib:
        return ()
    return (
        f"each image will be a request to gs://{shards.bucket}; --shards-cache=GIB of at least the size of the shards avoids that",
    )


def argv_of(spec: LaunchSpec) -> tuple[str, ...]:
    """The command of every process, which reads its data where it is mounted."""
    shards = shards_of(spec)
    if shards is None:
        return spec.argv
    top = f"{SCHEME}{shards.bucket}/{shards.folder}"
    mounted = [
        part._replace(folder=posixpath.normpath(f"{PATH}/{posixpath.relpath(part.folder, top)}")) for part in spec.data
    ]
    return (*spec.argv, f"{spec.data_option}={mixtures.write(mounted)}")  # the last one counts
