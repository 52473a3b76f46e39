"""Suite `gpu`: what the kernels and the captured loop reach on a GPU, beside the peers that are installed.

`python -m pyguide.bench --device cuda --suite gpu` measures; with --dry the same code runs on a CPU, tiny and with the
host's clock, and its rows answer nothing. benchmarks/gpu.sh does it on a machine with a GPU, after the tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from ..extras import require
from ..step import Mismatch
from .setup import Setup

Rows = list[dict[str, Any]]
NOISY = "euler_ancestral"  # with the noise drawn in the kernel
WRONG = "Wrong: "
BOTH = ("buffers", "expand")  # the formulations of torch.compile that were ever the fastest


def parts(setup: Setup) -> list[tuple[str, Callable[[], Rows]]]:
    """(name, function that measures it), what matters most first: a run may end before the last one."""
    from . import counts, end_to_end, kernels, loops

    sizes, found = setup.sizes, []
    (solver, *others), (dtype, *narrow) = sizes.solvers, sizes.dtypes

    def add(name: str, function: Callable[..., Rows], *arguments: Any, **options: Any) -> None:
        found.append((name, lambda: function(*arguments, **options)))

    def kernel(what: str, solver: str, shape: tuple[int, ...], dtype: str, *formulations: str) -> None:
        steps = sizes.replay_steps if what == "replay" else sizes.throughput_steps
        name = f"{what} {solver} {'x'.join(map(str, shape))} {dtype}"
        add(name, kernels.measured, what, solver, shape, dtype, steps, setup, formulations)

    for backend in setup.backends:
        for captured in (False, True) if setup.on_gpu else (False,):
            add(f"counts {backend}", counts.measured, backend, setup, captured=captured)
    for shape in sizes.small:
        add(f"host time {'x'.join(map(str, shape))}", loops.measured, solver, shape, dtype, setup)
        kernel("replay", solver, shape, dtype, *BOTH)
        for other in others:
            kernel("replay", other, shape, dtype)
    first, *larger = sizes.large
    for each in sizes.dtypes:
        kernel("throughput", solver, first, each, *BOTH)
    for form in end_to_end.forms(setup):
        add(f"end to end digits{form}", end_to_end.measured, "digits", setup, form=form)
    add("end to end unet", end_to_end.measured, "unet", setup, form="")
    for other in others:
        kernel("throughput", other, first, dtype, BOTH[0])
    for shape in larger:
        kernel("throughput", solver, shape, dtype, BOTH[0])
    for form in list(end_to_end.forms(setup))[1:]:
        add(f"end to end unet{form}", end_to_end.measured, "unet", setup, form=form)
    for other in others:
        for each in narrow:
            kernel("throughput", other, first, each)
    kernel("throughput", NOISY, first, dtype)
    kernel("replay", NOISY, sizes.small[0], dtype)
    for shape in sizes.small:
        kernel("replay", solver, shape, narrow[-1])
    return found


def run(setup: Setup, notes: list[str], *, budget: float | None = None) -> Iterator[tuple[str, Rows]]:
    """(what was measured, its rows). A part that fails is a note, as are those for which the time was up. The note of
    one whose contenders compute different things begins with WRONG.

    budget: seconds after which no further part is begun; None: as long as it takes.
    """
    torch, start, late = require("torch"), time.monotonic(), []
    for name, function in parts(setup):
        if budget is not None and time.monotonic() - start > budget:
            late.append(name)
            yield name, []
            continue
        rows: Rows = []
        try:
            rows = function()
        except Mismatch as error:
            notes.append(f"{WRONG}{name}: {error}")
        except Exception as error:  # the other parts are worth having
            notes.append(f"{name} failed: {type(error).__name__}: {str(error).strip()[:300]}")
        if setup.on_gpu:
            torch.cuda.empty_cache()
        yield name, rows
    if late:
        notes.append(f"The time was up before: {', '.join(late)}")
