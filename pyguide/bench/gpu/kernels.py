"""The step alone on a GPU: back ends, inductor's kernel and a copy of the same bytes, interleaved.

throughput   rows launched one after another, on tensors that no cache holds
replay       a CUDA graph of all rows, on latents of usual size, which stay in the cache
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..cases import CASES, Case
from ..compiled import Compiled
from ..extras import require
from ..launches import CompiledRows, CopyRows, KernelRows, Rows, chained, replayed, run_all
from ..step import COPY, TOLERANCE, Mismatch, Workload
from ..timing import Measure, interleaved
from ..traffic import bytes_per_evaluation
from .setup import Setup

AGAIN = " again"  # the same version timed twice: what differs is noise
DEPENDENT = "native dependent"  # with programmatic dependent launch
INDUCTOR = "inductor"
REPLAYS = 5  # of a graph in one measurement
DIFFERENCE = 1e-5  # relative, of x after all rows: the outputs are given, so only roundings of the state differ


def contenders(case: Case, steps: int, work: Workload, setup: Setup, formulations: Sequence[str]) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for backend in setup.backends:
        found[backend] = KernelRows(case, steps, work.noise, work.outputs, backend)
    if setup.dependent and "native" in found:
        found[DEPENDENT] = KernelRows(case, steps, work.noise, work.outputs, "native", dependent=True)
    if setup.compiler is not None:
        for formulation in formulations:
            one = Compiled(case, steps, formulation, static=True, backend=setup.compiler)
            found[f"{INDUCTOR} {formulation}"] = CompiledRows(one, work.noise, work.outputs)
    return found


def check(found: dict[str, Rows], case: Case, dtype: str, setup: Setup) -> None:
    """Every row writes everything that it has to, and all of them the same x; Mismatch if not.

    A stochastic plan is compared between pyguide's back ends only: the others draw other numbers. With 16-bit outputs
    torch.compile may round each product of an output and a coefficient to 16 bits, as torch does.
    """
    torch, first = require("torch"), None
    for name, rows in found.items():
        rows.poison()
        run_all(rows)
        setup.clock.wait()
        x, *rest = rows.written()
        if not all(bool(torch.isfinite(part).all()) for part in (x, *rest)):
            raise Mismatch(f"{name} left something unwritten or not finite")
        if first is None:
            first = x.flatten().double()
        elif not (case.stochastic and name.startswith(INDUCTOR)):
            difference = float((x.flatten().double() - first).norm() / first.norm())
            if not difference <= (TOLERANCE[dtype] if name.startswith(INDUCTOR) else DIFFERENCE):
                raise Mismatch(f"{name} and {next(iter(found))} compute different x, {difference:.1e} apart")


def way(what: str, rows: Rows, setup: Setup) -> Measure:
    if what == "throughput":
        return chained(rows, setup.clock)
    return replayed(rows, setup.clock, REPLAYS if setup.on_gpu else 1)


def measured(
    what: str,
    solver: str,
    shape: Sequence[int],
    dtype: str,
    steps: int,
    setup: Setup,
    formulations: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Rows of one solver at one shape, `what` of the module's two ways."""
    case, work = CASES[solver], Workload(shape, dtype, setup.clock)
    found = contenders(case, steps, work, setup, formulations)
    check(found, case, dtype, setup)
    if found:
        first = next(iter(found))
        found[first + AGAIN] = found[first]
    size = bytes_per_evaluation(case.plan(steps), elements=work.elements, item=work.item)
    sets = 1 if work.resident else 2 + int(2 * setup.clock.cache_bytes / size)
    found[COPY] = CopyRows(size, sets, setup.clock.device, steps)
    timings = interleaved(
        {who: way(what, rows, setup) for who, rows in found.items()}, rounds=setup.rounds, seconds=setup.seconds
    )
    return [
        {
            **setup.row(what, who),
            "solver": solver,
            "shape": list(shape),
            "dtype": dtype,
            "steps": steps,
            **timing.as_dict(),
            "bytes": size,
            "gb_per_s": size / timing.median / 1e9,
            "resident": work.resident,
            "sets": work.sets,
        }
        for who, timing in timings.items()
    ]
