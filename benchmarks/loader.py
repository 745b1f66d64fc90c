"""How fast shards become batches on the device. Prints the figures of docs/loader.md.

  python -m benchmarks.loader                          the loader against others, on phantom slices of 224 and 512 px
  python -m benchmarks.loader --shards=FOLDER          the same on your own shards
  python -m benchmarks.loader --first-batch=10000      seconds from the command to the first batch of so many shards
  python -m benchmarks.loader --soak=60                resident memory over an hour

The contenders, each in a process of its own (and its workers'), one after the other in every round:

  loader      curia_jax.data: SliceSource, Grain, canvases, arrays on the device
  bound       the bare read and decode of the same records in a loop, nothing else
  tfds        TFDS's own data source over the same shards in a torch DataLoader, or in a loop where torch is missing
  png         16-bit PNG files of the same slices in a torch DataLoader; left out where torch is missing

The first rounds use one core: no worker processes, and where the system allows it no other core. The others use --workers
processes; of the bound, so many loops at once. PyTorch gets one thread a process: its others wait by spinning, which takes the
time of whoever else is there. Rates per CPU second count the CPU time of all processes of a contender. They are the ones to
compare on a machine that is shared, where the wall clock also measures the neighbours; the ratios are medians over the rounds.

Exit codes: 0 done, 1 memory grew beyond --allow in a soak, 2 wrong usage or input.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from curia_common.errors import UserError
from data_pipeline.format import records, shards
from data_pipeline.stages.statistics import series_statistics, slice_statistics

BATCH = 64
FIELDS = ("slope", "intercept", "low", "high")
# The target: this project's rate is at least so many times the other's.
TARGETS = {"bound": 0.9, "tfds": 1.5, "png": 3.0}


# ---- the slices


def phantom(folder: Path, size: int, patients: int, slices: int) -> Path:
    """Shards of phantom patients of `size` px, made in `folder`: 4 x patients x slices of them."""
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
    whole = series_statistics(np.bincount(pixels.ravel()), 1.0, -1024.0)
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
        "slice_counts": pa.nulls(count, pa.list_(pa.int32())),
    }  # fmt: skip
    pq.write_table(pa.table(columns), target / shards.SHARDS)
    return target


def write_png(source: shards.SliceSource, folder: Path) -> None:
    """Every slice as a 16-bit PNG, with the facts that training needs in one table, as such datasets are kept."""
    from PIL import Image

    folder.mkdir()
    facts = []
    for number in range(len(source)):
        row = source[number]
        Image.fromarray(row["pixels"]).save(folder / f"{number:06d}.png")
        facts.append([*(row[name] for name in FIELDS), row["hu"]])
    np.save(folder / "facts.npy", np.array(facts, np.float32))


# ---- the contenders: endless batches, on the device where they come from a loader


class _Png:
    """A torch map-style dataset of PNG files."""

    def __init__(self, folder: Path, canvas: tuple[int, int]) -> None:
        self._folder, self._canvas, self._facts = folder, canvas, np.load(folder / "facts.npy")

    def __len__(self) -> int:
        return len(self._facts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        from PIL import Image

        with Image.open(self._folder / f"{number:06d}.png") as image:
            pixels = np.array(image, np.uint16)
        return _padded(pixels, self._canvas) | {"facts": self._facts[number]}


class _Tfds:
    """A torch map-style dataset over TFDS's own data source; of every record the first slice."""

    def __init__(self, folder: Path, split: str, canvas: tuple[int, int]) -> None:
        self._folder, self._split, self._canvas = folder, split, canvas
        self._source: Any = None

    def _open(self) -> Any:
        if self._source is None:
            import tensorflow_datasets as tfds

            self._source = tfds.builder_from_directory(self._folder).as_data_source(split=self._split)
        return self._source

    def __len__(self) -> int:
        return len(self._open())

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self._open()[number]
        facts = [row["slope"], row["intercept"], row["low"][0], row["high"][0], row["units"] == b"HU"]
        return _padded(row["slices"][0], self._canvas) | {"facts": np.array(facts, np.float32)}


def _padded(pixels: np.ndarray, canvas: tuple[int, int]) -> dict[str, np.ndarray]:
    extent = np.array(pixels.shape, np.int32)
    if pixels.shape != canvas:
        whole = np.zeros(canvas, np.uint16)
        whole[: pixels.shape[0], : pixels.shape[1]] = pixels
        pixels = whole
    return {"pixels": pixels, "extent": extent}


def _on_device(batches: Iterator[dict[str, Any]]) -> Iterator[int]:
    import jax

    device = jax.devices()[0]
    for batch in batches:
        arrays = jax.device_put({name: np.asarray(value) for name, value in batch.items()}, device)
        jax.block_until_ready(arrays)
        yield len(arrays["pixels"])


def _torch_loader(dataset: Any, workers: int, batch: int) -> Iterator[dict[str, Any]]:
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    more = {"persistent_workers": True, "prefetch_factor": 2, "multiprocessing_context": "spawn"} if workers else {}
    batches = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, drop_last=True, **more)
    while True:
        yield from batches


def _plain_loop(dataset: Any, batch: int) -> Iterator[dict[str, Any]]:
    numbers = np.random.default_rng(0)
    while True:
        rows = [dataset[int(n)] for n in numbers.integers(0, len(dataset), batch)]
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def loader(place: dict[str, Any], workers: int, batch: int) -> Iterator[int]:
    import jax

    from curia_jax import data, sharding

    source = shards.SliceSource(place["shards"], place["split"])
    split = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:1]))
    canvas = data.canvas_size(source, place.get("canvas"))
    stream = data.training_batches(
        source, batch_size=batch, canvas=canvas, seed=0, threads=1, prefetch=2 * batch, workers=workers
    )
    for host in stream:
        jax.block_until_ready(data.to_devices(host, split))
        yield batch


def bound(place: dict[str, Any], workers: int, batch: int) -> Iterator[int]:
    """The same order as the loader's, so that both find their records equally warm."""
    from curia_jax import data

    source = shards.SliceSource(place["shards"], place["split"])
    numbers = data.slice_numbers(0, len(source), slices=len(source), seed=0).tolist()
    while True:
        for start in range(0, len(numbers) - batch + 1, batch):
            for number in numbers[start : start + batch]:
                records.parse_slice(*source.read(number))
            yield batch


def tfds(place: dict[str, Any], workers: int, batch: int) -> Iterator[int]:
    dataset = _Tfds(Path(place["shards"]), place["split"], tuple(place["canvas"]))
    return _on_device(_torch_loader(dataset, workers, batch) if find_spec("torch") else _plain_loop(dataset, batch))


def png(place: dict[str, Any], workers: int, batch: int) -> Iterator[int]:
    return _on_device(_torch_loader(_Png(Path(place["png"]), tuple(place["canvas"])), workers, batch))


CONTENDERS: dict[str, Callable[[dict[str, Any], int, int], Iterator[int]]] = {
    "loader": loader, "bound": bound, "tfds": tfds, "png": png,
}  # fmt: skip


# ---- measuring


def _serve(name: str, place: dict[str, Any], workers: int, batch: int, one_core: bool, pipe: Any) -> None:
    """A contender's process: for every number of seconds received it answers slices, wall and CPU seconds."""
    if one_core and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    stream = CONTENDERS[name](place, workers, batch)
    for _ in range(3 + 2 * workers):  # imports, open files, started workers, full queues
        next(stream)
    pipe.send("ready")
    while seconds := pipe.recv():
        # What was read ahead while the others ran is not this round's work.
        for _ in range(3 + 4 * workers):
            next(stream)
        slices, began, cpu = 0, time.perf_counter(), _cpu_seconds()
        while time.perf_counter() - began < seconds:
            slices += next(stream)
        pipe.send((slices, time.perf_counter() - began, _cpu_seconds() - cpu))
    os._exit(0)  # workers of an endless stream are waiting to hand over


def _cpu_seconds() -> float:
    """Of this process and its children, those that have ended too."""
    own = psutil.Process()
    total = sum(own.cpu_times()[:4])  # user, system, and those of ended children
    for process in own.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


class Contender:
    """A contender in its own process, or several of them at once where it knows no workers itself."""

    def __init__(self, name: str, place: dict[str, Any], workers: int, batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, self._pipes, self._processes = name, [], []
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

    def _receive(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise UserError(f"the contender {self.name} failed; what it said stands above") from None

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


def compare(
    place: dict[str, Any], names: list[str], *, workers: int, batch: int, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """A row per contender: median rates, and the loader's rate over its own, the median over the rounds.

    Args:
      place: "shards", "split", "canvas" and "png".
      workers: processes; 0 for one core.
    """
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
        ours, theirs = found["loader"], found[name]
        rows.append({
            "contender": name, "workers": workers, "canvas": list(place["canvas"]),
            "slices_per_second": statistics.median(wall for wall, _ in theirs),
            "slices_per_cpu_second": statistics.median(cpu for _, cpu in theirs),
            "loader_ratio": statistics.median(a[0] / b[0] for a, b in zip(ours, theirs, strict=True)),
            "loader_ratio_per_cpu_second": statistics.median(a[1] / b[1] for a, b in zip(ours, theirs, strict=True)),
        })  # fmt: skip
    return rows


def soak(
    folder: Path,
    split: str,
    *,
    minutes: float,
    workers: int,
    batch: int,
    limit: int = 0,
    canvas: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Reads batches for so long, or `limit` of them, and follows the resident memory of all processes.

    Returns:
      batches; warm_mb, mean of the second tenth of the time; end_mb, mean of the last tenth; grown_mb; most_mb.
    """
    stream = loader({"shards": str(folder), "split": split, "canvas": canvas}, workers, batch)
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
    return {
        "batches": batches, "slices": batches * batch, "minutes": (time.monotonic() - began) / 60, "workers": workers,
        "warm_mb": warm, "end_mb": last, "grown_mb": last - warm, "most_mb": max(sizes),
    }  # fmt: skip


def _resident_mb() -> float:
    """Of this process and its children, pages that they share counted once each."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_info().rss - process.memory_info().shared for process in processes) / 2**20


def first_batch(folder: Path, split: str, workers: int, batch: int) -> dict[str, float]:
    """Seconds to the first batch on the device, in a new process: all, and without Python's and JAX's imports."""
    code = (
        "import sys, time; import jax; from benchmarks import loader; from curia_jax import data; jax.devices(); t = time.perf_counter();"
        "next(loader.loader({'shards': sys.argv[1], 'split': sys.argv[2]}, int(sys.argv[3]), int(sys.argv[4])));"
        "print(time.perf_counter() - t, flush=True); import os; os._exit(0)"
    )
    began = time.perf_counter()
    words = [sys.executable, "-c", code, str(folder), split, str(workers), str(batch)]
    out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"seconds": time.perf_counter() - began, "seconds_without_imports": float(out.split()[-1])}


# ---- the command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards", type=Path, metavar="FOLDER", help="of data_pipeline.build; phantom slices unless given"
    )
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
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    args.contenders = args.contenders.split(",")
    if unknown := [name for name in args.contenders if name not in CONTENDERS]:
        parser.error(f"no contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    if "loader" not in args.contenders:
        parser.error("--contenders has to name loader, which the others are compared with")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the host's work, which is what is measured
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows, code = _run(args, Path(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return code


def _run(args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], int]:
    if args.first_batch:
        made = many_shards(folder, args.first_batch)
        found = [first_batch(made, "train", 0, min(args.batch, args.first_batch)) for _ in range(3)]
        row = {name: statistics.median(f[name] for f in found) for name in found[0]} | {"shards": args.first_batch}
        print(
            f"first batch of {args.first_batch:,} shards: {row['seconds']:.1f} s, of which {row['seconds_without_imports']:.1f} s "
            "after the imports (medians of 3)"
        )
        return [row], 0
    if args.soak:
        place = args.shards or phantom(folder, int(args.sizes.split(",")[0]), args.patients, args.slices)
        row = soak(place, args.split, minutes=args.soak, workers=args.workers, batch=args.batch)
        print(
            f"{row['minutes']:.1f} minutes, {row['batches']:,} batches of {args.batch}, {args.workers} workers: "
            f"{row['warm_mb']:,.1f} MB after the warm-up, {row['end_mb']:,.1f} MB at the end ({row['grown_mb']:+.1f} MB), "
            f"at most {row['most_mb']:,.1f} MB"
        )
        if row["grown_mb"] > args.allow:
            print(f"memory grew by {row['grown_mb']:.1f} MB, allowed are {args.allow:g}", file=sys.stderr)
            return [row], 1
        return [row], 0
    names = args.contenders
    if "png" in names and not find_spec("torch"):
        print("torch is not installed: no PNG contender (pip install torch)", file=sys.stderr)
        names = [name for name in names if name != "png"]
    rows = []
    print(
        "| px | processes | contender | slices/s | slices per CPU second | loader is x times, wall | per CPU second | target |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for size in [None] if args.shards else [int(size) for size in args.sizes.split(",")]:
        (own := folder / str(size)).mkdir()
        made = args.shards or phantom(own, size, args.patients, args.slices)
        source = shards.SliceSource(made, args.split)
        if len(source) < args.batch:
            raise UserError(f"{len(source)} slices in {args.split} are less than a batch; choose --batch={len(source)}")
        place = {"shards": str(made), "split": args.split, "canvas": source.largest, "png": str(own / "png")}
        if "png" in names:
            write_png(source, own / "png")
        for workers in (0, args.workers) if args.workers else (0,):
            for row in compare(
                place, names, workers=workers, batch=args.batch, rounds=args.rounds, seconds=args.seconds
            ):
                rows.append(row)
                print(_line(row), flush=True)
    return rows, 0


def _line(row: dict[str, Any]) -> str:
    name = row["contender"]
    ratios = f"{row['loader_ratio']:.2f} | {row['loader_ratio_per_cpu_second']:.2f} | {TARGETS.get(name, 1):g}"
    return (
        f"| {'x'.join(map(str, row['canvas']))} | {row['workers'] or 'one core'} | {name} | {row['slices_per_second']:,.0f} | "
        f"{row['slices_per_cpu_second']:,.0f} | {ratios if name != 'loader' else '- | - | -'} |"
    )


if __name__ == "__main__":
    sys.exit(main())
