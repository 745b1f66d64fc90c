"""Whether the slices of a series form a regular volume, decided from positions and orientations alone.

SliceThickness, SpacingBetweenSlices, SliceLocation, instance numbers and file names describe slices; they are not used.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# What is wrong with a series, as the manifest and the card quote it.
NO_POSITION = "slices without position or orientation"
FEW = "fewer than 5 slices"
MIXED_ORIENTATION = "several orientations"
REPEATED_POSITION = "repeated positions"
GAP = "uneven spacing or missing slices"
TILTED = "gantry tilt: slices are sheared"

MINIMUM_SLICES = 5
FARTHEST_MM = 1e6  # 1 km: header values beyond it are no geometry
ORIENTATION_TOLERANCE = 1e-3  # of a direction cosine
REPEATED_MM = 1e-2
SPACING_TOLERANCE = 0.05  # of the median spacing
TILT_DEGREES = 1.0

PLANES = ("sagittal", "coronal", "axial")  # by the largest component of the normal: x, y, z
OBLIQUE_COSINE = 0.7  # a normal further than 45 degrees from every axis is oblique

Orientation = tuple[float, ...] | None
Position = tuple[float, ...] | None
# Patient axis (0 to the left, 1 to the back, 2 up) and sign (1 or -1) of one array axis.
Direction = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class SeriesGeometry:
    """The slices of one orientation.

    Attributes:
      order: indices of the slices among those given, sorted along the normal.
      positions: of each along the normal, mm, in that order.
      plane: "axial", "coronal", "sagittal", "oblique" or "unknown".
      spacing: median distance between neighbours, mm; 0 where it is unknown.
      tilt: angle between the direction of travel and the normal, degrees.
      problems: what makes it irregular; empty for a regular volume.
    """

    order: tuple[int, ...]
    positions: tuple[float, ...]
    plane: str
    spacing: float
    tilt: float
    problems: tuple[str, ...]


def plane_of(orientation: Orientation) -> str:
    """The anatomical plane of a slice from the direction cosines of its rows and columns."""
    if orientation is None:
        return "unknown"
    normal = np.abs(np.cross(orientation[:3], orientation[3:]))
    length = float(np.linalg.norm(normal))
    if length < 0.5:
        return "unknown"
    axis = int(np.argmax(normal))
    return PLANES[axis] if normal[axis] / length > OBLIQUE_COSINE else "oblique"


def check(orientations: Sequence[Orientation], positions: Sequence[Position]) -> list[SeriesGeometry]:
    """Groups slices by orientation and checks each group.

    Args:
      orientations: six direction cosines per slice, or None.
      positions: three coordinates in mm per slice, or None.

    Returns:
      One geometry per orientation, those with most slices first; slices without geometry come last, in the given order.
    """
    groups: list[tuple[np.ndarray, list[int]]] = []
    without: list[int] = []
    for number, (orientation, position) in enumerate(zip(orientations, positions, strict=True)):
        if orientation is None or position is None or plane_of(orientation) == "unknown":
            without.append(number)
            continue
        cosines = np.asarray(orientation)
        for reference, members in groups:
            if np.abs(reference - cosines).max() <= ORIENTATION_TOLERANCE:
                members.append(number)
                break
        else:
            groups.append((cosines, [number]))
    mixed = (MIXED_ORIENTATION,) if len(groups) > 1 else ()
    result = [_check_group(cosines, members, positions, mixed) for cosines, members in groups]
    result.sort(key=lambda g: -len(g.order))
    if without:
        planes = {plane_of(orientations[n]) for n in without}
        plane = planes.pop() if len(planes) == 1 else "unknown"
        result.append(SeriesGeometry(tuple(without), (0.0,) * len(without), plane, 0.0, 0.0, (*mixed, NO_POSITION)))
    return result


def _check_group(
    cosines: np.ndarray, members: list[int], positions: Sequence[Position], problems: tuple[str, ...]
) -> SeriesGeometry:
    normal = np.cross(cosines[:3], cosines[3:])
    normal /= np.linalg.norm(normal)
    points = np.array([positions[n] for n in members], dtype=np.float64)
    along = points @ normal
    rank = np.lexsort((np.asarray(members), along))
    along, points = along[rank], points[rank]
    found = list(problems)
    if len(members) < MINIMUM_SLICES:
        found.append(FEW)
    steps = np.diff(along)
    spacing, tilt = 0.0, 0.0
    if len(steps):
        if steps.min() < REPEATED_MM:
            found.append(REPEATED_POSITION)
        distinct = steps[steps >= REPEATED_MM]
        if len(distinct):
            spacing = float(np.median(distinct))
            if np.abs(distinct - spacing).max() > SPACING_TOLERANCE * spacing:
                found.append(GAP)
            travel = points[-1] - points[0]
            cosine = abs(float(travel @ normal)) / float(np.linalg.norm(travel))
            tilt = float(np.degrees(np.arccos(min(1.0, cosine))))
            if tilt > TILT_DEGREES:
                found.append(TILTED)
    order, places = tuple(members[r] for r in rank), tuple(float(v) for v in along)
    return SeriesGeometry(order, places, plane_of(tuple(cosines)), spacing, tilt, tuple(found))
