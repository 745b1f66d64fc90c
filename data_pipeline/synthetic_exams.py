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
from jaxtyping import Float, UInt8
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage
from scipy import ndimage

from curia_common.errors import UserError
from curia_common.progress import Progress

LABELS = {
    name: number
    for number, name in enumerate(
        ("outside", "fat", "muscle", "bone", "lung", "heart", "aorta", "liver", "spleen", "kidney", "bowel",
         "white matter", "grey matter", "ventricle", "lesion")
    )
}  # fmt: skip
# Mean HU at 120 kVp with contrast in the portal-venous phase, and its texture (standard deviation between voxels).
HU = {
    "outside": (-1000, 2), "fat": (-100, 12), "muscle": (55, 12), "bone": (500, 90), "lung": (-820, 40), "heart": (120, 12),
    "aorta": (150, 10), "liver": (105, 12), "spleen": (120, 12), "kidney": (160, 15), "bowel": (25, 40),
    "white matter": (28, 3), "grey matter": (37, 3), "ventricle": (5, 3), "lesion": (60, 15),
}  # fmt: skip
# Signal relative to the brightest tissue; T1: fat and white matter bright, water dark. T2: reversed.
MR = {
    "T1": {"outside": 0.0, "fat": 1.0, "muscle": 0.45, "bone": 0.1, "white matter": 0.75, "grey matter": 0.55, "ventricle": 0.15, "lesion": 0.4},
    "T2": {"outside": 0.0, "fat": 0.75, "muscle": 0.3, "bone": 0.05, "white matter": 0.4, "grey matter": 0.55, "ventricle": 1.0, "lesion": 0.85},
}  # fmt: skip
# HU before and at the peak of a contrast agent, for patients who are varied.
ENHANCEMENT = {"heart": (40, 200), "aorta": (40, 250), "liver": (55, 120), "spleen": (45, 140), "kidney": (30, 190)}
SITUS = ("solitus", "inversus")
# Of patients who are varied: largest rotation, rad; shift, in half fields of view; reduction in size; factor of the noise.
ROTATION, SHIFT, SHRINKAGE, NOISE = 0.5, 0.12, 0.2, 1.7
LESION_NAMES = {"chest": "lung nodule", "abdomen": "liver metastasis", "head": "brain tumour"}
# region, contrast, body part as DICOM spells it
SERIES = (("chest", "CT", "CHEST"), ("abdomen", "CT", "ABDOMEN"), ("head", "T1", "HEAD"), ("head", "T2", "HEAD"))
# Field of view across and along the body, mm.
EXTENT = {"chest": (380.0, 260.0), "abdomen": (380.0, 260.0), "head": (230.0, 170.0)}
SERIES_NAMES = tuple(f"{region}_{contrast}".lower() for region, contrast, _ in SERIES)
CT_NOISE_HU = 18.0
SUPERSAMPLING = 2  # per direction within the slice


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


@dataclasses.dataclass(frozen=True)
class _Position:
    """How a patient lies in the field of view, and whether mirrored; shifts in half fields of view."""

    rotation: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    shrinkage: float = 0.0
    mirrored: bool = False

    @classmethod
    def varied(cls, r: np.random.Generator, mirrored: bool) -> "_Position":
        x, y = r.uniform(-SHIFT, SHIFT, 2)
        return cls(r.uniform(-ROTATION, ROTATION), (x, y), r.uniform(0, SHRINKAGE), mirrored)

    def to_body(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates in the field of view to those of a patient who lies straight and centred."""
        if self == _Position():
            return x, y
        x, y = (x - self.shift[0]) * (1 + self.shrinkage), (y - self.shift[1]) * (1 + self.shrinkage)
        cos, sin = np.float32(np.cos(self.rotation)), np.float32(np.sin(self.rotation))
        x, y = cos * x + sin * y, cos * y - sin * x
        return (-x if self.mirrored else x), y


def _generator(*words: int | str) -> np.random.Generator:
    """A random generator seeded by the words."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little"))


class _Canvas:
    """Paints shapes into a label map; coordinates are fractions of the half field of view: x to the left, y to the back,
    z up, all from -1 to 1."""

    def __init__(self, shape: tuple[int, int, int], wobble: np.random.Generator, position: _Position) -> None:
        axes = [(np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1 for n in shape]
        self.z, self.y, self.x = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
        # A smooth warp makes every outline a little irregular.
        a, b, c, d = wobble.uniform(0, 2 * np.pi, 4)
        self.x = self.x + 0.015 * np.sin(7 * self.y + a) + 0.01 * np.sin(5 * self.z + b)
        self.y = self.y + 0.015 * np.sin(6 * self.z + c) + 0.01 * np.sin(9 * self.y + d)
        self.x, self.y = position.to_body(self.x, self.y)
        self.labels = np.zeros(shape, np.uint8)

    def ellipsoid(self, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        (x, y, z), (rx, ry, rz) = centre, radii
        return ((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2 + ((self.z - z) / rz) ** 2 < 1

    def tube(self, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        """An upright elliptic cylinder through the whole field."""
        (x, y), (rx, ry) = centre, radii
        return np.broadcast_to(((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2 < 1, self.labels.shape)

    def paint(self, name: str, where: np.ndarray, only: Sequence[str] = ()) -> None:
        """Sets a label, only over the labels `only` where given."""
        if only:
            where = where & np.isin(self.labels, [LABELS[n] for n in only])
        self.labels[where] = LABELS[name]


def _torso(canvas: _Canvas, r: np.random.Generator) -> tuple[float, float]:
    """Skin, fat, muscle and spine; returns the half-axes inside the muscle."""
    width, depth = r.uniform(0.78, 0.92), r.uniform(0.5, 0.62)
    fat = r.uniform(0.04, 0.14)
    canvas.paint("fat", canvas.tube((0.0, 0.0), (width, depth)))
    inner = (width - fat, depth - fat)
    canvas.paint("muscle", canvas.tube((0.0, 0.0), inner))
    canvas.paint("bone", canvas.tube((0.0, inner[1] - 0.16), (0.1, 0.09)))
    canvas.paint("bone", canvas.ellipsoid((0.0, inner[1] - 0.04, 0.0), (0.035, 0.08, 2.0)))
    canvas.paint("fat", canvas.tube((0.0, inner[1] - 0.06), (0.03, 0.025)))  # spinal canal
    return inner


def _chest(canvas: _Canvas, r: np.random.Generator) -> str:
    width, depth = _torso(canvas, r)
    for side in (-1, 1):
        lung = canvas.ellipsoid(
            (side * width * 0.5, -0.02, r.uniform(-0.15, 0.05)), (width * 0.43, depth * 0.8, r.uniform(1.0, 1.25))
        )
        canvas.paint("lung", lung, only=("muscle",))
        # Ribs: slanted rings in the chest wall.
        ring = canvas.tube((0.0, 0.0), (width * 0.99, depth * 0.99)) & ~canvas.tube(
            (0.0, 0.0), (width * 0.93, depth * 0.92)
        )
        slant = np.sin((canvas.z + 0.35 * canvas.y) * 20) > 0.45
        canvas.paint("bone", ring & slant & (canvas.x * side > 0), only=("muscle",))
    canvas.paint("muscle", canvas.tube((0.0, 0.02), (0.13, depth * 0.75)), only=("lung",))  # mediastinum
    heart = (r.uniform(0.08, 0.16), r.uniform(-0.12, -0.04), r.uniform(-0.55, -0.35))
    canvas.paint(
        "heart",
        canvas.ellipsoid(heart, (r.uniform(0.22, 0.28), r.uniform(0.19, 0.24), r.uniform(0.42, 0.52))),
        only=("lung", "muscle"),
    )
    canvas.paint("aorta", canvas.tube((0.09, depth - 0.3), (0.055, 0.055)), only=("lung", "muscle"))
    canvas.paint("liver", canvas.ellipsoid((-0.3, -0.02, -1.25), (0.42, 0.42, 0.5)), only=("lung", "muscle"))
    # Vessels in the lungs.
    for _ in range(26):
        side = r.choice((-1, 1))
        place = (side * r.uniform(0.22, width * 0.8), r.uniform(-0.3, 0.3), r.uniform(-0.9, 0.9))
        radius = r.uniform(0.012, 0.03)
        canvas.paint("heart", canvas.ellipsoid(place, (radius, radius, r.uniform(0.05, 0.2))), only=("lung",))
    return "lung"


def _abdomen(canvas: _Canvas, r: np.random.Generator) -> str:
    width, depth = _torso(canvas, r)
    canvas.paint("fat", canvas.tube((0.0, -0.03), (width * 0.88, depth * 0.8)), only=("muscle",))
    canvas.paint("aorta", canvas.tube((0.05, depth - 0.3), (0.045, 0.045)))
    canvas.paint("muscle", canvas.tube((-0.18, depth - 0.2), (0.09, 0.11)), only=("fat",))
    canvas.paint("muscle", canvas.tube((0.18, depth - 0.2), (0.09, 0.11)), only=("fat",))
    liver = (-width * r.uniform(0.42, 0.48), -0.04, r.uniform(0.4, 0.6))
    canvas.paint(
        "liver",
        canvas.ellipsoid(liver, (width * 0.44, depth * r.uniform(0.68, 0.78), r.uniform(0.65, 0.85))),
        only=("fat",),
    )
    canvas.paint(
        "spleen",
        canvas.ellipsoid((width * 0.66, 0.14, r.uniform(0.5, 0.7)), (0.14, r.uniform(0.18, 0.24), 0.35)),
        only=("fat",),
    )
    for side in (-1, 1):
        kidney = (side * r.uniform(0.36, 0.42), depth - 0.24, r.uniform(-0.15, 0.1))
        canvas.paint("kidney", canvas.ellipsoid(kidney, (0.11, 0.12, r.uniform(0.4, 0.5))), only=("fat", "liver"))
        canvas.paint(
            "fat", canvas.ellipsoid((kidney[0] - side * 0.05, *kidney[1:]), (0.05, 0.05, 0.15)), only=("kidney",)
        )
    for _ in range(14):
        place = (r.uniform(-0.55, 0.6), r.uniform(-0.32, 0.05), r.uniform(-1, 0.3))
        canvas.paint(
            "bowel",
            canvas.ellipsoid(place, (r.uniform(0.08, 0.15), r.uniform(0.07, 0.11), r.uniform(0.1, 0.25))),
            only=("fat",),
        )
    return "liver"


def _head(canvas: _Canvas, r: np.random.Generator) -> str:
    width, depth, top = r.uniform(0.68, 0.76), r.uniform(0.82, 0.9), r.uniform(0.95, 1.1)
    canvas.paint("fat", canvas.ellipsoid((0.0, 0.0, -0.1), (width, depth, top)))
    canvas.paint("bone", canvas.ellipsoid((0.0, 0.0, -0.1), (width - 0.045, depth - 0.045, top - 0.05)))
    inside = (width - 0.1, depth - 0.1, top - 0.11)
    canvas.paint("ventricle", canvas.ellipsoid((0.0, 0.0, -0.1), inside))  # cerebrospinal fluid under the skull
    brain = tuple(v - r.uniform(0.015, 0.035) for v in inside)
    canvas.paint("grey matter", canvas.ellipsoid((0.0, 0.0, -0.1), brain))
    angle = np.arctan2(canvas.y, canvas.x)
    fold = 1 + 0.05 * np.sin(11 * angle + 9 * canvas.z + r.uniform(0, 6)) + 0.04 * np.sin(17 * angle - 6 * canvas.z)
    white = tuple(v - 0.09 for v in brain)
    deep = (canvas.x / white[0]) ** 2 + (canvas.y / white[1]) ** 2 + ((canvas.z + 0.1) / white[2]) ** 2
    canvas.paint("white matter", deep < fold - 0.06, only=("grey matter",))
    size = r.uniform(0.75, 1.35)
    for side in (-1, 1):
        canvas.paint(
            "ventricle",
            canvas.ellipsoid((side * 0.1, -0.1, 0.05), (0.06 * size, 0.28 * size, 0.22)),
            only=("white matter", "grey matter"),
        )
        canvas.paint(
            "grey matter", canvas.ellipsoid((side * 0.2, 0.02, -0.05), (0.08, 0.13, 0.14)), only=("white matter",)
        )
    canvas.paint(
        "ventricle", canvas.ellipsoid((0.0, 0.0, 0.0), (0.012, depth * 0.9, 0.8)), only=("grey matter", "white matter")
    )
    return "white matter"


_REGIONS = {"chest": _chest, "abdomen": _abdomen, "head": _head}


def _lesion(canvas: _Canvas, organ: str, r: np.random.Generator) -> None:
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
    anatomy = _generator(seed, patient, region)
    if lesion is None:
        lesion = bool(anatomy.random() < 0.5)
    # All series of a patient have one situs; the patient lies anew, at another phase, for every region.
    situs = SITUS[int(varied and _generator(seed, patient, "situs").random() < 0.5)]
    variation = _generator(seed, patient, region, "variation")
    position = _Position.varied(variation, mirrored=situs == "inversus") if varied else _Position()
    enhancement = variation.random() if varied else None
    factor = NOISE if varied else 1.0
    canvas = _Canvas((slices, size * SUPERSAMPLING, size * SUPERSAMPLING), anatomy, position)
    organ = _REGIONS[region](canvas, anatomy)
    if lesion:
        _lesion(canvas, organ, anatomy)

    noise = _generator(seed, patient, region, contrast)
    values = _ct(canvas.labels, noise, region, enhancement) if contrast == "CT" else _mr(canvas.labels, noise, contrast)
    values = _average(values)
    if contrast == "CT":
        values = values + noise.normal(0, factor * CT_NOISE_HU, values.shape)
        values = np.maximum(ndimage.gaussian_filter(values, (0, 0.5, 0.5)), -1024)
    else:
        # Rician: the magnitude of a complex signal with noise in both parts.
        sigma = factor * noise.uniform(10, 22)
        values = np.hypot(values + noise.normal(0, sigma, values.shape), noise.normal(0, sigma, values.shape))
    fields = np.stack([_average((canvas.labels == number).astype(np.float32)) for number in range(len(LABELS))])
    across, along = EXTENT[region]
    return Volume(
        values=values.astype(np.float32), labels=fields.argmax(axis=0).astype(np.uint8),
        spacing=(along / slices, across / size, across / size), region=region, contrast=contrast, lesion=lesion,
        situs=situs,
    )  # fmt: skip


def _check_size(size: int, slices: int) -> None:
    if size < 32 or slices < 4:
        raise UserError(f"a series of {slices} slices of {size} px is too small; it takes at least 4 of 32 px")
    if size > 2048 or slices > 2048:
        raise UserError(f"a series of {slices} slices of {size} px is too large; at most 2,048 of either")


def _average(fine: Float[np.ndarray, "slices fine_rows fine_columns"]) -> Float[np.ndarray, "slices rows columns"]:
    slices, rows, columns = fine.shape
    n = SUPERSAMPLING
    return fine.reshape(slices, rows // n, n, columns // n, n).mean(axis=(2, 4))


def _ct(
    labels: UInt8[np.ndarray, "s r c"], r: np.random.Generator, region: str, enhancement: float | None
) -> Float[np.ndarray, "s r c"]:
    """`enhancement` goes from 0, before the contrast agent, to 1, at its peak; None is the portal-venous phase of HU."""
    means = np.array([HU[name][0] for name in LABELS], np.float32)
    if enhancement is not None:
        for name, (before, peak) in ENHANCEMENT.items():
            means[LABELS[name]] = before + enhancement * (peak - before)
    # Lesions differ little from their organ in the liver, and much in the lung.
    lesion = {"chest": r.uniform(-20, 60), "abdomen": means[LABELS["liver"]] - r.uniform(30, 60), "head": 45.0}[region]
    means[LABELS["lesion"]] = lesion
    means[1:] += r.normal(0, 4, len(means) - 1)  # patients and scanners differ
    texture = np.array([HU[name][1] for name in LABELS], np.float32)
    grain = ndimage.gaussian_filter(r.standard_normal(labels.shape).astype(np.float32), (0, 1.5, 1.5))
    return means[labels] + texture[labels] * grain / grain.std()


def _mr(labels: UInt8[np.ndarray, "s r c"], r: np.random.Generator, contrast: str) -> Float[np.ndarray, "s r c"]:
    signal = np.array([MR[contrast].get(name, 0.4) for name in LABELS], np.float32)
    signal[1:] *= r.uniform(0.92, 1.08, len(signal) - 1)
    slices, rows, columns = labels.shape
    z, y, x = np.meshgrid(
        *(np.linspace(-1, 1, n, dtype=np.float32) for n in (slices, rows, columns)), indexing="ij", sparse=True
    )
    a, b, c = r.uniform(-0.18, 0.18, 3)
    bias = 1 + a * x + b * y + c * z - 0.12 * (x**2 + y**2)
    return 1000.0 * signal[labels] * bias


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
