"""Reading windows of CT: the one table that training, cards and reports share, and the rule that picks one for a slice."""

import dataclasses

import numpy as np
from jaxtyping import Shaped


@dataclasses.dataclass(frozen=True)
class Window:
    """What is shown from black to white.

    Attributes:
      name: as a radiologist calls it.
      centre, width: HU, or the real values of the slice.
    """

    name: str
    centre: float
    width: float

    @property
    def low(self) -> float:
        """Shown black."""
        return self.centre - self.width / 2

    @property
    def high(self) -> float:
        """Shown white."""
        return self.centre + self.width / 2

    def __str__(self) -> str:
        """As reading rooms write it, "lung -600/1500 HU": centre / width."""
        return f"{self.name} {self.centre:.0f}/{self.width:.0f} HU"


LUNG = Window("lung", -600.0, 1500.0)
SOFT_TISSUE = Window("soft tissue", 40.0, 400.0)
BONE = Window("bone", 400.0, 1800.0)
BRAIN = Window("brain", 40.0, 80.0)

HEAD_PARTS = frozenset({"head", "brain", "skull"})
# Aerated lung. Air around the body lies below, fat above.
LUNG_LOW_HU, LUNG_HIGH_HU = -950.0, -500.0
# Of the slice. The lung bases in an abdominal slice stay below it.
LUNG_SHARE = 0.15


def window_for(hu: Shaped[np.ndarray, "rows columns"], body_part: str = "") -> Window:
    """The window a reader would choose for a CT slice: brain for heads, lung where much of it is aerated lung, else soft tissue.

    Args:
      hu: pixels in HU.
      body_part: as in the dataset's index ("head", "chest", …), "" if unknown.
    """
    if body_part in HEAD_PARTS:
        return BRAIN
    aerated = (hu > LUNG_LOW_HU) & (hu < LUNG_HIGH_HU)
    return LUNG if float(aerated.mean()) > LUNG_SHARE else SOFT_TISSUE
