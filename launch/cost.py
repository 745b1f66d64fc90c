"""What a run will cost, from the JSON of `python -m curia_jax.plan`, and the limit that was set."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from curia_common import mixtures
from curia_common.errors import DoesNotFitError, UserError
from launch.buckets import SCHEME
from launch.spec import LaunchSpec

PLANNED = "pretrain"  # the command that the planner plans, on TPUs
# Fields of the config that change neither memory nor time of a step.
_FREE = ("--config.data.", "--config.devices.", "--config.keep", "--config.save_", "--config.log_", "--config.seed")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The planner's figures of a run.

    Attributes:
      topology: as str(Topology) writes it.
      overrides: words --config.field=value.
      state_bytes: of what a checkpoint holds.
      hbm, hbm_limit: bytes per chip, needed and there.
      hours, chip_hours, cost: of all steps; None where the planner could not estimate them, or knows no price.
      prices: currency and date of the price.
    """

    topology: str
    config: str
    overrides: tuple[str, ...]
    fits: bool
    state_bytes: int
    hbm: int
    hbm_limit: int
    hours: float | None
    chip_hours: float | None
    cost: float | None
    prices: str

    def text(self) -> str:
        """Hours, chip-hours and cost, one line."""
        if self.hours is None or self.chip_hours is None:
            return "the plan has no estimate of time and cost"
        cost = "no price known" if self.cost is None else f"{self.cost:,.0f} {self.prices} on demand"
        return f"{self.hours:,.1f} h, {self.chip_hours:,.0f} chip-hours, {cost}"


def can_be_planned(spec: LaunchSpec) -> bool:
    """Whether there is a plan for such launches."""
    return spec.command == PLANNED and spec.topology.generation is not None


def plan_command(spec: LaunchSpec) -> str:
    """The command that writes the plan of a run, and what to add where the planner cannot count the slices in a bucket."""
    in_bucket = f"{mixtures.OPTION}={SCHEME}"
    given = [word for word in spec.words if word.startswith("--config.")]
    overrides = [word for word in given if not word.startswith(in_bucket)]
    more = " (add --examples=N, the number of slices in the bucket)" if len(overrides) < len(given) else ""
    slices = [f"--slices={spec.topology.slices}"] if spec.topology.slices > 1 else []
    topology = f"--topology={spec.topology.kind}:{spec.topology.shape_text}"
    words = [f"--config={spec.option('--config')}", topology, *slices, *overrides, "--json=plan.json"]
    return f"python -m curia_jax.plan {shlex.join(words)}{more}"


def read(path: str, spec: LaunchSpec) -> Plan:
    """The plan of this run.

    Raises:
      UserError: the file is not a plan, or that of another run; the message has the command that plans this one.
    """
    again = f"plan this one: {plan_command(spec)}"
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        plan = Plan(
            topology=found["topology"], config=found["config"], overrides=tuple(found["overrides"]), fits=found["fits"],
            state_bytes=int(found["state_bytes"]),
            hbm=found["hbm_bytes_per_chip"], hbm_limit=found["hbm_limit_bytes"], hours=found.get("hours"),
            chip_hours=found.get("chip_hours"), cost=found.get("cost"),
            prices=f"{found.get('currency')} at the prices of {found.get('price_date')}",
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--plan={path}: {error.strerror}; {again}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--plan={path} is not a plan ({type(error).__name__}: {error}); {again}") from error
    for what, planned, wanted in (
        ("topology", plan.topology, str(spec.topology)),
        ("config", Path(plan.config).stem, Path(spec.option("--config") or "").stem),
        ("overrides", _relevant(plan.overrides), _relevant(spec.words)),
    ):
        if planned != wanted:
            verb = "are" if what == "overrides" else "is"
            raise UserError(
                f"--plan={path} is of another run: its {what} {verb} {planned or 'none'}, not {wanted or 'none'}; {again}"
            )
    return plan


def check(plan: Plan | None, spec: LaunchSpec, *, max_cost: int | float | None, ignore_fit: bool) -> None:
    """Refuses a run that does not fit or costs too much.

    Raises:
      DoesNotFitError: the run needs more memory than a chip has.
      UserError: it costs more than `max_cost`, or nothing says what it costs.
    """
    if plan is not None and not plan.fits and not ignore_fit:
        needed, there = plan.hbm / 2**30, plan.hbm_limit / 2**30
        raise DoesNotFitError(
            f"{spec.topology} needs {needed:.2f} GiB per chip but has {there:.2f}, says the plan; change the config as the planner "
            "says, or launch all the same with --ignore-fit"
        )
    if max_cost is None:
        return
    if plan is None:
        if can_be_planned(spec):
            raise UserError(
                f"--max-cost={max_cost:g} needs a plan; make one and give it with --plan: {plan_command(spec)}"
            )
        raise UserError(
            f"--max-cost={max_cost:g}: there are plans for {PLANNED} on TPUs alone, not for {spec.command} on {spec.topology}; leave it out"
        )
    if plan.cost is None:
        raise UserError(f"--max-cost={max_cost:g}, but the plan has no cost; plan with --prices=FILE")
    if plan.cost > max_cost:
        raise UserError(f"the run costs {plan.cost:,.0f} {plan.prices}, more than --max-cost={max_cost:g}")


def _relevant(words: tuple[str, ...]) -> str:
    """The overrides that change memory or time, in one order."""
    kept = {w.partition("=")[0]: w for w in words if w.startswith("--config.") and not w.startswith(_FREE)}
    return shlex.join(sorted(kept.values()))
