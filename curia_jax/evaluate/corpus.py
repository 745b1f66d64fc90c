"""Images of tasks that are in a pretraining corpus, so that an encoder may have seen them.

An image is in a corpus where a slice of its train split has the same size and the same real values. The index of the corpus has
mean and deviation of every slice, so that few slices are decoded. Copies that were resampled, turned or windowed are not found.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32, Int

from curia_common import logs
from curia_jax.evaluate import labels
from curia_jax.evaluate.features import Images
from curia_jax.evaluate.labels import Labelled
from curia_jax.evaluate.results import Score
from data_pipeline.format.shards import SliceSource

TRAIN = "train"  # what curia_jax.pretrain learns from
NAMED = 10  # in the rows and the report; the predictions name all
_CLOSE = 1e-3  # of means and deviations, relative to the deviation: they are kept as float32
_SAME = 0.01  # real values that differ less are equal

log = logs.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The train split of a shard folder.

    Attributes:
      fingerprint: of its shards.
    """

    folder: str
    fingerprint: str

    @classmethod
    def open(cls, folder: str) -> "Corpus":
        """Raises UserError where there are no shards, DataError where they are damaged."""
        return cls(folder, SliceSource(Path(folder), TRAIN).fingerprint)

    @functools.cached_property
    def _source(self) -> SliceSource:
        return SliceSource(Path(self.folder), TRAIN)

    @functools.cached_property
    def _known(self) -> tuple[Int[np.ndarray, "slices 2"], Float[np.ndarray, "slices 2"], Int[np.ndarray, " slices"]]:
        """Size, mean and deviation of the slices in the order of their means, and their numbers."""
        index = self._source.index
        size, moments = (
            np.stack([index.column(name).to_numpy() for name in names], axis=1)
            for names in (("height", "width"), ("mean", "std"))
        )
        order = np.argsort(moments[:, 0], kind="stable")
        return size[order], moments[order], order

    def has(self, values: Float32[np.ndarray, "rows columns"]) -> bool:
        """Whether a slice has these real values."""
        size, moments, numbers = self._known
        mean, std = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
        reach = _CLOSE * max(std, 1.0)
        first, last = np.searchsorted(moments[:, 0], (mean - reach, mean + reach))
        near = slice(first, last)
        alike = (size[near] == values.shape).all(axis=1) & (np.abs(moments[near, 1] - std) < reach)
        return any(
            np.allclose(self._source[int(number)].real, values, rtol=0, atol=_SAME) for number in numbers[near][alike]
        )


def overlap(
    images: Mapping[str, tuple[Images, Int[np.ndarray, " _n"]]], corpora: Sequence[Corpus], batch_size: int
) -> dict[str, Int[np.ndarray, " _m"]]:
    """The numbers of the images of each split that are in a corpus."""
    found: dict[str, list[int]] = {split: [] for split in images}
    for split, (source, numbers) in images.items():
        for batch in source.batches(numbers, batch_size):
            valid = batch.get("valid", np.ones(len(batch["slice"]), bool))
            for row in np.flatnonzero(valid):
                height, width = batch["extent"][row]
                stored = batch["pixels"][row, :height, :width].astype(np.float32)
                values = stored * batch["slope"][row] + batch["intercept"][row]
                if any(corpus.has(values) for corpus in corpora):
                    found[split].append(int(batch["slice"][row]))
    return {split: np.array(sorted(numbers), np.int64) for split, numbers in found.items()}


def noted(
    scores: Sequence[Score], predictions: pa.Table, test: Labelled, found: Mapping[str, Int[np.ndarray, " _m"]]
) -> tuple[list[Score], pa.Table]:
    """Scores that say how many test images a corpus has, and predictions with the column `in_corpus`; with a warning.

    Args:
      test: the labelled images of the test split.
      found: of each split, the numbers of such images as `test.slices` has them.
    """
    seen = found.get(labels.TEST, np.zeros(0, np.int64))
    learned = sum(len(numbers) for split, numbers in found.items() if split != labels.TEST)
    names = tuple(f"{labels.TEST} {number}" for number in seen[:NAMED])
    if len(seen) or learned:
        first = f" ({', '.join(names)}{', …' if len(seen) > NAMED else ''})" if len(seen) else ""
        log.warning(
            f"{len(seen):,} test images{first} and {learned:,} to learn from are in the pretraining corpus; an encoder that was trained on "
            "it has seen them. The column in_corpus of the predictions names all"
        )
    is_seen = np.isin(test.slices, seen)
    series = {str(name) for name in test.series[is_seen]}
    if scores and scores[0].study.unit == "series":
        column = [name in series for name in predictions.column("series").to_pylist()]
    else:
        column = np.isin(predictions.column("slice").to_numpy(), seen).tolist()
    with_column = predictions.append_column("in_corpus", pa.array(column, pa.bool_()))
    made = [
        dataclasses.replace(score, study=dataclasses.replace(score.study, in_corpus=len(seen), in_corpus_first=names))
        for score in scores
    ]
    return made, with_column
