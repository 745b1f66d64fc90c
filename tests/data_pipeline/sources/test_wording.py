import pytest

from data_pipeline.sources import wording


@pytest.mark.parametrize(
    "text",
    [
        "localizer", "LOCALIZER_3PLANE", "AAHScout", "AAHead_Scout_MPR_cor", "Topogramm", "Topogram 0.6 T20s", "Localisateur",
        "Localizzatore", "Lokalisator", "3-pl loc", "3 PL LOC", "3 Plane Loc SSFSE", "LOC 3 PLANE", "three plane localiser", "Surview",
        "scanogram", "PosDisp: [5] t2", "Dose Report", "Patient Protocol", "SCREEN SAVE",
    ],
)  # fmt: skip
def test_names_of_localizers_and_pages_are_recognised(text: str) -> None:
    assert wording.calls_localizer(text.encode("latin-1"))


@pytest.mark.parametrize(
    "text",
    [
        "Survey", "SURVEY_MST", "LOC", "t2_loc", "Plan scan", "Pilot", "Scano", "3plane", "3 Plane SSFSE", "Localisation",
        "Rep\xe9rage", "Reperage", "\xdcbersicht", "t2 \xfcbersicht", "Uebersicht",
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_names_that_other_series_share_are_doubtful(text: str, encoding: str) -> None:
    assert wording.may_call_localizer(text.encode(encoding)) and not wording.calls_localizer(text.encode(encoding))


@pytest.mark.parametrize(
    "text",
    [
        "", "VELOCITY MAP", "3D LOCALIZED SHIM", "local shim", "PROTON DENSITY", "T1 MPRAGE", "BLOCK 2", "13 planes", "3D PLANAR", "t2 l\xf6c",
        "Localizaci\xf3n", "AUTOPILOTED", "Topographic", "dose reduced thorax", "patient 3", "axial plan",
    ],
)  # fmt: skip
def test_words_within_other_words_are_no_localizers(text: str) -> None:
    description = text.encode("latin-1")
    assert not wording.calls_localizer(description) and not wording.may_call_localizer(description)


@pytest.mark.parametrize(
    ("value", "localizer", "projection"),
    [
        ("LOCALIZER", True, False), ("CT_SOM5 PROT", True, False), ("CT_SOM5 TOP", True, False), ("PROT", True, False),
        ("DOSE_INFO", True, False), ("REF_SURVIEW", True, False), ("PATIENT_INFO", True, False), ("SCREEN SAVE", True, False),
        ("POSDISP", True, False), ("MPR", False, True), ("CT_SOM5 MPR", False, True), ("CT_SOM7 MIP", False, True),
        ("MPR THICK", False, True), ("MPR FUSION", False, True), ("MNIP", False, True), ("MAX_IP", False, True),
        ("RADIAL_MIP", False, True), ("VOLUME RENDERING", False, True), ("VOLUME_RENDERED", False, True), ("MINIMUM", False, True),
        ("CT_SOM5 SPI", False, False), ("AXIAL", False, False), ("PROTON", False, False), ("PROT DENSITY", False, False),
        ("LOW DOSE", False, False), ("MPRAGE", False, False), ("VELOCITY", False, False), ("MINIMUM TE", False, False),
        ("T2 MAP", False, False), ("", False, False),
    ],
)  # fmt: skip
def test_image_types_are_matched_by_words(value: str, localizer: bool, projection: bool) -> None:
    found = wording.is_localizer_type(["ORIGINAL", value]), wording.is_projection_type(["ORIGINAL", value])
    assert found == (localizer, projection)
