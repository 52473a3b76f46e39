"""Suite `guidance`: microseconds per evaluation of every guidance method, over plain CFG and beside its peers.

What is measured is a whole sampling run with DDIM, from one call of a free model to the next: the combination, the
step, the next model input, and the Python around them. Plain CFG by pyguide runs in the same rounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import step
from .cases import SCALE
from .clock import Clock
from .extras import require
from .peers import Contender
from .peers_guidance import CFG, METHODS, PROJECTED, RESCALED, ZERO_STAR, Method, Pyguide, Stock, Written
from .step import COMPILE, EAGER, SAMPLER, STOCK, TOLERANCE, Mismatch, loop_measure
from .timing import interleaved

SHAPES = ((1, 4, 64, 64), (4, 4, 64, 64), (1, 4096, 64), (2, 3, 256, 256))
TINY = ((1, 6, 4),)  # of tokens: all methods
STEPS = 25
COUNTED = (4, 8)  # evaluations of two runs: what the longer one has more of is counted
CONSTANT = 1 << 17  # elements up to which torch.compile is tried with constant sizes too, which saves a few us a call
PLAIN = "pyguide CFG"
REACHES = (RESCALED, PROJECTED, ZERO_STAR)  # at most 2.5 times plain CFG, 5 times faster than diffusers
WRONG = "Wrong: "
PEERS = {STOCK: "diffusers' own code", COMPILE: "the best torch.compile", EAGER: "eager PyTorch"}
Rows = list[dict[str, Any]]


class Workload(step.Workload):
    """The arrays of one measurement: noise [B, C, *] and sets of the outputs of K branches, [K B, C, *], float32."""

    def __init__(self, method: Method, shape: Sequence[int], clock: Clock | None = None) -> None:
        super().__init__(shape, "float32", clock)
        self.method = method
        torch, more = require("torch"), len(method.branches) - 2
        if more:
            self.outputs = [torch.cat([out, *[out[: len(self.noise)].flip(-1)] * more]) for out in self.outputs]


def network(x: Any, t: Any) -> Any:
    """A model that answers to its input, every row of the batch another one."""
    torch = require("torch")
    shift = torch.linspace(-1, 1, len(x), dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
    return 0.5 * torch.tanh(x + shift) + 0.1 * shift * x.roll(1, -1)


def contenders(
    method: Method, steps: int, *, compiled: bool = True, constant: bool = False, backend: str = "inductor"
) -> dict[str, Contender]:
    """Everyone who is installed. constant: torch.compile with constant sizes too."""
    found: dict[str, Contender] = {SAMPLER: Pyguide(method, steps)}
    if method.has_stock:
        found[STOCK] = Stock(method, steps)
    found[EAGER] = Written(method, steps)
    if compiled:
        found[COMPILE] = Written(method, steps, backend=backend)
        if constant and not method.bounded:  # whose sizes always are constants
            found[f"{COMPILE} static"] = Written(method, steps, backend=backend, static=True)
    return found


def check_equal(found: dict[str, Contender], work: Workload) -> dict[str, float]:
    """Relative difference (rms) of each contender's samples from pyguide's; Mismatch if one computes something else.

    A singular value decomposition in float32 sums N terms one after another, which is off by sqrt(N) roundings, before
    the guidance scale: diffusers' tangential guidance at N = 262,144 by 3e-5, where pyguide is off by 2e-7. So do the
    loops that torch.compile makes of sums, lane by lane.
    """
    results = {name: one.run(network, work.noise).double() for name, one in found.items()}
    ours = results[SAMPLER]
    if not require("torch").isfinite(ours).all():
        raise Mismatch("pyguide's samples are not finite")
    differences = {name: float((theirs - ours).norm() / ours.norm()) for name, theirs in results.items()}
    for name, difference in differences.items():
        limit = TOLERANCE["float32"]
        if name.startswith(COMPILE) or (name == STOCK and work.method.decomposes):
            limit = max(limit, SCALE * (work.elements / len(work.noise)) ** 0.5 * 2**-24)
        if not difference <= limit:
            raise Mismatch(f"{name} and pyguide compute different samples, {difference:.1e} apart")
    return differences


def calls(make: Callable[[int], Contender], work: step.Workload) -> float | None:
    """What an evaluation puts on the device, as the difference of two runs: kernels of a GPU; of a CPU operators of
    PyTorch, of which pyguide's native kernel is none. None for one compiled for a CPU, which shows none either."""
    found = []
    for steps in COUNTED:
        one, model = make(steps), work.clock.free_model(work.outputs[:1], steps)
        if work.clock.name == "host" and isinstance(one, Written) and one.backend is not None:
            return None

        def measured(one: Contender = one, model: Any = model) -> None:
            model.begin()
            one.run(model, work.noise)
            work.clock.wait()

        measured()
        measured()
        found.append(_kernels(measured) if work.clock.name == "cuda" else _operators(measured))
    return (found[1] - found[0]) / (COUNTED[1] - COUNTED[0])


def _kernels(work: Callable[[], None]) -> int:
    from .gpu.counts import kinds

    torch = require("torch")
    activity, gpu = torch.profiler.ProfilerActivity, torch.autograd.DeviceType.CUDA
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        work()
    events = (event for event in profile.events() if not getattr(event, "is_user_annotation", False))
    return sum("launches" in kinds(event.name, event.device_type == gpu) for event in events)


def _operators(work: Callable[[], None]) -> int:
    mode: Any = require("torch.utils._python_dispatch").TorchDispatchMode

    class Counting(mode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += 1
            return func(*args, **(kwargs or {}))

    with Counting() as counting:
        work()
    return int(counting.number)


def measure_case(
    name: str,
    shape: Sequence[int],
    *,
    clock: Clock | None = None,
    rounds: int = 5,
    seconds: float = 0.02,
    compiled: bool = True,
    backend: str = "inductor",
    steps: int = STEPS,
    counted: bool = True,
) -> Rows:
    """Rows of one method at one shape, after the check of equality.

    A row: suite, method, shape, dtype, clock, contender, steps, us, us_p20, us_p80, us_rounds, over_cfg (times plain
    CFG by pyguide), ratio (times pyguide), calls (see `calls`; None where not counted), resident, sets, difference
    (from pyguide's samples, None for plain CFG, which is the contender `pyguide CFG`).
    """
    method = METHODS[name]
    work = Workload(method, shape, clock)
    settings: dict[str, Any] = {"compiled": compiled, "constant": work.elements <= CONSTANT, "backend": backend}
    found = contenders(method, steps, **settings)
    differences = check_equal(found, work)
    plain = Workload(METHODS[CFG], shape, work.clock) if len(method.branches) > 2 else work
    measures = {who: loop_measure(one, work, steps) for who, one in found.items()}
    measures[PLAIN] = loop_measure(Pyguide(method, steps, plain=True), plain, steps)
    timings = interleaved(measures, rounds=rounds, seconds=seconds)
    own, cfg = timings[SAMPLER].median, timings[PLAIN].median

    def made(who: str) -> float | None:
        if not counted or who == PLAIN:
            return None
        return calls(lambda steps: contenders(method, steps, **settings)[who], work)

    return [
        {
            "suite": "guidance",
            "method": name,
            "shape": list(work.shape),
            "dtype": "float32",
            "clock": work.clock.name,
            "contender": who,
            "steps": steps,
            **timing.as_dict(),
            "over_cfg": timing.median / cfg,
            "ratio": timing.median / own,
            "calls": made(who),
            "resident": work.resident,
            "sets": work.sets,
            "difference": differences.get(who),
        }
        for who, timing in timings.items()
    ]


def cases(shapes: Sequence[Sequence[int]]) -> list[tuple[str, tuple[int, ...]]]:
    """(method, shape): the methods of tokens where there are some, [B, L, C]."""
    every = itertools.product(shapes, METHODS.values())
    return [(method.name, tuple(shape)) for shape, method in every if len(shape) == 3 or not method.tokens]


def run(
    shapes: Sequence[Sequence[int]],
    notes: list[str],
    *,
    clock: Clock | None = None,
    compile_missing: str | None = None,
    late: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Iterator[tuple[str, Rows]]:
    """(what was measured, its rows), one method at one shape after another. One that fails is a note, and the note of
    one whose contenders compute different things begins with WRONG. late: whether the time is up; what it says once
    counts for the rest."""
    known: set[str] = set()
    left: list[str] = []
    for name, shape in cases(shapes):
        what = f"{name} {'x'.join(map(str, shape))}"
        if left or late():
            left.append(what)
            yield what, []
            continue
        rows: Rows = []
        on_gpu = clock is not None and clock.name == "cuda"
        try:  # on a CPU the number of calls does not depend on the shape
            counted = on_gpu or name not in known
            rows = measure_case(name, shape, clock=clock, compiled=compile_missing is None, counted=counted, **settings)
            known.add(name)
        except Mismatch as error:
            notes.append(f"{WRONG}guidance {what}: {error}")
        except Exception as error:  # the others are worth having
            notes.append(f"guidance {what} failed: {type(error).__name__}: {str(error).strip()[:300]}")
        yield what, rows
    if left:
        notes.append(f"The time was up before: guidance {', '.join(left)}")


# ---- what the rows say ----------------------------------------------------------------------------------------------
def by_contender(rows: Rows, shape: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of one shape by method and contender; of torch.compile the fastest."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["suite"] != "guidance" or tuple(row["shape"]) != tuple(shape):
            continue
        here = found.setdefault(row["method"], {})
        name = COMPILE if row["contender"].startswith(COMPILE) else row["contender"]
        if name not in here or row["us"] < here[name]["us"]:
            here[name] = row
    return found


def shapes_of(rows: Rows) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(tuple(row["shape"]) for row in rows if row["suite"] == "guidance"))


def over_cfg(rows: Rows, shape: Sequence[int]) -> dict[str, float]:
    """us of pyguide's methods over those of its plain CFG in the same rounds."""
    found = by_contender(rows, shape)
    return {name: here[SAMPLER]["us"] / here[PLAIN]["us"] for name, here in found.items() if name != CFG}


def ratios(rows: Rows, shape: Sequence[int], slow: str) -> dict[str, float]:
    """us of `slow` over those of pyguide, by method."""
    found = by_contender(rows, shape)
    return {name: here[slow]["us"] / here[SAMPLER]["us"] for name, here in found.items() if slow in here}


def tables(rows: Rows) -> Iterator[Any]:
    """A table (rich) for each shape."""
    for shape in shapes_of(rows):
        found = by_contender(rows, shape)
        one = next(iter(next(iter(found.values())).values()))
        what = "kernels" if one["clock"] == "cuda" else "operators"
        title = f"Guidance, us per evaluation outside of the model, {'x'.join(map(str, shape))} float32"
        title += f" (in brackets, times pyguide's; {what} an evaluation)"
        table = require("rich.table").Table(title=title, title_justify="left")
        for number, column in enumerate(("method", SAMPLER, "over CFG", STOCK, EAGER, COMPILE)):
            table.add_column(column, justify="right" if number else "left")
        for name, here in found.items():
            cells = [name]
            for who in (SAMPLER, PLAIN, STOCK, EAGER, COMPILE):
                if who == PLAIN:
                    cells.append("" if name == CFG else f"{here[SAMPLER]['us'] / here[PLAIN]['us']:.2f}x")
                    continue
                cell = f"{here[who]['us']:.1f}" if who in here else "-"
                if who in here and who != SAMPLER:
                    cell += f" ({here[who]['us'] / here[SAMPLER]['us']:.1f}x)"
                if who in here and here[who]["calls"] is not None:
                    cell += f" [{here[who]['calls']:.0f}]"
                cells.append(cell.replace("[", r"\["))
            table.add_row(*cells)
        yield table
