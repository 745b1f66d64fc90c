"""The plan as tables for people, on standard error."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from curia_jax.plan.topology import GB, GIB

# In a file or a pipe the tables are as wide as they have to be.
console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 140)


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def waiting(text: str, expected: float | None, seconds_between_lines: float = 30.0) -> Iterator[None]:
    """Shows that something goes on: time gone, and how long the last one took."""
    hint = f"the last one took {expected:.0f} s" if expected else "minutes, as a rule"
    if console.is_terminal:
        columns = TextColumn(text), BarColumn(pulse_style="cyan"), TimeElapsedColumn(), TextColumn(f"({hint})")
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task("", total=None)
            yield
        return
    done = threading.Event()
    began = time.monotonic()

    def lines() -> None:
        while not done.wait(seconds_between_lines):
            gone = time.monotonic() - began
            left = f", about {max(0.0, expected - gone):.0f} s left" if expected else ""
            say(f"{text}: {gone:.0f} s gone{left} ({hint})")

    thread = threading.Thread(target=lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold", no_wrap=number > 0)
    return table


def verdict(plan: Mapping[str, Any]) -> str:
    """One line: does it fit, and what would."""
    used, limit = plan["hbm_bytes_per_chip"] / GIB, plan["hbm_limit_bytes"] / GIB
    if plan["fits"]:
        return f"fits: {used:.2f} of {limit:.2f} GiB per chip"
    line = f"does not fit: {plan['topology']} needs {used:.2f} GiB per chip but has {limit:.2f}"
    would = plan.get("would_fit")
    if would:
        return f"{line}; try {' '.join(would['overrides'])} ({would['hbm_bytes_per_chip'] / GIB:.2f} GiB)"
    return f"{line}; more chips, a larger --config.mesh.fsdp or a smaller --config.batch_size would help"


def show(plan: Mapping[str, Any]) -> None:
    """All tables of one plan."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    console.print(
        f"[bold]{plan['parameters'] / 1e6:,.1f} M parameters on {plan['topology']}[/] ({plan['chips']:,} chips; {mesh}), "
        f"batch {plan['batch_size']:,}; {plan['compiler']}, compiled in {plan['compile_seconds']:.0f} s"
        f"{' some time ago' if plan['cached'] else ''}"
    )
    console.print(f"[{'green' if plan['fits'] else 'red'}]{verdict(plan)}[/]", soft_wrap=True)

    table = _table("memory per chip", "", "GiB")
    for name, size in plan["memory"].items():
        table.add_row(name, f"{size / GIB:.3f}")
    console.print(table)
    table = _table("largest tensors, per device", "tensor", "shape", "MiB")
    for row in plan["largest_tensors"]:
        table.add_row(row["tensor"][-70:] or row["kind"], row["shape"], f"{row['bytes'] / 2**20:,.1f}")
    console.print(table)
    if "estimated_step_seconds" in plan:
        _show_estimate(plan)


_SUMMED = ("seconds", "fraction", "product_seconds", "vector_seconds", "hbm_seconds", "bound_seconds")


def _show_estimate(plan: Mapping[str, Any]) -> None:
    step = plan["estimated_step_seconds"]
    table = _table("a step, by the compiler's estimate", "", "")
    table.add_row("step", f"{step * 1e3:,.2f} ms")
    table.add_row("  computation", f"{plan['compute_seconds'] * 1e3:,.2f} ms")
    table.add_row(
        "  charged by the roofline", f"{plan['roofline_seconds'] * 1e3:,.2f} ms ({plan['unestimated_fraction']:.1%})"
    )
    table.add_row(
        "  exposed communication",
        f"{plan['exposed_collective_seconds'] * 1e3:,.2f} ms ({plan['exposed_collective_fraction']:.1%})",
    )
    table.add_row("model FLOPs", f"{plan['model_flops_per_step'] / 1e12:,.1f} TFLOP")
    table.add_row("hardware FLOPs", f"{plan['hardware_flops_per_step'] / 1e12:,.1f} TFLOP")
    table.add_row("MFU", f"{plan['estimated_mfu']:.1%}")
    table.add_row("images/s per chip", f"{plan['images_per_second_per_chip']:,.0f}")
    table.add_row("images/s", f"{plan['images_per_second']:,.0f}")
    console.print(table)

    title = "where the time goes, and ms that its products, vector operations and bytes take at the peak"
    table = _table(title, "part", "ms", "share", "products", "vector", "HBM", "bound", "of the bound")
    floors = ("product_seconds", "vector_seconds", "hbm_seconds", "bound_seconds")
    rows = [*plan["parts"], {"part": "all"} | {n: sum(row[n] for row in plan["parts"]) for n in _SUMMED}]
    for row in rows:
        reached = f"{row['bound_seconds'] / row['seconds']:.0%}" if row["seconds"] else ""
        cells = [f"{row[name] * 1e3:,.2f}" for name in floors]
        table.add_row(row["part"], f"{row['seconds'] * 1e3:,.2f}", f"{row['fraction']:.1%}", *cells, reached)
    console.print(table)

    table = _table("collectives in a step", "kind", "axis", "overlaps", "count", "MB", "ICI ms", "DCN ms", "exposed ms")
    for row in plan["collectives"]:
        table.add_row(
            row["kind"], row["axis"], "yes" if row["overlapped"] else "no", f"{row['count']:,}", f"{row['bytes'] / 1e6:,.2f}",
            f"{row['ici_seconds'] * 1e3:,.3f}", f"{row['dcn_seconds'] * 1e3:,.3f}", f"{row['exposed_seconds'] * 1e3:,.3f}",
        )  # fmt: skip
    console.print(table)

    table = _table("input", "", "")
    table.add_row("per host", f"{plan['host_images_per_second_needed']:,.0f} images/s on {plan['hosts']} hosts")
    table.add_row("from storage", f"{plan['storage_bytes_per_second_needed'] / GB:,.2f} GB/s")
    rate = plan["loader_images_per_second_per_core"]
    if rate is None:
        table.add_row("loader", "not measured: --config.data.shards names no shards")
    else:
        table.add_row(
            "loader",
            f"{rate:,.0f} images/s per core here x {plan['host_cores']} cores = {plan['host_images_per_second_available']:,.0f}: "
            f"{'suffices' if plan['input_suffices'] else 'does not suffice'}",
        )
    console.print(table)

    table = _table("the whole run", "", "")
    assumed = " (assumed; --examples=N)" if plan["examples_assumed"] else ""
    table.add_row("steps", f"{plan['total_steps']:,}; {plan['examples']:,} slices an epoch{assumed}")
    table.add_row("hours", f"{plan['hours']:,.1f}")
    table.add_row("chip-hours", f"{plan['chip_hours']:,.0f}")
    price = plan["price_per_chip_hour"]
    table.add_row(
        "cost",
        f"no price known for {plan['topology']}; give --prices=FILE"
        if price is None
        else f"{plan['cost']:,.0f} {plan['currency']} at {price:.2f} a chip-hour ({plan['price_date']})",
    )
    console.print(table)


def show_search(rows: Sequence[Any], file: str) -> None:
    """The candidates of a search and the line to copy."""
    table = _table(
        "candidates, fastest first; * nothing beats it in both speed and memory",
        "",
        "images/s/chip",
        "MFU",
        "GiB",
        "exposed",
    )
    for row in rows:
        plan = row.plan
        words = " ".join(row.overrides) or "as it stands"
        if not plan["fits"]:
            table.add_row(words, "does not fit", "", f"{plan['hbm_bytes_per_chip'] / GIB:.2f}", "")
            continue
        table.add_row(
            f"{'* ' if row.on_front else '  '}{words}", f"{plan['images_per_second_per_chip']:,.0f}",
            f"{plan['estimated_mfu']:.1%}", f"{plan['hbm_bytes_per_chip'] / GIB:.2f}", f"{plan['exposed_collective_fraction']:.1%}",
        )  # fmt: skip
    console.print(table)
    best = next((row for row in rows if row.best), None)
    console.print(
        f"best: --config={file} {' '.join(best.overrides)}" if best else "nothing that was tried fits", soft_wrap=True
    )
