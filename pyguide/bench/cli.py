"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import cases
from .extras import missing, require

SUITES = ("step", "sample", "accuracy", "compile")
SHAPES = ((1, 4, 64, 64), (1, 4, 128, 128), (8, 16, 128, 128))
FULL_SHAPES = (*SHAPES, (4, 4, 64, 64), (1, 16, 128, 128), (1, 4096, 64), (1, 16, 5, 60, 90))
DTYPES = ("float32", "float16", "bfloat16")
FORMAT = 1  # of the JSON file
GRID = Path("digits.png")


def parser() -> argparse.ArgumentParser:
    text = "Measures pyguide against what else is installed: stock diffusers, eager PyTorch, torch.compile."
    made = argparse.ArgumentParser(prog="python -m pyguide.bench", description=text)
    made.add_argument("--suite", action="append", choices=SUITES, help="default: all; may be repeated")
    made.add_argument("--shapes", nargs="+", type=shape, metavar="BxCxHxW", help="of the latents (step)")
    made.add_argument("--dtype", action="append", choices=DTYPES, help="of model inputs and outputs (step)")
    made.add_argument(
        "--solver", action="append", choices=tuple(cases.CASES), help=f"default: {', '.join(cases.DEFAULT)}"
    )
    made.add_argument("--device", default="cpu", help="cpu; there is no other back end yet")
    made.add_argument("--rounds", type=positive, default=5, help="interleaved rounds, of which the median is shown (5)")
    made.add_argument("--images", type=images, help="digits to sample for each scale (sample)")
    made.add_argument("--steps", type=positive, help="sampling steps of the digits (sample)")
    made.add_argument("--full", action="store_true", help="more shapes and solvers, bfloat16, 50 steps of digits")
    made.add_argument("--no-compile", action="store_true", help="leave out torch.compile and its warm-up")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every row, with what it was measured on")
    made.add_argument("--plot", type=Path, metavar="PNG", help="write bars by solver, and accuracy and recall by scale")
    made.add_argument("--grid", type=Path, metavar="PNG", default=GRID, help=f"where the sampled digits go ({GRID})")
    return made


def shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) < 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected sizes such as 1x4x64x64 (at least three), got {text!r}")
    return tuple(map(int, sizes))


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def images(text: str) -> int:
    """At least two lines of the grid, which is enough for the judge too."""
    count = positive(text)
    if count < 20:
        raise argparse.ArgumentTypeError(f"expected at least 20, got {text!r}")
    return count


def check(options: argparse.Namespace, made: argparse.ArgumentParser) -> None:
    """Errors that need more than one argument, before anything is measured."""
    if options.device.startswith("cuda"):
        made.error("argument --device: this version of pyguide has no CUDA back end yet: cpu only")
    if options.device != "cpu":
        made.error(f"argument --device: expected cpu, got {options.device!r}")
    for flag in ("json", "plot", "grid"):
        path = getattr(options, flag)
        if path is not None and not path.absolute().parent.is_dir():
            made.error(f"argument --{flag}: no such folder: {path.absolute().parent}")
    if options.plot is not None and not {"step", "sample"} & set(options.suite or SUITES):
        made.error("argument --plot: draws the suites step and sample, neither was asked for")
    for package in ("torch", "rich"):
        why = missing(package)
        if why is not None:
            raise ImportError(why, name=package)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the module."""
    made = parser()
    options = made.parse_args(argv)
    try:
        check(options, made)
    except ImportError as error:
        sys.exit(f"ImportError: {error}")
    start = time.perf_counter()
    _quiet()
    console = require("rich.console").Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = require("rich.console").Console(width=160)  # in a file nothing need be cut
    notes: list[str] = []
    rows = measure(options, console, notes)
    from . import machine, plot, report, summary

    report.show(console, rows)
    facts = machine.facts()
    written = [str(options.grid)] if any("recall" in row for row in rows) and "matplotlib" in sys.modules else []
    if options.json is not None:
        content = {"format": FORMAT, "rows": [{**facts, **row} for row in rows], "notes": notes}
        options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        written.append(str(options.json))
    if options.plot is not None:
        why = missing("matplotlib") or plot.nothing(rows)
        if why is None:
            plot.draw(rows, options.plot)
            written.append(str(options.plot))
        else:
            notes.append(f"No plot: {why}")
    console.print(
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads, {facts['isa']}, "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        + f", commit {facts['commit'] or 'unknown'}, {time.perf_counter() - start:.0f} s\n",
        style="dim",
    )
    console.print(summary.paragraph(rows, notes, written), highlight=False, markup=False, soft_wrap=True)


def _quiet() -> None:
    """Warnings of the peers' own imports would tear the progress bar; errors still show."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def measure(options: argparse.Namespace, console: Any, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of the suites, with a progress bar; what could not be measured is noted."""
    torch, progress = require("torch"), require("rich.progress")
    if missing("diffusers") is not None:
        notes.append(f"No comparison with stock diffusers: {missing('diffusers')}")
    rows: list[dict[str, Any]] = []
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TimeElapsedColumn())
    with torch.no_grad(), progress.Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        for suite in dict.fromkeys(options.suite or SUITES):
            why = _needs(suite)
            if why is not None:
                notes.append(f"The suite {suite} was left out: {why}")
                continue
            total, parts = _suite(suite, options, notes)
            task = bar.add_task(suite, total=total)
            for what, found in parts:
                rows += found
                bar.update(task, advance=1, description=f"{suite}: {what}")
                bar.refresh()
    return rows


def _needs(suite: str) -> str | None:
    wanted = {"sample": ("safetensors", "sklearn")}.get(suite, ())
    return next((why for why in map(missing, wanted) if why is not None), None)


Parts = Iterator[tuple[str, list[dict[str, Any]]]]


def _suite(suite: str, options: argparse.Namespace, notes: list[str]) -> tuple[int, Parts]:
    """(number of parts, the parts) of a suite."""
    suites: dict[str, Callable[[argparse.Namespace, list[str]], tuple[int, Parts]]]
    suites = {"step": _step, "sample": _sample, "accuracy": _accuracy, "compile": _compile}
    return suites[suite](options, notes)


def _step(options: argparse.Namespace, notes: list[str]) -> tuple[int, Parts]:
    from . import step

    shapes = options.shapes or (FULL_SHAPES if options.full else SHAPES)
    dtypes = options.dtype or (["float32", "bfloat16"] if options.full else ["float32"])
    solvers = options.solver or (list(cases.CASES) if options.full else list(cases.DEFAULT))
    why = "--no-compile was given" if options.no_compile else step.compile_error()
    if why is not None:
        notes.append(f"No comparison with torch.compile: {why}")
    parts = step.run(shapes, dtypes, solvers, full=options.full, rounds=options.rounds, compile_missing=why)
    return len(shapes) * len(dtypes) * len(solvers), parts


def _sample(options: argparse.Namespace, notes: list[str]) -> tuple[int, Parts]:
    from . import digits, sample

    steps = options.steps or (50 if options.full else 25)
    count = options.images or sample.IMAGES
    grid = options.grid
    if missing("matplotlib") is not None:
        notes.append(f"No picture of the digits: {missing('matplotlib')}")
        grid = None
    total = len(digits.KINDS) * (len(sample.BATCHES) + len(sample.SCALES)) + (grid is not None)
    return total, sample.run(steps=steps, count=count, rounds=options.rounds, grid=grid)


def _accuracy(options: argparse.Namespace, notes: list[str]) -> tuple[int, Parts]:
    from . import accuracy

    solvers = [name for name in accuracy.SOLVERS if name in (options.solver or accuracy.SOLVERS)]
    if not solvers:
        notes.append(f"The suite accuracy measures {', '.join(accuracy.SOLVERS)} only")
    return len(solvers) * len(accuracy.DTYPES), accuracy.run(solvers)


def _compile(options: argparse.Namespace, notes: list[str]) -> tuple[int, Parts]:
    from . import compile

    return len(compile.SOLVERS), compile.run(rounds=options.rounds)
