"""The organs of the recognition tasks, in five regions of the body; names are those of TotalSegmentator where it has the organ."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from data_pipeline import synthetic_anatomy as anatomy
from data_pipeline.synthetic_anatomy import LABELS, Canvas

SIDES = ((1, "left"), (-1, "right"))


def _pairs(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_{side}" for name in names for _, side in SIDES)


_CHEST = (
    "heart", "aorta", "esophagus", "vertebrae_thoracic", "spinal_cord", *_pairs("scapula", "autochthon"),
)  # fmt: skip
_ABDOMEN = (
    "liver", "spleen", "gallbladder", "stomach", "pancreas", "duodenum", "small_bowel", "colon", "inferior_vena_cava",
    "portal_vein_and_splenic_vein", "vertebrae_lumbar", *_pairs("kidney", "adrenal_gland", "iliopsoas"),
)  # fmt: skip
_PELVIS = (
    "urinary_bladder", "prostate", "sacrum",
    *_pairs("hip", "femur", "gluteus_maximus", "gluteus_medius", "gluteus_minimus", "iliac_artery", "iliac_vena"),
)  # fmt: skip
_THIGH = _pairs("quadriceps_femoris", "thigh_medial_compartment", "thigh_posterior_compartment", "sartorius")
_HEAD = ("brain", "skull")
_LOBES = {
    "left": ("lung_upper_lobe_left", "lung_lower_lobe_left"),
    "right": ("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right"),
}
Regions = Mapping[str, tuple[str, ...]]
# Organs by region; as many as CuriaBench has classes, 54 and 56.
CT: Regions = {
    "chest": (*_LOBES["left"], *_LOBES["right"], *_CHEST, "trachea", "sternum", *_pairs("rib")),
    "abdomen": _ABDOMEN, "pelvis": _PELVIS, "head": _HEAD,
}  # fmt: skip
MR: Regions = {
    "chest": (*_pairs("lung"), *_CHEST), "abdomen": (*_ABDOMEN, "intervertebral_discs"), "pelvis": _PELVIS,
    "thigh": _THIGH, "head": _HEAD,
}  # fmt: skip


class OrganCanvas(Canvas):
    """A canvas that keeps, beside the tissue of every voxel, the organ it belongs to."""

    def begin(self) -> None:
        """Forgets the organs; the body of a region is painted."""
        self._organs = np.zeros(self.labels.shape, np.uint8)
        self._numbers: dict[str, int] = {}

    def add(self, organ: str, tissue: str, where: np.ndarray, only: Sequence[str] = ()) -> None:
        """Paints an organ."""
        np.copyto(self._organs, self._number(organ), where=self.paint(tissue, where, only))

    def name(self, organ: str, tissue: str, where: np.ndarray | bool = True) -> None:
        """Names an organ that is painted: a tissue, within `where`."""
        np.copyto(self._organs, self._number(organ), where=(self.labels == LABELS[tissue]) & where)

    def organ(self, name: str) -> Bool[np.ndarray, "slices rows columns"]:
        """Where an organ is; a lung is its lobes."""
        side = name.removeprefix("lung_")
        parts = _LOBES[side] if side in _LOBES else (name,)
        return np.isin(self._organs, [self._numbers[part] for part in parts])

    def _number(self, organ: str) -> int:
        return self._numbers.setdefault(organ, len(self._numbers) + 1)


def chest(canvas: OrganCanvas, r: np.random.Generator) -> None:
    anatomy.chest(canvas, r)
    width, depth = canvas.inner
    x, y, z = canvas.x, canvas.y, canvas.z
    canvas.begin()
    above_oblique, above_horizontal = z > 1.3 * y, z > 0.15
    canvas.name("lung_lower_lobe_left", "lung", x > 0)
    canvas.name("lung_upper_lobe_left", "lung", (x > 0) & above_oblique)
    canvas.name("lung_lower_lobe_right", "lung", x <= 0)
    canvas.name("lung_middle_lobe_right", "lung", (x <= 0) & above_oblique)
    canvas.name("lung_upper_lobe_right", "lung", (x <= 0) & above_oblique & above_horizontal)
    canvas.name("heart", "heart", np.abs(x - 0.1) < 0.3)
    canvas.name("aorta", "aorta")
    canvas.name("vertebrae_thoracic", "bone", np.abs(x) < 0.15)
    canvas.add("spinal_cord", "fat", canvas.tube((0.0, depth - 0.07), (0.045, 0.04)), only=("bone", "fat"))
    for sign, side in SIDES:
        canvas.name(f"rib_{side}", "bone", (sign * x > 0.15) & (np.abs(x) < 2))
        canvas.name(f"autochthon_{side}", "muscle", (sign * x > 0.03) & (sign * x < 0.32) & (y > depth - 0.22))
        plate = canvas.ellipsoid((sign * width * 0.62, depth * 0.88, 0.35), (0.2, 0.06, 0.7))
        canvas.add(f"scapula_{side}", "bone", plate, only=("muscle", "fat", "bone", "lung"))
    canvas.add(
        "trachea", "outside", canvas.tube((0.0, 0.0), (0.055, 0.055)) & (z > 0), only=("muscle", "heart", "lung")
    )
    canvas.add("esophagus", "gland", canvas.tube((-0.02, 0.12), (0.05, 0.04)), only=("muscle", "lung", "heart"))
    canvas.add(
        "sternum", "bone", canvas.ellipsoid((0.0, -depth, 0.1), (0.12, 0.06, 0.7)), only=("muscle", "fat", "bone")
    )


def abdomen(canvas: OrganCanvas, r: np.random.Generator) -> None:
    anatomy.abdomen(canvas, r)
    _, depth = canvas.inner
    x, y, z = canvas.x, canvas.y, canvas.z
    canvas.begin()
    for organ, tissue in (("liver", "liver"), ("spleen", "spleen"), ("small_bowel", "bowel")):
        canvas.name(organ, tissue)
    canvas.name("vertebrae_lumbar", "bone")
    for sign, side in SIDES:
        canvas.name(f"kidney_{side}", "kidney", sign * x > 0)
        psoas = canvas.tube((sign * 0.18, depth - 0.2), (0.09, 0.11))
        canvas.name(f"iliopsoas_{side}", "muscle", psoas)
        canvas.name(f"autochthon_{side}", "muscle", ~psoas & (sign * x > 0.05) & (sign * x < 0.4) & (y > 0.55 * depth))
        adrenal = canvas.ellipsoid((sign * 0.3, depth - 0.3, 0.5), (0.055, 0.065, 0.25))
        canvas.add(f"adrenal_gland_{side}", "gland", adrenal, only=("fat", "liver", "kidney", "bowel"))
        colon = canvas.ellipsoid((sign * 0.6, 0.08, -0.35), (0.09, 0.1, 0.8))
        canvas.add("colon", "bowel", colon, only=("fat", "bowel"))
    for organ, tissue, centre, radii in (
        ("duodenum", "bowel", (-0.17, 0.0, 0.05), (0.08, 0.08, 0.35)),
        ("stomach", "bowel", (0.3, -0.2, 0.6), (0.22, 0.15, 0.45)),
        ("pancreas", "gland", (0.08, -0.01, 0.3), (0.24, 0.06, 0.2)),
        ("gallbladder", "water", (-0.25, -0.24, 0.15), (0.09, 0.1, 0.3)),
        ("portal_vein_and_splenic_vein", "vein", (-0.12, 0.03, 0.5), (0.2, 0.045, 0.15)),
    ):
        canvas.add(organ, tissue, canvas.ellipsoid(centre, radii), only=("fat", "liver", "bowel"))
    cava = canvas.tube((-0.1, depth - 0.3), (0.06, 0.045))
    canvas.add("inferior_vena_cava", "vein", cava, only=("fat", "liver", "bowel", "muscle"))
    between_vertebrae = np.sin(9 * z + 1) > 0.5
    spine = canvas.tube((0.0, depth - 0.16), (0.1, 0.09))
    canvas.add("intervertebral_discs", "disc", spine & between_vertebrae, only=("bone",))


def pelvis(canvas: OrganCanvas, r: np.random.Generator) -> None:
    width, depth = anatomy.torso(canvas, r)
    canvas.begin()
    canvas.paint("fat", canvas.tube((0.0, -0.05), (width * 0.85, depth * 0.85)), only=("muscle", "bone"))
    for _ in range(8):
        place = (r.uniform(-0.4, 0.4), r.uniform(-0.35, 0.0), r.uniform(0.1, 1))
        canvas.paint("bowel", canvas.ellipsoid(place, (0.12, 0.09, 0.2)), only=("fat",))
    canvas.add("sacrum", "bone", canvas.ellipsoid((0.0, depth - 0.12, 0.35), (0.2, 0.12, 0.7)))
    for sign, side in SIDES:
        # Largest first, so that the smaller lie in front.
        for organ, tissue, (cx, cy, cz), radii in (
            ("gluteus_maximus", "muscle", (0.36, depth - 0.06, -0.2), (0.3, 0.16, 0.9)),
            ("gluteus_medius", "muscle", (0.62, 0.14, 0.3), (0.14, 0.24, 0.6)),
            ("gluteus_minimus", "muscle", (0.6, -0.1, 0.15), (0.1, 0.14, 0.5)),
            ("hip", "bone", (0.46, 0.08, 0.25), (0.07, 0.27, 0.8)),
            ("femur", "bone", (0.58, 0.02, -0.6), (0.12, 0.12, 0.4)),
        ):
            canvas.add(f"{organ}_{side}", tissue, canvas.ellipsoid((sign * cx, cy, cz), radii))
        apart = 0.16 + 0.12 * (1 - canvas.z) / 2  # the vessels run to the sides on their way down
        for organ, tissue, dx, cy in (("iliac_artery", "aorta", 0.0, -0.02), ("iliac_vena", "vein", -0.03, 0.08)):
            vessel = (canvas.x - sign * (apart + dx)) ** 2 + (canvas.y - cy) ** 2 < 0.05**2
            canvas.add(f"{organ}_{side}", tissue, vessel, only=("fat", "bowel"))
    canvas.add("urinary_bladder", "water", canvas.ellipsoid((0.0, -0.18, -0.2), (0.2, 0.17, 0.45)))
    canvas.add("prostate", "gland", canvas.ellipsoid((0.0, 0.02, -0.7), (0.12, 0.1, 0.3)))


def thigh(canvas: OrganCanvas, r: np.random.Generator) -> None:
    canvas.begin()
    radius, fat = r.uniform(0.34, 0.4), r.uniform(0.03, 0.08)
    for sign, side in SIDES:
        middle = sign * 0.42
        canvas.paint("fat", canvas.tube((middle, 0.0), (radius, radius * 1.1)))
        muscle = canvas.tube((middle, 0.0), (radius - fat, 1.1 * (radius - fat)))
        angle = np.arctan2(canvas.y + 0.02, sign * (canvas.x - middle))  # 0 to the outside, a quarter turn to the back
        for organ, begin, end in (
            ("thigh_posterior_compartment", 0.45, 2.1), ("thigh_medial_compartment", 2.25, 3.6),
            ("quadriceps_femoris", -2.4, 0.3),
        ):  # fmt: skip
            within = (angle - begin) % (2 * np.pi) < end - begin
            canvas.add(f"{organ}_{side}", "muscle", muscle & within)
        canvas.paint("fat", muscle & (canvas.labels == LABELS["outside"]))
        canvas.paint("bone", canvas.tube((middle, -0.02), (0.075, 0.075)))
        canvas.paint("marrow", canvas.tube((middle, -0.02), (0.04, 0.04)))
        sartorius = canvas.tube((middle - sign * 0.2, -0.2), (0.07, 0.05))
        canvas.add(f"sartorius_{side}", "muscle", sartorius)


def head(canvas: OrganCanvas, r: np.random.Generator) -> None:
    anatomy.head(canvas, r)
    canvas.begin()
    canvas.name("skull", "bone")
    for tissue in ("white matter", "grey matter", "ventricle"):
        canvas.name("brain", tissue)


REGIONS: Mapping[str, Callable[[OrganCanvas, np.random.Generator], None]] = {
    "chest": chest, "abdomen": abdomen, "pelvis": pelvis, "thigh": thigh, "head": head,
}  # fmt: skip
