"""Reader of the TPU compiler's text of a scheduled program: computations, instructions, arrays, trip counts of loops."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "bf16": 2}


class HloError(ValueError):
    """The compiler's text has a form that this reader does not know."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array of the program.

    Attributes:
      values: bytes of its values.
      bytes: in memory, with the padding of its tiles.
      space: 0 is HBM, 1 is VMEM.
    """

    dtype: str
    shape: tuple[int, ...]
    values: int
    bytes: int
    space: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `line` is its text from the opcode on."""

    name: str
    opcode: str
    result: tuple[Tensor, ...]
    operands: tuple[str, ...]
    line: str

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate; None if the text has none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(match[1]) if match else None

    @functools.cached_property
    def op_name(self) -> str:
        """Path of `jax.named_scope`s and primitive that the instruction comes from; may be empty."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.line)
        return match[1] if match else ""

    def attribute(self, name: str) -> str | None:
        """Value of an attribute such as `calls=%x`."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.line)
        return match[1] if match else None

    @property
    def target(self) -> str | None:
        """Target of a custom call."""
        match = re.search(r'custom_call_target="([^"]*)"', self.line)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each with its instructions in scheduled order."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    def computation(self, name: str | None) -> tuple[Instruction, ...]:
        """The computation of that name.

        Raises:
          HloError: there is none.
        """
        if name is None or name not in self.computations:
            raise HloError(f"the program has no computation {name}")
        return self.computations[name]

    def fused(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """Instructions of the computation that a fusion or an asynchronous start calls; none for other instructions."""
        return self.computations.get(instruction.attribute("calls") or "", ())


def search(pattern: str, text: str, what: str) -> re.Match[str]:
    """Finds the pattern in the compiler's text.

    Raises:
      HloError: `what` is not there in the known form.
    """
    match = re.search(pattern, text)
    if match is None:
        raise HloError(f"cannot read {what} in: {text[:200]}")
    return match


# ---- text to instructions

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_TENSOR = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")


def parse(text: str) -> Program:
    """Parses the text of a scheduled module.

    Raises:
      HloError: the text is not a scheduled module with an entry computation, or has instructions in an unknown form.
    """
    if "is_scheduled=true" not in text.split("\n", 1)[0]:
        raise HloError("the program is not marked as scheduled (is_scheduled=true), so overlap cannot be read from it")
    computations: dict[str, list[Instruction]] = {}
    entry = current = None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            match = _INSTRUCTION.match(line)
            if match:
                current.append(_instruction(match[1], match[2]))
    if entry is None:
        raise HloError("the program has no entry computation")
    return Program({name: tuple(body) for name, body in computations.items()}, entry)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing_bracket(text, 0) + 1 if text.startswith("(") else text.find(" ")
    shape, call = text[:end], text[end:].lstrip()
    bracket = call.find("(")
    if bracket < 0:
        raise HloError(f"cannot read the instruction {name}: {text[:100]}")
    arguments = call[bracket + 1 : _closing_bracket(call, bracket)]
    result = tensors(shape)
    if "[" in shape and not result:
        raise HloError(f"cannot read the shape of {name}: {shape[:100]}")
    return Instruction(name, call[:bracket], result, tuple(re.findall(r"%([\w.\-]+)", arguments)), call)


def _closing_bracket(text: str, start: int) -> int:
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise HloError(f"unbalanced brackets in {text[:100]}")


def tensors(shape: str) -> tuple[Tensor, ...]:
    """Arrays of a shape, single or tuple: "(bf16[8,17]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)})"."""
    return tuple(_tensor(*match.groups()) for match in _TENSOR.finditer(re.sub(r"/\*.*?\*/", "", shape)))


def _tensor(dtype: str, dims: str, layout: str | None) -> Tensor:
    size = BYTES.get(dtype)
    if size is None:
        bits = re.search(r"\d+", dtype)
        size = int(bits[0]) / 8 if bits else 0
    shape = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    order, _, rest = (layout or "").partition(":")
    space = re.search(r"S\((\d+)\)", rest)
    tile = re.match(r"T\(([\d,]+)\)", rest)
    padded = list(shape)
    if tile and shape:
        minor_to_major = [int(n) for n in order.split(",") if n] or list(range(len(shape)))[::-1]
        for axis, side in zip(minor_to_major, reversed(tile[1].split(",")), strict=False):
            padded[axis] = -(-padded[axis] // int(side)) * int(side)
    return Tensor(
        dtype, shape, int(math.prod(shape) * size), int(math.prod(padded) * size), int(space[1]) if space else 0
    )


# ---- loops


def trip_count(program: Program, loop: Instruction) -> int:
    """How often the body of a `while` runs, from the constants of its condition and its counter's increment.

    Raises:
      HloError: the count is not a constant of the program.
    """
    condition = program.computation(loop.attribute("condition"))
    body = program.computation(loop.attribute("body"))
    constants: set[int] = set()
    compares: list[Instruction] = []
    for instruction in condition:
        for one in (instruction, *program.fused(instruction)):
            value = _integer(one)
            if value is not None:
                constants.add(value)
            if one.opcode == "compare":
                compares.append(one)
    if len(compares) != 1 or len(constants) != 1:
        raise HloError(
            f"cannot read the trip count of the loop {loop.name}: its condition has no single constant bound"
        )
    (bound,) = constants
    direction = compares[0].attribute("direction")
    counters = [c for c in condition if c.opcode == "get-tuple-element"]
    index = counters[0].attribute("index") if len(counters) == 1 else None
    step = _increment(body, int(index)) if index is not None else 1
    if direction == "LT" and step > 0:
        return max(0, -(-bound // step))
    if direction == "LE" and step > 0:
        return max(0, bound // step + 1)
    raise HloError(
        f"cannot read the trip count of the loop {loop.name}: compare {direction} with {bound}, increment {step}"
    )


def _integer(instruction: Instruction) -> int | None:
    match = re.match(r"constant\((-?\d+)\)", instruction.line) if instruction.opcode == "constant" else None
    return int(match[1]) if match and instruction.result[0].dtype in ("s32", "u32", "s64") else None


def _increment(body: Sequence[Instruction], index: int) -> int:
    """What one trip adds to the counter, element `index` of the loop's state; not 1 where the compiler unrolled."""
    by_name = {i.name: i for i in body}
    counter = {i.name for i in body if i.opcode == "get-tuple-element" and i.attribute("index") == str(index)}
    root = body[-1]
    updated = by_name.get(root.operands[index]) if root.opcode == "tuple" and index < len(root.operands) else None
    while updated is not None and updated.opcode in ("copy", "bitcast") and updated.operands:
        updated = by_name.get(updated.operands[0])
    if updated is not None and updated.opcode == "add" and counter & set(updated.operands):
        for operand in updated.operands:
            value = _integer(by_name[operand]) if operand in by_name else None
            if value is not None:
                return value
    return 1
