"""Features from the tokens of another library's encoder: pooled in its library, over the region where there is one."""

from collections.abc import Sequence

import numpy as np
import pytest

from curia_common.errors import DataError, UserError
from curia_jax import data
from curia_jax.evaluate import token_backbone
from curia_jax.evaluate.features import LAST, Readout, ShardImages
from curia_jax.evaluate.preparation import WINDOW, Preparation
from curia_jax.evaluate.results import Provenance
from curia_jax.evaluate.token_backbone import TokenBackbone, Tokens
from tests.evaluate.test_features import Slices

WIDTH, ROWS, COLUMNS = 6, 2, 3
PROVENANCE = Provenance("weights 1", Preparation(WINDOW, (-1000, 1000), (16, 16)).to_json())


def batch(masked: bool = False) -> data.HostBatch:
    (found,) = ShardImages(Slices(4)).batches(np.arange(4), 4)
    if masked:
        mask = np.zeros(found["pixels"].shape, np.float32)
        for number, (height, width) in enumerate(found["extent"]):
            mask[number, : height // 4, : width // 6] = 1  # within the first patch
        found = {**found, "mask": mask}
    return found


def tokens(layer: int | str, *, cls: bool = True, patches: bool = True) -> Tokens:
    r = np.random.default_rng(layer if isinstance(layer, int) else 99)
    return Tokens(
        r.normal(size=(4, WIDTH)).astype(np.float32) if cls else None,
        r.normal(size=(4, ROWS, COLUMNS, WIDTH)).astype(np.float32) if patches else None,
    )


def backbone(*words: str, depth: int = 0, **given: bool) -> TokenBackbone:
    def forward(_: data.HostBatch, blocks: Sequence[int]) -> dict[int | str, Tokens]:
        return {layer: tokens(layer, **given) for layer in (*blocks, LAST)}

    return TokenBackbone("theirs", tuple(Readout.parse(word) for word in words), PROVENANCE, forward, depth=depth)


def test_features_are_statistics_of_the_tokens() -> None:
    cls, patches = tokens(LAST)
    flat = np.asarray(patches).reshape(4, -1, WIDTH)
    found = backbone("cls", "mean", "std", "cls+mean").features(batch())
    np.testing.assert_array_equal(found["cls"], cls)
    np.testing.assert_allclose(found["mean"], flat.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(found["std"], flat.std(axis=1), atol=1e-6)
    np.testing.assert_allclose(found["cls+mean"], np.concatenate([cls, flat.mean(axis=1)], axis=1), atol=1e-6)


def test_mean_is_over_the_patches_of_the_region() -> None:
    found = backbone("mean").features(batch(masked=True))
    np.testing.assert_allclose(found["mean"], np.asarray(tokens(LAST).patches)[:, 0, 0], atol=1e-6)


def test_layers_are_asked_for_and_joined_in_their_order() -> None:
    found = backbone("mean@1+last").features(batch())
    parts = [np.asarray(tokens(layer).patches).reshape(4, -1, WIDTH).mean(axis=1) for layer in (1, LAST)]
    np.testing.assert_allclose(found["mean@1+last"], np.concatenate(parts, axis=1), atol=1e-6)


@pytest.mark.torch
def test_tokens_of_pytorch_give_the_features_of_numpy() -> None:
    torch = pytest.importorskip("torch")
    plain = backbone("cls", "mean", "std")

    def forward(held: data.HostBatch, blocks: Sequence[int]) -> dict[int | str, Tokens]:
        return {
            layer: Tokens(torch.tensor(one.cls), torch.tensor(one.patches))
            for layer, one in plain.forward(held, blocks).items()
        }

    theirs = TokenBackbone("theirs", plain.readouts, PROVENANCE, forward)
    for held in (batch(), batch(masked=True)):
        for name, values in plain.features(held).items():
            np.testing.assert_allclose(theirs.features(held)[name], values, atol=1e-6)


def test_readout_without_its_tokens_is_left_out_and_none_at_all_refused() -> None:
    assert set(backbone("cls", "mean", cls=False).features(batch())) == {"mean"}
    with pytest.raises(UserError, match="theirs has no CLS token, and --features=cls needs them"):
        backbone("cls", cls=False).features(batch())
    with pytest.raises(UserError, match="theirs has no patch tokens, and --features=mean, std needs them"):
        backbone("mean", "std", patches=False).features(batch())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Tokens(np.zeros((4, 2, 3), np.float32), None), r"cls of shape \(4, 2, 3\); wanted is \(4, width\)"),
        (Tokens(None, np.zeros((4, 6, 3), np.float32)), r"wanted is \(4, rows, columns, width\)"),
        (Tokens(np.zeros((3, 2), np.float32), None), r"cls of shape \(3, 2\)"),
    ],
)
def test_tokens_of_another_shape_are_named(wrong: Tokens, message: str) -> None:
    made = TokenBackbone("theirs", (Readout.parse("cls"),), PROVENANCE, lambda *_: {LAST: wrong})
    with pytest.raises(DataError, match=message):
        made.features(batch())


def test_lists_of_tokens_say_which_patches_are_in_the_region() -> None:
    found = backbone().tokens(batch(masked=True), before_norm=False)
    np.testing.assert_array_equal(found["tokens"], np.asarray(tokens(LAST).patches).reshape(4, -1, WIDTH))
    assert found["inside"].tolist() == [[True] + 5 * [False]] * 4
    alone = backbone(patches=False).tokens(batch(), before_norm=False)
    np.testing.assert_array_equal(alone["tokens"][:, 0], tokens(LAST).cls)


def test_tokens_before_the_norm_are_those_of_the_last_block() -> None:
    found = backbone(depth=12).tokens(batch(), before_norm=True)
    np.testing.assert_array_equal(found["tokens"], np.asarray(tokens(12).patches).reshape(4, -1, WIDTH))
    with pytest.raises(UserError, match="theirs gives no tokens before its last norm"):
        backbone().tokens(batch(), before_norm=True)


def test_digest_follows_weights_and_preparation() -> None:
    other = Provenance("weights 2", PROVENANCE.preparation)
    digests = [token_backbone.digest(one) for one in (PROVENANCE, PROVENANCE, other)]
    assert digests[0] == digests[1] != digests[2]


def test_missing_package_is_named_with_the_extra() -> None:
    with pytest.raises(UserError, match=r"--backbones=x:y needs the package no_such_package.*curia-jax\[backbones\]"):
        token_backbone.package("no_such_package", "x:y")
