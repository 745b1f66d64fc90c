"""What one execution of a compiled program does: cycles, uncosted instructions, collectives, asynchronous copies.

A fusion's `backend_config` carries the compiler's "estimated_cycles". Their sum over the entry computation, with the body
of each loop times its trip count, is the compiler's own estimate of the computation. Collectives and Pallas kernels carry
none; they are listed with the bytes and FLOPs from which `step` charges them.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from curia_jax.plan.estimator.cost import DATA_MOVEMENT, MATMULS, Cost, Results, cost, results_of
from curia_jax.plan.estimator.hlo import HloError, Instruction, Program, Tensor, search, trip_count

Groups = tuple[tuple[int, ...], ...]
Shapes = tuple[tuple[int, ...], ...]
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Targets of custom calls that compute nothing.
BOOKKEEPING = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast",
    "GatherScatterIndicesBitpacked", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "LayoutConstraint",
    "SliceId", "ZeroCrop", "annotate_device_placement", "InspectSharding", "BitcastPad", "SliceToDynamic", "PadToStatic",
}  # fmt: skip
# Opcodes that allocate no array.
_NO_ALLOCATION = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "copy-done", "async-start", "async-update",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CostedOp:
    """An instruction with the compiler's estimate.

    Attributes:
      cycles: over all trips of the loops around it.
      cost: of one trip.
    """

    op_name: str
    cycles: int
    trips: int
    cost: Cost = Cost()


@dataclasses.dataclass(frozen=True)
class UncostedOp:
    """An instruction that computes, for which the compiler has no estimate: a Pallas kernel, a sort.

    Attributes:
      bytes: of its arguments and results, in HBM and VMEM, per trip.
      flops: per trip; None if the program does not state them.
      hbm_bytes: those of `bytes` in HBM.
      shapes: of its results.
    """

    name: str
    op_name: str
    bytes: int
    flops: int | None
    trips: int
    hbm_bytes: int = 0
    shapes: Shapes = ()


@dataclasses.dataclass(frozen=True)
class AsyncCopy:
    """A copy between HBM and VMEM that runs beside computation; `op_name` is what it is for, `bytes` are per trip."""

    op_name: str
    bytes: int
    trips: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      bytes: of the whole tensor per trip: what all-gather returns, what reduce-scatter and all-reduce take.
      groups: partition numbers, within a TPU slice, that take part together; None between TPU slices.
      cycles: per trip.
      hidden: of these, cycles behind computation that is scheduled between its start and its end.
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
    """Everything that one execution of a program does."""

    costed: tuple[CostedOp, ...]
    uncosted: tuple[UncostedOp, ...]
    collectives: tuple[Collective, ...]
    copies: tuple[AsyncCopy, ...] = ()

    @property
    def cycles(self) -> int:
        return sum(op.cycles for op in self.costed)


def account(program: Program, link_time: LinkTime) -> Account:
    """Adds up one execution of the program.

    Raises:
      HloError: a trip count that depends on data, or a form that is not known.
    """
    walk = _Walk(program, link_time)
    walk.computation(program.entry, 1)
    return Account(tuple(walk.costed), tuple(walk.uncosted), tuple(walk.collectives), tuple(walk.copies))


class _Walk:
    """Collects from the entry computation and everything that it calls."""

    def __init__(self, program: Program, link_time: LinkTime) -> None:
        self._program, self._link_time = program, link_time
        self.costed: list[CostedOp] = []
        self.uncosted: list[UncostedOp] = []
        self.collectives: list[Collective] = []
        self.copies: list[AsyncCopy] = []

    def computation(self, name: str | None, times: int) -> int:
        """Collects from a computation that runs `times` times; returns the cycles of one run."""
        body = self._program.computation(name)
        results = results_of(body)
        cycles = [self._instruction(instruction, times, results) for instruction in body]
        self.copies.extend(_async_copies(self._program, body, times))
        self.collectives.extend(_collectives(self._program, body, cycles, times, self._link_time))
        return sum(cycles)

    def _instruction(self, one: Instruction, times: int, results: Results) -> int:
        if one.opcode == "while":
            count = trip_count(self._program, one)
            return count * self.computation(one.attribute("body"), times * count)
        if one.opcode == "call":
            return self.computation(one.attribute("to_apply"), times)
        if one.opcode == "conditional":  # which branch runs is not known: the most expensive counts
            listed = re.search(r"branch_computations=\{([^}]*)\}", one.line)
            branches = re.findall(r"%([\w.\-]+)", listed[1]) if listed else []
            branches += [b for n in ("true", "false") if (b := one.attribute(f"{n}_computation"))]
            if not branches:
                raise HloError(f"cannot read the branches of {one.name}")
            return self.computation(max(branches, key=self._own_cycles), times)
        if one.cycles is not None:
            needs = cost(self._program, one, results)
            self.costed.append(CostedOp(scope_of(self._program, one), one.cycles * times, times, needs))
            return one.cycles
        if _computes(self._program, one):
            self.uncosted.append(_uncosted(self._program, one, times, results))
        return 0

    def _own_cycles(self, name: str) -> int:
        return sum(i.cycles or 0 for i in self._program.computation(name))


def scope_of(program: Program, instruction: Instruction) -> str:
    """The op_name that says best what an instruction is for.

    That of a fusion's matmul; or else of the scope that computes most of the values inside the fusion, because the compiler
    names a fusion after its last operation (such as the sum of a norm, fused into the optimizer's pass); or else its own.
    """
    inner = program.fused(instruction)
    values: dict[str, int] = {}
    names: dict[str, str] = {}
    for one in inner:
        if not one.op_name or one.opcode in DATA_MOVEMENT:
            continue
        if one.opcode in MATMULS:
            return one.op_name
        scope = one.op_name.rsplit("/", 1)[0]
        values[scope] = values.get(scope, 0) + sum(t.values for t in one.result)
        names.setdefault(scope, one.op_name)
    if values:
        return names[max(values, key=lambda scope: values[scope])]
    return instruction.op_name or next((i.op_name for i in reversed(inner) if i.op_name), instruction.opcode)


def _computes(program: Program, instruction: Instruction) -> bool:
    """Whether an instruction without an estimate takes time of its own."""
    if instruction.opcode in ("sort", "convolution", "dot", "cholesky", "triangular-solve", "fft"):
        return True
    if instruction.opcode == "custom-call":
        return instruction.target not in BOOKKEEPING
    if instruction.opcode == "fusion":
        inner = program.fused(instruction)
        return not any(map(_collective_kind, inner)) and any(_computes(program, i) for i in inner)
    return False


def _uncosted(program: Program, instruction: Instruction, times: int, results: Results) -> UncostedOp:
    inner = program.fused(instruction)
    core = next((i for i in inner if i.opcode == "custom-call" and i.target not in BOOKKEEPING), instruction)
    flops = re.search(r'"flops"\s*:\s*"?(\d+)', core.line)  # a Pallas kernel's own cost estimate
    moved = [*instruction.result, *(t for operand in instruction.operands for t in results.get(operand, ()))]
    return UncostedOp(
        core.target or core.opcode,
        core.op_name or instruction.op_name,
        sum(t.bytes for t in moved),
        int(flops[1]) if flops else cost(program, instruction, results).flops or None,
        times,
        sum(t.bytes for t in moved if t.space == 0),
        tuple(t.shape for t in core.result),
    )


def _async_copies(program: Program, body: Sequence[Instruction], times: int) -> Iterator[AsyncCopy]:
    """Asynchronous copies and slices of one computation.

    A copy to VMEM is for the instruction that first reads it, a copy to HBM for the one that made the value.
    """
    by_name = {i.name: i for i in body}
    for place, done in enumerate(body):
        start = by_name.get(done.operands[0]) if done.opcode in ("copy-done", "async-done") and done.operands else None
        if start is None or start.opcode not in ("copy-start", "async-start"):
            continue
        source = by_name.get(start.operands[0]) if start.operands else None
        if source is None or any(map(_collective_kind, program.fused(start))):
            continue
        spaces = [t.space for t in source.result] + [t.space for t in done.result]
        moved = sum(t.bytes for t in done.result) * spaces.count(0)
        to_hbm = any(t.space == 0 for t in done.result)
        owner = source if to_hbm else _first_reader(body, place)
        yield AsyncCopy(scope_of(program, owner) if owner is not None else done.opcode, moved, times)


def _first_reader(body: Sequence[Instruction], place: int) -> Instruction | None:
    """The instruction that first computes with the result of the instruction at `place`."""
    names = {body[place].name}
    for instruction in body[place + 1 :]:
        if names.isdisjoint(instruction.operands):
            continue
        renames = instruction.opcode in ("bitcast", "get-tuple-element", "tuple")
        if not renames and instruction.target != "ConcatBitcast":
            return instruction
        names.add(instruction.name)
    return None


# ---- collectives


class _Span(NamedTuple):
    """A collective from its start to its end, as places in a computation."""

    start: int
    end: int
    core: Instruction
    kind: str


def _collective_kind(instruction: Instruction) -> str | None:
    for kind in COLLECTIVES:
        if instruction.opcode in (kind, f"{kind}-start"):
            return kind
    return None


def _collectives(
    program: Program, body: Sequence[Instruction], cycles: Sequence[int], times: int, link_time: LinkTime
) -> Iterator[Collective]:
    """Collectives of one computation, each with the cycles that are scheduled between its start and its end.

    Links are shared, so a cycle hides only one collective, the one that ends first. Collectives between TPU slices use
    another network: a cycle hides one of them as well.
    """
    left_within, left_between = ([float(n) for n in cycles] for _ in range(2))
    for span in sorted(_spans(program, body), key=lambda span: (span.end, span.start)):
        places = range(span.start + 1, span.end)
        size = _payload(span.core)
        groups = None if span.core.opcode == "send" else replica_groups(span.core.line)
        takes = link_time(span.kind, size, groups)
        hidden, left = 0.0, left_between if span.core.opcode == "send" else left_within
        for place in places:
            share = min(left[place], takes - hidden)
            left[place] -= share
            hidden += share
        yield Collective(
            span.kind, span.core.op_name, size, groups, times, takes, hidden, any(cycles[n] > 0 for n in places)
        )


def _spans(program: Program, body: Sequence[Instruction]) -> list[_Span]:
    """Start and end of every collective of a computation.

    Within a TPU slice a collective is one instruction, a pair (`all-reduce-start`, `all-reduce-done`) or a chain of fusions
    with one channel, from AsyncCollectiveStart to AsyncCollectiveDone. Between TPU slices it is a `send` to the hosts and
    the `recv-done` of the same rendezvous. On SparseCores, which run beside the rest of the chip, it is a custom call that
    `async-start` prepares without operands, `async-update` starts and `async-done` awaits.

    Raises:
      HloError: a start without an end, or an end without a start.
    """
    spans: list[_Span] = []
    pending: dict[str, tuple[int, Instruction, str]] = {}  # starts by instruction name, channel or rendezvous
    offloaded: dict[str, Instruction] = {}

    def begin(key: str, place: int, core: Instruction, kind: str) -> None:
        if key in pending:
            raise HloError(f"the collective {pending[key][1].name} starts and never ends")
        pending[key] = place, core, kind

    def finish(key: str, place: int) -> None:
        if key not in pending:
            raise HloError(f"the collective of {key} ends without a start")
        start, core, kind = pending.pop(key)
        spans.append(_Span(start, place, core, kind))

    for place, instruction in enumerate(body):
        kind = _collective_kind(instruction)
        inner = program.fused(instruction)
        core = next((i for i in inner if _collective_kind(i)), None)
        if instruction.opcode == "async-start" and (on_sparse_core := _offloaded(program, inner)) is not None:
            offloaded[instruction.name] = on_sparse_core
        elif instruction.opcode == "async-update" and instruction.operands[0] in offloaded:
            core = offloaded[instruction.operands[0]]
            begin(instruction.name, place, core, _collective_kind(core) or "")
        elif instruction.opcode in ("async-start", "fusion") and core is not None:
            targets = {i.target for i in inner}
            channel = f"channel {core.attribute('channel_id') or core.name}"
            kind = _collective_kind(core) or ""
            if instruction.opcode == "async-start":
                begin(instruction.name, place, core, kind)
            elif "AsyncCollectiveStart" in targets:
                begin(channel, place, core, kind)
            elif "AsyncCollectiveDone" in targets:
                finish(channel, place)
            elif channel not in pending:  # otherwise it continues inside a fusion that also computes
                smaller = sum(t.bytes for t in instruction.result) < sum(t.bytes for t in core.result)
                scatters = kind == "all-reduce" and smaller
                spans.append(_Span(place, place, core, "reduce-scatter" if scatters else kind))
        elif instruction.opcode == "send" and "_xla_megascale_transfer_type" in instruction.line:
            transfer = search(r'_xla_megascale_transfer_type="(\w+)"', instruction.line, "the kind of a transfer")
            begin(_rendezvous(instruction), place, instruction, transfer[1].lower().replace("_", "-"))
        elif instruction.opcode == "recv-done":
            receive = next(i for i in body if i.name == instruction.operands[0])
            if "_xla_megascale_transfer_type" in receive.line:
                finish(_rendezvous(receive), place)
        elif kind is not None and instruction.opcode.endswith("-start"):
            begin(instruction.name, place, instruction, kind)
        elif kind is not None:
            spans.append(_Span(place, place, instruction, kind))
        elif instruction.opcode in ("async-done", *(f"{kind}-done" for kind in COLLECTIVES)):
            start = _origin(body, instruction, pending)
            if start is not None:  # otherwise the end of a copy or a slice
                finish(start, place)
    if pending:
        _, core, _ = next(iter(pending.values()))
        raise HloError(f"the collective {core.name} starts and never ends")
    return spans


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


def _origin(body: Sequence[Instruction], done: Instruction, pending: Collection[str]) -> str | None:
    """The pending start that a `done` belongs to, through the first operands between them."""
    by_name = {i.name: i for i in body}
    name = done.operands[0] if done.operands else None
    while name is not None and name not in pending:
        before = by_name.get(name)
        name = before.operands[0] if before is not None and before.operands else None
    return name


def _payload(core: Instruction) -> int:
    """Bytes of the whole tensor; see Collective.bytes."""
    sizes = [t.values for t in core.result]
    if core.opcode in ("send", "collective-permute-start"):
        return sizes[0]
    if core.opcode == "all-gather-start":
        return sum(sizes[len(sizes) // 2 :])
    groups = replica_groups(core.line)
    factor = len(groups[0]) if core.opcode == "reduce-scatter" and groups else 1
    return sum(sizes) * factor


def replica_groups(line: str) -> Groups:
    """Partition numbers that take part together: lists, "[2,4]<=[8]T(…)", or "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}".

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
        reshape = _numbers(match[2])
        ids = np.arange(math.prod(reshape)).reshape(reshape)
        if match[3]:
            ids = ids.transpose(_numbers(match[3]))
        return tuple(tuple(map(int, row)) for row in ids.reshape(_numbers(match[1])))
    match = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?\s*\{([^}]*)\}", line
    )
    if match and "(" not in match[4]:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        taken = re.findall(r"'([^']+)'", match[4])
        names = list(axes)
        ids = np.arange(math.prod(axes.values()))
        if match[2]:  # the order of the devices in the mesh
            ids = ids.reshape(_numbers(match[2])).transpose(_numbers(match[3]))
        ids = ids.reshape(list(axes.values()))
        rest = [n for n in range(len(names)) if names[n] not in taken]
        ids = ids.transpose([*rest, *(names.index(n) for n in taken)])
        return tuple(tuple(map(int, row)) for row in ids.reshape(-1, math.prod(axes[n] for n in taken)))
    raise HloError(f"cannot read the replica groups of: {line[:300]}")


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


# ---- tensors


def largest_tensors(program: Program, count: int) -> list[tuple[Tensor, str]]:
    """The largest arrays in HBM that the entry computation and its loops allocate, each once, with the scope they are for."""
    found: dict[tuple[str, tuple[int, ...], str], Tensor] = {}
    loops = [i.attribute("body") for body in program.computations.values() for i in body if i.opcode == "while"]
    for name in dict.fromkeys([program.entry, *loops]):
        for instruction in program.computation(name):
            if instruction.opcode in _NO_ALLOCATION:
                continue
            scope = scope_of(program, instruction).rsplit("/", 1)[0]
            for tensor in instruction.result:
                if tensor.space == 0:
                    found.setdefault((tensor.dtype, tensor.shape, scope), tensor)
    ranked = sorted(((t, key[2]) for key, t in found.items()), key=lambda pair: -pair[0].bytes)
    return ranked[:count]
