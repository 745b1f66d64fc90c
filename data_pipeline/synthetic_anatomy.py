"""The anatomy of the phantom: a canvas that paints organs into a label map, bodies made of them, and how CT and MR see a label map.

Organs are ellipsoids and tubes whose places and sizes vary. CT values are HU with noise; MR values are arbitrary, with a bias field
and Rician noise. Voxels are averages over a finer grid, so borders show partial volume.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from scipy import ndimage

# The tissues of exams, then those that only scenes of single tasks have: a new one is added at the end, so that exams stay the
# same to the byte.
LABELS = {
    name: number
    for number, name in enumerate(
        ("outside", "fat", "muscle", "bone", "lung", "heart", "aorta", "liver", "spleen", "kidney", "bowel",
         "white matter", "grey matter", "ventricle", "lesion",
         "water", "blood", "gland", "vein", "disc", "marrow", "ligament")
    )
}  # fmt: skip
OF_EXAMS = 15
# Mean HU at 120 kVp with contrast in the portal-venous phase, and its texture (standard deviation between voxels).
HU = {
    "outside": (-1000, 2), "fat": (-100, 12), "muscle": (55, 12), "bone": (500, 90), "lung": (-820, 40), "heart": (120, 12),
    "aorta": (150, 10), "liver": (105, 12), "spleen": (120, 12), "kidney": (160, 15), "bowel": (25, 40),
    "white matter": (28, 3), "grey matter": (37, 3), "ventricle": (5, 3), "lesion": (60, 15),
    "water": (8, 6), "blood": (68, 6), "gland": (80, 12), "vein": (130, 10), "disc": (85, 8), "marrow": (220, 40), "ligament": (95, 8),
}  # fmt: skip
# Signal relative to the brightest tissue; T1: fat and white matter bright, water dark. T2: reversed.
MR = {
    "T1": {
        "outside": 0.0, "fat": 1.0, "muscle": 0.45, "bone": 0.1, "lung": 0.03, "heart": 0.35, "aorta": 0.2, "liver": 0.6,
        "spleen": 0.4, "kidney": 0.5, "bowel": 0.35, "white matter": 0.75, "grey matter": 0.55, "ventricle": 0.15, "lesion": 0.4,
        "water": 0.15, "blood": 0.6, "gland": 0.65, "vein": 0.25, "disc": 0.35, "marrow": 0.7, "ligament": 0.12,
    },
    "T2": {
        "outside": 0.0, "fat": 0.75, "muscle": 0.3, "bone": 0.05, "lung": 0.03, "heart": 0.4, "aorta": 0.1, "liver": 0.35,
        "spleen": 0.6, "kidney": 0.65, "bowel": 0.5, "white matter": 0.4, "grey matter": 0.55, "ventricle": 1.0, "lesion": 0.85,
        "water": 1.0, "blood": 0.5, "gland": 0.5, "vein": 0.2, "disc": 0.45, "marrow": 0.55, "ligament": 0.1,
    },
}  # fmt: skip
# HU before and at the peak of a contrast agent, for patients who are varied.
ENHANCEMENT = {"heart": (40, 200), "aorta": (40, 250), "liver": (55, 120), "spleen": (45, 140), "kidney": (30, 190)}
# Of patients who are varied: largest rotation, rad; shift, in half fields of view; reduction in size.
ROTATION, SHIFT, SHRINKAGE = 0.9, 0.15, 0.3
CT_NOISE_HU = 18.0
SUPERSAMPLING = 2  # per direction within the slice


@dataclasses.dataclass(frozen=True)
class Position:
    """How a patient lies in the field of view, and whether mirrored; shifts in half fields of view.

    A negative shrinkage enlarges: -0.5 shows half of the field of view.
    """

    rotation: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    shrinkage: float = 0.0
    mirrored: bool = False

    @classmethod
    def varied(cls, r: np.random.Generator, mirrored: bool) -> "Position":
        x, y = r.uniform(-SHIFT, SHIFT, 2)
        return cls(r.uniform(-ROTATION, ROTATION), (x, y), r.uniform(0, SHRINKAGE), mirrored)

    @classmethod
    def around(
        cls, centre: tuple[int | float, int | float], half_width: int | float = 1.0, rotation: int | float = 0.0
    ) -> "Position":
        """The field of view whose middle is a point of the body, and which reaches `half_width` to each side."""
        cos, sin = np.cos(rotation), np.sin(rotation)
        (x, y), scale = centre, float(half_width)
        return cls(
            float(rotation), (float(-(cos * x - sin * y) / scale), float(-(sin * x + cos * y) / scale)), scale - 1
        )

    def to_body(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates in the field of view to those of a patient who lies straight and centred."""
        if self == Position():
            return x, y
        x, y = (x - self.shift[0]) * (1 + self.shrinkage), (y - self.shift[1]) * (1 + self.shrinkage)
        cos, sin = np.float32(np.cos(self.rotation)), np.float32(np.sin(self.rotation))
        x, y = cos * x + sin * y, cos * y - sin * x
        return (-x if self.mirrored else x), y


def generator(*words: int | str) -> np.random.Generator:
    """A random generator seeded by the words."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little"))


class Canvas:
    """Paints shapes into a label map; coordinates are fractions of the half field of view: x to the left, y to the back,
    z up, all from -1 to 1.

    Args:
      shape: slices, rows, columns.
      wobble: makes the outlines of every patient a little irregular.
      position: how the patient lies in the plane of the slices.
      plane: "axial" (rows run along y, columns along x) or "sagittal" (rows run down, columns along y).
      places: of the slices, along z or x; evenly over the field of view unless given.
    """

    labels: UInt8[np.ndarray, "slices rows columns"]
    inner: tuple[float, float] = (0.0, 0.0)  # half-axes inside the muscle of a torso
    pixel: float  # its side, in coordinates of the body

    def __init__(
        self, shape: tuple[int, int, int], wobble: np.random.Generator, position: Position, *, plane: str = "axial",
        places: Sequence[int | float] | np.ndarray | None = None,
    ) -> None:  # fmt: skip
        axes = [(np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1 for n in shape]
        middles = axes[0] if places is None else np.asarray(places, np.float32)
        across, rows, columns = middles[:, None, None], axes[1][None, :, None], axes[2][None, None, :]
        self.z, self.y, self.x = (across, rows, columns) if plane == "axial" else (-rows, columns, across)
        # A smooth warp makes every outline a little irregular.
        a, b, c, d = wobble.uniform(0, 2 * np.pi, 4)
        self.x = self.x + 0.015 * np.sin(7 * self.y + a) + 0.01 * np.sin(5 * self.z + b)
        self.y = self.y + 0.015 * np.sin(6 * self.z + c) + 0.01 * np.sin(9 * self.y + d)
        if plane == "axial":
            self.x, self.y = position.to_body(self.x, self.y)
        else:
            self.y, down = position.to_body(self.y, -self.z)
            self.z = -down
        self.labels = np.zeros(shape, np.uint8)
        self.pixel = 2 * (1 + position.shrinkage) / shape[2]

    def ellipsoid(self, centre: Sequence[int | float], radii: Sequence[int | float]) -> np.ndarray:
        (x, y, z), (rx, ry, rz) = centre, radii
        height = ((self.z - z) / rz) ** 2
        if height.shape[1:] != (1, 1):
            return ((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2 + height < 1
        # Most shapes are in few of the slices of an axial canvas.
        met = height[:, 0, 0] < 1
        where = np.zeros(self.labels.shape, bool)
        if met.any():
            across, down = (axis[met] if len(axis) > 1 else axis for axis in (self.x, self.y))
            where[met] = ((across - x) / rx) ** 2 + ((down - y) / ry) ** 2 + height[met] < 1
        return where

    def tube(self, centre: Sequence[int | float], radii: Sequence[int | float]) -> np.ndarray:
        """An upright elliptic cylinder through the whole field."""
        (x, y), (rx, ry) = centre, radii
        return np.broadcast_to(((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2 < 1, self.labels.shape)

    def paint(self, name: str, where: np.ndarray, only: Sequence[str] = ()) -> np.ndarray:
        """Sets a label, only over the labels `only` where given; returns where it was set."""
        where = np.broadcast_to(where, self.labels.shape)
        if only:
            allowed = np.zeros(len(LABELS), bool)
            allowed[[LABELS[n] for n in only]] = True
            where = where & allowed[self.labels]
        np.copyto(self.labels, LABELS[name], where=where)
        return where


def torso(canvas: Canvas, r: np.random.Generator) -> tuple[float, float]:
    """Skin, fat, muscle and spine; returns the half-axes inside the muscle, which the canvas keeps too."""
    width, depth = r.uniform(0.78, 0.92), r.uniform(0.5, 0.62)
    fat = r.uniform(0.04, 0.14)
    canvas.paint("fat", canvas.tube((0.0, 0.0), (width, depth)))
    inner = canvas.inner = (width - fat, depth - fat)
    canvas.paint("muscle", canvas.tube((0.0, 0.0), inner))
    canvas.paint("bone", canvas.tube((0.0, inner[1] - 0.16), (0.1, 0.09)))
    canvas.paint("bone", canvas.ellipsoid((0.0, inner[1] - 0.04, 0.0), (0.035, 0.08, 2.0)))
    canvas.paint("fat", canvas.tube((0.0, inner[1] - 0.06), (0.03, 0.025)))  # spinal canal
    return inner


def chest(canvas: Canvas, r: np.random.Generator) -> str:
    width, depth = torso(canvas, r)
    for side in (-1, 1):
        lung = canvas.ellipsoid(
            (side * width * 0.5, -0.02, r.uniform(-0.15, 0.05)), (width * 0.43, depth * 0.8, r.uniform(1.0, 1.25))
        )
        canvas.paint("lung", lung, only=("muscle",))
        # Ribs: slanted rings in the chest wall.
        ring = canvas.tube((0.0, 0.0), (width * 0.99, depth * 0.99)) & ~canvas.tube(
            (0.0, 0.0), (width * 0.93, depth * 0.92)
        )
        slant = np.sin((canvas.z + 0.35 * canvas.y) * 20) > 0.45
        canvas.paint("bone", ring & slant & (canvas.x * side > 0), only=("muscle",))
    canvas.paint("muscle", canvas.tube((0.0, 0.02), (0.13, depth * 0.75)), only=("lung",))  # mediastinum
    heart = (r.uniform(0.08, 0.16), r.uniform(-0.12, -0.04), r.uniform(-0.55, -0.35))
    canvas.paint(
        "heart",
        canvas.ellipsoid(heart, (r.uniform(0.22, 0.28), r.uniform(0.19, 0.24), r.uniform(0.42, 0.52))),
        only=("lung", "muscle"),
    )
    canvas.paint("aorta", canvas.tube((0.09, depth - 0.3), (0.055, 0.055)), only=("lung", "muscle"))
    canvas.paint("liver", canvas.ellipsoid((-0.3, -0.02, -1.25), (0.42, 0.42, 0.5)), only=("lung", "muscle"))
    # Vessels in the lungs.
    for _ in range(26):
        side = r.choice((-1, 1))
        place = (side * r.uniform(0.22, width * 0.8), r.uniform(-0.3, 0.3), r.uniform(-0.9, 0.9))
        radius = r.uniform(0.012, 0.03)
        canvas.paint("heart", canvas.ellipsoid(place, (radius, radius, r.uniform(0.05, 0.2))), only=("lung",))
    return "lung"


def abdomen(canvas: Canvas, r: np.random.Generator) -> str:
    width, depth = torso(canvas, r)
    canvas.paint("fat", canvas.tube((0.0, -0.03), (width * 0.88, depth * 0.8)), only=("muscle",))
    canvas.paint("aorta", canvas.tube((0.05, depth - 0.3), (0.045, 0.045)))
    canvas.paint("muscle", canvas.tube((-0.18, depth - 0.2), (0.09, 0.11)), only=("fat",))
    canvas.paint("muscle", canvas.tube((0.18, depth - 0.2), (0.09, 0.11)), only=("fat",))
    liver = (-width * r.uniform(0.42, 0.48), -0.04, r.uniform(0.4, 0.6))
    canvas.paint(
        "liver",
        canvas.ellipsoid(liver, (width * 0.44, depth * r.uniform(0.68, 0.78), r.uniform(0.65, 0.85))),
        only=("fat",),
    )
    canvas.paint(
        "spleen",
        canvas.ellipsoid((width * 0.66, 0.14, r.uniform(0.5, 0.7)), (0.14, r.uniform(0.18, 0.24), 0.35)),
        only=("fat",),
    )
    for side in (-1, 1):
        kidney = (side * r.uniform(0.36, 0.42), depth - 0.24, r.uniform(-0.15, 0.1))
        canvas.paint("kidney", canvas.ellipsoid(kidney, (0.11, 0.12, r.uniform(0.4, 0.5))), only=("fat", "liver"))
        canvas.paint(
            "fat", canvas.ellipsoid((kidney[0] - side * 0.05, *kidney[1:]), (0.05, 0.05, 0.15)), only=("kidney",)
        )
    for _ in range(14):
        place = (r.uniform(-0.55, 0.6), r.uniform(-0.32, 0.05), r.uniform(-1, 0.3))
        canvas.paint(
            "bowel",
            canvas.ellipsoid(place, (r.uniform(0.08, 0.15), r.uniform(0.07, 0.11), r.uniform(0.1, 0.25))),
            only=("fat",),
        )
    return "liver"


def head(canvas: Canvas, r: np.random.Generator, atrophy: float | None = None) -> str:
    """`atrophy`, from 0 to 1, widens ventricles and the fluid around the brain; at random unless given."""
    width, depth, top = r.uniform(0.68, 0.76), r.uniform(0.82, 0.9), r.uniform(0.95, 1.1)
    canvas.paint("fat", canvas.ellipsoid((0.0, 0.0, -0.1), (width, depth, top)))
    canvas.paint("bone", canvas.ellipsoid((0.0, 0.0, -0.1), (width - 0.045, depth - 0.045, top - 0.05)))
    inside = (width - 0.1, depth - 0.1, top - 0.11)
    canvas.paint("ventricle", canvas.ellipsoid((0.0, 0.0, -0.1), inside))  # cerebrospinal fluid under the skull
    gaps = [r.uniform(0.015, 0.035) for _ in inside]
    brain = tuple(v - (gap if atrophy is None else gap + 0.05 * atrophy) for v, gap in zip(inside, gaps, strict=True))
    canvas.paint("grey matter", canvas.ellipsoid((0.0, 0.0, -0.1), brain))
    angle = np.arctan2(canvas.y, canvas.x)
    fold = 1 + 0.05 * np.sin(11 * angle + 9 * canvas.z + r.uniform(0, 6)) + 0.04 * np.sin(17 * angle - 6 * canvas.z)
    white = tuple(v - 0.09 for v in brain)
    deep = (canvas.x / white[0]) ** 2 + (canvas.y / white[1]) ** 2 + ((canvas.z + 0.1) / white[2]) ** 2
    canvas.paint("white matter", deep < fold - 0.06, only=("grey matter",))
    size = r.uniform(0.75, 1.35)
    if atrophy is not None:
        size = 0.7 + 0.9 * atrophy
    for side in (-1, 1):
        canvas.paint(
            "ventricle",
            canvas.ellipsoid((side * 0.1, -0.1, 0.05), (0.06 * size, 0.28 * size, 0.22)),
            only=("white matter", "grey matter"),
        )
        canvas.paint(
            "grey matter", canvas.ellipsoid((side * 0.2, 0.02, -0.05), (0.08, 0.13, 0.14)), only=("white matter",)
        )
    canvas.paint(
        "ventricle", canvas.ellipsoid((0.0, 0.0, 0.0), (0.012, depth * 0.9, 0.8)), only=("grey matter", "white matter")
    )
    return "white matter"


REGIONS = {"chest": chest, "abdomen": abdomen, "head": head}


# ---- from labels to an image


def tissue_values(contrast: str, enhancement: float | None = None) -> Float32[np.ndarray, " labels"]:
    """HU of every tissue of LABELS, or its MR signal relative to the brightest.

    Args:
      contrast: "CT", "T1" or "T2".
      enhancement: of CT, from 0, before the contrast agent, to 1, at its peak; None is the portal-venous phase of HU.
    """
    if contrast != "CT":
        return np.array([MR[contrast][name] for name in LABELS], np.float32)
    means = np.array([HU[name][0] for name in LABELS], np.float32)
    if enhancement is not None:
        for name, (before, peak) in ENHANCEMENT.items():
            means[LABELS[name]] = before + enhancement * (peak - before)
    return means


def expose(
    labels: UInt8[np.ndarray, "s fine_r fine_c"], contrast: str, means: Float32[np.ndarray, " labels"], r: np.random.Generator,
    noise: int | float = 1.0,
) -> Float32[np.ndarray, "s r c"]:  # fmt: skip
    """The image of a label map: HU, or MR signal from 0 to about 1000.

    Args:
      labels: finer than the image by SUPERSAMPLING in rows and columns.
      contrast: "CT", "T1" or "T2".
      means: see `tissue_values`; patients and scanners differ from it a little.
      noise: factor of its usual standard deviation.
    """
    if contrast == "CT":
        values = average(_ct(labels, means, r))
        values = values + r.normal(0, noise * CT_NOISE_HU, values.shape)
        values = np.maximum(ndimage.gaussian_filter(values, (0, 0.5, 0.5)), -1024)
    else:
        values = average(_mr(labels, means, r))
        # Rician: the magnitude of a complex signal with noise in both parts.
        sigma = noise * r.uniform(10, 22)
        values = np.hypot(values + r.normal(0, sigma, values.shape), r.normal(0, sigma, values.shape))
    return values.astype(np.float32)


def average(
    fine: Float[np.ndarray, "slices fine_rows fine_columns"] | Bool[np.ndarray, "slices fine_rows fine_columns"],
) -> Float[np.ndarray, "slices rows columns"]:
    """Means over SUPERSAMPLING x SUPERSAMPLING pixels."""
    slices, rows, columns = fine.shape
    n = SUPERSAMPLING
    return fine.reshape(slices, rows // n, n, columns // n, n).mean(axis=(2, 4))


def _per_tissue(draws: Float[np.ndarray, " drawn"], means: Float32[np.ndarray, " labels"]) -> np.ndarray:
    """Draws for the tissues of exams, used again for the others: their number does not change what exams look like."""
    return np.resize(draws, len(means) - 1)


def _ct(
    labels: UInt8[np.ndarray, "s r c"], means: Float32[np.ndarray, " labels"], r: np.random.Generator
) -> Float[np.ndarray, "s r c"]:
    means = means.copy()
    means[1:] += _per_tissue(r.normal(0, 4, OF_EXAMS - 1), means)
    texture = np.array([HU[name][1] for name in LABELS], np.float32)
    grain = ndimage.gaussian_filter(r.standard_normal(labels.shape).astype(np.float32), (0, 1.5, 1.5))
    return means[labels] + texture[labels] * grain / grain.std()


def _mr(
    labels: UInt8[np.ndarray, "s r c"], means: Float32[np.ndarray, " labels"], r: np.random.Generator
) -> Float[np.ndarray, "s r c"]:
    means = means.copy()
    means[1:] *= _per_tissue(r.uniform(0.92, 1.08, OF_EXAMS - 1), means)
    slices, rows, columns = labels.shape
    z, y, x = np.meshgrid(
        *(np.linspace(-1, 1, n, dtype=np.float32) for n in (slices, rows, columns)), indexing="ij", sparse=True
    )
    a, b, c = r.uniform(-0.18, 0.18, 3)
    bias = 1 + a * x + b * y + c * z - 0.12 * (x**2 + y**2)
    return 1000.0 * means[labels] * bias
