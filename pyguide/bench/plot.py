"""The rows as one picture: bars of microseconds by solver and contender, and fidelity against diversity by scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .extras import require
from .step import COMPILE, EAGER, SAMPLER, STOCK
from .summary import Rows, by_contender, groups, solvers_of

BARS = (SAMPLER, EAGER, COMPILE, STOCK)


def nothing(rows: Rows) -> str | None:
    """Why the rows cannot be drawn, None if they can."""
    drawn = any(row["suite"] == "step" or "recall" in row for row in rows)
    return None if drawn else "there are no rows of the suites step and sample"


def draw(rows: Rows, path: Path) -> None:
    """Writes a PNG with a panel for each shape and each digits model; ValueError if `nothing` is to be drawn."""
    panels = groups(rows)
    models = list(dict.fromkeys(row["model"] for row in rows if "recall" in row))
    count = len(panels) + len(models)
    if not count:
        raise ValueError(f"rows: {nothing(rows)}")
    # A Figure of its own instead of pyplot: no global state, no display.
    across, down = min(count, 3), -(-count // 3)
    figure = require("matplotlib.figure").Figure(figsize=(5.5 * across, 4 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis, (shape, dtype) in zip(axes, panels):
        _bars(axis, rows, shape, dtype)
    for axis, model in zip(axes[len(panels) :], models):
        _curves(axis, [row for row in rows if "recall" in row and row["model"] == model], model)
    for axis in axes[count:]:
        axis.set_visible(False)
    figure.savefig(path, dpi=130, format="png")


def _bars(axis: Any, rows: Rows, shape: tuple[int, ...], dtype: str) -> None:
    solvers = solvers_of(rows, shape, dtype)
    for place, name in enumerate(BARS):
        found = [by_contender(rows, shape, dtype, solver).get(name) for solver in solvers]
        at = [i + 0.2 * (place - 1.5) for i, row in enumerate(found) if row is not None]
        here = [row for row in found if row is not None]
        if not here:
            continue
        spread = [[max(0.0, r["us"] - r["us_p20"]) for r in here], [max(0.0, r["us_p80"] - r["us"]) for r in here]]
        axis.bar(at, [r["us"] for r in here], width=0.2, yerr=spread, label=name, error_kw={"linewidth": 0.8})
    axis.set_yscale("log")
    axis.set_xticks(range(len(solvers)), solvers)
    axis.set_ylabel("us per evaluation outside the model")
    axis.set_title(f"{'x'.join(map(str, shape))} {dtype}")
    axis.legend(fontsize="small")


def _curves(axis: Any, rows: Rows, model: str) -> None:
    """A colour for each method of guidance."""
    for number, guidance in enumerate(dict.fromkeys(row["guidance"] for row in rows)):
        here = [row for row in rows if row["guidance"] == guidance]
        scales, colour = [row["scale"] for row in here], f"C{number}"
        axis.plot(scales, [row["accuracy"] for row in here], "-o", color=colour, label=guidance)
        axis.plot(scales, [row["recall"] for row in here], "--s", color=colour)
    axis.set_xlabel("guidance scale")
    axis.set_ylabel("accuracy (solid, dots), recall (dashed, squares)")
    axis.set_ylim(0, 1.05)
    axis.set_title(f"digits, {model}, {rows[0]['images']} samples")
    axis.legend(fontsize="small")
