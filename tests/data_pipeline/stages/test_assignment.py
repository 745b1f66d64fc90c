import dataclasses
import json
from pathlib import Path

import numpy as np
import pydicom
import pytest

from curia_common.errors import UserError
from data_pipeline.sources import geometry
from data_pipeline.sources.dicom_header import FrameGeometry
from data_pipeline.stages import assignment, inventory, pseudonyms
from data_pipeline.stages.assignment import Conversion, Plan, PlannedSeries
from data_pipeline.stages.inventory import Entry, FileFacts

KEY = b"0123456789abcdef"


def options(**changes) -> assignment.Options:
    base = assignment.Options(
        KEY, validation=0.2, test=0.2, shard_bytes=10**9, held_out=frozenset(), conversion=Conversion("x")
    )
    return dataclasses.replace(base, **changes)


def entry(number: int, patient: int = 0, **changes) -> Entry:
    """A picture: no header, its own series."""
    name = f"p{patient}/{number}.png"
    base = Entry(
        path=name, size=1000, modified_ns=1, kind="image", series=pseudonyms.digest(KEY, "series", name),
        patient=pseudonyms.digest(KEY, "patient", str(patient)), facts=FileFacts("CT"),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def inspect(paths: list[Path]) -> list[Entry]:
    return inventory.inspect(([str(p) for p in paths], inventory.Options(KEY)), {}, lambda item: None)


def dicom(number: int, modality: str, body_part: str, quantity: str = "") -> Entry:
    facts = FileFacts(modality, instance=str(number), body_part=body_part, quantity=quantity)
    return entry(number, kind="dicom", series="one", facts=facts)


def test_kinds_of_image_under_one_series_uid_become_several_series() -> None:
    entries = [
        dicom(0, "MR", "brain"), dicom(1, "CT", "chest"), dicom(2, "CT", ""), dicom(3, "CT", "abdomen"), dicom(4, "CT", "chest"),
        dicom(5, "MR", "brain", "diffusion"), dicom(6, "MR", ""),
    ]  # fmt: skip
    found = [one.series for one in assignment.split_kinds(entries, KEY)]
    mr, chest, _, abdomen, _, diffusion, _ = found
    assert found == [mr, chest, chest, abdomen, chest, diffusion, mr]
    assert len({mr, chest, abdomen, diffusion}) == 4 and "one" in found
    # Neither the order of the files nor what is excluded matters.
    backward = assignment.split_kinds([*reversed(entries), dicom(7, "PT", "heart").with_fate("excluded", "x")], KEY)
    assert [one.series for one in backward[:7]] == found[::-1]


def test_series_of_one_kind_keeps_its_pseudonym() -> None:
    entries = [dicom(0, "CT", "chest"), dicom(1, "CT", ""), entry(2)]
    assert assignment.split_kinds(entries, KEY) == entries


def make(entries: list[Entry], **changes) -> Plan:
    return assignment.make(entries, options(**changes))[0]


def all_series(plan: Plan) -> list[PlannedSeries]:
    return [series for shard in plan.shards for series in shard.series]


def splits(plan: Plan) -> dict[str, str]:
    return {series.patient: shard.split for shard in plan.shards for series in shard.series}


def test_plan_depends_on_entries_and_options_alone() -> None:
    entries = [entry(n, n // 3) for n in range(60)]
    first = make(entries)
    assert make(entries) == first
    assert make(entries[::-1]).hash == first.hash
    for changed in (
        {"key": b"fedcba9876543210"}, {"validation": 0.3}, {"conversion": Conversion("x", size=256)}, {"shard_bytes": 1000},
    ):  # fmt: skip
        assert make(entries, **changed).hash != first.hash
    touched = [*entries[:7], dataclasses.replace(entries[7], modified_ns=2), *entries[8:]]
    assert make(touched).hash != first.hash


def test_plan_hash_is_that_of_earlier_versions() -> None:
    # Another hash would make every unfinished build start again.
    conversion = Conversion("x", size=None, slices_per_record=2, planes=("axial",))
    labels = {"b": 1, "a": "text", "c": None}
    entries = [entry(n, n // 3, labels=labels) for n in range(4)]
    facts = FileFacts("MR", "s", 1, 1, 2, "head", "ge", True, 2.5, (
        FrameGeometry((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0), (1.0, 1.0), 1.0, 0.0),
        FrameGeometry((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 2.0), (1.0, 1.0), 1.0, 0.0),
    ))  # fmt: skip
    entries.append(entry(9, 9, kind="dicom", facts=facts))
    assert (
        make(entries, conversion=conversion).hash == "a90e9828349672143b7908efa75d096c710552131ad16ef35d4066e9db0a4deb"
    )


def test_shard_is_read_from_its_line_and_replaced_plan_is_named(tmp_path: Path) -> None:
    entries = [entry(n, n // 3, labels={"z": 1, "a": None}) for n in range(60)]
    plan = make(entries, shard_bytes=4000)
    stored = assignment.write(tmp_path, plan)
    assert assignment.read(tmp_path) == stored
    assert (stored.hash, stored.settings) == (plan.hash, plan.settings)
    assert "p1/" not in (tmp_path / assignment.PLAN).read_text()
    lines = assignment.lines_of(tmp_path, plan.hash)
    read = tuple(assignment.read_shard(lines, place.at) for place in stored.shards)
    assert read == plan.shards
    assert list(read[0].series[0].files[0].labels) == ["z", "a"]  # in the order of the label table
    assert sum(place.files for place in stored.shards) == 60
    other = make([entry(n, n // 3) for n in range(61)], shard_bytes=4000)
    assert assignment.lines_of(tmp_path, other.hash) != lines
    lines.unlink()
    with pytest.raises(UserError, match="another build into the same output replaced it"):
        assignment.read_shard(lines, (0, 10))


def test_damaged_plan_reads_as_none(tmp_path: Path) -> None:
    assert assignment.read(tmp_path) is None
    (tmp_path / assignment.PLAN).write_text("{}")
    assert assignment.read(tmp_path) is None


def test_every_file_has_one_place_and_no_patient_two_splits() -> None:
    entries = [entry(n, n // 3) for n in range(300)]
    plan, planned = assignment.make(entries, options())
    assert sorted(file.path for series in all_series(plan) for file in series.files) == sorted(e.path for e in entries)
    by_patient: dict[str, set[str]] = {}
    for series in all_series(plan):
        by_patient.setdefault(series.patient, set()).add(series.split)
    assert all(len(found) == 1 for found in by_patient.values())
    assert set.union(*by_patient.values()) == set(pseudonyms.SPLITS)
    assert [e.split for e in planned] == [splits(plan)[e.patient] for e in entries]
    assert {e.split for e in entries} == {""}  # the arguments are unchanged


def test_new_exams_move_no_patient_to_another_split() -> None:
    before = splits(make([entry(n, n // 3) for n in range(150)]))
    after = splits(make([entry(n, n // 3) for n in range(-60, 300)]))
    assert {patient: after[patient] for patient in before} == before


def test_shards_mix_patients() -> None:
    plan = make([entry(n, n // 20) for n in range(400)], validation=0.0, test=0.0, shard_bytes=50_000)
    assert [shard.number for shard in plan.shards] == list(range(8))
    # 20 patients of 20 pictures each: a shard of 50 in the order of arrival would hold 3 of them.
    assert min(len({series.patient for series in shard.series}) for shard in plan.shards) > 12
    assert len(make([entry(0)]).shards) == 1


def test_label_table_decides_split() -> None:
    entries = [entry(n, n, split="test" if n % 2 else "") for n in range(40)]
    plan, planned = assignment.make(entries, options(test=0.0))
    for n, e in enumerate(planned):
        assert splits(plan)[e.patient] == e.split
        assert (e.split == "test") == bool(n % 2)


def test_held_out_patients_are_in_no_shard() -> None:
    entries = [entry(n, n // 3) for n in range(30)]
    gone = entries[4].patient
    plan, planned = assignment.make(entries, options(held_out=frozenset({gone})))
    assert gone not in splits(plan)
    assert [e.reason for e in planned if e.patient == gone] == [assignment.HELD_OUT] * 3


def test_file_names_and_order_do_not_change_a_series(tmp_path: Path, write_series) -> None:
    paths = write_series(tmp_path / "a", 7)
    (tmp_path / "b").mkdir()
    order = np.random.default_rng(0).permutation(7)
    renamed = [path.rename(tmp_path / "b" / f"{order[n]}.ima") for n, path in enumerate(paths)]
    # Entries come in the order of the paths, whatever that is.
    (series,) = all_series(make(inspect(sorted(renamed))))
    assert [along for file in series.files for _, along in file.frames] == [2.0 * n for n in range(7)]
    assert [Path(file.path).name for file in series.files] == [f"{n}.ima" for n in order]
    assert [file.first for file in series.files] == list(range(7))
    assert (series.plane, series.spacing, series.problems) == ("axial", 2.0, ())


def test_two_orientations_become_two_parts_numbered_in_sequence(tmp_path: Path, write_series) -> None:
    paths = write_series(tmp_path / "a", 6, Modality="MR")
    paths += write_series(
        tmp_path / "b", Modality="MR", ImageOrientationPatient=[1, 0, 0, 0, 0, -1], positions=[0.0], ImagePositionPatient=[0, 0, 0]
    )  # fmt: skip
    parts = sorted(all_series(make(inspect(paths))), key=lambda series: series.part)
    assert [(part.plane, len(part.files)) for part in parts] == [("axial", 6), ("coronal", 1)]
    assert all(geometry.MIXED_ORIENTATION in part.problems for part in parts)
    assert [file.first for part in parts for file in part.files] == list(range(7))


def test_frames_of_interleaved_multiframe_files_stay_together() -> None:
    def facts(half: int) -> FileFacts:
        frames = (
            FrameGeometry((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 2.0 * n + half), None, 1.0, 0.0) for n in range(4)
        )
        return FileFacts("MR", instance=f"s{half}", frames=4, thickness=1.0, geometry=tuple(frames))

    entries = [entry(n, series="s", kind="dicom", facts=facts(n)) for n in range(2)]
    (series,) = all_series(make(entries))
    assert len(series.files) == 2  # each is decoded once
    assert [file.first for file in series.files] == [0, 4]
    assert [[along for _, along in file.frames] for file in series.files] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_copies_of_an_instance_share_its_place_largest_file_first(tmp_path: Path, write_dicom) -> None:
    whole = write_dicom(tmp_path / "b.dcm")
    cut = tmp_path / "a.dcm"
    cut.write_bytes(whole.read_bytes()[:-700])  # an interrupted transfer
    again = tmp_path / "c.dcm"
    again.write_bytes(whole.read_bytes())
    above = write_dicom(tmp_path / "d.dcm", ImagePositionPatient=[0, 0, 3])
    entries = inspect([cut, whole, again, above])
    (series,) = all_series(make(entries))
    assert [(Path(file.path).name, file.first, file.spare) for file in series.files] == [
        ("b.dcm", 0, None), ("c.dcm", 0, 2), ("a.dcm", 0, 3), ("d.dcm", 1, None),
    ]  # fmt: skip
    assert series.problems == (geometry.FEW,)  # copies are no repeated positions
    assert make(entries[::-1]).hash == make(entries).hash


def test_one_uid_at_several_places_names_several_slices(tmp_path: Path, write_series) -> None:
    (series,) = all_series(make(inspect(write_series(tmp_path, 5, SOPInstanceUID="2.25.9"))))
    assert [(file.first, file.spare) for file in series.files] == [(n, None) for n in range(5)]
    assert (series.spacing, series.problems) == (2.0, ())


def fates(entries: list[Entry]) -> set[tuple[str, str]]:
    return {(entry.fate, entry.reason) for entry in assignment.make(entries, options())[1]}


THREE_PLANES = ([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1])
LOCALIZER = ("excluded", "localizer or screen")


@pytest.mark.parametrize(
    "name",
    [
        "Survey", "SURVEY_MST", "3-pl loc", "3 PL LOC", "LOC", "localizer", "AAHScout", "Plan scan", "Localisateur", "Localizzatore", "Pilot",
        "t1_fl2d",
    ],
)  # fmt: skip
def test_mr_localizers_are_excluded_by_name_or_layout(tmp_path: Path, write_dicom, name: str) -> None:
    paths = [
        write_dicom(tmp_path / f"{n}.dcm", Modality="MR", SeriesDescription=name, ImageOrientationPatient=planes,
                    ImageType=["ORIGINAL", "PRIMARY", "M_FFE", "M", "FFE"])
        for n, planes in enumerate(THREE_PLANES)
    ]  # fmt: skip
    assert fates(inspect(paths)) == {LOCALIZER}


@pytest.mark.parametrize("name", ["Scano", "Topogramm", "0.5 s"])
def test_sagittal_ct_radiographs_are_excluded_whatever_their_type(tmp_path: Path, write_dicom, name: str) -> None:
    fields = {"SeriesDescription": name, "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
    assert fates(inspect([write_dicom(tmp_path / f"{n}.dcm", **fields) for n in range(2)])) == {LOCALIZER}


@pytest.mark.parametrize(("lateral", "kept"), [(1, False), (4, False), (5, True)])
def test_few_lateral_slices_of_an_axial_ct_are_localizers(
    tmp_path: Path, write_series, write_dicom, lateral: int, kept: bool
) -> None:
    paths = write_series(tmp_path, 6)
    uid = pydicom.dcmread(paths[0]).SeriesInstanceUID
    side = [
        write_dicom(tmp_path / f"side{n}.dcm", SeriesInstanceUID=uid, ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
                    ImagePositionPatient=[2.0 * n, 0, 0])
        for n in range(lateral)
    ]  # fmt: skip
    side += [side[0].with_name("copy.dcm")]
    side[-1].write_bytes(side[0].read_bytes())
    plan, entries = assignment.make(inspect([*paths, *side]), options())
    reason = "localizer: one of fewer than 5 coronal or sagittal slices in an axial CT series"
    want = ("", "") if kept else ("excluded", reason)
    assert {entry.path: (entry.fate, entry.reason) for entry in entries} == {
        **{str(path): ("", "") for path in paths}, **{str(path): want for path in side}
    }  # fmt: skip
    series = all_series(plan)
    assert sorted(one.plane for one in series) == (["axial", "sagittal"] if kept else ["axial"])
    problems = (geometry.MIXED_ORIENTATION,) if kept else ()  # without the localizers the volume is regular
    assert [one.problems for one in series if one.plane == "axial"] == [problems]


def test_series_with_a_doubtful_name_and_many_slices_is_planned(tmp_path: Path, write_series) -> None:
    paths = write_series(tmp_path, 16, Modality="MR", SeriesDescription="Bone survey")
    assert fates(inspect(paths)) == {("", "")}
    assert fates(inspect(paths[:15])) == {LOCALIZER}


def test_few_later_slices_of_a_known_series_are_no_localizer(tmp_path: Path, write_series) -> None:
    entries = inspect(write_series(tmp_path, 2, Modality="MR", SeriesDescription="Bone survey"))
    _, planned = assignment.make(entries, options(continued={entries[0].series: 14}))
    assert {entry.fate for entry in planned} == {""}


def test_plan_holds_no_identity(tmp_path: Path, write_dicom) -> None:
    path = write_dicom(tmp_path / "a.dcm", PatientID="SECRET", PatientName="SECRET", SeriesDescription="SECRET")
    plan = make(inspect([path]))
    assignment.write(tmp_path, plan)
    text = assignment.lines_of(tmp_path, plan.hash).read_text() + (tmp_path / assignment.PLAN).read_text()
    assert json.loads(text.splitlines()[0])["series"]
    assert "SECRET" not in text and "2.25" not in text
    assert pydicom.dcmread(path).SOPInstanceUID not in text


@pytest.mark.parametrize("gap", [False, True])
def test_missing_slices_are_flagged(tmp_path: Path, write_series, gap: bool) -> None:
    paths = write_series(tmp_path, 8)
    (series,) = all_series(make(inspect(paths[:3] + paths[4 if gap else 3 :])))
    assert series.problems == ((geometry.GAP,) if gap else ())
    assert len(series.files) == 8 - gap
