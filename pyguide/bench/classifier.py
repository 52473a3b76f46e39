"""Suite `classifier`: microseconds per evaluation of classifier guidance outside of the model and the classifier.

What is measured is a whole sampling run, from one call of the model to the next: the combination, the seed of the
classifier's backward pass, the gradient's way into the step, noise, and the Python around them. The model and the
classifier are free: they return what was made beforehand. What is left of them, autograd's own work and the calls
themselves, is measured too, by a loop that does nothing else, and subtracted from everyone alike, round by round.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .clock import HostClock
from .extras import require
from .peers_classifier import CASES, CLASSES, Alone, Case, Compiled, Contender, Eager, Pyguide, Stock
from .step import COMPILE, EAGER, SAMPLER, TOLERANCE, Mismatch
from .timing import Measure, Timing, interleaved

SHAPES = ((1, 3, 64, 64), (1, 3, 256, 256), (4, 3, 64, 64))
STEPS = 25
GUIDED, MODELS = "guided-diffusion", "models"
LEAST = 1e-7  # seconds: differences of two measurements are not taken for less
WITHOUT = "no comparison with guided-diffusion: give a checkout of openai/guided-diffusion as --guided-diffusion PATH"
PEERS = {GUIDED: "guided-diffusion", COMPILE: "the best torch.compile", EAGER: "hand-written eager PyTorch"}
Rows = list[dict[str, Any]]


class Networks:
    """A model and a classifier that answer to their input, for the check that all contenders compute the same."""

    def __init__(self, case: Case) -> None:
        torch = require("torch")
        self.learned = case.learn_sigma
        self.weight = torch.randn(48, CLASSES, generator=torch.Generator().manual_seed(2))

    def model(self, x: Any, t: Any) -> Any:
        torch = require("torch")
        told = torch.cos(t.to(x.dtype) / 200).reshape(-1, *[1] * (x.ndim - 1))
        out = 0.5 * torch.tanh(x + told)
        return torch.cat([out, torch.tanh(x - told)], 1) if self.learned else out

    def classifier(self, x: Any, t: Any) -> Any:
        """Sums of as many pixels as there are weights, of unit size whatever the size of x."""
        torch = require("torch")
        flat = x.flatten(1)
        means = torch.nn.functional.adaptive_avg_pool1d(flat[:, None], len(self.weight))[:, 0]
        hidden = torch.tanh(means * (flat.shape[1] / len(self.weight)) ** 0.5 + torch.sin(t.to(x.dtype) / 300)[:, None])
        return hidden @ self.weight.to(x)


class FreeClassifier:
    """A classifier that costs nothing: prepared logits forward, a prepared gradient [B, C, *] backward."""

    def __init__(self, logits: Any, gradient: Any) -> None:
        self.logits, self.gradient, self.apply = logits, gradient, _prepared()

    def __call__(self, x: Any, t: Any) -> Any:
        return self.apply(x, self)


@cache
def _prepared() -> Any:
    torch: Any = require("torch")

    class Prepared(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, free: FreeClassifier) -> Any:
            ctx.free = free
            return free.logits.detach()  # a tensor of its own: autograd writes into what is returned

        @staticmethod
        def backward(ctx: Any, seed: Any) -> Any:
            return ctx.free.gradient, None

    return Prepared.apply


class Workload:
    """The arrays of one measurement: noise [B, C, *], the model's output, logits [B, CLASSES] and a gradient."""

    def __init__(self, case: Case, shape: Sequence[int]) -> None:
        torch = require("torch")
        self.case, self.shape, self.clock = case, tuple(shape), HostClock()
        generator = torch.Generator().manual_seed(0)
        self.noise, self.gradient = (torch.randn(self.shape, generator=generator) for _ in range(2))
        channels = self.shape[1] * (2 if case.learn_sigma else 1)
        self.output = torch.randn((self.shape[0], channels, *self.shape[2:]), generator=generator).clamp_(-1, 1)
        self.logits = torch.randn((self.shape[0], CLASSES), generator=generator)

    def measure(self, one: Contender, evaluations: int) -> Measure:
        """Seconds per evaluation from one call of the model to the next."""
        model = self.clock.free_model([self.output], evaluations)
        classifier = FreeClassifier(self.logits, self.gradient)

        def measure() -> float:
            model.begin()
            one.run(model, classifier, self.noise)
            return model.per_evaluation

        return measure


def contenders(
    case: Case, steps: int, *, checkout: Path | None = None, compiled: bool = True, backend: str = "inductor"
) -> dict[str, Contender]:
    """Everyone who is there; with torch.compile, with that backend, its sizes symbols and constants."""
    found: dict[str, Contender] = {SAMPLER: Pyguide(case, steps)}
    if checkout is not None:
        found[GUIDED] = Stock(case, steps, checkout)
    found[EAGER] = Eager(case, steps)
    if compiled:
        found[COMPILE] = Compiled(case, steps, backend=backend)
        found[f"{COMPILE} static"] = Compiled(case, steps, static=True, backend=backend)
    return found


def check_equal(found: dict[str, Contender], work: Workload) -> dict[str, float]:
    """Relative difference (rms) of each contender's samples from pyguide's; Mismatch if one computes something else."""
    torch, networks = require("torch"), Networks(work.case)

    def samples(one: Contender) -> Any:
        drawn = torch.Generator().manual_seed(1)
        return one.run(networks.model, networks.classifier, work.noise, drawn).double()

    results = {name: samples(one) for name, one in found.items()}
    ours = results[SAMPLER]
    assert torch.isfinite(ours).all()
    differences = {}
    for name, theirs in results.items():
        differences[name] = float((theirs - ours).norm() / ours.norm())
        if not differences[name] <= TOLERANCE["float32"]:
            raise Mismatch(f"{name} and pyguide compute different samples, {differences[name]:.1e} apart")
    return differences


def measure_case(
    name: str,
    shape: Sequence[int],
    *,
    checkout: Path | None = None,
    rounds: int = 5,
    compiled: bool = True,
    backend: str = "inductor",
    steps: int = STEPS,
) -> Rows:
    """Rows of one sampler at one shape, after the check of equality.

    A row: suite, solver, form, shape, dtype, classes, clock, contender, steps, us, us_p20, us_p80, us_rounds (outside
    of the models), us_whole (with them), difference (from pyguide's samples). The contender `models` is what was
    subtracted.
    """
    case = CASES[name]
    work = Workload(case, shape)
    found = contenders(case, steps, checkout=checkout, compiled=compiled, backend=backend)
    differences = check_equal(found, work)
    measures = {who: work.measure(one, steps) for who, one in {**found, MODELS: Alone(case, steps)}.items()}
    timings = interleaved(measures, rounds=rounds)
    alone = timings[MODELS]
    return [
        {
            "suite": "classifier",
            "solver": name,
            "form": case.form,
            "shape": list(work.shape),
            "dtype": "float32",
            "classes": CLASSES,
            "clock": work.clock.name,
            "contender": who,
            "steps": steps,
            **(timing if who == MODELS else outside(timing, alone)).as_dict(),
            "us_whole": 1e6 * timing.median,
            "difference": differences.get(who),
        }
        for who, timing in timings.items()
    ]


def outside(whole: Timing, models: Timing) -> Timing:
    """What is left without the models, round by round."""
    return Timing(tuple(max(a - b, LEAST) for a, b in zip(whole.rounds, models.rounds)))


def run(
    shapes: Sequence[Sequence[int]],
    *,
    checkout: Path | None = None,
    rounds: int = 5,
    compile_missing: str | None = None,
) -> Iterator[tuple[str, Rows]]:
    """(what was measured, its rows), one sampler at one shape after another."""
    for shape, name in itertools.product(shapes, CASES):
        settings: dict[str, Any] = {"checkout": checkout, "rounds": rounds, "compiled": compile_missing is None}
        yield f"{name} {'x'.join(map(str, shape))}", measure_case(name, shape, **settings)


# ---- what the rows say ----------------------------------------------------------------------------------------------
def by_contender(rows: Rows, shape: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of one shape by sampler and contender; of torch.compile the fastest."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["suite"] != "classifier" or tuple(row["shape"]) != tuple(shape):
            continue
        here = found.setdefault(row["solver"], {})
        name = COMPILE if row["contender"].startswith(COMPILE) else row["contender"]
        if name not in here or row["us"] < here[name]["us"]:
            here[name] = row
    return found


def shapes_of(rows: Rows) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(tuple(row["shape"]) for row in rows if row["suite"] == "classifier"))


def ratios(rows: Rows, shape: Sequence[int], slow: str) -> dict[str, float]:
    """us of `slow` over those of pyguide, by sampler."""
    found = by_contender(rows, shape)
    return {solver: here[slow]["us"] / here[SAMPLER]["us"] for solver, here in found.items() if slow in here}


def tables(rows: Rows) -> Iterator[Any]:
    """A table (rich) for each shape."""
    for shape in shapes_of(rows):
        title = f"Classifier guidance, us per evaluation outside of the models, {'x'.join(map(str, shape))} float32"
        table = require("rich.table").Table(title=title, title_justify="left")
        for number, column in enumerate(("sampler", SAMPLER, GUIDED, EAGER, COMPILE, MODELS)):
            table.add_column(column, justify="right" if number else "left")
        for solver, here in by_contender(rows, shape).items():
            cells = [solver]
            for name in (SAMPLER, GUIDED, EAGER, COMPILE, MODELS):
                cell = f"{here[name]['us']:.1f}" if name in here else "-"
                if name in PEERS and name in here:
                    cell += f" ({here[name]['us'] / here[SAMPLER]['us']:.1f}x)"
                cells.append(cell)
            table.add_row(*cells)
        yield table
