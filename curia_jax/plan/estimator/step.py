"""Step time, MFU and throughput from the text of a compiled program."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Float

from curia_common.errors import fault_location
from curia_jax.plan.estimator import accounting, hlo
from curia_jax.plan.estimator.cost import Cost
from curia_jax.plan.estimator.network import Network
from curia_jax.plan.topologies import Chip, Topology

ROOFLINE_EFFICIENCY = 0.8  # assumed share of the chip's peak for instructions without an estimate of the compiler
LARGEST = 6  # tensors that are reported
# The text is not understood if it has less than this share of the traced program's matmul FLOPs.
LEAST_FLOPS = 0.5


@dataclasses.dataclass(frozen=True)
class PartTime:
    """Seconds per step of one part of the model.

    Attributes:
      fraction: of computation and roofline charge of the step.
      seconds: the estimate. The rest are lower bounds, each as if the chip did only that, at its peak rate:
      product_seconds: matmuls.
      vector_seconds: vector operations.
      hbm_seconds: bytes to and from HBM, with those of asynchronous copies.
      bound_seconds: sum over instructions of the largest of the three, without asynchronous copies.
    """

    part: str
    fraction: float
    seconds: float
    product_seconds: float
    vector_seconds: float
    hbm_seconds: float
    bound_seconds: float


@dataclasses.dataclass(frozen=True)
class CollectiveTime:
    """Collectives of one kind over the same mesh axes: per step and device.

    Attributes:
      axis: mesh axes ("data+fsdp").
      overlapped: computation is scheduled between start and end.
      bytes: of the whole tensors.
      exposed_seconds: not hidden behind computation.
    """

    kind: str
    axis: str
    overlapped: bool
    count: int
    bytes: int
    ici_seconds: float
    dcn_seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True)
class LargeTensor:
    """One of the largest arrays on a device; `bytes` of an argument are without padding, of a temporary with it."""

    tensor: str
    shape: str
    bytes: int
    kind: str  # argument or temporary


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """A step's time, by the compiler's cycles and the published speeds of links and memory.

    Attributes:
      estimated_step_seconds: sum of the next three.
      compute_seconds: the compiler's cycles.
      roofline_seconds: charged for instructions without cycles.
      exposed_collective_seconds: communication that is not hidden.
      exposed_collective_fraction: of the step.
      unestimated_fraction: roofline_seconds as a fraction of the step.
      estimated_mfu: model FLOPs over step time and the chips' peak.
      estimated_hardware_utilisation: the same with recomputed and auxiliary FLOPs.
      images_per_second: of all chips.
      largest_temporaries: in HBM.
    """

    estimated_step_seconds: float
    compute_seconds: float
    roofline_seconds: float
    exposed_collective_seconds: float
    exposed_collective_fraction: float
    unestimated_fraction: float
    estimated_mfu: float
    estimated_hardware_utilisation: float
    images_per_second_per_chip: float
    images_per_second: float
    collectives: tuple[CollectiveTime, ...]
    parts: tuple[PartTime, ...]
    largest_temporaries: tuple[LargeTensor, ...] = ()


def estimate(
    compiled_text: str, topology: Topology, mesh: jax.sharding.Mesh, *,
    batch_size: int, model_flops: int, hardware_flops: int, pallas_flops: Mapping[accounting.Shapes, int],
) -> StepEstimate:  # fmt: skip
    """Estimates one step of a compiled program.

    Args:
      compiled_text: of the scheduled program of one device.
      mesh: of the topology's devices.
      batch_size: examples per step, over all devices.
      model_flops: per step, over all devices.
      hardware_flops: matmul FLOPs of the traced step, over all devices.
      pallas_flops: of one call on one device, by the shapes of its results; for kernels whose text does not state them.

    Raises:
      hlo.HloError: the text has a form that is not known.
    """
    try:
        program = hlo.parse(compiled_text)
        network = Network.of(mesh, topology)
        account = accounting.account(program, network.cycles)
        if not account.cycles:
            raise hlo.HloError("the program states no estimated_cycles")
        largest = tuple(
            LargeTensor(name, f"{tensor.dtype}{list(tensor.shape)}", tensor.bytes, "temporary")
            for tensor, name in accounting.largest_tensors(program, LARGEST)
        )
        found = summarize(
            account, network, batch_size=batch_size, model_flops=model_flops, hardware_flops=hardware_flops,
            pallas_flops=pallas_flops,
        )  # fmt: skip
    except hlo.HloError:
        raise
    except Exception as error:  # noqa: BLE001 - text in an unknown form can fail anywhere in the reader
        raise hlo.HloError(f"cannot read the compiled program ({fault_location(error)})") from error
    read = sum(part.product_seconds for part in found.parts) * topology.chip.flops * topology.chips
    if read < LEAST_FLOPS * hardware_flops:
        raise hlo.HloError(
            f"the compiled program has {read:.3g} matmul FLOPs by its text, but the traced step has {hardware_flops:.3g}"
        )
    return dataclasses.replace(found, largest_temporaries=largest)


def summarize(
    account: accounting.Account, network: Network, *,
    batch_size: int, model_flops: int, hardware_flops: int, pallas_flops: Mapping[accounting.Shapes, int],
) -> StepEstimate:  # fmt: skip
    """The estimate from a program's account; arguments as for `estimate`."""
    topology, chip = network.topology, network.topology.chip
    compute = account.cycles / chip.clock
    parts: defaultdict[str, Float[np.ndarray, "5"]] = defaultdict(lambda: np.zeros(5))
    for op in account.costed:
        parts[part_of(op.op_name)] += _times(op.cycles / chip.clock, op.cost, op.trips, chip)
    charged = 0.0
    for op in account.uncosted:
        flops = pallas_flops.get(op.shapes, 0) if op.flops is None else op.flops
        seconds = max(flops / chip.flops, op.bytes / chip.hbm_bandwidth) * chip.devices / ROOFLINE_EFFICIENCY
        parts[part_of(op.op_name)] += _times(seconds * op.trips, Cost(flops, 0, op.hbm_bytes), op.trips, chip)
        charged += seconds * op.trips
    for copy in account.copies:
        parts[part_of(copy.op_name)][3] += copy.bytes * copy.trips / chip.hbm_bandwidth * chip.devices
    collectives = _collective_times(account, network)
    exposed = sum((row.exposed_seconds for row in collectives), 0.0)
    busy = compute + charged
    step = busy + exposed
    return StepEstimate(
        estimated_step_seconds=step,
        compute_seconds=compute,
        roofline_seconds=charged,
        exposed_collective_seconds=exposed,
        exposed_collective_fraction=exposed / step,
        unestimated_fraction=charged / step,
        estimated_mfu=model_flops / step / (chip.flops * topology.chips),
        estimated_hardware_utilisation=hardware_flops / step / (chip.flops * topology.chips),
        images_per_second_per_chip=batch_size / step / topology.chips,
        images_per_second=batch_size / step,
        collectives=collectives,
        parts=tuple(
            PartTime(name, float(row[0] / busy), *row.tolist())
            for name, row in sorted(parts.items(), key=lambda item: -item[1][0])
        ),
    )


def _times(seconds: float, cost: Cost, trips: int, chip: Chip) -> Float[np.ndarray, "5"]:
    """`seconds` and the lower bounds of a PartTime, for an instruction that takes `seconds` in all its trips."""
    matmul = cost.flops / chip.flops * chip.devices * trips
    vector = cost.operations / (chip.vector * chip.clock) * chip.devices * trips
    hbm = cost.bytes / chip.hbm_bandwidth * chip.devices * trips
    return np.array([seconds, matmul, vector, hbm, max(matmul, vector, hbm)])


def _collective_times(account: accounting.Account, network: Network) -> tuple[CollectiveTime, ...]:
    """Collectives added up by kind, mesh axes and whether they overlap; the most exposed first."""
    clock = network.topology.chip.clock
    rows: dict[tuple[str, str, bool], CollectiveTime] = {}
    for one in account.collectives:
        key = (one.kind, network.axes(one.groups), one.overlapped)
        row = rows.get(key, CollectiveTime(*key, 0, 0, 0.0, 0.0, 0.0))
        ici, dcn = network.seconds(one.kind, one.bytes, one.groups)
        rows[key] = CollectiveTime(
            *key,
            count=row.count + one.trips,
            bytes=row.bytes + one.bytes * one.trips,
            ici_seconds=row.ici_seconds + ici * one.trips,
            dcn_seconds=row.dcn_seconds + dcn * one.trips,
            exposed_seconds=row.exposed_seconds + (one.cycles - one.hidden) / clock * one.trips,
        )
    return tuple(sorted(rows.values(), key=lambda row: -row.exposed_seconds))


# ---- parts of the model

_STAGES = ("augment", "loss", "optimizer", "encoder", "decoder", "head")
_INSIDE = ("patch_embed", "attention", "mlp", "norm", "mask", "pred")


def part_of(op_name: str) -> str:
    """The part of the model that an op_name belongs to, by the `jax.named_scope`s in it.

    "jit(step)/transpose(jvp(decoder))/while/body/closed_call/attention/dot_general" is "decoder attention".
    """
    if op_name == "convert":  # the compiler's own, of parameters: float32 to the dtype of the matmuls
        return "weight conversion"
    words = re.findall(r"\w+", "/".join(op_name.split("/")[:-1]))  # the last word is the operation
    stage = next((w for w in words if w in _STAGES), None)
    inside = next((w for w in reversed(words) if w in _INSIDE), None)
    if stage in ("augment", "loss", "optimizer", "head"):
        return stage
    if inside == "patch_embed":
        return "patch_embed"
    if stage and inside:
        return f"{stage} {inside}"
    if stage and "dynamic_" in op_name:
        return f"{stage} stacking"  # what a loop over layers stores for the backward pass, and loads again
    return f"{stage} rest" if stage else "other"
