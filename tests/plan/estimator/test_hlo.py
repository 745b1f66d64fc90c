"""Reading compiled programs: schedule, tiles."""

import importlib.util
from pathlib import Path

import pytest

from curia_jax.plan.estimator import hlo

_spec = importlib.util.spec_from_file_location("plan_snippets", Path(__file__).with_name("snippets.py"))
s = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(s)


def test_a_program_without_schedule_is_an_error():
    with pytest.raises(hlo.HloError, match="not scheduled"):
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
def test_a_tensor_takes_the_bytes_of_its_tiles(shape: str, values: int, padded: int, space: int):
    (tensor,) = hlo.tensors(shape)
    assert (tensor.values, tensor.bytes, tensor.space) == (values, padded, space)
