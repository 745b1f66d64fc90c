"""Parsing of compiled programs: schedule, tiles."""

import pytest

from curia_jax.plan.estimator import hlo
from tests.plan.estimator import snippets as s


def test_program_without_schedule_raises():
    with pytest.raises(hlo.HloError, match="not marked as scheduled"):
        hlo.parse(s.program(s.fusion("a", s.X, "", 7)).replace("is_scheduled=true", "x=1"))


@pytest.mark.parametrize(
    ("shape", "values", "padded", "space"),
    [
        ("bf16[8,17,192]{2,1,0:T(8,128)(2,1)S(1)}", 8 * 17 * 192 * 2, 8 * 24 * 256 * 2, 1),
        ("bf16[8,17,192]{1,2,0:T(8,128)(2,1)}", 8 * 17 * 192 * 2, 8 * 128 * 192 * 2, 0),
        ("f32[96]{0:T(128)}", 384, 512, 0),
        ("s32[]{:T(128)}", 4, 4, 0),
        ("pred[4,4]{1,0}", 16, 16, 0),
    ],
)
def test_tensor_takes_the_bytes_of_its_tiles(shape: str, values: int, padded: int, space: int):
    (tensor,) = hlo.tensors(shape)
    assert (tensor.values, tensor.bytes, tensor.space) == (values, padded, space)
