"""What the values of a CT or MR image measure where that is neither HU nor MR signal: maps of iodine, diffusion, perfusion, phase …

Decided from defined terms and units of measurement alone. Free text is compared with them and does not leave this module.
"""

import re
from collections.abc import Iterable

# Rescale Type of a CT (DICOM PS3.3 C.11.1.1.2 and C.8.15.3.10, multi-energy). "US" means unspecified: ITK and GDCM write it
# for HU too, so that the pixels have to prove them.
UNSPECIFIED = "US"
_RESCALE_TYPES = {
    "MGML": "concentration", "Z_EFF": "effective atomic number", "ED": "electron density", "EDW": "electron density",
    "HU_MOD": "modified HU", "PCT": "fraction", "OD": "optical density",
}  # fmt: skip

# Units of measurement, as UCUM writes them (Real World Value Mapping, PS3.3 C.7.6.16.2.11) and as vendors write Rescale Type.
HOUNSFIELD = "[HNSF'U]"
_UNITS = {
    "diffusion": ("MM2/S", "UM2/S", "CM2/S", "M2/S", "10*-6.MM2/S", "10*-3.MM2/S", "10^-6 MM2/S", "10^-3 MM2/S", "10-6 MM2/S"),
    "relaxation time or rate": ("MS", "S", "1/S", "/S"),
    "field": ("HZ", "RAD/S", "PPM", "T", "UT"),
    "phase": ("RAD", "DEG"),
    "velocity": ("CM/S", "M/S", "MM/S"),
    "perfusion": ("ML/100ML/MIN", "ML/(100.ML)/MIN", "ML/MIN/100ML", "ML/100G/MIN", "ML/MIN/100G", "ML/100ML", "ML/100G"),
    "concentration": ("MG/ML", "G/ML", "MG/CM3", "MMOL/L", "G/L"),
    "temperature": ("CEL", "K"),
    "stiffness": ("KPA", "PA"),
    "fraction": ("%",),
}  # fmt: skip
_BY_UNIT = {unit: quantity for quantity, units in _UNITS.items() for unit in units}

# Values of Image Type and Frame Type, without underscores and asterisks: defined terms (PS3.3 C.7.6.1.1.2, C.8.13.3.1, C.8.15.3.1)
# and what Siemens, Philips and GE write.
_PERFUSION = (
    "CBF", "RCBF", "RELCBF", "CBV", "RCBV", "RELCBV", "CBVCORR", "MTT", "RMTT", "RELMTT", "TTP", "TTD", "TTS", "TMAX", "PBP", "NEI",
    "KTRANS", "KEP", "IAUC", "PERMEABILITY", "REGIONAL CBF", "REGIONAL CBV",
)  # fmt: skip
_CT_TYPES = {
    "perfusion": _PERFUSION,
    "concentration": ("MAT SPECIFIC", "MAT VALUE BASED", "IODINE MAP"),
    "fraction": ("MAT FRACTIONAL",),
    "effective atomic number": ("EFF ATOMIC NUM",),
    "electron density": ("ELECTRON DENSITY",),
}  # fmt: skip
_MR_TYPES = {
    "perfusion": _PERFUSION,
    "diffusion": (
        "ADC", "ADC MAP", "ADC UNSPECIFIED", "EADC", "EXPONENTIAL ADC", "FA", "FA MAP", "FRACTIONAL ANISOTROPY", "DIFFUSION ANISO",
    ),
    "relaxation time or rate": (
        "T1 MAP", "T2 MAP", "T2 STAR MAP", "T2STAR MAP", "R1 MAP", "R2 MAP", "R2 STAR MAP", "R2STAR MAP", "RHO MAP", "PD MAP",
    ),
    "field": ("B0 MAP", "B1 MAP", "FIELD MAP", "FIELDMAP", "QSM", "SUSCEPTIBILITY MAP"),
    "phase": ("P", "PHASE", "PHASE MAP", "PHASE DIFFERENCE", "I", "IMAGINARY"),
    "velocity": ("VELOCITY", "VELOCITY MAP"),
    "temperature": ("TEMPERATURE", "TEMPERATURE MAP"),
    "fraction": ("FAT FRACTION", "FATFRAC", "PDFF"),
    "metabolite": ("METABOLITE MAP",),
    "stiffness": ("STIFFNESS", "STIFFNESS MAP", "ELASTOGRAM"),
    "statistics": ("T TEST", "Z SCORE", "STD DEVIATION", "R COEFFICIENT"),
}  # fmt: skip
_BY_TYPE = {
    modality: {value: quantity for quantity, values in types.items() for value in values}
    for modality, types in (("CT", _CT_TYPES), ("MR", _MR_TYPES))
}
_COMPONENTS = {"PHASE": "phase", "IMAGINARY": "phase", "MIXED": "signal and phase mixed"}


def of(
    modality: str, image_type: Iterable[str], rescale_types: Iterable[str], units: Iterable[str], components: Iterable[str]
) -> str:  # fmt: skip
    """What the values measure, or "" where they are HU or the signal of MR.

    The real part of an inversion recovery counts as signal.

    Args:
      modality: "CT" or "MR"; "" for others.
      image_type: values of Image Type and Frame Type.
      rescale_types: values of Rescale Type, of all frames.
      units: unit codes of Real World Value Mappings.
      components: values of Complex Image Component.
    """
    types = _BY_TYPE.get(modality, {})
    found = [types.get(re.sub(r"[_*\s]+", " ", value).strip().upper(), "") for value in image_type]
    for value in map(_plain, rescale_types):
        found.append(_RESCALE_TYPES.get(value, _BY_UNIT.get(value, "")))
    found += [_BY_UNIT.get(_plain(value), "") for value in units]
    found += [_COMPONENTS.get(_plain(value), "") for value in components]
    return next(filter(None, found), "")


def _plain(value: str) -> str:
    return value.strip().upper()
