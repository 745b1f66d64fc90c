"""NIfTI-1 and NIfTI-2 (.nii, .nii.gz, .hdr with .img) and the format of FreeSurfer (.mgh, .mgz).

Whether a file is compressed is seen in its first bytes, not in its name.
"""

import contextlib
import math
import os
import re
import struct
import zlib
from typing import BinaryIO

import numpy as np
from jaxtyping import Float64
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader

from data_pipeline.sources import deflate, voxels
from data_pipeline.sources.base import ReadError
from data_pipeline.sources.silence import guarded

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".mgh", ".mgz")
HEADER_BYTES = 540  # of NIfTI-2, the longest
# Codes of xyzt_units (nifti1.h) in mm; 0 says nothing, and everybody writes mm.
_UNITS_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_LABELS = 1002  # NIFTI_INTENT_LABEL
_CLASSES: dict[bytes, type[Nifti1Header]] = {
    b"n+1": Nifti1Header, b"ni1": Nifti1PairHeader, b"n+2": Nifti2Header, b"ni2": Nifti2PairHeader,
}  # fmt: skip

Scaling = tuple[float, float]
Affine = Float64[np.ndarray, "4 4"]


def is_header(start: bytes) -> bool:
    """Whether a .hdr file begins as those of NIfTI and Analyze do; other programs use the suffix too."""
    return start[:4] in (struct.pack(order + "i", size) for order in "<>" for size in (348, 540))


def open_nifti(
    path: str, scratch: str | None, stack: contextlib.ExitStack
) -> tuple[voxels.Array | voxels.File, Scaling, Affine, bool]:
    """Stored values, their slope and intercept, the affine in mm to axes right, front, up, and whether the header says that the values
    are labels.

    Raises:
      ReadError: it is damaged, or its header leaves open what it means.
    """
    file = stack.enter_context(open(path, "rb"))
    start = _first_bytes(file)
    if path.lower().endswith((".mgh", ".mgz")):
        return _open_mgh(file, path, start, scratch, stack)
    with guarded("damaged volume: its header cannot be read ({kind})"):
        header = _parse(start)
        units = _UNITS_MM.get(int(header["xyzt_units"]) & 7)
        if units is None:
            raise ReadError("its header states an unknown unit of length; set xyzt_units to mm")
        layout = _layout(header)
        slope, inter = header.get_slope_inter()
        scaling = (1.0, 0.0) if slope is None else (float(slope), float(inter or 0.0))
        affine = np.diag([units, units, units, 1.0]) @ _affine(header)
        labels = int(header["intent_code"]) == _LABELS
    if not header.is_single:
        path = _values_of_pair(path)
        file = stack.enter_context(open(path, "rb"))
    return _stored(file, path, layout, scratch, stack), scaling, affine, labels


def _first_bytes(file: BinaryIO) -> bytes:
    start = file.read(1 << 16)
    file.seek(0)
    if start.startswith(deflate.GZIP):
        try:
            start = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(start, HEADER_BYTES)
        except zlib.error as error:
            raise ReadError(deflate.WRONG_STREAM.format(what="volume")) from error
    return start[:HEADER_BYTES]


def _parse(start: bytes) -> Nifti1Header:
    kind = _CLASSES.get(start[344:347]) or _CLASSES.get(start[4:7])
    if kind is None:
        if is_header(start) and len(start) >= 348:
            raise ReadError(
                "an Analyze volume: it does not say where left is; convert it to NIfTI with the program that wrote it"
            )
        raise ReadError("damaged volume: not a NIfTI header")
    size = kind.template_dtype.itemsize
    header = kind(start[:size], check=False)
    offset = float(header["vox_offset"])
    first = header.single_vox_offset if header.is_single else 0
    if not math.isfinite(offset) or not offset.is_integer() or not (offset == 0 or offset >= first):
        raise ReadError(f"damaged volume: its header states that the values begin within it (vox_offset below {first})")
    return kind(start[:size], check=True)


def _layout(header: Nifti1Header) -> voxels.Layout:
    dtype = header.get_data_dtype()
    offset = int(header.get_data_offset()) or (header.single_vox_offset if header.is_single else 0)
    return voxels.Layout(offset, voxels.check_shape(tuple(map(int, header.get_data_shape())), dtype), dtype)


def _affine(header: Nifti1Header) -> Affine:
    """The sform; the qform where there is none or it is singular; else voxel sizes alone, as nibabel and SPM lay them out."""
    sform, stated = header.get_sform(coded=True)
    if stated and not voxels.is_singular(np.asarray(sform, np.float64)):
        return np.asarray(sform, np.float64)
    qform, stated_too = header.get_qform(coded=True)
    if stated_too:
        return np.asarray(qform, np.float64)
    return np.asarray(sform if stated else header.get_base_affine(), np.float64)


def _values_of_pair(path: str) -> str:
    folder, name = os.path.split(path)
    stem = re.sub(r"\.hdr$", "", name, flags=re.IGNORECASE)
    for beside in (f"{stem}.img", f"{stem}.img.gz", f"{stem}.IMG"):
        if os.path.isfile(os.path.join(folder, beside)):
            return os.path.join(folder, beside)
    raise ReadError(
        "its .img file is missing; one beside a header in an archive or a bucket is not read either: lay both into a folder"
    )


def _stored(
    file: BinaryIO, path: str, layout: voxels.Layout, scratch: str | None, stack: contextlib.ExitStack
) -> voxels.Array | voxels.File:
    voxels.check_size(layout.size, path)
    packed = file.read(len(deflate.GZIP)) == deflate.GZIP
    file.seek(0)
    return (
        voxels.unpacked(deflate.inflated(file, "volume"), layout, scratch, stack)
        if packed
        else voxels.stored_in(file, layout)
    )


def _open_mgh(
    file: BinaryIO, path: str, start: bytes, scratch: str | None, stack: contextlib.ExitStack
) -> tuple[voxels.Array | voxels.File, Scaling, Affine, bool]:
    with guarded("damaged volume: its header cannot be read ({kind})"):
        if start[:4] != b"\0\0\0\1" or len(start) < 284:
            raise ReadError("damaged volume: not an MGH header")
        header = MGHHeader(start[:284])
        dtype = np.dtype(str(header.get_data_dtype()))
        layout = voxels.Layout(
            int(header.get_data_offset()), voxels.check_shape(tuple(map(int, header.get_data_shape())), dtype), dtype
        )
        affine = np.asarray(header.get_affine(), np.float64)
    return _stored(file, path, layout, scratch, stack), (1.0, 0.0), affine, False
