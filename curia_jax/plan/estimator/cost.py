"""What an instruction needs of the chip: matmul FLOPs, vector operations, bytes to and from HBM.

Each of the three, at its peak rate, is a lower bound of the instruction's time under any compiler.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from curia_jax.plan.estimator.hlo import Instruction, Program, Tensor, search

# Opcodes that move values and compute none.
DATA_MOVEMENT = {
    "parameter", "constant", "broadcast", "bitcast", "reshape", "copy", "transpose", "get-tuple-element", "tuple",
    "dynamic-update-slice", "dynamic-slice", "slice", "concatenate", "pad", "iota",
}  # fmt: skip
MATMULS = ("convolution", "dot")

Results = Mapping[str, tuple[Tensor, ...]]  # results of a computation's instructions, by instruction name


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one execution of an instruction.

    Attributes:
      flops: of its matmuls; a multiply-add counts as two.
      operations: vector operations on 4 bytes, one per value that is computed or reduced. A lower bound: a tanh counts
        as one, and values that are recomputed for each tile of a matmul count once.
      bytes: transferred between HBM and the chip, with tile padding. Arrays in VMEM transfer none; an array that is sliced
        or updated in place transfers the part in use.
    """

    flops: int = 0
    operations: int = 0
    bytes: int = 0


def cost(program: Program, instruction: Instruction, results: Results) -> Cost:
    """Cost of one instruction, with what is fused into it.

    Args:
      results: of the computation that the instruction is in.
    """
    inner = program.fused(instruction) if instruction.opcode == "fusion" else ()
    if inner:
        body = inner
        operands = list(zip(instruction.operands, _parameters(inner), strict=False))
    else:
        body = (instruction,)
        operands = [(name, name) for name in dict.fromkeys(instruction.operands)]
    moved = sum(_bytes_written(program, body, results, body[-1].name, instruction.result))
    for outside, inside in operands:
        whole = sum(tensor.bytes for tensor in results.get(outside, ()) if tensor.space == 0)
        if whole:
            part = _bytes_read(program, body, inside)
            moved += whole if part is None else min(whole, part)
    flops, operations = _computed(program, body, results)
    return Cost(flops, int(operations), moved)


def results_of(body: Sequence[Instruction]) -> Results:
    """Results of a computation's instructions, by name."""
    return {instruction.name: instruction.result for instruction in body}


# ---- matmuls and vector operations


def _computed(program: Program, body: Sequence[Instruction], outside: Results) -> tuple[int, float]:
    flops, operations = 0, 0.0
    results = {**outside, **results_of(body)}
    for one in body:
        if one.opcode in MATMULS:
            flops += matmul_flops(one, results)
        elif one.opcode == "fusion":
            nested = _computed(program, program.fused(one), {})
            flops, operations = flops + nested[0], operations + nested[1]
        elif one.opcode.startswith("reduce"):
            operations += sum(t.values for t in results.get(one.operands[0], ())) / 4
        elif one.opcode not in DATA_MOVEMENT and one.opcode != "custom-call":
            operations += sum(t.values for t in one.result) / 4
    return flops, operations


def matmul_flops(matmul: Instruction, results: Results) -> int:
    """FLOPs of a `dot` or of a `convolution`, the form that the TPU compiler gives to a dot.

    A batch dimension of both factors appears as a window that slides over zeros. As in XLA's HloCostAnalysis, only
    positions count at which filter and input overlap.

    Raises:
      HloError: its dimensions are not stated in the known form.
    """
    left, right = (results[name][0].shape for name in matmul.operands[:2])
    if matmul.opcode == "dot":
        listed = search(r"lhs_contracting_dims=\{([\d,]*)\}", matmul.line, "the contracted dimensions")[1]
        contracted = [int(n) for n in listed.split(",") if n]
        return 2 * math.prod(matmul.result[0].shape) * math.prod(left[n] for n in contracted)
    labels = search(r"dim_labels=(\w+)_(\w+)->(\w+)", matmul.line, "the dimension labels")
    inputs, filters, output = labels[1], labels[2], labels[3]
    features, out_features = right[filters.index("i")], right[filters.index("o")]
    groups = int(matmul.attribute("batch_group_count") or 1)
    pairs = 1
    for number, window in enumerate(_windows(matmul.line, sum(label.isdigit() for label in filters))):
        axis = str(number)
        sizes = left[inputs.index(axis)], right[filters.index(axis)], matmul.result[0].shape[output.index(axis)]
        pairs *= _overlaps(*sizes, **window)
    return 2 * features * out_features * pairs * (left[inputs.index("b")] // groups)


def _windows(line: str, count: int) -> Iterator[dict[str, int]]:
    """Stride, padding and dilation of each spatial dimension."""
    match = re.search(r"window=\{([^}]*)\}", line)
    words = dict(word.split("=") for word in match[1].split()) if match else {}
    fields = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    rows = {name: words[name].split("x") if name in words else [default] * count for name, default in fields.items()}
    for number in range(count):
        values = {name: row[number] for name, row in rows.items()}
        yield {name: int(value.split("_")[0]) for name, value in values.items()}


def _overlaps(
    size: int, filter_size: int, output: int, *, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs of an output position and a filter position that meet a value of the input."""
    end = (size - 1) * lhs_dilate
    places = (o * stride - pad + k * rhs_dilate for o, k in itertools.product(range(output), range(filter_size)))
    return sum(0 <= place <= end and place % lhs_dilate == 0 for place in places)


# ---- bytes


def _parameters(body: Sequence[Instruction]) -> list[str]:
    """Names of a computation's parameters, in order."""
    found = {}
    for one in body:
        match = re.match(r"parameter\((\d+)\)", one.line) if one.opcode == "parameter" else None
        if match:
            found[int(match[1])] = one.name
    return [found.get(number, "") for number in range(max(found, default=-1) + 1)]


def _bytes_read(program: Program, body: Sequence[Instruction], name: str) -> int | None:
    """Bytes of the value `name` that a computation reads; None if it reads all of it."""
    if name == body[-1].name and body[-1].opcode == "parameter":
        return None
    total = 0
    for user in body:
        if name not in user.operands:
            continue
        part: int | None = None
        if user.opcode in ("bitcast", "get-tuple-element") and user is not body[-1]:
            part = _bytes_read(program, body, user.name)
        elif user.opcode in ("slice", "dynamic-slice", "gather") and name not in user.operands[1:]:
            part = sum(tensor.bytes for tensor in user.result)
        elif user.opcode == "dynamic-update-slice" and name not in user.operands[1:]:
            part = _bytes_read(program, body, user.name)  # updated in place; what is read of the result
        elif user.opcode == "tuple" and user is body[-1]:
            part = 0
        elif user.opcode == "fusion":
            inner = program.fused(user)
            inside = [p for o, p in zip(user.operands, _parameters(inner), strict=False) if o == name]
            parts = [_bytes_read(program, inner, one) for one in inside]
            part = None if None in parts or not parts else sum(p for p in parts if p is not None)
        if part is None:
            return None
        total += part
    return total


def _bytes_written(
    program: Program, body: Sequence[Instruction], outside: Results, name: str, result: Sequence[Tensor]
) -> Iterator[int]:
    """Bytes that each array of a computation's result, the instruction `name`, writes to HBM."""
    by_name = {one.name: one for one in body}
    root = by_name.get(name)
    while root is not None and root.opcode == "bitcast" and root.operands[0] in by_name:
        root = by_name[root.operands[0]]
    if root is not None and root.opcode == "tuple" and len(root.operands) == len(result):
        for operand, tensor in zip(root.operands, result, strict=True):
            if operand in by_name and by_name[operand].opcode == "parameter":
                continue  # passed through
            yield from _bytes_written(program, body, outside, operand, [tensor])
    elif root is not None and root.opcode == "fusion" and len(body) > 1:
        inner = program.computation(root.attribute("calls"))
        yield from _bytes_written(program, inner, {}, inner[-1].name, result)
    elif root is not None and root.opcode == "dynamic-update-slice":
        update = by_name[root.operands[1]].result if root.operands[1] in by_name else outside.get(root.operands[1], ())
        yield from (tensor.bytes for tensor, whole in zip(update, result, strict=False) if whole.space == 0)
    else:
        yield from (tensor.bytes for tensor in result if tensor.space == 0)
