"""Reads thousands of damaged and hostile files in this project's own formats, and checks that each is accepted or refused in one line.

  python -m benchmarks.fuzz_readers                                  20,000 inputs; `make fuzz` runs it after benchmarks.fuzz
  python -m benchmarks.fuzz_readers --inputs 500 --seed 7            another 500
  python -m benchmarks.fuzz_readers --only results --input 123       one input again, with its traceback

Every input is what a run, a build, a conversion or an evaluation wrote, with one file of it changed: bits flipped, cut, emptied,
missing, a value of JSON or a column of Parquet replaced by a hostile one. Input n of a seed is always the same. What each target
reads is in `targets`. Whatever the change, a reader may accept it or raise a UserError of one line, within 10 s, and the process may
not grow. Checksums do not hide the readers behind them: checkpoints are also read without digests, records with their container
made anew. Exits with 1 if one of these requirements is violated.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import mutations
from benchmarks.mutations import Mutation
from curia_common.errors import UserError

SECONDS = 10.0  # for an input
GROWTH_MB = 100  # of the process, from its first inputs to its last
# tensorstore's Spec.to_json never frees what it returns (seen in 0.1.76 to 0.1.86), and Orbax calls it for every array whose
# metadata it reads. A run reads a checkpoint once; here it adds up, and is limited apart from the rest.
CHECKPOINT_MB = 1.0  # for each checkpoint that is read
CHECKPOINTS = ("checkpoint", "checkpoint without digests")
PEAK_MB = 1500  # above the process's size before its first input
WARM_UP = 500  # inputs after which growth counts
LONGEST_LINE = 2000
MODEL = {
    "size": "custom", "width": 16, "depth": 1, "heads": 2, "mlp_width": 32, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2,
    "image_size": (8, 8), "patch_size": (4, 4),
}  # fmt: skip


class Target(NamedTuple):
    """A reader, and what it reads.

    Attributes:
      folder: of the sound files, below that of all of them.
      damaged: the files in it of which one is changed.
      mutations: beside those of any file.
      read: gets the folder, and reads all that users of these files would.
      share: of the inputs, relative to the others.
      rebuilt: gets the folder and the changed file's bytes, and puts them where they belong; None where they are the file.
    """

    name: str
    folder: str
    damaged: tuple[str, ...]
    mutations: tuple[Mutation, ...]
    read: Callable[[Path], object]
    share: int
    rebuilt: Callable[[Path, bytes], None] | None = None


# ---- sound files


def write_sound(top: Path) -> None:
    """Writes the sound files of all targets."""
    import jax
    import numpy as np

    from curia_jax import checkpoint, config, goodput, saving, telemetry
    from curia_jax.convert import __main__ as convert
    from curia_jax.evaluate import results
    from curia_jax.models import mae
    from curia_jax.plan import prices
    from curia_jax.report import timeline
    from data_pipeline import build, phantom
    from data_pipeline.format import shards

    jax.config.update("jax_platforms", "cpu")
    settings: Any = config.load("demo", [f"--config.model.{name}={value}" for name, value in MODEL.items()])
    params = jax.device_get(mae.init(mae.config(**settings.model.to_dict()), jax.random.key(0)))
    run = top / "run"
    checkpointer = saving.Checkpointer(str(run))
    meta = checkpoint.Meta(
        json.loads(settings.to_json_best_effort()), 64, checkpoint.Dataset("0" * 64, 1, 48, "train"), 8, step_examples=8,
        skipped=(checkpoint.Window(16, 24),), metrics={"loss": 0.5, "refused_updates": 0.0},
        origin=checkpoint.Origin("runs/b16", 800, 25_600, "0" * 16),
    )  # fmt: skip
    checkpointer.save(8, {"params": params, "step": np.array(8, np.int32)}, meta)
    checkpointer.close()
    for ended in checkpointer.ended():
        assert ended.problem is None, ended.problem
    assert convert.main([f"--checkpoint={run}", f"--output={top}/weights", "--layout=vit_mae"]) == 0

    log_folder = top / "log"
    log = telemetry.Log(str(log_folder), start_step=0)
    log.event(
        "started", step=0, examples_seen=0, total_steps=8, parameters=1000, device="cpu", mesh={"data": 2}, peak_flops=1e12,
        peak_source="data sheet", command="python -m curia_jax.pretrain",
    )  # fmt: skip
    ledger = goodput.Ledger(str(log_folder), 0, time.time() - 60)
    ledger.training()
    for step in range(1, 9):
        spent = ledger.write(step)
        values = {"examples_seen": 8 * step, "loss": 1.0, "baseline_loss": 1.0, "images_per_second": 50.0, "mfu": 0.1}
        log._metrics.write({"step": step, **values, "goodput": spent.goodput, "time": time.time()})
    log.event("preempted", step=8, examples_seen=64)
    log.close()
    ledger.close()
    (log_folder / "lock.json").write_text(
        json.dumps({"host": "elsewhere", "boot": "b", "process": 7, "began": time.time(), "renewed": time.time()})
    )
    (log_folder / "logs").mkdir()
    (log_folder / "logs" / "host-0.log").write_text("2026-11-01 12:00:00,000 ERROR curia: error: a shard is missing\n")

    for command, words in (
        (phantom, [f"--output={top}/exams", "--patients=3", "--size=32", "--slices=4"]),
        (build, ["--input", f"{top}/exams/dicom", f"--output={top}/shards", "--validation=0", "--test=0", "--workers=1"]),
    ):  # fmt: skip
        assert command.main(words) == 0
    shutil.rmtree(top / "exams")

    other = top / "json"
    other.mkdir()
    study = results.Study("lesion", 60, 12, "slice", ("no", "yes"), (), 2000, 0, 200, 40)
    fit = results.Fit(32, "validation split", 0.5, 0.7, {"penalty_per_case": 1.0})
    source = results.Provenance("0" * 16, "window", ("mean",), (8, 8), (), 8, 64)
    scores = [
        results.Score(
            study, name, "ridge", "auroc", 0.7, 0.6, 0.8, 3, 0, against, "mean", None if against else fit, source
        )
        for name, against in (("checkpoint", None), ("random", None), ("checkpoint", "random"))
    ]
    (other / "results.json").write_text(json.dumps(results.rows(scores)))
    story = timeline.Timeline(
        "exams", 2, 10**9, {"build": timeline.Stage("0" * 8, True, 1.0, "build", ("make demo",))}, {"x": "y"}
    )
    story.write(other / "timeline.json")
    (other / "prices.json").write_text(json.dumps(dataclasses.asdict(prices.PRICES)))
    shutil.copytree(run, top / "undigested")
    (top / "undigested" / checkpoint.FOLDER / "8" / checkpoint.DIGESTS).unlink()
    shutil.copytree(top / "shards", top / "record")
    shard = next(path for path in sorted((top / "record").glob("*.array_record*")))
    (top / "record" / "example").write_bytes(shards.read_record(shard, 0))


# ---- what reads them


def targets(top: Path) -> list[Target]:
    """Every target over the sound files."""

    def files(folder: str, *patterns: str) -> tuple[str, ...]:
        found = {
            p.relative_to(top / folder).as_posix()
            for pattern in patterns
            for p in (top / folder).glob(pattern)
            if p.is_file()
        }
        assert found, (folder, patterns)
        return tuple(sorted(found))

    step, text = "checkpoints/8", (mutations.json_value, mutations.json_value, mutations.number_text)
    parquet = (mutations.table,) * 4
    return [
        Target("checkpoint", "run", files("run", f"{step}/**/*"), text, read_checkpoint, 1),
        Target("checkpoint without digests", "undigested", files("undigested", f"{step}/**/*"), text, read_checkpoint, 3),
        Target("checkpoint's meta", "undigested", (f"{step}/meta/data.json",), text * 3, read_meta, 25),
        Target("weights", "weights", ("model.safetensors", "config.json"), (*text, mutations.safetensors_header), read_weights, 12),
        Target("shards.parquet", "shards", ("shards.parquet",), parquet, read_shards, 20),
        Target("index.parquet", "shards", ("index.parquet",), parquet, read_index, 10),
        Target("shard", "shards", files("shards", "*.array_record*"), (), read_slices, 10),
        Target("record", "record", ("example",), (mutations.example,) * 5, read_slices, 20, write_record),
        Target("dataset's JSON", "shards", ("card.json", "features.json", "dataset_info.json"), text * 2, read_descriptions, 4),
        Target("dataset's tables", "shards", ("shards.parquet", "index.parquet", "manifest.parquet"), parquet, read_descriptions, 2),
        Target("results", "json", ("results.json",), text * 3, read_results, 25),
        Target("timeline", "json", ("timeline.json",), text * 2, read_timeline, 10),
        Target("prices", "json", ("prices.json",), text * 2, read_prices, 5),
        Target(
            "run log", "log", ("metrics.jsonl", "events.jsonl", "goodput.jsonl", "lock.json", "logs/host-0.log", "profile.request"),
            (mutations.json_line,) * 5, read_log, 30,
        ),
    ]  # fmt: skip


def read_checkpoint(folder: Path) -> None:
    from curia_jax import checkpoint, trained_model

    checkpoint.examine(str(folder))
    trained_model.load(folder)


def read_meta(folder: Path) -> None:
    from etils import epath

    from curia_jax import checkpoint, config

    meta = checkpoint.read_meta(epath.Path(folder / checkpoint.FOLDER / "8"))
    config.changes(config.from_checkpoint(meta.config), {})
    assert meta.position >= meta.examples_seen >= 0 and all(abs(value) >= 0 for value in meta.metrics.values())
    assert meta.to_json()


def read_weights(folder: Path) -> None:
    from curia_jax.convert import checks
    from curia_jax.convert import folder as weights

    weights.check_replaceable(folder)
    with contextlib.suppress(checks.NotUsable):
        checks.compare_numpy(folder, "vit_mae", *_computed())


@functools.cache
def _computed() -> tuple[Any, Any]:
    """Inputs of the sound weights, and zeros in the shapes of what they compute."""
    import numpy as np

    from curia_jax import config
    from curia_jax.convert import checks
    from curia_jax.models import mae

    settings: Any = config.load("demo", [f"--config.model.{name}={value}" for name, value in MODEL.items()])
    given = checks.inputs(mae.config(**settings.model.to_dict()).encoder)
    return given, {"features": np.zeros((3, 5, 16), np.float32), "prediction": np.zeros((3, 4, 16), np.float32)}


def read_shards(folder: Path) -> None:
    from data_pipeline.format import shards
    from data_pipeline.stages import inspection

    source = shards.SliceSource(folder, "+".join(inspection.splits_of(folder)))
    for number in (0, len(source) - 1):
        assert source[number].real.size and source.place(number)


def read_index(folder: Path) -> None:
    import pyarrow.parquet as pq

    from curia_jax.evaluate import labels
    from curia_jax.report import sections
    from data_pipeline.format import shards
    from data_pipeline.stages import inspection

    index = labels.read_index(folder)
    for name in labels.available(index):
        labels.obstacle(index, name)
    source = shards.SliceSource(folder, "train")
    with contextlib.redirect_stdout(io.StringIO()):
        inspection.print_counts(folder, source.index)
        inspection.print_series(source.index)
    sections.dataset(index, pq.read_table(folder / shards.MANIFEST))


def read_slices(folder: Path) -> None:
    import numpy as np
    import pyarrow as pa

    from data_pipeline.format import shards
    from data_pipeline.stages import inspection, verification

    source = shards.SliceSource(folder, "train")
    for row in shards.read_shards(folder).slice(0, 1).to_pylist():
        verification.verify_shard((str(folder), shards.ShardRow(**row)), {}, lambda item: None)
    with contextlib.redirect_stdout(io.StringIO()):
        inspection.print_slice(source, source.index.append_column("number", pa.array(range(len(source)))), 0)
    list(source.check_shards(rest=0))
    source.read_into(range(4), np.empty((4, *source.largest), np.uint16))
    for number in range(4):
        source[number]


def write_record(folder: Path, example: bytes) -> None:
    """Makes the first shard anew, with this as its first record, and shards.parquet say so."""
    import pyarrow.parquet as pq

    from data_pipeline.format import files, shards

    rows = pq.read_table(folder / shards.SHARDS).to_pylist()
    path, sound = folder / rows[0]["file"], folder.with_name("shards") / rows[0]["file"]
    rest = [shards.read_record(sound, number) for number in range(1, rows[0]["records"])]
    _, rows[0]["sha256"] = shards.write(path, [example, *rest])
    rows[0]["bytes"] = path.stat().st_size
    table = pq.read_table(folder / shards.SHARDS)
    files.write_table(folder / shards.SHARDS, type(table).from_pylist(rows, schema=table.schema))


def read_descriptions(folder: Path) -> None:
    from data_pipeline.stages import verification

    verification.check_tables(folder)


def read_results(folder: Path) -> None:
    from curia_jax.evaluate import results, table
    from curia_jax.report import findings, sections

    scores = results.read(folder / "results.json")
    with contextlib.redirect_stderr(io.StringIO()):
        table.show(scores)
    sections.scores(None, scores, findings.find(scores), {}, "", findings.control_sentence(scores, ["lesion"]))
    json.dumps(results.rows(scores))


def read_timeline(folder: Path) -> None:
    from curia_jax.report import sections, timeline

    story = timeline.read(folder / "timeline.json")
    sections.stages(story)
    sections.next_commands(story)


def read_prices(folder: Path) -> None:
    from curia_jax.plan import prices

    prices.load(str(folder / "prices.json"))


def read_log(folder: Path) -> None:
    from curia_jax import doctor, lease
    from curia_jax.report import run_log, sections

    found, spent = doctor.examine(str(folder))
    assert doctor.describe(found, "RUN", spent)
    json.dumps(dataclasses.asdict(found))
    lease.owner(str(folder))
    log = run_log.read(folder)
    sections.run("", log)
    assert log.devices and log.resumed_at is not None


# ---- one input after the other, in a process that may crash


class Input(NamedTuple):
    """What was changed.

    Attributes:
      file: of the target.
      mutation: its name.
    """

    number: int
    target: str
    file: str
    mutation: str

    def __str__(self) -> str:
        return f"{self.target}, input {self.number}: {self.file} after {self.mutation}"


class Result(NamedTuple):
    """The outcome of one input.

    Attributes:
      refusal: how it was refused; None where it was accepted.
      problem: the requirement that it violates.
      trace: of the exception.
    """

    refusal: str | None
    problem: str | None = None
    trace: str = ""


def change(number: int, seed: int, target: Target, top: Path) -> tuple[Input, bytes | None]:
    """Input `number` of a seed: the file's new content, None where it is removed."""
    rng = random.Random(f"{seed}/{number}")
    name = rng.choice(target.damaged)
    path = top / target.folder / name
    data = path.read_bytes().ljust(8) if path.exists() else b"5" + bytes(7)
    if rng.random() < 0.03:
        return Input(number, target.name, name, "remove"), None
    if rng.random() < 0.03 or not data:
        return Input(number, target.name, name, "empty"), b""
    mutate = rng.choice((*mutations.ANYWHERE, *target.mutations))
    return Input(number, target.name, name, mutate.__name__), mutate(data, rng)


def read(target: Target, name: str, data: bytes | None, top: Path, sound: Path) -> Result:
    """Reads the target with the changed file in it, which is put back afterwards."""
    folder, before = top / target.folder, sound / target.folder
    path = folder / name
    began = time.monotonic()
    try:
        if data is None:
            path.unlink(missing_ok=True)
        elif target.rebuilt is not None:
            target.rebuilt(folder, data)
        else:
            path.write_bytes(data)
        target.read(folder)
    except UserError as error:
        problem = None
        if "\n" in str(error) or len(str(error)) > LONGEST_LINE:
            problem = f"a message of {len(str(error)):,} characters and {str(error).count(chr(10)) + 1} lines"
        result = Result(type(error).__name__, problem, traceback.format_exc() if problem else "")
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "benchmark"
        result = Result(None, f"{type(error).__name__} at {where}", traceback.format_exc())
    else:
        result = Result(None)
    if (seconds := time.monotonic() - began) > SECONDS:
        result = result._replace(problem=f"took {seconds:.0f} s")
    for place in (name, *(("shards.parquet",) if target.rebuilt else ())):
        if (before / place).exists():
            shutil.copyfile(before / place, folder / place)
        else:
            (folder / place).unlink(missing_ok=True)
    return result


def _megabytes() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def _work(sound: Path, top: Path, plan: Sequence[tuple[int, str]], seed: int, channel: Connection) -> None:
    """The process that reads. Sends each input before it is read, and its result afterwards with the process's size, MB."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    by_name = {target.name: target for target in targets(sound)}
    for target in by_name.values():
        with contextlib.suppress(FileNotFoundError, UserError):
            target.read(top / target.folder)  # imports, and what is compiled once
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C++ libraries print
    for number, name in plan:
        try:
            made, data = change(number, seed, by_name[name], sound)
        except Exception:
            channel.send(f"input {number} of {name}: {traceback.format_exc()}")
            raise
        channel.send(made)
        result = read(by_name[name], made.file, data, top, sound)
        channel.send((result, _megabytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000))


@dataclasses.dataclass
class Outcome:
    """The outcomes of all inputs.

    Attributes:
      counts: target -> outcome ("accepted", kinds of refusal) -> inputs.
      violations: requirement -> the inputs that violate it.
      traces: requirement -> traceback of the first of them.
      sizes: of the reading process after each input, MB, and its target; one list for each process.
      peaks: growth of each process above its size before its first input, MB.
      seconds: that the reading took.
      seconds_of: target -> of these.
    """

    counts: dict[str, collections.Counter[str]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    violations: dict[str, list[Input]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    traces: dict[str, str] = dataclasses.field(default_factory=dict)
    sizes: list[list[tuple[float, str]]] = dataclasses.field(default_factory=list)
    peaks: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    seconds_of: collections.defaultdict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )

    def _growths(self, checkpoints: bool) -> list[tuple[int, float]]:
        """Inputs of each process after WARM_UP, and MB by which it grew while it read them."""
        found = []
        for sizes in self.sizes:
            steps = [
                size - before
                for (before, _), (size, target) in itertools.pairwise(sizes[WARM_UP:])
                if (target in CHECKPOINTS) == checkpoints
            ]
            found.append((len(steps), sum(steps)))
        return found

    @property
    def growth(self) -> float:
        """Of the process that grew most, without what it grew in reading checkpoints, MB."""
        return max((grown for _, grown in self._growths(checkpoints=False)), default=0.0)

    @property
    def growth_each_checkpoint(self) -> float:
        """MB for each checkpoint that was read, on average."""
        counts, grown = zip(*self._growths(checkpoints=True), strict=True) if self.sizes else ((0,), (0.0,))
        return sum(grown) / max(1, sum(counts))

    def problems(self) -> list[str]:
        """Requirements that were violated, the most frequent first."""
        found = [
            f"{len(inputs):,} inputs: {what}; the first: {inputs[0]}"
            for what, inputs in sorted(self.violations.items(), key=lambda item: -len(item[1]))
        ]
        if self.growth > GROWTH_MB:
            found.append(f"the process grew by {self.growth:,.0f} MB; the limit is {GROWTH_MB}")
        if self.growth_each_checkpoint > CHECKPOINT_MB:
            found.append(
                f"the process grew by {self.growth_each_checkpoint:.1f} MB for each checkpoint; the limit is {CHECKPOINT_MB}"
            )
        if (peak := max(self.peaks, default=0.0)) > PEAK_MB:
            found.append(f"an input took {peak:,.0f} MB; the limit is {PEAK_MB:,}")
        return found


def run(top: Path, plan: Sequence[tuple[int, str]], seed: int) -> Outcome:
    """Reads the inputs of a plan, pairs of number and target, in a process of their own; another one follows where it crashes."""
    sound, work = top / "sound", top / "work"
    if not sound.exists():
        write_sound(sound)
    outcome, done = Outcome(), 0
    context = multiprocessing.get_context("spawn")
    while done < len(plan):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(sound, work)
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(sound, work, plan[done:], seed, theirs))
        process.start()
        theirs.close()
        began, sizes, base = None, [], None
        outcome.sizes.append(sizes)
        while done < len(plan):
            made = _received(ours, 300)
            if not isinstance(made, Input):
                raise RuntimeError(f"the reading process cannot continue: {made}")
            began = began or time.monotonic()
            asked = time.monotonic()
            answer = _received(ours, 6 * SECONDS)
            outcome.seconds_of[made.target] += time.monotonic() - asked
            done += 1
            if answer is None:
                what = (
                    f"the process hangs, or has ended with {process.exitcode}"
                    if process.is_alive()
                    else "the process crashes"
                )
                outcome.violations[f"{what} ({made.target})"].append(made)
                process.kill()
                break
            result, size, peak = answer
            sizes.append((size, made.target))
            base = base if base is not None else peak
            outcome.counts[made.target][result.refusal or ("violated" if result.problem else "accepted")] += 1
            if result.problem:
                outcome.violations[f"{made.target}: {result.problem}"].append(made)
                outcome.traces.setdefault(f"{made.target}: {result.problem}", result.trace)
        outcome.seconds += time.monotonic() - (began or time.monotonic())
        outcome.peaks.append((peak - base) if sizes and base is not None else 0.0)
        process.join()
        ours.close()
    return outcome


def _received(channel: Connection, seconds: float) -> Any:
    """What the reading process sends next; None where it crashes or is silent for so long."""
    try:
        return channel.recv() if channel.poll(seconds) else None
    except EOFError:
        return None


def plan_of(count: int, sound: Path) -> list[tuple[int, str]]:
    """Number and target of each input, in shares."""
    names = [target.name for target in targets(sound) for _ in range(target.share)]
    order = random.Random(0).sample(names, len(names))
    return [(number, order[number % len(order)]) for number in range(count)]


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


def show(outcome: Outcome, traces: bool) -> None:
    """Prints the counts, and what was violated."""
    total = sum(counter.total() for counter in outcome.counts.values())
    print(f"{total:,} inputs in {outcome.seconds:,.0f} s, {total / max(outcome.seconds, 1e-9):,.0f} a second")
    for name, counter in outcome.counts.items():
        print(
            f"  {counter.total():7,} in {outcome.seconds_of[name]:5,.0f} s  {name}: "
            + ", ".join(f"{what} {count:,}" for what, count in counter.most_common())
        )
    print(
        f"the process grew by {outcome.growth:,.0f} MB, and by {outcome.growth_each_checkpoint:.2f} MB for each checkpoint; "
        f"its peak was {max(outcome.peaks, default=0):,.0f} MB above its start"
    )
    longest = [size for size, _ in max(outcome.sizes, key=len, default=[])]
    quarters = (
        ", ".join(f"{longest[len(longest) * quarter // 4 - 1]:,.0f}" for quarter in range(1, 5)) if longest else "none"
    )
    print(f"its size after each quarter: {quarters} MB")
    for text in outcome.problems():
        print(f"VIOLATED: {text}")
    for trace in outcome.traces.values() if traces else ():
        print(trace)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TARGET", help="inputs of this target alone")
    parser.add_argument("--input", type=int, metavar="N", help="this input alone")
    parser.add_argument("--traces", action="store_true", help="print a traceback for each requirement that is violated")
    parser.add_argument("--keep", type=Path, help="folder of the sound files, kept; else a temporary one")
    args = parser.parse_args(argv)
    with _folder(args.keep) as top:
        if not (top / "sound").exists():
            write_sound(top / "sound")
        if args.only:
            plan = [(number, args.only) for number in range(args.inputs)]
        else:
            plan = plan_of(args.inputs, top / "sound")
        if args.input is not None:
            plan = [one for one in plan if one[0] == args.input] or [(args.input, args.only)]
        outcome = run(top, plan, args.seed)
    show(outcome, args.traces or args.input is not None)
    return 1 if outcome.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
