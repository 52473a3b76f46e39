"""Equations and functions of one's own: what they may be, and what is said of those that may not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import recorded  # noqa: E402
from guidance_methods import PLANS, Net, conds, start  # noqa: E402

import pyguide  # noqa: E402
from pyguide import (  # noqa: E402
    CFG,
    Autoguidance,
    ClassifierGuidance,
    Compose,
    CustomGuidance,
    DynamicThresholding,
    EditCFG,
    MomentGuidance,
    PerpNeg,
    PerturbedGuidance,
    Sampler,
)
from pyguide.guidance.vectors import where  # noqa: E402

BOTH = ("uncond", "cond")


def sample(guidance: Any, plan: Any = "ddim", backend: str = "native", **options: Any) -> Any:
    net = options.pop("net", None) or Net(doubled="learned" in plan)
    told = options.pop("told", None) or conds(guidance, 3)
    seeds = {"seeds": 5} if PLANS[plan].stochastic_rows else {}
    return Sampler(net, PLANS[plan], guidance, backend=backend)(start(), conds=told, **seeds, **options)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---- equations ------------------------------------------------------------------------------------------------------
class Chosen(MomentGuidance):
    """Every pairing of numbers and scalars in `where`: in all of them the first is chosen, which makes it CFG(1.2)."""

    def guide(self, u: Any, c: Any, *, scale: Any) -> Any:
        yes, zero = c.norm() > 0.0, c.norm() * 0.0
        strength = where(yes, 0.3, 2.0) + where(yes, zero, 1.0) + where(yes, 0.0, zero + 1.0) + where(yes, zero, scale)
        return u + strength * scale * (c - u)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_where_of_numbers_and_scalars(backend: str) -> None:
    close(sample(Chosen(4.0), backend=backend), sample(CFG(1.2)))
    own = CustomGuidance(BOTH, lambda m: Chosen(4.0).guide(m["uncond"], m["cond"], scale=m.scale), scale=4.0)
    close(sample(own, backend=backend), sample(CFG(1.2)))


class Reversed(MomentGuidance):
    """Branches by name and not by place."""

    branches = ("cond", "negative", "uncond")

    def guide(self, c: Any, n: Any, u: Any, *, scale: Any) -> Any:
        return u + scale * (c - u) + 0.0 * n.norm() * n


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_outside_of_its_interval_a_method_is_conditional(backend: str) -> None:
    close(sample(Reversed(3.0, interval=(0.2, 0.6)), backend=backend), sample(CFG(3.0, interval=(0.2, 0.6))))
    close(sample(Reversed(1.0), backend=backend), sample(CFG(1.0)))


class Plain(MomentGuidance):
    def guide(self, u: Any, c: Any, *, scale: Any) -> Any:
        return u + scale * (c - u)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rescale_is_that_of_every_equation(backend: str) -> None:
    close(sample(Plain(4.0, rescale=0.7), backend=backend), sample(CFG(4.0, rescale=0.7)))
    weak = Autoguidance(4.0, lambda x, t, value: Net()(x, t, value * 0.0), rescale=0.7)
    strong = sample(weak, backend=backend, told={"cond": conds(CFG(1.0), 3)["cond"]})
    zero = {"uncond": {"value": torch.zeros(3, dtype=torch.float64)}, "cond": conds(CFG(1.0), 3)["cond"]}
    close(strong, sample(CFG(4.0, rescale=0.7), told=zero))
    other = EditCFG(4.0, 1.0, rescale=0.7)  # u + (i - u) + 4 (t - i): CFG of i and t
    told = {**conds(CFG(1.0), 3), "image": conds(CFG(1.0), 3)["uncond"]}
    close(sample(other, backend=backend, told=told), sample(CFG(4.0, rescale=0.7)))
    three = PerturbedGuidance(1.0, 3.0, rescale=0.7)  # u + (c - u) + 3 (c - p): CFG of p and c at 4
    told = {**conds(CFG(1.0), 3), "perturbed": conds(CFG(1.0), 3)["uncond"]}
    close(sample(three, backend=backend, told=told), sample(CFG(4.0, rescale=0.7)))


def test_a_method_that_is_changed_is_traced_again() -> None:
    guidance = CFG(4.0, rescale=0.7)
    first = sample(guidance)
    guidance.rescale = 0.2
    close(sample(guidance), sample(CFG(4.0, rescale=0.2)))
    assert (sample(guidance) - first).abs().max() > 0.1
    guidance.space = "denoised"
    close(sample(guidance), sample(CFG(4.0, rescale=0.2, space="denoised")))


def test_an_equation_decides_at_scale_one_too() -> None:
    """Only a method that says so is the conditional branch there."""
    mean = type("Mean", (MomentGuidance,), {"guide": lambda self, u, c, *, scale: scale * 0.5 * (u + c)})
    half = CustomGuidance(BOTH, lambda m: [0.5, 0.5])
    close(sample(mean(1.0)), sample(half))
    assert (sample(mean(1.0)) - sample(CFG(1.0))).abs().max() > 0.1


def test_what_a_function_of_the_moments_sees() -> None:
    seen: list[Any] = []

    def weights(moments: Any) -> Any:
        seen.append((moments.scale.clone(), moments.sigma.clone(), float(moments.size[0])))
        with pytest.raises(KeyError, match="'negative' is no branch; expected one of uncond, cond"):
            moments["negative"]
        return [0.0, 1.0]

    close(sample(CustomGuidance(BOTH, weights, scale=[2.0, 3.0, 4.0])), sample(CFG(1.0)))
    plan = PLANS["ddim"]
    assert len(seen) == plan.evaluations
    for i, (scale, sigma, size) in enumerate(seen):
        assert scale.tolist() == [2.0, 3.0, 4.0]
        assert sigma.tolist() == [plan.sigma[i]] * 3
        assert size == 48


def test_a_method_shows_what_it_is() -> None:
    shown = repr(pyguide.APG(4.0, base="uncond", norm_dim=-1, space="denoised", interval=(0.1, 0.8)))
    for text in ("scale=4.0", "dim=(-1,)", "base=uncond", "space='denoised'", "interval=(0.1, 0.8)"):
        assert text in shown
    assert "rescale=0.5" in repr(CFG(4.0, rescale=0.5))
    assert "limit=2.0" in repr(DynamicThresholding(None, limit=2.0))


def test_a_scale_can_be_assigned() -> None:
    guidance = CFG(4.0, rescale=0.7)
    sampler = Sampler(Net(), PLANS["ddim"], guidance)
    guidance.scale = 2.0
    close(sampler(start(), conds=conds(guidance, 3)), sample(CFG(2.0, rescale=0.7)))
    with pytest.raises(TypeError, match="scale: expected a number"):
        guidance.scale = "2"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: CustomGuidance(lambda m: m, BOTH), "branches: expected their names first"),
        (lambda: CustomGuidance(BOTH, guided=lambda o, x: x, scale=2.0), "scale: .* `guided` sees no moments"),
        (lambda: CFG(4.0, rescale=1.5), r"rescale: expected a number in \[0, 1\]"),
        (lambda: CFG(4.0, sigma_interval=(None, 1.0)), "sigma_interval: expected"),
        (lambda: sample(CFG(lambda step: 2.0)), "scale: a function of .step, steps. is called, and"),
        (lambda: sample(CFG([2.0] * 8)), "guidance.scales.Table has one per step"),
        (lambda: sample(PerpNeg(3.0), told=conds(CFG(1.0), 3)), r"negative: .* in conds=\{'negative': ...\}"),
        (
            lambda: sample(CustomGuidance(BOTH, guided=lambda o, x: x.mul_(2.0))),
            "guided: its function wrote to x",
        ),
    ],
)
def test_mistakes_are_named(call: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        call()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_zeros_stay_zeros(backend: str) -> None:
    """u = c = 0 changes nothing, and a sample of one element has no deviation."""
    plan = PLANS["ddim"]
    for guidance in (CFG(4.0, rescale=0.7), pyguide.NormPreservingCFG(3.0, -1), pyguide.MagnitudeAwareCFG(4.0)):
        got = Sampler(lambda x, t: x * 0.0, plan, guidance, backend=backend)(start())
        close(got, Sampler(lambda x, t: x * 0.0, plan)(start()))
    one = Sampler(lambda x, t: torch.tanh(x), plan, CFG(4.0, rescale=0.7), backend=backend)(start(2, 1, 1))
    close(one, Sampler(lambda x, t: torch.tanh(x), plan, CFG(4.0))(start(2, 1, 1)))


@pytest.mark.parametrize(
    ("guide", "text"),
    [
        (lambda self, u, c: u, "unexpected keyword argument 'scale'"),
        (lambda self, u, c, *, scale: u if scale > 1 else c, r"where\(a < b, x, y\)"),
        (lambda self, u, c, *, scale: u * where(c.norm() == 0.0, 1.0, 2.0), "compare as a < b and a > b"),
        (lambda self, u, c, *, scale: u * (scale <= 1), "compare as a < b and a > b"),
        (lambda self, u, c, *, scale: u * scale**3, "only the power 2"),
        (lambda self, u, c, *, scale: (u, c), "0 slots"),
    ],
)
def test_an_equation_that_cannot_be_said_is_refused_with_the_sampler(guide: Any, text: str) -> None:
    method = type("Mine", (MomentGuidance,), {"guide": guide})(3.0)
    with pytest.raises((TypeError, ValueError), match=f"Mine: .*{text}"):
        Sampler(Net(), PLANS["ddim"], method)


def test_parameters_and_tables_are_checked() -> None:
    def of(**members: Any) -> Any:
        guide = lambda self, u, c, **scalars: u * next(iter(scalars.values()))  # noqa: E731
        return type("Mine", (MomentGuidance,), {"guide": guide, **members})(3.0)

    with pytest.raises(ValueError, match=r"names: .'size'. are names of the kernel's own, in Mine"):
        Sampler(Net(), PLANS["ddim"], of(names=("size",)))
    with pytest.raises(ValueError, match=r"parameters: Mine gives 'scale' as shape \(8,\), expected \(8, 3\)"):
        sample(of(parameters=lambda self, plan, batch: {"scale": np.ones(plan.evaluations)}))
    with pytest.raises(ValueError, match="parameters: Mine gives 'scale' as only"):
        sample(of(parameters=lambda self, plan, batch: {"other": 1.0}))
    with pytest.raises(ValueError, match=r"table: Mine gives weights \(8, 3\), expected \(8, 3, 2\)"):
        sample(of(table=lambda self, plan, batch: np.ones((plan.evaluations, batch))))


# ---- the learned variance is that of the conditional branch ---------------------------------------------------------
@pytest.mark.parametrize(
    "guidance",
    [
        PerpNeg(3.0, 1e-12),
        PerturbedGuidance(3.0, 0.0),
        Compose({"cond": 3.0, "negative": 1e-12}),
        CustomGuidance(("cond", "uncond"), lambda m: [3.0, -2.0]),
        CustomGuidance(("cond", "uncond"), guided=lambda o, x: o["uncond"] + 3.0 * (o["cond"] - o["uncond"])),
    ],
    ids=str,
)
def test_a_learned_variance_is_that_of_the_conditional_branch(guidance: Any) -> None:
    told = conds(PerpNeg(1.0), 3)
    told["perturbed"] = told["negative"]
    given = {name: told[name] for name in guidance.branches}
    got = sample(guidance, "ddpm learned", told=given)
    torch.testing.assert_close(got, sample(CFG(3.0), "ddpm learned"), rtol=1e-8, atol=1e-8)


# ---- functions ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (3.0, "expected a vector or weights .B, K. from its function, got float"),
        (None, "got NoneType"),
        (torch.ones(2, dtype=torch.float64), "got Tensor"),
        (np.ones((3, 2)), "got ndarray"),
        (torch.ones(3, 3, dtype=torch.float64), "expected 2, one for each branch, got 3"),
        (torch.ones(1, 2, dtype=torch.float64), r"expected real numbers of shape \(3,\), got torch.float64 \(1,\)"),
        (torch.ones(3, 2, dtype=torch.complex64), "expected real numbers"),
        ([1.0, "2"], "expected numbers or Tensor on cpu"),
        ([1.0, torch.ones(3, device="meta")], "expected numbers or Tensor on cpu"),
    ],
)
def test_what_weights_may_return(answer: Any, text: str, backend: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"weights: .*{text}"):
        sample(CustomGuidance(BOTH, lambda m: answer), backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda o, x: None, "expected Tensor"),
        (lambda o, x: x.numpy(), "expected Tensor"),
        (lambda o, x: x[:1], r"expected \(3, 2, 4, 6\)"),
        (lambda o, x: x.int(), "expected float32"),
        (lambda o, x: x.to("meta"), "expected an array on cpu, like the noise, got meta"),
    ],
)
def test_what_guided_may_return(answer: Any, text: str, backend: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"guided: .*{text}"):
        sample(CustomGuidance(BOTH, guided=answer), backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_functions_of_a_module_leave_no_graph(backend: str) -> None:
    """With a callback as without one: nothing is recorded for a backward pass."""
    gain = torch.nn.Parameter(torch.tensor(4.0, dtype=torch.float64))
    own = CustomGuidance(BOTH, lambda m: m["uncond"] + gain * (m["cond"] - m["uncond"]))
    hatch = CustomGuidance(BOTH, guided=lambda o, x: o["uncond"] + gain * (o["cond"] - o["uncond"]))
    for guidance in (own, hatch):
        for options in ({}, {"callback": lambda event: None}):
            close(sample(guidance, backend=backend, **options), sample(CFG(4.0)))


def test_the_state_itself_as_guided_output() -> None:
    """It lies where the row writes: a copy is read."""
    plan = PLANS["ddim"]
    got = Sampler(Net(), plan, CustomGuidance(BOTH, guided=lambda o, x: x))(start(), conds=conds(CFG(1.0), 3))
    close(got, Sampler(lambda x, t: x.clone(), plan)(start()))


@pytest.mark.parametrize("form", ["score", "mean", "input"])
@pytest.mark.parametrize("batched", [True, False])
def test_beside_a_classifier_in_every_form(form: str, batched: bool) -> None:
    def classifier(x: Any, t: Any) -> Any:
        return torch.stack([x.flatten(1).sum(1) * 0.01, x.flatten(1).square().sum(1) * 0.01], dim=1)

    plan = pyguide.compile("ddpm", pyguide.schedules.linear().path(6, offset=1), editable=True)
    told = {**conds(CFG(1.0), 3), "classifier": {"labels": torch.tensor([0, 1, 1])}}
    hatch = CustomGuidance(BOTH, guided=lambda o, x: o["uncond"] + 3.0 * (o["cond"] - o["uncond"]), batched=batched)
    own = CustomGuidance(BOTH, lambda m: [-2.0, 3.0], batched=batched)
    expected = Sampler(Net(), plan, ClassifierGuidance(classifier, 2.0, form=form, cfg=CFG(3.0)))
    for guidance in (hatch, own):
        sampler = Sampler(Net(), plan, ClassifierGuidance(classifier, 2.0, form=form, cfg=guidance))
        close(sampler(start(), conds=told, seeds=3), expected(start(), conds=told, seeds=3))


# ---- graphs are reused with other scales ----------------------------------------------------------------------------
@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, simulated: Any) -> recorded.Recorder:
    return recorded.install(monkeypatch, simulated)


def test_graphs_serve_other_scales_and_not_other_equations(recorder: recorded.Recorder) -> None:
    scale = [3.0]
    own = CustomGuidance(
        BOTH, lambda m: m["uncond"] + m.scale * (m["cond"] - m["uncond"]), scale=lambda step, steps: scale[0] + step
    )
    rescaled = CFG(lambda step, steps: scale[0] + step, rescale=0.7)
    told = conds(CFG(1.0), 3)
    for guidance in (own, rescaled, DynamicThresholding(rescaled, 0.9)):
        captured = Sampler(Net(), PLANS["ddim"], guidance, cuda_graph=True)
        before = recorder.recorded
        for scale[0] in (3.0, 5.0, 2.0):
            eager = Sampler(Net(), PLANS["ddim"], guidance)(start(), conds=told)
            assert torch.equal(captured(start(), conds=told), eager), scale
        assert recorder.recorded == before + 1
    rescaled.rescale = 0.3
    captured(start(), conds=told)
    assert torch.equal(captured(start(), conds=told), Sampler(Net(), PLANS["ddim"], guidance)(start(), conds=told))
