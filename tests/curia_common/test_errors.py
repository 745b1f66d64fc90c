import pytest

from curia_common import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UserError, 2),
        (errors.DivergedError, 64),
        (errors.DataError, 65),
        (errors.DoesNotFitError, 66),
        (errors.StorageError, 75),
    ],
)
def test_each_error_has_its_exit_code(error: type[errors.UserError], code: int) -> None:
    assert error("text").exit_code == code


def test_fault_location_names_type_and_line_but_never_the_text() -> None:
    try:
        {"PatientName": 1}["Doe^Jane"]
    except KeyError as error:
        text = errors.fault_location(error)
    assert text.startswith("KeyError at test_errors.py:") and "Doe" not in text
