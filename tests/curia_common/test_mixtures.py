from fractions import Fraction

import pytest

from curia_common import mixtures
from curia_common.errors import UserError
from curia_common.mixtures import Part


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ct:0.7,mr:0.3", [("ct", "0.7"), ("mr", "0.3")]),
        ("gs://bucket/ct:2, gs://bucket/a:b : 1", [("gs://bucket/ct", "2"), ("gs://bucket/a:b", "1")]),
        ("a:.5,b:1.", [("a", ".5"), ("b", "1.")]),
        ("shards", [("shards", "")]),
        ("gs://bucket/ct", [("gs://bucket/ct", "")]),
        ("run:2", [("run:2", "")]),  # a folder alone needs no weight
        ("a,b", [("a,b", "")]),
        ("", [("", "")]),
    ],
)
def test_folders_and_weights_are_read_and_written_back(text: str, parts: list[tuple[str, str]]) -> None:
    found = mixtures.parse(text)
    assert found == tuple(Part(*part) for part in parts)
    assert mixtures.parse(mixtures.write(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:0.7,b", "'b' has no weight; write FOLDER:WEIGHT,FOLDER:WEIGHT"),
        ("a:0.7,b:-1", "'b:-1' has no weight"),
        ("a:1,b:0.0", "the weight of b is 0; leave the folder out"),
        ("a:1,b:1,a:2", "names a twice; add its weights up"),
    ],
)
def test_unclear_mixture_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        mixtures.parse(text)
    assert message in str(error.value) and f"--config.data.shards={text}" in str(error.value)


def test_shares_are_exact_and_add_up_to_1() -> None:
    assert mixtures.shares(mixtures.parse("a:0.7,b:0.3")) == (Fraction(7, 10), Fraction(3, 10))
    assert mixtures.shares(mixtures.parse("a:1,b:1,c:1")) == (Fraction(1, 3),) * 3
    assert mixtures.shares(mixtures.parse("a")) == (1,)


def test_weights_of_too_many_digits_are_refused() -> None:
    with pytest.raises(
        UserError, match="the weights 0.3333333, 0.6666667 repeat after 10,000,000 examples.*round them"
    ):
        mixtures.shares(mixtures.parse("a:0.3333333,b:0.6666667"))
