"""Cost of a run, and price tables."""

import json
from pathlib import Path

import pytest

from curia_common.errors import UserError
from curia_jax.plan import prices, topologies

V5E = topologies.parse("v5e:16x16")


def test_cost_is_chip_hours_times_price():
    cost = prices.run_cost(36_000, 0.1, V5E, prices.PriceTable("d", "EUR", {"v5e": 2.0}))
    assert (cost.hours, cost.chip_hours, cost.cost, cost.currency) == (1.0, 256.0, 512.0, "EUR")


def test_cost_is_none_for_a_chip_without_price():
    assert prices.run_cost(36_000, 0.1, topologies.parse("v7x:2x2x1"), prices.PRICES).cost is None


def test_price_file_replaces_the_built_in_table(tmp_path: Path):
    file = tmp_path / "prices.json"
    file.write_text(json.dumps({"date": "2026-01", "currency": "EUR", "per_chip_hour": {"v5e": 1}}))
    assert prices.load(str(file)).per_chip_hour == {"v5e": 1.0}
    assert prices.load(None) is prices.PRICES


@pytest.mark.parametrize(
    "text", ["{", '{"date": "x"}', '{"date": "x", "currency": "y", "per_chip_hour": {"v5e": "cheap"}}', "[]"]
)
def test_unreadable_price_file_raises_with_the_wanted_form(text: str, tmp_path: Path):
    file = tmp_path / "prices.json"
    file.write_text(text)
    with pytest.raises(UserError, match="cannot read the price table .* its form is"):
        prices.load(str(file))
