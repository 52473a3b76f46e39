"""What a sampling loop puts on a GPU per evaluation, as the profiler sees it.

Two runs that differ only in their number of evaluations are profiled; what the longer one has more of is the loop's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from ...backends import Backend
from ...guidance import CFG
from ...sampler import Sampler
from ..cases import CASES, SCALE
from ..extras import require
from .setup import Setup

KINDS = ("launches", "copies", "copies_from_host", "synchronisations")


def kinds(name: str, on_device: bool) -> tuple[str, ...]:
    """What an event of the profiler counts as. What a device shows beside copies (memset among them) is a kernel, or
    that a stream waited for another one, which holds up nobody on the host."""
    if on_device and name.startswith(("Memcpy", "Memset")):
        return ("copies", "copies_from_host") if "HtoD" in name else ("copies",)
    if on_device and not name.endswith((" Sync", "Wait Event")):
        return ("launches",)
    return ("synchronisations",) if "Synchronize" in name else ()


def events(run: Callable[[], Any], setup: Setup) -> Counter[str]:
    """Events of one run that has been warmed up."""
    torch = require("torch")
    activity, gpu = torch.profiler.ProfilerActivity, torch.autograd.DeviceType.CUDA
    activities = [activity.CPU, activity.CUDA] if setup.on_gpu else [activity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        setup.clock.wait()
    found: Counter[str] = Counter()
    for event in profile.events():
        if not getattr(event, "is_user_annotation", False):
            found.update(kinds(event.name, event.device_type == gpu))
    return found


def per_evaluation(short: Callable[[], Any], long: Callable[[], Any], more: int, setup: Setup) -> dict[str, float]:
    """KINDS per evaluation, of runs of which the long one has `more` evaluations."""
    for run in (short, long):
        run()
        run()
    few, many = events(short, setup), events(long, setup)
    return {kind: (many[kind] - few[kind]) / more for kind in KINDS}


def loop(steps: int, backend: Backend, setup: Setup, *, captured: bool) -> Callable[[], Any]:
    """A run of UniPC around a model that returns the same tensor at every call, and so puts nothing on the GPU."""
    torch, device, shape = require("torch"), setup.clock.device, setup.sizes.small[0]
    out = torch.randn((2 * shape[0], *shape[1:]), device=device)
    noise = torch.randn(shape, device=device)
    plan = CASES["unipc"].plan(steps)
    sampler = Sampler(lambda x, t: out, plan, CFG(SCALE), backend=backend, cuda_graph=captured)
    return lambda: sampler(noise, cond={}, uncond={})


def measured(backend: Backend, setup: Setup, *, captured: bool) -> list[dict[str, Any]]:
    few, many = setup.sizes.counted_steps
    short, long = (loop(steps, backend, setup, captured=captured) for steps in (few, many))
    found = per_evaluation(short, long, many - few, setup)
    return [{**setup.row("counts", f"{backend} {'captured' if captured else 'eager'}"), **found}]
