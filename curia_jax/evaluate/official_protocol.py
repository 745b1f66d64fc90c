"""The protocol `official`: what CuriaBench's evaluator (raidium-med/curia) does with a task, by its rules for features and heads.

Heads learn from the training split alone; nothing is chosen; every row of the test split counts by itself. The figures get the
intervals that the evaluator has not.

Features by its rules: CLS after the final norm of an image, or the mean of its patches in the mask; of a volume the mean of all its
patches, or lists of the patches of some slices, with an embedding of the slice. Those of volumes are taken before the final norm,
but after it where the task is cached and the volume has more slices than a batch: the evaluator's two ways to compute
them differ in that.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, Shaped

from curia_common import logs
from curia_common.errors import UserError
from curia_jax.evaluate import features, labels, metrics, official, probes, scoring, token_store
from curia_jax.evaluate.cache import gather
from curia_jax.evaluate.features import BEFORE_NORM
from curia_jax.evaluate.picture_store import PictureStore
from curia_jax.evaluate.pictures import MOST_SLICES, pooled
from curia_jax.evaluate.results import MAJORITY, Fit, Score
from curia_jax.evaluate.scoring import Cases, Predictions
from curia_jax.evaluate.targets import Classes, Values
from curia_jax.evaluate.tasks import Official, Task
from curia_jax.evaluate.tokens import Tokens

NAME = "official"
LINEAR, ATTENTION = "linear", "attention"
CLS, MEAN, MEAN_BEFORE_NORM = "cls", "mean", f"mean@{BEFORE_NORM}"
# What its linear heads learn from.
READOUTS = tuple(features.Readout.parse(text) for text in (CLS, MEAN, MEAN_BEFORE_NORM))
METRICS: Mapping[str, metrics.Metric] = {**metrics.METRICS, **metrics.VALUE_METRICS}
CHOSEN_BY = "nothing is chosen: last epoch, settings of the task"

log = logs.get_logger(__name__)

Rows = dict[str, dict[str, Float[np.ndarray, "_n _d"]]]  # split -> backbone -> one row of features per case
Lists = dict[str, dict[str, Tokens]]  # the same, lists of tokens


def obstacle(task: Task) -> str | None:
    """Why the protocol has no figure for a task; None if it has."""
    return None if task.official else "CuriaBench has not released how its head is trained"


def score(
    task: Task, cases: labels.Task, images: Mapping[str, PictureStore], models: Sequence[features.Backbone], cache: Path, *,
    draws: int, seed: int, batch_size: int, data_sha256: str, groups: Mapping[str, Shaped[np.ndarray, " rows"]] | None = None,
) -> tuple[list[Score], pa.Table]:  # fmt: skip
    """Scores of a task, and the prediction of every row of the test split; see `scoring.score`.

    Args:
      images: of the training and the test split.
      models: their readouts have READOUTS, unless they have no patches.
      cache: folder of features.
      seed: of the weights before training, and of the bootstrap.
      batch_size: slices at a time.
      groups: by the name of a column, the group of each test row. Heads are scored on each, too.

    Raises:
      UserError: the protocol has no rule for the task.
      DataError: an image cannot be used.
    """
    settings = task.official
    if settings is None:
        raise UserError(f"{task.name}: {obstacle(task)}")
    learned = scoring.targets_of(cases, labels.FIT)
    if not isinstance(learned, Classes | Values):
        raise UserError(f"{task.name}: the official protocol has no head for times to an event")
    if settings.head == ATTENTION:
        inputs, readout = token_lists(task, settings, images, models, cache, batch_size)
    else:
        inputs, readout = feature_rows(task, settings, images, models, cache, batch_size)
    schedule = official.Schedule(settings.epochs, settings.base_rate, settings.batch)
    chosen = {"epochs": settings.epochs, "base_learning_rate": settings.base_rate, "batch": settings.batch}
    test = Cases.of(cases, "slice")
    predicted = Predictions({}, {}, {})
    for backbone, queries in inputs[labels.TEST].items():
        bank = inputs[labels.FIT][backbone]
        if isinstance(bank, Tokens):
            assert isinstance(queries, Tokens)
            width, outputs = bank.width, official.attentive(bank, learned, queries, schedule, seed=seed)
        else:
            assert not isinstance(queries, Tokens)
            width, outputs = bank.shape[1], official.linear(bank, learned, queries, schedule, seed=seed)
        of = backbone, settings.head
        predicted.scores[of] = predicted.decided[of] = outputs
        predicted.fits[of] = Fit(width, CHOSEN_BY, None, None, chosen), readout[backbone]
        log.info(f"  {backbone}, {settings.head}: {readout[backbone]}")
    floor = MAJORITY, "none"
    predicted.scores[floor] = predicted.decided[floor] = probes.floor(learned, len(test.targets))
    study = scoring.study_of(
        cases, test, cases.splits[labels.FIT].patients, unit="slice", draws=draws, seed=seed, data_sha256=data_sha256,
        protocol=NAME,
    )  # fmt: skip
    bootstrap = metrics.Bootstrap.over(test.patients, draws=draws, seed=seed)
    of_task = {name: METRICS[name] for name in task.metrics}
    scores = scoring.measure(study, test, bootstrap, predicted, list(inputs[labels.TEST]), [settings.head], of_task)
    if groups:
        scores += scoring.measure_groups(study, test, predicted, groups, of_task)
    tables = [
        scoring.table(cases, backbone, head, study.labels, seed, test, predicted) for backbone, head in predicted.fits
    ]
    return scores, pa.concat_tables(tables)


def _wanted(images: Mapping[str, PictureStore]) -> dict[str, PictureStore]:
    return {split: images[split] for split in (labels.FIT, labels.TEST)}


def _before_norm(task: Task, settings: Official, source: PictureStore) -> Bool[np.ndarray, " slices"]:
    """Whether the features of each slice are taken before the final norm."""
    if not task.volume:
        return np.zeros(len(source.numbers), bool)
    return ~(settings.cached & (source.depths > settings.batch))


def feature_rows(
    task: Task, settings: Official, images: Mapping[str, PictureStore], models: Sequence[features.Backbone], cache: Path,
    batch_size: int,
) -> tuple[Rows, dict[str, str]]:  # fmt: skip
    """What linear heads learn from, and the name of the features of each backbone."""
    sources = _wanted(images)
    masked = sources[labels.FIT].masked
    if task.volume and masked:
        raise UserError(f"{task.name}: the official protocol has no linear head for volumes with masks")
    numbers = {split: source.numbers for split, source in sources.items()}
    found = gather({split: (source, numbers[split]) for split, source in sources.items()}, models, cache, batch_size)
    rows: Rows = {}
    names: dict[str, str] = {}
    for split, by_model in found.items():
        before = _before_norm(task, settings, sources[split])
        after_name = MEAN if masked or task.volume else CLS
        rows[split] = {}
        for model, by_readout in by_model.items():
            if len(by_readout) == 1:  # pixels, histogram
                ((names[model], values),) = by_readout.items()
            else:
                for name, needed in ((MEAN_BEFORE_NORM, before.any()), (after_name, not before.all())):
                    if needed and name not in by_readout:
                        raise UserError(
                            f"backbone {model} has no features {name}, which the official protocol takes; leave it out of --backbones"
                        )
                values = by_readout[MEAN_BEFORE_NORM if before.all() else after_name]
                if before.any() and not before.all():
                    values = np.where(before[:, None], by_readout[MEAN_BEFORE_NORM], values)
                used = [
                    name for name, some in ((MEAN_BEFORE_NORM, before.any()), (after_name, not before.all())) if some
                ]
                names[model] = " or ".join(used)
            (rows[split][model],) = pooled(numbers[split], {"": values}).values()
    return rows, names


def token_lists(
    task: Task, settings: Official, images: Mapping[str, PictureStore], models: Sequence[features.Backbone], cache: Path,
    batch_size: int,
) -> tuple[Lists, dict[str, str]]:  # fmt: skip
    """What attention heads learn from, and the name of the features of each backbone."""
    sources = _wanted(images)
    lists: Lists = {split: {} for split in sources}
    names: dict[str, str] = {}
    for split, source in sources.items():
        numbers, before = source.numbers, _before_norm(task, settings, source)
        row = numbers // MOST_SLICES
        place = _places(row)
        by_norm = {
            norm: token_store.gather_tokens(
                {split: (source, numbers[before == norm])}, models, cache, batch_size, before_norm=norm
            )[split]
            for norm in (False, True)
            if (before == norm).any()
        }
        used = [f"{scoring.TOKENS}@{BEFORE_NORM}" if norm else scoring.TOKENS for norm in by_norm]
        for model in models:
            one = next(iter(by_norm.values()))[model.name]
            _, patches, width = one.values.shape
            values = np.empty((len(numbers), patches, width), np.float32)
            inside = np.empty((len(numbers), patches), bool)
            for norm, found in by_norm.items():
                values[before == norm], inside[before == norm] = found[model.name].values, found[model.name].inside
            if task.volume:
                values += official.slice_embedding(int(place.max()) + 1, width)[place][:, None, :]
            lists[split][model.name] = Tokens.of_slices(values, inside, row)
            names[model.name] = " or ".join(used)
    return lists, names


def _places(row: Int[np.ndarray, " slices"]) -> Int[np.ndarray, " slices"]:
    """Number of each slice among those of its row that are used."""
    first = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
    counts = np.diff(first, append=len(row))
    return np.arange(len(row)) - np.repeat(first, counts)
