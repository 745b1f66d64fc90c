"""Pictures as inputs: the smallest files of which a build makes slices."""

from pathlib import Path

import numpy as np
from PIL import Image

PNG = np.arange(1600, dtype=np.uint16).reshape(40, 40)


def pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{n}.png" for n in range(count)]
    for n, path in enumerate(paths):
        Image.fromarray(PNG + np.uint16(n)).save(path)
    return paths
