"""From what the compiler said to what a run does: seconds, images, communication, input, hours and money. Arithmetic only."""

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curia_common.errors import UserError
from curia_jax.plan import topology as topologies
from curia_jax.plan.estimator import accounting
from curia_jax.plan.estimator.cost import Cost

ROOFLINE_EFFICIENCY = 0.8  # share of the chip's peak that an instruction without an estimate is granted

# US dollars per chip and hour, on demand, without tax: cloud.google.com/tpu/pricing, US regions. Prices change and
# commitments and spot capacity are cheaper; replace the table with --prices=FILE. None: no list price known.
PRICES: dict[str, Any] = {
    "date": "2025-08",
    "currency": "USD",
    "per_chip_hour": {"v4": 3.22, "v5e": 1.20, "v5p": 4.20, "v6e": 2.70, "v7x": None},
}


def prices(path: str | None) -> dict[str, Any]:
    """The price table: PRICES, or a JSON file of the same form.

    Raises:
      UserError: the file cannot be read or has another form.
    """
    if path is None:
        return PRICES
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        per_chip_hour = {str(k): None if v is None else float(v) for k, v in table["per_chip_hour"].items()}
        return {"date": str(table["date"]), "currency": str(table["currency"]), "per_chip_hour": per_chip_hour}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read the price table {path} ({type(error).__name__}: {error}); its form is: {json.dumps(PRICES)}"
        ) from error


# ---- communication


@dataclasses.dataclass(frozen=True)
class Wiring:
    """Where the partitions of a program sit.

    Attributes:
      coordinates: of each partition's chip in its torus, (partitions, dimensions). Partitions are numbered in the mesh's
        order, which has the TPU slice outermost, so that the numbers within the first TPU slice are those of a program.
      mesh: axis sizes by name.
    """

    topology: topologies.Topology
    coordinates: np.ndarray
    mesh: Mapping[str, int]

    @classmethod
    def of(cls, mesh: Any, topology: topologies.Topology) -> "Wiring":
        devices = list(mesh.devices.flat)
        coordinates = np.array([d.coords[: topology.chip.dimensions] for d in devices])
        return cls(topology, coordinates, dict(mesh.shape))

    def axes(self, groups: accounting.Groups | None) -> str:
        """Mesh axes along which the members of a group differ: "data+fsdp"."""
        if groups is None:
            return "replica"
        places = np.array(np.unravel_index(np.array(groups[0]), tuple(self.mesh.values())))
        names = [name for name, row in zip(self.mesh, places, strict=True) if len(set(row.tolist())) > 1]
        return "+".join(names) or "none"

    def seconds(self, kind: str, size: int, groups: accounting.Groups | None) -> tuple[float, float]:
        """Seconds on the links within a TPU slice, and between TPU slices.

        A ring over the torus dimensions that a group spans moves (n - 1) / n of the tensor for all-gather and
        reduce-scatter, twice that for all-reduce, a quarter for all-to-all; closed rings carry it both ways, and a hop costs
        LINK_LATENCY. Between n TPU slices each chip moves the same shares of what it holds over the data-centre network.
        """
        chip = self.topology.chip
        if kind == "collective-permute":
            return size / chip.link + topologies.LINK_LATENCY, 0.0
        factor = {"all-reduce": 2.0, "all-to-all": 0.25, "ragged-all-to-all": 0.25}.get(kind, 1.0)
        if groups is None:
            slices = self.topology.slices
            return 0.0, factor * size * (slices - 1) / slices / (chip.dcn / chip.devices)
        members = np.array(groups[0])
        if len(members) < 2:
            return 0.0, 0.0
        bandwidth, hops = self._ring(members)
        return factor * size * (len(members) - 1) / len(members) / bandwidth + hops * topologies.LINK_LATENCY, 0.0

    def _ring(self, members: np.ndarray) -> tuple[float, int]:
        """Bytes/s into each chip, and hops, of a collective over these partitions of one TPU slice."""
        chip, bandwidth, hops = self.topology.chip, 0.0, 0
        for axis, whole in enumerate(self.topology.shape):
            span = len(set(self.coordinates[members, axis].tolist()))
            if span > 1:
                closed = span == whole and whole % chip.wraps == 0
                bandwidth += chip.link * (2 if closed else 1)
                hops += span // 2 if closed else span - 1
        if not bandwidth:  # devices of one chip
            return chip.link * 2 * chip.dimensions, 1
        return bandwidth / chip.devices, hops


# ---- parts of the model

_STAGES = ("augment", "loss", "optimizer", "encoder", "decoder")
_INSIDE = ("patch_embed", "attention", "mlp", "norm", "mask", "pred")


def part(op_name: str) -> str:
    """The part of the model that an op_name belongs to, after the `jax.named_scope`s in it.

    "jit(step)/transpose(jvp(decoder))/while/body/closed_call/attention/dot_general" is "decoder attention".
    """
    if op_name == "convert":  # the compiler's own, of parameters: float32 to the type of the matrix products
        return "weight conversion"
    words = re.findall(r"\w+", "/".join(op_name.split("/")[:-1]))  # the last word is the operation
    stage = next((w for w in words if w in _STAGES), None)
    inside = next((w for w in reversed(words) if w in _INSIDE), None)
    if stage in ("augment", "loss", "optimizer"):
        return stage
    if inside == "patch_embed":
        return "patch_embed"
    if stage and inside:
        return f"{stage} {inside}"
    if stage and "dynamic_" in op_name:
        return f"{stage} stacking"  # what a loop over layers puts by for the backward pass, and takes out again
    return f"{stage} rest" if stage else "other"


@dataclasses.dataclass
class Part:
    """Seconds of one part of the model in a step.

    Attributes:
      seconds: estimated. The others are floors, each as if the chip did nothing else and did that at its peak:
      product_seconds: its matrix products. vector_seconds: what its vector unit computes, at four operations a lane and cycle.
      hbm_seconds: bytes to and from HBM, those of copies beside the computation too.
      bound_seconds: the largest of the three for each of its instructions (without copies beside them), added up.
    """

    seconds: float = 0.0
    product_seconds: float = 0.0
    vector_seconds: float = 0.0
    hbm_seconds: float = 0.0
    bound_seconds: float = 0.0

    def add(self, seconds: float, cost: Cost, trips: int, chip: topologies.Chip) -> None:
        """An instruction that takes `seconds` in all its trips and costs `cost` in each."""
        peaks = chip.flops, chip.vector * chip.clock, chip.hbm_bandwidth
        needs = cost.flops, cost.operations, cost.bytes
        floors = [need / peak * chip.devices * trips for need, peak in zip(needs, peaks, strict=True)]
        self.seconds += seconds
        self.product_seconds += floors[0]
        self.vector_seconds += floors[1]
        self.hbm_seconds += floors[2]
        self.bound_seconds += max(floors)


# ---- the estimate


def estimate(
    account: accounting.Account,
    wiring: Wiring,
    *,
    batch_size: int,
    model_flops: int,
    hardware_flops: int,
    kernel_flops: Mapping[accounting.Shapes, int],
) -> dict[str, Any]:
    """Time of a step and where it goes.

    Args:
      account: of one device's program, collectives timed in cycles of the chip's clock.
      batch_size: global. model_flops, hardware_flops: of a step, over all devices.
      kernel_flops: of one call of a custom kernel on one device, by the shapes of its results, where the program does not
        state them.
    """
    topology, chip = wiring.topology, wiring.topology.chip
    compute = account.cycles / chip.clock
    parts: dict[str, Part] = defaultdict(Part)
    for work in account.work:
        parts[part(work.op_name)].add(work.cycles / chip.clock, work.cost, work.trips, chip)
    charged = 0.0
    for kernel in account.kernels:
        own = kernel_flops.get(kernel.shapes, 0) if kernel.flops is None else kernel.flops
        seconds = max(own / chip.flops, kernel.bytes / chip.hbm_bandwidth) * chip.devices / ROOFLINE_EFFICIENCY
        parts[part(kernel.op_name)].add(seconds * kernel.trips, Cost(own, 0, kernel.hbm_bytes), kernel.trips, chip)
        charged += seconds * kernel.trips
    for copy in account.transfers:
        parts[part(copy.op_name)].hbm_seconds += copy.bytes * copy.trips / chip.hbm_bandwidth * chip.devices
    collectives, exposed = _collectives(account, wiring)
    busy = compute + charged
    step = busy + exposed
    rate = batch_size / step
    return {
        "model_flops_per_step": model_flops,
        "hardware_flops_per_step": hardware_flops,
        "estimated_step_seconds": step,
        "compute_seconds": compute,
        "roofline_seconds": charged,
        "exposed_collective_seconds": exposed,
        "exposed_collective_fraction": exposed / step,
        "unestimated_fraction": charged / step,
        "estimated_mfu": model_flops / step / (chip.flops * topology.chips),
        "estimated_hardware_utilisation": hardware_flops / step / (chip.flops * topology.chips),
        "images_per_second_per_chip": rate / topology.chips,
        "images_per_second": rate,
        "collectives": collectives,
        "parts": [
            {"part": name, "fraction": found.seconds / busy, **dataclasses.asdict(found)}
            for name, found in sorted(parts.items(), key=lambda item: -item[1].seconds)
        ],
    }


def link_time(wiring: Wiring) -> accounting.LinkTime:
    """Cycles that a collective takes, for accounting.account."""

    def cycles(kind: str, size: int, groups: accounting.Groups | None) -> float:
        return sum(wiring.seconds(kind, size, groups)) * wiring.topology.chip.clock

    return cycles


def _collectives(account: accounting.Account, wiring: Wiring) -> tuple[list[dict[str, Any]], float]:
    """Collectives added up by kind, axes and whether they overlap; and the exposed seconds of a step."""
    clock = wiring.topology.chip.clock
    rows: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for one in account.collectives:
        key = (one.kind, wiring.axes(one.groups), one.overlapped)
        names = ("kind", "axis", "overlapped")
        row = rows.setdefault(
            key,
            dict(zip(names, key, strict=True))
            | {"count": 0, "bytes": 0, "ici_seconds": 0.0, "dcn_seconds": 0.0, "exposed_seconds": 0.0},
        )
        ici, dcn = wiring.seconds(one.kind, one.bytes, one.groups)
        row["count"] += one.trips
        row["bytes"] += one.bytes * one.trips
        row["ici_seconds"] += ici * one.trips
        row["dcn_seconds"] += dcn * one.trips
        row["exposed_seconds"] += (one.cycles - one.hidden) / clock * one.trips
    ordered = sorted(rows.values(), key=lambda row: -row["exposed_seconds"])
    return ordered, sum((row["exposed_seconds"] for row in ordered), 0.0)


def input_needs(
    images_per_second: float, topology: topologies.Topology, bytes_per_image: float, loader_per_core: float | None
) -> dict[str, Any]:
    """What the input pipeline must deliver.

    Args:
      bytes_per_image: of a record in storage. loader_per_core: images/s that one core of this machine loads, if measured.
    """
    per_host = images_per_second / topology.hosts
    host_rate = None if loader_per_core is None else loader_per_core * topology.chip.host_cores
    return {
        "hosts": topology.hosts,
        "host_images_per_second_needed": per_host,
        "host_bytes_per_second_needed": per_host * bytes_per_image,
        "storage_bytes_per_second_needed": images_per_second * bytes_per_image,
        "bytes_per_image": bytes_per_image,
        "loader_images_per_second_per_core": loader_per_core,
        "host_cores": topology.chip.host_cores,
        "host_images_per_second_available": host_rate,
        "input_suffices": None if host_rate is None else host_rate >= per_host,
    }


def run_cost(
    total_steps: int, step_seconds: float, topology: topologies.Topology, table: Mapping[str, Any]
) -> dict[str, Any]:
    """Hours, chip-hours and money of a whole run: steps alone, without start-up, checkpoints and interruptions."""
    hours = total_steps * step_seconds / 3600
    price = table["per_chip_hour"].get(topology.kind)
    return {
        "total_steps": total_steps,
        "hours": hours,
        "chip_hours": hours * topology.chips,
        "price_per_chip_hour": price,
        "cost": None if price is None else hours * topology.chips * price,
        "currency": table["currency"],
        "price_date": table["date"],
    }


def pareto(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the rows that no other row beats in both images/s per chip and memory, fastest first."""
    order = sorted(
        range(len(rows)), key=lambda i: (-rows[i]["images_per_second_per_chip"], rows[i]["hbm_bytes_per_chip"])
    )
    kept: list[int] = []
    least = math.inf
    for number in order:
        if rows[number]["hbm_bytes_per_chip"] < least:
            least = rows[number]["hbm_bytes_per_chip"]
            kept.append(number)
    return kept
