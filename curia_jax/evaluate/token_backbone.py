"""Backbones from other libraries: the interface that they implement, and how their tokens become features."""

import dataclasses
import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Float, Float32, Shaped

import curia_common
from curia_common.errors import DataError, UserError
from curia_jax import augment, data
from curia_jax.evaluate import preparation
from curia_jax.evaluate.features import BEFORE_NORM, LAST, Readout
from curia_jax.evaluate.preparation import Preparation
from curia_jax.evaluate.results import Provenance

Array = Any  # of NumPy, PyTorch or JAX


class Tokens(NamedTuple):
    """The tokens of a batch of slices.

    Attributes:
      cls: (batch, width): its summary of each slice; None without one.
      patches: (batch, rows, columns, width): of the patches, as they lie in the slice; None without any.
    """

    cls: Array | None
    patches: Array | None


# (batch, blocks) -> tokens after the blocks, and after the last norm (LAST).
Forward = Callable[[data.HostBatch, Sequence[int]], Mapping[int | str, Tokens]]


@dataclasses.dataclass(frozen=True)
class TokenBackbone:
    """A backbone that gives tokens; see `features.Backbone`.

    Attributes:
      name: as in results.
      readouts: that are made of its tokens. Those that it has no tokens for are left out.
      forward: the encoder.
      depth: number of the last block, whose output is before the last norm; 0 where it gives tokens of no block.
    """

    name: str
    readouts: tuple[Readout, ...]
    provenance: Provenance
    forward: Forward
    devices: int = 1
    depth: int = 0

    @property
    def digest(self) -> str:
        """As that of `backbones.JaxBackbone`."""
        return digest(self.provenance)

    def features(self, batch: data.HostBatch) -> dict[str, Float[np.ndarray, "batch _features"]]:
        """Features of a batch by the name of their readout.

        Raises:
          UserError: it has the tokens of no readout.
          DataError: its tokens have another shape than `Tokens` says.
        """
        layers = {layer for readout in self.readouts for layer in readout.layers}
        by_layer = self._by_layer(batch, layers)
        found = {}
        for readout in self.readouts:
            given = [layer in by_layer for layer in readout.layers]
            parts = (
                [_pooled(by_layer[layer], readout.pooling, batch) for layer in readout.layers] if all(given) else [None]
            )
            if all(part is not None for part in parts):
                found[str(readout)] = np.concatenate([part for part in parts if part is not None], axis=1)
        if not found:
            has = "no CLS token" if by_layer[LAST].cls is None else "no patch tokens"
            wanted = ", ".join(map(str, self.readouts))
            raise UserError(f"backbone {self.name} has {has}, and --features={wanted} needs them; name others")
        return found

    def tokens(self, batch: data.HostBatch, *, before_norm: bool) -> dict[str, Shaped[np.ndarray, "batch tokens ..."]]:
        """As that of `features.Backbone`; without patches, its CLS token.

        Raises:
          UserError: it has no tokens before the last norm.
          DataError: its tokens have another shape than `Tokens` says.
        """
        layer = BEFORE_NORM if before_norm else LAST
        found = self._by_layer(batch, {layer}).get(layer)
        if found is None:
            raise UserError(f"backbone {self.name} gives no tokens before its last norm; leave it out of --backbones")
        if found.patches is None:
            values = to_numpy(found.cls)[:, None, :]
            return {"tokens": values, "inside": np.ones(values.shape[:2], bool)}
        count, rows, columns, width = found.patches.shape
        inside = np.ones((count, rows * columns), bool)
        if "mask" in batch:
            inside = np.asarray(_inside(batch["mask"], batch["extent"], (rows, columns)))
        return {"tokens": to_numpy(found.patches).reshape(count, rows * columns, width), "inside": inside}

    def _by_layer(self, batch: data.HostBatch, layers: Collection[int | str]) -> dict[int | str, Tokens]:
        blocks = {layer for layer in layers if isinstance(layer, int)}
        if BEFORE_NORM in layers and self.depth:
            blocks.add(self.depth)
        by_layer = dict(self.forward(batch, sorted(blocks)))
        for tokens in by_layer.values():
            self._check(tokens, len(batch["slice"]))
        if self.depth in by_layer:
            by_layer[BEFORE_NORM] = by_layer[self.depth]
        return by_layer

    def _check(self, tokens: Tokens, count: int) -> None:
        for what, values, axes in (("cls", tokens.cls, 2), ("patches", tokens.patches, 4)):
            if values is not None and (len(values.shape) != axes or values.shape[0] != count):
                wanted = f"({count}, width)" if axes == 2 else f"({count}, rows, columns, width)"
                raise DataError(f"backbone {self.name} gives {what} of shape {tuple(values.shape)}; wanted is {wanted}")


def _pooled(
    tokens: Tokens, pooling: Sequence[str], batch: data.HostBatch
) -> Float32[np.ndarray, "batch _features"] | None:
    """Statistics of the tokens, concatenated; over the patches inside the mask where there is one. None without such tokens.

    Sums are written so that they run where the tokens are, on a GPU for example.
    """
    parts: list[Float32[np.ndarray, "batch _width"]] = []
    for name in pooling:
        if name == "cls":
            if tokens.cls is None:
                return None
            parts.append(to_numpy(tokens.cls))
            continue
        if tokens.patches is None:
            return None
        count, rows, columns, width = tokens.patches.shape
        patches = tokens.patches.reshape(count, rows * columns, width)
        weights = np.full((count, rows * columns, 1), 1 / (rows * columns), np.float32)
        if "mask" in batch:
            inside = np.asarray(_inside(batch["mask"], batch["extent"], (rows, columns)), np.float32)
            weights = (inside / inside.sum(axis=1, keepdims=True))[:, :, None]
        weights = _beside(weights, patches)
        mean = (patches * weights).sum(1)
        if name == "std":
            mean = (((patches - mean[:, None]) ** 2) * weights).sum(1) ** 0.5
        parts.append(to_numpy(mean))
    return np.concatenate(parts, axis=1)


def _beside(values: np.ndarray, other: Array) -> Array:
    """An array converted to the other's library and device."""
    if hasattr(other, "new_tensor"):
        return other.new_tensor(values)
    return values


def to_numpy(values: Array) -> Float32[np.ndarray, "..."]:
    """An array of any library, in float32 on the host."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, np.float32)


_inside = jax.jit(augment.patches_inside, static_argnums=2)


@functools.cache
def _compiled(wanted: Preparation) -> Callable[[augment.Batch], jax.Array]:
    return jax.jit(lambda batch: preparation.prepare(batch, wanted))


def prepared(batch: data.HostBatch, wanted: Preparation) -> Float32[np.ndarray, "batch channels height width"]:
    """The input of an encoder, on the host."""
    fields = {name: np.asarray(batch[name]) for name in data.DEVICE_FIELDS}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        images = _compiled(wanted)(cast(augment.Batch, fields))
    return np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2))


def digest(provenance: Provenance) -> str:
    """Digest of everything that determines the features of a backbone, including the code version; 16 hex digits."""
    stated = dataclasses.asdict(provenance) | {"version": curia_common.__version__}
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """First 16 hex digits of the SHA-256 of named arrays."""
    result = hashlib.sha256()
    for name, values in arrays:
        result.update(name.encode())
        result.update(np.ascontiguousarray(values).tobytes())
    return result.hexdigest()[:16]


def package(name: str, word: str) -> ModuleType:
    """Imports a package that a backbone needs.

    Raises:
      UserError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:  # torchvision beside a PyTorch that it was not built for raises RuntimeError
        raise UserError(
            f"--backbones={word} needs the package {name}, which cannot be imported ({first_line(error)}); "
            "pip install 'curia-jax[backbones]'"
        ) from error


def first_line(error: BaseException) -> str:
    """First line of the message of an error, or its type."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
