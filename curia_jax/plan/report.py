"""The plan as tables, on standard error."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curia_jax.plan import estimator
from curia_jax.plan.estimator import PartTime, StepEstimate
from curia_jax.plan.inputs import InputNeeds
from curia_jax.plan.planner import Plan
from curia_jax.plan.prices import RunCost
from curia_jax.plan.search import Remedy, SearchRow
from curia_jax.plan.topologies import GB, GIB

# 140 columns where there is no terminal: no table has to wrap. Square brackets are shapes and paths, not markup.
console = Console(stderr=True, highlight=False, markup=False, emoji=False, width=None if sys.stderr.isatty() else 140)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold", no_wrap=number > 0)
    return table


def does_not_fit(plan: Plan, remedy: Remedy | None) -> str:
    """One line: memory needed, memory there is, and what would fit."""
    used, limit = plan.memory.total / GIB, plan.memory.limit / GIB
    needs = f"{used:.2f} GiB" if used > limit else f"more than {limit:.2f} GiB"
    line = f"{plan.topology} needs {needs} per chip but has {limit:.2f}"
    if remedy is None:
        return f"{line}; use more chips, a larger --config.mesh.fsdp or a smaller --config.batch_size"
    return f"{line}; try {' '.join(remedy.overrides)} ({remedy.hbm_bytes_per_chip / GIB:.2f} GiB)"


def show(plan: Plan) -> None:
    """All tables of one plan."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    console.print(
        Text.assemble(
            (f"{plan.parameters / 1e6:,.1f} M parameters on {plan.topology}", "bold"),
            f" ({plan.topology.chips:,} chips; {mesh}), batch {plan.batch_size:,}; {plan.compiler}, "
            f"compiled in {plan.compile_seconds:.0f} s{' (cached)' if plan.cached else ''}",
        )
    )
    if plan.fits:
        used = f"{plan.memory.total / GIB:.2f} of {plan.memory.limit / GIB:.2f} GiB per chip"
        console.print(f"fits: {used}", style="green", soft_wrap=True)
    table = _table("memory per chip", "", "GiB")
    for name, size in plan.memory.used.items():
        table.add_row(name, f"{size / GIB:.3f}")
    console.print(table)
    table = _table("largest tensors, per device", "tensor", "shape", "MiB")
    for row in (*plan.memory.largest, *(plan.step.largest_temporaries if plan.step else ())):
        table.add_row(row.tensor[-70:] or row.kind, row.shape, f"{row.bytes / 2**20:,.1f}")
    console.print(table)
    if plan.estimate_error is not None:
        console.print(
            f"no step time, MFU, input needs and cost: {plan.compiler}: {plan.estimate_error}",
            style="yellow", soft_wrap=True,
        )  # fmt: skip
    elif plan.step is not None and not plan.compiler_tested:
        tested = ", ".join(estimator.TESTED_LIBTPU)
        console.print(
            f"the estimate below was not tested with {plan.compiler}, only with {tested}",
            style="yellow",
            soft_wrap=True,
        )
    if plan.step is not None:
        _show_step(plan, plan.step)
    if plan.input is not None:
        _show_input(plan.input)
    if plan.cost is not None:
        _show_cost(plan, plan.cost)


def _show_step(plan: Plan, step: StepEstimate) -> None:
    table = _table("a step, by the compiler's estimate", "", "")
    table.add_row("step", f"{step.estimated_step_seconds * 1e3:,.2f} ms")
    table.add_row("  computation", f"{step.compute_seconds * 1e3:,.2f} ms")
    table.add_row("  charged by roofline", f"{step.roofline_seconds * 1e3:,.2f} ms ({step.unestimated_fraction:.1%})")
    exposed = f"{step.exposed_collective_seconds * 1e3:,.2f} ms ({step.exposed_collective_fraction:.1%})"
    table.add_row("  exposed communication", exposed)
    table.add_row("model FLOPs", f"{plan.model_flops_per_step / 1e12:,.1f} TFLOP")
    table.add_row("hardware FLOPs", f"{plan.hardware_flops_per_step / 1e12:,.1f} TFLOP")
    table.add_row("MFU", f"{step.estimated_mfu:.1%}")
    table.add_row("images/s per chip", f"{step.images_per_second_per_chip:,.0f}")
    table.add_row("images/s", f"{step.images_per_second:,.0f}")
    console.print(table)

    title = "where the time goes, and ms that matmuls, vector operations and HBM traffic take at their peak rates"
    table = _table(title, "part", "ms", "share", "matmuls", "vector", "HBM", "bound", "bound / ms")
    names = ("product_seconds", "vector_seconds", "hbm_seconds", "bound_seconds")
    total = {name: sum(getattr(part, name) for part in step.parts) for name in ("seconds", "fraction", *names)}
    for part in (*step.parts, PartTime("all", **total)):
        reached = f"{part.bound_seconds / part.seconds:.0%}" if part.seconds else ""
        bounds = (f"{getattr(part, name) * 1e3:,.2f}" for name in names)
        table.add_row(part.part, f"{part.seconds * 1e3:,.2f}", f"{part.fraction:.1%}", *bounds, reached)
    console.print(table)

    table = _table("collectives in a step", "kind", "axis", "overlaps", "count", "MB", "ICI ms", "DCN ms", "exposed ms")
    for row in step.collectives:
        table.add_row(
            row.kind, row.axis, "yes" if row.overlapped else "no", f"{row.count:,}", f"{row.bytes / 1e6:,.2f}",
            f"{row.ici_seconds * 1e3:,.3f}", f"{row.dcn_seconds * 1e3:,.3f}", f"{row.exposed_seconds * 1e3:,.3f}",
        )  # fmt: skip
    console.print(table)


def _show_input(needs: InputNeeds) -> None:
    table = _table("input", "", "")
    table.add_row("per host", f"{needs.host_images_per_second_needed:,.0f} images/s on {needs.hosts} hosts")
    table.add_row("from storage", f"{needs.storage_bytes_per_second_needed / GB:,.2f} GB/s")
    rate, available = needs.loader_images_per_second_per_core, needs.host_images_per_second_available
    if rate is None or available is None:
        table.add_row("loader", "not measured: --config.data.shards names no shards")
    else:
        table.add_row(
            "loader",
            f"{rate:,.0f} images/s per core of this machine x {needs.host_cores} cores = {available:,.0f}: "
            f"{'suffices' if needs.input_suffices else 'does not suffice'}",
        )
    console.print(table)


def _show_cost(plan: Plan, cost: RunCost) -> None:
    table = _table("the whole run", "", "")
    assumed = " (assumed; --examples=N)" if plan.data.examples_assumed else ""
    table.add_row("steps", f"{cost.total_steps:,}; {plan.data.examples:,} examples per epoch{assumed}")
    table.add_row("hours", f"{cost.hours:,.1f}")
    table.add_row("chip-hours", f"{cost.chip_hours:,.0f}")
    table.add_row(
        "cost",
        f"no price known for {plan.topology}; give --prices=FILE"
        if cost.cost is None
        else f"{cost.cost:,.0f} {cost.currency} at {cost.price_per_chip_hour:.2f} per chip-hour ({cost.price_date})",
    )
    console.print(table)


def show_search(rows: Sequence[SearchRow], file: str) -> None:
    """The candidates of a search, and the words for the best."""
    title = "candidates, fastest first; * no other is both faster and smaller"
    table = _table(title, "", "images/s/chip", "MFU", "GiB", "exposed")
    for row in rows:
        words = " ".join(row.overrides) or "the config as it is"
        memory, step = f"{row.plan.memory.total / GIB:.2f}", row.plan.step
        if step is None:
            table.add_row(words, "not estimated" if row.plan.fits else "does not fit", "", memory, "")
        else:
            table.add_row(
                f"{'* ' if row.pareto else '  '}{words}", f"{step.images_per_second_per_chip:,.0f}",
                f"{step.estimated_mfu:.1%}", memory, f"{step.exposed_collective_fraction:.1%}",
            )  # fmt: skip
    console.print(table)
    best = next((row for row in rows if row.best), None)
    if best is not None:
        console.print(f"best: --config={file} {' '.join(best.overrides)}", soft_wrap=True)
    elif not any(row.plan.fits for row in rows):
        console.print("no candidate fits")
