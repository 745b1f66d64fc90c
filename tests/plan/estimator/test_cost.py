"""Costs of instructions, on programs as the TPU compiler prints them."""

import pytest

from curia_jax.plan.estimator import accounting, hlo
from curia_jax.plan.estimator.cost import Cost
from tests.plan.estimator import snippets as s

KEPT = "f32[8,128]{1,0:T(8,128)S(1)}"  # in VMEM
SIZE = 8 * 128 * 4


def costs(entry: str, *computations: str) -> list[Cost]:
    """Costs of the instructions with cycles; %a is an argument of the program, in HBM."""
    text = s.program(f"  %a = {s.X} parameter(0)\n" + entry, *computations)
    return [work.cost for work in accounting.account(hlo.parse(text), lambda *_: 0.0).costed]


def computation(name: str, *lines: str) -> str:
    """A computation of these lines; the last is its root."""
    body = "".join(f"  {line}\n" for line in lines[:-1])
    return f"%{name} (p: f32[8,128]) -> f32[8,128] {{\n{body}  ROOT {lines[-1]}\n}}\n\n"


def test_operands_and_results_in_hbm_are_transferred():
    (one,) = costs(s.fusion("f", s.X, "%a", 7))
    assert one.bytes == 2 * SIZE


def test_arrays_in_vmem_transfer_nothing():
    first, second = costs(s.fusion("f", KEPT, "%a", 7) + s.fusion("g", KEPT, "%f", 7))
    assert (first.bytes, second.bytes) == (SIZE, 0)


def test_tiles_transfer_with_their_padding():
    (one,) = costs(s.fusion("f", "bf16[8,17]{1,0:T(8,128)(2,1)}", "", 7))
    assert one.bytes == 8 * 128 * 2


def test_sliced_operand_transfers_the_slice():
    inner = computation(
        "cut",
        "%p = f32[8,128]{1,0:T(8,128)} parameter(0)",
        "%b = f32[8,128]{1,0:T(8,128)} bitcast(%p)",
        "%s = f32[1,128]{1,0:T(1,128)} slice(%b), slice={[0:1], [0:128]}",
    )
    (one,) = costs(s.fusion("f", "f32[1,128]{1,0:T(1,128)}", "%a", 7, calls="cut"), inner)
    assert one.bytes == 2 * 128 * 4


def test_operand_sliced_and_read_transfers_once_and_whole():
    inner = computation(
        "both",
        "%p = f32[8,128]{1,0:T(8,128)} parameter(0)",
        "%s = f32[1,128]{1,0:T(1,128)} slice(%p), slice={[0:1], [0:128]}",
        "%b = f32[8,128]{1,0:T(8,128)} broadcast(%s)",
        "%n = f32[8,128]{1,0:T(8,128)} add(%p, %b)",
    )
    (one,) = costs(s.fusion("f", s.X, "%a", 7, calls="both"), inner)
    assert one.bytes == 2 * SIZE


def test_update_in_place_transfers_only_the_update():
    inner = computation(
        "put",
        "%p = f32[8,128]{1,0:T(8,128)} parameter(0)",
        "%q = f32[1,128]{1,0:T(1,128)} parameter(1)",
        "%z = s32[]{:T(128)} constant(0)",
        "%u = f32[8,128]{1,0:T(8,128)} dynamic-update-slice(%p, %q, %z, %z)",
    )
    new = s.fusion("n", "f32[1,128]{1,0:T(1,128)S(1)}", "", 7)
    _, one = costs(new + s.fusion("f", s.X, "%a, %n", 7, calls="put"), inner)
    assert one.bytes == 128 * 4


def test_each_array_of_a_tuple_is_written_by_itself():
    inner = computation(
        "two",
        "%p = f32[8,128]{1,0:T(8,128)} parameter(0)",
        "%n = f32[8,128]{1,0:T(8,128)} negate(%p)",
        "%t = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%n, %n)",
    )
    (one,) = costs(s.fusion("f", f"({s.X}, {KEPT})", "%a", 7, calls="two"), inner)
    assert one.bytes == 2 * SIZE


def test_vector_operations_count_computed_values_of_four_bytes():
    inner = computation(
        "some",
        "%p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)",
        "%c = f32[8,128]{1,0:T(8,128)} convert(%p)",
        "%t = f32[8,128]{1,0:T(8,128)} transpose(%c), dimensions={0,1}",
        "%h = f32[8,128]{1,0:T(8,128)} tanh(%t)",
        "%z = f32[]{:T(128)} constant(0)",
        "%r = f32[8]{0:T(128)} reduce(%h, %z), dimensions={1}, to_apply=%nothing",
    )
    (one,) = costs(s.fusion("f", "f32[8]{0:T(128)}", "%a", 7, calls="some"), inner)
    assert one.operations == 3 * 8 * 128


@pytest.mark.parametrize(
    ("matmul", "flops"),
    [
        # 16 x 257 rows of 64 values by a weight of 64 x 96
        ("f32[16,257,96] convolution(f32[16,257,64], f32[1,64,96]), window={size=1}, dim_labels=b0f_0io->b0f", 2 * 16 * 257 * 64 * 96),
        # a weight gradient: contracts 16 images x 257 tokens
        ("f32[64,96,1] convolution(f32[16,257,64], f32[16,257,96]), window={size=16}, dim_labels=0fb_0io->bf0", 2 * 16 * 257 * 64 * 96),
        # one matmul per image, written as a window that slides over zeros
        (
            "f32[16,7,5] convolution(f32[16,7,3], f32[16,3,5]), window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf",
            2 * 16 * 7 * 3 * 5,
        ),
        # patches of 2 x 2 pixels
        ("f32[4,3,3,8] convolution(f32[4,6,6,1], f32[2,2,1,8]), window={size=2x2 stride=2x2}, dim_labels=b01f_01io->b01f", 2 * 4 * 9 * 4 * 8),
        # three positions of a padded row of 3: the outer ones overlap two values each
        ("f32[1,3,1] convolution(f32[1,3,1], f32[3,1,1]), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * (2 + 3 + 2)),
        ("f32[4,6] dot(f32[4,5], f32[5,6]), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 4 * 5 * 6),
    ],
)  # fmt: skip
def test_matmul_flops(matmul: str, flops: int):
    result, call = matmul.split(" ", 1)
    left, right = call[call.index("(") + 1 : call.index(")")].split(", ")
    inner = computation(
        "times",
        f"%l = {left} parameter(0)",
        f"%r = {right} parameter(1)",
        f"%x = {result} {call.replace(left, '%l', 1).replace(right, '%r', 1)}",
    )
    outer = computation(
        "around",
        f"%l2 = {left} parameter(0)",
        f"%r2 = {right} parameter(1)",
        f"%f2 = {result} fusion(%l2, %r2), kind=kOutput, calls=%times",
    )
    (one,) = costs(s.fusion("f", result, "%a, %a", 7, calls="around"), inner, outer)
    assert (one.flops, one.operations) == (flops, 0)
