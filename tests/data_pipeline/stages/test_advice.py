import pytest

from data_pipeline.stages import advice, assignment, commit, convert, exclusion, inventory, units


@pytest.mark.parametrize(
    "reason",
    [
        *(name for name, _ in exclusion.HEADER_RULES), "smaller than 32 px", "constant", "all air", exclusion.LOCALIZER, exclusion.LOCALIZER_AMONG_AXIAL, exclusion.PROJECTION, exclusion.PAGE, units.NO_HU, units.HU_IN_MR,
        units.UNLIKE_SERIES, units.WITHOUT_SIGN, units.UNKNOWN_UNITS, inventory.A_MAP.format(quantity="phase"),
        inventory.NO_IMAGE, inventory.DATA_OF_A_HEADER, inventory.LOSSY, inventory.A_FACE, inventory.MAY_BE_A_FACE, *inventory.OWN_FILES, assignment.HELD_OUT,
        commit.SAME_PIXELS, commit.KNOWN_INSTANCE, convert.SAME_PIXELS, convert.REPEATED_INSTANCE, "empty file",
        "cannot be read: Permission denied", "reading it took more than 60 s", "the reader failed on it (KeyError at x.py:1)",
    ],
)  # fmt: skip
def test_every_rule_has_advice(reason: str) -> None:
    assert advice.advice(reason)


def test_first_matching_advice_counts() -> None:
    assert advice.advice("cannot be read: No such file or directory").startswith("a DICOMDIR names it")
    assert advice.advice("cannot be read: Permission denied") == "check permissions and links"
    # A reason that says itself what to do needs nothing more.
    assert advice.advice("its values were quantised (old min, old max); write the volume with its own values") == ""


def test_reasons_that_differ_in_numbers_are_one() -> None:
    reasons = {
        "kept": {"fewer than 5 slices": 90, "": 400},
        "excluded": {"constant": 3, "smaller than 32 px": 4},
        "quarantined": {"truncated: 2,620 of 3,520 bytes": 2, "truncated: 17 of 3,520 bytes": 3, "empty file": 1},
    }
    found = advice.commonest(reasons, 3)
    assert [(one.files, one.fate, one.reason) for one in found] == [
        (5, "quarantined", "truncated: … of … bytes"), (4, "excluded", "smaller than 32 px"), (3, "excluded", "constant"),
    ]  # fmt: skip
    assert found[0].what == "transfer it again"
    assert advice.in_words(found[:1]) == "5 x truncated: … of … bytes (transfer it again)"
