"""Methods that need moments, over whole runs on the back ends of a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from guidance_methods import METHODS, PLANS, Net, conds, start  # noqa: E402

import pyguide  # noqa: E402
from pyguide import (  # noqa: E402
    CFG,
    CFGZeroStar,
    ClassifierGuidance,
    CustomGuidance,
    DynamicThresholding,
    Sampler,
)


def sample(guidance: Any, plan: str = "ddim", x: Any = None, backend: str = "native", **options: Any) -> Any:
    x = start() if x is None else x
    inner = guidance.guidance if isinstance(guidance, DynamicThresholding) else guidance
    net = Net(doubled="learned" in plan)
    sampler = Sampler(net, PLANS[plan], guidance, backend=backend)
    seeds = {"seeds": 7} if PLANS[plan].stochastic_rows else {}
    return sampler(x, conds=options.pop("told", None) or conds(inner, len(x)), **seeds, **options)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", METHODS)
def test_the_kernel_gives_what_the_equation_gives(name: str, plan: str) -> None:
    """The traced program in C++ against the equation run with arrays, over a run in float64."""
    expected = sample(METHODS[name], plan, backend="reference")
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(sample(METHODS[name], plan), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("guidance", [CFG(4.0), METHODS["apg"], METHODS["norm channels"], None], ids=str)
@pytest.mark.parametrize("plan", ["ddim", "dpmpp_2m_sde"])
def test_dynamic_thresholding_of_any_method(guidance: Any, plan: str) -> None:
    told = None if guidance is not None else {"cond": {"value": torch.ones(3, dtype=torch.float64)}}
    results = []
    for backend in ("native", "reference"):
        net = Net()
        sampler = Sampler(net, PLANS[plan], DynamicThresholding(guidance, 0.9), backend=backend)
        given: dict[str, Any] = {"conds": conds(guidance, 3)} if guidance is not None else told
        seen: list[Any] = []
        results.append(
            sampler(start(), **given, seeds=1 if PLANS[plan].stochastic_rows else None, callback=seen.append)
        )
        for event in seen:
            assert float(event.denoised.abs().amax()) <= 1 + 1e-12
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    plain = Sampler(Net(), PLANS[plan], guidance)(start(), **given, seeds=1 if PLANS[plan].stochastic_rows else None)
    assert (plain - results[0]).abs().max() > 0.1, "the bound acted"


def test_a_threshold_follows_its_sample_and_its_limits() -> None:
    """One evaluation, by hand: D = clamp(D, +-b) / b."""
    plan = pyguide.compile("ddim", pyguide.schedules.linear().path(1), prediction="sample")
    x = start(2, 3, 5, 5)
    D = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    for q, least, limit in ((0.9, 1.0, np.inf), (0.5, 4.0, np.inf), (0.99, 1.0, 1.5), (1.0, 1.0, np.inf)):
        for backend in ("native", "reference"):
            guidance = DynamicThresholding(None, q, least, limit=limit)
            got = Sampler(lambda x, t: D, plan, guidance, backend=backend)(x)
            b = torch.quantile(D.abs().flatten(1), q, dim=1).clamp(min=least).clamp(max=limit)[:, None, None, None]
            torch.testing.assert_close(got, D.clamp(-b, b) / b, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_a_sample_does_not_see_the_rest_of_its_batch(name: str) -> None:
    """Bit for bit, at any place, in float32; and what does change a sample changes its bits."""
    guidance, x = METHODS[name], start(4, 2, 8, 8, dtype=torch.float32)
    told = conds(guidance, 4)

    def picked(*rows: int) -> dict[str, Any]:
        return {name: {"value": cond["value"][list(rows)]} for name, cond in told.items()}

    whole = sample(guidance, x=x, told=told)
    torch.testing.assert_close(sample(guidance, x=x[:1], told=picked(0)), whole[:1], rtol=0, atol=0)
    order = [2, 0, 3]
    torch.testing.assert_close(sample(guidance, x=x[order], told=picked(*order)), whole[order], rtol=0, atol=0)
    other = x.clone()
    other[1:] *= 1.5
    torch.testing.assert_close(sample(guidance, x=other, told=told)[0], whole[0], rtol=0, atol=0)
    own = x.clone()
    own[0, 0, 0, 0] += 1e-3
    assert not torch.equal(sample(guidance, x=own, told=told)[0], whole[0])


def over_the_batch(u: Any, c: Any) -> Any:
    """Rescaling by a deviation that is taken over all samples: what the test above must not be blind to."""
    G = u + 4.0 * (c - u)
    return G * (c.std() / G.std())


def test_a_method_that_mixes_samples_is_seen() -> None:
    guidance = CustomGuidance(("uncond", "cond"), guided=lambda outputs, x: over_the_batch(*outputs.values()))
    x = start(2, 2, 8, 8, dtype=torch.float32)
    other = x.clone()
    other[1] *= 1.5
    told = conds(guidance, 2)
    assert not torch.equal(sample(guidance, x=x, told=told)[0], sample(guidance, x=other, told=told)[0])


@pytest.mark.parametrize("name", ["rescale", "apg tokens", "custom", "zero star"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_numpy_runs_are_those_of_torch(name: str, backend: str) -> None:
    guidance, x = METHODS[name], start()
    told = conds(guidance, 3)
    arrays = {k: {"value": v["value"].numpy()} for k, v in told.items()}

    def net(x: Any, t: Any, value: Any) -> Any:
        shift = (value + np.cos(t / 200)).reshape(-1, *[1] * (x.ndim - 1))
        return np.tanh(x * 0.8 + shift) + 0.1 * np.flip(x, -1)

    got = Sampler(net, PLANS["ddim"], guidance, backend=backend)(x.numpy(), conds=arrays)
    np.testing.assert_allclose(got, sample(guidance, x=x, told=told, backend=backend).numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["apg", "norm channels"])
def test_events_are_those_of_the_run(name: str) -> None:
    seen: list[Any] = []
    result = sample(METHODS[name], "dpmpp_2m_sde", callback=seen.append)
    assert len(seen) == PLANS["dpmpp_2m_sde"].evaluations
    assert torch.equal(seen[-1].x, result)
    assert torch.equal(result, sample(METHODS[name], "dpmpp_2m_sde"))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_first_steps_of_zero_star_call_nobody(backend: str) -> None:
    """x' of an evaluation whose output is 0, in every way to run: and its event says so."""
    plan, x = PLANS["flow heun"], start()
    guidance, net = CFGZeroStar(3.0, zero_init_steps=2), Net()
    seen: list[Any] = []
    sampler = Sampler(net, plan, guidance, backend=backend)
    result = sampler(x, conds=conds(guidance, 3), callback=seen.append)
    zeros = int((plan.step < 2).sum())
    assert net.rows == (plan.evaluations - zeros) * 2 * 3
    assert len(seen) == plan.evaluations
    for event in seen[:zeros]:  # the velocity is 0: x stays where it is
        torch.testing.assert_close(event.x, x, rtol=1e-12, atol=1e-12)
    assert torch.equal(result, sampler(x, conds=conds(guidance, 3)))


def test_moments_beside_a_classifier() -> None:
    """ClassifierGuidance(cfg=APG(...)): both, on both back ends."""

    def classifier(x: Any, t: Any) -> Any:
        return torch.stack([x.flatten(1).sum(1) * 0.01, x.flatten(1).square().sum(1) * 0.01], dim=1)

    guidance = ClassifierGuidance(classifier, 2.0, cfg=METHODS["apg"])
    told = {**conds(METHODS["apg"], 3), "classifier": {"labels": torch.tensor([0, 1, 1])}}
    results = [
        Sampler(Net(), PLANS["ddim"], guidance, backend=backend)(start(), conds=told)
        for backend in ("native", "reference")
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert (results[0] - sample(METHODS["apg"])).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["rescale", "apg tokens", "custom"])
def test_nan_stays_in_its_sample(name: str) -> None:
    guidance = METHODS[name]
    told = conds(guidance, 3)
    told["uncond"]["value"][1] = float("nan")
    sampler = Sampler(Net(), PLANS["ddim"], guidance, check="flag")
    result = sampler(start(), conds=told)
    assert torch.isnan(result[1]).any()
    assert torch.isfinite(result[[0, 2]]).all()
    assert sampler.nonfinite.tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["rescale", "apg", "norm channels"])
def test_models_of_16_bits(name: str, dtype: Any) -> None:
    """The same outputs, widened exactly: kernel and reference differ by what the state's float32 does."""
    guidance, x = METHODS[name], start(2, 2, 8, 8).to(dtype)
    results = [sample(guidance, x=x, backend=backend).double() for backend in ("native", "reference")]
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)
