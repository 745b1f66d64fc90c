"""Shards in a bucket: what is mounted, and where the command reads them."""

import pytest

from curia_common.errors import UserError
from launch import buckets
from tests.launch.clouds import spec_of
from tests.launch.test_spec import made

OPTION = "--config.data.shards"


def test_folder_of_a_bucket_is_mounted_and_read_there() -> None:
    spec = spec_of("gke", "v5e:4x4", f"{OPTION}=gs://data/ct/thin/", shards_cache_gib=3)
    mount = buckets.shards_of(spec)
    assert mount is not None and mount[:2] == ("data", "ct/thin")
    assert mount.options()["only-dir"] == "ct/thin" and mount.options()["file-cache:max-size-mb"] == "3072"
    assert buckets.argv_of(spec) == (*spec.argv, f"{OPTION}={mount.path}")


def test_shards_in_a_folder_need_no_mount_and_are_not_in_the_cloud() -> None:
    spec = spec_of("gke", "v5e:4x4", f"{OPTION}=/data/ct")
    assert buckets.shards_of(spec) is None and buckets.argv_of(spec) == spec.argv
    with pytest.raises(UserError, match=f"{OPTION}=/data/ct is a folder that hosts of the cloud do not have"):
        buckets.check(spec)


def test_shards_without_a_cache_are_a_note_and_a_cache_needs_shards() -> None:
    [note] = buckets.check(spec_of("gke", "v5e:4x4", f"{OPTION}=gs://data/ct"))
    assert note.startswith("each image will be a request to gs://data; --shards-cache=GIB")
    assert buckets.check(spec_of("gke", "v5e:4x4", f"{OPTION}=gs://data/ct", shards_cache_gib=3)) == ()
    with pytest.raises(UserError, match="--shards-cache=3 is for shards in a bucket; set --config.data.shards=gs://"):
        buckets.check(spec_of("gke", "v5e:4x4", shards_cache_gib=3))


def test_address_without_a_bucket_is_refused() -> None:
    with pytest.raises(UserError, match="names no bucket; write gs://BUCKET/FOLDER"):
        buckets.shards_of(spec_of("gke", "v5e:4x4", f"{OPTION}=gs:///ct"))


def test_folders_of_a_mixture_are_read_below_one_mount() -> None:
    spec = spec_of("gke", "v5e:4x4", f"{OPTION}=gs://data/a/ct:0.7,gs://data/a/mr/new/:0.3")
    mount = buckets.shards_of(spec)
    assert mount is not None and mount[:2] == ("data", "a")
    assert buckets.argv_of(spec)[-1] == f"{OPTION}={mount.path}/ct:0.7,{mount.path}/mr/new:0.3"
    spec = spec_of("gke", "v5e:4x4", f"{OPTION}=gs://data/ct:1,gs://data/mr:1")
    assert buckets.argv_of(spec)[-1] == f"{OPTION}={buckets.PATH}/ct:1,{buckets.PATH}/mr:1"


def test_data_of_a_fine_tuning_is_mounted_and_read_there() -> None:
    words = "finetune --config=finetune_vit --from=gs://data/b16 --task=ich --workdir=gs://runs/ich --cache=/tmp/c --data=gs://data/bench:1,a"
    mount = buckets.shards_of(spec := made(words, target="gke", shards_cache_gib=3))
    assert mount is not None and mount[:2] == ("data", "bench:1,a")  # a folder, not a mixture
    assert mount.options()["only-dir"] == "bench:1,a"
    assert buckets.argv_of(spec) == (*spec.argv, f"--data={mount.path}")
    assert buckets.check(spec) == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--from=none --data=bench", "--data=bench is a folder that hosts of the cloud do not have; write gs://"),
        ("--from=runs/b16 --data=gs://data/bench", "--from=runs/b16 is a folder that hosts of the cloud do not have"),
    ],
)
def test_folder_that_a_fine_tuning_in_the_cloud_lacks_is_refused(words: str, message: str) -> None:
    spec = made(
        f"finetune --config=finetune_vit --task=ich --workdir=gs://runs/ich --cache=/tmp/c {words}", target="gke"
    )
    with pytest.raises(UserError, match=message):
        buckets.check(spec)


@pytest.mark.parametrize("other", ["gs://others/mr", "/data/mr"])
def test_mixture_beyond_one_bucket_is_refused(other: str) -> None:
    with pytest.raises(UserError, match="one bucket is mounted; copy all folders of the mixture to one"):
        buckets.shards_of(spec_of("gke", "v5e:4x4", f"{OPTION}=gs://data/ct:1,{other}:1"))
