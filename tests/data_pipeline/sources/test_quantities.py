import pytest

from data_pipeline.sources import quantities


@pytest.mark.parametrize(
    ("modality", "image_type", "quantity"),
    [
        ("CT", ("ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"), ""),
        ("CT", ("DERIVED", "PRIMARY", "AXIAL", "VMI"), ""),  # virtual monoenergetic: HU
        ("CT", ("DERIVED", "PRIMARY", "AXIAL", "MAT_REMOVED"), ""),
        ("CT", ("DERIVED", "PRIMARY", "AXIAL", "MAT_SPECIFIC"), "concentration"),
        ("CT", ("DERIVED", "PRIMARY", "AXIAL", "EFF_ATOMIC_NUM"), "effective atomic number"),
        ("CT", ("DERIVED", "PRIMARY", "AXIAL", "ELECTRON_DENSITY"), "electron density"),
        ("CT", ("DERIVED", "PRIMARY", "PERFUSION", "RCBF"), "perfusion"),
        ("MR", ("ORIGINAL", "PRIMARY", "M", "NORM", "DIS2D"), ""),
        ("MR", ("DERIVED", "PRIMARY", "DIFFUSION", "TRACEW", "DIS2D"), ""),
        ("MR", ("DERIVED", "PRIMARY", "DIFFUSION", "ADC", "DIS2D"), "diffusion"),
        ("MR", ("DERIVED", "PRIMARY", "ADC_UNSPECIFIED", "ADC", "UNSPECIFIED"), "diffusion"),
        ("MR", ("ORIGINAL", "PRIMARY", "T1", "NONE"), ""),
        ("MR", ("DERIVED", "PRIMARY", "T2_STAR MAP", "T2", "UNSPECIFIED"), "relaxation time or rate"),
        ("MR", ("ORIGINAL", "PRIMARY", "P", "ND"), "phase"),
        ("MR", ("ORIGINAL", "PRIMARY", "PHASE MAP", "P", "FFE"), "phase"),
        ("MR", ("ORIGINAL", "PRIMARY", "B0 MAP", "B0", "UNSPECIFIED"), "field"),
        ("MR", ("DERIVED", "PRIMARY", "OTHER", "R", "IR"), ""),  # real part of an inversion recovery: an image
        ("CT", ("ORIGINAL", "PRIMARY", "P"), ""),
    ],
)
def test_image_type_tells_maps_from_images(modality: str, image_type: tuple[str, ...], quantity: str) -> None:
    assert quantities.of(modality, image_type, (), (), ()) == quantity


@pytest.mark.parametrize(
    ("rescale_type", "quantity"),
    [("HU", ""), ("US", ""), ("", ""), ("normalized", ""), ("MGML", "concentration"), ("Z_EFF", "effective atomic number"),
     ("ED", "electron density"), ("HU_MOD", "modified HU"), ("PCT", "fraction"), ("mm2/s", "diffusion")],
)  # fmt: skip
def test_rescale_type_tells_what_is_measured(rescale_type: str, quantity: str) -> None:
    assert quantities.of("CT", ("ORIGINAL", "PRIMARY", "AXIAL"), (rescale_type,), (), ()) == quantity


@pytest.mark.parametrize(
    ("unit", "quantity"),
    [("[hnsf'U]", ""), ("1", ""), ("no units", ""), ("mm2/s", "diffusion"), ("ms", "relaxation time or rate"), ("Hz", "field"),
     ("mg/ml", "concentration"), ("ml/100ml/min", "perfusion")],
)  # fmt: skip
def test_unit_of_real_world_values_tells_what_is_measured(unit: str, quantity: str) -> None:
    assert quantities.of("MR", (), (), (unit,), ()) == quantity


@pytest.mark.parametrize(
    ("component", "quantity"),
    [("MAGNITUDE", ""), ("REAL", ""), ("PHASE", "phase"), ("IMAGINARY", "phase"), ("MIXED", "signal and phase mixed")],
)
def test_complex_component_tells_phase_from_signal(component: str, quantity: str) -> None:
    assert quantities.of("MR", ("ORIGINAL", "PRIMARY", "T1", "NONE"), (), (), (component,)) == quantity
