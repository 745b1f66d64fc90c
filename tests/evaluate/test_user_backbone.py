"""A function of the user's as a backbone."""

import numpy as np
import pytest

from curia_common.errors import DataError, UserError
from curia_jax.evaluate import backbones, features
from tests.evaluate.test_features import Slices

MODULE = '''
import numpy as np
from curia_jax.evaluate.token_backbone import Tokens

def corners(slices):
    """The four quarters of a slice: their means."""
    patches = []
    for one in slices:
        rows, columns = (np.array_split(np.arange(n), 2) for n in one.values.shape)
        patches.append([[[one.values[np.ix_(r, c)].mean(), one.modality == "CT"] for c in columns] for r in rows])
    return Tokens(np.array([[one.values.max(), *one.spacing] for one in slices]), np.array(patches))

corners.identity = "corners 1"

def unnamed(slices):
    return None

def wrong(slices):
    return slices

wrong.identity = "wrong 1"

def flat(slices):
    return Tokens(None, np.zeros((len(slices), 4)))

flat.identity = "flat 1"
'''


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    (tmp_path / "their_model.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "their_model"


def opened(word: str, *words: str) -> features.Backbone:
    (made,) = backbones.open_backbones(
        [word], [], readouts=[features.Readout.parse(word) for word in words or ("cls", "mean")]
    )
    return made


def test_function_gets_real_values_with_modality_and_spacing(module) -> None:
    made = opened(f"{module}:corners")
    (batch,) = features.ShardImages(Slices(3)).batches(np.arange(3), 3)
    found = made.features(batch)
    slices = [Slices(3)[number].pixels.astype(np.float32) - 1024 for number in range(3)]
    np.testing.assert_array_equal(found["cls"], [[one.max(), 2, 1] for one in slices])  # spacing of FakeSlices
    np.testing.assert_allclose(found["mean"][:, 0], [one.mean() for one in slices], rtol=1e-5)
    assert found["mean"][:, 1].tolist() == [0, 1, 0]  # the odd ones are HU
    assert made.provenance.weights_sha256 == "corners 1"


def test_identity_decides_the_cache_key(module) -> None:
    before = opened(f"{module}:corners").digest
    import their_model  # pyright: ignore[reportMissingImports]

    their_model.corners.identity = "corners 2"
    assert opened(f"{module}:corners").digest != before
    their_model.corners.identity = "corners 1"
    assert opened(f"{module}:corners").digest == before


@pytest.mark.parametrize(
    ("name", "words", "line"),
    [
        ("nothing", ("mean",), "no function nothing of module their_model"),
        ("unnamed", ("mean",), "has no attribute identity; set unnamed.identity to text that changes"),
        ("corners", ("mean@3",), "gives its last tokens alone; name --features without @"),
    ],
)
def test_function_that_cannot_be_used_is_refused(module, name: str, words: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError, match=line):
        opened(f"{module}:{name}", *words)


def test_wrong_result_is_named(module) -> None:
    (batch,) = features.ShardImages(Slices(3)).batches(np.arange(3), 3)
    with pytest.raises(DataError, match="their_model:wrong returns list; it has to return .*Tokens"):
        opened(f"{module}:wrong").features(batch)
    with pytest.raises(DataError, match=r"gives patches of shape \(3, 4\); wanted is \(3, rows, columns, width\)"):
        opened(f"{module}:flat").features(batch)


def test_readout_without_tokens_is_left_out_and_an_empty_rest_refused(module) -> None:
    (batch,) = features.ShardImages(Slices(3)).batches(np.arange(3), 3)
    import their_model  # pyright: ignore[reportMissingImports]

    whole = their_model.corners
    their_model.half = lambda slices: whole(slices)._replace(cls=None)
    their_model.half.identity = "half"
    assert set(opened(f"{module}:half").features(batch)) == {"mean"}
    with pytest.raises(UserError, match="has no CLS token, and --features=cls needs them"):
        opened(f"{module}:half", "cls").features(batch)
