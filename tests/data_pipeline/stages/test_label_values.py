import pytest

from data_pipeline.stages import label_values


@pytest.mark.parametrize(
    "cell", ["", " ", "NaN", "nan", "NA", "n/a", "N/A", "#N/A", "<NA>", "null", "NULL", "NaT", " nan "]
)
def test_missing_values_are_empty(cell: str) -> None:
    assert label_values.clean(cell) == ""


@pytest.mark.parametrize("cell", ["none", "None", "no", "0", "unknown", "Na+"])
def test_classes_that_resemble_missing_values_stay(cell: str) -> None:
    assert label_values.clean(cell) == cell


def test_spaces_and_unicode_forms_are_one_text() -> None:
    assert label_values.clean(" a\u00a0  b ") == "a b"
    assert label_values.clean("Mu\u0308ller") == label_values.clean("M\u00fcller")


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "1.0", "+1", "1.", ""], [1, 1, 1, 1, None]),
        (["1", "2.5", "1e3", "-.5", "008.0E+00"], [1.0, 2.5, 1000.0, -0.5, 8.0]),
        (["1", "1.0", "x"], ["1", "1", "x"]),  # one class in a column of text too
        (["007", "7"], ["007", "7"]),
        (["e5", "1.5"], ["e5", "1.5"]),
        (["", ""], [None, None]),
        (["9" * 18, "9" * 19], ["9" * 18, "9" * 19]),  # more than 64 bits hold
        ([], []),
    ],
)
def test_column_has_one_type_and_one_value_per_number(cells: list[str], values: list) -> None:
    found = label_values.typed(cells)
    assert found == values and [type(value) for value in found] == [type(value) for value in values]


def test_texts_that_differ_in_case_are_found() -> None:
    assert label_values.differ_in_case(["yes", "no", "yes", "Yes"]) == (0, 3)
    assert label_values.differ_in_case(["yes", "no", "yes"]) is None


@pytest.mark.parametrize(
    ("title", "what"),
    [
        ("PatientID", "an id"), ("patient_id", "an id"), ("patientid", "an id"), ("patient", "an id"), ("MRN", "an id"),
        ("SeriesInstanceUID", "an id"), ("Accession Number", "an id"), ("studyuid", "an id"), ("Study Date", "a date"),
        ("birthdate", "a date"), ("scanDate", "a date"), ("original_name", "a name"), ("lastname", "a name"), ("id", "an id"),
    ],
)  # fmt: skip
def test_title_of_an_identifying_column_is_recognised(title: str, what: str) -> None:
    assert label_values.identifying(title, ["1", "0"]) == f"{what} by its title"


@pytest.mark.parametrize(
    "title", ["covid", "sarcoid", "thyroid", "IDH1", "lesion", "age", "sex", "grade", "kernel", "manufacturer", "update", "validated"]
)  # fmt: skip
def test_title_of_a_finding_is_no_identity(title: str) -> None:
    assert label_values.identifying(title, ["1", "0"]) is None


@pytest.mark.parametrize(
    ("cells", "what"),
    [
        (["1.2.840.113619.2.55", "1.2.840.113619.2.56"], "an id: it holds a UID"),
        (["a", "2021-03-04"], "a date"),
        (["4.3.2021", ""], "a date"),
        (["03/04/2021 12:30"], "a date"),
        (["20210304", "19991231"], "a date"),
        (["Doe^Jane", "x"], "a name"),
        (["TCGA-17-Z034", "TCGA-17-Z054"], "an id"),
        (["0017", "0018"], "an id"),
        ([f"finding {chr(97 + n % 26)}{n % 3}{'x' * n}" for n in range(30)], "names, ids or free text"),
        ([str(40_000 + 7 * n) for n in range(30)], "an id"),
    ],
)
def test_identifying_cells_are_recognised(cells: list[str], what: str) -> None:
    assert (label_values.identifying("x", cells) or "").startswith(what)


@pytest.mark.parametrize(
    "cells",
    [
        ["yes", "no"], ["glioma", "meningioma", "none"], ["B20s", "B30f"], ["SOMATOM PLUS 4", "Emotion"], ["20210304", "99999999"],
        [f"{n}.25" for n in range(100)], [str(n) for n in range(100)], ["C34.1", "C34.2"], ["2.5.1", "3.0.0"], [],
        [f"class {n % 25}" for n in range(500)],
    ],
)  # fmt: skip
def test_classes_and_measurements_are_no_identity(cells: list[str]) -> None:
    assert label_values.identifying("x", cells) is None
