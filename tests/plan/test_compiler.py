"""What the TPU compiler says of a program that does not fit."""

import pytest

from curia_jax.plan import compiler

LIMIT = int(15.75 * 2**30)
REFUSAL = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.44G of 15.75G hbm. Exceeded hbm capacity by 5.69G.

Total hbm usage >= 21.69G:
    reserved        258.00M
    program          21.44G
    arguments         1.25G

  Largest program allocations in hbm:

  1. Size: 6.25G
     Operator: op_name="jit(step)/jvp(decoder)/while" stack_frame_id=273
     Shape: f32[8,256,16,197,197]{4,3,2,1,0:T(8,128)}
     Unpadded size: 4.74G
     ==========================

  2. Size: 108.00M
     Shape: f32[12,768,3072]{2,1,0:T(8,128)}
     Unpadded size: 108.00M
"""


def test_refusal_for_memory_states_use_limit_and_largest_allocations():
    refusal = compiler.out_of_memory(REFUSAL)
    assert refusal is not None
    assert (refusal.memory, refusal.limit) == ({"total": int(21.44 * 2**30)}, LIMIT)
    assert refusal.largest[0] == (
        int(6.25 * 2**30),
        "f32[8,256,16,197,197]{4,3,2,1,0:T(8,128)}",
        "jit(step)/jvp(decoder)/while",
    )
    assert refusal.largest[1].bytes == 108 * 2**20


def test_refusal_for_memory_of_temporaries_is_read():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (24.82G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert compiler.out_of_memory(message) == ({"temporaries": int(24.82 * 2**30)}, LIMIT, ())


def test_refusal_for_memory_in_unknown_words_is_still_one():
    assert compiler.out_of_memory("RESOURCE_EXHAUSTED: no HBM left for the temporaries") == ({}, None, ())


@pytest.mark.parametrize(
    "message", ["INTERNAL: something else", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem."]
)
def test_refusals_without_hbm_are_not_for_memory(message: str):
    assert compiler.out_of_memory(message) is None
