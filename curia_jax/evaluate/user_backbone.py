"""A backbone that is a function of the user's: any model that Python can run.

The function takes a list of `Slice` and returns `Tokens`; its attribute `identity` is text that changes with its weights and its
preparation of pixels, because features are kept on disk under it. See docs/evaluate.md.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from curia_common.errors import DataError, UserError
from curia_jax import data
from curia_jax.evaluate import token_backbone
from curia_jax.evaluate.features import BEFORE_NORM, LAST, Readout
from curia_jax.evaluate.results import Provenance
from curia_jax.evaluate.tasks import CT, MR
from curia_jax.evaluate.token_backbone import TokenBackbone, Tokens


class Slice(NamedTuple):
    """One slice, as the function receives it.

    Attributes:
      values: HU of CT, raw values of MR.
      modality: "CT", or "MR" where values are not HU.
      spacing: mm between rows and between columns; None where the data does not say.
    """

    values: Float32[np.ndarray, "rows columns"]
    modality: str
    spacing: tuple[float, float] | None


def open_backbone(word: str, readouts: Sequence[Readout]) -> TokenBackbone:
    """The function that `package.module:function` names; modules of the current folder are found.

    Raises:
      UserError: there is none, it has no `identity`, or features of blocks are asked for.
    """
    module, _, name = word.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--backbones={word}: no function {name} of module {module} ({token_backbone.first_line(error)}); write "
            "package.module:function, and install the package or start in its folder"
        ) from error
    identity = getattr(function, "identity", None)
    if not callable(function) or not isinstance(identity, str) or not identity:
        raise UserError(
            f"--backbones={word} has no attribute identity; set {name}.identity to text that changes with its weights and its "
            "preparation of pixels (features are kept on disk under it)"
        )
    if any(layer not in (LAST, BEFORE_NORM) for readout in readouts for layer in readout.layers):
        raise UserError(f"--backbones={word} gives its last tokens alone; name --features without @")

    def forward(batch: data.HostBatch, blocks: Sequence[int]) -> Mapping[int | str, Tokens]:
        found = function(_slices(batch))
        if not isinstance(found, Tokens):
            raise DataError(
                f"{word} returns {type(found).__name__}; it has to return curia_jax.evaluate.token_backbone.Tokens(cls, patches)"
            )
        return {LAST: found}

    provenance = Provenance(identity, "", tuple(map(str, readouts)))
    return TokenBackbone(word, tuple(readouts), provenance, forward)


def _slices(batch: data.HostBatch) -> list[Slice]:
    made = []
    for row, (height, width) in enumerate(batch["extent"]):
        stored = batch["pixels"][row, :height, :width].astype(np.float32)
        values = stored * batch["slope"][row] + batch["intercept"][row]
        spacing = tuple(map(float, batch["spacing"][row])) if "spacing" in batch else (0.0, 0.0)
        made.append(
            Slice(values, CT if batch["hu"][row] else MR, (spacing[0], spacing[1]) if min(spacing) > 0 else None)
        )
    return made
