"""Organ recognition from the label maps of two exams, as CuriaBench's anatomy-ct and anatomy-mri.

The exams are the examples of wasserth/TotalSegmentator: a CT and an MR of the abdomen, each with the label map that the program itself made. Numbers
of labels are those of its class tables `total` and `total_mr`; organs have the names of the second, so that both tasks name their classes alike.
Before anything is written, `check` compares the label map with what is known of the body: sides, order, sizes, HU.

There is one patient of each modality. Slices of an exam are divided into blocks of BLOCK neighbours with GAP slices between them, and every third
block is tested. Within an exam, therefore, a figure says whether organs are recognised a few slices away in the same patient; across the two, it
says whether they are recognised in another patient and modality. Blocks stand where patients are resampled: no interval is one over patients.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Shaped

from curia_common.errors import DataError
from data_pipeline.sources.volumes import open_volume
from data_pipeline.synthetic_tasks.tables import nested

BLOCK, GAP, TESTED = 3, 1, 3  # slices, slices, every so many blocks
LEAST_AREA = 180.0  # mm2 of an organ in a slice, about 15 mm across: smaller ones are less than a patch
TRAIN, TEST = "train", "test"
CLASS_MAP = "class_map.csv"


@dataclasses.dataclass(frozen=True)
class Exam:
    """An image with its label map, as paths below the data folder.

    Attributes:
      task: folder of CuriaBench's name that it becomes.
      modality: CT or MR.
      labels: numbers in the map -> organ.
    """

    task: str
    modality: str
    image: str
    label_map: str
    labels: Mapping[int, str]


def _numbered(first: int, names: str) -> dict[int, str]:
    return dict(enumerate(names.split(), start=first))


def _sides(first: int, names: str, *, left_first: bool = True) -> dict[int, str]:
    sides = ("left", "right") if left_first else ("right", "left")
    return dict(enumerate((f"{name}_{side}" for name in names.split() for side in sides), start=first))


_FIRST = (
    _numbered(1, "spleen kidney_right kidney_left gallbladder liver stomach pancreas")
    | _sides(8, "adrenal_gland", left_first=False)
)  # fmt: skip
_LIMBS = "humerus scapula clavicula femur hip"
_MUSCLES = "gluteus_maximus gluteus_medius gluteus_minimus autochthon iliopsoas"
# Class table `total` of TotalSegmentator 2 (totalsegmentator/map_to_binary.py). Lobes are their lung, vertebrae and ribs one organ, because a single
# one of them is in too few slices.
CT_LABELS: Mapping[int, str] = {
    **_FIRST,
    **dict.fromkeys((10, 11), "lung_left"),
    **dict.fromkeys((12, 13, 14), "lung_right"),
    **_numbered(15, "esophagus trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate"),
    **_sides(23, "kidney_cyst"),
    25: "sacrum",
    **dict.fromkeys(range(26, 51), "vertebrae"),
    **_numbered(51, "heart aorta pulmonary_vein brachiocephalic_trunk"),
    **_sides(55, "subclavian_artery common_carotid_artery", left_first=False),
    **_sides(59, "brachiocephalic_vein"),
    **_numbered(61, "atrial_appendage_left superior_vena_cava inferior_vena_cava portal_vein_and_splenic_vein"),
    **_sides(65, f"iliac_artery iliac_vena {_LIMBS}"),
    79: "spinal_cord",
    **_sides(80, _MUSCLES),
    **_numbered(90, "brain skull"),
    **dict.fromkeys(range(92, 104), "ribs_left"),
    **dict.fromkeys(range(104, 116), "ribs_right"),
    **_numbered(116, "sternum costal_cartilages"),
}
# Class table `total_mr`.
MR_LABELS: Mapping[int, str] = {
    **_FIRST,
    **_sides(10, "lung"),
    **_numbered(12, "esophagus small_bowel duodenum colon urinary_bladder prostate sacrum vertebrae"),
    **_numbered(20, "intervertebral_discs spinal_cord heart aorta inferior_vena_cava portal_vein_and_splenic_vein"),
    **_sides(26, f"iliac_artery iliac_vena {_LIMBS} {_MUSCLES}"),
    50: "brain",
}
EXAMS = (
    Exam(
        "anatomy-ct", "CT", "nifti/ct_abdomen_totalseg/example_ct.nii.gz",
        "nifti/ct_abdomen_totalseg/example_seg_fast_force_split.nii.gz", CT_LABELS,
    ),
    Exam(
        "anatomy-mri", "MR", "nifti/mr_abdomen_totalseg/example_mr_sm.nii.gz",
        "nifti/mr_abdomen_totalseg/example_seg_mr.nii.gz", MR_LABELS,
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Volume:
    """An exam as it was read.

    Attributes:
      values: HU or raw MR values; slices from the feet up, rows from the front, columns from the patient's right.
      organs: organ -> its voxels.
      spacing: of rows, columns and slices, mm.
    """

    values: Shaped[np.ndarray, "slices rows columns"]
    organs: Mapping[str, Bool[np.ndarray, "slices rows columns"]]
    spacing: tuple[float, float, float]

    def millilitres(self, organ: str) -> float:
        return float(self.organs[organ].sum() * np.prod(self.spacing) / 1000)


def read(data: Path, exam: Exam) -> Volume:
    """An exam and its organs.

    Raises:
      DataError: image and label map have another geometry, a number is not in the class table, or organs are not where and what
        they have to be.
    """
    affines = [np.array(nibabel.Nifti1Image.from_filename(data / path).affine) for path in (exam.image, exam.label_map)]
    values, labels, spacings = [], [], []
    for path, slices in ((exam.image, values), (exam.label_map, labels)):
        with open_volume(str(data / path)) as volume:
            slices.extend(volume.slices())
            spacings.append((*volume.spacing, volume.plane))
    image, numbers = np.stack(values), np.stack(labels)
    if image.shape != numbers.shape or spacings[0] != spacings[1] or not np.allclose(affines[0], affines[1]):
        raise DataError(f"{exam.label_map} is not on the voxels of {exam.image}: {numbers.shape} and {image.shape}")
    if spacings[0][3] != "axial":
        raise DataError(f"{exam.image} has {spacings[0][3]} slices; wanted are axial ones")
    if unknown := sorted(set(np.unique(numbers).tolist()) - {0, *exam.labels}):
        raise DataError(
            f"{exam.label_map} has the label {unknown[0]}, which the class table of {exam.modality} has not"
        )
    organs: dict[str, Bool[np.ndarray, "slices rows columns"]] = {}
    for number in np.unique(numbers[numbers > 0]).tolist():
        organ = exam.labels[number]
        organs[organ] = organs.get(organ, np.zeros(image.shape, bool)) | (numbers == number)
    found = Volume(image, organs, spacings[0][:3])
    if wrong := next(contradictions(found, is_hu=exam.modality == "CT"), None):
        raise DataError(f"{exam.label_map}: {wrong}; its labels are not those of the class table, or it is turned")
    return found


# The first organ's centre lies further along the axis (0 up, 1 to the back, 2 to the patient's left) than the second's.
_ORDER = (
    (2, "spleen", "to the left of", "liver"), (1, "vertebrae", "behind", "aorta"), (1, "spinal_cord", "behind", "vertebrae"),
    (1, "kidney_left", "behind", "stomach"), (1, "autochthon_left", "behind", "kidney_left"), (0, "lung_left", "above", "kidney_left"),
    (0, "liver", "above", "urinary_bladder"), (0, "vertebrae", "above", "sacrum"),
)  # fmt: skip
_SMALLER_THAN_LIVER = ("spleen", "kidney_left", "kidney_right", "gallbladder", "pancreas", "aorta")
# Mean HU, with or without contrast agent.
_HU = {
    "lung_left": (-950, -500), "lung_right": (-950, -500), "liver": (0, 200), "spleen": (0, 250), "kidney_left": (0, 300),
    "kidney_right": (0, 300), "aorta": (10, 500), "vertebrae": (80, 500), "autochthon_left": (-50, 100), "hip_left": (80, 600),
}  # fmt: skip


def contradictions(volume: Volume, *, is_hu: bool) -> Iterator[str]:
    """What the labels say of the body that cannot be."""
    centres = {organ: np.argwhere(voxels).mean(axis=0) for organ, voxels in volume.organs.items()}
    sides = [
        (2, organ, "to the left of", organ.replace("_left", "_right")) for organ in centres if organ.endswith("_left")
    ]
    for axis, first, where, second in (*_ORDER, *sides):
        if first in centres and second in centres and centres[first][axis] <= centres[second][axis]:
            yield f"{first} is not {where} {second}"
    for organ in _SMALLER_THAN_LIVER:
        if {organ, "liver"} <= set(centres) and volume.millilitres(organ) >= volume.millilitres("liver"):
            yield f"{organ} is larger than the liver"
    for organ, (low, high) in _HU.items() if is_hu else ():
        if organ in centres and not low <= (mean := float(volume.values[volume.organs[organ]].mean())) <= high:
            yield f"{organ} has a mean of {mean:.0f} HU, not {low} to {high}"


def blocks(slices: int) -> dict[str, list[range]]:
    """Split -> its blocks of slice numbers. A block at the end may be shorter."""
    starts = range(0, slices, BLOCK + GAP)
    found: dict[str, list[range]] = {TRAIN: [], TEST: []}
    for number, start in enumerate(starts):
        found[TEST if number % TESTED == 1 else TRAIN].append(range(start, min(start + BLOCK, slices)))
    return found


def pictures(volume: Volume) -> dict[str, list[tuple[int, int, str]]]:
    """Split -> block, slice and organ of each picture: of the organs that are in two blocks to learn from and in one to test."""
    least = LEAST_AREA / (volume.spacing[0] * volume.spacing[1])
    areas = {organ: voxels.sum(axis=(1, 2)) for organ, voxels in volume.organs.items()}
    found = {
        split: [
            (block[0], number, organ)
            for block in of_split
            for number in block
            for organ in sorted(areas)
            if areas[organ][number] >= least
        ]
        for split, of_split in blocks(len(volume.values)).items()
    }
    in_blocks = {split: {(block, organ) for block, _, organ in rows} for split, rows in found.items()}
    count = {split: [organ for _, organ in pairs] for split, pairs in in_blocks.items()}
    kept = {organ for organ in areas if count[TRAIN].count(organ) > 1 and organ in count[TEST]}
    return {split: [row for row in rows if row[2] in kept] for split, rows in found.items()}


def write(data: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Writes FOLDER/anatomy-ct and FOLDER/anatomy-mri, with the splits train and test, and the map of the classes that both have.

    Returns:
      Task -> classes, and pictures of each split.

    Raises:
      DataError: a label map is not what it has to be; see `read`.
    """
    counts: dict[str, dict[str, int]] = {}
    of_task: dict[str, set[str]] = {}
    for exam in EXAMS:
        volume = read(data, exam)
        (folder / exam.task).mkdir(parents=True, exist_ok=True)
        by_split = pictures(volume)
        for split, rows in by_split.items():
            pq.write_table(_table(exam, volume, rows), folder / exam.task / f"{split}.parquet", compression="zstd")
        of_task[exam.task] = {organ for rows in by_split.values() for _, _, organ in rows}
        sizes = {split: len(rows) for split, rows in by_split.items()}
        counts[exam.task] = {"classes": len(of_task[exam.task]), **sizes}
    shared = sorted(set.intersection(*of_task.values()))
    lines = [",".join(("class", *of_task)), *(",".join((organ, *[organ] * len(of_task))) for organ in shared)]
    (folder / CLASS_MAP).write_text("\n".join((*lines, "")), encoding="utf-8")
    return counts


def _table(exam: Exam, volume: Volume, rows: Sequence[tuple[int, int, str]]) -> pa.Table:
    masks = [volume.organs[organ][number] for _, number, organ in rows]
    return pa.table(
        {
            "image": nested([volume.values[number] for _, number, _ in rows], pa.float32()),
            "mask": nested(masks, pa.uint8()),
            "target": [organ for _, _, organ in rows],
            # What is resampled: a block. Neighbouring slices are no independent cases, and the patient is always the same.
            "filename": [f"slices from {block}" for block, _, _ in rows],
            "modality": [exam.modality] * len(rows),
        }
    )
