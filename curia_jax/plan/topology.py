"""TPU chips and how they are wired: the figures every estimate is made of, each with its source."""

import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from curia_common.errors import UserError

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip.

    Attributes:
      library_name: what libtpu calls it.
      dimensions: of the torus that its links form.
      devices: jax devices a chip has.
      flops: dense bf16 FLOP/s per chip. hbm: bytes per chip that a program may use. hbm_bandwidth: bytes/s per chip.
      vector: operations a cycle of the chip's vector units: 8 x 128 lanes of four each.
      clock: Hz that turns the compiler's cycles into seconds.
      link: bytes/s of one ICI link in one direction; each torus dimension has a link either way.
      dcn: bytes/s per chip from one TPU slice to another, over the data-centre network.
      wraps: a torus dimension of a multiple of this many chips is closed to a ring.
      host_cores: vCPUs of the host machine, which has 4 chips.
    """

    library_name: str
    dimensions: int
    devices: int
    flops: float
    hbm: float
    hbm_bandwidth: float
    vector: int
    clock: float
    link: float
    dcn: float
    wraps: int
    host_cores: int


# FLOP/s, HBM and its bandwidth, vCPUs: cloud.google.com/tpu/docs (system architecture, one page a chip, and machine
# types). `hbm` is the limit that libtpu 0.0.52 enforces, a little below the data sheet. Links, data-centre network and vector
# units: "How to scale your model" (jax-ml.github.io/scaling-book, TPU chapter); v7x links from its 1.2 TB/s over 6 links.
# Clocks: those at which the compiler's cycles for a 4096^3 bf16 product come out just below the data sheet; v4, v5e, v5p
# and v6e were checked this way, v7x's is its FLOP/s over those of its four 256 x 256 matrix units a device.
CHIPS = {
    "v4": Chip("v4", 3, 1, 275e12, 31.75 * GIB, 1228 * GB, 8192, 1.05e9, 45 * GB, 6.25 * GB, 4, 240),
    "v5e": Chip("v5e", 2, 1, 197e12, 15.75 * GIB, 819 * GB, 4096, 1.5e9, 45 * GB, 3.125 * GB, 16, 112),
    "v5p": Chip("v5p", 3, 1, 459e12, 95.74 * GIB, 2765 * GB, 8192, 1.75e9, 90 * GB, 6.25 * GB, 4, 208),
    "v6e": Chip("v6e", 2, 1, 918e12, 31.25 * GIB, 1640 * GB, 4096, 1.75e9, 90 * GB, 12.5 * GB, 16, 180),
    "v7x": Chip("tpu7x", 3, 2, 2307e12, 189.5 * GIB, 7380 * GB, 8192, 2.2e9, 100 * GB, 12.5 * GB, 4, 224),
}
LINK_LATENCY = 1e-6  # seconds from a chip to its neighbour; scaling-book, "Sharded matrices"
CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` TPU slices, each a torus of `shape` chips."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        return max(1, math.prod(self.shape) // CHIPS_PER_HOST) * self.slices

    def __str__(self) -> str:
        return f"{f'{self.slices} x ' if self.slices > 1 else ''}{self.kind}:{'x'.join(map(str, self.shape))}"


def parse(text: str, slices: int = 1) -> Topology:
    """Reads "v5e:16x16".

    Raises:
      UserError: an unknown chip, or a shape with another number of dimensions than the chip's torus.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text)
    if match is None:
        raise UserError(f"cannot read the topology {text!r}; write a chip and a shape, such as v5e:16x16 or v5p:4x4x8")
    kind = {"tpu7x": "v7x", "v5litepod": "v5e"}.get(match[1], match[1])
    if kind not in CHIPS:
        raise UserError(f"no TPU chip {match[1]!r}; there are: {', '.join(CHIPS)}")
    shape = tuple(map(int, match[2].split("x")))
    if len(shape) != CHIPS[kind].dimensions or 0 in shape:
        example = {2: "16x16", 3: "4x4x8"}[CHIPS[kind].dimensions]
        raise UserError(
            f"{text} has {len(shape)} dimensions; {kind} is a {CHIPS[kind].dimensions}-D torus, such as {kind}:{example}"
        )
    if slices < 1:
        raise UserError(f"--slices={slices}; there has to be at least 1 TPU slice")
    return Topology(kind, shape, slices)


def prepare_environment() -> None:
    """Settings that have to stand before jax is imported: compile on a machine without a TPU, beside other compilers."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


def compiler_version() -> str:
    """Version of the TPU compiler.

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
    """Descriptions of all devices, from libtpu.

    Raises:
      UserError: no libtpu, or it knows no such topology.
    """
    compiler_version()
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.kind == "v4":  # otherwise its two cores are two devices, as no v4 program sees them
        options = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.chip.library_name}:{'x'.join(map(str, topology.shape))}"
    try:
        with _quiet():
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # libtpu has no exception of its own
        raise UserError(
            f"libtpu knows no topology {topology}: {str(error).splitlines()[0]}; try {topology.kind}:"
            f"{'x'.join(['2', '2', '1'][: topology.chip.dimensions])}"
        ) from error
    if len(found) != topology.devices:
        raise UserError(
            f"libtpu says that {topology} has {len(found)} devices; this project expected {topology.devices}"
        )
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Takes libtpu's complaints about the missing hardware off standard error; what matters is raised."""
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
