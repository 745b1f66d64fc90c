"""What an instruction asks of the chip: matrix products, vector operations, bytes to and from HBM.

These bound how fast any compiler could run it: it takes at least as long as the slowest of the three does at its peak.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from curia_jax.plan.estimator.hlo import Instruction, Program, Tensor

# What moves values and computes none.
MOVES = {
    "parameter", "constant", "broadcast", "bitcast", "reshape", "copy", "transpose", "get-tuple-element", "tuple",
    "dynamic-update-slice", "dynamic-slice", "slice", "concatenate", "pad", "iota",
}  # fmt: skip
PRODUCTS = ("convolution", "dot")

Results = Mapping[str, tuple[Tensor, ...]]  # of a computation's instructions, by name


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one execution of an instruction.

    Attributes:
      flops: of matrix products; a multiply-add counts as two.
      operations: of the vector unit on 4 bytes: one for each value that is computed, or that a reduction takes. A floor: a
        tanh is counted as one, and values that are computed anew for each tile of a product are counted once.
      bytes: that pass between HBM and the chip, with the padding of their tiles. What the compiler keeps in the chip's own
        memory passes nothing; of a value that is sliced or updated in place, only what is touched.
    """

    flops: int = 0
    operations: int = 0
    bytes: int = 0


def cost(program: Program, instruction: Instruction, results: Results) -> Cost:
    """What one instruction costs.

    Args:
      results: of the computation that the instruction stands in.
    """
    inner = program.computations.get(instruction.attribute("calls") or "") if instruction.opcode == "fusion" else None
    if inner is None:
        alone = (instruction,)
        operands = [(name, name) for name in dict.fromkeys(instruction.operands)]
    else:
        alone = inner
        operands = list(zip(instruction.operands, _parameters(inner), strict=False))
    moved = sum(_written(program, alone, results, alone[-1].name, instruction.result))
    for outside, inside in operands:
        whole = sum(tensor.bytes for tensor in results.get(outside, ()) if tensor.space == 0)
        if whole:
            touched = _touched(program, alone, inside)
            moved += whole if touched is None else min(whole, touched)
    flops, operations = _computed(program, alone, results)
    return Cost(flops, int(operations), moved)


def results_of(body: Sequence[Instruction]) -> Results:
    """Results of a computation's instructions, by name."""
    return {instruction.name: instruction.result for instruction in body}


# ---- products and vector operations


def _computed(program: Program, body: Sequence[Instruction], outside: Results) -> tuple[int, float]:
    flops, operations = 0, 0.0
    results = {**outside, **results_of(body)}
    for one in body:
        if one.opcode in PRODUCTS:
            flops += product_flops(one, results)
        elif one.opcode == "fusion":
            inner = program.computations.get(one.attribute("calls") or "", ())
            nested = _computed(program, inner, {})
            flops, operations = flops + nested[0], operations + nested[1]
        elif one.opcode.startswith("reduce"):
            operations += sum(t.values for t in results.get(one.operands[0], ())) / 4
        elif one.opcode not in MOVES and one.opcode != "custom-call":
            operations += sum(t.values for t in one.result) / 4
    return flops, operations


def product_flops(product: Instruction, results: Results) -> int:
    """FLOPs of a `dot` or `convolution`, which is what the TPU compiler makes of a dot.

    A dimension of the batch that the two sides share appears as a window that slides over zeros. As in XLA's own
    HloCostAnalysis only positions count at which kernel and input meet.
    """
    left, right = (results[name][0].shape for name in product.operands[:2])
    if product.opcode == "dot":
        contracted = [int(n) for n in re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.line)[1].split(",") if n]
        return 2 * math.prod(product.result[0].shape) * math.prod(left[n] for n in contracted)
    inputs, kernel, output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.line).groups()
    features, out_features = right[kernel.index("i")], right[kernel.index("o")]
    groups = int(product.attribute("batch_group_count") or 1)
    pairs = 1
    for number, window in enumerate(_windows(product.line, sum(label.isdigit() for label in kernel))):
        axis = str(number)
        sizes = left[inputs.index(axis)], right[kernel.index(axis)], product.result[0].shape[output.index(axis)]
        pairs *= _meetings(*sizes, **window)
    return 2 * features * out_features * pairs * (left[inputs.index("b")] // groups)


def _windows(line: str, count: int) -> Iterator[dict[str, int]]:
    """Stride, padding and dilation in each spatial dimension."""
    match = re.search(r"window=\{([^}]*)\}", line)
    words = dict(word.split("=") for word in match[1].split()) if match else {}
    fields = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    rows = {name: words[name].split("x") if name in words else [default] * count for name, default in fields.items()}
    for number in range(count):
        values = {name: row[number] for name, row in rows.items()}
        yield {name: int(value.split("_")[0]) for name, value in values.items()}


def _meetings(size: int, kernel: int, output: int, *, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of a place in the output and one in the kernel at which there is a value of the input."""
    end = (size - 1) * lhs_dilate
    places = (o * stride - pad + k * rhs_dilate for o, k in itertools.product(range(output), range(kernel)))
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


def _touched(program: Program, body: Sequence[Instruction], name: str) -> int | None:
    """Bytes of a value that a computation reads; None where it reads all of it."""
    if name == body[-1].name and body[-1].opcode == "parameter":
        return None
    total = 0
    for user in body:
        if name not in user.operands:
            continue
        part: int | None = None
        if user.opcode in ("bitcast", "get-tuple-element") and user is not body[-1]:
            part = _touched(program, body, user.name)
        elif user.opcode in ("slice", "dynamic-slice", "gather") and name not in user.operands[1:]:
            part = sum(tensor.bytes for tensor in user.result)
        elif user.opcode == "dynamic-update-slice" and name not in user.operands[1:]:
            part = _touched(program, body, user.name)  # what follows in its place; nothing if it is the result
        elif user.opcode == "tuple" and user is body[-1]:
            part = 0
        elif user.opcode == "fusion":
            inner = program.computations.get(user.attribute("calls") or "", ())
            inside = [p for o, p in zip(user.operands, _parameters(inner), strict=False) if o == name]
            parts = [_touched(program, inner, one) for one in inside]
            part = None if None in parts or not parts else sum(p for p in parts if p is not None)
        if part is None:
            return None
        total += part
    return total


def _written(
    program: Program, body: Sequence[Instruction], outside: Results, name: str, result: Sequence[Tensor]
) -> Iterator[int]:
    """Bytes that each array of a computation's result writes to HBM."""
    by_name = {one.name: one for one in body}
    root = by_name.get(name)
    while root is not None and root.opcode == "bitcast" and root.operands[0] in by_name:
        root = by_name[root.operands[0]]
    if root is not None and root.opcode == "tuple" and len(root.operands) == len(result):
        for operand, tensor in zip(root.operands, result, strict=True):
            if operand in by_name and by_name[operand].opcode == "parameter":
                continue  # it stays where it is
            yield from _written(program, body, outside, operand, [tensor])
    elif root is not None and root.opcode == "fusion" and len(body) > 1:
        inner = program.computations[root.attribute("calls") or ""]
        yield from _written(program, inner, {}, inner[-1].name, result)
    elif root is not None and root.opcode == "dynamic-update-slice":
        update = by_name[root.operands[1]].result if root.operands[1] in by_name else outside.get(root.operands[1], ())
        yield from (tensor.bytes for tensor, whole in zip(update, result, strict=False) if whole.space == 0)
    else:
        yield from (tensor.bytes for tensor in result if tensor.space == 0)
