"""Archives and DICOMDIR as inputs: what is read, what is refused, and that no copy stays on the disk."""

import contextlib
import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curia_common.errors import DataError, StorageError
from curia_common.exit_codes import ExitCode
from data_pipeline.sources import archives, dicom_pixels, object_stores
from data_pipeline.sources.base import ReadError
from data_pipeline.stages import convert, inventory
from tests.data_pipeline.packing import compress, pack, write_dicomdir

KINDS = ("zip", "stored.zip", "tar", "tar.gz", "tgz", "tar.zst", "tar.bz2", "tar.xz")
KEY = b"0123456789abcdef"


def listing(path: Path, limit: int = 1 << 30, folder: Path | None = None) -> archives.Listing:
    folder = folder or path.parent / "unpacked"
    return archives.list_members((str(path), str(folder), limit), {}, lambda item: None)


def problems(path: Path) -> dict[str, str]:
    """What is wrong with each member."""
    found = listing(path)
    assert found.problem == ""
    return {member.name: member.problem for member in found.members}


def materialize(member: archives.Member, folder: Path) -> contextlib.AbstractContextManager[str]:
    source = object_stores.Object(member.path, member.size, member.modified_ns)
    return archives.materialize(source, member, str(folder), str(folder), lambda item: None)


def content(member: archives.Member, folder: Path) -> bytes:
    with materialize(member, folder) as path:
        data = Path(path).read_bytes()
    source = object_stores.Object(member.path, member.size, member.modified_ns)
    with archives.stream(source, member, str(folder), lambda item: None) as file:
        assert file.read() == data
    return data


# ---- builds


@pytest.fixture(scope="module")
def from_folder(tmp_path_factory: pytest.TempPathFactory, write_dicom, run_build) -> tuple[dict[str, bytes], list]:
    """A series and a volume as files by name, and the rows of the dataset that is made of them."""
    folder = tmp_path_factory.mktemp("folder") / "exams"
    for n in range(5):
        write_dicom(folder / "CT" / f"{n}.dcm", ImagePositionPatient=[0, 0, 2 * n])
    values = np.random.default_rng(1).integers(0, 900, (40, 42, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 1, 5, 1])), folder / "brain.nii.gz")
    labels = (values > 450).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([1, 1, 5, 1])), folder / "brain_seg.nii.gz")
    (folder / "notes.txt").write_text("x")
    result = run_build("--input", folder, "--output", folder.parent / "out")
    assert result.code == 0, result.err
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return files, slices(folder.parent / "out")


def slices(output: Path) -> list[tuple]:
    names = ("source", "index", "position", "modality", "plane", "mean")
    rows = pq.read_table(output / "index.parquet").to_pylist()
    return sorted(tuple(row[name] for name in names) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_archive_gives_the_slices_of_its_folder(tmp_path: Path, from_folder, run_build, manifest, kind) -> None:
    files, wanted = from_folder
    path = pack(tmp_path / f"exams.{kind}", files)
    result = run_build("--input", path, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert slices(tmp_path / "out") == wanted
    rows = manifest(tmp_path / "out")
    assert set(rows) == {f"{path}!/{name}" for name in files}
    fates = {name.split("!/")[1]: (row["fate"], row["reason"]) for name, row in rows.items()}
    assert fates["CT/0.dcm"] == fates["brain.nii.gz"] == ("kept", "")
    assert fates["notes.txt"] == ("excluded", inventory.NO_IMAGE)
    assert fates["brain_seg.nii.gz"] == ("excluded", "label map: whole numbers in regions of one value")
    assert not Path(archives.folder(tmp_path / "out")).exists()
    assert set(tmp_path.iterdir()) == {path, tmp_path / "out"}


def test_archives_among_other_files_are_read_by_worker_processes(
    tmp_path: Path, from_folder, run_build, manifest
) -> None:
    files, wanted = from_folder
    (tmp_path / "in" / "a").mkdir(parents=True)
    series = {name: data for name, data in files.items() if name.startswith("CT")}
    pack(tmp_path / "in" / "a" / "one.tar.gz", {name: series[name] for name in list(series)[:3]})
    pack(tmp_path / "in" / "two.zip", {name: series[name] for name in list(series)[3:]})
    (tmp_path / "in" / "brain.nii.gz").write_bytes(files["brain.nii.gz"])
    result = run_build("--input", tmp_path / "in", "--output", tmp_path / "out", processes=2)
    assert result.code == 0, result.err
    assert slices(tmp_path / "out") == wanted  # one series out of two archives
    assert "archives: 2 files" in result.err and "inventory: 6 files" in result.err


def test_damaged_archives_lose_only_damaged_members(tmp_path: Path, from_folder, run_build, manifest) -> None:
    files, _ = from_folder
    place = tmp_path / "in"
    place.mkdir()
    series = {name: data for name, data in files.items() if name.startswith("CT")}
    for kind in ("zip", "tar", "tar.gz", "tar.zst"):
        path = pack(place / f"cut.{kind}", {f"{kind}/{name}": data for name, data in series.items()})
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) * 6 // 10])
    path = pack(place / "flipped.stored.zip", {"a.dcm": series["CT/0.dcm"], "b.dcm": series["CT/1.dcm"]})
    data = bytearray(path.read_bytes())
    data[len(series["CT/0.dcm"]) - 40] ^= 0x10
    path.write_bytes(data)
    (place / "text.zip").write_text("no archive at all")
    (place / "text.tar").write_text("no archive at all")
    compress(place / "text.tar.gz", b"no archive at all" * 100)
    (place / "noise.tar.gz").write_bytes(b"\x1f\x8b" + bytes(range(256)))
    (place / "empty.zip").write_bytes(b"")
    pack(place / "hollow.tar", {})
    result = run_build("--input", place, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    rows = {
        Path(path).name if "!" not in path else path.split("in/")[1]: row
        for path, row in manifest(tmp_path / "out").items()
    }
    reasons = {name: row["reason"] for name, row in rows.items() if "!" not in name}
    assert {row["fate"] for name, row in rows.items() if "!" not in name} == {"quarantined"}
    assert reasons == {
        "cut.zip": "damaged zip archive: its table of contents cannot be read (BadZipFile)",
        "cut.tar": "cut off: the end of the archive is missing",
        "cut.tar.gz": "damaged archive: it cannot be decompressed to its end (EOFError)",
        "cut.tar.zst": "damaged archive: it cannot be decompressed to its end (OSError)",
        "text.zip": "damaged zip archive: its table of contents cannot be read (BadZipFile)",
        "text.tar": "damaged tar archive: it does not begin with a member",
        "text.tar.gz": "damaged archive: it holds no tar archive",
        "noise.tar.gz": "damaged archive: it cannot be decompressed to its end (BadGzipFile)",
        "empty.zip": "empty file",
        "hollow.tar": "an archive without files",
    }  # fmt: skip
    assert rows["cut.tar!/tar/CT/0.dcm"]["fate"] == "kept"
    cut = [
        row for name, row in rows.items() if name.startswith("cut.tar!") and row["reason"] == "cut off with its archive"
    ]
    assert len(cut) == 1
    assert rows["flipped.stored.zip!/a.dcm"]["reason"] == "damaged in its archive: its checksum is wrong"


def test_label_table_names_archive_members(tmp_path: Path, run_build) -> None:
    def png(seed: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40)).astype(np.uint8)).save(file, "PNG")
        return file.getvalue()

    pack(tmp_path / "p.zip", {f"{n}.png": png(n) for n in range(3)})
    (tmp_path / "labels.csv").write_text("file,grade\np.zip!/0.png,1\np.zip!/2.png,2\n")
    words = ("--input", tmp_path / "p.zip", "--labels", tmp_path / "labels.csv", "--label-columns", "grade")
    result = run_build(*words, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    found = pq.read_table(tmp_path / "out" / "index.parquet")["label_grade"].to_pylist()
    assert Counter(found) == {1: 1, 2: 1, None: 1}


def test_resumed_build_reuses_unpacked_copies_of_unchanged_archives(
    tmp_path: Path, from_folder, run_build, monkeypatch
) -> None:
    files, wanted = from_folder
    path = pack(tmp_path / "exams.tar.gz", files)
    words = ("--input", path, "--output", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert_shard", lambda *task, **more: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_build(*words).code == ExitCode.RESTART
    (copy,) = (tmp_path / "out" / ".build" / "unpacked").glob("*.tar")
    for private in (copy, copy.with_name(f"{copy.name}.json")):
        assert private.stat().st_mode & 0o077 == 0
    unpack, unpacked = gzip.open, []
    monkeypatch.setattr(gzip, "open", lambda *given: unpacked.append(1) or unpack(*given))
    listing(path, folder=copy.parent)
    assert len(unpacked) == 0
    pack(path, files | {"CT/5.dcm": b"x"})
    listing(path, folder=copy.parent)
    assert len(unpacked) == 1
    assert run_build(*words).code == 0
    assert len(unpacked) == 1 and slices(tmp_path / "out") == wanted
    assert not copy.exists()


def test_archive_changed_during_the_build_stops_it(tmp_path: Path, from_folder, run_build, monkeypatch) -> None:
    path = pack(tmp_path / "exams.zip", from_folder[0])
    read = dicom_pixels.open_image

    def change(name: str):
        os.utime(path, ns=(1, 1))
        return read(name)

    monkeypatch.setattr(dicom_pixels, "open_image", change)
    result = run_build("--input", path, "--output", tmp_path / "out")
    assert result.code == ExitCode.DATA and "an input changed while the build ran" in result.error


def test_full_disk_or_unpack_limit_stops_the_build(tmp_path: Path, from_folder, run_build, monkeypatch) -> None:
    result = run_build(
        "--input", pack(tmp_path / "e.tar.gz", from_folder[0]), "--output", tmp_path / "out", "--unpack-gb", 0
    )
    assert result.code == 2 and "take more than the 0 GB of --unpack-gb; raise it" in result.error
    path = pack(tmp_path / "e.zip", from_folder[0])
    member = listing(path).members[0]
    # A copy that another worker has just deleted does not count.
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "gone.tar").symlink_to(tmp_path / "nowhere")
    assert listing(tmp_path / "e.tar.gz", folder=tmp_path / "u").problem == ""
    monkeypatch.setattr(archives.tempfile, "mkdtemp", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(StorageError, match="No space left.*free some space there"), contextlib.ExitStack() as stack:
        stack.enter_context(materialize(member, tmp_path / "u"))


# ---- members


def test_members_that_are_no_regular_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as file:
        for name, kind in (
            ("ok.dcm", tarfile.REGTYPE), ("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("dev", tarfile.CHRTYPE),
            ("pipe", tarfile.FIFOTYPE), ("folder", tarfile.DIRTYPE),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    link, none = "a link in an archive, which is not followed", "neither a file nor a folder"
    assert problems(path) == {"ok.dcm": "", "soft": link, "hard": link, "dev": none, "pipe": none}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, mode in (("soft", 0o120777), ("pipe", 0o010666), ("plain", 0o100644), ("old", 0)):
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            file.writestr(info, b"/etc/passwd")
        file.mkdir("folder")
    assert problems(tmp_path / "a.zip") == {"soft": link, "pipe": none, "plain": "", "old": ""}


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../b", "C:/x", "..\\up", "\\\\server\\x"])
def test_names_outside_the_archive_are_replaced_by_numbers(tmp_path: Path, kind: str, name: str) -> None:
    found = problems(pack(tmp_path / f"a.{kind}", {"good": b"x", name: b"y"}))
    assert found.pop("good") == ""
    assert found == {"0000001": "its name leads out of the archive"}


def test_unusual_member_names_are_normalized(tmp_path: Path) -> None:
    long = "folder/" * 40 + "x" * 200
    names = {
        "./a": "a", "b\\c": "b/c", "d//e": "d/e", long: long, "Müller": "Müller",
        ".hidden/x": None, "x/.DS_Store": None, "__MACOSX/x": None,
    }  # fmt: skip
    for kind in ("zip", "tar"):
        found = problems(pack(tmp_path / f"a.{kind}", {name: b"x" for name in names}))
        assert found == {name: "" for name in names.values() if name}
    nested = "an archive within an archive: unpack the outer one"
    inner = ("in.zip", "in.tar.gz", "in.7z")
    assert problems(pack(tmp_path / "b.zip", {name: b"x" for name in inner})) == dict.fromkeys(inner, nested)
    many = {"x/" * 3000 + "y": b"x"}
    assert problems(pack(tmp_path / "c.tar", many)) == {"0000000": "no name, or one that is too long"}


def test_later_of_two_members_with_one_name_is_read(tmp_path: Path) -> None:
    for kind, opener in (("zip", zipfile.ZipFile), ("tar", tarfile.open)):
        with (
            pytest.warns(UserWarning) if kind == "zip" else contextlib.nullcontext(),
            opener(tmp_path / f"a.{kind}", "w") as file,
        ):
            for data in (b"old", b"newer"):
                if kind == "zip":
                    file.writestr("a", data)
                else:
                    info = tarfile.TarInfo("a")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
        (member,) = listing(tmp_path / f"a.{kind}").members
        assert content(member, tmp_path) == b"newer"


def test_encrypted_or_unsupported_members_have_a_remedy(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("lzma", b"x" * 100)
    assert problems(tmp_path / "a.zip") == {
        "lzma": "packed by method 14, which is not read: unpack it, or pack it deflated"
    }
    data = bytearray(pack(tmp_path / "b.stored.zip", {"a": b"x"}).read_bytes())
    for mark, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        data[data.index(mark) + at] |= 1
    (tmp_path / "b.zip").write_bytes(data)
    assert problems(tmp_path / "b.zip") == {"a": "encrypted in its archive: unpack it with the password"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_listing_equals_that_of_the_standard_library(tmp_path: Path, form: int) -> None:
    random = np.random.default_rng(form)
    files = {("p" * 60 + "/") * (n % 3) + f"{n} ä": random.bytes(int(random.integers(0, 2000))) for n in range(30)}
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            file.addfile(info, io.BytesIO(data))
    found = listing(tmp_path / "a.tar")
    assert {member.name: content(member, tmp_path) for member in found.members} == files


def test_sparse_members_are_refused_and_later_members_read(tmp_path: Path) -> None:
    block = bytearray(tarfile.TarInfo("holes").tobuf(tarfile.GNU_FORMAT))
    block[156:157], block[124:136], block[482] = tarfile.GNUTYPE_SPARSE, b"00000000004\0", 1
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    more = bytearray(512)
    rest = pack(tmp_path / "rest.tar", {"good": b"y"}).read_bytes()
    (tmp_path / "a.tar").write_bytes(bytes(block) + bytes(more) + b"abcd".ljust(512, b"\0") + rest)
    assert problems(tmp_path / "a.tar") == {"holes": "a sparse file in an archive: unpack it", "good": ""}


# ---- files that were compressed on their own


def test_compressed_files_give_the_slices_of_plain_ones(tmp_path: Path, from_folder, run_build, manifest) -> None:
    files, wanted = from_folder
    for name, data in files.items():
        packed = name.endswith(".dcm")
        path = tmp_path / "in" / (f"{name}.gz" if packed else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if packed else data)
    result = run_build("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert slices(tmp_path / "out") == wanted
    assert not Path(archives.folder(tmp_path / "out")).exists()


def test_compressed_file_is_materialized_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).bytes(50_000)
    path, scratch = tmp_path / "labelsTr" / "a.nrrd.gz", tmp_path / "scratch"
    path.parent.mkdir()

    def materialized(content: bytes) -> tuple[str, bytes]:
        path.write_bytes(content)
        source = object_stores.Object(str(path), len(content), 0)
        with archives.materialize(source, None, "", str(scratch), lambda item: None) as place:
            return os.path.relpath(place, scratch).partition("/")[2], Path(place).read_bytes()

    # The folder stays in the path, because it can say that a volume is a label map.
    assert materialized(gzip.compress(data)) == ("labelsTr/a.nrrd", data)
    assert materialized(data) == ("labelsTr/a.nrrd", data)  # not compressed in spite of its name
    packed = bytearray(gzip.compress(data, 0))
    packed[len(packed) // 2] ^= 1
    with pytest.raises(ReadError, match="damaged gzip file: its compressed data does not unpack"):
        materialized(bytes(packed))
    monkeypatch.setattr(archives, "RATIO_BYTES", 1 << 20)
    with pytest.raises(ReadError, match="unpacks to too much"):
        materialized(gzip.compress(bytes(3 << 20)))
    assert list(scratch.iterdir()) == []


# ---- decompression bombs


def test_decompression_bombs_are_refused_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "RATIO_BYTES", 1 << 20)
    for kind in ("zip", "tar.gz", "tar.bz2", "tar.zst"):
        path = pack(tmp_path / f"a.{kind}", {"zeros": bytes(3 << 20)})
        found = listing(path)
        assert found.members == [] and "unpacks to too much: " in found.problem, kind
        assert not list((tmp_path / "unpacked").glob("*.tar")) if kind != "zip" else True
    pack(tmp_path / "b.zip", {"zeros": bytes(3 << 20), "noise": np.random.default_rng(0).bytes(1 << 20)})
    assert (
        problems(tmp_path / "b.zip")["noise"] == "" and "unpacks to too much" in problems(tmp_path / "b.zip")["zeros"]
    )


def test_member_is_read_no_further_than_its_size(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"zeros": bytes(5_000_000)})
    (member,) = listing(path).members
    liar = member._replace(size=1000)
    with pytest.raises(ReadError, match="checksum"):
        content(liar, tmp_path)
    assert list((tmp_path).glob("m*")) == []
    with pytest.raises(ReadError, match="cut off"):
        content(member._replace(size=5_000_001), tmp_path)
    with pytest.raises(ReadError, match="no member begins"):
        content(member._replace(offset=3), tmp_path)


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    data = bytearray(pack(tmp_path / "a.stored.zip", {"a": b"x" * 500, "b": b"y" * 500}).read_bytes())
    second = data.rindex(b"PK\1\2")
    data[second + 42 : second + 46] = struct.pack("<I", 0)  # the offset of the second is that of the first
    (tmp_path / "a.zip").write_bytes(data)
    assert listing(tmp_path / "a.zip").problem == "damaged zip archive: members share their bytes"


def test_too_many_members_or_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MEMBERS", 3)
    monkeypatch.setattr(archives, "MEMBER_BYTES", 10)
    for kind in ("zip", "tar"):
        assert (
            "members; an archive may have" in listing(pack(tmp_path / f"a.{kind}", dict.fromkeys("abcd", b"x"))).problem
        )
        found = problems(pack(tmp_path / f"b.{kind}", {"a": b"x" * 11, "b": b"x"}))
        assert found == {"a": "11 bytes; a member of an archive may have 10", "b": ""}
    monkeypatch.setattr(archives, "NAME_BYTES", 100)
    assert "an extended header of" in listing(pack(tmp_path / "c.tar", {"x" * 300: b"x"})).problem


# ---- reading


def test_header_is_read_without_inflating_the_whole_member(tmp_path: Path, write_dicom, monkeypatch) -> None:
    big = write_dicom(tmp_path / "big.dcm", np.random.default_rng(0).integers(0, 4000, (2000, 2000))).read_bytes()
    pieces, read = archives.member_bytes, []

    def count(*arguments):
        for piece in pieces(*arguments):
            read.append(len(piece))
            yield piece

    monkeypatch.setattr(archives, "member_bytes", count)
    for kind in ("zip", "stored.zip", "tar"):
        path = pack(tmp_path / f"a.{kind}", {"a.dcm": big})
        read.clear()
        (entry,) = inventory.inspect((listing(path).members, inventory.Options(KEY)), {}, lambda item: None)
        assert entry.fate == "" and entry.facts.rows == 2000
        assert 0 < sum(read) <= 2 * archives.PIECE < len(big)


def test_materialized_member_is_deleted_after_the_context(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"Quibbleton/Xanthippe ä mask.nii.gz": b"abc"})
    (member,) = listing(path).members
    with materialize(member, tmp_path / "u") as place:
        assert Path(place).name == "Xanthippe___mask.nii.gz"  # endings and words like mask decide how it is read
        assert (Path(place).parent.stat().st_mode & 0o077, Path(place).read_bytes()) == (0, b"abc")
    assert list((tmp_path / "u").iterdir()) == []
    assert json.loads(json.dumps(list(member))) == list(member)


# ---- DICOMDIR and object storage


def test_dicomdir_is_replaced_by_the_files_it_names(tmp_path: Path, write_dicom, run_build, manifest) -> None:
    cd = tmp_path / "cd"
    for n in range(3):
        write_dicom(cd / "images" / f"IM{n}", ImagePositionPatient=[0, 0, n])
    index = write_dicomdir(cd / "DICOMDIR", [["IMAGES", "IM0"], ["IMAGES", "IM1"], ["IMAGES", "IM9"]])
    result = run_build("--input", index, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    rows = manifest(tmp_path / "out")
    assert {path.removeprefix(f"{cd}/"): (row["fate"], row["reason"].split(":")[0]) for path, row in rows.items()} == {
        "DICOMDIR": ("excluded", "an index of DICOM files (DICOMDIR)"),
        "images/IM0": ("kept", "fewer than 5 slices"), "images/IM1": ("kept", "fewer than 5 slices"),
        "images/IM9": ("quarantined", "cannot be read"),
    }  # fmt: skip
    # In a folder it is a file like others, and does not limit what is read.
    assert len(inventory.find_files([str(cd)])) == 4


@pytest.mark.parametrize("name", [["..", "up"], ["a/b"], ["."]])
def test_dicomdir_naming_files_outside_its_folder_is_refused(tmp_path: Path, name: list[str]) -> None:
    index = write_dicomdir(tmp_path / "DICOMDIR", [name])
    with pytest.raises(DataError, match="it names a file outside its folder; name its folder instead"):
        inventory.find_files([str(index)])


def test_damaged_dicomdir_raises_data_error(tmp_path: Path) -> None:
    (tmp_path / "DICOMDIR").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="DICOMDIR: .*; name its folder instead"):
        inventory.find_files([str(tmp_path / "DICOMDIR")])


@pytest.mark.parametrize(("address", "program"), [("az://container/exams", "blobfuse2"), ("webdav://x", "rclone")])
def test_unsupported_address_names_the_program_that_mounts_it(tmp_path: Path, run_build, address, program) -> None:
    for words in (
        ("--input", address, "--output", tmp_path / "out"),
        ("--input", tmp_path, "--output", address),
    ):
        result = run_build(*words)
        assert result.code == 2 and f"mount it ({program}" in result.error and address in result.error
    assert list(tmp_path.iterdir()) == []
