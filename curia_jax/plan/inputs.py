"""What a run needs of its input pipeline, and what this machine's loader delivers."""

import dataclasses
import time
from pathlib import Path

import ml_collections

from curia_common import mixtures
from curia_common.errors import UserError
from curia_jax import data
from curia_jax.mixture import Mixture, open_slices
from curia_jax.plan.topologies import Topology
from data_pipeline.format import shards

# Slices per epoch if neither --examples nor shards say: the size of ImageNet-1k, for which the recipe's 800 epochs were
# chosen.
ASSUMED_EXAMPLES = 1_281_167
SECONDS = 3.0  # that the loader is measured for


@dataclasses.dataclass(frozen=True)
class InputFacts:
    """The dataset of a run.

    Attributes:
      examples: slices per epoch, cases of fine-tuning.
      examples_assumed: neither --examples nor shards gave that number.
      canvas: height and width of the pixels in a batch.
      bytes_per_image: of a record in storage.
      loader_per_core: images/s that one core of this machine loads; None if not measured.
    """

    examples: int
    examples_assumed: bool
    canvas: tuple[int, int]
    bytes_per_image: float
    loader_per_core: float | None


@dataclasses.dataclass(frozen=True)
class InputNeeds:
    """What storage and hosts have to deliver, in images/s and bytes/s; None where the loader was not measured."""

    hosts: int
    host_images_per_second_needed: float
    host_bytes_per_second_needed: float
    storage_bytes_per_second_needed: float
    bytes_per_image: float
    loader_images_per_second_per_core: float | None
    host_cores: int
    host_images_per_second_available: float | None
    input_suffices: bool | None


def input_facts(config: ml_collections.ConfigDict, examples: int | None) -> InputFacts:
    """The dataset that the config names, with a measurement of the loader; assumptions if it names none.

    Args:
      examples: slices per epoch, cases of fine-tuning; None takes those of the shards.

    Raises:
      UserError: of fine-tuning the number of cases is not given.
    """
    if "finetune" in config and examples is None:
        raise UserError("the config is of fine-tuning; give the number of cases to train on with --examples=N")
    if not config.data.shards:
        height, width = config.data.canvas or config.model.image_size
        return InputFacts(
            examples or ASSUMED_EXAMPLES,
            examples is None,
            (height, width),
            bytes_per_image=2.0 * height * width,  # 16 bits, uncompressed
            loader_per_core=None,
        )
    source = open_slices(config.data.shards, config.data.split)
    canvas = data.canvas_size(source.largest, config.data.canvas)
    return InputFacts(
        examples or len(source),
        False,
        canvas,
        _mean_bytes(config.data.shards),
        loader_rate(source, canvas, config.seed),
    )


def _mean_bytes(text: str) -> float:
    """Mean bytes of an example; of a mixture by its shares."""
    parts = mixtures.parse(text)
    return sum(
        float(share) * stored_bytes(part.folder) for part, share in zip(parts, mixtures.shares(parts), strict=True)
    )


def stored_bytes(folder: str) -> float:
    """Mean bytes of a slice in a shard folder, over all splits."""
    table = shards.read_shards(Path(folder))
    return sum(table["bytes"].to_pylist()) / max(1, sum(table["slices"].to_pylist()))


def loader_rate(source: shards.SliceSource | Mixture, canvas: tuple[int, int], seed: int) -> float:
    """Images that one core of this machine loads per second of CPU time, so that other programs do not matter."""
    batch = min(64, len(source))
    batches = data.training_batches(
        source, batch_size=batch, canvas=canvas, seed=seed, threads=1, prefetch=batch, workers=0
    )
    next(batches)  # opens files
    began, cpu, images = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < SECONDS:
        next(batches)
        images += batch
    return images / max(time.process_time() - cpu, 1e-9)


def input_needs(images_per_second: float, topology: Topology, facts: InputFacts) -> InputNeeds:
    """What a run at this rate, over all chips, needs."""
    per_host = images_per_second / topology.hosts
    available = None if facts.loader_per_core is None else facts.loader_per_core * topology.chip.host_cores
    return InputNeeds(
        hosts=topology.hosts,
        host_images_per_second_needed=per_host,
        host_bytes_per_second_needed=per_host * facts.bytes_per_image,
        storage_bytes_per_second_needed=images_per_second * facts.bytes_per_image,
        bytes_per_image=facts.bytes_per_image,
        loader_images_per_second_per_core=facts.loader_per_core,
        host_cores=topology.chip.host_cores,
        host_images_per_second_available=available,
        input_suffices=None if available is None else available >= per_host,
    )
