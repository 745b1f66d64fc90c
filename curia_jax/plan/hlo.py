"""Reads the text of a program that the TPU compiler has scheduled: cycles, loops, collectives, kernels, tensors.

A fusion's `backend_config` carries the compiler's "estimated_cycles". Their sum over the entry computation, with the body
of each loop times its trips, is the compiler's own estimate of the step. Collectives carry none, and neither do custom
kernels: the first are returned for the caller to time, the second too, with their FLOPs and bytes.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "bf16": 2}
Groups = tuple[tuple[int, ...], ...]
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Custom calls that compute nothing.
BOOKKEEPING = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast",
    "GatherScatterIndicesBitpacked", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "LayoutConstraint",
    "SliceId", "ZeroCrop", "annotate_device_placement", "InspectSharding", "BitcastPad", "SliceToDynamic", "PadToStatic",
}  # fmt: skip
# What moves values and computes none.
_MOVES = {
    "parameter", "constant", "broadcast", "bitcast", "reshape", "copy", "transpose", "get-tuple-element", "tuple",
    "dynamic-update-slice", "dynamic-slice", "slice", "concatenate", "pad", "iota",
}  # fmt: skip
# What makes no array of its own.
_NO_TENSORS = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "copy-done", "async-start", "async-update",
}  # fmt: skip


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


@dataclasses.dataclass(frozen=True)
class Work:
    """Cycles of one instruction, over all trips of the loops around it."""

    op_name: str
    cycles: int
    trips: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that computes without an estimate of the compiler: a custom kernel, a sort.

    `flops` is None where the program does not say.
    """

    name: str
    op_name: str
    bytes: int
    flops: int | None
    trips: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      bytes: of the whole tensor per trip: what all-gather returns, what reduce-scatter and all-reduce take.
      groups: partition numbers, within a TPU slice, that take part together; None between TPU slices.
      cycles: it takes per trip.
      hidden: of these, cycles behind computation that the compiler scheduled between its start and its end.
      overlapped: it has a separate start and end with computation between them.
    """

    kind: str
    op_name: str
    bytes: int
    groups: Groups | None
    trips: int
    cycles: float
    hidden: float
    overlapped: bool


# (kind, bytes, groups) -> cycles that a collective takes.
LinkTime = Callable[[str, int, Groups | None], float]


@dataclasses.dataclass(frozen=True)
class Account:
    work: tuple[Work, ...]
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]

    @property
    def cycles(self) -> int:
        return sum(w.cycles for w in self.work)


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


# ---- the account


def account(program: Program, link_time: LinkTime) -> Account:
    """Cycles, kernels and collectives of one execution of the program.

    Raises:
      HloError: a loop whose trips depend on data, or a form of replica groups that is not known.
    """
    work: list[Work] = []
    kernels: list[Kernel] = []
    collectives: list[Collective] = []

    def walk(name: str, times: int) -> int:
        """Adds what a computation does `times` times; returns its cycles for one time."""
        body = program.computations[name]
        cycles = []
        for instruction in body:
            cycles.append(own(instruction, times))
        collectives.extend(_collectives(program, body, cycles, times, link_time))
        return sum(cycles)

    def own(instruction: Instruction, times: int) -> int:
        if instruction.opcode == "while":
            count = trips(program, instruction)
            return count * walk(instruction.attribute("body") or "", times * count)
        if instruction.opcode == "call":
            return walk(instruction.attribute("to_apply") or "", times)
        if instruction.opcode == "conditional":
            # The dearest branch stands for all: which one runs is not known.
            branches = re.findall(
                r"%([\w.\-]+)", (re.search(r"branch_computations=\{([^}]*)\}", instruction.line) or [""])[0]
            )
            branches += [
                b for b in (instruction.attribute("true_computation"), instruction.attribute("false_computation")) if b
            ]
            dearest = max(branches, key=lambda b: cost_of(b))
            return walk(dearest, times)
        if instruction.cycles is not None:
            work.append(Work(part_name(program, instruction), instruction.cycles * times, times))
            return instruction.cycles
        if _is_kernel(program, instruction):
            kernels.append(_kernel(program, instruction, times))
        return 0

    def cost_of(name: str) -> int:
        return sum(i.cycles or 0 for i in program.computations[name])

    walk(program.entry, 1)
    return Account(tuple(work), tuple(kernels), tuple(collectives))


def part_name(program: Program, instruction: Instruction) -> str:
    """The op_name that tells best what a fusion is for.

    That of its matrix product; or else of the scope that most of the values inside it are computed in, because the compiler
    names a fusion after its last operation (the sum of a norm, say, that rides on the optimizer's pass); or else its own.
    """
    inner = program.computations.get(instruction.attribute("calls") or "", ())
    votes: dict[str, int] = {}
    names: dict[str, str] = {}
    for one in inner:
        if not one.op_name or one.opcode in _MOVES:
            continue
        if one.opcode in ("convolution", "dot"):
            return one.op_name
        scope = one.op_name.rsplit("/", 1)[0]
        votes[scope] = votes.get(scope, 0) + sum(t.values for t in one.result)
        names.setdefault(scope, one.op_name)
    if votes:
        return names[max(votes, key=lambda scope: votes[scope])]
    return instruction.op_name or next((i.op_name for i in reversed(inner) if i.op_name), instruction.opcode)


def _is_kernel(program: Program, instruction: Instruction) -> bool:
    if instruction.opcode in ("sort", "convolution", "dot", "cholesky", "triangular-solve", "fft"):
        return True
    if instruction.opcode == "custom-call":
        return instruction.target not in BOOKKEEPING
    if instruction.opcode == "fusion":  # a fusion around a kernel, or one that the compiler did not estimate
        inner = program.computations.get(instruction.attribute("calls") or "", ())
        if any(_collective_kind(i) for i in inner):
            return False
        return any(_is_kernel(program, i) for i in inner)
    return False


def _kernel(program: Program, instruction: Instruction, times: int) -> Kernel:
    inner = program.computations.get(instruction.attribute("calls") or "", ())
    core = next((i for i in inner if i.opcode == "custom-call" and i.target not in BOOKKEEPING), instruction)
    flops = re.search(r'"flops"\s*:\s*"?(\d+)', core.line)  # a kernel's own cost estimate
    shapes = {i.name: i.result for body in _containing(program, instruction) for i in body}
    moved = sum(t.bytes for t in instruction.result)
    moved += sum(t.bytes for operand in instruction.operands for t in shapes.get(operand, ()))
    return Kernel(
        core.target or core.opcode, core.op_name or instruction.op_name, moved, int(flops[1]) if flops else None, times
    )


def _containing(program: Program, instruction: Instruction) -> Iterator[Sequence[Instruction]]:
    return (body for body in program.computations.values() if any(i is instruction for i in body))


# ---- collectives


def _collective_kind(instruction: Instruction) -> str | None:
    for kind in COLLECTIVES:
        if instruction.opcode in (kind, f"{kind}-start"):
            return kind
    return None


def _collectives(
    program: Program, body: Sequence[Instruction], cycles: Sequence[int], times: int, link_time: LinkTime
) -> Iterator[Collective]:
    """Collectives of one computation, each with the computation that stands between its start and its end.

    Within a TPU slice a collective is an instruction, a pair (`all-reduce-start`, `all-reduce-done`) or a chain of fusions
    with one channel, from AsyncCollectiveStart to AsyncCollectiveDone. Between TPU slices it is a `send` to the hosts and
    the `recv-done` of the same rendezvous. On the SparseCores, which move values beside the rest of the chip, it is a custom call
    that `async-start` prepares, without operands, `async-update` starts and `async-done` awaits.

    The links are shared, so a cycle hides one collective only: the one that ends first.
    """
    opened: dict[str, int] = {}
    offloaded: dict[str, Instruction] = {}
    spans: list[tuple[int, int, Instruction, str]] = []
    for place, instruction in enumerate(body):
        kind = _collective_kind(instruction)
        inner = program.computations.get(instruction.attribute("calls") or "", ())
        core = next((i for i in inner if _collective_kind(i)), None)
        if instruction.opcode == "async-start" and (on_sparse_core := _offloaded(program, inner)) is not None:
            offloaded[instruction.name] = on_sparse_core
        elif instruction.opcode == "async-update" and instruction.operands[0] in offloaded:
            core = offloaded[instruction.operands[0]]
            opened[instruction.name] = place
            spans.append((place, -1, core, _collective_kind(core) or ""))
        elif instruction.opcode in ("async-start", "fusion") and core is not None:
            targets = {i.target for i in inner}
            channel = core.attribute("channel_id") or core.name
            kind = _collective_kind(core) or ""
            if instruction.opcode == "async-start":
                opened[instruction.name] = place
                spans.append((place, -1, core, kind))
            elif "AsyncCollectiveStart" in targets:
                opened[f"channel {channel}"] = place
                spans.append((place, -1, core, kind))
            elif "AsyncCollectiveDone" in targets:
                _close(spans, opened.pop(f"channel {channel}", None), place)
            elif f"channel {channel}" not in opened:  # else it goes on inside a fusion that computes, too
                smaller = sum(t.bytes for t in instruction.result) < sum(t.bytes for t in core.result)
                spans.append((place, place, core, "reduce-scatter" if kind == "all-reduce" and smaller else kind))
        elif instruction.opcode == "send" and "_xla_megascale_transfer_type" in instruction.line:
            opened[_rendezvous(instruction)] = place
            transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.line)
            spans.append((place, -1, instruction, transfer[1].lower().replace("_", "-") if transfer else "send"))
        elif instruction.opcode == "recv-done":
            receive = next(i for i in body if i.name == instruction.operands[0])
            if "_xla_megascale_transfer_type" in receive.line:
                _close(spans, opened.pop(_rendezvous(receive), None), place)
        elif kind is not None:
            started = instruction.opcode.endswith("-start")
            if started:
                opened[instruction.name] = place
            spans.append((place, -1 if started else place, instruction, kind))
        elif instruction.opcode in ("async-done", *(f"{kind}-done" for kind in COLLECTIVES)):
            start = _origin(body, instruction, opened)
            if start is not None:  # else it ends a copy or a slice
                _close(spans, opened.pop(start), place)
    left: list[float] = list(cycles)
    for start, end, core, kind in sorted(spans, key=lambda span: (span[1], span[0])):
        if end < start:
            raise HloError(f"the collective {core.name} starts and never ends")
        size = _payload(core, kind)
        groups = None if core.opcode == "send" else replica_groups(core.line)
        takes = link_time(kind, size, groups)
        between = sum(cycles[start + 1 : end])
        hidden = 0.0
        for place in range(start + 1, end):
            share = min(left[place], takes - hidden)
            left[place] -= share
            hidden += share
        yield Collective(kind, core.op_name, size, groups, times, takes, hidden, between > 0)


def _offloaded(program: Program, body: Sequence[Instruction]) -> Instruction | None:
    """The collective that a computation hands to the SparseCores."""
    for call in body:
        match = re.search(r"called_computations=\{%?([\w.\-]+)\}", call.line) if call.opcode == "custom-call" else None
        inner = program.computations.get(match[1], ()) if match else ()
        core = next((i for i in inner if _collective_kind(i)), None)
        if core is not None:
            return core
    return None


def _rendezvous(transfer: Instruction) -> str:
    match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', transfer.line)
    return f"rendezvous {match[1] if match else transfer.name}"


def _close(spans: list, start: int | None, end: int) -> None:
    for number, span in enumerate(spans):
        if span[0] == start and span[1] == -1:
            spans[number] = (span[0], end, *span[2:])
            return
    raise HloError("a collective ends that has not started")


def _origin(body: Sequence[Instruction], done: Instruction, opened: Mapping[str, int]) -> str | None:
    by_name = {i.name: i for i in body}
    name = done.operands[0] if done.operands else None
    while name is not None and name not in opened:
        before = by_name.get(name)
        name = before.operands[0] if before is not None and before.operands else None
    return name


def _payload(core: Instruction, kind: str) -> int:
    sizes = [t.values for t in core.result]
    if core.opcode == "send":
        return sizes[0]
    if core.opcode == "all-gather-start":
        return sum(sizes[len(sizes) // 2 :])
    if core.opcode == "collective-permute-start":
        return sizes[0]
    groups = replica_groups(core.line)
    factor = len(groups[0]) if core.opcode == "reduce-scatter" and groups else 1
    return sum(sizes) * factor


def replica_groups(line: str) -> Groups:
    """Partition numbers that take part together: lists, "[2,4]<=[8]T(…)", or "mesh['a'=2,'b'=4] {'b'}".

    Raises:
      HloError: another form.
    """
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        return tuple(tuple(map(int, p)) for p in re.findall(r"\{?(\d+),(\d+)", pairs[1]))
    match = re.search(r"replica_groups=\{(\{[\d,{}\s]*\})\}", line)
    if match:
        return tuple(tuple(int(n) for n in g.split(",")) for g in re.findall(r"\{([\d,]+)\}", match[1]))
    match = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if match:
        shape, reshape = ([int(n) for n in match[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(reshape)).reshape(reshape)
        if match[3]:
            ids = ids.transpose([int(n) for n in match[3].split(",")])
        return tuple(tuple(map(int, row)) for row in ids.reshape(shape))
    match = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    if match and "(" not in match[2]:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        taken = re.findall(r"'([^']+)'", match[2])
        names = list(axes)
        ids = np.arange(math.prod(axes.values())).reshape(list(axes.values()))
        rest = [n for n in range(len(names)) if names[n] not in taken]
        ids = ids.transpose([*rest, *(names.index(n) for n in taken)])
        return tuple(tuple(map(int, row)) for row in ids.reshape(-1, math.prod(axes[n] for n in taken)))
    raise HloError(f"cannot read the replica groups of: {line[:300]}")


# ---- tensors


def largest(program: Program, count: int) -> list[tuple[Tensor, str]]:
    """The largest arrays in HBM that the entry computation and its loops make, each once, with what made it."""
    found: dict[tuple[str, tuple[int, ...], str], Tensor] = {}
    names = {program.entry} | {
        i.attribute("body") or "" for body in program.computations.values() for i in body if i.opcode == "while"
    }
    for name in names:
        for instruction in program.computations[name]:
            if instruction.opcode in _NO_TENSORS:
                continue
            where = part_name(program, instruction)
            for tensor in instruction.result:
                if tensor.space == 0:
                    found.setdefault((tensor.dtype, tensor.shape, where.rsplit("/", 1)[0]), tensor)
    ranked = sorted(((t, key[2]) for key, t in found.items()), key=lambda pair: -pair[0].bytes)
    return ranked[:count]
