"""What a compiled program does: cycles, custom kernels, collectives and copies, each with the part of the model that it is for.

A fusion's `backend_config` carries the compiler's "estimated_cycles". Their sum over the entry computation, with the body
of each loop times its trips, is the compiler's own estimate of the step. Collectives carry none, and neither do custom
kernels: the first are returned for the caller to time, the second too, with their FLOPs and bytes.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from curia_jax.plan.estimator.cost import MOVES, Cost, Results, cost, results_of
from curia_jax.plan.estimator.hlo import HloError, Instruction, Program, Tensor, trips

Groups = tuple[tuple[int, ...], ...]
Shapes = tuple[tuple[int, ...], ...]
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Custom calls that compute nothing.
BOOKKEEPING = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast",
    "GatherScatterIndicesBitpacked", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "LayoutConstraint",
    "SliceId", "ZeroCrop", "annotate_device_placement", "InspectSharding", "BitcastPad", "SliceToDynamic", "PadToStatic",
}  # fmt: skip
# What makes no array of its own.
_NO_TENSORS = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "copy-done", "async-start", "async-update",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
    """Cycles of one instruction, over all trips of the loops around it."""

    op_name: str
    cycles: int
    trips: int
    cost: Cost = Cost()  # of one trip


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A copy between HBM and the chip's own memory that goes on beside computation, bytes per trip."""

    op_name: str  # of what it is for
    bytes: int
    trips: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that computes without an estimate of the compiler: a custom kernel, a sort.

    `bytes` are those of its arguments and results, wherever they are; `flops` is None where the program does not say;
    `shapes` are those of its results.
    """

    name: str
    op_name: str
    bytes: int
    flops: int | None
    trips: int
    hbm_bytes: int = 0
    shapes: Shapes = ()


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
    transfers: tuple[Transfer, ...] = ()

    @property
    def cycles(self) -> int:
        return sum(w.cycles for w in self.work)


# ---- the account


def account(program: Program, link_time: LinkTime) -> Account:
    """Cycles, kernels, collectives and copies of one execution of the program.

    Raises:
      HloError: a loop whose trips depend on data, or a form of replica groups that is not known.
    """
    work: list[Work] = []
    kernels: list[Kernel] = []
    collectives: list[Collective] = []
    transfers: list[Transfer] = []

    def walk(name: str, times: int) -> int:
        """Adds what a computation does `times` times; returns its cycles for one time."""
        body = program.computations[name]
        results = results_of(body)
        cycles = []
        for instruction in body:
            cycles.append(own(instruction, times, results))
        transfers.extend(_transfers(program, body, times))
        collectives.extend(_collectives(program, body, cycles, times, link_time))
        return sum(cycles)

    def own(instruction: Instruction, times: int, results: Results) -> int:
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
            needs = cost(program, instruction, results)
            work.append(Work(part_name(program, instruction), instruction.cycles * times, times, needs))
            return instruction.cycles
        if _is_kernel(program, instruction):
            kernels.append(_kernel(program, instruction, times, results))
        return 0

    def cost_of(name: str) -> int:
        return sum(i.cycles or 0 for i in program.computations[name])

    walk(program.entry, 1)
    return Account(tuple(work), tuple(kernels), tuple(collectives), tuple(transfers))


def part_name(program: Program, instruction: Instruction) -> str:
    """The op_name that tells best what a fusion is for.

    That of its matrix product; or else of the scope that most of the values inside it are computed in, because the compiler
    names a fusion after its last operation (the sum of a norm, say, that rides on the optimizer's pass); or else its own.
    """
    inner = program.computations.get(instruction.attribute("calls") or "", ())
    votes: dict[str, int] = {}
    names: dict[str, str] = {}
    for one in inner:
        if not one.op_name or one.opcode in MOVES:
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


def _kernel(program: Program, instruction: Instruction, times: int, results: Results) -> Kernel:
    inner = program.computations.get(instruction.attribute("calls") or "", ())
    core = next((i for i in inner if i.opcode == "custom-call" and i.target not in BOOKKEEPING), instruction)
    flops = re.search(r'"flops"\s*:\s*"?(\d+)', core.line)  # a kernel's own cost estimate
    moved = [*instruction.result, *(t for operand in instruction.operands for t in results.get(operand, ()))]
    stated = int(flops[1]) if flops else cost(program, instruction, results).flops or None
    return Kernel(
        core.target or core.opcode,
        core.op_name or instruction.op_name,
        sum(t.bytes for t in moved),
        stated,
        times,
        sum(t.bytes for t in moved if t.space == 0),
        tuple(t.shape for t in core.result),
    )


def _transfers(program: Program, body: Sequence[Instruction], times: int) -> Iterator[Transfer]:
    """Asynchronous copies and slices of one computation; what comes to the chip is for its first reader, what leaves it for
    its maker."""
    by_name = {i.name: i for i in body}
    for place, done in enumerate(body):
        start = by_name.get(done.operands[0]) if done.opcode in ("copy-done", "async-done") and done.operands else None
        if start is None or start.opcode not in ("copy-start", "async-start"):
            continue
        inner = program.computations.get(start.attribute("calls") or "", ())
        source = by_name.get(start.operands[0]) if start.operands else None
        if source is None or any(_collective_kind(i) for i in inner):
            continue
        spaces = [t.space for t in source.result] + [t.space for t in done.result]
        moved = sum(t.bytes for t in done.result) * spaces.count(0)
        leaves = any(t.space == 0 for t in done.result)
        owner = source if leaves else _reader(body, place)
        yield Transfer(part_name(program, owner) if owner is not None else done.opcode, moved, times)


def _reader(body: Sequence[Instruction], place: int) -> Instruction | None:
    """What first computes with the result of the instruction at `place`."""
    names = {body[place].name}
    for instruction in body[place + 1 :]:
        if names.isdisjoint(instruction.operands):
            continue
        if (
            instruction.opcode not in ("bitcast", "get-tuple-element", "tuple")
            and instruction.target != "ConcatBitcast"
        ):
            return instruction
        names.add(instruction.name)
    return None


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

    Links are shared, so a cycle hides one collective only, the one that ends first; and one more between TPU slices, which goes
    over a network of its own.
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
    left_within, left_between = list(cycles), list(cycles)
    for start, end, core, kind in sorted(spans, key=lambda span: (span[1], span[0])):
        if end < start:
            raise HloError(f"the collective {core.name} starts and never ends")
        size = _payload(core, kind)
        groups = None if core.opcode == "send" else replica_groups(core.line)
        takes = link_time(kind, size, groups)
        between = sum(cycles[start + 1 : end])
        hidden, left = 0.0, left_between if core.opcode == "send" else left_within
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
