"""Tasks that are labels of a shard folder."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

import curia_common
from curia_common.errors import UserError
from curia_jax.evaluate import across, corpus, features, labels, runner, scoring
from curia_jax.evaluate.cache import gather
from curia_jax.evaluate.results import SHARDS, Score
from curia_jax.evaluate.subgroups import Column
from curia_jax.evaluate.token_store import gather_tokens
from curia_jax.evaluate.tokens import Tokens
from data_pipeline.format import shards
from data_pipeline.format.shards import SliceSource


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A shard folder with a test split.

    Attributes:
      folder: where it is.
      sources: of each split that tasks use and that is there.
      index: rows of all splits, in the order of the slices of each.
      sha256: of index.parquet, which has the labels, splits and digests of all slices.
    """

    folder: Path
    sources: Mapping[str, SliceSource]
    index: pa.Table
    sha256: str

    def check(self, names: Sequence[str]) -> None:
        """Raises UserError where there is no such label."""
        known = labels.available(self.index)
        for name in names:
            if name.removesuffix(labels.VALUE) not in known:
                raise UserError(f"no label {name!r} in the shards; there are: {', '.join(known)}")


def open_dataset(folder: str | Path) -> Dataset:
    """Opens a shard folder.

    Raises:
      UserError: there is no dataset, or it has no test split.
      DataError: it is damaged.
    """
    splits = [str(split) for split in np.unique(labels.read_index(folder).column("split").to_pylist())]
    if labels.TEST not in splits:
        raise UserError(
            f"{folder} has no test split (it has: {', '.join(splits)}); build it with --test above 0 and enough patients"
        )
    sources = {split: SliceSource(folder, split) for split in labels.SPLITS if split in splits}
    index = pa.concat_tables([source.index for source in sources.values()])
    return Dataset(Path(folder), sources, index, shards.sha256(Path(folder) / shards.INDEX))


def job(
    dataset: Dataset, label: str, models: Sequence[features.Backbone], settings: runner.Settings, cache: Path
) -> runner.Job:
    """The task that a label is.

    Args:
      models: the first is compared with the others.
      cache: folder of features.
    """
    name = f"{SHARDS}{label}"

    def run() -> tuple[list[Score], pa.Table]:
        task = labels.task(dataset.index, label, name)
        counts = ", ".join(f"{len(part.slices):,} {split}" for split, part in task.splits.items())
        runner.log.info(
            f"{'values' if task.is_value else f'{len(task.classes)} classes'}, slices: {counts}; intervals over {task.groups}"
        )
        if task.near_duplicates:
            runner.log.warning(
                f"{task.near_duplicates:,} series of the test split look like one that heads learn from, so that scores may be too "
                "good; column near_duplicate_of of index.parquet names them"
            )
        images = {
            split: (features.ShardImages(dataset.sources[split]), part.slices)
            for split, part in task.splits.items()
            if len(part.slices)
        }
        found = gather(images, models, cache, settings.batch_size)
        tokens = None
        if scoring.takes_tokens(task, settings.heads):
            by_slice = gather_tokens(images, models, cache, settings.batch_size, kind="float16")
            tokens = {
                split: {
                    model: Tokens.of_slices(some.values, some.inside, np.arange(len(some.inside)))
                    for model, some in by_model.items()
                }
                for split, by_model in by_slice.items()
            }
        if settings.across:
            inputs = across.Inputs(task, found, tokens, sides(dataset, task, settings.across))
            scores, predictions = across.score(
                inputs, str(settings.across), heads=settings.heads, unit=settings.cases, draws=settings.draws,
                seed=settings.seed, few=settings.few, data_sha256=dataset.sha256, readouts=settings.readouts,
            )  # fmt: skip
        else:
            scores, predictions = scoring.score(
                task, found, heads=settings.heads, unit=settings.cases, draws=settings.draws, seed=settings.seed,
                few=settings.few, data_sha256=dataset.sha256, readouts=settings.readouts, tokens=tokens,
                groups=groups(dataset, task, settings.subgroups),
            )  # fmt: skip
        if settings.corpora:
            seen = corpus.overlap(images, settings.corpora, settings.batch_size)
            scores, predictions = corpus.noted(scores, predictions, task.splits[labels.TEST], seen)
        provenance = {model.name: model.provenance for model in models}
        return [dataclasses.replace(one, provenance=provenance.get(one.backbone)) for one in scores], predictions

    decides = [
        curia_common.__version__, name, dataset.sha256, [(model.name, model.digest) for model in models],
        dataclasses.asdict(settings),
    ]  # fmt: skip
    column = str(settings.across) if settings.across else None
    return runner.Job(name, "ours", json.dumps(decides), run, across=column)


def groups(dataset: Dataset, task: labels.Task, columns: Sequence[Column]) -> dict[str, Shaped[np.ndarray, " slices"]]:
    """The group of every test slice of a task, by columns or labels of the index.

    Raises:
      UserError: there is no such column.
    """
    return {column.name: _of_slices(dataset, task, labels.TEST, column) for column in columns}


def sides(dataset: Dataset, task: labels.Task, column: Column) -> dict[str, Shaped[np.ndarray, " _n"]]:
    """The value of a column or label in every slice of each split of a task.

    Raises:
      UserError: there is no such column.
    """
    return {
        split: _of_slices(dataset, task, split, column) if len(part.slices) else np.zeros(0, np.str_)
        for split, part in task.splits.items()
    }


def _of_slices(dataset: Dataset, task: labels.Task, split: str, column: Column) -> Shaped[np.ndarray, " slices"]:
    index = dataset.sources[split].index
    there = next((name for name in (column.name, f"{labels.PREFIX}{column.name}") if name in index.column_names), None)
    if there is None:
        names = ", ".join(name.removeprefix(labels.PREFIX) for name in index.column_names)
        raise UserError(f"{column.option}={column}: the shards have no such column; there are: {names}")
    return column.groups(index.column(there).take(task.splits[split].slices).to_pylist())
