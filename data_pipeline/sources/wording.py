"""What the free texts of a header call an image: image types and series descriptions, matched by whole words.

Scanners put several words into one value ("CT_SOM5 MPR", "MPR THICK"), and technicians write as they like, so that neither can be
compared for equality; and a word inside another ("LOC" in "VELOCITY", "PROT" in "PROTON") says nothing.
"""

import re
from collections.abc import Collection, Iterable

# Runs of words within one value of ImageType or FrameType.
_LOCALIZER_TYPES = (
    "LOCALIZER", "LOCALISER", "SCREEN SAVE", "SCREENSAVE", "SCREEN CAPTURE", "PATIENT INFO", "SURVIEW", "SCOUT", "SCANOGRAM",
    "TOPOGRAM", "DOSE INFO", "DOSE REPORT", "CSA REPORT", "POSDISP", "CT SOM4 TOP",
    "CT SOM5 TOP", "CT SOM7 TOP",
)  # fmt: skip
# Too short or too common to count beside other words; they are a value of their own, but for the prefix of Siemens CT.
_LOCALIZER_VALUES = ("DOSE", "SCREEN", "PROTOCOL", "PROT")
# Maximum and minimum intensity projections, renderings, and planes that a console reformatted from other series.
_PROJECTION_TYPES = (
    "PROJECTION IMAGE", "MIP", "MINIP", "MNIP", "MPR", "VRT", "SSD", "MAX IP", "MIN IP", "MAXIP", "VOLREN", "RENDERED",
    "RENDERING", "REFORMATTED", "CSA RESAMPLED",
)  # fmt: skip
_PROJECTION_VALUES = ("MINIMUM", "MAXIMUM")
_SOMARIS = re.compile(r"CT SOM\d+ ")

# Lower case; a letter on either side, of any alphabet, makes it another word.
_START, _END = rb"(?<![a-z\x80-\xff])", rb"(?![a-z\x80-\xff])"
_THREE_PLANES = rb"(?<![0-9])(?:3|three|tri)[^a-z0-9]*pl(?:an(?:es?|ar|s)?)?" + _END
_LOC = _START + rb"locs?" + _END
_CALLED_LOCALIZER = re.compile(
    # These stand in longer words too: AAHScout, Topogramm, Localisateur.
    rb"scout|surview|topogram|scanogram|posdisp|lo[ck]ali[sz]+(?:er|eur|ateur|ator|atore|ador)"
    + rb"|" + _THREE_PLANES + rb".*" + _LOC + rb"|" + _LOC + rb".*" + _THREE_PLANES
    + rb"|" + _START + rb"(?:dose[^a-z]*(?:report|info|record|summary)|patient[^a-z]*(?:protocol|info)|screen[^a-z]*(?:save|shot|capture))" + _END,
    re.DOTALL,
)  # fmt: skip
_MAYBE_LOCALIZER = re.compile(
    _START
    # In Latin-1 and in UTF-8: rep\xe9rage, \xfcbersicht.
    + rb"(?:locs?|survey|pilot|scano|topo|plan[^a-z]*scan|lo[ck]ali[sz]ations?|rep(?:e|\xe9|\xc3\xa9)rage"
    + rb"|(?:ue|[\xdc\xfc]|\xc3[\x9c\xbc])bersicht)"
    + _END
    + rb"|"
    + _START
    + _THREE_PLANES
)


def _words(value: str) -> str:
    """The words of a value in upper case, with one space between them and one at either end."""
    return f" {' '.join(re.findall(r'[A-Z0-9]+', value.upper()))} "


def _names(values: Iterable[str], runs: Collection[str], alone: Collection[str]) -> bool:
    for value in values:
        words = _words(value)
        if _SOMARIS.sub("", words).strip() in alone or any(f" {run} " in words for run in runs):
            return True
    return False


def is_localizer_type(values: Iterable[str]) -> bool:
    """Whether the values of an ImageType or FrameType name a localizer, or a page that a console made."""
    return _names(values, _LOCALIZER_TYPES, _LOCALIZER_VALUES)


def is_projection_type(values: Iterable[str]) -> bool:
    """Whether the values of an ImageType or FrameType name a projection, a rendering or a reformat."""
    return _names(values, _PROJECTION_TYPES, _PROJECTION_VALUES)


def is_mosaic_type(values: Iterable[str]) -> bool:
    """Whether the values of an ImageType name a mosaic: slices side by side in one matrix."""
    return _names(values, ("MOSAIC",), ())


def calls_localizer(description: bytes) -> bool:
    """Whether a series description is one of a localizer or of a page."""
    return _CALLED_LOCALIZER.search(description.lower()) is not None


def may_call_localizer(description: bytes) -> bool:
    """Whether a series description has a word that localizers share with other series ("Survey", "LOC", "3 plane")."""
    return _MAYBE_LOCALIZER.search(description.lower()) is not None
