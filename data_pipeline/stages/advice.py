"""What to do about the reasons in the manifest, in a few words. docs/ingest_reference.md lists all of them with their causes."""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

NOTHING = "nothing to do"
_AGAIN = "transfer it again"
_PERMISSIONS = "check permissions and links"
_UNPACK = "unpack it and name the folder"

# The first pattern that begins the reason counts.
_ADVICE: tuple[tuple[str, str], ...] = tuple(
    (pattern, what)
    for what, patterns in {
        "nothing to do; if they are reformats, export at least 5 of them": ("localizer: one of fewer than",),
        NOTHING: (
            "not a CT or MR image object", "neither CT nor MR", "no pixel data", "colour image", "several frames in a single-frame",
            "localizer", "projection", "burned-in", "a CT that is not axial", "an index of DICOM files", "smaller than", "constant",
            "the same ", "the label table", "the list of --holdout", "a link in an archive", "its name leads out",
            "unpacks to too much", "members share", "a page of text", "values without a header", r"[\d,]+ pages",
        ),
        "nothing to do; if it is an image, give it the suffix of its format": ("not a medical image",),
        "nothing to do: it is a segmentation": ("label map", "mask or probability map"),
        "send the series as single slices or as an enhanced object": ("a mosaic",),
        "split it into volumes with one number per voxel": (r"\d+ dimensions", r"\d+ values per voxel", "complex or colour values"),
        "convert it to NIfTI with the program that wrote it": ("an Analyze volume",),
        "lay both files into one folder": ("its .img file is missing",),
        "left out by --drop-lossy": ("lossy compression",),
        "left out by --drop-faces": ("a body part with a face", "may show a face"),
        "left out by --holdout": ("patient is held out",),
        "if it should show something, compare its rescaling with the stored values: an intercept applied twice darkens all of it": (
            "all air",
        ),
        "the header contradicts the pixels: correct its rescaling or modality, or leave the series out": (
            r"(the )?values are (no |not |HU)",
        ),
        "if they are HU, export the series with RescaleSlope, RescaleIntercept and RescaleType HU": (
            "nothing says that values are HU", "stored values are indices of a Modality LUT", "its Real World Value Mapping",
        ),
        NOTHING + ", unless maps are wanted": ("a map of",),
        "declare it as PixelPaddingValue, or correct PixelRepresentation": ("values above",),
        "the header contradicts itself or the pixels: correct it": (
            "pixels use bits outside", "BitsStored", "the rescale and the Real World",
        ),
        _AGAIN: ("empty file", "truncated", "cut off", "damaged"),
        f"{_AGAIN}; if it opens in a viewer, please report it, without the file": (
            "malformed", "the picture cannot be read", "the pixels cannot be decoded",
        ),
        "send it again with its meta information": ("no transfer syntax",),
        "correct the header: the meaning of the values is unknown": ("RescaleSlope", r".* is no finite number", r".*is not a finite"),
        "write the volume to one file": ("its header names a data file", "its data file is missing"),
        "correct its header": ("its affine", "neighbouring voxels"),
        "if it is sound and large, raise --timeout": ("reading it took",),
        "if it is sound and large, raise --memory-gb": ("it needs more memory", "needs more memory"),
        "if it opens in a viewer, please report it, without the file": ("the decoder crashed",),
        "a DICOMDIR names it and the medium lacks it: copy the medium again": ("cannot be read: No such file",),
        _PERMISSIONS: ("cannot be read", "neither a file", "the folder cannot be listed"),
        _UNPACK: ("encrypted", "packed by method", "a sparse file", "an archive within", "an archive of a kind"),
        "please report this line": ("the reader failed",),
    }.items()
    for pattern in patterns
)  # fmt: skip


def advice(reason: str) -> str:
    """What to do about a reason; "" where only the reference says."""
    return next((what for pattern, what in _ADVICE if re.match(pattern, reason)), "")


class Common(NamedTuple):
    """A frequent reason: how many files, their fate, and what to do."""

    files: int
    fate: str
    reason: str
    what: str


_NUMBER = re.compile(r"\d[\d,.]*\d|\d")


def commonest(reasons: Mapping[str, Mapping[str, int]], count: int) -> list[Common]:
    """The reasons for which most files were left out; those that differ in their numbers alone are one.

    Args:
      reasons: files by fate and reason.
    """
    groups: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for fate, found in reasons.items():
        for reason, files in found.items():
            if fate != "kept" and reason:
                groups[fate, _NUMBER.sub("…", reason)][reason] += files
    rows = [
        Common(
            members.total(), fate, next(iter(members)) if len(members) == 1 else pattern, advice(next(iter(members)))
        )
        for (fate, pattern), members in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row.files, row.fate, row.reason))[:count]


def in_words(found: Sequence[Common]) -> str:
    """Reasons in one line: "3 x empty file (transfer it again)"."""
    return "; ".join(
        f"{one.files:,} x {one.reason}" + (f" ({one.what})" if one.what not in ("", NOTHING) else "") for one in found
    )
