"""Features on disk: computed once for each backbone and set of images, kept from one command to the next.

A folder holds the features of one backbone and one split, as parts of up to PART images in the order in which they were
computed. Its name is made of the digests of both, so that other weights, another preparation, other readouts or other images
are another folder. A part is written as soon as it is full: a command that is stopped loses the last one at most.
"""

import dataclasses
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from curia_common import logs
from curia_common.progress import Progress
from curia_jax.evaluate import features
from data_pipeline.format import files

PART = 1024
_NUMBERS = "image numbers"  # beside the readouts in a part

log = logs.get_logger(__name__)

Part = dict[str, np.ndarray]  # _NUMBERS, and rows of features by readout


@dataclasses.dataclass
class FeatureStore:
    """Features of a backbone's images.

    Attributes:
      folder: of all stores.
      batch_size: images at a time.
    """

    folder: Path
    backbone: features.Backbone
    images: features.Images
    batch_size: int = 64
    _parts: list[Part] | None = None

    @property
    def path(self) -> Path:
        """Folder of this store's parts."""
        return self.folder / f"{self.backbone.digest}-{self.images.split}-{self.images.fingerprint[:16]}"

    def missing(self, numbers: Int[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
        """The image numbers whose features are not stored yet."""
        return np.setdiff1d(
            numbers, np.concatenate([np.empty(0, np.int64), *(part[_NUMBERS] for part in self._read())])
        )

    def get(
        self, numbers: Int[np.ndarray, " n"], progress: Callable[[int], None] = lambda images: None
    ) -> dict[str, Float[np.ndarray, "n _features"]]:
        """Features by readout, in the order of the image numbers; missing ones are computed and stored.

        Args:
          progress: called with the number of images of each finished batch.

        Raises:
          DataError: an image cannot be used, or a feature is not finite.
          OSError: the disk is full.
        """
        waiting: list[Part] = []
        missing, computed = self.missing(numbers), iter(())
        if len(missing):
            computed = features.extract(self.images, missing, self.backbone, batch_size=self.batch_size)
        for found, values in computed:
            waiting.append({_NUMBERS: found, **values})
            if sum(len(part[_NUMBERS]) for part in waiting) >= PART:
                self._write(waiting)
                waiting = []
            progress(len(found))
        if waiting:
            self._write(waiting)
        parts = self._read()
        have = np.concatenate([part[_NUMBERS] for part in parts])
        order = np.argsort(have)
        rows = order[np.searchsorted(have, numbers, sorter=order)]
        return {name: np.concatenate([part[name] for part in parts])[rows] for name in parts[0] if name != _NUMBERS}

    def _read(self) -> list[Part]:
        if self._parts is None:
            self._parts = []
            for path in sorted(self.path.glob("part-*.npz")):
                try:
                    with np.load(path, allow_pickle=False) as file:
                        self._parts.append({name: file[name] for name in file.files})
                except (zipfile.BadZipFile, ValueError, EOFError, KeyError) as error:
                    log.warning(f"{path} is damaged ({type(error).__name__}); its features are computed again")
                    path.unlink()
        return self._parts

    def _write(self, parts: list[Part]) -> None:
        part = {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}
        self.path.mkdir(parents=True, exist_ok=True)
        taken = {path.name for path in self.path.glob("part-*.npz")}
        free = next(n for n in range(len(taken) + 1) if f"part-{n:05d}.npz" not in taken)
        with files.written(self.path / f"part-{free:05d}.npz", False) as file:
            np.savez(file, **part)  # pyright: ignore[reportArgumentType] - no name is "allow_pickle"
        self._read().append(part)


def gather(
    images: Mapping[str, tuple[features.Images, Int[np.ndarray, " _n"]]],
    models: Sequence[features.Backbone],
    folder: Path,
    batch_size: int,
) -> dict[str, dict[str, dict[str, Float[np.ndarray, "_n _features"]]]]:
    """Split -> backbone -> readout -> features, in the order of the image numbers.

    Args:
      images: of each split, with the numbers of those that are wanted.
      folder: of all stores.
    """
    stores = {
        (split, model.name): (FeatureStore(folder, model, source, batch_size), numbers)
        for split, (source, numbers) in images.items()
        for model in models
    }
    missing = sum(len(store.missing(numbers)) for store, numbers in stores.values())
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {split: {} for split in images}
    with Progress("features", missing, "slices", enabled=missing > 0) as progress:
        for (split, model), (store, numbers) in stores.items():
            found[split][model] = store.get(numbers, progress.step)
    return found
