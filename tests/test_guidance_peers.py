"""Methods whose weights come from the branches: equal to the published code over whole runs of 20 evaluations.

The code runs unmodified, in float64 to 1e-10 of the largest value (`EXACT`), and in float32 within what the peer's own
float32 is from its float64. Every number of every case matters: changed by 1e-6 of itself it is found. Perp-Neg's is
stored by peers/make_perp_neg.py, all other is that of the installed diffusers (guiders.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers.guiders")

import guiders  # noqa: E402
from guiders import PLANS, SHAPE, STEPS, noise, ours, theirs  # noqa: E402
from peers.common import distance  # noqa: E402
from peers.diffusers_cases import FREE, LEADING, LINEAR, SD, TRAILING, V, ddim, dpm  # noqa: E402
from peers.diffusers_cases import Case as Scheduled  # noqa: E402
from peers.diffusers_ours import F64, TIMES, Ours  # noqa: E402
from peers.diffusers_runs import run as run_scheduler  # noqa: E402
from peers.perp_neg_stored import CASES as PERP_NEG  # noqa: E402
from peers.perp_neg_stored import stored  # noqa: E402

import pyguide  # noqa: E402
from pyguide.guidance import (  # noqa: E402
    APG,
    CFG,
    CFGZeroStar,
    DynamicThresholding,
    MagnitudeAwareCFG,
    NormPreservingCFG,
    PerpNeg,
    TangentialCFG,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
EXACT, NUDGE = 1e-10, 1e-6
PART = (0.2, 0.7)  # of the steps
TOKENS = (3, 7, 4)  # [B, tokens, channels]


class Case(NamedTuple):
    """options: those of our method and, by the same names, of the translation in guiders.py; theirs: of that alone."""

    method: Any
    peer: Callable[..., guiders.Combined]
    options: dict[str, Any]
    shape: tuple[int, ...] = SHAPE
    theirs: dict[str, Any] = {}  # noqa: RUF012  never written

    def ours(self, **changed: Any) -> Any:
        return self.method(**{**self.options, **changed})

    def combined(self) -> guiders.Combined:
        return self.peer(**self.options, **self.theirs)


def _cases() -> dict[str, Case]:
    def cfg(**options: Any) -> Case:
        return Case(CFG, guiders.cfg, options)

    def apg(**options: Any) -> Case:
        return Case(APG, guiders.apg, options)

    def zero(original: bool = False, **options: Any) -> Case:
        return Case(CFGZeroStar, guiders.zero_star, options, theirs={"original": original})

    def tangential(original: bool = False, **options: Any) -> Case:
        return Case(TangentialCFG, guiders.tangential, options, theirs={"original": original})

    def magnitude(original: bool = False, **options: Any) -> Case:
        return Case(MagnitudeAwareCFG, guiders.magnitude_aware, options, TOKENS, theirs={"original": original})

    def norm(peer: Any, shape: tuple[int, ...] = SHAPE, **options: Any) -> Case:
        return Case(NormPreservingCFG, peer, options, shape)

    shrunk = {"eta": 0.3, "norm_threshold": 2.0, "momentum": -0.5}
    return {
        "rescale": cfg(scale=7.5, rescale=0.7),
        "rescale-whole": cfg(scale=3.0, rescale=1.0),
        "rescale-scale-0": cfg(scale=0.0, rescale=0.4),
        "rescale-interval": cfg(scale=6.0, rescale=0.7, interval=PART),
        "rescale-stable-diffusion": Case(CFG, guiders.stable_diffusion, {"scale": 7.5, "rescale": 0.35}),
        "apg-eta": apg(scale=6.0, eta=0.25),
        "apg-eta-0": apg(scale=6.0, eta=0.0),
        "apg-eta-uncond": apg(scale=6.0, eta=0.25, base="uncond"),
        "apg-threshold": apg(scale=8.0, norm_threshold=2.6),
        "apg-momentum": apg(scale=4.0, momentum=-0.75),
        "apg-momentum-positive": apg(scale=3.0, momentum=0.4, base="uncond"),
        "apg-paper": apg(scale=9.0, **shrunk),
        "apg-diffusers": apg(scale=9.0, **shrunk, base="uncond"),
        "apg-rescale": apg(scale=9.0, **shrunk, rescale=0.6),
        "apg-interval": apg(scale=9.0, **shrunk, interval=PART),
        "apg-scale-0": apg(scale=0.0, eta=0.5, momentum=-0.5),
        "apg-last-dim": apg(scale=7.0, eta=0.3, norm_threshold=0.4, momentum=-0.5, norm_dim=-1),
        "apg-channels": apg(scale=7.0, eta=0.3, norm_threshold=0.5, base="uncond", norm_dim=1),
        "apg-pixels": apg(scale=7.0, eta=0.3, norm_threshold=1.1, momentum=-0.3, norm_dim=(-1, -2)),
        "apg-all-dims": apg(scale=7.0, eta=0.3, norm_threshold=2.6, norm_dim=(-1, -2, -3)),
        "zero": zero(scale=4.0),
        "zero-no-zeros": zero(scale=4.0, zero_init_steps=0),
        "zero-three": zero(scale=6.5, zero_init_steps=3),
        "zero-original": zero(scale=4.0, original=True),
        "zero-scale-0": zero(scale=0.0, zero_init_steps=0),
        "zero-rescale": zero(scale=6.0, zero_init_steps=0, rescale=0.7),
        "zero-interval": zero(scale=6.0, zero_init_steps=0, interval=PART),
        "zero-interval-later": zero(scale=6.0, zero_init_steps=1, interval=PART),
        "zero-interval-from-0": zero(scale=6.0, zero_init_steps=2, interval=(0.0, 0.6)),
        "tangential": tangential(scale=5.0),
        "tangential-original": tangential(scale=5.0, original=True),
        "tangential-rescale": tangential(scale=7.5, rescale=0.6),
        "tangential-interval": tangential(scale=5.0, interval=PART),
        "tangential-scale-0": tangential(scale=0.0),
        "magnitude": magnitude(scale=10.0, alpha=1.5),
        "magnitude-defaults": magnitude(scale=10.0),
        "magnitude-original": magnitude(scale=10.0, alpha=0.5, original=True),
        "magnitude-rescale": magnitude(scale=10.0, alpha=1.0, rescale=0.6),
        "magnitude-interval": magnitude(scale=10.0, alpha=1.0, interval=PART),
        "magnitude-scale-0": magnitude(scale=0.0, alpha=0.7),
        "norm-qwen-image": norm(guiders.qwen_image, TOKENS, scale=4.0, dim=-1),
        "norm-lumina2": norm(guiders.lumina2, scale=4.0, dim=-1),
        "norm-z-image": norm(guiders.z_image, scale=6.0, limit=1.0),
        "norm-z-image-looser": norm(guiders.z_image, scale=4.0, limit=2.0),
    }


CASES = _cases()


@cache
def peer_of(name: str, plan: str = "ddim", dtype: Any = torch.float64, casts: bool = False) -> Any:
    """The run with the peer's code; `casts`: as it is."""
    return theirs(CASES[name].combined(), PLANS[plan], noise(CASES[name].shape).to(dtype), casts=casts)


# ---- whole runs -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", CASES)
def test_float64(name: str, plan: str, backend: str) -> None:
    case = CASES[name]
    got = ours(case.ours(), PLANS[plan], noise(case.shape), backend=backend)
    assert distance(got, peer_of(name, plan)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str, backend: str) -> None:
    """The peer's code as it is, casts included: what it is off its float64 is what may lie between us."""
    case, narrow = CASES[name], peer_of(name, dtype=torch.float32, casts=True)
    assert narrow.dtype == torch.float32
    limit = max(1e-5, 1.5 * distance(narrow, peer_of(name)))
    assert limit < 1e-3
    got = ours(case.ours(), PLANS["ddim"], noise(case.shape).float(), backend=backend)
    assert distance(got, narrow) <= limit


@pytest.mark.parametrize("name", CASES)
def test_every_number_matters(name: str) -> None:
    """The control: a change of 1e-6, or of one step, is found by the limit of float64."""
    case, plan, start, peer = CASES[name], PLANS["ddim"], noise(CASES[name].shape), peer_of(name)
    numbers = {key: value for key, value in case.options.items() if isinstance(value, float)}
    nudged = {key: value * (1 - NUDGE) if value else NUDGE for key, value in numbers.items()}
    if "zero_init_steps" in case.options:
        nudged["zero_init_steps"] = case.options["zero_init_steps"] + 1
    if "interval" in case.options:
        nudged["interval"] = tuple(part + 1 / STEPS for part in case.options["interval"])
    if "base" in case.options:
        nudged["base"] = "cond"
    assert nudged
    for key, value in nudged.items():
        assert distance(ours(case.ours(**{key: value}), plan, start), peer) > 10 * EXACT, key


def test_casts_of_the_peers_are_what_is_lifted() -> None:
    """Two guiders and Z-Image compute in float32 whatever they are given: as they are, they are off float64 by that."""
    found = set()
    for name, case in {case.peer: (name, case) for name, case in CASES.items()}.values():
        gap = distance(ours(case.ours(), PLANS["ddim"], noise(case.shape)), peer_of(name, casts=True))
        assert gap < 1e-5
        if gap > 10 * EXACT:
            found.add(case.peer)
    assert found == {guiders.zero_star, guiders.tangential, guiders.z_image}


LIMITED = [name for name in CASES if {"norm_threshold", "limit"} & set(CASES[name].options) and name != "norm-z-image"]


@pytest.mark.parametrize("name", LIMITED)
def test_the_cases_reach_both_sides_of_their_limits(name: str) -> None:
    """Somewhere |d| is beyond the threshold and somewhere it is not; the same of Z-Image's |G| and its limit."""
    case, beyond, average = CASES[name], [], 0.0
    peer, options = case.combined(), case.options
    first, last = options.get("interval", (0.0, 1.0))

    def watched(step: int, u: Any, c: Any) -> Any:
        nonlocal average
        if "limit" in options:
            guided, limit = u + options["scale"] * (c - u), options["limit"] * c.flatten(1).norm(dim=1)
            beyond.append(guided.flatten(1).norm(dim=1) > limit)
        elif first * STEPS <= step < last * STEPS:
            average = c - u + options.get("momentum", 0.0) * average
            lengths = torch.linalg.vector_norm(average, dim=options.get("norm_dim", (1, 2, 3)))
            beyond.append(lengths.flatten() > options["norm_threshold"])
        return peer(step, u, c)

    theirs(watched, PLANS["ddim"], noise(case.shape))
    assert 0.02 < torch.cat(beyond).double().mean() < 0.98


def test_zero_star_of_small_outputs(backend: str) -> None:
    """Where |u|^2 is about the 1e-8 beside it, which else is at the edge of the limit."""

    class Small(guiders.Net):
        def __call__(self, x: Any, t: Any, value: Any) -> Any:
            return 3e-5 * super().__call__(x, t, value)

    plan, options = PLANS["ddim"], {"scale": 4.0, "zero_init_steps": 0}
    peer = theirs(guiders.zero_star(**options), plan, noise(), net=Small())
    assert distance(ours(CFGZeroStar(**options), plan, noise(), Small(), backend), peer) <= EXACT
    larger = theirs(guiders.zero_star(**options), plan, noise() * 2, net=Small()) / 2  # the control: not homogeneous
    assert distance(larger, peer) > 1e-6


# ---- in the space of the clean sample -------------------------------------------------------------------------------
@pytest.mark.parametrize("space", ["denoised", "v"])
@pytest.mark.parametrize("name", ["rescale", "apg-paper", "zero-no-zeros", "tangential", "magnitude", "norm-z-image"])
def test_in_another_space(name: str, space: str, backend: str) -> None:
    """The peer's code on clean samples D = (x - sigma m) / alpha, as APG's paper has it, or v = alpha m - sigma D."""
    case, start = CASES[name], noise(CASES[name].shape)
    if name == "apg-paper":
        case = case._replace(options={**case.options, "norm_threshold": 20.0})
    plan, peer, net = PLANS["ddim"], case.combined(), guiders.Net()
    levels = list(zip(guiders.PATH.alpha.tolist(), guiders.PATH.sigma.tolist()))

    def converted(x: Any, t: Any, value: Any) -> Any:
        step = guiders.PATH.timestep.tolist().index(float(t[0]))
        (a, s), m = levels[step], net(x, t, value)
        D = (x - s * m) / a
        return D if space == "denoised" else a * m - s * D

    prediction = "sample" if space == "denoised" else "v"
    other = pyguide.compile("ddim", guiders.PATH, prediction=prediction)
    wanted = theirs(peer, other, start, net=converted)
    assert distance(ours(case.ours(space=space), plan, start, backend=backend), wanted) <= EXACT
    assert distance(ours(case.ours(), plan, start), wanted) > 1e-3  # the control: it is another method there


# ---- Perp-Neg -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PERP_NEG)
def test_perp_neg_is_the_authors(name: str, backend: str) -> None:
    start, (scale, negative), wanted = stored(name)
    assert distance(ours(PerpNeg(scale, negative), PLANS["ddim"], start, backend=backend), wanted) <= EXACT
    for other in (PerpNeg(scale * (1 + NUDGE), negative), PerpNeg(scale, negative * (1 + NUDGE))):
        assert distance(ours(other, PLANS["ddim"], start), wanted) > 10 * EXACT


# ---- dynamic thresholding -------------------------------------------------------------------------------------------
def thresholding(ratio: float, limit: float) -> dict[str, Any]:
    return {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": limit}


# schedulers, and (quantile, limit); DDIM with its own noise estimate and with the one that the bounded sample leaves
BOUNDED: dict[str, tuple[Scheduled, float, float]] = {
    "ddim": (ddim({**SD, **LEADING, **FREE, **thresholding(0.9, 10.0)}, STEPS), 0.9, 10.0),
    "ddim-rederived": (ddim({**SD, **LEADING, **FREE, **thresholding(0.9, 10.0)}, STEPS, 0.0, True), 0.9, 10.0),
    "ddim-eta-half": (ddim({**LINEAR, **FREE, **thresholding(0.995, 1.7)}, STEPS, 0.5), 0.995, 1.7),
    "ddim-limit-1": (ddim({**LINEAR, **FREE, **thresholding(0.995, 1.0)}, STEPS), 0.995, 1.0),
    "ddim-v": (ddim({**SD, **LEADING, **V, **FREE, **thresholding(0.8, 100.0)}, STEPS), 0.8, 100.0),
    "ddpm": (Scheduled("DDPM", {**LINEAR, **FREE, **thresholding(0.95, 3.0)}, STEPS, "ddpm"), 0.95, 3.0),
    "dpm": (dpm({**SD, **TRAILING, **thresholding(0.95, 3.0)}, STEPS), 0.95, 3.0),
}


def guided_times(x: Any, t: Any, y: Any) -> Any:
    return TIMES(x + y[:, None, None, None], t)


class Pipeline:
    """A scheduler's own run in float64 around a guider, and pyguide on its grid."""

    uncond, cond = torch.tensor([0.0, 0.1]).double(), torch.tensor([0.7, -0.4]).double()

    def __init__(self, case: Scheduled, combined: guiders.Combined) -> None:
        steps = itertools.count()

        def guided(x: Any, t: Any) -> Any:
            with guiders.lifted():
                return combined(next(steps), *(guided_times(x, t, y) for y in (self.uncond, self.cond)))

        self.case, peer = case, run_scheduler(case, F64, model=guided)
        self.x, self.own = peer.x, Ours(case, peer)

    def sample(self, guidance: Any, backend: str) -> Any:
        case, own = self.case, self.own
        apart = case.scheduler == "DDIM" and not case.options["use_clipped_model_output"]
        plan = pyguide.compile(case.solver, own.path, prediction=case.prediction, noise_apart=apart, **own.options)
        conds = {"uncond": {"y": self.uncond}, "cond": {"y": self.cond}}
        sampler = pyguide.Sampler(guided_times, plan, guidance, backend=backend)
        return sampler(own.start(F64), conds=conds, noises=own.noises(plan, F64))


@pytest.mark.parametrize("name", BOUNDED)
def test_thresholding_is_that_of_the_schedulers(name: str, backend: str) -> None:
    """thresholding=True of a scheduler, around a guider with momentum."""
    case, quantile, limit = BOUNDED[name]
    options = {"scale": 4.0, "eta": 0.3, "momentum": -0.5, "rescale": 0.4}
    pipeline = Pipeline(case, guiders.apg(**options))

    def sample(quantile: float, backend: str = backend) -> Any:
        return pipeline.sample(DynamicThresholding(APG(**options), quantile, 1.0, limit=limit), backend)

    assert distance(sample(quantile), pipeline.x) <= EXACT
    assert distance(pipeline.sample(APG(**options), backend), pipeline.x) > 1e-2  # the bound is reached
    if limit > 1:
        assert distance(sample(quantile * (1 - 1e-4), "reference"), pipeline.x) > 10 * EXACT


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_schedulers_around_guiders(solver: str, backend: str) -> None:
    """Both halves are diffusers': the scheduler steps what the guider combines."""
    case = {"ddim": ddim({**SD, **LEADING, **FREE}, STEPS, 0.5), "dpm": dpm({**SD, **TRAILING}, STEPS)}[solver]
    for name in ("apg-rescale", "zero-three", "tangential", "rescale-interval"):
        pipeline = Pipeline(case, CASES[name].combined())
        assert distance(pipeline.sample(CASES[name].ours(), backend), pipeline.x) <= EXACT
        other = CASES[name].ours(scale=CASES[name].options["scale"] * (1 + NUDGE))
        assert distance(pipeline.sample(other, "reference"), pipeline.x) > 10 * EXACT


# ---- where the peers are wrong --------------------------------------------------------------------------------------
def test_a_rescaled_zero_is_nan_in_diffusers(backend: str) -> None:
    """ClassifierFreeZeroStarGuidance(guidance_rescale > 0) divides by std(0) = 0 in its first steps."""
    peer = guiders.zero_star(4.0, rescale=0.7)
    u, c = torch.ones(SHAPE), noise()
    assert peer(0, u, c).isnan().all()
    assert peer(1, u, c).isfinite().all()
    plan = PLANS["ddim"]
    zeros = guiders.zero_star(4.0, zero_init_steps=1)
    rest = guiders.zero_star(4.0, zero_init_steps=0, rescale=0.7)
    wanted = theirs(lambda step, u, c: (zeros if step == 0 else rest)(step, u, c), plan, noise())
    assert distance(ours(CFGZeroStar(4.0, rescale=0.7), plan, noise(), backend=backend), wanted) <= EXACT


def test_magnitude_aware_guidance_of_images_fails_in_diffusers(backend: str) -> None:
    """mambo_guidance takes torch.norm over the dims of a sample, which is one of matrices: [B, tokens, channels] alone.
    The norm of an image is that of its elements, however they are arranged."""
    peer, plan, method = guiders.magnitude_aware(6.0, alpha=1.0), PLANS["ddim"], MagnitudeAwareCFG(6.0, 1.0)
    with pytest.raises(RuntimeError, match="dim must be a 2-tuple"):
        peer(0, noise(seed=1), noise(seed=2))

    def arranged(step: int, u: Any, c: Any) -> Any:
        return peer(step, u.flatten(2), c.flatten(2)).reshape(u.shape)

    assert distance(ours(method, plan, noise(), backend=backend), theirs(arranged, plan, noise())) <= EXACT
