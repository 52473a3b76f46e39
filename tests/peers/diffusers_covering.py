"""A sample of a space of options in which every pair of values that can meet does meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

TRIES = 60


@dataclass(frozen=True, eq=False)
class Design:
    """The options of one scheduler class: factors[option][label] = value, and what a choice of them is.

    build(**values) -> a case, or None where the class, the mathematics or our options rule the choice out.
    """

    prefix: str
    factors: Mapping[str, Mapping[str, Any]]
    build: Callable[..., Any]

    def case(self, labels: Mapping[str, str]) -> Any:
        return self.build(**{option: self.factors[option][label] for option, label in labels.items()})

    def name(self, labels: Mapping[str, str]) -> str:
        return "-".join([self.prefix, *(label for label in labels.values() if label)])

    def pairs(self, labels: Mapping[str, str]) -> set[frozenset[tuple[str, str]]]:
        """What of any two options a choice has."""
        return {frozenset(pair) for pair in itertools.combinations(labels.items(), 2)}

    def every_pair(self) -> list[frozenset[tuple[str, str]]]:
        return [
            frozenset({(a, x), (b, y)})
            for a, b in itertools.combinations(self.factors, 2)
            for x in self.factors[a]
            for y in self.factors[b]
        ]

    def completed(
        self, fixed: Mapping[str, str], random_: random.Random, tries: int = 40 * TRIES
    ) -> list[dict[str, str]]:
        """Choices at random that contain `fixed` and are cases: at most TRIES of them, in at most `tries` attempts."""
        found: list[dict[str, str]] = []
        for _ in range(tries):
            drawn = {
                option: list(values)[int(random_.random() * len(values))] for option, values in self.factors.items()
            }
            labels = {**drawn, **fixed}
            if self.case(labels) is not None:
                found.append(labels)
                if len(found) == TRIES:
                    break
        return found

    @cached_property
    def sample(self) -> list[dict[str, str]]:
        """Greedy: of some choices that contain the first pair not yet met, the one that has most such pairs.

        The same under every Python: random.random() is the one method whose sequence is promised.
        """
        random_, chosen = random.Random(0), []
        left = dict.fromkeys(self.every_pair())
        while left:
            pair = next(iter(left))
            del left[pair]
            candidates = self.completed(dict(pair), random_)
            if candidates:
                best = max(candidates, key=lambda labels: len(self.pairs(labels) & left.keys()))
                chosen.append(best)
                for met in self.pairs(best):
                    left.pop(met, None)
        return chosen
