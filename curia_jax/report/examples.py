"""Cases that a probe got right and wrong, as windowed slices."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure

from curia_common import windows
from curia_jax.evaluate.pictures import Picture
from curia_jax.report import pictures
from curia_jax.report.curves import Predictions
from curia_jax.report.style import OURS, SOFT, STYLE, WIDTH
from data_pipeline.format.shards import SliceSource

EACH = 4  # right ones and wrong ones
LONGEST = 14  # characters of a class


class Image(NamedTuple):
    """A slice in real units, the window to show it in, and the mask that the task is about, if it has one."""

    pixels: Float[np.ndarray, "height width"]
    window: windows.Window
    mask: Bool[np.ndarray, "height width"] | None = None


Images = Callable[[Sequence[int]], Sequence[Image]]  # from numbers of slices in the test split


class Example(NamedTuple):
    """A case: `truth` and `predicted` are names of classes, `probability` that of the predicted one."""

    image: Image
    truth: str
    predicted: str
    probability: float


def from_shards(source: SliceSource, numbers: Sequence[int]) -> list[Image]:
    """Slices of a split."""
    slices = [source[number] for number in numbers]
    return [Image(one.real, pictures.display_window(one, one.real)) for one in slices]


def from_task(read: Callable[[Sequence[int]], Sequence[Picture]], numbers: Sequence[int]) -> list[Image]:
    """Rows of the test split of a task in the published schema; of a volume, its middle slice."""
    return [
        Image(one.values, pictures.range_window(one.values) if not one.hu else windows.window_for(one.values), one.mask)
        for one in read(numbers)
    ]


def choose(p: Predictions, images: Images, each: int = EACH) -> tuple[list[Example], list[Example]]:
    """The cases that were right, and those that were wrong, with the highest probabilities; of a patient at most one each."""
    predicted = p.probabilities.argmax(axis=1)
    right = predicted == p.targets
    chosen = [_surest(p, np.flatnonzero(right), each), _surest(p, np.flatnonzero(~right), each)]
    names = (*p.classes, "a class not learned")
    found = []
    for cases in chosen:
        shown = images([int(p.slices[case]) for case in cases]) if cases else []
        found.append(
            [
                Example(image, names[p.targets[case]], names[predicted[case]], float(p.probabilities[case].max()))
                for image, case in zip(shown, cases, strict=True)
            ]
        )
    return found[0], found[1]


def _surest(p: Predictions, cases: Int[np.ndarray, " some"], count: int) -> list[int]:
    chosen: list[int] = []
    for case in sorted(cases.tolist(), key=lambda case: -p.probabilities[case].max()):
        if len(chosen) < count and p.patients[case] not in [p.patients[other] for other in chosen]:
            chosen.append(case)
    return chosen


def figure(examples: tuple[Sequence[Example], Sequence[Example]]) -> Figure:
    """A row of right cases above a row of wrong ones."""
    with matplotlib.rc_context({**STYLE, "font.size": 8.5}):
        made = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        for axes in made.subplots(2, EACH).ravel():
            axes.axis("off")
        for row, (cases, word) in enumerate(zip(examples, ("right", "wrong"), strict=True)):
            if not cases:
                made.axes[row * EACH].text(0.5, 0.5, f"none {word}", ha="center", color=SOFT)
            for column, case in enumerate(cases):
                axes, window = made.axes[row * EACH + column], case.image.window
                axes.imshow(case.image.pixels, cmap="gray", vmin=window.low, vmax=window.high, interpolation="nearest")
                if case.image.mask is not None:
                    axes.contour(case.image.mask, levels=[0.5], colors=[OURS], linewidths=0.8)
                said = f"{word}: {_short(case.truth)}"
                not_this = "" if row == 0 else f"\nnot {_short(case.predicted)}"
                axes.set_title(f"{said}{not_this} {case.probability:.2f}", fontsize=8)
    return made


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
