"""Organ recognition of CT and MR in the published schema, for tests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CT = ("spleen", "liver", "lung_upper_lobe_left", "lung_lower_lobe_left", "sternum")
MR = ("lung_left", "liver", "spleen", "intervertebral_discs")
PATIENTS = {"train": 6, "val": 4, "test": 10}
# Brightness tells the organs; in MR those of liver and spleen are exchanged, so that a head that learned from CT is wrong.
LEVELS = {"spleen": 0.3, "liver": 0.7, "sternum": 1.0, "intervertebral_discs": 1.0}


def write(data: Path, *, names: bool = True, ct: Sequence[str] = CT, mr: Sequence[str] = MR) -> None:
    """Writes anatomy-ct and anatomy-mri, one image of every organ of each patient.

    Args:
      names: whether the files name their class numbers, as `datasets` does for a ClassLabel.
    """
    for task, organs in (("anatomy-ct", ct), ("anatomy-mri", mr)):
        (data / task).mkdir(parents=True)
        for split, patients in PATIENTS.items():
            table = pa.Table.from_pylist([row for n in range(patients) for row in _rows(task, organs, split, n)])
            stated = {"info": {"features": {"target": {"names": list(organs), "_type": "ClassLabel"}}}}
            if names:
                table = table.replace_schema_metadata({"huggingface": json.dumps(stated)})
            pq.write_table(table, data / task / f"{split}.parquet")


def _rows(task: str, organs: Sequence[str], split: str, patient: int) -> list[Mapping]:
    mr = task == "anatomy-mri"
    rng = np.random.default_rng([mr, patient, *split.encode()])
    rows = []
    for number, organ in enumerate(organs):
        level = LEVELS.get(organ, 0.0)
        level = 1.0 - level if mr and organ in ("liver", "spleen") else level
        mask = np.zeros((24, 24))
        y, x = rng.integers(0, 12, 2)
        mask[y : y + 12, x : x + 12] = 1
        image = np.where(mask, 300 * level + (10 if mr else -40), 0 if mr else -900) + rng.normal(0, 8, mask.shape)
        image = np.round(np.maximum(image, 0) if mr else image)
        rows.append(
            {"image": image.tolist(), "mask": mask.tolist(), "target": number, "patient_id": f"{split} {patient}"}
        )
    return rows
