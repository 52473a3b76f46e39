"""Whole sampling runs of launch-bound models, each loop at its best: the model as it is, compiled, and captured.

pyguide captured        Sampler(net, ..., cuda_graph=True): model and step are one replay
pyguide                 the same loop launched from Python
diffusers               the unmodified scheduler in the loop of its pipelines
by hand                 PyTorch by hand (peers.Eager), which no pipeline does: the peer where diffusers is missing
..., compiled net       around torch.compile(net)
..., captured net       around torch.compile(net, mode="reduce-overhead"): the net alone is a CUDA graph
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ...guidance import CFG
from ...sampler import Sampler
from .. import digits
from ..cases import CASES, SCALE, Case
from ..extras import missing, require
from ..peers import Eager, Stock
from ..step import SAMPLER, STOCK, Mismatch
from ..timing import interleaved
from .setup import Setup

CAPTURED, HAND = f"{SAMPLER} captured", "by hand"
COMPILED_NET, CAPTURED_NET = ", compiled net", ", captured net"
DIFFERENCE = 2e-2  # relative, of the samples: convolutions in TF32, by other algorithms once compiled
MODELS = ("digits", "unet")
Loop = Callable[[Any], Any]  # noise -> samples


def model(name: str, setup: Setup) -> tuple[Any, Case, tuple[int, ...]]:
    """(network, the sampler that it is run with, shape of the noise)."""
    from . import nets

    if name == "digits":
        return nets.Digits().to(setup.clock.device), CASES["flow_euler"], (1, *digits.SHAPE)
    shape = setup.sizes.unet
    return nets.unet(shape[1]).to(setup.clock.device), CASES["dpmpp_2m"], shape


def stepped(net: Any) -> Any:
    """A net under mode="reduce-overhead" whose last output may be overwritten."""
    begin = require("torch").compiler.cudagraph_mark_step_begin

    def call(x: Any, t: Any) -> Any:
        begin()
        return net(x, t)

    return call


def loops(case: Case, steps: int, net: Any, suffix: str, setup: Setup, *, captured: bool) -> dict[str, Loop]:
    """The loops around one form of a network. captured: pyguide's captured loop among them."""
    plan, guidance = case.plan(steps), CFG(SCALE)
    made: dict[str, Any] = {}
    if captured:
        made[CAPTURED] = Sampler(net, plan, guidance, cuda_graph=setup.on_gpu)
    made[SAMPLER] = Sampler(net, plan, guidance)
    found: dict[str, Loop] = {
        who + suffix: partial(lambda sampler, noise: sampler(noise, cond={}, uncond={}), sampler)
        for who, sampler in made.items()
    }
    others = {HAND: Eager(case, steps)} | ({STOCK: Stock(case, steps)} if missing("diffusers") is None else {})
    return found | {who + suffix: partial(one.run, net) for who, one in others.items()}


def check(found: dict[str, Loop], noise: Any) -> None:
    """All loops make the same samples, new ones at every run; Mismatch if not."""
    torch = require("torch")
    results = {who: loop(noise).clone() for who, loop in found.items()}
    first = next(iter(results.values())).double()
    for who, result in results.items():
        if not bool(torch.isfinite(result).all()):
            raise Mismatch(f"{who} made samples that are not finite")
        difference = float((result.double() - first).norm() / first.norm())
        if not difference <= DIFFERENCE:
            raise Mismatch(f"{who} and {next(iter(results))} make different samples, {difference:.1e} apart")


def measured(name: str, setup: Setup, *, form: str) -> list[dict[str, Any]]:
    """Rows of one model in one form, "" or COMPILED_NET or CAPTURED_NET; us is that of a whole run, waited for."""
    torch = require("torch")
    net, case, shape = model(name, setup)
    if form == COMPILED_NET:
        net = torch.compile(net, dynamic=False, backend=setup.compiler)
    elif form == CAPTURED_NET:
        options = {"mode": "reduce-overhead"} if setup.compiler == "inductor" else {"backend": setup.compiler}
        net = stepped(torch.compile(net, dynamic=False, **options))
    steps = setup.sizes.end_steps
    found = loops(case, steps, net, form, setup, captured=form != CAPTURED_NET)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(setup.clock.device)
    check(found, noise)

    def measure(loop: Loop) -> float:
        setup.clock.wait()
        start = time.perf_counter()
        loop(noise)
        setup.clock.wait()
        return time.perf_counter() - start

    measures = {who: partial(measure, loop) for who, loop in found.items()}
    timings = interleaved(measures, rounds=setup.rounds, seconds=5 * setup.seconds)
    base = {"model": name, "solver": case.name, "shape": list(shape), "steps": steps}
    return [{**setup.row("end_to_end", who), **base, **timing.as_dict()} for who, timing in timings.items()]


def forms(setup: Setup) -> Iterator[str]:
    yield ""
    if setup.compiler is not None:
        yield COMPILED_NET
        yield CAPTURED_NET
