"""Suite `compile`: how long a sampler takes to become a certified table, on one core."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from .. import compiler, schedules

SOLVERS = ("ddim", "euler_ancestral", "heun", "dpmpp_2m", "unipc")
STEPS = (50, 1000)


def run(solvers: Sequence[str] = SOLVERS, *, rounds: int = 5) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Parts (what, rows): milliseconds of process time; the median of the rounds, of at most three for long plans."""
    schedule = schedules.scaled_linear()
    for solver in solvers:
        rows = []
        for steps in STEPS:
            path, times = schedule.path(steps), []
            for _ in range(rounds if steps < 100 else min(rounds, 3)):
                start = time.process_time()
                plan = compiler.compile(solver, path)
                times.append(1e3 * (time.process_time() - start))
            row = {"suite": "compile", "solver": solver, "steps": steps, "ms": statistics.median(times)}
            certificates = {"residual": plan.residual, "replay_error": plan.replay_error}
            rows.append({**row, "evaluations": plan.evaluations, "slots": plan.slots, **certificates})
        yield solver, rows
