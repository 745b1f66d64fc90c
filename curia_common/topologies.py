"""TPU slices and other groups of machines: their names, shapes, hosts and devices, as launcher and planner share them."""

import dataclasses
import functools
import itertools
import math
import re
from typing import Literal

from curia_common.errors import UserError

CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of TPU chip, as the cloud offers it.

    Attributes:
      dimensions: of the torus that the chips of a TPU slice form.
      devices: jax devices per chip.
      largest: chips of the largest TPU slice.
      api_type: its name in the types of the Cloud TPU API, `<api_type>-<N>`.
      counts: what N counts there.
      label: value of the GKE node label cloud.google.com/gke-tpu-accelerator.
      machine_type: of a host with CHIPS_PER_HOST chips.
      runtime: software version of a TPU VM in a queued resource; None where the Cloud TPU API does not serve the chip.
    """

    dimensions: int
    devices: int
    largest: int
    api_type: str
    counts: Literal["chips", "cores"]
    label: str
    machine_type: str
    runtime: str | None


# cloud.google.com/tpu/docs (one page a chip), cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, and the tables of xpk
# (github.com/AI-Hypercomputer/xpk, system_characteristics.py).
GENERATIONS = {
    "v4": Generation(3, 1, 4096, "v4", "cores", "tpu-v4-podslice", "ct4p-hightpu-4t", "tpu-ubuntu2204-base"),
    "v5e": Generation(2, 1, 256, "v5litepod", "chips", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", "v2-alpha-tpuv5-lite"),
    "v5p": Generation(3, 1, 6144, "v5p", "cores", "tpu-v5p-slice", "ct5p-hightpu-4t", "v2-alpha-tpuv5"),
    "v6e": Generation(2, 1, 256, "v6e", "chips", "tpu-v6e-slice", "ct6e-standard-4t", "v2-alpha-tpuv6e"),
    "v7x": Generation(3, 2, 9216, "tpu7x", "cores", "tpu7x", "tpu7x-standard-4t", None),
}  # fmt: skip
MACHINES = ("cpu", "gpu")  # shape: machines x devices of each
_OTHER_NAMES = {"tpu7x": "v7x", "v5litepod": "v5e"}
_CORES_PER_CHIP = 2  # where the API counts cores
_FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBIC = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # larger ones are of cubes of 4 x 4 x 4 chips


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` TPU slices, each a torus of `shape` chips; or `shape[0]` machines with `shape[1]` CPU or GPU devices each."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def generation(self) -> Generation | None:
        """None for machines without TPUs."""
        return GENERATIONS.get(self.kind)

    @property
    def platform(self) -> str:
        """JAX's name of the backend: tpu, gpu or cpu."""
        return "tpu" if self.generation else self.kind

    @property
    def chips(self) -> int:
        """All of them; GPUs and simulated CPU devices count as chips."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """jax devices of all hosts."""
        return self.chips * (self.generation.devices if self.generation else 1)

    @property
    def hosts(self) -> int:
        return self.hosts_per_slice * self.slices

    @property
    def hosts_per_slice(self) -> int:
        return max(1, math.prod(self.shape) // CHIPS_PER_HOST) if self.generation else self.shape[0]

    @property
    def shape_text(self) -> str:
        """16x16."""
        return "x".join(map(str, self.shape))

    @property
    def api_type(self) -> str:
        """Type of one TPU slice in the Cloud TPU API: "v5litepod-256".

        Raises:
          UserError: these are no TPUs.
        """
        if self.generation is None:
            raise UserError(f"{self} has no TPUs; choose a TPU topology, such as v5e:16x16")
        cores = _CORES_PER_CHIP if self.generation.counts == "cores" else 1
        return f"{self.generation.api_type}-{math.prod(self.shape) * cores}"

    def __str__(self) -> str:
        return f"{f'{self.slices} x ' if self.slices > 1 else ''}{self.kind}:{self.shape_text}"


def parse(text: str, slices: int = 1) -> Topology:
    """Reads "v5e:16x16", the cloud's type of the same, "v5e-256" or "v5litepod-256", or machines, "gpu:4x8".

    A type has chips in its name for v5e and v6e, and cores, two per chip, for v4, v5p and v7x.

    Raises:
      UserError: an unknown chip, or a shape with another number of dimensions than the chip's torus.
    """
    match = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)+)|-(\d+))", text)
    if match is None:
        raise UserError(
            f"cannot read the topology {text!r}; write a chip and a shape or a type, such as v5e:16x16, v5e-256 or v5p:4x4x8"
        )
    kind = _OTHER_NAMES.get(match[1], match[1])
    if slices < 1:
        raise UserError(f"--slices is {slices}; it has to be at least 1")
    if kind in MACHINES:
        shape = tuple(map(int, (match[2] or "").split("x"))) if match[2] else ()
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"cannot read the topology {text!r}; write machines x devices of each, such as {kind}:4x8")
        if slices > 1:
            raise UserError(f"--slices is {slices}, but {text} has no TPU slices; leave --slices out")
        return Topology(kind, shape)
    if kind not in GENERATIONS:
        raise UserError(f"no TPU chip {match[1]!r}; there are: {', '.join(GENERATIONS)}")
    generation = GENERATIONS[kind]
    if match[3] is not None:
        return Topology(kind, _shape_of(kind, int(match[3]), text), slices)
    shape = tuple(map(int, match[2].split("x")))
    if len(shape) != generation.dimensions or 0 in shape:
        example = {2: "16x16", 3: "4x4x8"}[generation.dimensions]
        raise UserError(
            f"{text} has {len(shape)} dimensions; {kind} is a {generation.dimensions}-D torus, such as {kind}:{example}"
        )
    return Topology(kind, shape, slices)


@functools.cache
def offered(kind: str) -> tuple[tuple[int, ...], ...]:
    """Shapes of TPU slices that the cloud offers of a chip, smallest first."""
    generation = GENERATIONS[kind]
    if generation.dimensions == 2:
        return _FLAT
    sides = range(4, generation.largest // 16 + 1, 4)
    large = (
        (a, b, c)
        for a, b in itertools.combinations_with_replacement(sides, 2)
        if a * b * b <= generation.largest
        for c in range(b, generation.largest // (a * b) + 1, 4)
    )
    return (*_CUBIC, *sorted(large, key=lambda shape: (math.prod(shape), sum(shape))))


def check_offered(topology: Topology) -> None:
    """Raises UserError where the cloud offers no TPU slice of that shape; the message has the nearest ones."""
    if topology.generation is None or topology.shape in (shapes := offered(topology.kind)):
        return
    wanted = math.prod(topology.shape)
    near = sorted(shapes, key=lambda shape: (abs(math.log(math.prod(shape) / wanted)), sum(shape)))[:3]
    names = ", ".join(str(Topology(topology.kind, shape)) for shape in near)
    raise UserError(f"there is no TPU slice {topology.kind}:{topology.shape_text}; the nearest are {names}")


def _shape_of(kind: str, number: int, text: str) -> tuple[int, ...]:
    """The most compact shape of a type."""
    types: dict[str, tuple[int, ...]] = {}
    for shape in offered(kind):
        types.setdefault(Topology(kind, shape).api_type.rpartition("-")[2], shape)
    if str(number) not in types:
        near = sorted(types, key=lambda other: abs(math.log(int(other) / number)) if number else int(other))[:3]
        names = ", ".join(f"{kind}-{other} ({Topology(kind, types[other])})" for other in near)
        raise UserError(f"there is no TPU slice {text}; the nearest are {names}")
    return types[str(number)]
