"""PNG, JPEG and TIFF pictures of slices."""

import warnings

import numpy as np
from jaxtyping import UInt
from PIL import Image

from data_pipeline.sources.base import NO_MEMORY, ReadError

# JPEG stores grey pictures in three channels with rounding errors of this size.
GREY_TOLERANCE = 12
Image.MAX_IMAGE_PIXELS = None  # asked below, with a reason of its own
MAXIMUM_PIXELS = 1 << 26  # 8,192 x 8,192; a slice has a twentieth


def read_image(path: str) -> UInt[np.ndarray, "rows columns"]:
    """Grey values, 8 or 16 bit.

    Raises:
      ReadError: it is no picture, is cut off, has several pages, or has colours.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            if image.width * image.height > MAXIMUM_PIXELS:
                raise ReadError(f"{image.width:,} x {image.height:,} px; a picture may have {MAXIMUM_PIXELS:,}")
            pages = getattr(image, "n_frames", 1)
            if image.mode in ("P", "LA", "RGBA", "1", "CMYK", "YCbCr"):
                image = image.convert("RGB" if image.mode != "1" else "L")
            values = np.asarray(image)
    except ReadError:
        raise
    except MemoryError as error:
        raise ReadError(NO_MEMORY) from error
    except Exception as error:  # Pillow's plugins each raise their own kinds on damaged files
        if isinstance(error, OSError) and error.errno:  # of the disk
            raise
        raise ReadError(f"the picture cannot be read ({type(error).__name__})") from error
    if pages != 1:
        raise ReadError(f"{pages} pages; a picture holds one slice")
    if values.ndim == 3:
        spread = values.max(axis=2).astype(np.int32) - values.min(axis=2)
        if np.percentile(spread, 99) > GREY_TOLERANCE:
            raise ReadError("colour image")
        values = values[:, :, 1]
    if values.dtype == np.int32 and values.min() >= 0 and values.max() <= 0xFFFF:
        values = values.astype(np.uint16)  # how older readers hand over 16-bit PNG
    if values.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise ReadError(f"pixels are {values.dtype}; wanted are 8 or 16 bit grey values")
    return values.astype(values.dtype.newbyteorder("="))
