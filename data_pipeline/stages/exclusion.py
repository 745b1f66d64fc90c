"""Which images are excluded, and why. Rules are data: a name, which the manifest quotes, and a predicate."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Shaped
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
)

from data_pipeline.sources import geometry
from data_pipeline.sources.dicom_header import Header

# DICOM PS3.4 B.5: CT and MR, and their enhanced and legacy-converted multi-frame forms.
MULTIFRAME_CLASSES = frozenset({
    EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage, EnhancedMRImageStorage, LegacyConvertedEnhancedMRImageStorage,
})  # fmt: skip
IMAGE_CLASSES = MULTIFRAME_CLASSES | {CTImageStorage, MRImageStorage}
LOCALIZER_TYPES = frozenset(
    {"LOCALIZER", "SCREEN SAVE", "SCREENSAVE", "PATIENT_INFO", "REF_SURVIEW", "SURVIEW", "SCOUT", "SCANOGRAM", "TOPOGRAM",
     "DOSE_INFO", "DOSE", "CSA REPORT"}
)  # fmt: skip
# Maximum and minimum intensity projections, renderings, and planes that a console reformatted from other series.
PROJECTION_TYPES = frozenset(
    {"PROJECTION IMAGE", "MIP", "MINIP", "MPR", "VRT", "SSD", "MAX_IP", "MIN_IP", "MAXIP", "MINIMUM", "MAXIMUM", "RADIAL_MIP",
     "VOLREN", "RENDERED", "VOLUME RENDERING", "REFORMATTED", "CSA MPR", "CSA MIP", "CSA RESAMPLED", "CURVED MPR"}
)  # fmt: skip

# The first rule that applies gives the reason.
HEADER_RULES: tuple[tuple[str, Callable[[Header], bool]], ...] = (
    ("not a CT or MR image object", lambda h: h.sop_class not in IMAGE_CLASSES),
    ("no pixel data", lambda h: not h.has_pixels),
    ("colour image", lambda h: h.samples_per_pixel != 1 or h.photometric not in ("MONOCHROME1", "MONOCHROME2")),
    ("burned-in annotation", lambda h: h.burned_in),
    ("localizer or screen", lambda h: bool(LOCALIZER_TYPES & set(h.image_type)) or h.called_localizer),
    ("projection or reformat", lambda h: bool(PROJECTION_TYPES & set(h.image_type))),
    ("several frames in a single-frame object", lambda h: h.frames > 1 and h.sop_class not in MULTIFRAME_CLASSES),
    ("neither CT nor MR", lambda h: h.modality not in ("CT", "MR")),
    # CT is reconstructed across the table. Other planes are localizer radiographs or reformats of other series.
    (
        "a CT that is not axial and does not say what it is",
        lambda h: h.modality == "CT" and len(h.image_type) < 3 and _plane(h) in ("coronal", "sagittal"),
    ),
)


def _plane(header: Header) -> str:
    return geometry.plane_of(header.geometry[0].orientation) if header.geometry else "unknown"


NO_HU = "values are no HU"
HU_IN_MR = "values are HU though the modality is MR"
MINIMUM_SIDE = 32  # px
AIR_HU = -900.0
AIR_SHARE = 0.98


def exclude_header(header: Header) -> str | None:
    """Name of the first header rule that excludes the file, or None."""
    return next((name for name, predicate in HEADER_RULES if predicate(header)), None)


def exclude_pixels(
    shape: tuple[int, int], values: Shaped[np.ndarray, " values"], counts: Shaped[np.ndarray, " values"], *, hu: bool
) -> str | None:
    """Name of the first pixel rule that excludes a slice, or None.

    Args:
      shape: of the slice, px.
      values, counts: its distinct values, in order, and how many pixels have them; HU where `hu` is true.
    """
    if min(shape) < MINIMUM_SIDE:
        return f"smaller than {MINIMUM_SIDE} px"
    if values[0] == values[-1]:
        return "constant"
    if hu and int(counts[values < AIR_HU].sum()) / (shape[0] * shape[1]) > AIR_SHARE:
        return "all air"
    return None


def exclude_series(
    values: Shaped[np.ndarray, " values"], counts: Shaped[np.ndarray, " values"], modality: str
) -> str | None:
    """Name of the rule that excludes a whole series because its pixels contradict its modality, or None.

    A single slice can lie entirely in bone or in air; a whole series cannot.

    Args:
      values, counts: the distinct real values of all its slices, rescaled as the header says, and how many pixels have them.
    """
    if modality == "CT":
        # A CT has air or fat somewhere, and something denser than lung. MR or 8-bit pictures stored as CT have not.
        low, high = float(values.min()), float(values.max())
        return NO_HU if high < -500 or low >= 0 else None
    if modality == "MR":
        # Air and soft tissue each within a hundred HU of where CT has them. Phase images spread over the same range evenly.
        total = float(counts.sum())
        air = float(counts[(values >= -1050) & (values <= -950)].sum()) / total
        tissue = float(counts[(values >= -150) & (values <= 150)].sum()) / total
        return HU_IN_MR if air > 0.1 and tissue > 0.1 and float(values.min()) > -4096 else None
    return None
