import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from curia_common.errors import DataError, StorageError, UserError
from data_pipeline.format import shards
from data_pipeline.format.records import DecodedSlice
from data_pipeline.stages import pseudonyms


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "copy")


def shard_of(folder: Path, split: str = "train") -> Path:
    return sorted(folder.glob(f"*-{split}.array_record-*"))[0]


def read_all(folder: Path, split: str = "train") -> list[DecodedSlice]:
    source = shards.SliceSource(folder, split)
    return [source[n] for n in range(len(source))]


# ---- writing


def test_records_are_written_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x"
    count, digest = shards.write(path, (bytes([n]) * 100 for n in range(7)))
    assert (count, digest) == (7, shards.sha256(path))
    assert shards.write(tmp_path / "y", (bytes([n]) * 100 for n in range(7)))[1] == digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    shards.write(path, [b"old"])
    before = path.read_bytes()

    def items():
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        shards.write(path, items())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_shard_written_in_scratch_is_copied_and_compared(tmp_path: Path, monkeypatch) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    items = [bytes([n]) * 100 for n in range(7)]
    assert shards.write(out / "x", items, scratch) == shards.write(tmp_path / "y", items)
    assert (out / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert list(scratch.iterdir()) == []

    def copy_badly(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(shards.shutil, "copyfile", copy_badly)
    with pytest.raises(StorageError, match="its copy reads back changed"):
        shards.write(out / "z", items, scratch)
    assert list(scratch.iterdir()) == [] and [path.name for path in out.iterdir()] == ["x"]


def test_records_that_read_back_changed_are_not_published(tmp_path: Path, monkeypatch) -> None:
    class Flipping(shards.array_record_module.ArrayRecordWriter):
        def write(self, item: bytes) -> bool:
            return super().write(item[:-1] + b"?")

    monkeypatch.setattr(shards.array_record_module, "ArrayRecordWriter", Flipping)
    with pytest.raises(StorageError, match="x: record 0 reads back changed; is the disk failing"):
        shards.write(tmp_path / "x", [b"good"])
    assert list(tmp_path.iterdir()) == []


# ---- reading


def test_slices_are_in_the_order_of_the_index(dataset: Path) -> None:
    for split in pseudonyms.SPLITS:
        source = shards.SliceSource(dataset, split)
        assert len(source) == source.index.num_rows > 0
        for n, row in enumerate(source.index.to_pylist()):
            one = source[n]
            assert (one.series, one.patient, one.modality) == (row["series"], row["patient"], row["modality"])
            assert one.pixels.shape == (row["height"], row["width"])
            assert one.mean == pytest.approx(row["mean"])
    for n in (-1, len(source)):
        with pytest.raises(IndexError):
            source[n]


def test_read_into_equals_reading_one_by_one(dataset: Path) -> None:
    source = shards.SliceSource(dataset, "train")
    numbers = np.random.default_rng(0).permutation(len(source)).tolist()
    images = np.full((len(numbers), 44, 50), 9, np.uint16)
    sizes, facts = source.read_into(numbers, images)
    for number, image, (height, width), known in zip(numbers, images, sizes, facts, strict=True):
        one = source[number]
        np.testing.assert_array_equal(image[:height, :width], one.pixels)
        assert not image[height:].any() and not image[:, width:].any()
        assert known == one.facts
    with pytest.raises(ValueError, match="do not fit into images of"):
        source.read_into([0], np.empty((1, 39, 50), np.uint16))
    with pytest.raises(IndexError):
        source.read_into([len(source)], images[:1])


def test_damaged_record_is_named(copy: Path) -> None:
    first = sorted(copy.glob("*-train.array_record-*"))[0]
    table = pq.read_table(copy / shards.SHARDS).to_pydict()
    count = dict(zip(table["file"], table["records"], strict=True))[first.name]
    size = first.stat().st_size
    shards.write(first, [b"no record"] * count)
    first.write_bytes(first.read_bytes().ljust(size, b"\0")[:size])
    source = shards.SliceSource(copy, "train")
    with pytest.raises(DataError, match=f"{first.name}, record 0, is damaged"):
        source[0]
    with pytest.raises(DataError, match=f"{first.name}, record 0, is damaged"):
        source.read_into([0], np.empty((1, *source.largest), np.uint16))


@pytest.mark.parametrize(
    "header", [{"slope": float("nan")}, {"slope": 3e38}, {"intercept": float("inf")}], ids=["nan", "large", "infinite"]
)
def test_record_whose_values_are_no_measurements_is_named(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, header: dict[str, float]
) -> None:
    source = shards.SliceSource(dataset, "train")
    read = shards.records.training_slice

    def other(data: bytes, slot: int) -> tuple:
        one, facts = read(data, slot)
        return one, facts._replace(**header)

    monkeypatch.setattr(shards.records, "training_slice", other)
    with pytest.raises(
        DataError, match=r"shard .*, record 0, has a slope of .* which are no measurements; copy it again"
    ):
        source.read_into([0], np.empty((1, *source.largest), np.uint16))


def test_shard_that_is_truncated_while_it_is_read_is_named(copy: Path) -> None:
    source = shards.SliceSource(copy, "train")
    images = np.empty((1, *source.largest), np.uint16)
    source.read_into([0], images)
    shard = shard_of(copy)
    with shard.open("r+b") as file:
        file.truncate(10)
    with pytest.raises(DataError, match=f"{shard.name}, record 0, is damaged"):
        source.read_into([0], images)


def test_check_of_the_shards_names_the_swapped_ones(copy: Path) -> None:
    assert set(shards.SliceSource(copy, "train").check_shards(rest=0)) == {None}
    table = pq.read_table(copy / shards.SHARDS)
    first, second = sorted(copy.glob("*-train.array_record-*"))[:2]
    one, other = first.read_bytes(), second.read_bytes()
    size = max(len(one), len(other))  # of the same size, so that nothing but the bytes tells them apart
    first.write_bytes(other.ljust(size, b"\0"))
    second.write_bytes(one.ljust(size, b"\0"))
    names = table["file"].to_pylist()
    sizes = [
        size if name in (first.name, second.name) else n
        for name, n in zip(names, table["bytes"].to_pylist(), strict=True)
    ]
    pq.write_table(table.set_column(table.schema.get_field_index("bytes"), "bytes", [sizes]), copy / shards.SHARDS)
    found = [problem for problem in shards.SliceSource(copy, "train").check_shards(1, rest=0) if problem]
    assert sorted(found) == [
        f"shard {path} has other bytes than were published; copy it again or build it again" for path in (first, second)
    ]


def test_shard_dropped_from_the_table_is_found(copy: Path) -> None:
    table = pq.read_table(copy / shards.SHARDS)
    name = shard_of(copy).name
    pq.write_table(table.filter(pc.field("file") != name), copy / shards.SHARDS)
    with pytest.raises(DataError, match=rf"lists {len(table) - 1} shards, but was written with {len(table)}; "):
        shards.SliceSource(copy, "train")


def test_largest_bounds_every_slice(dataset: Path) -> None:
    assert shards.SliceSource(dataset, "train").largest == (40, 40)


def test_source_can_be_pickled_and_read_by_threads(dataset: Path) -> None:
    source = shards.SliceSource(dataset, "train")
    wanted = [source[n].pixels.sum() for n in range(len(source))]
    copied = pickle.loads(pickle.dumps(source))
    found: dict[int, int] = {}

    def read(first: int) -> None:
        for n in range(first, len(copied), 4):
            found[n] = copied[n].pixels.sum()

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(wanted))] == wanted


def test_missing_folder_or_split_is_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no shards in .*data_pipeline.build writes one"):
        shards.SliceSource(tmp_path, "train")
    with pytest.raises(UserError, match="no split 'dev' in .*there are: test, train, validation"):
        shards.SliceSource(dataset, "dev")


# ---- damage


def test_missing_or_truncated_shard_is_named_at_opening(copy: Path) -> None:
    shard = shard_of(copy)
    data = shard.read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], b"", data + b"\0"):
        shard.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            shards.SliceSource(copy, "train")
        assert str(caught.value) == (
            f"shard {shard} has {len(damaged):,} bytes, published with {len(data):,} bytes; copy it again or build it again"
        )
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name} is missing, published with"):
        shards.SliceSource(copy, "train")
    assert shards.SliceSource(copy, "test")  # the other splits are whole


def test_zeroed_shard_is_named_at_first_read(copy: Path) -> None:
    shard = shard_of(copy)
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataError, match=f"{shard.name} (holds 0 readable records|is damaged)"):
        read_all(copy)


def test_flipped_bit_is_never_read_as_pixels(copy: Path) -> None:
    whole = [one.pixels for one in read_all(copy)]
    shard = shard_of(copy)
    data = shard.read_bytes()
    used = len(data.rstrip(b"\0"))
    noticed = 0
    for at in np.random.default_rng(0).integers(0, used, 40):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (int(at) % 8)
        shard.write_bytes(flipped)
        try:
            found = read_all(copy)
        except DataError as error:
            assert shard.name in str(error) and ("damaged" in str(error) or "readable records" in str(error))
            noticed += 1
        else:  # in the padding between blocks
            for one, pixels in zip(found, whole, strict=True):
                np.testing.assert_array_equal(one.pixels, pixels)
    assert noticed > 10


def test_shard_of_another_dataset_is_rejected(copy: Path) -> None:
    first, second = sorted(copy.glob("*-train.array_record-*"))[:2]
    table = pq.read_table(copy / shards.SHARDS).to_pydict()
    records = dict(zip(table["file"], table["records"], strict=True))
    if first.stat().st_size != second.stat().st_size or records[first.name] == records[second.name]:
        shards.write(second, [b"x"] * (records[first.name] + 1))
    first.write_bytes(second.read_bytes().ljust(first.stat().st_size, b"\0")[: first.stat().st_size])
    with pytest.raises(DataError, match=f"shard .*{first.name} .*(published with|damaged)"):
        read_all(copy)


def test_damaged_table_is_named(copy: Path) -> None:
    (copy / shards.SHARDS).write_bytes((copy / shards.SHARDS).read_bytes()[:100])
    with pytest.raises(DataError, match="shards.parquet is damaged"):
        shards.SliceSource(copy, "train")


def test_shard_of_which_nothing_is_left_is_sound(copy: Path) -> None:
    table = pq.read_table(copy / "shards.parquet")
    first = table.slice(0, 1).to_pylist()[0]
    empty = first | {"records": 0, "slices": 0, "largest_height": 0, "largest_width": 0, "slice_counts": []}
    pq.write_table(pa.Table.from_pylist([empty], schema=table.schema), copy / "shards.parquet")
    assert shards.read_shards(copy)["records"].to_pylist() == [0]
    for wrong in ({"records": 1}, {"slices": 1}, {"largest_height": 1}, {"bytes": 0}):
        pq.write_table(pa.Table.from_pylist([empty | wrong], schema=table.schema), copy / "shards.parquet")
        with pytest.raises(DataError, match="cannot be right"):
            shards.read_shards(copy)


def test_opening_reads_no_shard(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Thousands of shards on object storage must not be opened before the first read.
    opened: list[str] = []
    reader: Callable = shards.array_record_module.ArrayRecordReader
    monkeypatch.setattr(
        shards.array_record_module,
        "ArrayRecordReader",
        lambda path, options: opened.append(path) or reader(path, options),
    )
    source = shards.SliceSource(dataset, "train")
    assert opened == []
    source[0], source[1]
    assert len(opened) == 1
