"""NIfTI, NRRD and MetaImage volumes, cut into slices as a DICOM viewer would show them."""

import dataclasses
import math
import os
import re

import nibabel
import numpy as np
import SimpleITK
from jaxtyping import Shaped

from data_pipeline.errors import NO_MEMORY, ReadError

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)

# A label map holds few distinct whole numbers. Images of 8 bit have up to 256, so a name is asked for above this.
LABEL_VALUES = 128
FEW_LABEL_VALUES = 24
MAXIMUM_RATIO = 1100  # deflate, which all these formats use, packs 1,032 bytes into one at best
HEADER_BYTES = 1 << 16
LABEL_NAMES = re.compile(r"(seg|mask|msk|label|lobes?|roi)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Volume:
    """Slices of a volume.

    Attributes:
      values: as stored, rescaled; integers where all of them are whole numbers.
      spacing: between rows, columns and slices, mm.
      plane: of the slices: the plane with the smallest spacing within it, axial for isotropic volumes.
      is_label_map: few distinct whole numbers: segmentations, not images.
    """

    values: Shaped[np.ndarray, "slices rows columns"]
    spacing: tuple[float, float, float]
    plane: str
    is_label_map: bool


def is_nifti(path: str) -> bool:
    """By its name: NIfTI goes to nibabel, everything else to SimpleITK."""
    return path.lower().endswith((".nii", ".nii.gz"))


def read_volume(path: str) -> Volume:
    """Reads a volume and turns it so that slices are seen as usual: axial and coronal with the patient's right on the left
    and front or head up, sagittal with the face to the left.

    Raises:
      ReadError: damaged, or not of two or three dimensions.
    """
    try:
        return _volume(path, *(_read_nifti(path) if is_nifti(path) else _read_itk(path)))
    except MemoryError as error:
        raise ReadError(NO_MEMORY) from error


def _volume(path: str, values: np.ndarray, affine: np.ndarray) -> Volume:
    values = np.squeeze(values) if values.ndim > 3 else values
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or 0 in values.shape:
        raise ReadError(f"{values.ndim} dimensions; slices come from volumes of 2 or 3")
    if values.dtype.kind == "c" or values.dtype.names:
        raise ReadError("complex or colour values")
    values = _finite(values)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    # To axes pointing right, front, up, so that array axes are sagittal, coronal and axial in turn.
    orientation = nibabel.io_orientation(affine)
    if np.isnan(orientation).any():
        raise ReadError("its affine is singular: where the voxels lie is unknown")
    values = nibabel.apply_orientation(values, orientation)
    spacing = spacing[np.argsort(orientation[:, 0])]
    through = 2
    if values.shape.count(1) == 1:
        through = values.shape.index(1)
    elif spacing.max() > 1.1 * np.sort(spacing)[1]:
        through = int(np.argmax(spacing))
    plane = ("sagittal", "coronal", "axial")[through]
    # Rows run from the front or the head down, columns from the patient's right or, in sagittal slices, from the face.
    slices = np.moveaxis(values, through, 0)[:, ::-1, ::-1].transpose(0, 2, 1)
    in_plane = [axis for axis in range(3) if axis != through]
    values = _whole(np.ascontiguousarray(slices))
    return Volume(
        values=values,
        spacing=(float(spacing[in_plane[1]]), float(spacing[in_plane[0]]), float(spacing[through])),
        plane=plane,
        is_label_map=_is_label_map(values, path),
    )


def _read_nifti(path: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        image = nibabel.load(path)
        _check_promise(path, image.shape, image.get_data_dtype().itemsize)
        affine = np.asarray(image.affine, np.float64)
        stored, slope, inter = image.dataobj.get_unscaled(), image.dataobj.slope, image.dataobj.inter
        if (slope, inter) == (1, 0):
            values = stored
        elif stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2 and _is_small(slope) and _is_small(inter):
            values = stored.astype(np.int32) * int(slope) + int(inter)
        else:
            values = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (ReadError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - nibabel, gzip and zlib each raise their own kinds
        raise ReadError(f"damaged volume ({type(error).__name__})") from error
    return values, _sound(affine)


def _is_small(number: float) -> bool:
    """Whole, and small enough for 16-bit values times it to fit into 32 bits."""
    return float(number).is_integer() and abs(number) < 1 << 14


def _check_promise(path: str, shape: tuple[int, ...], itemsize: int) -> None:
    promised = math.prod(shape) * itemsize
    if promised > MAXIMUM_RATIO * os.path.getsize(path):
        raise ReadError(f"damaged volume: its header promises {promised:,} bytes, which the file cannot hold")


# Where NRRD and MetaImage headers name a data file beside them.
_DATA_FILE = re.compile(rb"^\s*(?:data ?file|ElementDataFile)\s*[:=][ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)


def _data_file(path: str) -> str:
    """The file that holds the values: the header's own, or one in its folder or below.

    Raises:
      ReadError: there are several, it is missing, or it lies elsewhere: whoever writes a header must not choose what is read.
    """
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    if start.startswith(b"NRRD"):
        # The header ends at its first empty line; what follows is data.
        start, *data = re.split(rb"\r?\n\r?\n", start, maxsplit=1)
        ended = bool(data) or os.path.getsize(path) <= HEADER_BYTES
    else:
        ended = _DATA_FILE.search(start) is not None  # the last line of a MetaImage header
    if not ended:
        raise ReadError(f"damaged volume: its header does not end within {HEADER_BYTES:,} bytes")
    found = _DATA_FILE.search(start)
    name = os.fsdecode(found[1].strip()) if found else ""
    if name in ("", "LOCAL"):
        return path
    if "\0" in name:
        raise ReadError("damaged volume: zeros in its header")
    if name.split()[0] == "LIST" or "%" in name:
        raise ReadError("a header with several data files, which are not read: write the volume to one file")
    folder = os.path.dirname(os.path.abspath(path))
    target = os.path.realpath(os.path.join(folder, name))
    if os.path.isabs(name) or os.path.commonpath([os.path.realpath(folder), target]) != os.path.realpath(folder):
        raise ReadError("its header names a data file outside its folder")
    if not os.path.isfile(target):
        raise ReadError("its data file is missing; one beside a header in an archive is not read either: unpack both")
    return target


def _read_itk(path: str) -> tuple[np.ndarray, np.ndarray]:
    reader = SimpleITK.ImageFileReader()
    # By the name alone: ITK would look at the content and take any format that it knows, some of which open other files.
    reader.SetImageIO("NrrdImageIO" if path.lower().endswith((".nrrd", ".nhdr")) else "MetaImageIO")
    reader.SetFileName(path)
    data = _data_file(path)
    try:
        reader.ReadImageInformation()
        components = reader.GetNumberOfComponents()
        _check_promise(data, (*reader.GetSize(), components), _ITEM_BYTES.get(reader.GetPixelID(), 1))
        image = reader.Execute()
    except RuntimeError as error:
        raise ReadError("damaged volume (SimpleITK cannot read it)") from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ReadError("colour values")
    if image.GetDimension() != 3:
        raise ReadError(f"{image.GetDimension()} dimensions; slices come from volumes of 2 or 3")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:2] *= -1  # ITK's axes point left and back, NIfTI's right and front
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), _sound(affine)


_ITEM_BYTES = {
    getattr(SimpleITK, f"sitk{kind}{bits}"): bits // 8
    for kind, sizes in {"UInt": (8, 16, 32, 64), "Int": (8, 16, 32, 64), "Float": (32, 64)}.items()
    for bits in sizes
}


def _sound(affine: np.ndarray) -> np.ndarray:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ReadError("its affine is singular: where the voxels lie is unknown")
    return affine


def _finite(values: np.ndarray) -> np.ndarray:
    """What is no number, as outside a resampled field of view, becomes the lowest value; infinity the highest."""
    if values.dtype.kind != "f":
        return values
    finite = np.isfinite(values)
    if finite.all():
        return values
    if not finite.any():
        raise ReadError("none of its values is a finite number")
    low, high = float(values[finite].min()), float(values[finite].max())
    return np.nan_to_num(values, nan=low, posinf=high, neginf=low)


def _whole(values: np.ndarray) -> np.ndarray:
    """Floats that are all whole numbers as int32; anything else unchanged."""
    if values.dtype.kind in "iu":
        return values
    rounded = np.rint(values)
    if np.abs(values).max(initial=0.0) < 2**31 and np.array_equal(values, rounded):
        return rounded.astype(np.int32)
    return values.astype(np.float32)


def _is_label_map(values: np.ndarray, path: str) -> bool:
    if values.dtype.kind == "f":
        return False
    low, high = int(values.min()), int(values.max())
    if high - low < 1 << 16:  # counting is many times faster than sorting
        distinct = int(np.count_nonzero(np.bincount((values.ravel() - np.int64(low)).astype(np.int64))))
    else:
        distinct = len(np.unique(values))
    return distinct <= FEW_LABEL_VALUES or (
        distinct <= LABEL_VALUES and bool(LABEL_NAMES.search(path.rsplit("/", 1)[-1]))
    )


def infer_modality(values: Shaped[np.ndarray, "..."]) -> str:
    """ "CT" where the values look like HU (air near -1000 and nothing far below the padding values in use), else "MR"."""
    low, high = float(np.min(values)), float(np.max(values))
    return "CT" if -4096 <= low <= -500 and high > 100 else "MR"
