"""What the readers' tests share: multi-frame DICOM files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage


@pytest.fixture
def write_enhanced(write_dicom: Callable[..., Path]) -> Callable[..., Path]:
    """Writes an Enhanced CT; frames lie 3 mm apart along z, each with a slope of its own and intercept -1024."""

    def write(path: Path, frames: np.ndarray, slopes: list[float]) -> Path:
        data = pydicom.dcmread(write_dicom(path, frames[0]))
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
        data.NumberOfFrames, data.PixelData = len(slopes), frames.tobytes()
        for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):  # fmt: skip
            delattr(data, name)
        shared, per_frame = Dataset(), []
        shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([Dataset()]), Sequence([Dataset()])
        shared.PixelMeasuresSequence[0].PixelSpacing = [0.5, 0.75]
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        for n, slope in enumerate(slopes):
            item = Dataset()
            item.PlanePositionSequence, item.PixelValueTransformationSequence = Sequence([Dataset()]), Sequence([Dataset()])  # fmt: skip
            item.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 3 * n]
            item.PixelValueTransformationSequence[0].RescaleSlope = slope
            item.PixelValueTransformationSequence[0].RescaleIntercept = -1024
            per_frame.append(item)
        data.SharedFunctionalGroupsSequence = Sequence([shared])
        data.PerFrameFunctionalGroupsSequence = Sequence(per_frame)
        data.save_as(path)
        return path

    return write
