"""Which reader takes which kind of file."""

from contextlib import AbstractContextManager

from data_pipeline.sources import dicom_pixels, pictures, volumes
from data_pipeline.sources.base import Reader, ReadRequest, SourceFile

# By kind, as the inventory classifies files.
READERS: dict[str, Reader] = {
    "dicom": dicom_pixels.open_dicom,
    "volume": volumes.open_volume_file,
    "image": pictures.open_picture,
}


def open_source(kind: str, request: ReadRequest) -> AbstractContextManager[SourceFile]:
    """Opens a file with the reader of its kind; see data_pipeline.sources.base for what readers raise."""
    return READERS[kind](request)
