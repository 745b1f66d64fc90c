"""The rows of the table of plans, from plans as the planner gives them."""

import dataclasses

import pytest

from benchmarks import plans
from curia_jax import config as configs
from curia_jax.plan import topologies
from tests.plan.test_report import PLAN


@pytest.mark.parametrize("name", plans.TOPOLOGIES)
@pytest.mark.parametrize("file", plans.NAMED)
def test_every_cell_has_a_topology_and_overrides_that_its_config_takes(file: str, name: str) -> None:
    count = plans.TOPOLOGIES[name][0]
    topology = topologies.parse(name.split()[-1], count)
    config = configs.load(file, plans.overrides_of(file, name))
    assert config.mesh.replica == count and topology.chips % (count * config.mesh.fsdp) == 0
    assert config.batch_size % topology.chips == 0


def test_overrides_of_one_size_come_after_those_of_the_topology() -> None:
    name = "2 x v5e:16x16"
    of_l16 = plans.overrides_of("configs/pretrain_vit_l16_224.py", name)
    assert of_l16 == [*plans.overrides_of("configs/pretrain_vit_b16_224.py", name), "--config.mesh.fsdp=64"]


def test_line_has_the_figures_of_the_plan() -> None:
    assert PLAN.step is not None
    cells = [cell.strip() for cell in plans.line("configs/pretrain_vit_b16_224.py", PLAN, "v5e:16x16").split("|")[1:-1]]
    assert cells[:2] == ["v5e:16x16", "B/16, 224 px"]
    assert float(cells[2]) == pytest.approx(PLAN.batch_size / PLAN.topology.chips)
    assert float(cells[3]) == pytest.approx(1e3 * PLAN.step.estimated_step_seconds, abs=0.05)
    assert float(cells[6]) == pytest.approx(PLAN.memory.total / 2**30, abs=0.05)
    assert len(cells) == 9


def test_line_without_an_estimate_says_why_and_keeps_its_columns() -> None:
    unread = dataclasses.replace(PLAN, step=None)
    text = plans.line("configs/pretrain_vit_h16_512.py", unread, "")
    assert "H/16, 512 px" in text and ("not estimated" if PLAN.fits else "does not fit") in text
    assert text.count("|") == 10
