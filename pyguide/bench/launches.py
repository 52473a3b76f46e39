"""The step alone, row after row, with no model and no loop around it: what the time of a launch is taken from.

A `Rows` has operands that lie ready and runs rows 1 .. count of a plan on them, one after another. The model's outputs
are given (several sets in turn where they would stay in the cache otherwise), so all of them compute the same numbers.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from ..backends import Backend
from ..guidance import CFG
from ..run import Run
from ..sampler import Sampler
from .cases import SCALE, Case
from .clock import Clock
from .compiled import Compiled
from .extras import require
from .timing import Measure

NAN = float("nan")


class Rows(Protocol):
    count: int

    def reset(self) -> None:
        """Back to where row 0 left everything."""

    def launch(self, i: int) -> None:
        """Row i + 1."""

    def poison(self) -> None:
        """NaN wherever a launch must write before anyone reads."""

    def written(self) -> list[Any]:
        """What the last launch wrote, the new x first."""


class KernelRows:
    """pyguide's kernel of one back end. dependent: programmatic dependent launch (CUDA, Hopper and newer)."""

    def __init__(
        self, case: Case, steps: int, noise: Any, outputs: list[Any], backend: Backend, *, dependent: bool = False
    ) -> None:
        sampler = Sampler(lambda x, t: x, case.plan(steps), CFG(SCALE), backend=backend)
        seeds = 0 if case.stochastic else None
        run = Run(sampler, noise, {}, {}, None, seeds, None, None, None, events=False)
        self.operands, self.outputs, self.count = run.launch, [[out] for out in outputs], run.plan.evaluations - 1
        self.step = cast(Any, run.step)
        if dependent:
            self.step.step.dependent_launch = True
        self.step.advance(())
        self.start = self.operands.state[0].clone()
        self.samples = getattr(getattr(self.step, "resident", None), "samples", None)
        if self.samples is None:  # a back end of the CPU: rows advance on the host
            self._launch = self.step.advance
        else:
            self._launch, self._begin = self.step.enqueue, self.samples.clone()

    def reset(self) -> None:
        self.operands.state[0].copy_(self.start)
        if self.samples is None:
            self.operands.samples["row"] = 1
        else:
            self.samples.copy_(self._begin)

    def launch(self, i: int) -> None:
        self._launch(self.outputs[i % len(self.outputs)])

    def poison(self) -> None:
        for slot in self.operands.state[1:]:
            slot.fill_(NAN)
        self.operands.inputs[0].fill_(NAN)

    def written(self) -> list[Any]:
        return [self.operands.state[0], self.operands.inputs[0]]


class CompiledRows:
    """One formulation of the step under torch.compile."""

    def __init__(self, one: Compiled, noise: Any, outputs: list[Any]) -> None:
        self.one = one
        self.operands = self.one.begin(noise)
        self.noise = noise.flatten()
        self.outputs = [output.view(2, -1) for output in outputs]
        self.count = self.one.program.evaluations - 1

    def reset(self) -> None:
        first, *rest = self.operands.slots
        first.copy_(self.noise)
        for slot in rest:
            slot.zero_()

    def launch(self, i: int) -> None:
        self.one.advance(self.operands, i, self.outputs[i % len(self.outputs)])

    def poison(self) -> None:
        for given in self.operands.given:
            given.fill_(NAN)

    def written(self) -> list[Any]:
        return [self.operands.slots[0], *self.operands.given]


class CopyRows:
    """torch's copy_ of `size` bytes, half read and half written, from `sets` sources to as many targets in turn."""

    def __init__(self, size: float, sets: int, device: str, count: int) -> None:
        torch = require("torch")
        elements = max(1, round(size / 8))
        self.pairs = [(torch.empty(elements, device=device), torch.randn(elements, device=device)) for _ in range(sets)]
        self.count = count

    def reset(self) -> None:
        pass

    def launch(self, i: int) -> None:
        target, source = self.pairs[i % len(self.pairs)]
        target.copy_(source)

    def poison(self) -> None:
        for target, _ in self.pairs:
            target.fill_(NAN)

    def written(self) -> list[Any]:
        return [target for target, _ in self.pairs]


def run_all(rows: Rows) -> None:
    rows.reset()
    for i in range(rows.count):
        rows.launch(i)


def chained(rows: Rows, clock: Clock) -> Measure:
    """Seconds per row of all rows launched one after another: for rows that take longer than launching them."""

    def work() -> None:
        for i in range(rows.count):
            rows.launch(i)

    def measure() -> float:
        rows.reset()
        return clock.seconds(work) / rows.count

    return measure


def replayed(rows: Rows, clock: Clock, replays: int) -> Measure:
    """Seconds per row of a CUDA graph of all rows. The reset is in the graph and counts: one or two nodes in all."""
    again = clock.captured(lambda: run_all(rows))

    def work() -> None:
        for _ in range(replays):
            again()

    return lambda: clock.seconds(work) / (replays * rows.count)
