"""Tables of the rows, for a terminal (rich)."""

from __future__ import annotations

from typing import Any

from .extras import require
from .step import COMPILE, COPY, EAGER, KERNEL, SAMPLER, STOCK
from .summary import Rows, amount, by_contender, geometric_mean, goals, groups, ratios, solvers_of


def show(console: Any, rows: Rows) -> None:
    """Every table that the rows have something for."""
    if any(row["suite"] == "gpu" for row in rows):
        from .gpu.reaches import details, faster, table

        for line in ("", *table(rows), "", *faster(rows), *details(rows), ""):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for shape, dtype in groups(rows):
        console.print(_step_table(rows, shape, dtype))
    for table in (
        _speed_table(rows),
        _quality_table(rows),
        _accuracy_table(rows),
        _compile_table(rows),
        _goal_table(rows),
    ):
        if table is not None:
            console.print(table)


def _table(title: str, *columns: str) -> Any:
    table = require("rich.table").Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _step_table(rows: Rows, shape: tuple[int, ...], dtype: str) -> Any:
    here = next(iter(by_contender(rows, shape, dtype, solvers_of(rows, shape, dtype)[0]).values()))
    where = "in cache" if here["resident"] else f"{here['sets']} sets of outputs in turn, larger than the cache"
    title = f"us per evaluation outside the model, {'x'.join(map(str, shape))} {dtype} ({where})"
    columns = ("solver", SAMPLER, STOCK, EAGER, COMPILE, KERNEL, COPY, "kernel / copy", "bytes", "GB/s", "copy GB/s")
    table = _table(title, *columns)
    for solver in solvers_of(rows, shape, dtype):
        found = by_contender(rows, shape, dtype, solver)
        cells = [solver]
        for name in (SAMPLER, STOCK, EAGER, COMPILE, KERNEL, COPY):
            cell = "-" if name not in found else f"{found[name]['us']:.1f}"
            if name in (STOCK, EAGER, COMPILE) and name in found:
                cell += f" ({found[name]['us'] / found[SAMPLER]['us']:.1f}x)"
            cells.append(cell)
        if KERNEL in found:
            kernel, copy = found[KERNEL], found[COPY]
            cells += [f"{kernel['us'] / copy['us']:.2f}", amount(kernel["bytes"])]
            cells += [f"{kernel['gb_per_s']:.0f}", f"{copy['gb_per_s']:.0f}"]
        table.add_row(*cells)
    means = ["geometric mean", ""]
    for name in (STOCK, EAGER, COMPILE):
        found_ratios = ratios(rows, shape, dtype, name)
        means.append(f"{geometric_mean(found_ratios.values()):.1f}x" if found_ratios else "-")
    copies = ratios(rows, shape, dtype, KERNEL, COPY)
    means += ["", "", f"{geometric_mean(copies.values()):.2f}" if copies else "-"]
    table.add_section()
    table.add_row(*means)
    return table


def _speed_table(rows: Rows) -> Any:
    found = [row for row in rows if "images_per_s" in row]
    if not found:
        return None
    title = f"Digits end to end, {found[0]['steps']} steps"
    table = _table(title, "model", "batch", "sampler", "images/s", "outside the model")
    for row in found:
        share = "-" if row["outside_share"] is None else f"{100 * row['outside_share']:.1f} %"
        table.add_row(row["model"], str(row["batch"]), row["contender"], f"{row['images_per_s']:.0f}", share)
    return table


def _quality_table(rows: Rows) -> Any:
    found = [row for row in rows if "accuracy" in row]
    if not found:
        return None
    names = ("accuracy", "recall", "precision", "frechet")
    title = f"Guidance on the digits, {found[0]['images']} samples, {found[0]['steps']} steps"
    table = _table(title, "model", "guidance", "scale", *names)
    for row in found:
        table.add_row(row["model"], row["guidance"], f"{row['scale']:g}", *(f"{row[name]:.3f}" for name in names))
    return table


def _accuracy_table(rows: Rows) -> Any:
    found = [row for row in rows if row["suite"] == "accuracy"]
    if not found:
        return None
    title = f"16-bit model inputs and outputs, {found[0]['steps']} steps: trimmed rms from float64"
    table = _table(title, "solver", "dtype", SAMPLER, STOCK, "closer by")
    for solver, dtype in dict.fromkeys((row["solver"], row["dtype"]) for row in found):
        here = {row["contender"]: row for row in found if (row["solver"], row["dtype"]) == (solver, dtype)}
        stock = f"{here[STOCK]['rms']:.1e}" if STOCK in here else "-"
        ratio = here[SAMPLER]["ratio"]
        table.add_row(solver, dtype, f"{here[SAMPLER]['rms']:.1e}", stock, "-" if ratio is None else f"{ratio:.1f}x")
    return table


def _compile_table(rows: Rows) -> Any:
    found = [row for row in rows if row["suite"] == "compile"]
    if not found:
        return None
    table = _table("Compiling a plan, one core", "solver", "steps", "evaluations", "slots", "ms", "residual", "replay")
    for row in found:
        numbers = [str(row[name]) for name in ("steps", "evaluations", "slots")]
        errors = [f"{row[name]:.0e}" for name in ("residual", "replay_error")]
        table.add_row(row["solver"], *numbers, f"{row['ms']:.0f}", *errors)
    return table


def _goal_table(rows: Rows) -> Any:
    found = goals(rows)
    if not found:
        return None
    table = _table("Goals", "what", "goal", "measured", "", "roofline")
    for goal in found:
        wanted = f"{'<=' if goal.at_most else '>='} {goal.goal:g}{goal.unit}"
        verdict = "met" if goal.met else "missed"
        table.add_row(goal.what, wanted, f"{goal.measured:.3g}{goal.unit}", verdict, goal.roofline)
    return table
