"""PNG, JPEG and TIFF pictures of slices."""

import contextlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt
from PIL import Image, ImageOps

from data_pipeline.sources import volumes, voxels
from data_pipeline.sources.base import ImageFacts, ReadError, ReadRequest, Slice, SourceFile
from data_pipeline.sources.silence import guarded
from data_pipeline.sources.stored_values import stored_sha256

# JPEG stores grey pictures in three channels with rounding errors of this size.
GREY_TOLERANCE = 12
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # TIFF 6.0, PhotometricInterpretation
MAXIMUM_PIXELS = 1 << 26  # 8,192 x 8,192; a slice has a twentieth


class PictureFile:
    """The SourceFile of a picture. It has no HU, whatever the modality: a window was applied when it was made."""

    decoder = "Pillow"

    def __init__(self, request: ReadRequest) -> None:
        self.facts = ImageFacts(request.modality, "arbitrary", body_part="", manufacturer="unknown")
        self.stored_sha256 = ""
        self.excluded = ""
        self._request = request

    def slices(self) -> Iterator[Slice]:
        values = read_picture(self._request.path)
        self.stored_sha256 = stored_sha256(values, self._request.digest)
        if volumes.is_named_label(self._request.path) and _is_label_map(values):
            self.excluded = volumes.LABEL_MAP
            return
        yield Slice(
            rank=0, pixels=values.astype(np.uint16), slope=1.0, intercept=0.0, position=0.0, flags=self._request.flags,
            source=self.stored_sha256, spacing=(0.0, 0.0),
        )  # fmt: skip


@contextlib.contextmanager
def open_picture(request: ReadRequest) -> Iterator[SourceFile]:
    """The reader of pictures; see data_pipeline.sources.base."""
    yield PictureFile(request)


def read_picture(path: str) -> UInt[np.ndarray, "rows columns"]:
    """Grey values, 8 or 16 bit, turned as the file says (EXIF, TIFF), and bright where they are high (TIFF's WhiteIsZero).

    Raises:
      ReadError: it is not a picture, is cut off, has several pages, or has colours.
    """
    # As a file: of a path, Pillow 12.3 maps uncompressed TIFFs into memory, with rows and columns swapped if they are to be turned.
    with (
        open(path, "rb") as file,
        guarded("the picture cannot be read ({kind})"),
        _any_size(),
        Image.open(file) as image,
    ):
        if image.width * image.height > MAXIMUM_PIXELS:
            raise ReadError(f"{image.width:,} x {image.height:,} px; a picture may have {MAXIMUM_PIXELS:,}")
        pages = getattr(image, "n_frames", 1)
        negative = _is_negative(image)
        image.load()
        if image.format != "TIFF":  # which Pillow turns while it loads it
            image = ImageOps.exif_transpose(image)
        if image.mode in ("P", "LA", "RGBA", "1", "CMYK", "YCbCr"):
            values = np.asarray(image.convert("RGB" if image.mode != "1" else "L"))
        else:
            values = np.asarray(image)
    if negative:
        values = np.iinfo(values.dtype).max - values
    if pages != 1:
        raise ReadError(f"{pages} pages; a picture holds one slice: save each page as a file")
    if values.ndim == 3:
        spread = values.max(axis=2).astype(np.int32) - values.min(axis=2)
        if np.percentile(spread, 99) > GREY_TOLERANCE:
            raise ReadError("colour image")
        values = values[:, :, 1]
    if values.dtype == np.int32 and values.min() >= 0 and values.max() <= 0xFFFF:
        values = values.astype(np.uint16)  # how older versions of Pillow return 16-bit PNG
    if values.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise ReadError(f"pixels are {values.dtype}; wanted are 8 or 16 bit grey values")
    return values.astype(values.dtype.newbyteorder("="))


def _is_label_map(values: UInt[np.ndarray, "rows columns"]) -> bool:
    stored, scaling = voxels.Array(values[:, :, np.newaxis]), (1.0, 0.0)
    return volumes.is_label_map(stored, scaling, voxels.survey(stored, scaling), named=True)


def _is_negative(image: Image.Image) -> bool:
    """Whether low values are meant to be seen bright and Pillow leaves that as it is: it inverts TIFFs of up to 8 bits alone."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO and image.mode.startswith("I;16")


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
    """Pillow without its own size limit, which warns first; MAXIMUM_PIXELS is checked instead."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
