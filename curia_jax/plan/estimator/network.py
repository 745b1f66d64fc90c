"""Time that collectives take on the links within a TPU slice and on the data-centre network between TPU slices."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from curia_jax.plan import topologies
from curia_jax.plan.estimator.accounting import Groups


class LinkSeconds(NamedTuple):
    """Seconds of a collective within a TPU slice (ICI) and between TPU slices (DCN)."""

    ici: float
    dcn: float


@dataclasses.dataclass(frozen=True)
class Network:
    """Where the partitions of a program are.

    Attributes:
      coordinates: of each partition's chip in its torus. Partitions are numbered in the mesh's order, with the TPU slice
        outermost, so that numbers within the first TPU slice are those of a program.
      mesh: axis sizes by name.
    """

    topology: topologies.Topology
    coordinates: Int[np.ndarray, "partitions dimensions"]
    mesh: Mapping[str, int]

    @classmethod
    def of(cls, mesh: jax.sharding.Mesh, topology: topologies.Topology) -> "Network":
        """The network of a mesh of described TPU devices."""
        coordinates = np.array([device.coords[: topology.chip.dimensions] for device in mesh.devices.flat])
        return cls(topology, coordinates, dict(mesh.shape))

    def axes(self, groups: Groups | None) -> str:
        """Mesh axes along which the members of a group differ: "data+fsdp"."""
        if groups is None:
            return "replica"
        places = np.array(np.unravel_index(np.array(groups[0]), tuple(self.mesh.values())))
        names = [name for name, row in zip(self.mesh, places, strict=True) if len(set(row.tolist())) > 1]
        return "+".join(names) or "none"

    def seconds(self, kind: str, size: int, groups: Groups | None) -> LinkSeconds:
        """Seconds that a collective takes.

        A ring over the torus dimensions that a group spans moves (n - 1) / n of the tensor for all-gather and
        reduce-scatter, twice that for all-reduce, a quarter for all-to-all; closed rings use both directions, and a hop
        costs LINK_LATENCY. Between n TPU slices each chip moves the same shares of its part over the data-centre network.

        Args:
          size: bytes of the whole tensor.
          groups: partitions within a TPU slice that take part together; None between TPU slices.
        """
        chip = self.topology.chip
        if kind == "collective-permute":
            return LinkSeconds(size / chip.link + topologies.LINK_LATENCY, 0.0)
        factor = {"all-reduce": 2.0, "all-to-all": 0.25, "ragged-all-to-all": 0.25}.get(kind, 1.0)
        if groups is None:
            slices = self.topology.slices
            return LinkSeconds(0.0, factor * size * (slices - 1) / slices / (chip.dcn / chip.devices))
        members = np.array(groups[0])
        if len(members) < 2:
            return LinkSeconds(0.0, 0.0)
        bandwidth, hops = self._ring(members)
        moving = factor * size * (len(members) - 1) / len(members) / bandwidth
        return LinkSeconds(moving + hops * topologies.LINK_LATENCY, 0.0)

    def cycles(self, kind: str, size: int, groups: Groups | None) -> float:
        """The same in cycles of the chip's clock; an accounting.LinkTime."""
        return sum(self.seconds(kind, size, groups)) * self.topology.chip.clock

    def _ring(self, members: Int[np.ndarray, " members"]) -> tuple[float, int]:
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
