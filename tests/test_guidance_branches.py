"""Methods whose weights are their scales: equal to diffusers' own code over a whole run, and their identities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pyguide  # noqa: E402
from pyguide import schedules  # noqa: E402
from pyguide.guidance import CFG, Autoguidance, CFGPlusPlus, Compose, EditCFG, PerturbedGuidance, scales  # noqa: E402

STEPS, SHAPE = 20, (3, 2, 4, 4)
PATH = schedules.scaled_linear().path(STEPS, offset=1)
PLAN = pyguide.compile("ddim", PATH)
FLOW = pyguide.compile("dpmpp_2m", schedules.flow(3.0).path(STEPS), prediction="flow")
START = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
VALUES = {"uncond": 0.0, "image": 0.4, "cond": 1.0, "perturbed": -0.7, "cat": 1.2, "dog": -0.5, "weak": 1.0}


class Net:
    """A prediction that depends on x, the time and the condition; counts its rows."""

    def __init__(self, gain: float = 0.8) -> None:
        self.gain, self.rows = gain, 0

    def __call__(self, x: Any, t: Any, value: Any) -> Any:
        self.rows += len(x)
        shift = value.to(x.dtype) + torch.cos(t.to(x.dtype) / 200)
        return torch.tanh(x * self.gain + shift[:, None, None, None])


def told(*names: str, batch: int = 3) -> dict[str, Any]:
    return {name: {"value": torch.full((batch,), VALUES[name], dtype=torch.float64)} for name in names}


def run(
    guidance: Any, *names: str, plan: Any = PLAN, net: Any = None, backend: str = "auto", start: Any = START
) -> Any:
    conds = told(*(names or guidance.branches), batch=len(start))
    return pyguide.Sampler(net or Net(), plan, guidance, backend=backend)(start, conds=conds)


def alone(plan: Any, combined: Callable[..., Any], backend: str = "auto") -> Any:
    """The plan with one branch whose output is `combined(outputs by branch)`: the escape hatch."""

    def net(x: Any, t: Any) -> Any:
        def of(name: str, gain: float = 0.8) -> Any:
            return Net(gain)(x, t, torch.full((len(x),), VALUES[name], dtype=torch.float64))

        return combined(of)

    return pyguide.Sampler(net, plan, backend=backend)(START)


def close(a: Any, b: Any) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-10, atol=1e-10))


# ---- against diffusers' own code ------------------------------------------------------------------------------------
def slg(scale: float, skip: float) -> Any:
    guiders = pytest.importorskip("diffusers.guiders")
    guider = guiders.SkipLayerGuidance(
        guidance_scale=scale, skip_layer_guidance_scale=skip, skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0, skip_layer_guidance_layers=[0], start=0.0, stop=1.0,
    )  # fmt: skip
    guider.set_state(step=1, num_inference_steps=STEPS, timestep=torch.tensor(1))
    return guider


@pytest.mark.parametrize("plan", [PLAN, FLOW], ids=["ddim", "flow"])
@pytest.mark.parametrize(("scale", "perturbed"), [(5.0, 3.0), (1.0, 2.5), (7.5, 0.5)])
def test_perturbed_guidance_is_that_of_diffusers(scale, perturbed, plan, backend):
    """SkipLayerGuidance.forward of diffusers, which has the same three predictions."""
    guider = slg(scale, perturbed)
    assert guider._is_slg_enabled()

    def combined(of: Any) -> Any:
        return guider.forward(of("cond"), of("uncond"), of("perturbed")).pred

    if scale == 1.0:  # there it starts from the perturbed prediction: c + p (c - q) - (c - q)
        combined = lambda of: of("cond") + perturbed * (of("cond") - of("perturbed"))  # noqa: E731
        assert close(
            guider.forward(of_("cond"), None, of_("perturbed")).pred,
            of_("perturbed") + perturbed * (of_("cond") - of_("perturbed")),
        )
    got = run(PerturbedGuidance(scale, perturbed), plan=plan, backend=backend)
    assert close(got, alone(plan, combined, backend))


def of_(name: str) -> Any:
    return Net()(START, torch.zeros(3), torch.full((3,), VALUES[name], dtype=torch.float64))


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_autoguidance_is_that_of_diffusers(scale, backend):
    guiders = pytest.importorskip("diffusers.guiders")
    guider = guiders.AutoGuidance(guidance_scale=scale, auto_guidance_layers=[0], dropout=0.1, start=0.0, stop=1.0)
    guider.set_state(step=1, num_inference_steps=STEPS, timestep=torch.tensor(1))
    strong, weak = Net(), Net(0.5)
    got = run(Autoguidance(scale, weak), "cond", net=strong, backend=backend)
    assert close(got, alone(PLAN, lambda of: guider.forward(of("cond"), of("weak", 0.5)).pred, backend))
    assert (strong.rows > 0) == (scale != 0)
    assert (weak.rows > 0) == (scale != 1)


@pytest.mark.parametrize(("text", "image"), [(7.5, 1.5), (1.0, 1.0), (0.0, 2.0), (4.0, 0.0)])
def test_an_edit_is_instruct_pix2pix(text, image, backend):
    """Its pipeline's three lines: uncond + text (t - i) + image (i - uncond)."""

    def combined(of: Any) -> Any:
        return of("uncond") + text * (of("cond") - of("image")) + image * (of("image") - of("uncond"))

    assert close(run(EditCFG(text, image), backend=backend), alone(PLAN, combined, backend))


def test_a_composition_is_the_sum_of_its_directions(backend):
    def combined(of: Any) -> Any:
        u = of("uncond")
        return u + 5.0 * (of("cat") - u) - 2.0 * (of("dog") - u)

    assert close(run(Compose({"cat": 5.0, "dog": -2.0}), backend=backend), alone(PLAN, combined, backend))


def test_cfg_plus_plus_renoises_with_the_unconditional_estimate(backend):
    """Chung et al. 2024, algorithm 2, in DDIM's own quantities."""
    lam = torch.tensor([0.0, 0.6, 1.0], dtype=torch.float64)
    x = START
    for i in range(STEPS):
        t = torch.full((3,), float(PATH.timestep[i]), dtype=torch.float64)
        u, c = (Net()(x, t, told(name)[name]["value"]) for name in ("uncond", "cond"))
        a, s = float(PATH.alpha[i]), float(PATH.sigma[i])
        D = (x - s * (u + lam[:, None, None, None] * (c - u))) / a
        x = float(PATH.alpha[i + 1]) * D + float(PATH.sigma[i + 1]) * u
    apart = pyguide.compile("ddim", PATH, noise_apart=True)
    assert close(run(CFGPlusPlus(lam), plan=apart, backend=backend), x)
    plain = run(CFG(lam), plan=apart, backend=backend)
    assert not close(plain, x)  # the control: with G for the noise too it is CFG
    assert close(plain, run(CFG(lam), backend=backend))  # and a plan of both is the plan
    assert not close(run(CFGPlusPlus(lam, interval=(0, 0.5)), plan=apart, backend=backend), x)


# ---- identities, and what is called ---------------------------------------------------------------------------------
IDENTICAL = [
    (lambda: EditCFG(1.0, 1.0), "cond", lambda: None),
    (lambda: EditCFG(0.0, 0.0), "uncond", lambda: CFG(0.0)),
    (lambda: Autoguidance(1.0, Net(0.5)), "cond", lambda: None),
    (lambda: PerturbedGuidance(1.0, 0.0), "cond", lambda: None),
]


@pytest.mark.parametrize(("method", "branch", "plain"), IDENTICAL)
def test_the_identity_scales_call_one_branch(method, branch, plain, backend):
    net, other = Net(), Net()
    got = run(method(), branch, net=net, backend=backend)
    guidance = plain()
    names = ("cond",) if guidance is None else ("uncond", "cond")
    assert torch.equal(got, run(guidance, *names, net=other, backend=backend))
    assert net.rows == STEPS * len(START)


@pytest.mark.parametrize("name", ["perturbed", "edit", "compose"])
def test_without_its_own_part_it_is_cfg(name, backend):
    """Bit for bit in the weights, so in the result up to the order of the sum."""
    method = {
        "perturbed": lambda: PerturbedGuidance(4.0, 0.0),
        "edit": lambda: EditCFG(4.0, 4.0),
        "compose": lambda: Compose({"cond": 4.0}),
    }[name]()
    net = Net()
    got = run(method, "uncond", "cond", net=net, backend=backend)
    assert torch.equal(got, run(CFG(4.0), "uncond", "cond", backend=backend))
    assert net.rows == 2 * STEPS * len(START)


def test_outside_the_interval_one_branch_is_called(backend):
    half = STEPS // 2 * len(START)
    for method, inside in (
        (EditCFG(7.0, 1.5, interval=(0.0, 0.5)), 3),
        (PerturbedGuidance(5.0, 2.0, interval=(0.0, 0.5)), 3),
        (CFGPlusPlus(0.5, interval=(0.0, 0.5)), 2),
    ):
        net = Net()
        plan = pyguide.compile("ddim", PATH, noise_apart=True)
        run(method, net=net, plan=plan, backend=backend)
        assert net.rows == half * inside + half, method
    strong, weak = Net(), Net(0.5)
    run(Autoguidance(2.0, weak, interval=(0.0, 0.5)), "cond", net=strong, backend=backend)
    assert (strong.rows, weak.rows) == (2 * half, half)


def test_scales_belong_to_samples(backend):
    """Row 0 does not change when row 1 does, bit for bit; the control does."""
    first = run(EditCFG([7.0, 3.0, 1.0], [1.5, 2.0, 1.0]), backend=backend)
    second = run(EditCFG([7.0, 5.0, 1.0], [1.5, 1.0, 1.0]), backend=backend)
    assert torch.equal(first[[0, 2]], second[[0, 2]])
    assert not torch.equal(first[1], second[1])
    one = run(EditCFG(7.0, 1.5), backend=backend, start=START[:1])
    assert close(one[0], first[0])


# ---- schedules of a scale -------------------------------------------------------------------------------------------
def test_scales_by_step():
    table = [float(v) for v in np.linspace(3, 8, STEPS)]
    assert CFG(scales.Linear(3.0, 8.0)).scales(PLAN, 2)[:, 0] == pytest.approx(table)
    assert CFG(scales.Table(table)).scales(PLAN, 2)[:, 1].tolist() == table
    cosine = CFG(scales.Cosine(8.0, 2.0)).scales(PLAN, 1)[:, 0]
    assert (cosine[0], cosine[-1], cosine[:10].mean()) == (8.0, 2.0, pytest.approx(10 - cosine[10:].mean()))
    video = [1 + 6 * (1 - math.cos(math.pi * (k / STEPS) ** 5)) / 2 for k in range(STEPS)]
    assert CFG(scales.PowerCosine(6.0)).scales(PLAN, 1)[:, 0] == pytest.approx(video)
    assert repr(CFG(scales.Linear(3.0, 8.0))) == "CFG(scale=Linear(start=3.0, end=8.0))"
    assert (scales.Linear(3.0, 8.0)(0, 1), scales.Cosine(3.0, 8.0)(0, 1)) == (3.0, 3.0)


# ---- errors ---------------------------------------------------------------------------------------------------------
WRONG = [
    (lambda: Compose({}), ValueError, "scales: expected a mapping"),
    (lambda: Compose([1.0]), ValueError, "scales: expected a mapping.*got list"),
    (lambda: Compose({"uncond": 1.0}), ValueError, "scales: expected a mapping"),
    (lambda: Compose({"cat": float("nan")}), ValueError, r"scales\['cat'\]: expected a finite number"),
    (lambda: EditCFG(1.0, float("inf")), ValueError, "image_scale: expected a finite number"),
    (lambda: PerturbedGuidance(1.0, "strong"), TypeError, "perturbed_scale: expected a number"),
    (lambda: CFGPlusPlus(1.5), ValueError, r"scale: expected a lambda in \[0, 1\], got 1.5"),
    (lambda: CFG(scales.Table([1.0, 2.0])).scales(PLAN, 1), ValueError, "scale: expected a table of 20 values"),
    (lambda: scales.PowerCosine(6.0, -1.0), ValueError, "power: expected a finite number >= 0"),
    (lambda: EditCFG([1.0, 2.0]).table(PLAN, 3), ValueError, r"scale: expected a number or one per sample \(3\)"),
    (lambda: EditCFG(1.0, [1.0, 2.0]).table(PLAN, 3), ValueError, r"image_scale: expected .* one per sample \(3\)"),
    (
        lambda: run(CFGPlusPlus(lambda step, steps: 2.0), plan=APART),
        ValueError,
        r"scale: expected a lambda in \[0, 1\]",
    ),
    (lambda: run(CFGPlusPlus(0.5)), ValueError, "guidance: CFG\\+\\+ needs a plan of both.*noise_apart=True"),
    (lambda: run(CFGPlusPlus(0.5), plan=FLOW), ValueError, "guidance: CFG\\+\\+ needs a plan of both.*dpmpp_2m"),
    (lambda: run(Autoguidance(2.0, 3)), TypeError, "weak_model: got builtins.int"),
    (lambda: run(EditCFG(7.0), "uncond", "cond"), ValueError, "image: .* needs its conditions"),
    (
        lambda: run(Compose({"cat": 5.0}), "uncond", "cat", "dog"),
        ValueError,
        "conds: the branches are uncond, cat, got",
    ),
]
APART = pyguide.compile("ddim", PATH, noise_apart=True)


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("method", [CFG, EditCFG, CFGPlusPlus, lambda net: Autoguidance(net, 2.0)])
def test_a_module_is_no_scale(method):
    """It is callable, as a schedule is: the two arguments were swapped."""
    with pytest.raises(TypeError, match=r"scale: expected a number, .* got the module Linear"):
        method(torch.nn.Linear(1, 1))


def test_methods_say_their_scales():
    assert repr(EditCFG(7.0, 1.5)) == "EditCFG(scale=7.0, image_scale=1.5)"
    assert repr(PerturbedGuidance(5.0, 3.0)) == "PerturbedGuidance(scale=5.0, perturbed_scale=3.0)"


def test_a_weak_model_told_another_time_is_refused():
    weak = pyguide.models.wrap(Net(0.5), time="sigma")
    with pytest.raises(ValueError, match="weak_model: expected time 'timestep', which the model has, got 'sigma'"):
        pyguide.Sampler(Net(), PLAN, Autoguidance(2.0, weak))
