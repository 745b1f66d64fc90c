"""Heads of fine-tuning: from the encoder's tokens of a case, one slice or a bag of them, to its outputs.

params = head.init(config, width, key)                          nested dict, float32
outputs, attention = head.bind(config, width, params)(tokens, valid, region)
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from curia_jax.models.params import Params, from_dict, to_dict

KINDS = ("linear", "attentive")
POOLINGS = ("cls", "mean", "cls_mean")
TARGETS = ("classes", "labels", "value", "time")
QUERIES = 32  # of an attentive head, as in efficient probing
_MASKED = -1e30  # logit of a token that does not count; finite, so that a case without any has finite gradients


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Everything that decides the shapes and the arithmetic of a head; plain JSON with `dataclasses.asdict`.

    Attributes:
      kind: of KINDS. "linear" is a linear layer on pooled tokens. "attentive" pools the patch tokens of all slices of a case with
        learned queries (see `pool`) before its linear layer.
      pooling: of POOLINGS, after the final norm: "cls"; the "mean" of the patch tokens; "cls_mean", both concatenated. Over a bag
        the mean of its slices. An attentive head pools by itself and does not read it.
      target: of TARGETS: "classes" for a softmax, "labels" for a sigmoid each, "value" for a number, "time" for the log hazard of a
        Cox model.
      names: of the classes or labels, in the order of the outputs; one name of a value or time.
      mean, scale: of a value, which is mean + scale x output.

    Raises:
      ValueError: a field has a value that it may not have.
    """

    kind: str
    pooling: str
    target: str
    names: tuple[str, ...]
    mean: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        for field, known in (("kind", KINDS), ("pooling", POOLINGS), ("target", TARGETS)):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it may be {', '.join(known)}")
        least, most = {"classes": (2, math.inf), "labels": (1, math.inf)}.get(self.target, (1, 1))
        if not least <= len(self.names) <= most:
            wanted = f"{least}" if least == most else f"at least {least}"
            raise ValueError(f"names has {len(self.names)} entries; a head for {self.target} has {wanted}")
        if len(set(self.names)) < len(self.names):
            raise ValueError("names has the same entry twice; each output needs its own")
        if not (math.isfinite(self.mean) and math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"mean is {self.mean} and scale {self.scale}; they have to be finite, and scale above 0")
        if self.target != "value" and (self.mean, self.scale) != (0.0, 1.0):
            raise ValueError(f"mean and scale are of a value; a head for {self.target} has 0 and 1")

    @property
    def outputs(self) -> int:
        return len(self.names)

    def features(self, width: int) -> int:
        """Inputs of the linear layer, of tokens of this width."""
        return 2 * width if (self.kind, self.pooling) == ("linear", "cls_mean") else width


class Logits(NamedTuple):
    """What a head returns, float32.

    Attributes:
      outputs: logits of the classes or labels; a standardised value; a log hazard.
      attention: share of each slice in its case, 0 for slices that do not count. Of an attentive head: the mean over its queries
        of what they weigh the slice's tokens with. Of a linear one: the same for each slice that counts.
    """

    outputs: Float[Array, "cases outputs"]
    attention: Float[Array, "cases slices"]


class Head(nnx.Module):
    """Tokens to outputs.

    Parameters: kernel (features, outputs), bias (outputs); of an attentive head also queries (queries, width) and value (width,
    width). The kernel starts near zero, as in MAE's fine-tuning, so that the first updates of the encoder are small.
    """

    def __init__(self, config: HeadConfig, width: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        shape = (config.features(width), config.outputs)
        self.kernel = nnx.Param(2e-5 * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(config.outputs, jnp.float32))
        if config.kind == "attentive":
            queries, value = new_queries(rngs.params(), rngs.params(), width)
            self.queries, self.value = nnx.Param(queries), nnx.Param(value)

    def __call__(
        self,
        tokens: Float[Array, "cases slices tokens width"],
        valid: Bool[Array, "cases slices"],
        region: Bool[Array, "cases slices patches"] | None = None,
    ) -> Logits:
        """Outputs of each case.

        Args:
          tokens: of each slice after the encoder's final norm, CLS first.
          valid: slices that are there; the others fill the bag. A case without any has the bias as its outputs.
          region: patches that a task is about, which take the place of all patches; a slice without any does not count.

        Raises:
          ValueError: there is a region, but the pooling is of CLS alone, which does not look at it.
        """
        with jax.named_scope("head"):
            tokens = tokens.astype(jnp.float32)
            patches = tokens[:, :, 1:]
            inside = jnp.ones(patches.shape[:3], bool) if region is None else region
            if self.config.kind == "attentive":
                pooled, attention = self._attend(patches, inside & valid[:, :, None])
            else:
                if region is not None and self.config.pooling == "cls":
                    raise ValueError("pooling is 'cls', which does not look at the region; it may be mean or cls_mean")
                counts = valid & inside.any(axis=2)
                attention = counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1)
                pooled = jnp.einsum("cs,csd->cd", attention, self._pool(tokens[:, :, 0], patches, inside))
            outputs = jnp.matmul(pooled, self.kernel[...], precision="highest") + self.bias[...]
            return Logits(outputs, attention)

    def _pool(
        self, cls: Float[Array, "cases slices width"], patches: Float[Array, "cases slices patches width"],
        inside: Bool[Array, "cases slices patches"],
    ) -> Float[Array, "cases slices features"]:  # fmt: skip
        """Features of each slice; zeros for the mean of no patch."""
        if self.config.pooling == "cls":
            return cls
        count = jnp.maximum(inside.sum(axis=2)[:, :, None], 1)
        mean = jnp.sum(patches, axis=2, where=inside[..., None]) / count
        return mean if self.config.pooling == "mean" else jnp.concatenate([cls, mean], axis=2)

    def _attend(
        self, patches: Float[Array, "cases slices patches width"], counts: Bool[Array, "cases slices patches"]
    ) -> tuple[Float[Array, "cases width"], Float[Array, "cases slices"]]:
        cases, slices, _, width = patches.shape
        flat, counted = patches.reshape(cases, -1, width), counts.reshape(cases, -1)
        pooled, shares = pool(self.queries[...], self.value[...], flat, counted)
        some = counted.any(axis=1, keepdims=True)
        return pooled * some, (shares * some).reshape(cases, slices, -1).sum(axis=2)


def init(config: HeadConfig, width: int, key: Key[Array, ""]) -> Params:
    """New parameters for tokens of this width, as a dict of float32 arrays."""
    return to_dict(Head(config, width, rngs=nnx.Rngs(params=key)))


def bind(config: HeadConfig, width: int, params: Params) -> Head:
    """The head with the given parameters.

    Raises:
      ValueError: the parameters belong to a head of another shape; the first tensors that differ are named.
    """
    return from_dict(lambda: Head(config, width, rngs=nnx.Rngs(params=0)), params)


# ---- pooling by attention


def new_queries(
    of_queries: Key[Array, ""], of_value: Key[Array, ""], width: int
) -> tuple[Float[Array, "queries width"], Float[Array, "width width"]]:
    """QUERIES queries N(0, 0.02), or fewer where they do not divide the width, and a value projection as PyTorch makes it."""
    count = max(number for number in range(1, QUERIES + 1) if width % number == 0)
    bound = width**-0.5
    queries = 0.02 * jax.random.normal(of_queries, (count, width), jnp.float32)
    return queries, jax.random.uniform(of_value, (width, width), jnp.float32, minval=-bound, maxval=bound)


def pool(
    queries: Float[Array, "q d"] | Float[np.ndarray, "q d"],
    value: Float[Array, "d d"] | Float[np.ndarray, "d d"],
    tokens: Float[Array, "b t d"] | Float[np.ndarray, "b t d"],
    counts: Bool[Array, "b t"] | Bool[np.ndarray, "b t"],
) -> tuple[Float[Array, "b d"], Float[Array, "b t"]]:
    """Softmax-weighted means of the tokens, each through its query's part of the value projection.

    billpsomas/efficient-probing (`poolings/ep.py`, one head): the tokens are their own keys, and every query has its own part of
    one value projection.

    Args:
      counts: tokens that take part; at least one of each list, or all weigh the same.

    Returns:
      The pooled features, and the weight of each token, the mean over the queries.
    """
    number, width = queries.shape
    scores = jnp.einsum("qd,btd->bqt", queries * width**-0.5, tokens)
    shares = jax.nn.softmax(jnp.where(counts[:, None, :], scores, _MASKED), axis=-1)
    # Pooled first: a projection of every token would cost more by width / queries.
    means = jnp.einsum("bqt,btd->bqd", shares, tokens)
    parts = value.reshape(width, number, -1)
    return jnp.einsum("bqd,dqv->bqv", means, parts).reshape(len(means), width), shares.mean(axis=1)
