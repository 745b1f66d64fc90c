"""The cells of a label column: what counts as missing, one value for each way to write it, and what must not be a label."""

import re
import unicodedata
from collections.abc import Callable, Sequence

LabelValue = str | int | float | None

# As pandas and R write a missing value, compared without case. "none" is not among them: it is a class of many tables.
MISSING = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "nat", "null"})
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})(\.0*)?")
_DECIMAL = re.compile(r"(?=.*[.eE])[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")


def clean(text: str | None) -> str:
    """A cell without surrounding space, in Unicode's composed form; "" where the value is missing."""
    text = " ".join(unicodedata.normalize("NFC", text or "").split())
    return "" if text.casefold() in MISSING else text


def typed(cells: Sequence[str]) -> list[LabelValue]:
    """The values of a column: whole numbers, decimal numbers or text, whichever holds every cell that is not missing.

    1, 1.0 and +1 are one value, in a column of text too. 007 is text.

    Args:
      cells: as `clean` returns them; "" becomes None.
    """
    full = [cell for cell in cells if cell]
    kind: Callable[[str], LabelValue] = str
    if all(map(_is_whole, full)):
        kind = _to_whole
    elif all(map(_is_number, full)):
        kind = float
    else:
        kind = lambda cell: str(_to_whole(cell)) if _is_whole(cell) else cell  # noqa: E731 - one of three functions
    return [kind(cell) if cell else None for cell in cells]


def differ_in_case(cells: Sequence[str]) -> tuple[int, int] | None:
    """Positions of the first two cells whose text differs in upper and lower case alone, or None."""
    first: dict[str, int] = {}
    for number, cell in enumerate(cells):
        before = first.setdefault(cell.casefold(), number)
        if cells[before] != cell:
            return before, number
    return None


def _is_whole(cell: str) -> bool:
    return _WHOLE.fullmatch(cell) is not None


def _is_number(cell: str) -> bool:
    return _is_whole(cell) or _DECIMAL.fullmatch(cell) is not None


def _to_whole(cell: str) -> int:
    return int(cell.partition(".")[0])


# ---- what identifies a person

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")  # of snake_case, camelCase and "two words"
_OF_ID = frozenset(
    "id ids uid guid uuid pid mrn accession identifier ssn insurance patient subject participant".split()
)
_OF_DATE = frozenset("date dates datetime timestamp birth birthday birthdate dob".split())
_OF_NAME = frozenset("name names surname firstname lastname forename address street phone email physician".split())
# Words that are written together: PatientID is two, patientid is one.
_JOINED = re.compile(
    r"(patient|pat|study|series|subject|case|exam|person|sop|instance|image|file|original|first|last|full|given|family|birth"
    r"|accession|scan|acquisition|visit|admission|discharge|death)(id|ids|uid|name|names|number|nr|date)"
)
_KINDS = {"id": "an id", "ids": "an id", "uid": "an id", "number": "an id", "nr": "an id", "date": "a date"}

_A_UID = re.compile(r"[0-9]+(\.[0-9]+){5,}")
_A_DATE = re.compile(
    r"((19|20)[0-9]{2}([-/.])[01]?[0-9]\3[0-3]?[0-9]|[0-3]?[0-9]([-/.])[0-3]?[0-9]\4(19|20)[0-9]{2})([T ].*)?"
)
_A_DICOM_DATE = re.compile(r"(19|20)[0-9]{2}(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])")
_A_PERSON = re.compile(r"[^\W\d]+\^[^\W\d]+.*")  # Doe^Jane, as DICOM writes names
_CODED = re.compile(r"(?=.*[0-9]{3})[A-Za-z0-9][A-Za-z0-9_.\-/ ]*")  # P-0017, 007, TCGA-17-Z034
FEW_CLASSES = 20  # text columns with more values than this, most of them in one row only, are no classes


def identifying(name: str, cells: Sequence[str]) -> str | None:
    """What a column looks like if it looks like something that tells who a patient is ("a date", …), and None if not.

    Args:
      name: of the column.
      cells: as `clean` returns them.
    """
    words = {word.lower() for word in _WORDS.findall(name)}
    for kind, of in (("an id", _OF_ID), ("a date", _OF_DATE), ("a name", _OF_NAME)):
        if words & of:
            return f"{kind} by its title"
    for word in sorted(words | {name.lower()}):
        if joined := _JOINED.fullmatch(word):
            return f"{_KINDS.get(joined[2], 'a name')} by its title"
    full = [cell for cell in cells if cell]
    distinct = set(full)
    numbers = all(map(_is_number, full))
    if any(map(_A_UID.fullmatch, full)):
        return "an id: it holds a UID"
    if any(map(_A_DATE.fullmatch, full)) or full and all(map(_A_DICOM_DATE.fullmatch, full)):
        return "a date: it holds one"
    if any(map(_A_PERSON.fullmatch, full)):
        return "a name: it holds one as DICOM writes it"
    if full and not numbers and len(distinct) > 1 and all(map(_CODED.fullmatch, distinct)):
        return "an id: every value is a code with a number of three digits or more"
    digits = {len(cell) for cell in distinct}
    alone = 2 * len(distinct) > len(full)  # most values occur once
    if len(distinct) > FEW_CLASSES and alone:
        if not numbers:
            return "names, ids or free text: most of its values occur only once"
        if all(map(_is_whole, full)) and digits <= {max(digits)} and max(digits) >= 5:
            return "an id: its values are numbers of equal length, and most occur only once"
    return None
