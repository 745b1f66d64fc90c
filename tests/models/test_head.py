"""Heads against transcriptions in NumPy and PyTorch, bags with slices that are not there, regions, and their settings."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curia_jax import json_records
from curia_jax.models import head

WIDTH = 16
CLASSES = head.HeadConfig("linear", "cls", "classes", ("no", "yes", "unclear"))
ATTENTIVE = dataclasses.replace(CLASSES, kind="attentive")


def tokens_of(cases: int = 3, slices: int = 1, patches: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(cases, slices, 1 + patches, WIDTH)).astype(np.float32)


def params_of(config: head.HeadConfig) -> dict[str, np.ndarray]:
    """Random ones: the kernel of a new head is too near zero to see a difference."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: head.init(config, WIDTH, jax.random.key(0)))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), dict(shapes))


def run(config: head.HeadConfig, tokens: np.ndarray, valid=None, region=None) -> head.Logits:
    valid = np.ones(tokens.shape[:2], bool) if valid is None else np.asarray(valid)
    region = None if region is None else jnp.asarray(region)
    return head.bind(config, WIDTH, params_of(config))(jnp.asarray(tokens), jnp.asarray(valid), region)


def softmax(scores: np.ndarray) -> np.ndarray:
    shares = np.exp(scores - scores.max())
    return shares / shares.sum()


# ---- linear


@pytest.mark.parametrize("pooling", head.POOLINGS)
def test_linear_head_is_a_linear_layer_on_the_pooled_tokens(pooling: str) -> None:
    config = dataclasses.replace(CLASSES, pooling=pooling)
    tokens, params = tokens_of(), params_of(config)
    cls, mean = tokens[:, 0, 0], tokens[:, 0, 1:].mean(axis=1)
    features = {"cls": cls, "mean": mean, "cls_mean": np.concatenate([cls, mean], axis=1)}[pooling]
    found = run(config, tokens)
    np.testing.assert_allclose(found.outputs, features @ params["kernel"] + params["bias"], atol=1e-5)
    np.testing.assert_array_equal(found.attention, np.ones((3, 1)))


def test_linear_head_of_a_bag_takes_the_mean_of_the_slices_that_are_there() -> None:
    config = dataclasses.replace(CLASSES, pooling="cls_mean")
    tokens = tokens_of(cases=2, slices=4)
    found = run(config, tokens, valid=[[True, False, True, False], [True] * 4])
    apart = [np.asarray(run(config, tokens[:, number : number + 1]).outputs) for number in range(4)]
    np.testing.assert_allclose(found.outputs[0], (apart[0][0] + apart[2][0]) / 2, atol=1e-5)
    np.testing.assert_allclose(found.outputs[1], np.mean([one[1] for one in apart], axis=0), atol=1e-5)
    np.testing.assert_allclose(found.attention, [[0.5, 0, 0.5, 0], [0.25] * 4])


def test_region_takes_the_place_of_all_patches() -> None:
    config = dataclasses.replace(CLASSES, pooling="mean")
    tokens, params = tokens_of(cases=1, slices=2), params_of(config)
    region = np.zeros((1, 2, 6), bool)
    region[0, 0, [1, 4]] = True  # the second slice has none of it
    found = run(config, tokens, region=region)
    mean = (tokens[0, 0, 2] + tokens[0, 0, 5]) / 2
    np.testing.assert_allclose(found.outputs[0], mean @ params["kernel"] + params["bias"], atol=1e-5)
    np.testing.assert_array_equal(found.attention, [[1, 0]])


def test_region_is_refused_where_the_pooling_is_of_cls_alone() -> None:
    with pytest.raises(ValueError, match="does not look at the region; it may be mean or cls_mean"):
        run(CLASSES, tokens_of(), region=np.ones((3, 1, 6), bool))


# ---- attentive


def test_attentive_head_weighs_the_tokens_of_all_slices_that_are_there() -> None:
    """One query after the other, in NumPy: its softmax over the patches of the case, and its part of the values."""
    tokens, params = tokens_of(cases=2, slices=3), params_of(ATTENTIVE)
    valid = np.array([[True, True, False], [True, True, True]])
    found = run(ATTENTIVE, tokens, valid=valid)
    queries = len(params["queries"])
    size = WIDTH // queries
    for case in range(2):
        patches = tokens[case, valid[case], 1:].reshape(-1, WIDTH).astype(np.float64)
        shares = [softmax(patches @ query / WIDTH**0.5) for query in params["queries"]]
        values = patches @ params["value"]
        pooled = np.concatenate([shares[q] @ values[:, q * size : (q + 1) * size] for q in range(queries)])
        np.testing.assert_allclose(found.outputs[case], pooled @ params["kernel"] + params["bias"], atol=2e-4)
        by_slice = np.mean(shares, axis=0).reshape(-1, 6).sum(axis=1)
        np.testing.assert_allclose(found.attention[case, valid[case]], by_slice, atol=1e-6)
    assert found.attention[0, 2] == 0


def test_attentive_head_looks_only_into_the_region() -> None:
    tokens = tokens_of(cases=1, slices=2)
    region = np.zeros((1, 2, 6), bool)
    region[0, 1, 3] = True
    changed = np.where(np.pad(region, ((0, 0), (0, 0), (1, 0)))[..., None], tokens, -tokens)
    found, again = run(ATTENTIVE, tokens, region=region), run(ATTENTIVE, changed, region=region)
    np.testing.assert_array_equal(found.outputs, again.outputs)
    np.testing.assert_allclose(found.attention, [[0, 1]], atol=1e-6)


@pytest.mark.torch
def test_pooling_equals_torch() -> None:
    """Values of all tokens, cut into as many parts as there are queries; each query weighs its own part."""
    import torch

    width, count = 64, 32
    queries, value = map(np.asarray, head.new_queries(jax.random.key(0), jax.random.key(1), width))
    tokens = np.random.default_rng(0).normal(size=(3, 11, width)).astype(np.float32)
    with torch.no_grad():
        x = torch.tensor(tokens)
        attention = (torch.tensor(queries) * width**-0.5 @ x.transpose(1, 2)).softmax(dim=-1)
        values = (x @ torch.tensor(value)).reshape(3, 11, count, width // count)
        wanted = torch.einsum("bqt,btqv->bqv", attention, values).reshape(3, width).numpy()
    found, _ = head.pool(queries, value, tokens, np.ones((3, 11), bool))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(("width", "queries"), [(64, 32), (768, 32), (10, 10), (100, 25)])
def test_queries_divide_the_width(width: int, queries: int) -> None:
    found, value = head.new_queries(jax.random.key(0), jax.random.key(1), width)
    assert (found.shape, value.shape) == ((queries, width), (width, width))


# ---- both


@pytest.mark.parametrize("config", [CLASSES, ATTENTIVE], ids=lambda config: config.kind)
def test_case_without_slices_has_the_bias_and_finite_gradients(config: head.HeadConfig) -> None:
    tokens, params = tokens_of(cases=2, slices=2), params_of(config)
    valid = jnp.array([[True, True], [False, False]])

    def total(params, tokens):
        return head.bind(config, WIDTH, params)(tokens, valid).outputs[0].sum()

    found = run(config, tokens, valid=valid)
    np.testing.assert_allclose(found.outputs[1], params["bias"], atol=1e-6)
    np.testing.assert_array_equal(found.attention[1], 0)
    gradients = jax.grad(total, argnums=(0, 1))(params, jnp.asarray(tokens))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert not gradients[1][1].any()


@pytest.mark.parametrize("config", [CLASSES, ATTENTIVE], ids=lambda config: config.kind)
def test_slices_that_only_fill_the_bag_change_nothing(config: head.HeadConfig) -> None:
    tokens = tokens_of(cases=2, slices=2)
    longer = np.concatenate([tokens, 9 * np.ones_like(tokens)], axis=1)
    short, long = run(config, tokens), run(config, longer, valid=[[True, True, False, False]] * 2)
    np.testing.assert_allclose(long.outputs, short.outputs, atol=1e-5)
    np.testing.assert_allclose(long.attention[:, :2], short.attention, atol=1e-6)


@pytest.mark.parametrize("config", [CLASSES, ATTENTIVE], ids=lambda config: config.kind)
def test_new_head_gives_outputs_near_zero(config: head.HeadConfig) -> None:
    outputs = head.bind(config, WIDTH, head.init(config, WIDTH, jax.random.key(0)))(
        jnp.asarray(tokens_of()), jnp.ones((3, 1), bool)
    ).outputs
    assert 0 < np.abs(outputs).max() < 1e-3


def test_parameters_of_another_head_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"bias is \(3,\), wanted \(2,\); kernel is \(16, 3\), wanted \(16, 2\)"):
        head.bind(dataclasses.replace(CLASSES, names=("no", "yes")), WIDTH, params_of(CLASSES))


# ---- settings


def test_config_returns_from_json_as_it_was() -> None:
    config = head.HeadConfig("attentive", "mean", "value", ("age",), mean=51.5, scale=12.25)
    assert json_records.record(head.HeadConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "mlp"}, "kind is 'mlp'; it may be linear, attentive"),
        ({"pooling": "max"}, "pooling is 'max'; it may be cls, mean, cls_mean"),
        ({"target": "boxes"}, "target is 'boxes'; it may be classes, labels, value, time"),
        ({"names": ("one",)}, "names has 1 entries; a head for classes has at least 2"),
        ({"target": "time"}, "names has 3 entries; a head for time has 1"),
        ({"target": "labels", "names": ()}, "names has 0 entries; a head for labels has at least 1"),
        ({"names": ("no", "no")}, "names has the same entry twice"),
        ({"target": "value", "names": ("age",), "scale": 0.0}, "mean is 0.0 and scale 0.0; they have to be finite"),
        ({"mean": 1.0}, "mean and scale are of a value; a head for classes has 0 and 1"),
    ],
)
def test_config_names_the_field_that_is_wrong(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CLASSES, **changes)
