"""What the tasks draw with: patients, pictures, fields of view and shapes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from scipy import ndimage

from data_pipeline import synthetic_anatomy as anatomy
from data_pipeline.synthetic_anatomy import LABELS, SUPERSAMPLING, Canvas, Position

# How patients lie: largest rotation, rad, and shift, in half fields of view.
ROTATION, SHIFT = 0.2, 0.06
SomeCanvas = TypeVar("SomeCanvas", bound=Canvas)
Point = tuple[int | float, int | float, int | float]


class Patient(NamedTuple):
    """A patient of a task.

    Attributes:
      r: decides everything but the target.
      split: "train", "val" or "test".
      number: among the patients of the split.
      target: class of a task of classes; 0 in others.
      size: rows and columns of the pictures.
    """

    r: np.random.Generator
    split: str
    number: int
    target: int
    size: int


class Picture(NamedTuple):
    """An image of a patient.

    Attributes:
      image: HU, or MR signal from 0 to about 1000, in whole numbers; the slice axis of a volume is the last.
      mask: 1 in what the question is about, of the same shape; None where the task has none.
      target: None takes that of the patient.
      columns: more of the row, by name.
    """

    image: Float32[np.ndarray, "rows columns *slices"]
    mask: UInt8[np.ndarray, "rows columns *slices"] | None = None
    target: int | float | None = None
    columns: Mapping[str, int | float | str] = {}


def view(
    patient: Patient, kind: type[SomeCanvas] = Canvas, *, at: Sequence[int | float] | np.ndarray = (0.0,),
    centre: tuple[int | float, int | float] = (0, 0),
    half_width: int | float = 1.0, plane: str = "axial",
) -> SomeCanvas:  # fmt: skip
    """An empty canvas; the patient lies a little turned, off centre, and nearer or farther.

    Args:
      at: places of the slices.
      centre: of the field of view, in coordinates of the body.
      half_width: of the field of view.
    """
    r = patient.r
    near = tuple(float(c + half_width * r.uniform(-SHIFT, SHIFT)) for c in centre)
    position = Position.around((near[0], near[1]), half_width * r.uniform(1, 1.15), r.uniform(-ROTATION, ROTATION))
    side = patient.size * SUPERSAMPLING
    return kind((len(at), side, side), r, position, plane=plane, places=at)


def expose(
    canvas: Canvas, contrast: str, r: np.random.Generator, **tissues: int | float
) -> Float32[np.ndarray, "r c *s"]:
    """The image of a canvas; slices last, none where there is one.

    Args:
      tissues: HU, or signal relative to the brightest, of some; spaces are underscores.
    """
    means = anatomy.tissue_values(contrast)
    for name, value in tissues.items():
        means[LABELS[name.replace("_", " ")]] = value
    return _slices_last(np.rint(anatomy.expose(canvas.labels, contrast, means, r)))


def mask(where: Bool[np.ndarray, "slices fine_r fine_c"]) -> UInt8[np.ndarray, "r c *s"]:
    """Pixels at least half of which are inside; the fullest where that leaves none."""
    shares = anatomy.average(where)
    return _slices_last((shares >= min(0.5, max(shares.max(), 1e-6))).astype(np.uint8))


def _slices_last(values: np.ndarray) -> np.ndarray:
    return values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)


# ---- shapes


def blob(
    canvas: Canvas, centre: Point, radius: int | float, r: np.random.Generator, *, lobes: int = 0, depth: int | float = 0.0,
    height: int | float = 1.2,
) -> np.ndarray:  # fmt: skip
    """A ball whose outline has `lobes` bulges of `depth` radii; `height` is its extent along z in radii."""
    dx, dy, dz = (value - c for value, c in zip((canvas.x, canvas.y, canvas.z), centre, strict=True))
    outline = radius * (1 + depth * np.cos(lobes * np.arctan2(dy, dx) + r.uniform(0, 2 * np.pi)))
    return np.sqrt(dx**2 + dy**2 + (dz / height) ** 2) < outline


def point_inside(where: Bool[np.ndarray, "s r c"], canvas: Canvas, r: np.random.Generator) -> Point | None:
    """A random point in the slice with most of `where`, away from its edges; None where it is empty."""
    place = int(np.count_nonzero(where, axis=(1, 2)).argmax())
    if not where[place].any():
        return None
    depth = _distance_to_false(where[place])
    rows, columns = np.nonzero(depth >= 0.6 * depth.max())
    n = int(r.integers(len(rows)))
    x, y, z = (
        np.broadcast_to(axis, where.shape)[place, rows[n], columns[n]] for axis in (canvas.x, canvas.y, canvas.z)
    )
    return float(x), float(y), float(z)


def distance_to(where: Bool[np.ndarray, "s r c"], canvas: Canvas) -> np.ndarray:
    """Distance of every pixel, in its slice, to the nearest in `where`; in coordinates of the body."""
    parts = [_distance_to_false(~part) if part.any() else np.full(part.shape, np.inf) for part in where]
    return canvas.pixel * np.stack(parts)


def _distance_to_false(where: Bool[np.ndarray, "r c"]) -> Float[np.ndarray, "r c"]:
    """In pixels."""
    distances = np.empty(where.shape)
    ndimage.distance_transform_edt(where, distances=distances)
    return distances


def along(
    first: tuple[int | float, int | float], last: tuple[int | float, int | float], u: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of every point (u, v): how far it is along a segment, 0 to 1, and its distance to the segment's line."""
    (u0, v0), (u1, v1) = first, last
    length = float(np.hypot(u1 - u0, v1 - v0))
    du, dv = (u1 - u0) / length, (v1 - v0) / length
    return ((u - u0) * du + (v - v0) * dv) / length, np.abs((v - v0) * du - (u - u0) * dv)
