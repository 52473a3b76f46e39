"""Interleaved timing: every contender in every round, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Measure = Callable[[], float]  # runs once, returns seconds per evaluation


@dataclass(frozen=True)
class Timing:
    """Seconds per evaluation in each round (a round is the median of its runs)."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.rounds))

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.rounds, q))

    def as_dict(self) -> dict[str, Any]:
        """us, us_p20, us_p80 and us_rounds."""
        micro = [1e6 * value for value in self.rounds]
        p20, p80 = (1e6 * self.percentile(q) for q in (20, 80))
        return {"us": 1e6 * self.median, "us_p20": p20, "us_p80": p80, "us_rounds": micro}


def interleaved(
    contenders: Mapping[str, Measure],
    *,
    rounds: int = 5,
    seconds: float = 0.02,
) -> dict[str, Timing]:
    """Each contender once a round for about `seconds`; the first of several short runs is not counted.

    The order rotates from round to round, the garbage collector is off. rounds: at least 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    names = list(contenders)
    values: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        contenders[name]()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                values[name].append(_round(contenders[name], seconds))
            gc.collect()
    finally:
        if enabled:
            gc.enable()
    return {name: Timing(tuple(found)) for name, found in values.items()}


def _round(measure: Measure, seconds: float) -> float:
    start = time.perf_counter()
    runs = [measure()]
    if time.perf_counter() - start < seconds / 2:
        runs.clear()  # a short run finds what others left in the cache; a long one fills it by itself
    while not runs or time.perf_counter() - start < seconds:
        runs.append(measure())
    return float(np.median(runs))


class FreeModel:
    """A model that costs nothing: returns prepared outputs in turn and notes when it is called.

    `outputs` are [2 B, C, *]. The time between the first and the last call of a run is what everything else took.
    """

    def __init__(self, outputs: list[Any]) -> None:
        self.outputs = outputs
        self.begin()

    def begin(self) -> None:
        self.marks: list[float] = []
        self._mark, self._now = self.marks.append, time.perf_counter
        self._turn, self._count = 0, len(self.outputs)

    def __call__(self, x: Any, t: Any) -> Any:
        self._mark(self._now())
        self._turn += 1
        return self.outputs[self._turn % self._count]

    @property
    def per_evaluation(self) -> float:
        """Seconds from one call to the next, mean over the run."""
        return (self.marks[-1] - self.marks[0]) / (len(self.marks) - 1)
