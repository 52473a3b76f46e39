"""What the methods' equations say without a peer: what they reduce to, which branches they call, whose samples they
are, and what they refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from guiders import PATH, PLANS, SHAPE, STEPS, Net, noise, ours  # noqa: E402
from peers.common import distance  # noqa: E402

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
    scales,
)

DDIM, START, BATCH = PLANS["ddim"], noise(), SHAPE[0]
ROUNDED = 1e-12  # of float64 in 20 evaluations, for what is equal but for the order of its sums
Method = Callable[..., Any]

# every method of this family, with options that keep it from being CFG
METHODS: dict[str, Method] = {
    "rescale": lambda scale, **rest: CFG(scale, rescale=0.7, **rest),
    "zero": lambda scale, **rest: CFGZeroStar(scale, zero_init_steps=0, **rest),
    "apg": lambda scale, **rest: APG(scale, eta=0.2, norm_threshold=5.0, momentum=-0.5, **rest),
    "apg-uncond": lambda scale, **rest: APG(scale, eta=0.2, momentum=0.3, base="uncond", rescale=0.5, **rest),
    "apg-groups": lambda scale, **rest: APG(scale, eta=0.2, norm_threshold=1.0, momentum=-0.5, norm_dim=-1, **rest),
    "tangential": TangentialCFG,
    "magnitude": lambda scale, **rest: MagnitudeAwareCFG(scale, 1.0, **rest),
    "norm": NormPreservingCFG,
    "norm-groups": lambda scale, **rest: NormPreservingCFG(scale, 1, **rest),
    "norm-limit": lambda scale, **rest: NormPreservingCFG(scale, limit=1.0, **rest),
    "perp-neg": lambda scale, **rest: PerpNeg(scale, 1.5, **rest),
}
every = pytest.mark.parametrize("name", METHODS)


def run(guidance: Any, backend: str = "reference", net: Any = None, start: Any = START, plan: Any = DDIM) -> Any:
    return ours(guidance, plan, start, net, backend)


# ---- what is called -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in METHODS if name != "perp-neg"])
def test_scale_1_is_the_conditional_model_called_alone(name: str, backend: str) -> None:
    net, other = Net(), Net()
    assert torch.equal(run(METHODS[name](1.0), backend, net), run(CFG(1.0), backend, other))
    assert net.rows == other.rows == STEPS * BATCH


def test_perp_neg_at_scale_1_still_has_its_negative(backend: str) -> None:
    """e + (p - k q) is c - k q; without the negative it is c, called alone."""
    net, conditional = Net(), run(CFG(1.0), backend)
    assert distance(run(PerpNeg(1.0, 1.5), backend, net), conditional) > 1e-2
    assert net.rows == 3 * STEPS * BATCH
    net = Net()
    assert torch.equal(run(PerpNeg(1.0, 0.0), backend, net), conditional)
    assert net.rows == STEPS * BATCH


AT_0 = {
    "cfg": (lambda: CFG(0.0), True),
    "apg-uncond": (lambda: APG(0.0, eta=0.2, momentum=-0.5, base="uncond"), True),
    "apg-eta-1": (lambda: APG(0.0), True),
    "perp-neg": (lambda: PerpNeg(0.0, 1.5), True),
    "rescale": (lambda: CFG(0.0, rescale=0.7), False),  # u times phi std(c) / std(u) + 1 - phi
    "apg": (lambda: APG(0.0, eta=0.2), False),  # c - (d_perp + eta d_par)
    "zero": (lambda: CFGZeroStar(0.0, zero_init_steps=0), False),  # a u
    "tangential": (lambda: TangentialCFG(0.0), False),  # u projected
    "magnitude": (lambda: MagnitudeAwareCFG(0.0, 1.0), False),  # u + (1 - exp(..)) (c - u)
    "norm": (lambda: NormPreservingCFG(0.0), False),  # u, as long as c
}


@pytest.mark.parametrize("name", AT_0)
def test_scale_0_is_the_unconditional_model_where_the_equation_says_so(name: str, backend: str) -> None:
    method, unconditional = AT_0[name]
    gap = distance(run(method(), backend), run(CFG(0.0), backend))
    assert gap <= ROUNDED if unconditional else gap > 1e-3


@pytest.mark.parametrize("method", [CFG, lambda scale: PerpNeg(scale, 1.5)])
def test_scale_0_calls_the_unconditional_branch_alone(method: Method, backend: str) -> None:
    net = Net()
    run(method(0.0), backend, net)
    assert net.rows == STEPS * BATCH


@every
def test_outside_the_interval_one_branch_is_called(name: str, backend: str) -> None:
    net, branches = Net(), len(METHODS[name](3.0).branches)
    run(METHODS[name](3.0, interval=(0.25, 0.6)), backend, net)
    inside = sum(0.25 <= step / STEPS < 0.6 for step in range(STEPS))
    assert net.rows == (inside * branches + STEPS - inside) * BATCH
    net = Net()
    low, high = float(PATH.sigma[15]), float(PATH.sigma[5])  # noise levels fall: steps 5 .. 14 start in (low, high]
    run(METHODS[name](3.0, sigma_interval=(low, high)), backend, net)
    assert net.rows == (10 * branches + STEPS - 10) * BATCH


def test_the_zero_steps_call_nobody(backend: str) -> None:
    """Their output is 0: DDIM takes x along its clean sample x / alpha."""
    net = Net()
    run(CFGZeroStar(4.0, zero_init_steps=3), backend, net)
    assert net.rows == 2 * (STEPS - 3) * BATCH
    all_zero = run(CFGZeroStar(4.0, zero_init_steps=STEPS), backend)
    assert distance(all_zero, START * float(PATH.alpha[-1] / PATH.alpha[0])) <= ROUNDED


@every
def test_branches_may_be_called_one_by_one(name: str, backend: str) -> None:
    method = METHODS[name]
    assert distance(run(method(3.0, batched=False), backend), run(method(3.0), backend)) <= ROUNDED


# ---- what they reduce to --------------------------------------------------------------------------------------------
REDUCED: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {  # the method; it is not CFG with this instead
    "rescale": (lambda: CFG(5.0, rescale=0.0), lambda: CFG(5.0, rescale=0.1)),
    "apg": (lambda: APG(5.0), lambda: APG(5.0, eta=0.9)),
    "apg-uncond": (lambda: APG(5.0, base="uncond"), lambda: APG(5.0, base="uncond", eta=0.9)),
    "apg-far": (lambda: APG(5.0, norm_threshold=1e6), lambda: APG(5.0, norm_threshold=1.0)),
    "apg-groups": (lambda: APG(5.0, norm_dim=1), lambda: APG(5.0, norm_dim=1, eta=0.9)),
    "apg-momentum": (lambda: APG(5.0, momentum=0.0), lambda: APG(5.0, momentum=0.1)),
    "magnitude": (lambda: MagnitudeAwareCFG(5.0, 0.0), lambda: MagnitudeAwareCFG(5.0, 0.1)),
    "norm-limit": (lambda: NormPreservingCFG(5.0, limit=1e6), lambda: NormPreservingCFG(5.0, limit=1.0)),
    "perp-neg": (lambda: PerpNeg(5.0, 0.0), lambda: PerpNeg(5.0, 0.1)),
}


@pytest.mark.parametrize("name", REDUCED)
def test_without_its_own_part_it_is_cfg(name: str, backend: str) -> None:
    plain, (method, other) = run(CFG(5.0), backend), REDUCED[name]
    assert distance(run(method(), backend), plain) <= ROUNDED
    assert distance(run(other(), backend), plain) > 1e-3


@pytest.mark.parametrize("apart", [False, True])
def test_a_bound_that_cannot_move_is_a_clip(apart: bool, backend: str) -> None:
    """max = limit = 1: D is clipped to [-1, 1], whatever its quantile; E is that of the clipped D, or the model's."""
    clipped = pyguide.compile("ddim", PATH, clip=1.0, use_clipped_model_output=not apart)
    plan = pyguide.compile("ddim", PATH, noise_apart=apart)
    wanted = run(CFG(5.0), backend, plan=clipped)
    assert distance(run(DynamicThresholding(CFG(5.0), limit=1.0), backend, plan=plan), wanted) <= ROUNDED
    assert distance(run(DynamicThresholding(CFG(5.0), limit=1.1), backend, plan=plan), wanted) > 1e-3
    net = Net()
    run(DynamicThresholding(CFG(1.0)), backend, net)
    assert net.rows == STEPS * BATCH


def branches_of(uncond: Callable[[Any], Any], cond: Callable[[Any], Any]) -> Any:
    """A model whose branches are functions of one output f(x, t): those told a value below 0.5, and the others."""

    class Two(Net):
        def __call__(self, x: Any, t: Any, value: Any) -> Any:
            f = super().__call__(x, t, torch.full_like(value, 0.3))
            above = (value > 0.5).reshape(-1, *[1] * (x.ndim - 1))
            return torch.where(above, cond(f), uncond(f))

    return Two()


def sampled(guidance: Any, net: Any, backend: str) -> Any:
    zeros, ones = torch.zeros(BATCH, dtype=torch.float64), torch.ones(BATCH, dtype=torch.float64)
    told = {name: {"value": ones if name == "cond" else zeros} for name in guidance.branches}
    return pyguide.Sampler(net, DDIM, guidance, backend=backend)(START, conds=told)


EVEN = (torch.arange(START[0].numel()).reshape(SHAPE[1:]) % 2 == 0).double()


def test_zero_star_on_parallel_and_on_orthogonal_branches(backend: str) -> None:
    """c = 2.5 u: a u = c up to 1e-8 / |u|^2, the conditional model. <c, u> = 0: a = 0, G = s c. c - u across u: CFG."""
    method = CFGZeroStar(4.0, zero_init_steps=0)
    parallel = branches_of(lambda f: f, lambda f: 2.5 * f)
    assert distance(sampled(method, parallel, backend), sampled(CFG(1.0), parallel, backend)) <= 1e-7
    assert distance(sampled(CFG(4.0), parallel, backend), sampled(CFG(1.0), parallel, backend)) > 1e-2
    apart = branches_of(lambda f: f * EVEN, lambda f: f * (1 - EVEN))
    scaled = branches_of(lambda f: f, lambda f: 4.0 * f * (1 - EVEN))
    assert distance(sampled(method, apart, backend), sampled(CFG(1.0), scaled, backend)) <= ROUNDED
    across = branches_of(lambda f: f * EVEN, lambda f: f)
    assert distance(sampled(method, across, backend), sampled(CFG(4.0), across, backend)) <= 1e-7


def test_tangential_on_parallel_and_on_orthogonal_branches(backend: str) -> None:
    """c = 2.5 u: u is its own projection, CFG. <c, u> = 0: with |c| > |u| nothing of u is left, G = s c; with |u| > |c|
    all of it, CFG; a tie is left as it is."""
    method, plain = TangentialCFG(4.0), CFG(4.0)
    parallel = branches_of(lambda f: f, lambda f: 2.5 * f)
    assert distance(sampled(method, parallel, backend), sampled(plain, parallel, backend)) <= ROUNDED
    longer = branches_of(lambda f: 0.1 * f * EVEN, lambda f: f * (1 - EVEN))
    scaled = branches_of(lambda f: f, lambda f: 4.0 * f * (1 - EVEN))
    assert distance(sampled(method, longer, backend), sampled(CFG(1.0), scaled, backend)) <= ROUNDED
    shorter = branches_of(lambda f: f * EVEN, lambda f: 0.1 * f * (1 - EVEN))
    assert distance(sampled(method, shorter, backend), sampled(plain, shorter, backend)) <= ROUNDED
    tie = branches_of(lambda f: EVEN * torch.ones_like(f), lambda f: (1 - EVEN) * torch.ones_like(f))
    assert EVEN.sum() == (1 - EVEN).sum()
    assert distance(sampled(method, tie, backend), sampled(plain, tie, backend)) <= ROUNDED


@every
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_equal_branches_change_nothing(name: str, scale: float, backend: str) -> None:
    """u = c = n: every equation leaves c. CFG-Zero* up to its 1e-8 / |u|^2."""
    net = branches_of(lambda f: f, lambda f: f)
    conditional = sampled(CFG(1.0), net, backend)
    limit = 1e-7 if name == "zero" else ROUNDED
    assert distance(sampled(METHODS[name](scale), net, backend), conditional) <= limit


# ---- samples of a batch ---------------------------------------------------------------------------------------------
class Rational(Net):
    """Of operations that IEEE 754 rounds exactly, so that a sample's bits do not depend on its place in a batch."""

    def __call__(self, x: Any, t: Any, value: Any) -> Any:
        self.rows += len(x)
        y = value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        shift = torch.arange(x[0].numel(), dtype=x.dtype).reshape(x.shape[1:]) / x[0].numel() - 0.4
        return (x + y * shift) / (1 + 0.25 * x * x) + 0.5 * y


SCALES = [3.0, 6.5, 1.0]


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scales_of_samples_are_those_of_single_runs_bit_for_bit(name: str, dtype: Any, backend: str) -> None:
    method, start = METHODS[name], START.to(dtype)

    def values(b: slice) -> dict[str, Any]:
        told = {"uncond": [0.1, 0.0, -0.2], "cond": [0.9, -0.7, 1.3], "negative": [-0.5, 0.8, 0.2]}
        return {k: {"value": torch.tensor(told[k][b], dtype=dtype)} for k in method(1.0).branches}

    def sample(scale: Any, b: slice) -> Any:
        return pyguide.Sampler(Rational(), DDIM, method(scale), backend=backend)(start[b], conds=values(b))

    together = sample(SCALES, slice(None))
    for b, scale in enumerate(SCALES):
        assert torch.equal(sample(scale, slice(b, b + 1))[0], together[b]), f"sample {b}"
    changed = sample([3.0, 6.6, 1.0], slice(None))
    assert torch.equal(changed[[0, 2]], together[[0, 2]])
    assert not torch.equal(changed[1], together[1])  # the control


def test_scales_may_change_from_step_to_step(backend: str) -> None:
    """A schedule is its table: steps at scale 1 in it are the conditional model called alone."""
    table = [1.0] * 5 + [4.0] * 10 + [1.0] * 5
    for method in METHODS.values():
        if "negative" in method(1.0).branches:
            continue
        net = Net()
        got = run(method(scales.Table(table)), backend, net)
        assert net.rows == (10 * 2 + 10) * BATCH
        assert distance(got, run(method(4.0, interval=(0.25, 0.75)), backend)) <= ROUNDED


# ---- errors ---------------------------------------------------------------------------------------------------------
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: CFG(3.0, rescale=float("nan")), ValueError, "rescale: expected"),
    (lambda: CFG(3.0, rescale="half"), ValueError, "rescale: expected"),
    (lambda: CFGZeroStar(3.0, zero_init_steps=-1), ValueError, "zero_init_steps: expected"),
    (lambda: CFGZeroStar(3.0, zero_init_steps=1.5), (TypeError, ValueError), "zero_init_steps: expected"),
    (lambda: APG(float("inf")), ValueError, "scale: expected"),
    (lambda: APG(3.0, eta=float("nan")), ValueError, "eta: expected"),
    (lambda: APG(3.0, momentum="much"), ValueError, "momentum: expected"),
    (lambda: APG(3.0, norm_threshold=-1.0), ValueError, "norm_threshold: expected"),
    (lambda: APG(3.0, base="c"), ValueError, 'base: expected "cond" or "uncond", got \'c\''),
    (lambda: APG(3.0, norm_dim=1, rescale=0.5), ValueError, "rescale: .*norm_dim"),
    (lambda: run(APG(3.0, eta=0.5, norm_dim=0)), ValueError, "norm_dim: expected dims"),
    (lambda: run(APG(3.0, eta=0.5, norm_dim=4)), ValueError, "norm_dim: expected dims"),
    (lambda: run(APG(3.0, eta=0.5, norm_dim=(1, 3))), ValueError, "norm_dim: expected dims side by side"),
    (lambda: MagnitudeAwareCFG(3.0, float("inf")), ValueError, "alpha: expected"),
    (lambda: NormPreservingCFG(3.0, limit=-1.0), ValueError, "limit: expected"),
    (lambda: NormPreservingCFG(3.0, limit=float("nan")), ValueError, "limit: expected"),
    (lambda: run(NormPreservingCFG(3.0, 7)), ValueError, "dim: expected dims"),
    (lambda: PerpNeg(3.0, float("nan")), ValueError, "negative_scale: expected"),
    (lambda: run(PerpNeg(3.0, [1.0, 2.0])), ValueError, r"negative_scale: expected .* one per sample \(3\)"),
    (lambda: DynamicThresholding(3.0), TypeError, "guidance: expected"),
    (lambda: DynamicThresholding(None, 1.5), ValueError, "quantile: expected"),
    (lambda: DynamicThresholding(None, -0.1), ValueError, "quantile: expected"),
    (lambda: DynamicThresholding(None, max=0.0), ValueError, "max: expected"),
    (lambda: DynamicThresholding(None, max=2.0, limit=1.0), ValueError, "limit: expected"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_errors_name_the_argument(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert re.match(message, str(caught.value)), str(caught.value)
