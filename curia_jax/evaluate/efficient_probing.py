"""Efficient probing: a few learned queries that pool the tokens of a case, before a linear layer.

The pooling is that of attentive heads (`curia_jax.models.head.pool`). Pooled features are normalised without a learned scale, as in
billpsomas/efficient-probing and MAE's linear probing.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from curia_common.errors import UserError
from curia_jax.evaluate.results import Setting
from curia_jax.evaluate.selection import Bank, Numbers, Prediction, Scores, choose_and_predict
from curia_jax.evaluate.targets import Classes, Values
from curia_jax.evaluate.tokens import Tokens
from curia_jax.models import head

EPOCHS = 30
BATCH = 64
WARM_UP = 0.1
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
DEFAULT_LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
_NORM = 1e-6

Params = Any  # a pytree of arrays


def efficient(bank: Bank, queries: Tokens) -> Prediction:
    """EPOCHS of AdamW with WARM_UP and a cosine to 0, on cross-entropy or squared error.

    Chosen on the held-out cases: the learning rate, of LEARNING_RATES.
    """
    tokens, targets = bank.features, bank.targets
    if not isinstance(tokens, Tokens) or not isinstance(targets, Classes | Values):
        raise UserError("efficient probing takes lists of tokens, and learns classes or values")

    def predict(fit: Numbers, held: Tokens, settings: Sequence[Setting]) -> Iterator[Scores]:
        for setting in settings:
            yield _fit_and_score(tokens[fit], targets[fit], held, float(setting["learning_rate"]))

    settings: list[Setting] = [{"learning_rate": rate} for rate in LEARNING_RATES]
    default: Setting = {"learning_rate": DEFAULT_LEARNING_RATE}
    return choose_and_predict(bank, queries, settings, predict, default=default)


def _fit_and_score(tokens: Tokens, targets: Classes | Values, queries: Tokens, learning_rate: float) -> Scores:
    if isinstance(targets, Classes):
        centre, scale, wanted, outputs = 0.0, 1.0, targets.labels, targets.count
    else:
        centre, scale = float(targets.values.mean()), float(targets.values.std()) or 1.0
        wanted, outputs = ((targets.values - centre) / scale).astype(np.float32), 1
    batch = min(BATCH, len(tokens))
    per_epoch = len(tokens) // batch
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, int(WARM_UP * EPOCHS * per_epoch), EPOCHS * per_epoch
    )
    optimiser = optax.adamw(schedule, b2=0.95, weight_decay=WEIGHT_DECAY)
    params = init(jax.random.key(0), tokens.width, outputs)
    state = optimiser.init(params)
    step = _step(optimiser)
    rng = np.random.default_rng(0)
    for _ in range(EPOCHS):
        # The rest of an epoch is left out: it would be normalised by fewer cases.
        for rows in rng.permutation(len(tokens))[: per_epoch * batch].reshape(per_epoch, batch):
            params, state = step(params, state, *tokens.padded(rows, tokens.longest), wanted[rows])
    pooled = _pooled(params, tokens)
    scores = (_pooled(params, queries) - pooled.mean(axis=0)) / np.sqrt(pooled.var(axis=0) + _NORM)
    scores = scores @ np.asarray(params["weight"], np.float64) + np.asarray(params["bias"], np.float64)
    return (
        np.asarray(jax.nn.softmax(scores, axis=1), np.float64)
        if isinstance(targets, Classes)
        else centre + scale * scores
    )


def init(key: PRNGKeyArray, width: int, outputs: int) -> Params:
    """Of the pooling, see head.new_queries, and of a linear layer."""
    of_queries, of_value, of_linear = jax.random.split(key, 3)
    queries, value = head.new_queries(of_queries, of_value, width)
    return {
        "queries": queries,
        "value": value,
        "weight": 0.01 * jax.random.normal(of_linear, (width, outputs)),
        "bias": jnp.zeros(outputs),
    }


@jax.jit
def _pool(
    params: Params,
    tokens: Float[Array, "b t d"] | Float[np.ndarray, "b t d"],
    is_token: Bool[Array, "b t"] | Bool[np.ndarray, "b t"],
) -> Float[Array, "b d"]:
    return head.pool(params["queries"], params["value"], tokens, is_token)[0]


@functools.cache
def _step(optimiser: optax.GradientTransformation) -> Any:
    def loss(params: Params, tokens: Array, is_token: Array, wanted: Array) -> Array:
        pooled = _pool(params, tokens, is_token)
        pooled = (pooled - pooled.mean(axis=0)) * jax.lax.rsqrt(pooled.var(axis=0) + _NORM)
        outputs = pooled @ params["weight"] + params["bias"]
        if jnp.issubdtype(wanted.dtype, jnp.integer):
            return optax.softmax_cross_entropy_with_integer_labels(outputs, wanted).mean()
        return jnp.square(outputs[:, 0] - wanted).mean()

    @jax.jit
    def step(params: Params, state: Any, tokens: Array, is_token: Array, wanted: Array) -> tuple[Params, Any]:
        updates, state = optimiser.update(jax.grad(loss)(params, tokens, is_token, wanted), state, params)
        return optax.apply_updates(params, updates), state

    return step


def _pooled(params: Params, tokens: Tokens) -> Float[np.ndarray, "n d"]:
    rows = np.arange(len(tokens))
    parts = [_pool(params, *tokens.padded(rows[i : i + BATCH], tokens.longest)) for i in range(0, len(rows), BATCH)]
    return np.concatenate([np.asarray(part, np.float64) for part in parts])
