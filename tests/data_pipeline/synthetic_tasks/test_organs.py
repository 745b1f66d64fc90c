"""Organs of the recognition tasks: all are shown, on their side."""

import numpy as np
import pytest

from data_pipeline.synthetic_tasks import organs, tasks
from data_pipeline.synthetic_tasks.pictures import expose, mask, view


@pytest.mark.parametrize(("regions", "count"), [(organs.CT, 54), (organs.MR, 56)])
def test_all_organs_are_shown_in_every_region(regions: organs.Regions, count: int) -> None:
    names = [name for region in regions.values() for name in region]
    assert len(names) == len(set(names)) == count
    for region, wanted in regions.items():
        patient = tasks.Patient(np.random.default_rng(0), "train", 0, 0, 64)
        canvas = view(patient, organs.OrganCanvas, at=np.linspace(-0.9, 0.9, 13))
        organs.REGIONS[region](canvas, patient.r)
        for name in wanted:
            assert np.count_nonzero(canvas.organ(name)) > 12, name


def test_left_organs_lie_on_the_right_of_the_picture() -> None:
    patient = tasks.Patient(np.random.default_rng(1), "train", 0, 0, 64)
    canvas = view(patient, organs.OrganCanvas, at=[0.4, 0.1])
    organs.REGIONS["abdomen"](canvas, patient.r)
    image = expose(canvas, "CT", patient.r)
    assert image.shape == (64, 64, 2)
    columns = {
        name: np.nonzero(mask(canvas.organ(name)))[1].mean()
        for name in ("kidney_left", "kidney_right", "liver", "spleen")
    }
    assert columns["kidney_left"] > columns["kidney_right"] and columns["spleen"] > columns["liver"]
