"""Small tasks in the published schema, for tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = {"train": 24, "val": 12, "test": 12}
SIDE = 24  # px


def write(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Parquet of every split; images and masks are arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        plain = [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows]
        pq.write_table(pa.Table.from_pylist(plain), folder / f"{split}-00000-of-00001.parquet", row_group_size=5)


def words(folder: Path) -> list[str]:
    """Options of the command for tasks in folder/data and a run in folder/run."""
    return [f"--data={folder / 'data'}", f"--backbones={folder / 'run'}", f"--output={folder / 'out'}"]


def rows(
    split: str, *, slices: int | None = None, masked: bool = False, per_patient: int = 2, seed: int = 0, **fields: Any
) -> list[dict[str, Any]]:
    """Rows whose region, inside the mask if there is one, is brighter in class 1."""
    rng = np.random.default_rng([seed, *split.encode()])
    made = []
    for number in range(SPLITS[split]):
        target = number // per_patient % 2
        shape = (SIDE, SIDE) if slices is None else (SIDE, SIDE, slices)
        image, mask = rng.normal(0, 30, shape).astype(np.float32), np.zeros(shape, np.float32)
        y, x = rng.integers(0, 2, 2) * SIDE // 2
        mask[y : y + SIDE // 2, x : x + SIDE // 2] = 1
        image += 400 * target * (mask if masked else 1)
        row = {"image": image, "mask": mask if masked else None, "target": target}
        made.append(row | {"patient": f"{split} {number // per_patient}"} | fields)
    return made


def task(**changes: Any) -> dict[str, list[dict[str, Any]]]:
    """The rows of all splits; see `rows`."""
    return {split: rows(split, **changes) for split in SPLITS}
