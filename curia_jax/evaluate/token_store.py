"""Tokens on disk: one memory-mapped array for each backbone and set of images, kept from one command to the next.

A folder holds the tokens of the images in the order of their numbers, which patches are inside the mask, and how many images are
done. A command that is stopped loses the tokens of the last `cache.PART` images at most.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.lib.format import open_memmap

from curia_common import logs
from curia_common.progress import Progress
from curia_jax import data
from curia_jax.evaluate import features
from curia_jax.evaluate.cache import PART
from data_pipeline.format import files

log = logs.get_logger(__name__)
_STATE, _VALUES, _INSIDE, _NUMBERS = "state.json", "tokens.npy", "inside.npy", "numbers.npy"


@dataclasses.dataclass(frozen=True)
class SliceTokens:
    """Tokens of images.

    Attributes:
      values: memory-mapped.
      inside: those of the mask; all without one.
    """

    values: Float[np.ndarray, "images tokens d"]
    inside: Bool[np.ndarray, "images tokens"]


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Tokens of a backbone's images.

    Attributes:
      folder: of all stores.
      before_norm: the output of the last block instead of that of the final norm.
      kind: of the numbers on disk: float32, or float16, which halves them.
      batch_size: images at a time.
    """

    folder: Path
    backbone: features.Backbone
    images: features.Images
    before_norm: bool = False
    kind: str = "float32"
    batch_size: int = 64

    @property
    def path(self) -> Path:
        what = f"tokens{'-before-norm' if self.before_norm else ''}-{self.kind}"
        return self.folder / f"{self.backbone.digest}-{self.images.split}-{self.images.fingerprint[:16]}-{what}"

    def get(self, numbers: Int[np.ndarray, " n"], progress: Callable[[int], None] = lambda images: None) -> SliceTokens:
        """Tokens in the order of the image numbers, which are sorted; missing ones are computed and stored.

        Args:
          progress: called with the number of images of each finished batch.

        Raises:
          DataError: an image cannot be used, or a token is not finite.
          OSError: the disk is full.
        """
        done = self.done(numbers)
        if done < len(numbers):
            self._compute(numbers, done, progress)
        values, inside = (np.load(self.path / name, mmap_mode="r") for name in (_VALUES, _INSIDE))
        return SliceTokens(values, np.asarray(inside))

    def done(self, numbers: Int[np.ndarray, " n"]) -> int:
        """How many of these images, from the first on, are on disk."""
        try:
            state = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
            known = np.load(self.path / _NUMBERS, allow_pickle=False)
            if np.array_equal(known, numbers) and isinstance(state["done"], int):
                return state["done"]
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError, EOFError) as error:
            log.warning(f"{self.path} is damaged ({type(error).__name__}); its tokens are computed again")
        return 0

    def _compute(self, numbers: Int[np.ndarray, " n"], done: int, progress: Callable[[int], None]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if done == 0:
            (self.path / _STATE).unlink(missing_ok=True)
            np.save(self.path / _NUMBERS, numbers)
        values = inside = None
        written = done
        for batch in self._batches(numbers[done:]):
            if values is None or inside is None:
                shape = (len(numbers), *batch["inside"].shape[1:])
                mode = "r+" if done else "w+"
                values = open_memmap(
                    self.path / _VALUES, mode=mode, dtype=self.kind, shape=(*shape, batch["tokens"].shape[-1])
                )
                inside = open_memmap(self.path / _INSIDE, mode=mode, dtype=np.bool_, shape=shape)
            count = len(batch["inside"])
            values[written : written + count], inside[written : written + count] = batch["tokens"], batch["inside"]
            written += count
            progress(count)
            if written == len(numbers) or written // PART > (written - count) // PART:
                values.flush()
                inside.flush()
                files.write_text(self.path / _STATE, json.dumps({"done": written}) + "\n")

    def _batches(self, numbers: Int[np.ndarray, " n"]) -> Iterator[dict[str, np.ndarray]]:
        def compute(batch: data.HostBatch):  # noqa: ANN202 - what `features.extract` takes
            return self.backbone.tokens(batch, before_norm=self.before_norm)

        for _, found in features.extract(
            self.images, numbers, self.backbone, batch_size=self.batch_size, compute=compute
        ):
            yield found


def gather_tokens(
    images: Mapping[str, tuple[features.Images, Int[np.ndarray, " _n"]]],
    models: Sequence[features.Backbone],
    folder: Path,
    batch_size: int,
    *,
    before_norm: bool = False,
    kind: str = "float32",
) -> dict[str, dict[str, SliceTokens]]:
    """Split -> backbone -> tokens, in the order of the image numbers.

    Args:
      images: of each split, with the numbers of those that are wanted.
      folder: of all stores.
      before_norm, kind: see `TokenStore`.
    """
    stores = {
        (split, model.name): (TokenStore(folder, model, source, before_norm, kind, batch_size), numbers)
        for split, (source, numbers) in images.items()
        for model in models
    }
    missing = sum(len(numbers) - store.done(numbers) for store, numbers in stores.values())
    found: dict[str, dict[str, SliceTokens]] = {split: {} for split in images}
    with Progress("tokens", missing, "slices", enabled=missing > 0) as progress:
        for (split, model), (store, numbers) in stores.items():
            found[split][model] = store.get(numbers, progress.step)
    return found
