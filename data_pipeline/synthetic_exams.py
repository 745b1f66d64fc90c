"""An anatomical phantom: synthetic patients with organs and lesions, in CT and MR, written as DICOM series.

Organs are ellipsoids and tubes whose places and sizes vary between patients; each patient has a chest CT, an abdomen CT and
T1- and T2-weighted head MR. CT values are HU with noise; MR values are arbitrary, with a bias field and Rician noise. Voxels
are averages over a finer grid, so borders show partial volume. Half of the patients have a lesion in a region (lung nodule,
liver metastasis, brain tumour). The same seed gives the same bytes.

Patients lie straight and centred, with their organs on the usual side, unless they are `varied`: then they differ in how they
lie, in contrast phase and noise, and half of them have situs inversus, the mirror image of the usual anatomy. Left and right
can then be told by the organs' places relative to each other, and hardly by the brightness of a pixel.
"""

import csv
import dataclasses
import gzip
import hashlib
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from jaxtyping import Float, Float32, UInt8
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage

from curia_common.errors import UserError
from curia_common.progress import Progress
from data_pipeline.synthetic_anatomy import (
    LABELS,
    REGIONS,
    SUPERSAMPLING,
    Canvas,
    Position,
    average,
    expose,
    generator,
    tissue_values,
)

SITUS = ("solitus", "inversus")
NOISE = 1.7  # factor of the noise for patients who are varied
LESION_NAMES = {"chest": "lung nodule", "abdomen": "liver metastasis", "head": "brain tumour"}
# region, contrast, body part as DICOM spells it
SERIES = (("chest", "CT", "CHEST"), ("abdomen", "CT", "ABDOMEN"), ("head", "T1", "HEAD"), ("head", "T2", "HEAD"))
# Field of view across and along the body, mm.
EXTENT = {"chest": (380.0, 260.0), "abdomen": (380.0, 260.0), "head": (230.0, 170.0)}
SERIES_NAMES = tuple(f"{region}_{contrast}".lower() for region, contrast, _ in SERIES)


@dataclasses.dataclass(frozen=True)
class Volume:
    """A series of the phantom.

    Attributes:
      values: HU, or MR signal from 0 to about 1000. Slices run from the feet up; rows from front to back, columns from the
        patient's right to left.
      labels: of LABELS, by majority in a voxel.
      spacing: between slices, rows and columns, mm.
      region: "chest", "abdomen" or "head".
      contrast: "CT", "T1" or "T2".
      lesion: whether there is one.
      situs: of SITUS.
    """

    values: Float[np.ndarray, "slices rows columns"]
    labels: UInt8[np.ndarray, "slices rows columns"]
    spacing: tuple[float, float, float]
    region: str
    contrast: str
    lesion: bool
    situs: str


def _lesion(canvas: Canvas, organ: str, r: np.random.Generator) -> None:
    """One to three round lesions wholly inside `organ`."""
    for _ in range(int(r.integers(1, 4))):
        radius = r.uniform(0.06, 0.13)
        candidates = np.argwhere(canvas.labels == LABELS[organ])
        for _ in range(30):
            k, j, i = candidates[r.integers(len(candidates))]
            centre = tuple(
                2 * (n + 0.5) / size - 1 for n, size in zip((i, j, k), canvas.labels.shape[::-1], strict=True)
            )
            ball = canvas.ellipsoid(centre, (radius, radius, 1.5 * radius))
            if (np.isin(canvas.labels[ball], [LABELS[organ], LABELS["lesion"]])).mean() > 0.9:
                canvas.paint("lesion", ball, only=(organ,))
                break


def make(
    seed: int,
    patient: int,
    region: str,
    contrast: str,
    *,
    size: int = 128,
    slices: int = 24,
    lesion: bool | None = None,
    varied: bool = False,
) -> Volume:
    """One series of one patient.

    Args:
      seed, patient: determine everything; the anatomy is the same in all contrasts of a region.
      region, contrast: one of SERIES.
      size: rows and columns.
      lesion: whether there is one; in half of the patients unless given.
      varied: in how the patient lies, in contrast phase, noise and situs.

    Raises:
      UserError: an unknown region or contrast, or a size under 32.
    """
    if (region, contrast) not in [(a, b) for a, b, _ in SERIES]:
        raise UserError(
            f"the phantom has no {contrast} of the {region}; it has {', '.join(f'{b} of the {a}' for a, b, _ in SERIES)}"
        )
    _check_size(size, slices)
    anatomy = generator(seed, patient, region)
    if lesion is None:
        lesion = bool(anatomy.random() < 0.5)
    # All series of a patient have one situs; the patient lies anew, at another phase, for every region.
    situs = SITUS[int(varied and generator(seed, patient, "situs").random() < 0.5)]
    variation = generator(seed, patient, region, "variation")
    position = Position.varied(variation, mirrored=situs == "inversus") if varied else Position()
    enhancement = variation.random() if varied else None
    canvas = Canvas((slices, size * SUPERSAMPLING, size * SUPERSAMPLING), anatomy, position)
    organ = REGIONS[region](canvas, anatomy)
    if lesion:
        _lesion(canvas, organ, anatomy)

    noise = generator(seed, patient, region, contrast)
    means = tissue_values(contrast, enhancement)
    if contrast == "CT":
        means[LABELS["lesion"]] = _lesion_hu(region, means, noise)
    values = expose(canvas.labels, contrast, means, noise, NOISE if varied else 1.0)
    present = np.unique(canvas.labels)
    shares = np.stack([average(canvas.labels == number) for number in present])
    across, along = EXTENT[region]
    return Volume(
        values=values, labels=present[shares.argmax(axis=0)],
        spacing=(along / slices, across / size, across / size), region=region, contrast=contrast, lesion=lesion,
        situs=situs,
    )  # fmt: skip


def _lesion_hu(region: str, means: Float32[np.ndarray, " labels"], r: np.random.Generator) -> float:
    """HU of lesions: they differ little from their organ in the liver, and much in the lung."""
    in_lung, below_liver = r.uniform(-20, 60), r.uniform(30, 60)
    return {"chest": in_lung, "abdomen": float(means[LABELS["liver"]]) - below_liver, "head": 45.0}[region]


def _check_size(size: int, slices: int) -> None:
    if size < 32 or slices < 4:
        raise UserError(f"a series of {slices} slices of {size} px is too small; it takes at least 4 of 32 px")
    if size > 2048 or slices > 2048:
        raise UserError(f"a series of {slices} slices of {size} px is too large; at most 2,048 of either")


# ---- files


def write_study(
    folder: Path,
    *,
    patients: int = 12,
    seed: int = 0,
    size: int = 128,
    slices: int = 24,
    series: Sequence[str] = SERIES_NAMES,
    varied: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes the series of all patients with masks and labels.

    Args:
      folder: new or empty; gets dicom/<patient>/<series>/*.dcm, masks/<patient>_<series>.nii.gz (label maps) and labels.csv.
      series: of SERIES_NAMES, of every patient.
      varied: see `make`.
      progress: counts patients.

    Returns:
      Path of labels.csv: file (relative to the table), patient, region, contrast, lesion (1 where the slice shows one),
      lesion_type, situs (of SITUS).

    Raises:
      UserError: fewer than one patient or more than 9,999, a folder that cannot be created, or what `make` raises.
    """
    if not 1 <= patients <= 9999:
        raise UserError(f"--patients is {patients}; a study has 1 to 9,999 patients")
    _check_size(size, slices)
    try:
        (folder / "masks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {error.filename} ({error.strerror}); name another --output") from error
    rows = []
    for patient in range(patients):
        for number, (region, contrast, body_part) in enumerate(SERIES):
            if SERIES_NAMES[number] not in series:
                continue
            volume = make(seed, patient, region, contrast, size=size, slices=slices, varied=varied)
            rows += _write_series(folder, volume, seed, patient, number, body_part)
        if progress is not None:
            progress.step()
    table = folder / "labels.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return table


def _uid(*words: int | str) -> UID:
    """A UID under the root for UUID-derived ones (ITU-T X.667), from a hash."""
    return UID("2.25." + str(int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:15], "big")))


def _write_series(
    folder: Path, volume: Volume, seed: int, patient: int, number: int, body_part: str
) -> list[dict[str, str | int]]:
    """Writes a series and its mask; returns its rows of the label table."""
    name = f"PHANTOM-{patient:04d}"
    series = f"{number + 1}_{volume.region}_{volume.contrast}".lower()
    place = folder / "dicom" / name / series
    place.mkdir(parents=True, exist_ok=True)
    dz, dy, dx = volume.spacing
    slices, height, width = volume.values.shape
    origin = np.array([-(width - 1) / 2 * dx, -(height - 1) / 2 * dy, -(slices - 1) / 2 * dz])
    rows = []
    for k in range(slices):
        dataset = _instance(volume, seed, patient, number, k)
        dataset.PatientID = dataset.PatientName = name
        dataset.BodyPartExamined = body_part
        dataset.ImagePositionPatient = [f"{v:.4f}" for v in origin + np.array([0, 0, k * dz])]
        file = place / f"{k:03d}.dcm"
        dataset.save_as(file, enforce_file_format=True)
        visible = bool((volume.labels[k] == LABELS["lesion"]).sum() >= 4)
        rows.append({
            "file": file.relative_to(folder).as_posix(), "patient": name, "region": volume.region,
            "contrast": volume.contrast, "lesion": int(visible),
            "lesion_type": LESION_NAMES[volume.region] if visible else "none", "situs": volume.situs,
        })  # fmt: skip
    # DICOM's axes point left and back, NIfTI's right and front.
    affine = np.diag([-dx, -dy, dz, 1.0])
    affine[:3, 3] = -origin[0], -origin[1], origin[2]
    mask = nibabel.Nifti1Image(volume.labels.transpose(2, 1, 0), affine)
    # mtime=0: a time stamp in the gzip header would change the bytes.
    (folder / "masks" / f"{name}_{series}.nii.gz").write_bytes(gzip.compress(mask.to_bytes(), mtime=0))
    return rows


def _instance(volume: Volume, seed: int, patient: int, number: int, k: int) -> Dataset:
    ct = volume.contrast == "CT"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage if ct else MRImageStorage
    meta.MediaStorageSOPInstanceUID = _uid(seed, patient, number, k)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = _uid("implementation")
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = _uid(seed, patient, "study", volume.region)
    dataset.SeriesInstanceUID = _uid(seed, patient, "series", number)
    dataset.FrameOfReferenceUID = _uid(seed, patient, "frame", volume.region)
    dataset.Modality = "CT" if ct else "MR"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if ct else "M"]
    dataset.Manufacturer = "Curia JAX phantom"
    dataset.StudyDate = dataset.StudyTime = dataset.PatientBirthDate = dataset.PatientSex = ""
    dataset.SeriesNumber, dataset.InstanceNumber = number + 1, k + 1
    dz, dy, dx = volume.spacing
    dataset.SliceThickness = f"{dz:.4f}"
    dataset.PixelSpacing = [f"{dy:.4f}", f"{dx:.4f}"]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = volume.values.shape[1:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    stored = volume.values[k] + (1024 if ct else 0)
    if ct:
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    dataset.PixelData = np.clip(np.rint(stored), 0, 4095).astype("<u2").tobytes()
    return dataset
