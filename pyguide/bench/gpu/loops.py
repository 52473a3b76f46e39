"""Host time of a sampling loop per evaluation: what the CPU spends between two model calls to keep a GPU fed.

The model is free and the queue short: nothing waits for the device, whose part is shorter at these sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..cases import CASES
from ..peers import Contender, Pyguide
from ..step import COMPILE, SAMPLER, Workload, check_equal, contenders
from ..timing import FreeModel, Measure, interleaved
from .setup import Setup


def host_measure(one: Contender, work: Workload) -> Measure:
    """Seconds on the host between two model calls, mean over a run."""
    model = FreeModel(work.outputs)

    def measure() -> float:
        work.clock.wait()
        model.begin()
        one.run(model, work.noise)
        return model.per_evaluation

    return measure


def measured(solver: str, shape: Sequence[int], dtype: str, setup: Setup) -> list[dict[str, Any]]:
    """Every loop that is installed, after the check that all of them compute the same samples."""
    case, steps = CASES[solver], setup.sizes.host_steps
    work = Workload(shape, dtype, setup.clock)
    work.outputs = work.outputs[:1]
    found: dict[str, Contender] = contenders(case, steps)
    for backend in setup.backends[1:]:  # the first is what "auto" picks
        found[f"{SAMPLER} {backend}"] = Pyguide(case, steps, backend)
    if setup.compiler is not None:
        compiled = contenders(case, steps, [("buffers", True), ("expand", True)], setup.compiler)
        found |= {who: one for who, one in compiled.items() if who.startswith(COMPILE)}
    differences = check_equal(found, work, steps)
    timings = interleaved(
        {who: host_measure(one, work) for who, one in found.items()}, rounds=setup.rounds, seconds=setup.seconds
    )
    return [
        {
            **setup.row("host", who),
            "solver": solver,
            "shape": list(shape),
            "dtype": dtype,
            "steps": steps,
            **timing.as_dict(),
            "difference": differences[who],
        }
        for who, timing in timings.items()
    ]
