"""The pictures of every task: one function each, from a patient to one or more pictures.

Classes differ in shape, place and extent. Brightness overlaps, so that it tells little by itself.
"""

from collections.abc import Sequence

import numpy as np

from data_pipeline import synthetic_anatomy as anatomy
from data_pipeline.synthetic_anatomy import LABELS, Canvas
from data_pipeline.synthetic_tasks import organs
from data_pipeline.synthetic_tasks.pictures import (
    Patient,
    Picture,
    along,
    blob,
    distance_to,
    expose,
    mask,
    point_inside,
    view,
)  # fmt: skip

BRAIN = ("white matter", "grey matter", "ventricle")


def _label(canvas: Canvas, *names: str) -> np.ndarray:
    return np.isin(canvas.labels, [LABELS[name] for name in names])


# ---- organ recognition


def _organ_pictures(patient: Patient, contrast: str, regions: organs.Regions) -> list[Picture]:
    """A third of the organs, each in one slice: three patients after each other show all."""
    every = [organ for names in regions.values() for organ in names]
    third = -(-len(every) // 3)
    start = patient.number % 3 * third
    wanted = every[start : start + third]
    pictures = []
    for region, names in regions.items():
        chosen = [organ for organ in names if organ in wanted]
        if not chosen:
            continue
        canvas = view(patient, organs.OrganCanvas, at=np.linspace(-0.8, 0.8, 5) + patient.r.uniform(-0.1, 0.1))
        organs.REGIONS[region](canvas, patient.r)
        image = expose(canvas, contrast, patient.r)
        for organ in chosen:
            where = canvas.organ(organ)
            areas = np.count_nonzero(where, axis=(1, 2))
            if not areas.any():  # it lies between the slices
                continue
            k = int(patient.r.choice(np.flatnonzero(areas >= 0.6 * areas.max())))
            columns = {"organ": organ, "modality": "CT" if contrast == "CT" else "MR"}
            pictures.append(Picture(image[..., k], mask(where[k : k + 1]), every.index(organ), columns))
    return pictures


def ct_organs(patient: Patient) -> list[Picture]:
    return _organ_pictures(patient, "CT", organs.CT)


def mr_organs(patient: Patient) -> list[Picture]:
    return _organ_pictures(patient, str(patient.r.choice(("T1", "T2"))), organs.MR)


# ---- head


def age(patient: Patient) -> list[Picture]:
    """Ventricles and the fluid around the brain widen with age, at a pace of the patient's own."""
    r = patient.r
    years = r.uniform(20, 86)
    atrophy = float(np.clip((years - 20) / 66 + r.normal(0, 0.1), 0, 1.1))
    canvas = view(patient, at=(-0.1, 0.05, 0.2))
    anatomy.head(canvas, r, atrophy)
    volume = expose(canvas, "T1", r)
    return [Picture(volume[..., k], target=round(years, 1)) for k in range(volume.shape[-1])]


def alzheimer(patient: Patient) -> list[Picture]:
    """More atrophy than others have, in the whole volume."""
    r = patient.r
    atrophy = r.uniform(0.5, 1.0) if patient.target else r.uniform(0.0, 0.65)
    canvas = view(patient, at=np.linspace(-0.4, 0.5, 8))
    anatomy.head(canvas, r, float(atrophy))
    return [Picture(expose(canvas, "T1", r))]


def stroke(patient: Patient) -> list[Picture]:
    """A wedge of the brain, from deep to the surface, is dark; in the middle slice. Healthy brains have atrophy as often."""
    r = patient.r
    canvas = view(patient, at=np.linspace(-0.25, 0.35, 5))
    anatomy.head(canvas, r, float(r.uniform(0, 0.7)))
    direction, width = r.uniform(-np.pi, np.pi), r.uniform(0.35, 0.6)
    turn = (np.arctan2(canvas.y, canvas.x) - direction + np.pi) % (2 * np.pi) - np.pi
    wedge = (np.abs(turn) < width) & (np.hypot(canvas.x, canvas.y) > r.uniform(0.28, 0.4))
    near = np.abs(np.arange(5) - 2)[:, None, None] <= int(r.integers(0, 3))
    if patient.target:
        canvas.paint("lesion", wedge & near, only=BRAIN)
    return [Picture(expose(canvas, "T1", r, lesion=r.uniform(0.2, 0.42)))]


def haemorrhage(patient: Patient) -> list[Picture]:
    """Blood as a crescent under the skull or as a mass in the brain. Calcified plexus is bright in everybody."""
    r = patient.r
    canvas = view(patient, at=(r.uniform(-0.2, 0.4),))
    anatomy.head(canvas, r, float(r.uniform(0, 0.8)))
    for side in (-1, 1):
        plexus = blob(canvas, (side * r.uniform(0.09, 0.14), r.uniform(0.02, 0.12), float(canvas.z.mean())), 0.035, r)
        canvas.paint("lesion", plexus, only=BRAIN)
    if patient.target and r.random() < 0.5:
        direction, width = r.uniform(-np.pi, np.pi), r.uniform(0.6, 1.1)
        turn = (np.arctan2(canvas.y, canvas.x) - direction + np.pi) % (2 * np.pi) - np.pi
        thickness = r.uniform(0.1, 0.17) * np.cos(np.clip(turn / width, -1, 1) * np.pi / 2)
        canvas.paint("blood", distance_to(_label(canvas, "bone"), canvas) < thickness, only=BRAIN)
    elif patient.target:
        centre = point_inside(_label(canvas, "white matter"), canvas, r)
        if centre is not None:
            canvas.paint("blood", blob(canvas, centre, r.uniform(0.13, 0.22), r, lobes=3, depth=0.2), only=BRAIN)
    return [Picture(expose(canvas, "CT", r, blood=r.uniform(65, 95), lesion=r.uniform(90, 200)))]


# ---- chest


def _nodule(patient: Patient, at: Sequence[float]) -> tuple[Canvas, np.ndarray]:
    """A lung nodule in the middle of the field, and the ball around it that the mask is: round, or with spikes where it is
    malignant. Sizes overlap. A halo and vessels, as wide and as many in both classes, hide the edge from a histogram.
    """
    r = patient.r
    centre = (r.choice((-1, 1)) * r.uniform(0.32, 0.48), r.uniform(-0.18, 0.12), 0.0)
    canvas = view(patient, at=at, centre=centre[:2], half_width=0.42)
    anatomy.chest(canvas, r)
    radius, halo = r.uniform(0.1, 0.16), r.uniform(0.02, 0.08)
    lobes, depth = (int(r.integers(5, 9)), r.uniform(0.3, 0.5)) if patient.target else (2, r.uniform(0, 0.15))
    canvas.paint("gland", blob(canvas, centre, radius + halo, r), only=("lung",))
    for _ in range(int(r.integers(1, 5))):
        angle = r.uniform(-np.pi, np.pi)
        end = centre[0] + 0.4 * np.cos(angle), centre[1] + 0.4 * np.sin(angle)
        share, off = along(centre[:2], end, canvas.x, canvas.y)
        canvas.paint("vein", (share > 0.3) & (off < r.uniform(0.01, 0.02)), only=("lung", "gland"))
    # As large as a round one: spikes add depth^2 / 2 to the area.
    canvas.paint("lesion", blob(canvas, centre, radius / (1 + depth**2 / 2) ** 0.5, r, lobes=lobes, depth=depth))
    return canvas, blob(canvas, centre, r.uniform(0.24, 0.28), r, height=1.0)


def _nodule_image(canvas: Canvas, r: np.random.Generator) -> np.ndarray:
    return expose(canvas, "CT", r, lesion=r.uniform(-20, 60), gland=r.uniform(-800, -100))


def nodule_slice(patient: Patient) -> list[Picture]:
    """Malignant nodules have spikes. Sizes, HU and what surrounds them overlap."""
    canvas, around = _nodule(patient, (-0.06, 0.06))
    image, where = _nodule_image(canvas, patient.r), mask(around)
    return [Picture(image[..., k], where[..., k]) for k in range(2)]


def nodule_volume(patient: Patient) -> list[Picture]:
    """Malignant nodules have spikes. Sizes, HU and what surrounds them overlap."""
    canvas, around = _nodule(patient, tuple(np.linspace(-0.12, 0.12, 5)))
    return [Picture(_nodule_image(canvas, patient.r), mask(around))]


def lung_infection(patient: Patient) -> list[Picture]:
    """0 healthy; 1 pneumonia, one dense area on one side; 2 COVID-19, patches under the pleura on both sides."""
    r = patient.r
    canvas = view(patient, at=(r.uniform(-0.3, 0.0), r.uniform(0.1, 0.4)))
    anatomy.chest(canvas, r)
    lung = _label(canvas, "lung")
    if patient.target == 1:
        x, y, z = r.choice((-1, 1)) * r.uniform(0.3, 0.45), r.uniform(-0.15, 0.2), float(canvas.z.mean())
        canvas.paint("lesion", blob(canvas, (x, y, z), r.uniform(0.2, 0.3), r, lobes=3, depth=0.2), only=("lung",))
    elif patient.target == 2:
        rim = distance_to(~lung & ~_label(canvas, "heart"), canvas) < 0.12
        for side in (-1, 1):
            for _ in range(int(r.integers(2, 5))):
                centre = point_inside(lung & rim & (side * canvas.x > 0.1), canvas, r)
                if centre is not None:
                    patch = blob(canvas, centre, r.uniform(0.1, 0.17), r, lobes=3, depth=0.3, height=4)
                    canvas.paint("lesion", patch & rim, only=("lung",))
    volume = expose(canvas, "CT", r, lesion=r.uniform(-550, -100))
    return [Picture(volume[..., k]) for k in range(2)]


def infarction(patient: Patient) -> list[Picture]:
    """Late enhancement of a sector of the heart's wall, from the inside. The fat outside is as bright in everybody."""
    r = patient.r
    canvas = view(patient, at=(-0.4, 0.0, 0.4), half_width=0.9)
    x, y = canvas.x - 0.05, canvas.y
    radius = np.hypot(x, y) * (1 + 0.15 * canvas.z)
    canvas.paint("muscle", canvas.tube((0, 0), (1.2, 1.2)))
    canvas.paint("lung", canvas.tube((0.1, 0.05), (0.95, 0.8)))
    canvas.paint("fat", (np.abs(radius - 0.62) < 0.08) & (y > r.uniform(-0.3, 0.3)))
    canvas.paint("blood", canvas.tube((-0.42, -0.1), (0.35, 0.45)))  # right ventricle
    inside, outside = r.uniform(0.26, 0.34), r.uniform(0.44, 0.54)
    wall = (radius > inside) & (radius < outside)
    canvas.paint("heart", radius < outside)
    canvas.paint("blood", radius < inside)
    for angle in r.uniform(-np.pi, np.pi, 2):  # papillary muscles
        canvas.paint("heart", np.hypot(x - 0.7 * inside * np.cos(angle), y - 0.7 * inside * np.sin(angle)) < 0.05)
    if patient.target:
        turn = (np.arctan2(y, x) - r.uniform(-np.pi, np.pi)) % (2 * np.pi)
        deep = inside + r.uniform(0.4, 1.0) * (outside - inside)
        canvas.paint("lesion", wall & (turn < r.uniform(0.8, 1.8)) & (radius < deep))
    volume, where = expose(canvas, "T1", r, heart=r.uniform(0.15, 0.25), lesion=r.uniform(0.7, 1.0)), mask(wall)
    return [Picture(volume[..., k], where[..., k]) for k in range(3)]


# ---- abdomen


def _kidney_lesion(patient: Patient, radius: float, bulges: float) -> list[Picture]:
    r = patient.r
    side = r.choice((-1, 1))
    canvas = view(patient, at=(-0.08, 0.0, 0.08), centre=(side * 0.4, 0.2), half_width=0.5)
    anatomy.abdomen(canvas, r)
    centre = point_inside(_label(canvas, "kidney") & (side * canvas.x > 0), canvas, r) or (side * 0.4, 0.2, 0.0)
    edge = (centre[0] + side * 0.08, centre[1], 0.0)
    where = blob(canvas, edge, radius, r, lobes=int(r.integers(4, 7)), depth=bulges)
    canvas.paint("lesion", where, only=("kidney", "fat", "muscle", "bowel", "liver"))
    volume = expose(canvas, "CT", r, lesion=r.uniform(10, 90))
    lesion = mask(_label(canvas, "lesion"))
    return [Picture(volume[..., k], lesion[..., k]) for k in range(3)]


def kidney_lesion(patient: Patient) -> list[Picture]:
    """Cysts are round; tumours have bulges. Sizes and HU overlap."""
    r = patient.r
    if patient.target:
        return _kidney_lesion(patient, r.uniform(0.13, 0.21), r.uniform(0.2, 0.4))
    return _kidney_lesion(patient, r.uniform(0.09, 0.16), r.uniform(0, 0.08))


def kidney_survival(patient: Patient) -> list[Picture]:
    """The hazard grows with the tumour's size and bulges, which the picture shows, and with age and stage.

    Times are exponential with that hazard; follow-up ends at random between one and eight years.
    """
    r = patient.r
    size, bulges, years, stage = r.uniform(0, 1), r.uniform(0, 1), r.uniform(40, 85), int(r.integers(1, 5))
    risk = 3.0 * (size - 0.5) + 1.5 * (bulges - 0.5) + 0.02 * (years - 62) + 0.2 * (stage - 2.5)
    months, follow_up = r.exponential(60 * np.exp(-risk)), r.uniform(12, 96)
    time, event = round(float(max(min(months, follow_up), 0.1)), 1), int(months <= follow_up)
    columns = {"time": time, "event": event, "age": round(years, 1), "sex": str(r.choice(("f", "m"))), "stage": stage}
    return [
        picture._replace(target=time, columns=columns)
        for picture in _kidney_lesion(patient, 0.09 + 0.12 * size, 0.4 * bulges)
    ]


def abdominal_trauma(patient: Patient) -> list[Picture]:
    """A dark, jagged tear in liver, spleen or kidney, and blood around the organ. Everybody's liver has bright vessels."""
    r = patient.r
    canvas = view(patient, at=(r.uniform(0.3, 0.6), r.uniform(0.05, 0.3)))
    anatomy.abdomen(canvas, r)
    wave = 0.03 * np.sin(18 * canvas.x + r.uniform(0, 6)) + 0.02 * np.sin(31 * canvas.y)
    for n in range(3):
        organ = "liver" if n else str(r.choice(("liver", "spleen", "kidney"), p=(0.5, 0.3, 0.2)))
        centre = point_inside(_label(canvas, organ), canvas, r)
        if centre is None or (n == 0 and not patient.target):
            continue
        angle, length = r.uniform(0, np.pi), r.uniform(0.25, 0.4) if organ == "liver" else 0.2
        step = (length / 2 * np.cos(angle), length / 2 * np.sin(angle))
        share, off = along(
            (centre[0] - step[0], centre[1] - step[1]), (centre[0] + step[0], centre[1] + step[1]), canvas.x, canvas.y
        )
        on = (share > 0) & (share < 1)
        if n:
            canvas.paint("vein", on & (off < 0.015), only=("liver",))
        else:
            canvas.paint("lesion", on & (np.abs(off + wave) < 0.05 * (1.2 - share)), only=(organ,))
            ring = distance_to(_label(canvas, organ, "lesion"), canvas) < r.uniform(0.03, 0.08)
            canvas.paint("blood", ring & (canvas.y > centre[1] - 0.2), only=("fat", "bowel"))
    volume = expose(canvas, "CT", r, lesion=r.uniform(20, 60), blood=r.uniform(20, 60))
    return [Picture(volume[..., k]) for k in range(2)]


# DeepLesion's eight types of site.
SITES = ("bone", "abdomen", "mediastinum", "liver", "lung", "kidney", "soft_tissue", "pelvis")


def lesion_site(patient: Patient) -> list[Picture]:
    """The same lesion in eight places; size and HU tell nothing."""
    r = patient.r
    site = SITES[patient.target]
    region = {
        "mediastinum": "chest", "lung": "chest", "pelvis": "pelvis", "bone": str(r.choice(("chest", "abdomen", "pelvis"))),
        "soft_tissue": str(r.choice(("chest", "abdomen", "pelvis"))),
    }.get(site, "abdomen")  # fmt: skip
    canvas = view(patient, organs.OrganCanvas, at=(r.uniform(0.0, 0.15),))
    organs.REGIONS[region](canvas, r)
    width, depth = canvas.inner
    in_cavity = (canvas.x / width) ** 2 + (canvas.y / depth) ** 2 < 0.6
    where = {
        "bone": _label(canvas, "bone"), "abdomen": _label(canvas, "bowel", "fat") & in_cavity,
        "mediastinum": (np.abs(canvas.x) < 0.2) & _label(canvas, "muscle", "heart", "aorta") & in_cavity,
        "liver": _label(canvas, "liver"), "lung": _label(canvas, "lung"), "kidney": _label(canvas, "kidney"),
        "soft_tissue": _label(canvas, "fat", "muscle") & ~in_cavity & (np.abs(canvas.x) > 0.25),
        "pelvis": _label(canvas, "fat", "bowel", "water") & in_cavity,
    }[site]  # fmt: skip
    centre = point_inside(where, canvas, r) or (0.0, 0.0, 0.0)
    lesion = blob(canvas, centre, r.uniform(0.07, 0.12), r, lobes=3, depth=0.15) & ~_label(canvas, "outside")
    canvas.paint("lesion", lesion)
    return [Picture(expose(canvas, "CT", r, lesion=r.uniform(20, 80)), mask(lesion))]


# ---- spine


def _narrowing(patient: Patient) -> float:
    """Share of the passage that is lost: none or little, some, most."""
    return float(patient.r.uniform(*((0.0, 0.3), (0.35, 0.6), (0.65, 0.95))[patient.target]))


def _sagittal_spine(canvas: Canvas, r: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Vertebrae and discs; returns, of every point, its distance behind their middle, and the places of the discs."""
    bend, phase = r.uniform(0.06, 0.14), r.uniform(-0.4, 0.4)
    back = canvas.y + 0.1 - bend * np.cos(1.6 * canvas.z + phase)
    spacing = r.uniform(0.34, 0.4)
    canvas.paint("fat", np.broadcast_to(canvas.y < 0.95, canvas.labels.shape))
    canvas.paint("bowel", np.broadcast_to((canvas.y < -0.4) & (np.sin(9 * canvas.z) > -0.6), canvas.labels.shape))
    canvas.paint("muscle", (back > 0.38) & (canvas.y < 0.75))
    discs = [n * spacing + r.uniform(-0.02, 0.02) for n in (-2, -1, 0, 1, 2)]
    spine = np.abs(back) < 0.2
    canvas.paint("marrow", np.broadcast_to(spine, canvas.labels.shape))
    for z in discs:
        canvas.paint("disc", spine & (np.abs(canvas.z - z) < 0.055))
    return back, np.broadcast_to(canvas.z, canvas.labels.shape), discs


def canal_stenosis(patient: Patient) -> list[Picture]:
    """A disc narrows the canal from the front, in a T2-weighted sagittal slice; the mask is the level."""
    r = patient.r
    canvas = view(patient, plane="sagittal", at=(-0.03, 0.03))
    back, z, discs = _sagittal_spine(canvas, r)
    level = discs[int(r.integers(1, 4))]
    wide = r.uniform(0.15, 0.2)
    behind = 0.2 + wide * _narrowing(patient) * np.exp(-(((z - level) / 0.09) ** 2))
    canal = (back > 0.2) & (back < 0.2 + wide)
    canvas.paint("ligament", canal)
    canvas.paint("water", canal & (back > behind))
    canvas.paint("grey matter", canal & (back > behind) & (np.abs(back - 0.2 - 0.6 * wide) < 0.03))
    canvas.paint("marrow", (back > 0.24 + wide) & (back < 0.6) & (np.sin((z - level) * 16) > 0.2), only=("muscle",))
    volume, where = expose(canvas, "T2", r), mask((back > 0.1) & (back < 0.3 + wide) & (np.abs(z - level) < 0.14))
    return [Picture(volume[..., k], where[..., k]) for k in range(2)]


def foraminal_narrowing(patient: Patient) -> list[Picture]:
    """The fat around a nerve root is lost, in a T1-weighted sagittal slice beside the canal; the mask is the level."""
    r = patient.r
    canvas = view(patient, plane="sagittal", at=(0.27, 0.33))
    back, z, discs = _sagittal_spine(canvas, r)
    level = discs[int(r.integers(1, 4))]
    canvas.paint("marrow", (back >= 0.2) & (back < 0.5))  # pedicles and facets
    for disc in discs:
        lost = _narrowing(patient) if disc == level else r.uniform(0, 0.2)
        foramen = ((back - 0.31) / (0.12 * (1 - 0.8 * lost))) ** 2 + ((z - disc) / (0.13 * (1 - 0.5 * lost))) ** 2
        canvas.paint("ligament", ((back - 0.31) / 0.13) ** 2 + ((z - disc) / 0.14) ** 2 < 1)
        canvas.paint("fat", foramen < 1)
        canvas.paint("muscle", np.hypot(back - 0.31, z - disc - 0.03) < 0.04)
    volume, where = expose(canvas, "T1", r), mask((np.abs(back - 0.31) < 0.16) & (np.abs(z - level) < 0.17))
    return [Picture(volume[..., k], where[..., k]) for k in range(2)]


def subarticular_stenosis(patient: Patient) -> list[Picture]:
    """The corner of the canal beside a facet is lost, in a T2-weighted axial slice; the mask is that corner."""
    r = patient.r
    canvas = view(patient, at=(-0.05, 0.05), half_width=0.9)
    side = r.choice((-1, 1))
    canvas.paint("fat", canvas.tube((0, 0), (0.95, 0.85)))
    canvas.paint("muscle", canvas.tube((0, 0.1), (0.85, 0.65)))
    canvas.paint("disc", canvas.tube((0, -0.3), (0.45, 0.32)))
    canvas.paint("marrow", canvas.tube((0, 0.5), (0.06, 0.2)))
    canvas.paint("water", canvas.tube((0, 0.12), (0.22, 0.16)))
    canvas.paint("grey matter", canvas.tube((0, 0.18), (0.12, 0.05)))
    for s in (-1, 1):
        lost = _narrowing(patient) if s == side else r.uniform(0, 0.2)
        canvas.paint("water", canvas.tube((s * 0.22, 0.08), (0.11, 0.09)))
        canvas.paint("marrow", canvas.tube((s * (0.46 - 0.05 * lost), 0.28), (0.12, 0.14)))
        canvas.paint("ligament", canvas.tube((s * (0.4 - 0.2 * lost), 0.08), (0.1, 0.13)), only=("water", "disc"))
    volume = expose(canvas, "T2", r)
    where = mask(np.broadcast_to(np.hypot(canvas.x - side * 0.25, canvas.y - 0.08) < 0.2, canvas.labels.shape))
    return [Picture(volume[..., k], where[..., k]) for k in range(2)]


# ---- knee


def ligament_tear(patient: Patient) -> list[Picture]:
    """The anterior cruciate ligament: 0 intact, with fluid beside it; 1 fluid in half of its thickness; 2 fluid parts it.

    The pocket of fluid and the ligament are as large in all of them: only where they lie tells.
    """
    r = patient.r
    canvas = view(patient, plane="sagittal", at=np.linspace(-0.3, 0.3, 7), half_width=0.85)
    x, y, z = (np.broadcast_to(axis, canvas.labels.shape) for axis in (canvas.x, canvas.y, canvas.z))
    canvas.paint("fat", np.abs(y) < 0.9)
    canvas.paint("muscle", (y > 0.5) & (y < 0.8))
    canvas.paint("marrow", canvas.ellipsoid((0, 0.05, 0.5), (2, 0.5, 0.42)) | ((z > 0.5) & (np.abs(y - 0.05) < 0.3)))
    canvas.paint("marrow", (z < -0.2) & (np.abs(y) < 0.5))
    notch = (np.abs(x) < 0.22) & (np.hypot((y - 0.15) / 0.45, (z - 0.1) / 0.3) < 1)
    canvas.paint("gland", notch)
    canvas.paint("ligament", np.hypot(y + 0.75, (z - 0.05) / 6) < 0.05)  # of the patella
    canvas.paint(
        "ligament", notch & (np.abs(np.hypot(y - 0.1, z + 0.2) - 0.38) < 0.05) & (y > 0.1)
    )  # the posterior one
    upper, lower = (0.38 + r.uniform(-0.04, 0.04), 0.3), (-0.2 + r.uniform(-0.05, 0.05), -0.18)
    share, off = along(lower, upper, y, z)
    # Everybody has some fluid in front.
    front = canvas.ellipsoid((0, -0.55, 0.35), (0.3, r.uniform(0.05, 0.15), r.uniform(0.1, 0.3)))
    canvas.paint("water", front, only=("fat",))
    # Fluid that lies in the ligament hides a part of it, which the rest makes up for.
    thickness = r.uniform(0.05, 0.08) * (0.6, 0.78, 1.0)[patient.target]
    pocket, length, middle = r.uniform(0.08, 0.095), r.uniform(0.12, 0.2), r.uniform(0.4, 0.6)
    canvas.paint("ligament", (np.abs(x) < 0.14) & (share > 0) & (share < 1) & (off < thickness))
    beside = (thickness + pocket + r.uniform(0.0, 0.03), pocket, r.uniform(0.0, 0.01))[patient.target]
    signed = off * np.where((z - lower[1]) * (upper[0] - lower[0]) < (y - lower[0]) * (upper[1] - lower[1]), -1, 1)
    where = (np.abs(share - middle) < length) & (np.abs(signed - r.choice((-1, 1)) * beside) < pocket)
    canvas.paint("water", (np.abs(x) < 0.14) & where)
    region = (np.abs(x) < 0.2) & (share > -0.1) & (share < 1.1) & (off < 0.28)
    return [Picture(expose(canvas, "T2", r, gland=0.45), mask(region))]
