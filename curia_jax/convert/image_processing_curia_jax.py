"""The image processor of weights that curia_jax converted: CT and MR slices to the `pixel_values` that they were trained on.

    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    pixel_values = processor(slices)["pixel_values"]

CT comes in Hounsfield units (HU), anything else in the values of the scanner, as they are: the window is applied here. This file
stands beside the weights and needs numpy, torch, transformers and Pillow; pydicom only to read DICOM.
"""

import os
import warnings
from typing import TypedDict

import numpy as np
import PIL.Image
import torch
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

try:  # in a `try`, because transformers demands every other import of this file
    import pydicom.errors
except ImportError:
    pydicom = None

AIR_HU, HIGHEST_HU = -1024, 3071  # what lies below is padding, and becomes air; what lies above is in no CT of 12 bits
CLOSE = 0.1  # of the range of an MR: padding so little below it is as good as background
HOW = (
    'set hu to True (CT in HU) or False (any other unit): AutoImageProcessor.from_pretrained(..., hu=True), or "hu" in '
    "preprocessor_config.json"
)


class Settings(TypedDict, total=False):
    """What `from_pretrained` may change."""

    hu: bool | str


class CuriaJaxImageProcessor(BaseImageProcessor):
    """Windows, resizes and normalises slices as in training.

    Args:
      hu: units of what is processed. True: HU. False: others, such as MR. "auto": DICOM files by their header, arrays by where air,
        fat and soft tissue lie; each kind of guess is reported once, and what cannot be told raises.
      hu_window: lower and upper edge of the window for HU; values outside are clipped.
      percentiles: of each slice, which take the place of the window for other units.
      size: {"height": px, "width": px} of the result; the whole slice is resized, its aspect ratio is not kept.
      resample: "bicubic" or "bilinear", both antialiased.
      image_mean, image_std: one for each channel, applied after the window was scaled to [0, 1]. All channels get the same slice.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = Settings

    def __init__(self, *, hu="auto", hu_window, percentiles, size, resample, image_mean, image_std, **kwargs):
        super().__init__(**kwargs)
        self.hu, self.hu_window, self.percentiles, self.size = hu, hu_window, percentiles, size
        self.resample, self.image_mean, self.image_std = resample, image_mean, image_std

    def __call__(self, images, return_tensors=None):
        """The model's input.

        Args:
          images: a slice (rows, columns), a volume (rows, columns, slices), or a list of either: arrays or tensors of any number type,
            pydicom datasets, paths of DICOM files, greyscale PIL images. Oriented as a viewer shows them: rows run from the front of
            the body or from the head, columns from the patient's right or, in sagittal slices, from the face.
          return_tensors: "pt" or "np"; PyTorch unless given.

        Returns:
          `pixel_values`, float32: (images, channels, height, width), or (images, slices, channels, height, width) of volumes.

        Raises:
          ValueError: an image cannot be used, or its units cannot be told.
        """
        images = images if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise ValueError("no images")
        pixels = []
        for number, image in enumerate(images):
            try:
                pixels.append(self._pixel_values(image))
            except ValueError as error:
                raise ValueError(f"image {number}: {error}") from error
        for number, one in enumerate(pixels):
            if one.shape != pixels[0].shape:
                raise ValueError(
                    f"image {number} is {_kind(one)}, image 0 {_kind(pixels[0])}; give images of one kind, and volumes of as many "
                    "slices, in one call"
                )
        return BatchFeature({"pixel_values": torch.stack(pixels)}, tensor_type=return_tensors)

    preprocess = __call__  # pyright: ignore[reportAssignmentType] - it takes none of the keywords that would change the recipe

    def _pixel_values(self, image):
        """(channels, height, width), or (slices, channels, height, width) of a volume."""
        if self.hu not in (True, False, "auto"):
            raise ValueError(f"hu is {self.hu!r}; {HOW}")
        values, hu = _read(image, self.hu)
        hu = self._is_hu(values) if hu is None else hu
        if values.ndim == 2:
            return self._view(values, hu)
        return torch.stack([self._view(values[:, :, number], hu) for number in range(values.shape[2])])

    def _view(self, values, hu):
        """A slice (rows, columns) as (channels, height, width)."""
        values = values.astype(np.float64)  # before any arithmetic: integers wrap around
        if hu:
            values = np.maximum(values, AIR_HU)
            low, high = self.hu_window
        else:
            low, high = np.percentile(values, self.percentiles, method="inverted_cdf")
        unit = np.clip((values - low) / max(high - low, 1e-6), 0.0, 1.0)
        pixels = torch.tensor(unit, dtype=torch.float32)[None, None]
        size = self.size["height"], self.size["width"]
        pixels = torch.nn.functional.interpolate(pixels, size, mode=self.resample, antialias=True)[0]
        mean, std = torch.tensor([self.image_mean, self.image_std], dtype=torch.float32)[:, :, None, None]
        return (pixels - mean) / std

    def _is_hu(self, values):
        """Whether the values of an array are HU: as configured, or guessed."""
        scaled = _scale(values)
        if self.hu == "auto":
            return _guess(values, scaled)
        if self.hu and scaled and (scaled != "[0, 255]" or values.dtype == np.uint8):
            raise ValueError(f"hu is True, but all values lie in {scaled}, scaled already; give HU as they are")
        if scaled:
            kind = "HU of a slice with air around it reach down to -1000" if self.hu else "fine if nothing was clipped"
            warnings.warn(
                f"all values lie in {scaled}, as if scaled already ({kind}); give values as they are, because the window is "
                "applied here",
                stacklevel=4,
            )
        return self.hu


def _guess(values, scaled):
    if scaled:
        raise ValueError(
            f"all values lie in {scaled}, as if scaled already, and do not tell their unit; give HU, or the values of the scanner, "
            f"as they are. If these are they, {HOW}"
        )
    guess = looks_like_hu(values)
    if guess is None:
        raise ValueError(f"whether its values, {values.min():g} to {values.max():g}, are HU cannot be told; {HOW}")
    warnings.warn(
        "hu is auto: taken for CT in HU, as air and tissue lie where HU have them; if that is wrong, set hu to False"
        if guess
        else "hu is auto: taken for MR or another unit than HU, as none is negative and many lie above soft tissue; if that is wrong, set hu to True",
        stacklevel=5,
    )
    return guess


def _kind(pixels):
    return f"a volume of {len(pixels)} slices" if pixels.ndim == 4 else "a slice"


def _scale(values):
    """The range that scaled values lie in; "" where they are not scaled, or all the same."""
    low, high = values.min(), values.max()
    if low < high:
        for bottom, top in ((0, 1), (-1, 1), (0, 255)):
            if bottom <= low and high <= top:
                return f"[{bottom}, {top}]"
    return ""


def _read(image, hu):
    """The values (rows, columns[, slices]) of whatever `__call__` takes, and whether they are HU; None for arrays.

    Args:
      hu: the setting of the processor.
    """
    if isinstance(image, (str, os.PathLike)):
        image = _open(image)
    if pydicom is not None and isinstance(image, pydicom.Dataset):
        values, units = _read_dicom(image, hu)
    elif isinstance(image, PIL.Image.Image) and image.mode not in ("L", "F") and not image.mode.startswith("I"):
        raise ValueError(f"a picture of mode {image.mode}; give HU, or the values of the scanner")
    elif isinstance(image, (list, tuple)):
        raise ValueError("nested lists; make an array of each image: np.asarray(image, np.float32)")
    else:
        values, units = np.asarray(image.detach().cpu() if isinstance(image, torch.Tensor) else image), None
    _check(values)
    return values, units


def _open(path):
    if pydicom is None:
        raise ValueError("reading DICOM files needs pydicom: pip install pydicom")
    if os.path.isdir(path):
        raise ValueError("this is a folder; give the DICOM files in it, one path for each")
    try:
        return pydicom.dcmread(path)
    except pydicom.errors.InvalidDicomError as error:
        raise ValueError("not a DICOM file; read other files into an array of HU or raw values") from error


def _check(values):
    """Raises ValueError for what is no slice and no volume."""
    shape = " x ".join(map(str, values.shape))
    if values.dtype.kind not in "iuf":
        raise ValueError(f"values of type {values.dtype}; wanted numbers")
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ValueError(f"an array of {shape or 'no axes'}; wanted rows x columns, or rows x columns x slices")
    if values.shape[:2] == (1, 1):
        raise ValueError(f"an image of {shape}, which stands for a missing file in some data sets")
    if min(values.shape[:2]) == 1 or (values.ndim == 3 and 8 * values.shape[0] <= min(values.shape[1:])):
        raise ValueError(
            f"an array of {shape}; slices come last: np.moveaxis(image, 0, -1), and a single one is rows x columns"
        )
    if values.ndim == 3 and values.shape[2] in (3, 4) and values.dtype == np.uint8:
        raise ValueError(f"an array of {shape} bytes, a colour picture; give HU, or the values of the scanner")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("values that are not finite")


# ---- DICOM


def _read_dicom(dataset, hu):
    """The real values of a data set and whether they are HU.

    MONOCHROME1 is inverted unless they are HU, so that more is brighter; padding becomes air, or the lowest value. Neither rows nor
    columns are turned.
    """
    colours, modality = dataset.get("PhotometricInterpretation", ""), dataset.get("Modality", "")
    if dataset.get("SamplesPerPixel", 1) != 1 or colours not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"a PhotometricInterpretation of {colours}; wanted MONOCHROME1 or MONOCHROME2")
    if dataset.get("ModalityLUTSequence"):
        raise ValueError("stored values that are indices of a Modality LUT, which is not applied")
    if hu == "auto" and not modality:
        raise ValueError(f"a header without Modality; {HOW}")
    if hu is True and modality == "MR":
        raise ValueError(f"an MR, whose values are not HU, but hu is True; {HOW}")
    stored = dataset.pixel_array
    if stored.dtype.kind not in "iu":
        raise ValueError(f"pixels of type {stored.dtype}; wanted integers")
    frames = stored if stored.ndim == 3 else stored[None]
    rescales = [_rescale(dataset, number) for number in range(len(frames))]
    is_hu = modality == "CT" if hu == "auto" else hu
    values = np.stack(
        [_real_values(frame, dataset, *one[:2], hu=is_hu) for frame, one in zip(frames, rescales, strict=True)], axis=-1
    )
    declared = all(kind in ("", "HU") for *_, kind in rescales)
    if hu == "auto" and is_hu and not declared and not looks_like_hu(values):
        raise ValueError(f"a CT whose header gives no rescale to HU, and whose values do not look like HU; {HOW}")
    return values if stored.ndim == 3 else values[:, :, 0], is_hu


def _rescale(dataset, frame):
    """Slope, intercept and Rescale Type of a frame: its own, those shared by all, or the file's; 1, 0 and None without any."""
    places = [dataset]
    for name, number in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        groups = dataset.get(name) or []
        if number < len(groups):
            places += groups[number].get("PixelValueTransformationSequence") or []
    for place in reversed(places):
        slope, intercept = place.get("RescaleSlope"), place.get("RescaleIntercept")
        if slope is not None or intercept is not None:
            if slope == 0:
                raise ValueError("a RescaleSlope of 0")
            slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
            return slope, intercept, str(place.get("RescaleType") or "").upper()
    return 1.0, 0.0, None


def _real_values(stored, dataset, slope, intercept, *, hu):
    """A frame (rows, columns), float64."""
    stored = stored.astype(np.int64)
    padding = _padding(dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1" and not hu:
        mirror = -1 if dataset.PixelRepresentation else (1 << dataset.BitsStored) - 1
        stored = mirror - stored
        padding = padding and (mirror - padding[1], mirror - padding[0])
    if padding:
        stored = _without_padding(stored, *padding, slope, intercept, hu=hu)
    return stored * slope + intercept


def _padding(dataset):
    """Lowest and highest stored value that is no part of the image; None where the header names none."""
    value = dataset.get("PixelPaddingValue")
    if value in (None, ""):
        return None
    bits = dataset.BitsAllocated
    ends = []
    for end in (value, dataset.get("PixelPaddingRangeLimit", value)):
        end = int(end) % (1 << bits)  # writers disagree on whether it is signed where pixels are
        ends.append(end - (1 << bits) if dataset.PixelRepresentation and end >> (bits - 1) else end)
    return min(ends), max(ends)


def _without_padding(stored, low, high, slope, intercept, *, hu):
    """Puts air, or in other units the lowest value of the image, where a frame is padded.

    A padding value that the image may have too is believed only in regions that touch the border, where padding lies.
    """
    inside = (stored >= low) & (stored <= high)
    ends = low * slope + intercept, high * slope + intercept
    if not inside.any() or inside.all() or (hu and max(ends) <= AIR_HU):
        return stored
    lowest, highest = stored[~inside].min(), stored[~inside].max()
    if not hu and 0 <= lowest - high and lowest - low <= (highest - lowest) * CLOSE:
        return stored
    if min(ends) <= HIGHEST_HU if hu else lowest <= high and low <= highest:
        inside = _from_border(inside)
    return np.where(inside, np.floor((AIR_HU - intercept) / slope).astype(np.int64) if hu else lowest, stored)


def _from_border(mask):
    """The regions of a mask (rows, columns) that touch its border; pixels are neighbours along rows and columns."""
    reached = mask.copy()
    reached[1:-1, 1:-1] = False
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= mask
        if (grown == reached).all():
            return reached
        reached = grown


# ---- guessing units

# From, to, share of the pixels, and how many times as many as in the range beside it. Air is at -1000 HU, fat at -120 to -60, soft
# tissue at 10 to 80 (Bushberg et al., The Essential Physics of Medical Imaging, table 10-1).
AIR, TISSUE = (-1050, -950, 0.01, 1.0), (-130, 90, 0.02, 1.5)
# A lost or repeated rescale moves both by its intercept.
MOVED_AIR, MOVED_TISSUE, INTERCEPTS = (-1050, -950, 0.1, 1.5), (-130, 90, 0.1, 1.5), (1020, -1020, 1000, -1000)
LOWEST, HIGHEST, STEP = -2400, 2400, 10  # of the histogram


def looks_like_hu(values):
    """Whether values of a slice or volume are HU: True, False where none is negative and many are high, or None: it cannot be told."""
    low, high, share = _histogram(values)
    if low == high:
        return None
    moved = any(_has_peaks(share, MOVED_AIR, MOVED_TISSUE, move) for move in INTERCEPTS)
    has_peaks = _has_peaks(share, AIR, TISSUE)
    if low >= 0:
        # Values that are all as low as those of soft tissue may be CT that was cropped to it.
        return None if moved or share(300, np.inf) < 0.1 else False
    if high < -500 or share(-np.inf, -1200) > 0.1 or (moved and not has_peaks):
        return None
    if has_peaks:
        return True
    # Part of a body without air around it: single pixels of air, and more bone than anything lighter than fat, or lung.
    inside = -1200 <= low <= -900 and high > 300 and share(-200, 200) > 0.2
    dense = share(150, np.inf) > 2 * share(-np.inf, -150) or share(-950, -500) > 0.1
    return True if inside and dense else None


def _histogram(values):
    """Lowest and highest value that is not padding, and a function: the share of the values from a to below b, multiples of 10."""
    values = values.ravel().astype(np.float32)
    below = values[values < -1050]
    if below.size:
        # Vendors pad with one value that no tissue has, such as -2000.
        levels, counts = np.unique(below, return_counts=True)
        if 2 * counts.max() >= below.size and below.size < values.size:
            values = values[values != levels[counts.argmax()]]
    places = np.clip((values - LOWEST) // STEP + 1, 0, (HIGHEST - LOWEST) // STEP + 1).astype(np.int64)
    up_to = np.concatenate([[0], np.cumsum(np.bincount(places, minlength=(HIGHEST - LOWEST) // STEP + 2))])

    def share(start, stop):
        first = 0 if start < LOWEST else min(int(start - LOWEST) // STEP + 1, len(up_to) - 1)
        last = len(up_to) - 1 if stop > HIGHEST else max(int(stop - LOWEST) // STEP + 1, 0)
        return (up_to[last] - up_to[first]) / up_to[-1]

    return values.min(), values.max(), share


def _has_peaks(share, air, tissue, move=0):
    for low, high, least, times in (air, tissue):
        low, high = low + move, high + move
        beside = max(share(2 * low - high, low), share(high, 2 * high - low))
        if share(low, high) < least or share(low, high) <= times * beside:
            return False
    return True
