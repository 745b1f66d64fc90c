"""TPU chips and their networks: the figures behind every estimate, each with its source."""

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from curia_common import topologies
from curia_common.errors import UserError
from curia_common.topologies import GENERATIONS

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip.

    Attributes:
      generation: its torus and devices.
      library_name: its name in libtpu.
      flops: dense bf16 FLOP/s per chip.
      hbm: bytes per chip that a program may use.
      hbm_bandwidth: bytes/s per chip.
      vector: vector operations per cycle and chip (8 x 128 lanes with four units each).
      clock: Hz; converts the compiler's cycles to seconds.
      link: bytes/s of one ICI link in one direction; each torus dimension has a link either way.
      dcn: bytes/s per chip between TPU slices, over the data-centre network.
      wraps: a torus dimension whose size is a multiple of this is a closed ring.
      host_cores: vCPUs of a host.
    """

    generation: topologies.Generation
    library_name: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    vector: int
    clock: float
    link: float
    dcn: float
    wraps: int
    host_cores: int

    @property
    def dimensions(self) -> int:
        """Of the torus that its links form."""
        return self.generation.dimensions

    @property
    def devices(self) -> int:
        """jax devices per chip."""
        return self.generation.devices


# FLOP/s, HBM and its bandwidth, vCPUs: cloud.google.com/tpu/docs (system architecture, one page a chip, and machine
# types). `hbm` is the limit that libtpu 0.0.52 enforces, a little below the data sheet. Links, data-centre network and vector
# units: "How to scale your model" (jax-ml.github.io/scaling-book, TPU chapter); v7x links from its 1.2 TB/s over 6 links.
# Clocks: chosen so that the compiler's cycles for a 4096^3 bf16 matmul give just less than the data sheet's FLOP/s
# (benchmarks/peaks.py: v4, v5e, v5p, v6e); v7x: its FLOP/s over those of its four 256 x 256 matrix units per device.
CHIPS = {
    "v4": Chip(GENERATIONS["v4"], "v4", 275e12, 31.75 * GIB, 1228 * GB, 8192, 1.05e9, 45 * GB, 6.25 * GB, 4, 240),
    "v5e": Chip(GENERATIONS["v5e"], "v5e", 197e12, 15.75 * GIB, 819 * GB, 4096, 1.5e9, 45 * GB, 3.125 * GB, 16, 112),
    "v5p": Chip(GENERATIONS["v5p"], "v5p", 459e12, 95.74 * GIB, 2765 * GB, 8192, 1.75e9, 90 * GB, 6.25 * GB, 4, 208),
    "v6e": Chip(GENERATIONS["v6e"], "v6e", 918e12, 31.25 * GIB, 1640 * GB, 4096, 1.75e9, 90 * GB, 12.5 * GB, 16, 180),
    "v7x": Chip(GENERATIONS["v7x"], "tpu7x", 2307e12, 189.5 * GIB, 7380 * GB, 8192, 2.2e9, 100 * GB, 12.5 * GB, 4, 224),
}
LINK_LATENCY = 1e-6  # seconds from a chip to its neighbour; scaling-book, "Sharded matrices"


class Topology(topologies.Topology):
    """TPU slices, with the figures of their chip."""

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]


def parse(text: str, slices: int = 1) -> Topology:
    """Reads "v5e:16x16" or "v5e-256".

    Raises:
      UserError: as curia_common.topologies.parse, and for machines without TPUs.
    """
    found = topologies.parse(text, slices)
    if found.generation is None:
        raise UserError(
            f"there is no plan for {found}: its devices are not TPUs; plan a TPU topology, such as v5e:16x16"
        )
    return Topology(found.kind, found.shape, found.slices)


def prepare_environment() -> None:
    """Lets libtpu compile on a machine without a TPU, also in several processes. Call it before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


def compiler_version() -> str:
    """Name and version of the TPU compiler: "libtpu 0.0.42.1".

    Raises:
      UserError: it is not installed.
    """
    import importlib.metadata

    try:
        return "libtpu " + importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "the TPU compiler is not installed; install it with: pip install 'curia-jax[plan]' (or pip install libtpu)"
        ) from None


def devices(topology: Topology) -> Sequence[Any]:
    """All devices of a topology, each a jax.Device that describes one without being there.

    Raises:
      UserError: no libtpu, or it knows no such topology.
    """
    compiler_version()
    from jax.experimental.topologies import get_topology_desc

    options: dict[str, str | int | tuple[int, ...]] = {}
    if topology.kind == "v4":  # otherwise libtpu describes a chip's two cores as two devices
        options = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.chip.library_name}:{'x'.join(map(str, topology.shape))}"
    try:
        with _quiet():
            found = get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # libtpu has no exception of its own
        raise UserError(
            f"libtpu knows no topology {topology}: {str(error).splitlines()[0]}; try {topology.kind}:"
            f"{'x'.join(['2', '2', '1'][: topology.chip.dimensions])}"
        ) from error
    if len(found) != topology.devices:
        raise UserError(
            f"libtpu describes {topology} with {len(found)} devices instead of {topology.devices}; this libtpu version is not supported"
        )
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discards what libtpu writes to standard error about missing hardware; real errors are raised as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 2)
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
