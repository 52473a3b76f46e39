"""Suite `sample`: the digits models end to end. Images per second, and what guidance does to fidelity and diversity.

Classifier-free and classifier guidance on the same scales, and a second stage, 16 x 16, above the latter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import schedules
from ..compiler import compile
from ..guidance import CFG, ClassifierGuidance, Guidance
from ..noise import randn
from ..plan import Plan
from ..sampler import Sampler
from . import digits
from .clock import Clock, HostClock
from .digits import judge
from .digits.data import shrink
from .extras import missing, require
from .timing import interleaved

SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
IMAGES = 2000  # recall depends on the number: this is the one that the goals are for
BATCHES = (1, 100)  # of the runs that are timed
SPEED_SCALE = 2.0
TOLERANCE = 1e-3  # of stock diffusers' images from pyguide's: a network amplifies the rounding of 25 steps
GRID_LINES = 2  # images of each class and model in the grid
CASCADE_SCALE = 4.0  # of the classifier guidance below the second stage
CASCADE_STEPS = 10  # of the second stage, whose condition leaves little open: 25 come no closer to its targets

Scaled = Callable[[Any, float], Guidance | ClassifierGuidance]
METHODS: dict[str, Scaled] = {  # (classifier, scale) -> guidance; scale 0 is no guidance by labels in the first two
    "CFG": lambda classifier, scale: CFG(scale),
    "classifier": lambda classifier, scale: ClassifierGuidance(classifier, scale, cfg=CFG(0.0)),
    "classifier, conditional": lambda classifier, scale: ClassifierGuidance(classifier, scale, cfg=CFG(1.0)),
}
CASCADE = "classifier, 16x16"  # judged at 8 x 8, by the means of 2 x 2 pixels


def plan(kind: digits.Kind, steps: int, *, clip: bool = True) -> Plan:
    """DDIM (epsilon, cosine schedule) or Euler (velocity, flow), the clean sample clipped to [-1, 1] in every step.

    The noise estimate is derived again from the clipped sample: with the network's own estimate, guidance of scale 4
    leaves the data (accuracy 0.04 instead of 1.00 after 25 steps).
    """
    limit = 1.0 if clip else None
    if kind == "epsilon":
        path = schedules.cosine().path(steps)
        return compile("ddim", path, prediction="epsilon", clip=limit, use_clipped_model_output=clip)
    path = schedules.flow().path(steps, spacing="linspace")
    return compile("ddim", path, prediction="flow", clip=limit, use_clipped_model_output=clip)


def labels(count: int, device: str = "cpu") -> Any:
    """The classes in turn, 0 .. 9, 0 .. [count]."""
    return require("torch").arange(count, device=device) % 10


def images(sampler: Sampler, count: int, device: str = "cpu") -> Any:
    """Samples [count, 1, 8, 8] of seeds 0 .. count - 1, the classes in turn."""
    torch = require("torch")
    noise = randn(0, (count, *digits.SHAPE), like=torch.empty(0, device=device))
    cond = labels(count, device)
    return sampler(noise, cond={"labels": cond}, uncond={"labels": torch.full_like(cond, digits.NULL)})


def enlarged(low: Any) -> Any:
    """The second stage: samples [B, 1, 16, 16] given those of the first [B, 1, 8, 8], on their device."""
    net = digits.load_upsampler().to(low.device)
    noise = randn(1, (len(low), *digits.LARGE), like=low)  # other seeds than those of the first stage
    return Sampler(net, plan("epsilon", CASCADE_STEPS))(noise, cond={"low_res": low})


def stock_images(net: Any, kind: digits.Kind, steps: int, scale: float, count: int, device: str = "cpu") -> Any:
    """The same with stock diffusers: DDIM with the clip, FlowMatchEuler without (it has none)."""
    torch, diffusers = require("torch"), require("diffusers")
    options: dict[str, Any] = {}
    if kind == "epsilon":
        scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)
        options["use_clipped_model_output"] = True
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps, device=device)
    classes = labels(count, device)
    both = torch.cat([torch.full_like(classes, digits.NULL), classes])
    latents = randn(0, (count, *digits.SHAPE), like=torch.empty(0, device=device))
    for t in scheduler.timesteps:
        uncond, cond = net(torch.cat([latents] * 2), t.expand(2 * count), both).chunk(2)
        latents = scheduler.step(uncond + scale * (cond - uncond), t, latents, **options, return_dict=False)[0]
    return latents


class Clocked:
    """A network that adds up the time spent in it."""

    def __init__(self, net: Any) -> None:
        self.net, self.seconds = net, 0.0

    def __call__(self, x: Any, t: Any, labels: Any) -> Any:
        start = time.perf_counter()
        out = self.net(x, t, labels)
        self.seconds += time.perf_counter() - start
        return out


def speed(
    kind: digits.Kind, steps: int, *, batch: int, rounds: int = 5, clock: Clock | None = None
) -> list[dict[str, Any]]:
    """Images per second of a batch, pyguide and stock diffusers interleaved, and the share of time outside the network.

    On a GPU, where host and device overlap, there is no such share (None), and pyguide's captured loop beside the rest.
    A row: suite, model, contender, batch, steps, scale, images_per_s (and _p20, _p80), outside_share.
    """
    clock = HostClock() if clock is None else clock
    torch, device = require("torch"), clock.device
    net, ours = digits.load(kind).to(device), plan(kind, steps, clip=kind == "epsilon")
    guidance = CFG(SPEED_SCALE)
    loops: dict[str, Callable[[Any], Any]]
    loops = {"pyguide": lambda model: images(Sampler(model, ours, guidance), batch, device)}
    if clock.name == "cuda":
        captured = Sampler(net, ours, guidance, cuda_graph=True)
        loops["pyguide captured"] = lambda model: images(captured, batch, device)
    if missing("diffusers") is None:
        loops["diffusers"] = lambda model: stock_images(model, kind, steps, SPEED_SCALE, batch, device)
        difference = float((loops["diffusers"](net) - loops["pyguide"](net)).abs().max())
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{kind}: diffusers and pyguide make different images ({difference:.1e} apart)")
    shares: dict[str, list[float]] = {who: [] for who in loops}

    def measure(who: str) -> float:
        model = Clocked(net)
        clock.wait()
        start = time.perf_counter()
        loops[who](model)
        clock.wait()
        seconds = time.perf_counter() - start
        shares[who].append(1 - model.seconds / seconds)
        return seconds / batch

    with torch.no_grad():
        timings = interleaved({who: partial(measure, who) for who in loops}, rounds=rounds, seconds=0.05)
    middle = {who: sorted(found)[len(found) // 2] if clock.name == "host" else None for who, found in shares.items()}
    return [
        {
            "suite": "sample",
            "threads": 1,
            "model": kind,
            "contender": who,
            "batch": batch,
            "steps": steps,
            "scale": SPEED_SCALE,
            "images_per_s": 1 / timing.median,
            "images_per_s_p20": 1 / timing.percentile(80),
            "images_per_s_p80": 1 / timing.percentile(20),
            "outside_share": middle[who],
        }
        for who, timing in timings.items()
    ]


def run(
    *,
    steps: int = 25,
    count: int = IMAGES,
    rounds: int = 5,
    scales: Sequence[float] = SCALES,
    grid: Path | None = None,
    clock: Clock | None = None,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(what was measured, its rows); writes the grid of images, ten classes of each model against scales, at the end.

    A row of quality: suite, model, guidance, scale, images, steps, accuracy, recall, precision, frechet; rows of
    `speed` beside them. One thread: for layers this small more of them are slower.
    """
    torch, clock = require("torch"), HostClock() if clock is None else clock
    for package in ("sklearn", "safetensors"):
        require(package)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    bands: dict[str, list[Any]] = {}
    try:
        for kind in digits.KINDS:
            for batch in BATCHES:
                yield f"{kind} speed, batch {batch}", speed(kind, steps, batch=batch, rounds=rounds, clock=clock)
            for row, made in quality(kind, steps, count, scales, clock.device):
                name = f"{row['guidance']} {row['scale']:g}"
                bands.setdefault(name, []).append(made[: 10 * GRID_LINES].unflatten(0, (GRID_LINES, 10)))
                yield f"{kind} {name}", [row]
        if grid is not None:
            lines = [torch.cat(models, 1).flatten(0, 1) for models in bands.values()]  # the models side by side
            title = f"Ten classes against guidance scale: {' | '.join(digits.KINDS)}"
            judge.grid(lines, grid, row_labels=list(bands), column_labels="0123456789" * len(digits.KINDS), title=title)
            yield f"wrote {grid}", []
    finally:
        torch.set_num_threads(threads)


def quality(
    kind: digits.Kind, steps: int, count: int, scales: Sequence[float] = SCALES, device: str = "cpu"
) -> Iterator[tuple[dict[str, Any], Any]]:
    """(row, its images) of one model: every method at every scale, then the second stage above CASCADE_SCALE."""
    net, classifier = digits.load(kind).to(device), digits.load_classifier(kind).to(device)
    clipped, low = plan(kind, steps), None

    def row(guidance: str, scale: float, judged: Any) -> dict[str, Any]:
        what = {"suite": "sample", "threads": 1, "model": kind, "guidance": guidance, "scale": scale}
        return {**what, "images": count, "steps": steps, **judge.evaluate(judged, labels(count))}

    for name, method in METHODS.items():
        for scale in scales:
            made = images(Sampler(net, clipped, method(classifier, scale)), count, device)
            if name == "classifier" and scale == CASCADE_SCALE:
                low = made
            yield row(name, scale, made.cpu()), made.cpu()
    if low is not None:
        large = enlarged(low).cpu()
        yield row(CASCADE, CASCADE_SCALE, shrink(large)), large
