"""Plans several variants of a config: the fastest, or the first that fits."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import ml_collections

from curia_common import logs
from curia_common.errors import UserError
from curia_common.progress import Progress
from curia_jax import config as configs
from curia_jax.models import mae, vit
from curia_jax.plan.planner import Plan, Planner
from curia_jax.plan.topologies import Topology

LARGEST_BATCH = 16_384  # largest batch for which the recipe's learning-rate rule has been shown to work
Overrides = tuple[str, ...]  # words of the command line, "--config.field=value"
logger = logs.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class SearchRow:
    """A candidate.

    Attributes:
      pareto: no candidate is both faster and smaller.
      best: the fastest that fits.
    """

    overrides: Overrides
    plan: Plan
    pareto: bool = False
    best: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields of --json, as docs/planner.md lists them."""
        plan = self.plan.to_json()
        names = (
            "fits", "hbm_bytes_per_chip", "estimated_step_seconds", "estimated_mfu", "images_per_second_per_chip",
            "exposed_collective_fraction",
        )  # fmt: skip
        figures = {name: plan.get(name) for name in names}
        return {"overrides": list(self.overrides), "pareto": self.pareto, "best": self.best, **figures}


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Overrides that make a run fit, and the bytes per chip that it then needs."""

    overrides: Overrides
    hbm_bytes_per_chip: int


@dataclasses.dataclass(frozen=True)
class Choices:
    """Values that are tried, each field by itself."""

    remat: tuple[str, ...]
    unroll: tuple[int, ...]
    batch_size: tuple[int, ...]
    fsdp: tuple[int, ...]


def choices(config: ml_collections.ConfigDict, topology: Topology) -> Choices:
    """What a search tries: only values that divide the topology and the model."""
    if "finetune" in config:
        encoder = vit.config(**config.model)
        width = encoder.width
    else:
        model = mae.config(**config.model)
        encoder, width = model.encoder, math.gcd(model.encoder.width, model.decoder_width)
    inner = topology.devices // topology.slices
    batches = (config.batch_size // 2, config.batch_size, 2 * config.batch_size)
    return Choices(
        remat=tuple(vit.REMAT),
        unroll=tuple(sorted({1, encoder.depth})),
        batch_size=tuple(n for n in batches if 0 < n <= LARGEST_BATCH and n % topology.devices == 0),
        fsdp=tuple(n for n in (1, 4, 16, 32, 64) if inner % n == 0 and width % n == 0),
    )


def _mesh(topology: Topology, fsdp: int) -> Overrides:
    data = topology.devices // topology.slices // fsdp
    return (f"--config.mesh.replica={topology.slices}", f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}")


def search(planner: Planner, file: str, overrides: Sequence[str], *, seconds: float) -> tuple[SearchRow, ...]:
    """Chooses one field after the other, each time keeping the fastest that fits; not every combination is tried.

    Args:
      file: the config.
      seconds: after them no compilation is started.

    Returns:
      All candidates, the fastest first. The first candidate alone if it fits and its step time cannot be estimated.
    """
    tried = choices(configs.load(file, list(overrides)), planner.topology)
    steps: list[list[Overrides]] = [
        [(f"--config.model.remat={name}",) for name in tried.remat],
        [(f"--config.model.unroll={n}",) for n in tried.unroll],
        [(f"--config.batch_size={n}",) for n in tried.batch_size],
        [_mesh(planner.topology, n) for n in tried.fsdp],
    ]
    rows: dict[tuple[tuple[str, str], ...], SearchRow] = {}  # by the fields of their configs
    began = time.monotonic()
    with Progress("search", 1 + sum(len(step) - 1 for step in steps), "candidates") as progress:

        def attempt(words: Overrides) -> SearchRow:
            config = configs.load(file, list(words))
            key = tuple(sorted((name, str(value)) for name, value in configs.flatten(config).items()))
            if key not in rows:
                logger.info("compiling %s", " ".join(words) or "the config as it is")
                rows[key] = SearchRow(words, planner.plan(config))
                progress.step()
            return rows[key]

        best = attempt(tuple(overrides))
        if best.plan.estimate_error is not None:
            logger.warning("nothing to compare without step times")
            return (best,)
        for words in (words for step in steps for words in step):
            if time.monotonic() - began > seconds:
                break
            changed = {word.split("=")[0] for word in words}
            row = attempt((*(word for word in best.overrides if word.split("=")[0] not in changed), *words))
            best = max(best, row, key=lambda row: _rank(row.plan))
    fitting = [row for row in rows.values() if row.plan.fits]
    front = pareto([(row.plan.images_per_second_per_chip, row.plan.memory.total) for row in fitting])
    on_front = [fitting[number] for number in front]
    marked = [
        dataclasses.replace(row, pareto=any(row is one for one in on_front), best=row is best and row.plan.fits)
        for row in rows.values()
    ]
    return tuple(sorted(marked, key=lambda row: -row.plan.images_per_second_per_chip))


def _rank(plan: Plan) -> tuple[bool, float]:
    return plan.fits, plan.images_per_second_per_chip if plan.fits else -float(plan.memory.total)


def pareto(points: Sequence[tuple[float, int]]) -> list[int]:
    """Indices of the points (rate, memory) that no other beats in both, the fastest first."""
    kept: list[int] = []
    least = math.inf
    for number in sorted(range(len(points)), key=lambda n: (-points[n][0], points[n][1])):
        if points[number][1] < least:
            least = points[number][1]
            kept.append(number)
    return kept


def what_would_fit(planner: Planner, file: str, overrides: Sequence[str], *, seconds: float) -> Remedy | None:
    """The first of these that fits: more rematerialisation, a larger fsdp, half the batch. None if none does.

    Args:
      seconds: after them no compilation is started.
    """
    config = configs.load(file, list(overrides))
    tried = choices(config, planner.topology)
    remat: list[Overrides] = [
        (f"--config.model.remat={name}",) for name in tried.remat if name not in ("none", config.model.remat)
    ]
    split = config.mesh.fsdp if config.mesh.fsdp > 0 else math.inf  # -1 is all that is left
    mesh = [_mesh(planner.topology, n) for n in tried.fsdp if n > split][:1]
    everything: Overrides = tuple(word for words in (*remat[-1:], *mesh) for word in words)
    smaller = [(*everything, f"--config.batch_size={n}") for n in tried.batch_size if n < config.batch_size]
    began = time.monotonic()
    for words in (*remat, *mesh, *smaller):
        if time.monotonic() - began > seconds:
            return None
        logger.info("compiling with %s", " ".join(words))
        try:
            plan = planner.plan(configs.load(file, [*overrides, *words]))
        except UserError as error:  # a mesh that this model does not divide over
            logger.info("skipped: %s", error)
            continue
        if plan.fits:
            return Remedy(words, plan.memory.total)
    return None
