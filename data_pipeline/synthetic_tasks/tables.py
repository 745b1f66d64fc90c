"""Writes the tasks in CuriaBench's schema: a folder per task with a Parquet file per split, and dataset cards.

The cards' YAML lists the files, so that `datasets.load_dataset(<folder>, <config>)`, which the official evaluator calls, finds them.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curia_common.errors import UserError
from curia_common.progress import Progress
from data_pipeline.synthetic_tasks import tasks
from data_pipeline.synthetic_tasks.pictures import Picture
from data_pipeline.synthetic_tasks.tasks import SPLITS, Task


def write_suite(
    folder: Path, chosen: Sequence[Task], *, test_patients: int, seed: int, size: int, progress: Progress
) -> None:
    """Writes <folder>/<config>/{train,val,test}.parquet, a README.md in each folder and one above them.

    Args:
      folder: new or empty.
      test_patients: of a task; some have a multiple, see `tasks.patients`.
      size: rows and columns of the images.
      progress: counts patients.

    Raises:
      UserError: a folder that cannot be created.
    """
    for task in chosen:
        place = folder / task.config
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {error.filename} ({error.strerror}); name another --output") from error
        counts = {}
        for split in SPLITS:
            pictures = []
            for drawn in tasks.draw(task, split, test_patients, seed, size):
                pictures.append(drawn)
                progress.step(text=task.config)
            rows = _rows(task, split, pictures)
            pq.write_table(rows, place / f"{split}.parquet", compression="zstd", row_group_size=128)
            counts[split] = _counts(task, rows, len(pictures))
        (place / "README.md").write_text(_task_card(task, counts, seed, size), encoding="utf-8")
    (folder / "README.md").write_text(_suite_card(chosen), encoding="utf-8")


def _rows(task: Task, split: str, patients: Sequence[Sequence[Picture]]) -> pa.Table:
    """The rows of a split, those of a patient after each other."""
    rows = [(number, n, picture) for number, pictures in enumerate(patients) for n, picture in enumerate(pictures)]
    pictures = [picture for _, _, picture in rows]
    patient_ids = [f"{task.config}-{split}-{number:04d}" for number, _, _ in rows]
    # Each picture of organ recognition asks about another organ: its series is the picture.
    one_series = not task.class_of_picture
    columns = {
        "image": nested([picture.image for picture in pictures], pa.float32()),
        "mask": nested([picture.mask for picture in pictures], pa.uint8()),
        "target": pa.array(
            [picture.target for picture in pictures], pa.int64() if task.classes else pa.float64()
        ),
        "filename": [f"{name}-{n:02d}" for name, (_, n, _) in zip(patient_ids, rows, strict=True)],
        "series_id": [
            name if one_series else f"{name}-{n:02d}" for name, (_, n, _) in zip(patient_ids, rows, strict=True)
        ],
        "patient_id": patient_ids,
        "modality": [task.modality] * len(rows),
    }  # fmt: skip
    more = list(dict.fromkeys(name for picture in pictures for name in picture.columns))
    table = pa.table(columns | {name: [picture.columns[name] for picture in pictures] for name in more})
    if not task.classes:
        return table
    # As `datasets` keeps a ClassLabel: readers find the names of the class numbers.
    label = {"names": list(task.classes), "_type": "ClassLabel"}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": {"target": label}}})})


def nested(arrays: Sequence[np.ndarray | None], kind: pa.DataType) -> pa.Array:
    """Arrays of one shape as nested lists; None stays None.

    The lists are built from offsets: lists of Python numbers would take a hundred times as long.
    """
    known = [array for array in arrays if array is not None]
    if not known:
        return pa.nulls(len(arrays), pa.list_(pa.list_(kind)))
    shape = known[0].shape
    values: pa.Array = pa.array(np.stack(known).ravel(), kind)
    for length in reversed(shape):
        values = pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, length, dtype=np.int32)), values)
    if len(known) == len(arrays):
        return values
    raise ValueError("a task has masks for all of its pictures or for none")


# ---- cards


def _counts(task: Task, rows: pa.Table, patients: int) -> Mapping[str, int]:
    found = Counter(rows.column("target").to_pylist()) if task.classes else {}
    classes = {name: found[number] for number, name in enumerate(task.classes)}
    events = {"events": int(sum(rows.column("event").to_pylist()))} if "event" in rows.column_names else {}
    return {"patients": patients, "images": rows.num_rows, **events, **classes}


def _yaml(chosen: Sequence[Task], prefix: str) -> str:
    lines = ["---", "configs:"]
    for task in chosen:
        lines += [f"- config_name: {task.config}", "  data_files:"]
        for split in SPLITS:
            lines += [f"  - split: {split}", f"    path: {prefix.format(task.config)}{split}.parquet"]
    return "\n".join([*lines, "---", ""])


def _task_card(task: Task, counts: Mapping[str, Mapping[str, int]], seed: int, size: int) -> str:
    about = (task.draw.__doc__ or "The organs' names are those of TotalSegmentator.").split("\n\n")[0]
    classes = f"{len(task.classes)}, as in CuriaBench" if task.classes else "a value"
    units = {"CT": "HU", "MR": "MR signal, arbitrary units"}[task.modality]
    head = "| | " + " | ".join(SPLITS) + " |\n|---|" + "---:|" * len(SPLITS) + "\n"
    table = head + "".join(
        f"| {name} | " + " | ".join(f"{counts[split][name]:,}" for split in SPLITS) + " |\n" for name in counts["test"]
    )
    return f"""{_yaml([task], "")}
# {task.config}: {task.title}

A phantom, not patients: synthetic {task.modality} in the schema of CuriaBench's task of this name. Figures on it say that a pipeline
works, and nothing about radiology.

- Target: {task.target}. Classes: {classes}.
- What tells: {" ".join(about.split())}
- `image`: {task.form}, {size} px, {units}{", slices last" if "3D" in task.form else ""};
  `mask`: {"1 in what the target is about" if "mask" in task.form else "None"}; resample by `patient_id`, and average over `series_id`.
- Seed {seed}.

{table}"""


def _suite_card(chosen: Sequence[Task]) -> str:
    rows = "".join(
        f"| `{task.config}` | {task.title} | {task.modality} | {task.form} | {len(task.classes) or 'value'} |\n"
        for task in chosen
    )
    without = "".join(f"- {name}: {reason}.\n" for name, reason in tasks.WITHOUT_FOLDER.items())
    return f"""{_yaml(chosen, "{}/")}
# Phantom of the CuriaBench tasks

Synthetic patients, in the schema of CuriaBench; each folder's README.md has its classes and counts.

| config | task | modality | images | classes |
|---|---|---|---|---:|
{rows}
Tasks without a folder:

{without}"""
