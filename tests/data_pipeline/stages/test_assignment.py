import copy
import json
from pathlib import Path

import numpy as np
import pydicom
import pytest

from curia_common.errors import UserError
from data_pipeline.sources import geometry
from data_pipeline.stages import assignment as plan
from data_pipeline.stages import inventory, pseudonyms

KEY = b"0123456789abcdef"


def options(**changes) -> plan.Options:
    fields = {
        "key": KEY,
        "validation": 0.2,
        "test": 0.2,
        "shard_bytes": 10**9,
        "held_out": frozenset(),
        "conversion": {"size": None},
    }
    return plan.Options(**(fields | changes))


def entry(number: int, patient: int = 0, **changes) -> inventory.Entry:
    """A picture: no header, its own series."""
    name = f"p{patient}/{number}.png"
    fields = {
        "path": name, "size": 1000, "modified_ns": 1, "kind": "image", "series": pseudonyms.digest(KEY, "series", name),
        "patient": pseudonyms.digest(KEY, "patient", str(patient)), "facts": {"modality": "CT"},
    }  # fmt: skip
    return inventory.Entry(**(fields | changes))


def inspect(paths: list[Path]) -> list[inventory.Entry]:
    return inventory.inspect(([str(p) for p in paths], inventory.Options(KEY)), {}, lambda item: None)


def splits(made: dict) -> dict[str, str]:
    return {series["patient"]: shard["split"] for shard in made["shards"] for series in shard["series"]}


def test_the_plan_follows_from_the_entries_alone() -> None:
    entries = [entry(n, n // 3) for n in range(60)]
    first = plan.make(copy.deepcopy(entries), options())
    assert plan.make(copy.deepcopy(entries), options()) == first
    backwards = plan.make(copy.deepcopy(entries)[::-1], options())
    assert backwards["hash"] == first["hash"]
    assert json.loads(json.dumps(first)) == first  # nothing is lost in the file that fixes it
    for changed in (
        options(key=b"fedcba9876543210"), options(validation=0.3), options(conversion={"size": 256}), options(shard_bytes=1000),
    ):  # fmt: skip
        assert plan.make(copy.deepcopy(entries), changed)["hash"] != first["hash"]
    touched = copy.deepcopy(entries)
    touched[7].modified_ns += 1
    assert plan.make(touched, options())["hash"] != first["hash"]


def test_a_shard_is_read_from_its_line_alone_and_a_plan_that_was_replaced_is_named(tmp_path: Path) -> None:
    made = plan.make([entry(n, n // 3) for n in range(60)], options(shard_bytes=4000))
    short = plan.write(tmp_path, made)
    assert plan.read(tmp_path) == short
    assert short["hash"] == made["hash"] and "p1/" not in json.dumps(short)
    lines = plan.lines_of(tmp_path, made["hash"])
    assert [plan.read_shard(lines, shard["at"]) for shard in short["shards"]] == made["shards"]
    assert sum(shard["files"] for shard in short["shards"]) == 60
    other = plan.make([entry(n, n // 3) for n in range(61)], options(shard_bytes=4000))
    assert plan.lines_of(tmp_path, other["hash"]) != lines
    lines.unlink()
    with pytest.raises(UserError, match="another build has taken its place"):
        plan.read_shard(lines, short["shards"][0]["at"])


def test_every_file_has_one_place_and_no_patient_two_splits() -> None:
    entries = [entry(n, n // 3) for n in range(300)]
    made = plan.make(entries, options())
    paths = [file["path"] for shard in made["shards"] for series in shard["series"] for file in series["files"]]
    assert sorted(paths) == sorted(e.path for e in entries)
    by_patient: dict[str, set[str]] = {}
    for shard in made["shards"]:
        for series in shard["series"]:
            by_patient.setdefault(series["patient"], set()).add(shard["split"])
    assert all(len(found) == 1 for found in by_patient.values())
    assert set.union(*by_patient.values()) == set(pseudonyms.SPLITS)


def test_new_exams_move_nobody_to_another_split() -> None:
    before = splits(plan.make([entry(n, n // 3) for n in range(150)], options()))
    after = splits(plan.make([entry(n, n // 3) for n in range(-60, 300)], options()))
    assert {patient: after[patient] for patient in before} == before


def test_shards_are_many_enough_and_mix_the_patients() -> None:
    made = plan.make([entry(n, n // 20) for n in range(400)], options(validation=0.0, test=0.0, shard_bytes=50_000))
    assert [shard["number"] for shard in made["shards"]] == list(range(8))
    # 20 patients of 20 pictures each: a shard of 50 in the order of arrival would hold 3 of them.
    assert min(len({series["patient"] for series in shard["series"]}) for shard in made["shards"]) > 12
    assert len(plan.make([entry(0)], options())["shards"]) == 1


def test_a_table_decides_the_split_where_it_says_one() -> None:
    entries = [entry(n, n, split="test" if n % 2 else "") for n in range(40)]
    made = plan.make(entries, options(test=0.0))
    for e in entries:
        assert splits(made)[e.patient] == ("test" if int(e.path[1:].split("/")[0]) % 2 else e.split)
    assert {e.split for e in entries[::2]} <= {"train", "validation"}


def test_held_out_patients_are_nowhere() -> None:
    entries = [entry(n, n // 3) for n in range(30)]
    gone = entries[4].patient
    made = plan.make(entries, options(held_out=frozenset({gone})))
    assert gone not in json.dumps(made)
    assert [e.reason for e in entries if e.patient == gone] == ["patient is held out"] * 3


def test_names_and_order_of_the_files_change_nothing_of_a_series(tmp_path: Path, write_series) -> None:
    paths = write_series(tmp_path / "a", 7)
    (tmp_path / "b").mkdir()
    order = np.random.default_rng(0).permutation(7)
    renamed = [path.rename(tmp_path / "b" / f"{order[n]}.ima") for n, path in enumerate(paths)]
    # Entries come in the order of the paths, whatever that is.
    (series,) = plan.make(inspect(sorted(renamed)), options())["shards"][0]["series"]
    positions = [along for file in series["files"] for _, along in file["frames"]]
    assert positions == [2.0 * n for n in range(7)]
    assert [Path(file["path"]).name for file in series["files"]] == [f"{n}.ima" for n in order]
    assert [file["first"] for file in series["files"]] == list(range(7))
    assert (series["plane"], series["spacing"], series["problems"]) == ("axial", 2.0, [])


def test_two_orientations_are_two_parts_with_numbers_of_their_own(tmp_path: Path, write_series) -> None:
    paths = write_series(tmp_path / "a", 6)
    paths += write_series(
        tmp_path / "b", ImageOrientationPatient=[1, 0, 0, 0, 0, -1], positions=[0.0], ImagePositionPatient=[0, 0, 0]
    )
    made = plan.make(inspect(paths), options())
    parts = sorted((s for shard in made["shards"] for s in shard["series"]), key=lambda s: s["part"])
    assert [(part["plane"], len(part["files"])) for part in parts] == [("axial", 6), ("coronal", 1)]
    assert all(geometry.MIXED_ORIENTATION in part["problems"] for part in parts)
    assert [file["first"] for part in parts for file in part["files"]] == list(range(7))


def test_frames_of_interleaved_multi_frame_files_stay_together(tmp_path: Path) -> None:
    geometry_of = [
        [{"orientation": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), "position": (0.0, 0.0, 2.0 * n + half)} for n in range(4)]
        for half in (0, 1)
    ]
    facts = {"modality": "MR", "frames": 4, "body_part": "", "manufacturer": "", "lossy": False, "thickness": 1.0}
    entries = [
        entry(n, series="s", kind="dicom", facts=facts | {"sop": f"s{n}", "geometry": geometry_of[n]}) for n in range(2)
    ]
    (series,) = plan.make(entries, options())["shards"][0]["series"]
    assert len(series["files"]) == 2  # each is decoded once
    assert [file["first"] for file in series["files"]] == [0, 4]
    assert [[along for _, along in file["frames"]] for file in series["files"]] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_of_copies_of_an_instance_the_largest_is_taken(tmp_path: Path, write_dicom) -> None:
    whole = write_dicom(tmp_path / "b.dcm")
    cut = tmp_path / "a.dcm"
    cut.write_bytes(whole.read_bytes()[:-700])  # a transfer that broke off
    again = tmp_path / "c.dcm"
    again.write_bytes(whole.read_bytes())
    entries = inspect([cut, whole, again])
    made = plan.make(entries, options())
    assert [file["path"] for file in made["shards"][0]["series"][0]["files"]] == [str(whole)]
    assert [e.fate for e in entries] == ["duplicate", "", "duplicate"]


def test_the_plan_holds_no_identity(tmp_path: Path, write_dicom) -> None:
    path = write_dicom(tmp_path / "a.dcm", PatientID="SECRET", PatientName="SECRET", SeriesDescription="SECRET")
    text = json.dumps(plan.make(inspect([path]), options()))
    assert "SECRET" not in text and "2.25" not in text
    assert pydicom.dcmread(path).SOPInstanceUID not in text


@pytest.mark.parametrize("gap", [False, True])
def test_missing_slices_are_flagged_and_kept(tmp_path: Path, write_series, gap: bool) -> None:
    paths = write_series(tmp_path, 8)
    (series,) = plan.make(inspect(paths[:3] + paths[4 if gap else 3 :]), options())["shards"][0]["series"]
    assert series["problems"] == ([geometry.GAP] if gap else [])
    assert len(series["files"]) == 8 - gap
