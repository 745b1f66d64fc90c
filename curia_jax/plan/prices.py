"""Hours, chip-hours and cost of a run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from curia_common.errors import UserError
from curia_jax import json_records
from curia_jax.plan.topologies import Topology


@dataclasses.dataclass(frozen=True)
class PriceTable:
    """Prices per chip-hour by chip; None: no price known."""

    date: str
    currency: str
    per_chip_hour: Mapping[str, float | None]


# US dollars, on demand, without tax: cloud.google.com/tpu/pricing, US regions. Prices change, and committed and spot
# capacity is cheaper; --prices=FILE replaces the table.
PRICES = PriceTable("2025-08", "USD", {"v4": 3.22, "v5e": 1.20, "v5p": 4.20, "v6e": 2.70, "v7x": None})


@dataclasses.dataclass(frozen=True)
class RunCost:
    """A whole run: its steps alone, without start-up, checkpoints and interruptions. `cost` is None without a price."""

    total_steps: int
    hours: float
    chip_hours: float
    price_per_chip_hour: float | None
    cost: float | None
    currency: str
    price_date: str


def load(path: str | None) -> PriceTable:
    """The price table: PRICES, or a JSON file with the same fields.

    Raises:
      UserError: the file cannot be read or has other fields.
    """
    if path is None:
        return PRICES
    try:
        return json_records.record(PriceTable, json_records.loads(Path(path).read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the price table {path} ({type(error).__name__}: {error}); its form is: "
            f"{json.dumps(dataclasses.asdict(PRICES))}"
        ) from error


def run_cost(total_steps: int, step_seconds: float, topology: Topology, prices: PriceTable) -> RunCost:
    """Hours and money that the steps of a run take."""
    hours = total_steps * step_seconds / 3600
    chip_hours = hours * topology.chips
    price = prices.per_chip_hour.get(topology.kind)
    cost = None if price is None else chip_hours * price
    return RunCost(total_steps, hours, chip_hours, price, cost, prices.currency, prices.date)
