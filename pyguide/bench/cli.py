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

SUITES = ("step", "sample", "accuracy", "compile")  # by default on a CPU
GPU_SUITES = ("gpu", "step", "sample")  # on a GPU
ASKED = ("classifier", "guidance")  # only when asked for
ON_GPU = (*GPU_SUITES, "guidance")
REHEARSED = ("gpu", "guidance")  # with --dry
SHARE = 2 / 3  # of the budget, for the suite gpu if there is another one behind it
SHAPES = ((1, 4, 64, 64), (1, 4, 128, 128), (8, 16, 128, 128))
FULL_SHAPES = (*SHAPES, (4, 4, 64, 64), (1, 16, 128, 128), (1, 4096, 64), (1, 16, 5, 60, 90))
DTYPES = ("float32", "float16", "bfloat16")
FORMAT = 1  # of the JSON file
GRID = Path("digits.png")


def parser() -> argparse.ArgumentParser:
    text = "Measures pyguide against what else is installed: stock diffusers, eager PyTorch, torch.compile."
    made = argparse.ArgumentParser(prog="python -m pyguide.bench", description=text)
    suites = dict.fromkeys((*SUITES, *GPU_SUITES, *ASKED))
    default = f"default: {', '.join(SUITES)}; on a GPU {', '.join(GPU_SUITES)}"
    made.add_argument("--suite", action="append", choices=tuple(suites), help=f"{default}; may be repeated")
    made.add_argument("--shapes", nargs="+", type=shape, metavar="BxCxHxW", help="of x (step, classifier, guidance)")
    made.add_argument("--dtype", action="append", choices=DTYPES, help="of model inputs and outputs (step)")
    made.add_argument(
        "--solver", action="append", choices=tuple(cases.CASES), help=f"default: {', '.join(cases.DEFAULT)}"
    )
    made.add_argument(
        "--device", default="cpu", type=device, help="cpu (the default), cuda or cuda:1 (step, sample, gpu, guidance)"
    )
    made.add_argument(
        "--dry",
        action="store_true",
        help="rehearse the suite gpu, or guidance, on a CPU: tiny, and it measures nothing",
    )
    made.add_argument(
        "--budget", type=positive, metavar="SECONDS", help="begin no further part after this time (gpu, guidance)"
    )
    made.add_argument("--rounds", type=positive, default=5, help="interleaved rounds, of which the median is shown (5)")
    made.add_argument("--images", type=images, help="digits to sample for each scale (sample)")
    made.add_argument("--steps", type=positive, help="sampling steps of the digits (sample)")
    made.add_argument(
        "--guided-diffusion", type=Path, metavar="PATH", help="a checkout of openai/guided-diffusion (classifier)"
    )
    made.add_argument("--full", action="store_true", help="more shapes and solvers, bfloat16, 50 steps of digits")
    made.add_argument("--no-compile", action="store_true", help="leave out torch.compile and its warm-up")
    rows = "write every row, with what it was measured on; to FILE.jsonl: append them, a line each, as they come"
    made.add_argument("--json", type=Path, metavar="FILE", help=rows)
    made.add_argument("--plot", type=Path, metavar="PNG", help="write bars by solver, and accuracy and recall by scale")
    made.add_argument("--grid", type=Path, metavar="PNG", default=GRID, help=f"where the sampled digits go ({GRID})")
    return made


def shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) < 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected sizes such as 1x4x64x64 (at least three), got {text!r}")
    return tuple(map(int, sizes))


def device(text: str) -> str:
    kind, colon, index = text.partition(":")
    if text != "cpu" and (kind != "cuda" or bool(colon) != index.isdigit()):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:1, got {text!r}")
    return text


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
    suites = chosen(options)
    on_gpu = options.device.startswith("cuda")
    if options.dry and (on_gpu or not set(suites) <= {*REHEARSED}):
        made.error("argument --dry: rehearses --suite gpu or guidance on a CPU, and nothing else")
    if "gpu" in suites and not (on_gpu or options.dry):
        made.error("argument --suite: gpu measures a GPU: add --device cuda, or --dry to rehearse it here")
    for suite in suites:
        if on_gpu and suite == "classifier":
            made.error(f"argument --suite: {suite} measures the CPU: leave out --device {options.device}")
        if on_gpu and suite not in ON_GPU:
            made.error(f"argument --suite: {suite} does not depend on the device: leave out --device {options.device}")
    for flag in ("json", "plot", "grid"):
        path = getattr(options, flag)
        if path is not None and not path.absolute().parent.is_dir():
            made.error(f"argument --{flag}: no such folder: {path.absolute().parent}")
    if options.guided_diffusion is not None:
        from .peers_classifier import not_there

        why_not = not_there(options.guided_diffusion)
        if why_not is not None:
            made.error(f"argument --guided-diffusion: {why_not}")
    if options.plot is not None and not {"step", "sample"} & set(suites):
        made.error("argument --plot: draws the suites step and sample, neither was asked for")
    for package in ("torch", "rich"):
        why = missing(package)
        if why is not None:
            raise ImportError(why, name=package)
    if on_gpu:
        cuda = require("torch").cuda
        if not cuda.is_available():
            made.error("argument --device: torch finds no CUDA device here")
        index = int(options.device.partition(":")[2] or cuda.current_device())
        if index >= cuda.device_count():
            made.error(f"argument --device: there are {cuda.device_count()} CUDA devices, got {options.device}")
        options.device = f"cuda:{index}"
        cuda.set_device(index)


def chosen(options: argparse.Namespace) -> list[str]:
    """The suites that were asked for, in order."""
    default = ("gpu",) if options.dry else GPU_SUITES if options.device.startswith("cuda") else SUITES
    return list(dict.fromkeys(options.suite or default))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the module."""
    made = parser()
    options = made.parse_args(argv)
    try:
        check(options, made)
    except ImportError as error:
        sys.exit(f"ImportError: {error}")
    options.start = time.perf_counter()
    _quiet()
    console = require("rich.console").Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = require("rich.console").Console(width=160)  # in a file nothing need be cut
    notes: list[str] = []
    from . import classifier, gpu, guidance, machine, plot, report, summary

    lines = options.json is not None and options.json.suffix == ".jsonl"
    rows = measure(options, console, notes, options.json if lines else None)
    for table in (*classifier.tables(rows), *guidance.tables(rows)):
        console.print(table)
    report.show(console, rows)
    facts = machine.facts(options.device)
    written = [str(options.grid)] if any("recall" in row for row in rows) and "matplotlib" in sys.modules else []
    if lines:
        written.append(str(options.json))
    elif options.json is not None:
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
        + f", commit {facts['commit'] or 'unknown'}, {time.perf_counter() - options.start:.0f} s\n",
        style="dim",
    )
    console.print(summary.paragraph(rows, notes, written), highlight=False, markup=False, soft_wrap=True)
    if any(note.startswith((gpu.WRONG, guidance.WRONG)) for note in notes):
        sys.exit(1)


def _quiet() -> None:
    """Warnings of the peers' own imports would tear the progress bar; errors still show."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def append(file: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Rows as lines of JSON, at the end of a file."""
    with file.open("a", encoding="utf-8") as target:
        target.writelines(json.dumps({**facts, **row}, allow_nan=False) + "\n" for row in rows)


def measure(
    options: argparse.Namespace, console: Any, notes: list[str], file: Path | None = None
) -> list[dict[str, Any]]:
    """The rows of the suites, with a progress bar, and notes on what is missing. file: takes them as they come."""
    from . import machine

    torch, progress = require("torch"), require("rich.progress")
    if missing("diffusers") is not None:
        notes.append(f"No comparison with stock diffusers: {missing('diffusers')}")
    rows: list[dict[str, Any]] = []
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TimeElapsedColumn())
    with torch.no_grad(), progress.Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        for suite in chosen(options):
            why = _needs(suite)
            if why is not None:
                notes.append(f"The suite {suite} was left out: {why}")
                continue
            total, parts = _suite(suite, options, notes)
            task = bar.add_task(suite, total=total)
            for what, found in parts:
                rows += found
                if file is not None:
                    append(file, machine.facts(options.device), found)
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
    suites = {"gpu": _gpu, "step": _step, "sample": _sample, "accuracy": _accuracy, "compile": _compile}
    suites |= {"classifier": _classifier, "guidance": _guidance}
    return suites[suite](options, notes)


def _gpu(options: argparse.Namespace, notes: list[str]) -> tuple[int, Parts]:
    from . import gpu
    from .gpu.setup import prepare

    compiled = not options.no_compile
    setup = prepare(options.device, dry=options.dry, rounds=options.rounds, compiled=compiled, notes=notes)
    budget = options.budget
    if budget is not None and "guidance" in chosen(options):
        budget *= SHARE
    return len(gpu.parts(setup)), gpu.run(setup, notes, budget=budget)


def _step(options: argparse.Namespace, notes: list[str]) -> tuple[int, Parts]:
    from . import step
    from .clock import clock_for

    shapes = options.shapes or (FULL_SHAPES if options.full else SHAPES)
    dtypes = options.dtype or (["float32", "bfloat16"] if options.full else ["float32"])
    solvers = options.solver or (list(cases.CASES) if options.full else list(cases.DEFAULT))
    why = "--no-compile was given" if options.no_compile else step.compile_error(options.device)
    if why is not None:
        notes.append(f"No comparison with torch.compile: {why}")
    clock = clock_for(options.device)
    parts = step.run(
        shapes, dtypes, solvers, full=options.full, rounds=options.rounds, compile_missing=why, clock=clock
    )
    return len(shapes) * len(dtypes) * len(solvers), parts


def _classifier(options: argparse.Namespace, notes: list[str]) -> tuple[int, Parts]:
    from . import classifier, step
    from .peers_classifier import CASES

    shapes, checkout = options.shapes or classifier.SHAPES, options.guided_diffusion
    why = "--no-compile was given" if options.no_compile else step.compile_error()
    if why is not None:
        notes.append(f"No comparison with torch.compile: {why}")
    if checkout is None:
        notes.append(classifier.WITHOUT)
    parts = classifier.run(shapes, checkout=checkout, rounds=options.rounds, compile_missing=why)
    return len(shapes) * len(CASES), parts


def _guidance(options: argparse.Namespace, notes: list[str]) -> tuple[int, Parts]:
    from . import guidance, step
    from .clock import clock_for

    shapes = options.shapes or (guidance.TINY if options.dry else guidance.SHAPES)
    why = (
        "--no-compile was given" if options.no_compile else None if options.dry else step.compile_error(options.device)
    )
    if why is not None and "gpu" not in chosen(options):  # which says so too
        notes.append(f"No comparison with torch.compile: {why}")
    settings: dict[str, Any] = {"rounds": options.rounds, "compile_missing": why, "clock": clock_for(options.device)}
    if options.dry:
        notes.append("A rehearsal of the suite guidance: its times mean nothing")
        settings |= {"rounds": 1, "seconds": 0.0, "steps": guidance.COUNTED[0], "backend": "eager"}
    if options.budget is not None:
        settings["late"] = lambda: time.perf_counter() - options.start > options.budget
    return len(guidance.cases(shapes)), guidance.run(shapes, notes, **settings)


def _sample(options: argparse.Namespace, notes: list[str]) -> tuple[int, Parts]:
    from . import digits, sample
    from .clock import clock_for

    steps = options.steps or (50 if options.full else 25)
    count = options.images or sample.IMAGES
    grid = options.grid
    if missing("matplotlib") is not None:
        notes.append(f"No picture of the digits: {missing('matplotlib')}")
        grid = None
    rows = len(sample.METHODS) * len(sample.SCALES) + 1  # the second stage
    total = len(digits.KINDS) * (len(sample.BATCHES) + rows) + (grid is not None)
    clock = clock_for(options.device)
    return total, sample.run(steps=steps, count=count, rounds=options.rounds, grid=grid, clock=clock)


def _accuracy(options: argparse.Namespace, notes: list[str]) -> tuple[int, Parts]:
    from . import accuracy

    solvers = [name for name in accuracy.SOLVERS if name in (options.solver or accuracy.SOLVERS)]
    if not solvers:
        notes.append(f"The suite accuracy measures {', '.join(accuracy.SOLVERS)} only")
    return len(solvers) * len(accuracy.DTYPES), accuracy.run(solvers)


def _compile(options: argparse.Namespace, notes: list[str]) -> tuple[int, Parts]:
    from . import compile

    return len(compile.SOLVERS), compile.run(rounds=options.rounds)
