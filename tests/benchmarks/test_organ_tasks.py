"""Organ recognition of the two exams with label maps: their labels are checked, splits are apart, the files can be scored."""

import dataclasses
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks import organ_tasks
from benchmarks.organ_tasks import CT_LABELS, MR_LABELS, Volume
from curia_common.errors import DataError
from curia_jax.evaluate import pictures, task_data, tasks
from curia_jax.evaluate.class_map import ClassMap

CT_EXAM, MR_EXAM = organ_tasks.EXAMS


@pytest.fixture(scope="module")
def ct(real_data) -> Volume:
    return organ_tasks.read(real_data, CT_EXAM)


@pytest.fixture(scope="module")
def written(real_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("organs")
    counts = organ_tasks.write(real_data, folder)
    assert counts == {
        "anatomy-ct": {"classes": 36, "train": 782, "test": 379},
        "anatomy-mri": {"classes": 17, "train": 119, "test": 79},
    }
    return folder


def test_class_tables_have_the_published_numbers() -> None:
    # Some of totalsegmentator/map_to_binary.py, from each part of the tables.
    assert sorted(CT_LABELS) == list(range(1, 118)) and sorted(MR_LABELS) == list(range(1, 51))
    of_ct = {
        2: "kidney_right",
        8: "adrenal_gland_right",
        20: "colon",
        24: "kidney_cyst_right",
        52: "aorta",
        56: "subclavian_artery_left",
    }
    of_ct |= {
        59: "brachiocephalic_vein_left",
        64: "portal_vein_and_splenic_vein",
        67: "iliac_vena_left",
        78: "hip_right",
    }
    of_ct |= {
        79: "spinal_cord",
        85: "gluteus_minimus_right",
        88: "iliopsoas_left",
        103: "ribs_left",
        117: "costal_cartilages",
    }
    assert {number: CT_LABELS[number] for number in of_ct} == of_ct
    of_mr = {
        9: "adrenal_gland_left",
        11: "lung_right",
        19: "vertebrae",
        25: "portal_vein_and_splenic_vein",
        35: "clavicula_right",
    }
    of_mr |= {
        29: "iliac_vena_right",
        44: "gluteus_minimus_left",
        47: "autochthon_right",
        49: "iliopsoas_right",
        50: "brain",
    }
    assert {number: MR_LABELS[number] for number in of_mr} == of_mr  # fmt: skip


@pytest.mark.parametrize("exam", organ_tasks.EXAMS, ids=lambda exam: exam.task)
def test_label_maps_of_real_exams_contradict_nothing(real_data, exam) -> None:
    volume = organ_tasks.read(real_data, exam)
    assert 450 < volume.millilitres("liver") < 2500 and 40 < volume.millilitres("spleen") < 500


def test_mirrored_label_map_is_a_contradiction(ct) -> None:
    mirrored = {organ: voxels[:, :, ::-1] for organ, voxels in ct.organs.items()}
    found = list(organ_tasks.contradictions(dataclasses.replace(ct, organs=mirrored), is_hu=True))
    assert "spleen is not to the left of liver" in found and "kidney_left is not to the left of kidney_right" in found


@pytest.mark.parametrize(
    ("organs", "wanted"),
    [
        ({"liver": "spleen", "spleen": "liver"}, "spleen is larger than the liver"),
        ({"vertebrae": "spinal_cord", "spinal_cord": "vertebrae"}, "spinal_cord is not behind vertebrae"),
        ({"colon": "lung_right"}, "lung_right has a mean of -224 HU, not -950 to -500"),
    ],
)
def test_exchanged_labels_are_a_contradiction(ct, organs, wanted) -> None:
    exchanged = {organs.get(organ, organ): voxels for organ, voxels in ct.organs.items() if organ != "lung_right"}
    found = list(organ_tasks.contradictions(dataclasses.replace(ct, organs=exchanged), is_hu=True))
    assert wanted in found


def test_label_map_of_another_exam_is_refused(real_data) -> None:
    wrong = dataclasses.replace(CT_EXAM, label_map=MR_EXAM.label_map)
    with pytest.raises(DataError, match="is not on the voxels of"):
        organ_tasks.read(real_data, wrong)


def test_label_outside_the_class_table_is_refused(real_data) -> None:
    short = {number: organ for number, organ in CT_LABELS.items() if number != 117}
    with pytest.raises(DataError, match="the label 117, which the class table of CT has not"):
        organ_tasks.read(real_data, dataclasses.replace(CT_EXAM, labels=short))


@pytest.mark.parametrize("slices", [20, 112, 113])
def test_blocks_of_splits_have_a_gap_between_them(slices) -> None:
    found = organ_tasks.blocks(slices)
    train, test = ({number for block in found[split] for number in block} for split in ("train", "test"))
    assert min(abs(a - b) for a in train for b in test) == 2
    assert max(train | test) < slices and len(train) > len(test) > 0


def test_every_class_is_in_two_training_blocks_and_in_test(ct) -> None:
    found = organ_tasks.pictures(ct)
    blocks = {split: defaultdict(set) for split in found}
    for split, rows in found.items():
        for block, number, organ in rows:
            assert ct.organs[organ][number].sum() >= 20  # 180 mm2 of 3 x 3 mm
            blocks[split][organ].add(block)
    assert set(blocks["train"]) == set(blocks["test"])
    assert min(map(len, blocks["train"].values())) > 1


@pytest.mark.parametrize("exam", organ_tasks.EXAMS, ids=lambda exam: exam.task)
def test_written_tasks_can_be_scored(written, exam) -> None:
    files = task_data.find(written, exam.task)
    assert files is not None
    found = task_data.read_cases(tasks.find(exam.task), files)
    assert found.groups == "files (patients unknown)" and not found.unseen
    for split in ("train", "test"):
        (first,) = pictures.TaskPictures(tasks.find(exam.task), files, split).of_rows([0])
        assert first.hu == (exam.modality == "CT") and first.mask is not None and first.mask.sum() >= 20


def test_class_map_names_the_shared_organs(written) -> None:
    found = ClassMap.read(str(written / organ_tasks.CLASS_MAP), ("anatomy-ct", "anatomy-mri"))
    names = {row.name for row in found.rows}
    assert len(names) == 16 and {"liver", "vertebrae", "kidney_left"} <= names
    assert "intervertebral_discs" not in names
    assert all(set(row.of_task.values()) == {(row.name,)} for row in found.rows)
