"""NIfTI, MGH, NRRD and MetaImage volumes, cut into slices oriented as a DICOM viewer shows them."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator

import nibabel
import numpy as np
from jaxtyping import Shaped

from data_pipeline.format import records
from data_pipeline.sources import hu, nifti, nrrd_metaimage, voxels
from data_pipeline.sources.base import NO_MEMORY, ImageFacts, ReadError, ReadRequest, Slice, SourceFile
from data_pipeline.sources.geometry import FARTHEST_MM, PLANES, Direction
from data_pipeline.sources.stored_values import (
    AIR_HU,
    LEVELS,
    Digest,
    DigestKind,
    below_air,
    levels,
    stored_sha256,
    to_uint16,
)

SUFFIXES = nifti.SUFFIXES + nrrd_metaimage.SUFFIXES
SPACING_MM = (0.001, 200.0)  # of neighbouring voxels; what lies outside has another unit than its header states

# Label maps are whole numbers in regions of one value. In 45 label maps of organs, vessels and cortex, 65 to 97 % of neighbours
# within regions and at their borders are equal, in 46 images 0 to 28 %.
REGIONS, REGIONS_IF_NAMED = 0.5, 0.3
STEPS_OF_ONE = (
    0.75  # an image of few grey levels has regions too, but their borders are single steps; see voxels.steps_of_one
)
MASK_VALUES = 3
FEW_VALUES, BACKGROUND = 24, 0.95  # landmarks: few values, nearly all voxels are background
_WORDS = r"seg|segmentation|mask|msk|label|lobe|roi|annotation|parcellation|wmparc|aparc|aseg|ground_?truth|gt"
LABEL_NAMES = re.compile(rf"(?<![a-z])({_WORDS})s?(?![a-z])|(seg|mask|label|lobes?|roi)s?(?=[._-]|$)", re.IGNORECASE)
LABEL_FOLDERS = re.compile(rf"({_WORDS})s?([ _-]?(tr|ts|train|test|val))?", re.IGNORECASE)
LABEL_MAP = "label map: whole numbers in regions of one value"
PROBABILITY_MAP = "mask or probability map: values from 0 to 1, and a name that says so"
# Where slices, rows and columns go once a volume is turned as a viewer shows it.
DIRECTIONS: dict[str, tuple[Direction, Direction, Direction]] = {
    "axial": ((2, 1), (1, 1), (0, 1)), "coronal": ((1, -1), (2, -1), (0, 1)), "sagittal": ((0, -1), (2, -1), (1, 1)),
}  # fmt: skip


# ---- the reader


class VolumeFile:
    """The SourceFile of a volume."""

    def __init__(self, request: ReadRequest, volume: "Volume") -> None:
        self.decoder = "nibabel" if is_nifti(request.path) else "SimpleITK"
        self.stored_sha256 = ""
        self.excluded = volume.excluded
        inferred = request.modality == "auto"
        modality = infer_modality(volume.survey) if inferred else request.modality
        self.facts = ImageFacts(
            modality=modality, units="HU" if modality == "CT" else "arbitrary", body_part="", manufacturer="unknown",
            plane=volume.plane, spacing=volume.spacing[2], directions=DIRECTIONS[volume.plane],
        )  # fmt: skip
        self._volume = volume
        self._digest: DigestKind = request.digest
        self._flags = request.flags | (records.MODALITY_INFERRED if inferred else 0)

    def slices(self) -> Iterator[Slice]:
        volume, digest, is_hu = self._volume, Digest(self._digest), self.facts.units == "HU"
        if volume.excluded:
            if volume.survey.integers:
                for plane in volume.slices():
                    digest.add(plane)
                self.stored_sha256 = digest.hex()
            return
        integers = volume.survey.integers
        # Padding below air is raised to it, and single voxels far from all others are clipped. Whole numbers then stay as they are;
        # others, and those that span too much, become 65,535 equal steps.
        low, high = volume.survey.low, volume.survey.high
        if not (integers and high - min(low, 0) < LEVELS):
            low, high = volume.survey.limits(AIR_HU if is_hu else -math.inf)
        elif is_hu:
            low, high = max(low, AIR_HU), max(high, AIR_HU)
        as_is = integers and high - min(low, 0) < LEVELS
        slope = 1.0 if as_is else (float(high) - float(low)) / (LEVELS - 1) or 1.0
        intercept = 0.0 if as_is else float(low)
        for number, plane in enumerate(volume.slices()):
            source = digest.add(plane, also_alone=True) if integers else ""
            clipped, below = 0, ()
            if is_hu and plane.min() < AIR_HU:
                rounded = np.rint(plane)
                below = below_air(levels(rounded[rounded < AIR_HU]), 1.0, 0.0)
            if plane.min() < low or plane.max() > high:
                clipped, plane = records.CLIPPED, np.clip(plane.astype(np.int64 if integers else np.float64), low, high)
            steps = plane if as_is else np.rint((plane.astype(np.float64) - intercept) / slope).astype(np.int64)
            pixels, pixel_slope, pixel_intercept, _ = to_uint16(
                steps, slope, intercept, hu=is_hu, low=int(low) if as_is else 0
            )
            yield Slice(
                rank=number, pixels=pixels, slope=pixel_slope, intercept=pixel_intercept,
                position=number * volume.spacing[2], flags=self._flags | clipped,
                source=source if as_is else stored_sha256(steps, self._digest), spacing=volume.spacing[:2],
                below=below,
            )  # fmt: skip
        self.stored_sha256 = digest.hex() if integers else ""


@contextlib.contextmanager
def open_volume_file(request: ReadRequest) -> Iterator[SourceFile]:
    """The reader of volumes; see data_pipeline.sources.base."""
    with open_volume(request.path, request.scratch) as volume:
        yield VolumeFile(request, volume)


# ---- volumes


@dataclasses.dataclass(frozen=True)
class Volume:
    """Slices of a volume.

    Attributes:
      spacing: between rows, columns and slices, mm.
      plane: of the slices: the plane with the smallest spacing within it, axial for isotropic volumes.
      survey: of all values.
      excluded: why it is not an image though it can be read, or "".
    """

    spacing: tuple[float, float, float]
    plane: str
    survey: voxels.Survey
    excluded: str
    _stored: voxels.Array | voxels.File
    _scaling: tuple[float, float]
    _orientation: np.ndarray

    def slices(self) -> Iterator[Shaped[np.ndarray, "rows columns"]]:
        """In spatial order, rescaled, turned as open_volume says; integers where all values are, else float32.

        NaN becomes the lowest value, infinity the highest or lowest.
        """
        found, through = self.survey, PLANES.index(self.plane)
        axis = int(np.flatnonzero(self._orientation[:, 0] == through)[0])
        count, step = self._stored.shape[axis], self._stored.planes_at_once(axis)
        starts = range(0, count, step)
        for start in starts if self._orientation[axis, 1] > 0 else reversed(starts):
            values = voxels.scaled(self._stored.planes(axis, start, min(start + step, count)), self._scaling)
            if values.dtype.kind == "f":
                values = np.nan_to_num(values, nan=found.low, posinf=found.high, neginf=found.low)
                values = np.rint(values).astype(np.int32) if found.integers else values.astype(np.float32)
            values = nibabel.apply_orientation(values, self._orientation)
            # Rows run from the front or the head down, columns from the patient's right or, in sagittal slices, from the face.
            for one in np.moveaxis(values, through, 0)[:, ::-1, ::-1].transpose(0, 2, 1):
                yield np.ascontiguousarray(one)


def is_nifti(path: str) -> bool:
    """By its name: NIfTI and MGH go to nibabel, everything else to SimpleITK."""
    return path.lower().endswith(nifti.SUFFIXES)


@contextlib.contextmanager
def open_volume(path: str, scratch: str | None = None) -> Iterator[Volume]:
    """Reads a volume once for its range and turns it as viewers show it: axial and coronal slices with the patient's right on
    the left and front or head up, sagittal ones with the face to the left.

    A volume of more than voxels.IN_MEMORY_BYTES is read in pieces. A compressed one is unpacked to `scratch` for that, as a file
    without a name. Unusual forms of NRRD and MetaImage are read whole: text, skipped lines.

    Raises:
      ReadError: damaged, or not of two or three dimensions.
      StorageError: the scratch disk is full.
    """
    try:
        with contextlib.ExitStack() as stack:
            if is_nifti(path):
                stored, scaling, affine, labels = nifti.open_nifti(path, scratch, stack)
            else:
                stored, scaling, affine = nrrd_metaimage.open_itk(path, scratch, stack)
                labels = False
            yield _volume(stored, scaling, affine, labels=labels, named=is_named_label(path))
    except MemoryError as error:
        raise ReadError(NO_MEMORY) from error


def _volume(
    stored: voxels.Array | voxels.File, scaling: tuple[float, float], affine: np.ndarray, *, labels: bool, named: bool
) -> Volume:
    _check(affine, stored.shape)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    # To axes pointing right, front, up, so that array axes are sagittal, coronal and axial in turn.
    orientation = nibabel.io_orientation(affine)
    if np.isnan(orientation).any():
        raise ReadError("its affine is singular: where the voxels lie is unknown")
    order = np.argsort(orientation[:, 0])
    spacing, shape = spacing[order], [stored.shape[axis] for axis in order]
    through = 2
    if shape.count(1) == 1:
        through = shape.index(1)
    elif spacing.max() > 1.1 * np.sort(spacing)[1]:
        through = int(np.argmax(spacing))
    in_plane = [axis for axis in range(3) if axis != through]
    found = voxels.survey(stored, scaling)
    excluded = ""
    if found.integers and (labels or is_label_map(stored, scaling, found, named=named)):
        excluded = LABEL_MAP
    elif named and 0 <= found.low and found.high <= 1:
        excluded = PROBABILITY_MAP
    return Volume(
        spacing=(float(spacing[in_plane[1]]), float(spacing[in_plane[0]]), float(spacing[through])),
        plane=PLANES[through], survey=found, excluded=excluded, _stored=stored, _scaling=scaling, _orientation=orientation,
    )  # fmt: skip


def _check(affine: np.ndarray, shape: tuple[int, int, int]) -> None:
    if voxels.is_singular(affine):
        raise ReadError("its affine is singular: where the voxels lie is unknown")
    if np.abs(affine).max() > FARTHEST_MM:
        raise ReadError(f"its affine has a value beyond {FARTHEST_MM:,.0f} mm: where the voxels lie is unknown")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[np.array(shape) > 1]
    if spacing.size and not SPACING_MM[0] <= spacing.min() <= spacing.max() <= SPACING_MM[1]:
        raise ReadError(
            f"by its header neighbouring voxels are less than {SPACING_MM[0]} or more than {SPACING_MM[1]:g} mm apart; correct the spacing or its unit"
        )


def is_named_label(path: str) -> bool:
    """Whether the name of a file or of its folder says that it holds labels: liver_seg.nii.gz, labelsTr/case_1.nii.gz."""
    *_, folder, name = ("", *path.replace("\\", "/").rsplit("/", 2))
    return bool(LABEL_NAMES.search(name.split(".")[0])) or bool(LABEL_FOLDERS.fullmatch(folder))


def is_label_map(
    stored: voxels.Array | voxels.File, scaling: tuple[float, float], found: voxels.Survey, *, named: bool
) -> bool:
    """Whether whole numbers lie in regions of one value.

    Args:
      found: of these values.
      named: the name of the file or its folder says that it holds labels.
    """
    if found.distinct <= MASK_VALUES or (found.distinct <= FEW_VALUES and (named or found.background >= BACKGROUND)):
        return True
    if found.equal < (REGIONS_IF_NAMED if named else REGIONS):
        return False
    return voxels.steps_of_one(stored, scaling, found) <= STEPS_OF_ONE


def infer_modality(found: voxels.Survey) -> str:
    """ "CT" where the values prove to be HU, else "MR"."""
    return "CT" if hu.is_ct(found.values, found.counts) else "MR"
