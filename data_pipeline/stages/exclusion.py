"""Which images are excluded, and why. Rules are data: a name, which the manifest quotes, and a predicate."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Integer, UInt16
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
)

from data_pipeline.sources import geometry, wording
from data_pipeline.sources.dicom_header import Header
from data_pipeline.stages import pages

# DICOM PS3.4 B.5: CT and MR, and their enhanced and legacy-converted multi-frame forms.
MULTIFRAME_CLASSES = frozenset({
    EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage, EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage,
})  # fmt: skip
IMAGE_CLASSES = MULTIFRAME_CLASSES | {CTImageStorage, MRImageStorage}
LOCALIZER, PROJECTION, PAGE = "localizer or screen", "projection or reformat", "a page of text"
LOCALIZER_AMONG_AXIAL = (
    f"localizer: one of fewer than {geometry.MINIMUM_SLICES} coronal or sagittal slices in an axial CT series"
)


def _types(header: Header, names: Callable[[Iterable[str]], bool]) -> bool:
    """Whether the image type says so, or the type of every frame."""
    return names(header.image_type) or (bool(header.frame_types) and all(map(names, header.frame_types)))


# The first rule that applies gives the reason.
HEADER_RULES: tuple[tuple[str, Callable[[Header], bool]], ...] = (
    ("not a CT or MR image object", lambda h: h.sop_class not in IMAGE_CLASSES),
    ("no pixel data", lambda h: not h.has_pixels),
    ("colour image", lambda h: h.samples_per_pixel != 1 or h.photometric not in ("MONOCHROME1", "MONOCHROME2")),
    ("burned-in annotation", lambda h: h.burned_in),
    (LOCALIZER, lambda h: h.called_localizer or _types(h, wording.is_localizer_type)),
    (PROJECTION, lambda h: _types(h, wording.is_projection_type)),
    # Enhanced objects of newer Siemens scanners keep the word and have frames.
    (
        "a mosaic of slices whose places are unknown",
        lambda h: h.sop_class not in MULTIFRAME_CLASSES and not h.tiles and wording.is_mosaic_type(h.image_type),
    ),
    (
        "several frames in a single-frame object",
        lambda h: h.frames > 1 and not h.tiles and h.sop_class not in MULTIFRAME_CLASSES,
    ),
    ("neither CT nor MR", lambda h: h.modality not in ("CT", "MR")),
    ("stored values are indices of a Modality LUT, which is not applied", lambda h: h.modality_lut),
    # CT is reconstructed across the table. Other planes are localizer radiographs or reformats of other series.
    (
        "a CT that is not axial and does not say what it is",
        lambda h: h.modality == "CT" and len(h.image_type) < 3 and _plane(h) in ("coronal", "sagittal"),
    ),
)


def _plane(header: Header) -> str:
    return geometry.plane_of(header.geometry[0].orientation) if header.geometry else "unknown"


ALL_AIR = "all air"
MINIMUM_SIDE = 32  # px
AIR_HU = -900.0
AIR_SHARE = 0.98
MOST_LOCALIZER_SLICES = 15  # of one orientation
ORTHOGONAL_COSINE = 0.26  # planes within 15 degrees of a right angle


def exclude_header(header: Header) -> str | None:
    """Name of the first header rule that excludes the file, or None."""
    return next((name for name, predicate in HEADER_RULES if predicate(header)), None)


def exclude_layout(
    modality: str, orientations: Sequence[tuple[geometry.Orientation, int]], *, maybe_localizer: bool
) -> str | None:
    """Name of the rule that excludes a series because its slices lie as those of a localizer do, or None.

    Args:
      orientations: each orientation of the series with the number of its slices.
      maybe_localizer: its description has a word that localizers share with other series.
    """
    most = max(count for _, count in orientations)
    if maybe_localizer and most <= MOST_LOCALIZER_SLICES:
        return LOCALIZER
    known = [orientation for orientation, _ in orientations if orientation is not None]
    if len(known) < len(orientations):
        return None
    if modality == "CT" and most < geometry.MINIMUM_SLICES:
        # Localizer radiographs may call themselves axial.
        return LOCALIZER if all(geometry.plane_of(one) in ("coronal", "sagittal") for one in known) else None
    if modality == "MR" and len(known) == 3 and most <= MOST_LOCALIZER_SLICES:
        normals = [np.cross(one[:3], one[3:]) for one in known]
        cosines = [abs(float(a @ b)) for a, b in itertools.combinations(normals, 2)]
        return LOCALIZER if max(cosines) < ORTHOGONAL_COSINE else None
    return None


def localizer_planes(modality: str, planes: Iterable[tuple[str, int]]) -> frozenset[str]:
    """Planes of the slices that are localizers among the axial slices of a CT series; empty if there are none.

    Some archives store the localizer radiograph under the UID of the series that was planned on it. Reformats come in
    larger numbers.

    Args:
      planes: plane and number of slices of each orientation of the series.
    """
    counts: Counter[str] = Counter()
    for plane, count in planes:
        counts[plane] += count
    if modality != "CT" or not counts["axial"]:
        return frozenset()
    return frozenset(plane for plane in ("coronal", "sagittal") if 0 < counts[plane] < geometry.MINIMUM_SLICES)


def exclude_pixels(
    pixels: UInt16[np.ndarray, "rows columns"], stored: Integer[np.ndarray, " values"], counts: Integer[np.ndarray, " values"],
    to_hu: tuple[float, float] | None,
) -> str | None:  # fmt: skip
    """Name of the first pixel rule that excludes a slice, or None.

    Args:
      stored, counts: the distinct values of `pixels`, in order, and how many pixels have them.
      to_hu: slope and intercept to HU; None where values are not HU.
    """
    if min(pixels.shape) < MINIMUM_SIDE:
        return f"smaller than {MINIMUM_SIDE} px"
    if stored[0] == stored[-1]:
        return "constant"
    if to_hu is not None:
        slope, intercept = to_hu
        if int(counts[stored.astype(np.float32) * slope + intercept < AIR_HU].sum()) / pixels.size > AIR_SHARE:
            return ALL_AIR
    return PAGE if pages.is_page(pixels, stored, counts) else None
