"""How fast shards become batches on the device. Prints the figures of docs/loader.md.

  python -m benchmarks.loader                          the loader against others, on phantom slices of 224 and 512 px
  python -m benchmarks.loader --shards=FOLDER          the same on your own shards
  python -m benchmarks.loader --first-batch=10000      seconds from the command to the first batch of so many shards
  python -m benchmarks.loader --soak=60                resident memory over an hour

The contenders, each in a process of its own (and its workers'), one after the other in every round:

  loader      curia_jax.data: SliceSource, Grain, buffer pools, arrays on the device
  bound       reading and decoding the same records in a loop, nothing else
  tfds        TFDS's own data source over the same shards in a torch DataLoader, or in a loop where torch is missing
  png         16-bit PNG files of the same slices in a torch DataLoader; left out where torch is missing

The first rounds use one core: no worker processes, and where the system allows it no other core. The others use --workers
processes; the bound runs as many loops at once. PyTorch gets one thread per process: its other threads wait by spinning, which
takes CPU time from everybody else. Rates per CPU second count the CPU time of all processes of a contender. Compare these on a
shared machine, where the wall clock also measures the other users; the ratios are medians over the rounds.

A soak in which memory grew by more than --allow ends with exit code 1.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from curia_common import cli
from curia_common.errors import UserError
from curia_common.exit_codes import ExitCode
from data_pipeline.format import records, shards
from data_pipeline.stages.statistics import series_statistics, slice_statistics

BATCH = 64
# This project's rate over the contender's has to be at least this.
TARGETS = {"bound": 0.9, "tfds": 1.5, "png": 3.0}


# ---- the slices


def phantom(folder: Path, size: int, patients: int, slices: int) -> Path:
    """Shards of phantom patients with slices of `size` px in `folder`: 4 x patients x slices of them."""
    for words in (
        ["data_pipeline.phantom", f"--output={folder}/exams", f"--patients={patients}", f"--size={size}",
         f"--slices={slices}"],
        ["data_pipeline.build", "--input", f"{folder}/exams/dicom", f"--output={folder}/shards", "--validation=0",
         "--test=0"],
    ):  # fmt: skip
        subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "shards"


def many_shards(folder: Path, count: int) -> Path:
    """`count` shard files of one tiny slice each, as shards.parquet describes them; written once and linked."""
    target = folder / "many"
    target.mkdir()
    pixels = np.random.default_rng(0).integers(0, 4096, (32, 32)).astype(np.uint16)
    one = slice_statistics(pixels, 1.0, -1024.0)
    whole = series_statistics({(1.0, -1024.0): np.bincount(pixels.ravel())})
    header = records.RecordHeader(
        "a", "b", "CT", "HU", "axial", "chest", "phantom", 1.0, -1024.0, whole.mean, whole.std, (1.0, 1.0, 1.0),
        whole.percentiles,
    )  # fmt: skip
    entry = records.SliceEntry(0.0, one.low, one.high, one.mean, one.std, 0, 0, one.body_box, "0" * 16)
    data = records.serialize([records.codec.encode(pixels)], header, [entry])
    names = [f"slices-train.array_record-{number:05d}" for number in range(count)]
    _, digest = shards.write(target / names[0], [data])
    for name in names[1:]:
        os.link(target / names[0], target / name)
    size = (target / names[0]).stat().st_size
    columns = {
        "file": names, "split": ["train"] * count, "records": [1] * count, "slices": [1] * count, "bytes": [size] * count,
        "sha256": [digest] * count, "largest_height": [32] * count, "largest_width": [32] * count,
        "addition": pa.array([0] * count, pa.int32()), "slice_counts": pa.nulls(count, pa.list_(pa.int32())),
    }  # fmt: skip
    pq.write_table(pa.table(columns), target / shards.SHARDS)
    return target


def write_png(source: shards.SliceSource, folder: Path) -> None:
    """Every slice as a 16-bit PNG, with the facts that training needs in one table, as is usual for such datasets."""
    from PIL import Image

    folder.mkdir()
    facts = []
    for number in range(len(source)):
        one = source[number]
        Image.fromarray(one.pixels).save(folder / f"{number:06d}.png")
        facts.append(one.facts)
    np.save(folder / "facts.npy", np.array(facts, np.float32))


# ---- the contenders: endless batches, on the device where they come from a loader


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a contender reads.

    Attributes:
      shards: dataset folder.
      canvas: height and width of the pixels in a batch; None takes the largest slice's.
      png: folder of PNG files.
    """

    shards: Path
    split: str
    canvas: tuple[int, int] | None = None
    png: Path | None = None


Arrays = dict[str, np.ndarray]


class PngFolder:
    """A torch map-style dataset of PNG files."""

    def __init__(self, folder: Path, canvas: tuple[int, int]) -> None:
        self._folder, self._canvas, self._facts = folder, canvas, np.load(folder / "facts.npy")

    def __len__(self) -> int:
        return len(self._facts)

    def __getitem__(self, number: int) -> Arrays:
        from PIL import Image

        with Image.open(self._folder / f"{number:06d}.png") as image:
            pixels = np.array(image, np.uint16)
        return _padded(pixels, self._canvas) | {"facts": self._facts[number]}


class TfdsSource:
    """A torch map-style dataset over TFDS's own data source; of every record the first slice."""

    def __init__(self, folder: Path, split: str, canvas: tuple[int, int]) -> None:
        self._folder, self._split, self._canvas = folder, split, canvas
        self._source: Any = None

    def _open(self) -> Any:
        if self._source is None:
            import tensorflow_datasets as tfds

            builder: Any = tfds.builder_from_directory(self._folder)  # untyped
            self._source = builder.as_data_source(split=self._split)
        return self._source

    def __len__(self) -> int:
        return len(self._open())

    def __getitem__(self, number: int) -> Arrays:
        row = self._open()[number]
        facts = [row["slope"], row["intercept"], row["low"][0], row["high"][0], row["units"] == b"HU"]
        return _padded(row["slices"][0], self._canvas) | {"facts": np.array(facts, np.float32)}


def _padded(pixels: np.ndarray, canvas: tuple[int, int]) -> Arrays:
    extent = np.array(pixels.shape, np.int32)
    if pixels.shape != canvas:
        whole = np.zeros(canvas, np.uint16)
        whole[: pixels.shape[0], : pixels.shape[1]] = pixels
        pixels = whole
    return {"pixels": pixels, "extent": extent}


def _on_device(batches: Iterator[Arrays]) -> Iterator[int]:
    import jax

    device = jax.devices()[0]
    for batch in batches:
        arrays = jax.device_put({name: np.asarray(value) for name, value in batch.items()}, device)
        jax.block_until_ready(arrays)
        yield len(arrays["pixels"])


def _torch_loader(dataset: Any, workers: int, batch: int) -> Iterator[Arrays]:
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    more = {"persistent_workers": True, "prefetch_factor": 2, "multiprocessing_context": "spawn"} if workers else {}
    batches = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, drop_last=True, **more)
    while True:
        yield from batches


def _plain_loop(dataset: Any, batch: int) -> Iterator[Arrays]:
    numbers = np.random.default_rng(0)
    while True:
        rows = [dataset[int(n)] for n in numbers.integers(0, len(dataset), batch)]
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def loader(place: Place, workers: int, batch: int) -> Iterator[int]:
    import jax

    from curia_jax import data, sharding

    source = shards.SliceSource(place.shards, place.split)
    split = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:1]))
    canvas = data.canvas_size(source.largest, place.canvas)
    stream = data.training_batches(
        source, batch_size=batch, canvas=canvas, seed=0, threads=1, prefetch=2 * batch, workers=workers
    )
    for host in stream:
        jax.block_until_ready(data.to_devices(host, split))
        yield batch


def bound(place: Place, workers: int, batch: int) -> Iterator[int]:
    """In the loader's order, so that both find their records equally warm."""
    from curia_jax import order

    source = shards.SliceSource(place.shards, place.split)
    numbers = order.slice_numbers(0, len(source), slices=len(source), seed=0).tolist()
    while True:
        for start in range(0, len(numbers) - batch + 1, batch):
            for number in numbers[start : start + batch]:
                records.parse_slice(*source.read(number))
            yield batch


def tfds(place: Place, workers: int, batch: int) -> Iterator[int]:
    assert place.canvas is not None
    dataset = TfdsSource(place.shards, place.split, place.canvas)
    return _on_device(_torch_loader(dataset, workers, batch) if find_spec("torch") else _plain_loop(dataset, batch))


def png(place: Place, workers: int, batch: int) -> Iterator[int]:
    assert place.canvas is not None and place.png is not None
    return _on_device(_torch_loader(PngFolder(place.png, place.canvas), workers, batch))


CONTENDERS: dict[str, Callable[[Place, int, int], Iterator[int]]] = {
    "loader": loader, "bound": bound, "tfds": tfds, "png": png,
}  # fmt: skip


# ---- measuring


def _serve(name: str, place: Place, workers: int, batch: int, one_core: bool, pipe: Connection) -> None:
    """A contender's process: for every number of seconds received it returns slices, wall and CPU seconds."""
    if one_core and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    stream = CONTENDERS[name](place, workers, batch)
    for _ in range(3 + 2 * workers):  # imports, open files, started workers, full queues
        next(stream)
    pipe.send("ready")
    while seconds := pipe.recv():
        # Batches read ahead while the others ran are not this round's work.
        for _ in range(3 + 4 * workers):
            next(stream)
        slices, began, cpu = 0, time.perf_counter(), _cpu_seconds()
        # CPU time is counted in steps of 10 ms: a round is continued until some shows.
        while time.perf_counter() - began < seconds or _cpu_seconds() <= cpu:
            slices += next(stream)
        pipe.send((slices, time.perf_counter() - began, _cpu_seconds() - cpu))
    os._exit(0)  # workers of an endless stream never finish


def _cpu_seconds() -> float:
    """Of this process and its children, including those that have ended."""
    own = psutil.Process()
    total = sum(own.cpu_times()[:4])  # user, system, and those of ended children
    for process in own.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


class Contender:
    """A contender in its own process, or in several at once if it has no workers of its own."""

    def __init__(self, name: str, place: Place, workers: int, batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        alone = name == "bound" or (name == "tfds" and not find_spec("torch"))
        for _ in range(max(1, workers) if alone else 1):
            ours, theirs = context.Pipe()
            own_workers = 0 if alone else workers
            process = context.Process(target=_serve, args=(name, place, own_workers, batch, not workers, theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._receive()

    def _receive(self) -> list[Any]:  # what a pipe carries
        try:
            return [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise UserError(f"the contender {self.name} failed; its error is printed above") from None

    def run(self, seconds: float) -> tuple[float, float]:
        """Slices per wall second and per CPU second."""
        for pipe in self._pipes:
            pipe.send(seconds)
        answers = self._receive()
        return sum(n / wall for n, wall, _ in answers), sum(a[0] for a in answers) / sum(a[2] for a in answers)

    def close(self) -> None:
        """Ends the processes, their workers first."""
        for process in self._processes:
            family = psutil.Process(process.pid).children(recursive=True) if process.is_alive() else []
            process.kill()
            for child in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.join()


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of a contender.

    Attributes:
      workers: processes; 0 for one core.
      slices_per_second, slices_per_cpu_second: medians over the rounds.
      loader_ratio, loader_ratio_per_cpu_second: the loader's rate over the contender's, medians over the rounds.
    """

    contender: str
    workers: int
    canvas: tuple[int, int]
    slices_per_second: float
    slices_per_cpu_second: float
    loader_ratio: float
    loader_ratio_per_cpu_second: float

    def __str__(self) -> str:
        """A line of the printed table."""
        name = self.contender
        ratios = f"{self.loader_ratio:.2f} | {self.loader_ratio_per_cpu_second:.2f} | {TARGETS.get(name, 1):g}"
        return (
            f"| {self.canvas[0]}x{self.canvas[1]} | {self.workers or 'one core'} | {name} | {self.slices_per_second:,.0f} | "
            f"{self.slices_per_cpu_second:,.0f} | {ratios if name != 'loader' else '- | - | -'} |"
        )


def compare(place: Place, names: list[str], *, workers: int, batch: int, rounds: int, seconds: float) -> list[Row]:
    """A row per contender.

    Args:
      workers: processes; 0 for one core.
      seconds: of each contender in a round.
    """
    assert place.canvas is not None
    contenders: list[Contender] = []
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    try:
        for name in names:
            contenders.append(Contender(name, place, workers, batch))
        for number in range(rounds):
            for contender in contenders if number % 2 == 0 else contenders[::-1]:
                found[contender.name].append(contender.run(seconds))
    finally:
        for contender in contenders:
            contender.close()
    rows = []
    for name in names:
        pairs = list(zip(found["loader"], found[name], strict=True))
        wall, cpu = (statistics.median(rates[n] for rates in found[name]) for n in (0, 1))
        ratio, cpu_ratio = (statistics.median(a[n] / b[n] for a, b in pairs) for n in (0, 1))
        rows.append(Row(name, workers, place.canvas, wall, cpu, ratio, cpu_ratio))
    return rows


@dataclasses.dataclass(frozen=True)
class Soak:
    """Resident memory of all processes during a long run, in MB (2^20 bytes).

    Attributes:
      warm_mb: mean of the second tenth of the time.
      end_mb: mean of the last tenth.
      grown_mb: their difference.
    """

    batches: int
    slices: int
    minutes: float
    workers: int
    warm_mb: float
    end_mb: float
    grown_mb: float
    most_mb: float


def soak(
    folder: Path, split: str, *, minutes: float, workers: int, batch: int, limit: int = 0,
    canvas: tuple[int, int] | None = None,
) -> Soak:  # fmt: skip
    """Reads batches for so many minutes, or `limit` of them, and follows the resident memory of all processes."""
    stream = loader(Place(folder, split, canvas), workers, batch)
    samples: list[tuple[float, float]] = []
    began, batches, next_line = time.monotonic(), 0, 60.0
    end = minutes * 60
    while True:
        next(stream)
        batches += 1
        elapsed = time.monotonic() - began
        progress = batches / limit if limit else elapsed / end
        if progress >= 0.1 and (limit or not samples or elapsed - samples[-1][1] >= end / 2000):
            samples.append((_resident_mb(), elapsed))
        if elapsed >= next_line:
            print(f"{elapsed / 60:.0f} min, {batches:,} batches, {_resident_mb():,.1f} MB", file=sys.stderr, flush=True)
            next_line += 60
        if progress >= 1:
            break
    sizes = [size for size, _ in samples]
    tenth = max(1, len(sizes) // 9)
    warm, last = statistics.mean(sizes[:tenth]), statistics.mean(sizes[-tenth:])
    minutes = (time.monotonic() - began) / 60
    return Soak(batches, batches * batch, minutes, workers, warm, last, last - warm, max(sizes))


def _resident_mb() -> float:
    """Of this process and its children, pages that they share counted once each."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_info().rss - process.memory_info().shared for process in processes) / 2**20


@dataclasses.dataclass(frozen=True)
class FirstBatch:
    """The first batch on the device in a new process.

    Attributes:
      seconds, seconds_without_imports: to the batch, with and without the imports of Python and JAX.
      opened: shard files that the process has open after it.
    """

    shards: int
    seconds: float
    seconds_without_imports: float
    opened: int


def first_batch(folder: Path, split: str, workers: int, batch: int) -> FirstBatch:
    """Starts a process that reads one batch of all the shards in `folder`."""
    code = (
        "import os, sys, time; import jax; from benchmarks import loader; from curia_jax import data; jax.devices();"
        "t = time.perf_counter(); place = loader.Place(sys.argv[1], sys.argv[2]);"
        "next(loader.loader(place, int(sys.argv[3]), int(sys.argv[4])));"
        "t = time.perf_counter() - t; fds = [f'/proc/self/fd/{n}' for n in os.listdir('/proc/self/fd')];"
        "print(t, sum('.array_record-' in os.readlink(fd) for fd in fds if os.path.islink(fd)), flush=True); os._exit(0)"
    )
    began = time.perf_counter()
    words = [sys.executable, "-c", code, str(folder), split, str(workers), str(batch)]
    out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, opened = out.split()[-2:]
    shards = len(list(folder.glob("*.array_record-*")))
    return FirstBatch(shards, time.perf_counter() - began, float(seconds), int(opened))


# ---- the command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, metavar="FOLDER", help="of data_pipeline.build; default: phantom slices")
    parser.add_argument("--split", default="train")
    parser.add_argument("--sizes", default="224,512", metavar="PX,…", help="of the phantom (%(default)s)")
    parser.add_argument("--patients", type=int, default=4, help="of the phantom (%(default)s)")
    parser.add_argument("--slices", type=int, default=16, help="of each of a patient's 4 series (%(default)s)")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes beside one core (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each contender in a round (%(default)s)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), metavar="NAME,…")
    parser.add_argument("--first-batch", type=int, metavar="SHARDS", help="time to the first batch of so many shards")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="follow the memory for so long")
    parser.add_argument("--allow", type=float, default=16.0, metavar="MB", help="growth in a soak (%(default)s)")
    cli.add_json(parser, "the figures")
    args = parser.parse_args(argv)
    args.contenders = args.contenders.split(",")
    if unknown := [name for name in args.contenders if name not in CONTENDERS]:
        parser.error(f"no contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    if "loader" not in args.contenders:
        parser.error("--contenders has to name loader, which the others are compared with")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # only the host's work is measured
    code = ExitCode.DONE
    try:
        with tempfile.TemporaryDirectory() as folder:
            if args.first_batch:
                rows = [_first_batch(args, Path(folder))]
            elif args.soak:
                rows = [_soak(args, Path(folder))]
                if rows[0].grown_mb > args.allow:
                    print(f"memory grew by {rows[0].grown_mb:.1f} MB; --allow is {args.allow:g}", file=sys.stderr)
                    code = ExitCode.FAULT
            else:
                rows = _compare(args, Path(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    cli.write_json(args.json, [dataclasses.asdict(row) for row in rows])
    return code


def _first_batch(args: argparse.Namespace, folder: Path) -> FirstBatch:
    made = many_shards(folder, args.first_batch)
    found = [first_batch(made, "train", 0, min(args.batch, args.first_batch)) for _ in range(3)]
    seconds, without = (
        statistics.median(getattr(one, name) for one in found) for name in ("seconds", "seconds_without_imports")
    )
    print(
        f"first batch of {args.first_batch:,} shards: {seconds:.1f} s, of which {without:.1f} s after the imports (medians of 3)"
    )
    return FirstBatch(args.first_batch, seconds, without, max(one.opened for one in found))


def _soak(args: argparse.Namespace, folder: Path) -> Soak:
    made = args.shards or phantom(folder, int(args.sizes.split(",")[0]), args.patients, args.slices)
    row = soak(made, args.split, minutes=args.soak, workers=args.workers, batch=args.batch)
    print(
        f"{row.minutes:.1f} minutes, {row.batches:,} batches of {args.batch}, {args.workers} workers: "
        f"{row.warm_mb:,.1f} MB after the warm-up, {row.end_mb:,.1f} MB at the end ({row.grown_mb:+.1f} MB), "
        f"at most {row.most_mb:,.1f} MB"
    )
    return row


def _compare(args: argparse.Namespace, folder: Path) -> list[Row]:
    names, rows = args.contenders, []
    if "png" in names and not find_spec("torch"):
        print("torch is not installed: no PNG contender (pip install torch)", file=sys.stderr)
        names = [name for name in names if name != "png"]
    print(
        "| px | processes | contender | slices/s | slices per CPU second | loader is x times, wall | per CPU second | target |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for size in [0] if args.shards else [int(size) for size in args.sizes.split(",")]:
        (own := folder / str(size)).mkdir()
        made = args.shards or phantom(own, size, args.patients, args.slices)
        source = shards.SliceSource(made, args.split)
        if len(source) < args.batch:
            raise UserError(f"{len(source)} slices in {args.split} are less than a batch; choose --batch={len(source)}")
        place = Place(made, args.split, source.largest, own / "png")
        if "png" in names:
            write_png(source, own / "png")
        for workers in (0, args.workers) if args.workers else (0,):
            for row in compare(
                place, names, workers=workers, batch=args.batch, rounds=args.rounds, seconds=args.seconds
            ):
                rows.append(row)
                print(row, flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
