"""Reads the text of a program that the TPU compiler has scheduled: computations, instructions, tensors, the trips of loops."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "bf16": 2}


class HloError(ValueError):
    """The program's text is not what this reader knows; the message has the line."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    values: int  # bytes of its values
    bytes: int  # in memory, with the padding of its tiles
    space: int  # 0 is HBM, 1 the chip's own memory


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    result: tuple[Tensor, ...]
    operands: tuple[str, ...]
    line: str

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where it made none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        return int(match[1]) if match else None

    @functools.cached_property
    def op_name(self) -> str:
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.line)
        return match[1] if match else ""

    def attribute(self, name: str) -> str | None:
        """`calls=%x` and the like."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.line)
        return match[1] if match else None

    @property
    def target(self) -> str | None:
        match = re.search(r'custom_call_target="([^"]*)"', self.line)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Program:
    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


# ---- text to instructions

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_TENSOR = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")


def parse(text: str) -> Program:
    """Computations by name, instructions in the order in which they are scheduled.

    Raises:
      HloError: the text is not a scheduled module with an entry computation.
    """
    if "is_scheduled=true" not in text.split("\n", 1)[0]:
        raise HloError("the program is not scheduled, so nothing can be said about what overlaps")
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


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest_of = rest[:end], rest[end:].lstrip()
    open_at = rest_of.find("(")
    if open_at < 0:
        raise HloError(f"cannot read the instruction {name}: {rest[:100]}")
    arguments = rest_of[open_at + 1 : _closing(rest_of, open_at)]
    return Instruction(name, rest_of[:open_at], tensors(shape), tuple(re.findall(r"%([\w.\-]+)", arguments)), rest_of)


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise HloError(f"unbalanced brackets in {text[:100]}")


def tensors(shape: str) -> tuple[Tensor, ...]:
    """Arrays of a shape, be it one or a tuple: "(bf16[8,17]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)})"."""
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


def trips(program: Program, loop: Instruction) -> int:
    """How often the body of a `while` runs, from the constants of its condition, its start and its step.

    Raises:
      HloError: the number depends on data.
    """
    condition = program.computations[loop.attribute("condition") or ""]
    body = program.computations[loop.attribute("body") or ""]
    constants, compares = {}, []
    for instruction in condition:
        inner = program.computations.get(instruction.attribute("calls") or "", ())
        for part in (instruction, *inner):
            value = _integer(part)
            if value is not None:
                constants[part.name] = value
            if part.opcode == "compare":
                compares.append(part)
    if len(compares) != 1 or len(set(constants.values())) != 1:
        raise HloError(f"cannot tell how often the loop {loop.name} runs: its condition compares with no one constant")
    bound = next(iter(constants.values()))
    direction = compares[0].attribute("direction")
    counters = [c for c in condition if c.opcode == "get-tuple-element"]
    index = counters[0].attribute("index") if len(counters) == 1 else None
    step = _step(body, index) if index is not None else 1
    if direction == "LT" and step > 0:
        return max(0, -(-bound // step))
    if direction == "LE" and step > 0:
        return max(0, bound // step + 1)
    raise HloError(f"cannot tell how often the loop {loop.name} runs: compare {direction} with {bound}, step {step}")


def _integer(instruction: Instruction) -> int | None:
    match = re.match(r"constant\((-?\d+)\)", instruction.line) if instruction.opcode == "constant" else None
    return int(match[1]) if match and instruction.result[0].dtype in ("s32", "u32", "s64") else None


def _step(body: Sequence[Instruction], index: str) -> int:
    """What a trip adds to the counter: 1 unless the compiler has doubled the body."""
    by_name = {i.name: i for i in body}
    counter = {i.name for i in body if i.opcode == "get-tuple-element" and i.attribute("index") == index}
    root = body[-1]
    place = int(index)
    updated = by_name.get(root.operands[place]) if root.opcode == "tuple" and place < len(root.operands) else None
    while updated is not None and updated.opcode in ("copy", "bitcast") and updated.operands:
        updated = by_name.get(updated.operands[0])
    if updated is not None and updated.opcode == "add" and counter & set(updated.operands):
        for operand in updated.operands:
            value = _integer(by_name[operand]) if operand in by_name else None
            if value is not None:
                return value
    return 1
