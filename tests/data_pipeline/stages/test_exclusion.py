import dataclasses

import numpy as np
import pytest
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    MRImageStorage,
    SecondaryCaptureImageStorage,
)

from data_pipeline.sources.dicom_header import FrameGeometry, Header
from data_pipeline.stages import exclusion
from tests.data_pipeline.text_pages import page_of_text

CT = Header(
    sop_class=CTImageStorage, sop_uid="1", series_uid="2", study_uid="3", patient_id="P", modality="CT",
    image_type=("ORIGINAL", "PRIMARY", "AXIAL"), frame_types=frozenset(), rows=64, columns=64, frames=1,
    photometric="MONOCHROME2", samples_per_pixel=1, burned_in=False, called_localizer=False, maybe_localizer=False, body_part="", manufacturer="ge",
    thickness=1.0, lossy=False, has_pixels=True, geometry=(),
)  # fmt: skip
AXIAL = FrameGeometry((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None, None, 1.0, 0.0)
CORONAL = FrameGeometry((1.0, 0.0, 0.0, 0.0, 0.0, -1.0), None, None, 1.0, 0.0)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({}, None),
        ({"sop_class": MRImageStorage, "modality": "MR", "image_type": ("ORIGINAL", "PRIMARY", "M")}, None),
        ({"sop_class": EnhancedCTImageStorage, "frames": 9}, None),
        ({"sop_class": SecondaryCaptureImageStorage}, "not a CT or MR image object"),
        ({"has_pixels": False}, "no pixel data"),
        ({"samples_per_pixel": 3}, "colour image"),
        ({"photometric": "PALETTE COLOR"}, "colour image"),
        ({"photometric": "MONOCHROME1"}, None),
        ({"burned_in": True}, "burned-in annotation"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, "localizer or screen"),
        ({"image_type": ("DERIVED", "SECONDARY", "MPR")}, "projection or reformat"),
        ({"image_type": ("DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE")}, "projection or reformat"),
        ({"image_type": ("DERIVED", "PRIMARY", "MPR", "CSA RESAMPLED")}, "projection or reformat"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "SCOUT")}, "localizer or screen"),
        ({"image_type": ("DERIVED", "PRIMARY", "DIFFUSION", "ADC")}, None),
        ({"image_type": ("DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT")}, "localizer or screen"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "OTHER", "PROTON")}, None),
        ({"image_type": ("DERIVED", "PRIMARY", "AXIAL", "CT_SOM5 MPR")}, "projection or reformat"),
        ({"image_type": ("DERIVED", "SECONDARY", "MPR THICK")}, "projection or reformat"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "M", "MNIP")}, "projection or reformat"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "M", "MPRAGE")}, None),
        (
            {"sop_class": EnhancedCTImageStorage, "frames": 2, "frame_types": frozenset({("ORIGINAL", "PRIMARY", "LOCALIZER", "NONE")})},
            "localizer or screen",
        ),
        (
            {"sop_class": EnhancedCTImageStorage, "frames": 2, "frame_types": frozenset({("DERIVED", "PRIMARY", "VOLUME", "MAX_IP")})},
            "projection or reformat",
        ),
        ({"sop_class": EnhancedCTImageStorage, "frames": 2, "frame_types": frozenset({("ORIGINAL", "PRIMARY", "VOLUME", "NONE")})}, None),
        (
            {"sop_class": MRImageStorage, "modality": "MR", "image_type": ("ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC")},
            "a mosaic of slices whose places are unknown",
        ),
        ({"sop_class": EnhancedMRImageStorage, "modality": "MR", "image_type": ("ORIGINAL", "PRIMARY", "FMRI", "MOSAIC"), "frames": 9}, None),
        ({"called_localizer": True}, "localizer or screen"),
        ({"maybe_localizer": True}, None),  # the plan decides, which knows all slices of the series
        ({"image_type": (), "geometry": (CORONAL,)}, "a CT that is not axial and does not say what it is"),
        ({"image_type": ("ORIGINAL", "PRIMARY"), "geometry": (CORONAL,)}, "a CT that is not axial and does not say what it is"),
        ({"image_type": (), "geometry": (AXIAL,)}, None),
        ({"geometry": (CORONAL,)}, None),
        ({"modality": "MR", "image_type": (), "geometry": (CORONAL,)}, None),
        ({"frames": 2}, "several frames in a single-frame object"),
        ({"modality": "PT"}, "neither CT nor MR"),
    ],
)  # fmt: skip
def test_header_is_excluded_by_the_rule_it_breaks(change: dict, rule: str | None) -> None:
    assert exclusion.exclude_header(dataclasses.replace(CT, **change)) == rule


TRANSVERSE, FRONTAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
LATERAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
TURNED = (0.866, 0.5, 0.0, -0.5, 0.866, 0.0)  # within its plane
RADIAL = (0.866, 0.5, 0.0, 0.0, 0.0, -1.0)  # 30 degrees from FRONTAL about the same axis


@pytest.mark.parametrize(
    ("modality", "orientations", "named", "excluded"),
    [
        ("MR", [(TRANSVERSE, 1), (FRONTAL, 1), (LATERAL, 1)], False, True),
        ("MR", [(TRANSVERSE, 15), (FRONTAL, 15), (LATERAL, 15)], False, True),
        ("MR", [(TRANSVERSE, 24), (FRONTAL, 24), (LATERAL, 24)], False, False),  # three acquisitions in one series
        ("MR", [(FRONTAL, 3), (LATERAL, 3)], False, False),
        ("MR", [(FRONTAL, 1), (RADIAL, 1), (LATERAL, 1)], False, False),  # radial slices about one axis
        ("MR", [(TRANSVERSE, 1), (TURNED, 1)], False, False),
        ("MR", [(TRANSVERSE, 1), (FRONTAL, 1), (LATERAL, 1), (None, 1)], False, False),
        ("MR", [(TRANSVERSE, 3)], False, False),
        ("MR", [(LATERAL, 15)], True, True),
        ("MR", [(LATERAL, 16)], True, False),  # a bone survey, say
        ("MR", [(None, 3)], True, True),
        ("CT", [(LATERAL, 2)], False, True),
        ("CT", [(LATERAL, 1), (FRONTAL, 1)], False, True),
        ("CT", [(FRONTAL, 5)], False, False),
        ("CT", [(TRANSVERSE, 2)], False, False),
        ("CT", [(TRANSVERSE, 3), (LATERAL, 1)], False, False),
        ("CT", [(TRANSVERSE, 2)], True, True),
        ("CT", [(None, 2)], False, False),
    ],
)
def test_layout_rules(modality: str, orientations: list, named: bool, excluded: bool) -> None:
    found = exclusion.exclude_layout(modality, orientations, maybe_localizer=named)
    assert found == ("localizer or screen" if excluded else None)


@pytest.mark.parametrize(
    ("modality", "planes", "localizers"),
    [
        ("CT", [("axial", 40), ("sagittal", 1)], {"sagittal"}),
        ("CT", [("axial", 3), ("coronal", 1), ("sagittal", 1)], {"coronal", "sagittal"}),
        ("CT", [("axial", 40), ("coronal", 4)], {"coronal"}),
        ("CT", [("axial", 40), ("coronal", 5), ("sagittal", 1)], {"sagittal"}),
        ("CT", [("axial", 40), *[("coronal", 1)] * 5], set()),  # reformats about an axis: one slice of each orientation
        ("CT", [("coronal", 40), ("sagittal", 1)], set()),
        ("CT", [("axial", 40), ("axial", 1), ("oblique", 1), ("unknown", 1)], set()),
        ("MR", [("axial", 40), ("sagittal", 1)], set()),
    ],
)
def test_localizer_planes_of_series(modality: str, planes: list, localizers: set) -> None:
    assert exclusion.localizer_planes(modality, planes) == localizers


def body(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("values", "hu", "rule"),
    [
        (body(-1000, 800), True, None),
        (body(30, 254), True, None),  # one slice may lie in bone; see series rules
        (np.where(np.eye(64) > 0, 40, -1000), True, "all air"),
        (body(0, 254), False, None),
        (body(5, 5), False, "constant"),
        (body(-1000, 800)[:31], True, "smaller than 32 px"),
    ],
)
@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_slice_is_excluded_by_the_rule_its_pixels_break(
    values: np.ndarray, hu: bool, slope: float, rule: str | None
) -> None:
    pixels = np.rint((values + 1024) / slope).astype(np.uint16)
    found = exclusion.exclude_pixels(pixels, *np.unique(pixels, return_counts=True), (slope, -1024.0) if hu else None)
    assert found == rule


def test_page_of_text_is_excluded() -> None:
    pixels = page_of_text(128, 12).astype(np.uint16) * 8
    for to_hu in (None, (1.0, -1024.0)):
        found = exclusion.exclude_pixels(pixels, *np.unique(pixels, return_counts=True), to_hu)
        assert found == "a page of text"
