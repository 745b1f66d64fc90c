"""The heads of CuriaBench's official evaluator (raidium-med/curia `trainer.py`, `modeling_dinov2.py`), rule for rule.

Trained on the training split alone, nothing is chosen, and the last epoch is used: SGD with momentum 0.9 and no decay, base
learning rate times batch / 256, gradient norms clipped at 1. Two of its quirks are kept because the figures depend on them: the
cosine schedule is planned with floor(cases / batch) steps an epoch while ceil(cases / batch) are made, so that the learning rate
rises again at the end; and padding is whatever token is all zero, looked for again after self-attention, where it no longer
is once biases are trained.

The order of the cases is that of the Hugging Face Trainer with seed 42 (torch's permutation for seed 42 + epoch). Its weights
before training are not seeded; here they come from the seed that is given, with the same distributions.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from curia_jax.evaluate.targets import Classes, Values
from curia_jax.evaluate.tokens import Tokens

ORDER_SEED = 42
MOMENTUM = 0.9
CLIP = 1.0
_LAYER_NORM = 1e-5
_TINY = 1e-6  # of torch.nn.utils.clip_grad_norm_

Params = Any  # a pytree of arrays


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Epochs, learning rate and batch of a task's head.

    Attributes:
      epochs: passes over the training cases.
      base_learning_rate: at a batch of 256.
      batch_size: cases a step; the last step of an epoch has what is left.
    """

    epochs: int
    base_learning_rate: float
    batch_size: int = 64

    def learning_rates(self, cases: int) -> Float[np.ndarray, " steps"]:
        """Learning rate of every step: cosine to 0 after floor(cases / batch) steps an epoch, and up again in what follows."""
        planned = max(1, cases // self.batch_size) * self.epochs
        steps = np.arange(math.ceil(cases / self.batch_size) * self.epochs)
        return self.base_learning_rate * self.batch_size / 256 * (1 + np.cos(np.pi * steps / planned)) / 2

    def batches(self, cases: int) -> tuple[Int[np.ndarray, "steps batch"], Float[np.ndarray, "steps batch"]]:
        """Case numbers of every step, and the weight of each in the mean; 0 fills the last step of an epoch."""
        per_epoch = math.ceil(cases / self.batch_size)
        orders = np.zeros((self.epochs, per_epoch * self.batch_size), np.int64)
        weights = np.zeros((per_epoch, self.batch_size))
        weights.reshape(-1)[:cases] = 1
        weights /= weights.sum(axis=1, keepdims=True)
        for epoch in range(self.epochs):
            orders[epoch, :cases] = permutation(cases, ORDER_SEED + epoch)
        return orders.reshape(-1, self.batch_size), np.tile(weights, (self.epochs, 1))


def permutation(n: int, seed: int) -> Int[np.ndarray, " n"]:
    """torch.randperm(n) of a CPU generator with this seed: Fisher-Yates with the remainders of MT19937's 32-bit numbers."""
    numbers = np.random.RandomState(seed)._bit_generator.random_raw(n).tolist()  # pyright: ignore[reportAttributeAccessIssue]
    order = list(range(n))
    for i in range(n - 1):
        j = i + numbers[i] % (n - i)
        order[i], order[j] = order[j], order[i]
    return np.array(order, np.int64)


def slice_embedding(slices: int, width: int) -> Float[np.ndarray, "slices width"]:
    """What is added to the tokens of each chosen slice: sines and cosines in turn, base 10000, positions from 0."""
    angles = np.arange(slices)[:, None] * np.exp(np.arange(0, width, 2) * (-math.log(10000.0) / width))
    embedding = np.zeros((slices, width), np.float32)
    embedding[:, 0::2], embedding[:, 1::2] = np.sin(angles), np.cos(angles)
    return embedding


# ---- linear


def linear(
    features: Float[np.ndarray, "n d"],
    targets: Classes | Values,
    queries: Float[np.ndarray, "queries d"],
    schedule: Schedule,
    *,
    seed: int,
) -> Float[np.ndarray, "queries outputs"]:
    """Class probabilities, or values, of a linear layer with cross-entropy or squared error.

    Args:
      features, targets: of the training split.
      seed: of the weights before training.
    """
    params = linear_init(jax.random.key(seed), features.shape[1], _outputs(targets))
    params = train_linear(params, features, targets, schedule)
    return _scores(jnp.asarray(queries, jnp.float32) @ params["weight"] + params["bias"], targets)


def linear_init(key: PRNGKeyArray, width: int, outputs: int) -> Params:
    """Weights N(0, 0.01), no bias."""
    return {"weight": 0.01 * jax.random.normal(key, (width, outputs)), "bias": jnp.zeros(outputs)}


def train_linear(
    params: Params, features: Float[np.ndarray, "n d"], targets: Classes | Values, schedule: Schedule
) -> Params:
    """The layer after the last epoch."""
    cases, weights = schedule.batches(len(features))
    rates = schedule.learning_rates(len(features))
    inputs, wanted = jnp.asarray(features, jnp.float32), _wanted(targets)
    return _train_linear(params, inputs, wanted, cases, weights.astype(np.float32), rates.astype(np.float32))


@jax.jit
def _train_linear(params: Params, features: Array, wanted: Array, cases: Array, weights: Array, rates: Array) -> Params:
    def step(state: "_State", batch: tuple[Array, Array, Array]) -> tuple["_State", None]:
        rows, weight, rate = batch

        def loss(params: Params) -> Array:
            return _loss(features[rows] @ params["weight"] + params["bias"], wanted[rows], weight)

        return state.updated(jax.grad(loss)(state.params), rate), None

    state, _ = jax.lax.scan(step, _State.start(params), (cases, weights, rates))
    return state.params


# ---- self- and cross-attention before the linear layer


def attentive(
    tokens: Tokens, targets: Classes | Values, queries: Tokens, schedule: Schedule, *, seed: int
) -> Float[np.ndarray, "queries outputs"]:
    """Class probabilities, or values, of a self-attention, a cross-attention with one learned query, and a linear layer.

    Args:
      tokens, targets: of the training split.
      seed: of the weights before training.
    """
    params = attentive_init(jax.random.key(seed), tokens.width, _outputs(targets))
    params = train_attentive(params, tokens, targets, schedule)
    rows = np.arange(len(queries))
    parts = [
        attentive_forward(params, queries.padded(rows[start : start + schedule.batch_size], queries.longest)[0])
        for start in range(0, len(rows), schedule.batch_size)
    ]
    return _scores(jnp.concatenate(parts), targets)


def attentive_init(key: PRNGKeyArray, width: int, outputs: int) -> Params:
    """Weights of torch.nn.MultiheadAttention and LayerNorm as they are made, a query N(0, 1), and `linear_init`."""
    keys = jax.random.split(key, 6)

    def attention(first: PRNGKeyArray, second: PRNGKeyArray) -> Params:
        bound = (6 / (4 * width)) ** 0.5  # Xavier, of the (3 width, width) matrix of all three projections
        return {
            "in_weight": jax.random.uniform(first, (width, 3 * width), minval=-bound, maxval=bound),
            "in_bias": jnp.zeros(3 * width),
            "out_weight": jax.random.uniform(second, (width, width), minval=-(width**-0.5), maxval=width**-0.5),
            "out_bias": jnp.zeros(width),
            "norm_weight": jnp.ones(width),
            "norm_bias": jnp.zeros(width),
        }

    return {
        "self": attention(keys[0], keys[1]),
        "cross": attention(keys[2], keys[3]),
        "query": jax.random.normal(keys[4], (1, width)),
        "linear": linear_init(keys[5], width, outputs),
    }


@jax.jit
def attentive_forward(
    params: Params, tokens: Float[Array, "b t d"] | Float[np.ndarray, "b t d"]
) -> Float[Array, "b outputs"]:
    """Logits or values of padded lists of tokens."""
    tokens = jnp.asarray(tokens)
    is_token = (tokens != 0).any(axis=-1)
    # Tokens see tokens and padding sees padding.
    tokens = _attention(params["self"], tokens, tokens, is_token[:, :, None] == is_token[:, None, :])
    is_token = (tokens != 0).any(axis=-1)
    query = jnp.broadcast_to(params["query"], (len(tokens), *params["query"].shape))
    pooled = _attention(params["cross"], query, tokens, is_token[:, None, :]).mean(axis=1)
    return pooled @ params["linear"]["weight"] + params["linear"]["bias"]


def _attention(params: Params, query: Array, tokens: Array, visible: Array) -> Array:
    """One head, residual, LayerNorm."""
    weights, biases = jnp.split(params["in_weight"], 3, axis=1), jnp.split(params["in_bias"], 3)
    q, k, v = (x @ w + b for x, w, b in zip((query, tokens, tokens), weights, biases, strict=True))
    scores = jnp.einsum("bqd,bkd->bqk", q * query.shape[-1] ** -0.5, k)
    shares = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    x = query + shares @ v @ params["out_weight"] + params["out_bias"]
    x = (x - x.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + _LAYER_NORM)
    return x * params["norm_weight"] + params["norm_bias"]


def train_attentive(params: Params, tokens: Tokens, targets: Classes | Values, schedule: Schedule) -> Params:
    """The head after the last epoch. Lists are padded to the longest of the training split."""
    state, wanted = _State.start(params), np.asarray(_wanted(targets))
    batches = zip(*schedule.batches(len(tokens)), schedule.learning_rates(len(tokens)), strict=True)
    for rows, weight, rate in batches:
        padded, _ = tokens.padded(rows, tokens.longest)
        state = _attentive_step(state, padded, wanted[rows], weight.astype(np.float32), np.float32(rate))
    return state.params


@jax.jit
def _attentive_step(state: "_State", tokens: Array, wanted: Array, weight: Array, rate: Array) -> "_State":
    grads = jax.grad(lambda params: _loss(attentive_forward(params, tokens), wanted, weight))(state.params)
    return state.updated(grads, rate)


# ---- what both share


class _State(NamedTuple):
    params: Params
    velocity: Params

    @classmethod
    def start(cls, params: Params) -> "_State":
        return cls(params, jax.tree.map(jnp.zeros_like, params))

    def updated(self, grads: Params, rate: Array) -> "_State":
        """Weights and momentum after torch's clip_grad_norm_ and SGD."""
        norm = jnp.sqrt(sum(jnp.square(grad).sum() for grad in jax.tree.leaves(grads)))
        factor = jnp.minimum(1.0, CLIP / (norm + _TINY))
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + factor * g, self.velocity, grads)
        return _State(jax.tree.map(lambda p, v: p - rate * v, self.params, velocity), velocity)


def _outputs(targets: Classes | Values) -> int:
    return targets.count if isinstance(targets, Classes) else 1


def _wanted(targets: Classes | Values) -> Array:
    return jnp.asarray(targets.labels if isinstance(targets, Classes) else targets.values.astype(np.float32))


def _loss(outputs: Array, wanted: Array, weight: Array) -> Array:
    """Weighted mean of cross-entropy, or of squared errors where targets are not class numbers."""
    if jnp.issubdtype(wanted.dtype, jnp.integer):
        return (optax.softmax_cross_entropy_with_integer_labels(outputs, wanted) * weight).sum()
    return (jnp.square(outputs[:, 0] - wanted) * weight).sum()


def _scores(outputs: Array, targets: Classes | Values) -> Float[np.ndarray, "queries outputs"]:
    scores = jax.nn.softmax(outputs, axis=1) if isinstance(targets, Classes) else outputs
    return np.asarray(scores, np.float64)
