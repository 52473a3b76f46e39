"""Suite `step`: microseconds per evaluation of everything between two model calls, beside a copy of the same bytes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..backends import choose
from ..guidance import CFG
from ..launch import NativeStep
from ..run import Run
from ..sampler import Sampler
from .cases import CASES, SCALE, Case
from .clock import Clock, HostClock
from .compiled import FORMULATIONS, Compiled
from .extras import missing, require
from .launches import CopyRows, KernelRows, chained
from .peers import Contender, Eager, Pyguide, Stock
from .timing import Measure, interleaved
from .traffic import BRANCHES, bytes_per_evaluation

KERNEL, COPY, SAMPLER, STOCK, EAGER, COMPILE = "kernel", "copy", "pyguide", "diffusers", "eager", "torch.compile"
# Root mean square of the difference over that of the samples: roundings, which the guidance amplifies. Stock diffusers
# keeps its tables in float32 and with 16-bit models rounds its state to 16 bits too.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
STOCK_TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}
ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}


class Mismatch(RuntimeError):
    """Contenders that are meant to compute the same do not."""


class Workload:
    """The arrays of one measurement: noise [B, C, *], sets of model outputs [2 B, C, *].

    There is one set if a step's arrays fit into half of the cache (`resident`), else so many that none is found there.
    """

    def __init__(self, shape: Sequence[int], dtype: str, clock: Clock | None = None) -> None:
        torch = require("torch")
        self.clock: Clock = HostClock() if clock is None else clock
        self.shape, self.dtype, self.item = tuple(shape), dtype, ITEM[dtype]
        cache, device = self.clock.cache_bytes, self.clock.device
        generator = torch.Generator(device).manual_seed(0)
        self.noise = torch.randn(self.shape, generator=generator, device=device).to(getattr(torch, dtype))
        self.elements = self.noise.numel()
        batched = (BRANCHES * self.shape[0], *self.shape[1:])
        output = torch.randn(batched, generator=generator, device=device).to(self.noise.dtype)
        touched = self.elements * (4 + 2 * BRANCHES * self.item)
        self.resident = 2 * touched <= cache
        self.sets = 1 if self.resident else 2 + 2 * cache // max(1, output.nbytes)
        self.outputs = [output.clone() for _ in range(self.sets)]

    @property
    def steps(self) -> int:
        """Solver steps of a run: many where one is short."""
        return 50 if self.resident else 20


def network(x: Any, t: Any) -> Any:
    """A model that answers to its input, for the check that all contenders compute the same samples."""
    torch = require("torch")
    whole = torch.cat(x) if isinstance(x, tuple) else x
    shift = torch.linspace(-1, 1, len(whole), dtype=whole.dtype).reshape(-1, *[1] * (whole.ndim - 1))
    return 0.5 * torch.tanh(whole + shift)


def contenders(
    case: Case, steps: int, compiled: Sequence[tuple[str, bool]] = (), backend: str = "inductor"
) -> dict[str, Contender]:
    """Everyone who is installed. compiled: (formulation, static) of torch.compile, with that backend."""
    found: dict[str, Contender] = {SAMPLER: Pyguide(case, steps)}
    if missing("diffusers") is None:
        found[STOCK] = Stock(case, steps)
    found[EAGER] = Eager(case, steps)
    for formulation, static in compiled:
        name = f"{COMPILE} {formulation}{' static' if static else ''}"
        found[name] = Compiled(case, steps, formulation, static=static, backend=backend)
    return found


def check_equal(found: dict[str, Contender], work: Workload, steps: int) -> dict[str, float]:
    """Relative difference of each contender's samples from pyguide's; Mismatch if one computes something else."""
    torch = require("torch")
    results = {name: _seeded(one, work.noise).double() for name, one in found.items()}
    ours = results[SAMPLER]
    differences = {}
    for name, theirs in results.items():
        difference = float((theirs - ours).norm() / ours.norm())
        if not difference <= (STOCK_TOLERANCE if name == STOCK else TOLERANCE)[work.dtype]:
            raise Mismatch(f"{name} and pyguide compute different samples, {difference:.1e} apart after {steps} steps")
        differences[name] = difference
    assert torch.isfinite(ours).all()
    return differences


def _seeded(one: Contender, noise: Any) -> Any:
    return one.run(network, noise, require("torch").Generator(noise.device).manual_seed(1))


def loop_measure(one: Contender, work: Workload, evaluations: int) -> Measure:
    """Seconds per evaluation between the model calls of one whole sampling run; on a GPU those that pass there."""
    model = work.clock.free_model(work.outputs, evaluations)

    def measure() -> float:
        model.begin()
        one.run(model, work.noise)
        return model.per_evaluation

    return measure


def kernel_measure(case: Case, work: Workload, steps: int) -> Measure | None:
    """Seconds per row of the bare kernel, called from Python with nothing around it; None without a fused kernel."""
    if work.clock.name == "cuda":
        fused = choose("auto", "cuda") != "reference"
        return chained(KernelRows(case, steps, work.noise, work.outputs, "auto"), work.clock) if fused else None
    sampler = Sampler(lambda x, t: x, case.plan(steps), CFG(SCALE))
    seeds = 0 if case.stochastic else None
    run = Run(sampler, work.noise, {}, {}, None, seeds, None, None, None, events=False)
    if not isinstance(run.step, NativeStep):
        return None
    state = run.launch.state
    run.step.advance([])
    run.step.advance(work.outputs[:1])  # tells it the strides
    call, rows = run.step.step.run, case.plan(steps).evaluations - 1
    pointers = [work.outputs[i % work.sets].data_ptr() for i in range(rows)]

    def measure() -> float:
        state.zero_()  # from one run to the next it would grow without bounds
        state[0].copy_(work.noise)
        run.launch.samples["row"] = 1
        start = time.perf_counter()
        for pointer in pointers:
            call(pointer)
        return (time.perf_counter() - start) / rows

    return measure


def copy_measure(size: float, sets: int, rotated: float) -> Measure:
    """Seconds of torch's copy_ that moves `size` bytes, half read and half written, like a step finds its operands.

    sets: of sources for the `rotated` bytes, which stand for the model's outputs; the rest of the source is read again
    and the target written again each time, as a step does with its state and the model's inputs.
    """
    torch = require("torch")
    fresh = min(1.0, 2 * rotated / size) if sets > 1 else 1.0
    count = max(1, round(size / 8))
    part = max(1, round(fresh * count))
    sources = [torch.ones(part) for _ in range(sets)]
    target, again = torch.empty(count), torch.ones(count - part)
    first, rest = target[:part].copy_, target[part:].copy_
    turn = sources * (50 if sets == 1 else 1)

    def measure() -> float:  # one loop for each kind: in the cache a copy is as short as a few lines of Python
        start = time.perf_counter()
        if part == count:
            for source in turn:
                first(source)
        else:
            for source in turn:
                first(source)
                rest(again)
        return (time.perf_counter() - start) / len(turn)

    return measure


def formulations(full: bool, resident: bool) -> list[tuple[str, bool]]:
    """(formulation, static) of torch.compile. By default those that were ever the fastest, to spare compile time.

    A constant size saves 3 to 5 us a call, which counts only in the cache.
    """
    if full:
        return [(name, static) for name in FORMULATIONS for static in (False, True)]
    return [("buffers", False), ("expand", False)] + ([("buffers", True)] if resident else [])


def measure_case(
    name: str,
    shape: Sequence[int],
    dtype: str,
    *,
    clock: Clock | None = None,
    rounds: int = 5,
    compiled: bool = True,
    full: bool = False,
) -> list[dict[str, Any]]:
    """Rows of one solver at one shape: every contender, the bare kernel and the copy, after the check of equality.

    A row: suite, solver, shape, dtype, clock, contender, steps, us, us_p20, us_p80, us_rounds, bytes, gb_per_s,
    resident, sets, difference (from pyguide's samples, None for kernel and copy).
    """
    case, work = CASES[name], Workload(shape, dtype, clock)
    steps = work.steps
    found = contenders(case, steps, formulations(full, work.resident) if compiled else [])
    differences = check_equal(found, work, steps)
    size = bytes_per_evaluation(case.plan(steps), elements=work.elements, item=work.item)
    calls = case.plan(steps).evaluations
    measures = {who: loop_measure(one, work, calls) for who, one in found.items()}
    kernel = kernel_measure(case, work, steps)
    if kernel is not None:
        measures[KERNEL] = kernel
    if work.clock.name == "host":
        measures[COPY] = copy_measure(size, work.sets, work.outputs[0].nbytes)
    else:
        sets = 1 if work.resident else 2 + int(2 * work.clock.cache_bytes / size)
        measures[COPY] = chained(CopyRows(size, sets, work.clock.device, steps), work.clock)
    timings = interleaved(measures, rounds=rounds)
    return [
        {
            "suite": "step",
            "solver": name,
            "shape": list(work.shape),
            "dtype": dtype,
            "clock": work.clock.name,
            "contender": who,
            "steps": steps,
            **timing.as_dict(),
            "bytes": size,
            "gb_per_s": size / timing.median / 1e9,
            "resident": work.resident,
            "sets": work.sets,
            "difference": differences.get(who),
        }
        for who, timing in timings.items()
    ]


def run(
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[str],
    solvers: Sequence[str],
    *,
    full: bool = False,
    rounds: int = 5,
    compile_missing: str | None = None,
    clock: Clock | None = None,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(what was measured, its rows), one solver at one shape after another."""
    for dtype, shape, name in itertools.product(dtypes, shapes, solvers):
        yield (
            f"{name} {'x'.join(map(str, shape))} {dtype}",
            measure_case(name, shape, dtype, clock=clock, rounds=rounds, compiled=compile_missing is None, full=full),
        )


def compile_error(device: str = "cpu") -> str | None:
    """Why torch.compile does not work here (no C++ compiler, an unsupported Python), None if it does."""
    torch = require("torch")
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(4, device=device))
    except Exception as error:  # anything can be missing in a tool chain
        return f"torch.compile does not work here: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return None
