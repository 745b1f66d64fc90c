"""What saving a checkpoint costs a run: how long the train loop is blocked, and how much host memory it takes.

  python -m benchmarks.checkpoint                     the state of a ViT-L/16 MAE: float32 parameters and the moments of AdamW
  python -m benchmarks.checkpoint --size=B            a smaller one
  python -m benchmarks.checkpoint --workdir=FOLDER    on that folder's storage

A loop takes steps that read and write the whole state, and saves it through curia_jax.saving as a run does, once while the loop
continues (asynchronous, as in a run) and once waiting for the end of the save (synchronous). Each has a process of
its own. The values are random, because zeros would be compressed away. On a CPU the state itself lies in host memory, so the
memory that a save takes is what the process has at most, less what it had before the save.

  held_up     seconds that the loop stood still in the call that saves
  slowed      seconds that the steps during the save took longer than those before
  save        seconds until the checkpoint was on disk, with its digests
  extra       host memory that the save took at most, as a multiple of the state's size

Exits with 1 where the asynchronous save holds up the loop for longer than the synchronous one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from curia_common import cli
from curia_common.exit_codes import ExitCode

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("asynchronous", "synchronous")
SIZES = ("Ti", "S", "B", "L", "H")
STEPS = 5  # before the save, whose median the others are compared with


class Cost(NamedTuple):
    """What one save cost; see the head of this file.

    Attributes:
      state: size of the state, bytes.
    """

    way: str
    size: str
    state: int
    held_up: float
    slowed: float
    save: float
    extra: float


class _Memory:
    """The most resident memory of this process while the block runs, bytes."""

    def __enter__(self) -> "_Memory":
        self._process, self._done = psutil.Process(), threading.Event()
        self.before = self.most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, self._process.memory_info().rss)

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        self._thread.join()


def measure(size: str, way: str, workdir: str) -> Cost:
    """Saves the state of a model of this size once, in this process."""
    import jax
    import numpy as np

    from curia_jax import checkpoint, saving, sharding
    from curia_jax import config as configs
    from curia_jax.objectives import mae

    jax.config.update("jax_platforms", "cpu")
    config = configs.load(
        "base", [f"--config.model.size={size}", "--config.model.attention=xla", "--config.batch_size=1"]
    )
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    abstract = mae.make(config, mesh, canvas=(224, 224), warmup_steps=1, total_steps=2).abstract_state
    generator = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype != np.float32:
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        return jax.device_put(generator.standard_normal(leaf.shape, np.float32), leaf.sharding)

    state = jax.tree.map(values, abstract)
    bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    take_step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), state), donate_argnums=0)

    def timed_step(state: dict) -> tuple[dict, float]:
        began = time.perf_counter()
        return (state := jax.block_until_ready(take_step(state))), time.perf_counter() - began

    state, _ = timed_step(state)  # compiles
    usual: list[float] = []
    for _ in range(STEPS):
        state, seconds = timed_step(state)
        usual.append(seconds)
    step = int(state["step"])
    checkpointer = saving.Checkpointer(workdir)
    with _Memory() as memory:
        began = time.perf_counter()
        checkpointer.save(step, state, checkpoint.Meta({}, step))
        if way == "synchronous":
            checkpointer.wait()
        held_up = time.perf_counter() - began
        slowed, ended = 0.0, checkpointer.ended()
        while not ended:
            state, seconds = timed_step(state)
            slowed += max(0.0, seconds - float(np.median(usual)))
            ended = checkpointer.ended()
        saved = time.perf_counter() - began
    checkpointer.close()
    if ended[0].problem is not None:
        raise RuntimeError(ended[0].problem)
    return Cost(way, size, bytes_, held_up, slowed, saved, (memory.most - memory.before) / bytes_)


def parser() -> argparse.ArgumentParser:
    made = cli.parser(
        "python -m benchmarks.checkpoint", __doc__, examples="""
python -m benchmarks.checkpoint
python -m benchmarks.checkpoint --size=B --json=saves.json""",
    )  # fmt: skip
    made.add_argument("--size", default="L", choices=SIZES, help="of the encoder")
    made.add_argument("--workdir", type=Path, help="folder to save in; default: one for temporary files")
    made.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # of the process that measures
    cli.add_json(made, f"list of {', '.join(Cost._fields)}")
    return made


def compare(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.way is not None:
        print(json.dumps(measure(args.size, args.way, str(args.workdir))))
        return ExitCode.DONE
    costs = []
    for way in WAYS:
        with tempfile.TemporaryDirectory(dir=args.workdir) as folder:
            words = [f"--size={args.size}", f"--way={way}", f"--workdir={folder}"]
            command = [sys.executable, "-m", "benchmarks.checkpoint", *words]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            costs.append(Cost(*json.loads(done.stdout.splitlines()[-1])))
    print(f"state of ViT-{args.size}/16: {costs[0].state / 1e9:.2f} GB")
    print("| save | loop held up | steps slowed | on disk after | host memory, x the state |")
    print("|---|---|---|---|---|")
    for cost in costs:
        print(f"| {cost.way} | {cost.held_up:.2f} s | {cost.slowed:.2f} s | {cost.save:.1f} s | {cost.extra:.2f} |")
    cli.write_json(args.json, [cost._asdict() for cost in costs])
    return ExitCode.FAULT if costs[0].held_up > costs[1].held_up else ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), compare, argv)


if __name__ == "__main__":
    sys.exit(main())
