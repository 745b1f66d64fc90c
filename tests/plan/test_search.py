"""Searches, with a planner that compiles nothing."""

from pathlib import Path

import pytest

from curia_jax import config as configs
from curia_jax.plan import prices, search, topologies
from curia_jax.plan.estimator import StepEstimate
from curia_jax.plan.inputs import InputFacts
from curia_jax.plan.planner import MemoryReport, Plan, Planner

TINY = str(Path(__file__).resolve().parents[1] / "configs" / "tiny.py")
V5E = topologies.parse("v5e:2x2")
DATA = InputFacts(1000, True, (32, 32), 2048.0, None)


class FakePlanner(Planner):
    """Answers from a function: config -> (GiB, images/s per chip), of 10 GiB. A rate of None cannot be estimated."""

    def __init__(self, answer) -> None:
        super().__init__(V5E, DATA, prices.PRICES)
        object.__setattr__(self, "answer", answer)
        object.__setattr__(self, "asked", [])

    def plan(self, config) -> Plan:
        self.asked.append(config)
        used, rate = self.answer(config)
        step = StepEstimate(*(0.1,) * 8, rate, 4 * rate, (), ()) if rate is not None and used < 10 else None
        return Plan(
            V5E, {"replica": 1, "data": 2, "fsdp": 2}, config.batch_size, 1, 12, DATA, "libtpu", True, str(len(self.asked)),
            1.0, False, MemoryReport({"total": int(used * 2**30)}, 10 * 2**30, used < 10, ()), 1, 1, step,
            estimate_error="cannot read the program" if rate is None else None,
        )  # fmt: skip


def test_what_would_fit_names_the_first_remedy():
    planner = FakePlanner(lambda c: ({"none": 21.0, "matmuls": 12.0, "full": 9.0}[c.model.remat], 1.0))
    remedy = search.what_would_fit(planner, TINY, [], seconds=60.0)
    assert remedy == search.Remedy(("--config.model.remat=full",), 9 * 2**30)


def test_what_would_fit_is_none_if_nothing_fits():
    planner = FakePlanner(lambda c: (21.0, 1.0))
    assert search.what_would_fit(planner, TINY, [], seconds=60.0) is None


def answer(config) -> tuple[float, float]:
    """Rematerialisation saves memory and costs time, so does a loop; a larger fsdp costs time."""
    memory = {"none": 6.0, "matmuls": 4.0, "full": 2.0}[config.model.remat] * config.batch_size / 16
    rate = {"none": 3.0, "matmuls": 2.5, "full": 2.0}[config.model.remat]
    return memory, config.batch_size * rate * config.model.unroll / config.mesh.fsdp


def test_search_finds_the_fastest_that_fits_and_compiles_nothing_twice():
    planner = FakePlanner(answer)
    rows = search.search(planner, TINY, [], seconds=600.0)
    best = next(row for row in rows if row.best)
    assert best is rows[0]
    # Without rematerialisation, unrolled, parameters replicated; twice the batch would not fit.
    assert {"--config.model.unroll=2", "--config.mesh.data=4", "--config.mesh.fsdp=1"} <= set(best.overrides)
    assert not any("batch_size=32" in word for word in best.overrides)
    assert len(planner.asked) == len(rows) == len({str(c) for c in planner.asked})
    assert best.pareto and any(row.pareto and "remat=full" in " ".join(row.overrides) for row in rows)
    assert best.to_json()["overrides"] == list(best.overrides)


def test_search_stops_at_its_time_limit():
    assert len(search.search(FakePlanner(lambda c: (1.0, 1.0)), TINY, [], seconds=-1.0)) == 1


def test_search_without_step_times_returns_the_first_candidate():
    (row,) = search.search(FakePlanner(lambda c: (1.0, None)), TINY, [], seconds=600.0)
    assert row.plan.fits and not row.best
    assert row.to_json()["estimated_step_seconds"] is None


def test_pareto_front_has_the_points_that_no_other_beats():
    points = [(100.0, 10), (90.0, 5), (80.0, 7), (110.0, 12), (90.0, 6)]
    assert search.pareto(points) == [3, 0, 1]


@pytest.mark.parametrize("field", ["remat", "unroll", "batch_size", "fsdp"])
def test_choices_divide_the_topology_and_the_model(field: str):
    found = search.choices(search.configs.load(TINY), V5E)
    wanted = {"remat": ("none", "matmuls", "full"), "unroll": (1, 2), "batch_size": (8, 16, 32), "fsdp": (1, 4)}
    assert set(getattr(found, field)) == set(wanted[field])


def test_choices_of_fine_tuning_divide_its_encoder():
    config = configs.load("finetune_vit")
    found = search.choices(config, topologies.parse("v5e:4x4"))
    assert (found.unroll, found.batch_size, found.fsdp) == ((1, 12), (32, 64, 128), (1, 4, 16))
