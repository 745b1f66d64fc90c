"""Features of images from tables and shards, against the encoder's bare forward pass.

  python -m benchmarks.features
  python -m benchmarks.features --tasks=ich,kits --size=Ti --pixels=64 --slices=256 --batch=64

Three forms of input in the published schema (Parquet: an image; an image with a mask; a volume with a mask), and a shard folder;
all are phantoms, repeated up to --slices. The encoder has random weights. Printed for every form:

  forward      the jitted encoder on prepared images that lie on the device: tokens, and no more
  extraction   what curia_jax.evaluate does for features that it does not have: reading, preparing, encoding, masks, pooling,
               storing. Tables are decoded before that, once for all backbones; see "decode"
  device       what of it runs on the device: preparing, encoding, masks and pooling of a batch that lies there
  read         batches that nothing is done with, slices per second of one core
  decode       from Parquet to the folder of decoded images, slices per second of one core
  cores        that read for an accelerator which does DEVICE_RATE slices a second

All take turns in one process; ratios are medians over the rounds. Where the device is a CPU, reading takes time from the encoder.
An accelerator computes while the next slices are read: extraction reaches what "device" reaches, as long as there are so many cores.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curia_common import cli
from curia_jax import augment
from curia_jax.evaluate import features, labels, preparation, task_data, tasks
from curia_jax.evaluate.backbones import JaxBackbone
from curia_jax.evaluate.cache import FeatureStore
from curia_jax.evaluate.picture_store import open_store
from curia_jax.evaluate.pictures import TaskPictures
from curia_jax.evaluate.results import Provenance
from curia_jax.models import mae, vit
from data_pipeline.format.shards import SliceSource

SHARDS = "shards"
TARGET = 0.95
DEVICE_RATE = 5000  # slices/s of B/16 at 224 px: about what one accelerator does


# ---- the slices


def phantom_task(folder: Path, name: str, pixels: int, slices: int) -> TaskPictures:
    """A task of phantom images, whose rows are repeated until they have that many slices."""
    _run("data_pipeline.phantom", f"--suite=curiabench --tasks={name} --patients=3 --size={pixels} --output={folder}")
    task, files = tasks.find(name), task_data.find(folder, name)
    assert files is not None
    pictures = TaskPictures(task, files, labels.FIT)
    (path,) = files.by_split[labels.FIT]
    rows = pq.read_table(path)
    there = sum(1 for part in pictures.parts for _ in pictures.of_part(part))
    wanted = max(1, round(slices * len(rows) / there))
    repeated = pa.concat_tables([rows] * -(-wanted // len(rows))).slice(0, wanted)
    # More row groups than threads that read, as in the published files.
    pq.write_table(repeated, path, compression="zstd", row_group_size=max(1, wanted // 16))
    return TaskPictures(task, files, labels.FIT)


def phantom_shards(folder: Path, pixels: int, slices: int) -> Path:
    """Shards of the four series of a phantom patient."""
    count = max(4, -(-slices // 4))  # the phantom's fewest
    _run("data_pipeline.phantom", f"--patients=1 --size={pixels} --slices={count} --output={folder}/exams")
    _run("data_pipeline.build", f"--input={folder}/exams/dicom --output={folder}/shards --validation=0 --test=0")
    return folder / "shards"


def _run(module: str, words: str) -> None:
    command = [sys.executable, "-m", module, *words.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# ---- what is timed


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder with random weights.

    Attributes:
      backbone: as curia_jax.evaluate makes it of a run.
      forward: (params, prepared images) -> tokens.
    """

    config: vit.ViTConfig
    backbone: JaxBackbone
    forward: Callable[[Any, jax.Array], jax.Array]

    @classmethod
    def make(cls, size: str, image_size: int, patch_size: int, dtype: str) -> "Encoder":
        config = mae.config(size, image_size=image_size, patch_size=patch_size, dtype=dtype).encoder
        params = jax.jit(vit.init, static_argnums=0)(config, jax.random.key(0))
        settings = preparation.default_settings()
        readouts = [features.Readout.parse(text) for text in ("cls", "mean", "mean+std")]
        view = features.encoder_view(config, params, settings, readouts=readouts)

        def forward(params: Any, images: jax.Array) -> jax.Array:
            encoder = vit.bind(config, params)
            return encoder.encode(encoder.embed(images), [])[0]

        return cls(config, JaxBackbone("random", view, Provenance("0" * 16, "{}")), jax.jit(forward))


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of a form of input; medians over the rounds.

    Attributes:
      forward, device, extraction: slices per second.
      ratio: extraction over forward.
      device_ratio: device over forward.
      read, decode: CPU milliseconds per slice; decode is 0 of shards.
    """

    input: str
    slices: int
    forward: float
    device: float
    extraction: float
    ratio: float
    device_ratio: float
    read: float
    decode: float

    @property
    def cores(self) -> float:
        """That read as fast as DEVICE_RATE."""
        return DEVICE_RATE * self.read / 1000

    def __str__(self) -> str:
        """A line of the printed table."""
        decode = f"{1000 / self.decode:,.0f}" if self.decode else "-"
        return (
            f"| {self.input} | {self.forward:,.1f} | {self.extraction:,.1f} | {self.ratio:.3f} | {self.device_ratio:.3f} | "
            f"{1000 / self.read:,.0f} | {decode} | {self.cores:.1f} |"
        )


def measure(
    name: str, images: features.Images, numbers: np.ndarray, encoder: Encoder, *, batch: int, rounds: int, decode: float
) -> Row:
    """Figures of one form of input.

    Args:
      batch: slices at a time.
      decode: CPU milliseconds per slice that decoding took.
    """
    backbone = encoder.backbone
    batch = -(-batch // backbone.devices) * backbone.devices  # as `features.extract` does
    (first, *_) = images.batches(numbers[:batch], batch)
    on_device = backbone.on_devices(first)
    prepare = jax.jit(
        lambda one: augment.evaluation_view(one, preparation.default_settings(), encoder.config.image_size)
    )
    prepared = jax.block_until_ready(prepare(on_device))
    params = jax.device_put(backbone.view.params)
    compute = jax.jit(backbone.view.compute)
    batches = -(-len(numbers) // batch)

    def repeat(call: Callable[[], Any]) -> None:
        """As extraction does, a batch is sent while the last one is computed."""
        waiting = call()
        for _ in range(batches - 1):
            waiting, last = call(), waiting
            jax.block_until_ready(last)
        jax.block_until_ready(waiting)

    def extraction() -> None:
        with tempfile.TemporaryDirectory() as folder:
            FeatureStore(Path(folder), backbone, images, batch).get(numbers)

    def read() -> None:
        for _ in images.batches(numbers, batch):
            pass

    ways: dict[str, Callable[[], None]] = {
        "forward": lambda: repeat(lambda: encoder.forward(params, prepared)),
        "extraction": extraction,
        "device": lambda: repeat(lambda: compute(params, on_device)),
        "read": read,
    }
    for way in ways.values():
        way()
    wall: dict[str, list[float]] = {way: [] for way in ways}
    cpu: list[float] = []
    for number in range(rounds):
        for way, call in list(ways.items())[:: 1 if number % 2 == 0 else -1]:
            began, cpu_began = time.perf_counter(), time.process_time()
            call()
            wall[way].append(time.perf_counter() - began)
            if way == "read":
                cpu.append(time.process_time() - cpu_began)
    # The last batch is padded: the device does as much for it as for the others, and so does the bare forward pass.
    rates = {way: [len(numbers) / seconds for seconds in found] for way, found in wall.items()}
    ratios = {
        way: statistics.median(a / b for a, b in zip(rates[way], rates["forward"], strict=True))
        for way in ("extraction", "device")
    }
    forward, device, extracted = (statistics.median(rates[way]) for way in ("forward", "device", "extraction"))
    return Row(
        name, len(numbers), forward, device, extracted, ratios["extraction"], ratios["device"],
        1000 * statistics.median(cpu) / len(numbers), decode,
    )  # fmt: skip


# ---- command line


def parser() -> cli.Parser:
    made = cli.parser(
        "python -m benchmarks.features", __doc__, examples="python -m benchmarks.features --size=S --rounds=5"
    )
    made.add_argument("--tasks", default="ich,kits,luna16-3D", metavar="NAME,…", help="of CuriaBench (%(default)s)")
    made.add_argument("--no-shards", action="store_true", help="tables alone")
    made.add_argument("--size", default="B", choices=sorted(vit.SIZES), help="of the encoder (%(default)s)")
    made.add_argument("--image-size", type=int, default=224, help="px (%(default)s)")
    made.add_argument("--patch-size", type=int, default=16, help="px (%(default)s)")
    made.add_argument(
        "--dtype", default="bfloat16" if jax.default_backend() != "cpu" else "float32", choices=sorted(vit.DTYPES)
    )
    made.add_argument("--pixels", type=int, default=512, help="side of the slices (%(default)s)")
    made.add_argument("--slices", type=int, default=32, help="of each form (%(default)s)")
    made.add_argument("--batch", type=int, default=8, help="slices at a time (%(default)s)")
    made.add_argument("--rounds", type=int, default=3)
    cli.add_json(made, "the figures")
    return made


def run(args: argparse.Namespace) -> None:
    encoder = Encoder.make(args.size, args.image_size, args.patch_size, args.dtype)
    device = jax.devices()[0]
    print(
        f"{encoder.config.describe()}, {args.image_size} px, {args.dtype}, {device.device_kind}, {os.cpu_count()} CPU cores; slices of {args.pixels} px"
    )
    print(
        f"| input | forward, slices/s | extraction | extraction / forward | device / forward | read, slices/s a core | decode | cores at {DEVICE_RATE:,}/s |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    rows = []

    def add(name: str, images: features.Images, numbers: np.ndarray, decode: float = 0.0) -> None:
        row = measure(name, images, numbers, encoder, batch=args.batch, rounds=args.rounds, decode=decode)
        rows.append(row)
        print(row, flush=True)

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in args.tasks.split(","):
            pictures = phantom_task(folder / "tasks" / name, name, args.pixels, args.slices)
            began = time.process_time()
            store = open_store(pictures, folder / "decoded")
            decode = 1000 * (time.process_time() - began) / len(store)
            add(f"{name}, {pictures.task.form}", store, store.numbers, decode)
        if not args.no_shards:
            source = SliceSource(phantom_shards(folder / SHARDS, args.pixels, args.slices), labels.FIT)
            add(SHARDS, features.ShardImages(source), np.arange(len(source)))
    met = all(row.ratio >= TARGET for row in rows)
    print(f"extraction at {TARGET:.0%} of the forward pass or more: {'yes' if met else 'no'}")
    cli.write_json(args.json, [dataclasses.asdict(row) | {"cores": row.cores} for row in rows])


def main(argv: list[str] | None = None) -> int:
    return cli.run(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
