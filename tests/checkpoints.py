"""Checkpoints as a run saves them, for tests of what reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curia_jax import checkpoint, saving


def save(workdir: Path, steps: Mapping[int, Any], *, config: Mapping[str, Any], examples_per_step: int = 8) -> None:
    """Saves the state of each step into a work directory.

    Args:
      steps: step -> train state, a dict with at least `params`.
      config: the run's config as plain JSON.
    """
    saver = saving.Checkpointer(str(workdir))
    for step, state in steps.items():
        saver.save(step, state, checkpoint.Meta(config=config, examples_seen=examples_per_step * step))
    saver.wait()
    saver.close()
