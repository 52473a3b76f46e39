"""Bad input is an error that names the argument, what came and what was expected, before the model is called."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyguide
from pyguide import CFG, Sampler, schedules

PATH = schedules.scaled_linear().path(4)
PLAN = pyguide.compile("ddim", PATH)
NOISY = pyguide.compile("ddim", PATH, eta=1.0)
EXTREME = pyguide.compile(
    "ddim", schedules.from_alphas_cumprod([*np.linspace(0.999, 0.01, 20), 1e-80]).path(5, spacing="trailing")
)
X = torch.zeros(2, 3, 4, 4)
Y = {"y": torch.zeros(2)}


class Narrow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

    def forward(self, x, t):
        raise AssertionError("the model was called")


def never(x, t, **cond):
    raise AssertionError("the model was called")


BEFORE_THE_MODEL = {
    "noise kind": (lambda: Sampler(never, PLAN)([1.0]), TypeError, "noise.*list"),
    "noise dtype": (lambda: Sampler(never, PLAN)(X.long()), TypeError, "noise.*int64"),
    "noise shape": (lambda: Sampler(never, PLAN)(torch.zeros(2)), ValueError, r"noise.*\(2,\)"),
    "noise grad": (lambda: Sampler(never, PLAN)(X.clone().requires_grad_()), ValueError, "noise.*grad"),
    "plan": (lambda: Sampler(never, "ddim"), TypeError, "plan.*str"),
    "guidance": (lambda: Sampler(never, PLAN, 7.5), TypeError, "guidance.*float"),
    "backend": (lambda: Sampler(never, PLAN, backend="gpu"), ValueError, "backend.*gpu"),
    "check": (lambda: Sampler(never, PLAN, check="maybe"), ValueError, "check.*maybe"),
    "model": (lambda: Sampler(3, PLAN), TypeError, "int"),
    "uncond missing": (lambda: Sampler(never, PLAN, CFG(2.0))(X, cond=Y), ValueError, "uncond"),
    "cond missing": (lambda: Sampler(never, PLAN, CFG(2.0))(X, uncond=Y), ValueError, "cond"),
    "cond kind": (lambda: Sampler(never, PLAN)(X, cond=torch.zeros(2)), TypeError, "cond.*Tensor"),
    "cond rows": (
        lambda: Sampler(never, PLAN)(X, cond={"y": torch.zeros(1)}),
        ValueError,
        r"cond\['y'\].*\(2\).*\(1,\)",
    ),
    "cond twice": (lambda: Sampler(never, PLAN)(X, cond=Y, conds={"cond": Y}), ValueError, "cond.*conds"),
    "unknown branch": (
        lambda: Sampler(never, PLAN, CFG(2.0))(X, cond=Y, uncond=Y, conds={"negative": Y}),
        ValueError,
        "conds.*negative",
    ),
    "uncond without guidance": (lambda: Sampler(never, PLAN)(X, cond=Y, uncond=Y), ValueError, "uncond.*CFG"),
    "interval in percent": (lambda: CFG(2.0, interval=(25, 75)), ValueError, r"interval.*\[0, 1\].*25"),
    "scale text": (lambda: CFG("5"), TypeError, "scale.*'5'"),
    "one row for all": (lambda: Sampler(never, PLAN)(X, cond={"y": torch.zeros(1, 7)}), ValueError, "expand"),
    "cond names": (lambda: Sampler(never, PLAN, CFG(2.0))(X, cond=Y, uncond={}), ValueError, "different conditions"),
    "cond shapes": (
        lambda: Sampler(never, PLAN, CFG(2.0))(X, cond={"y": torch.zeros(2, 5)}, uncond={"y": torch.zeros(2, 6)}),
        ValueError,
        r"'y'.*\(2, 6\).*\(2, 5\)",
    ),
    "scale shape": (
        lambda: Sampler(never, PLAN, CFG([1.0, 2.0, 3.0]))(X, cond=Y, uncond=Y),
        ValueError,
        r"scale.*\(3,\)",
    ),
    "scale nan": (lambda: CFG(float("nan")), ValueError, "scale.*nan"),
    "interval": (lambda: CFG(2.0, interval=(0.8, 0.2)), ValueError, "interval.*0.8"),
    "space": (lambda: CFG(2.0, space="pixel"), ValueError, "space.*pixel"),
    "seeds count": (lambda: Sampler(never, NOISY)(X, seeds=[1]), ValueError, r"seeds.*\(2\).*1"),
    "seeds kind": (lambda: Sampler(never, NOISY)(X, seeds="a"), TypeError, "seeds.*a"),
    "seeds range": (lambda: Sampler(never, NOISY)(X, seeds=-1), ValueError, "seeds.*-1"),
    "two sources": (lambda: Sampler(never, NOISY)(X, seeds=1, noises=[]), ValueError, "seeds and noises"),
    "noises count": (lambda: Sampler(never, NOISY)(X, noises=[X]), ValueError, "noises.*3.*1"),
    "noises shape": (
        lambda: Sampler(never, NOISY)(X, noises=[X, X[:1], X]),
        ValueError,
        r"noises\[1\].*\(1, 3, 4, 4\)",
    ),
    "noises kind": (lambda: Sampler(never, NOISY)(X, noises=[X.numpy()] * 3), ValueError, "noises.*ndarray"),
    "generator count": (lambda: Sampler(never, NOISY)(X, generator=[torch.Generator()]), ValueError, "generator.*2.*1"),
    "generator kind": (
        lambda: Sampler(never, NOISY)(X, generator=np.random.default_rng()),
        TypeError,
        "generator.*torch.Generator.*got Generator",
    ),
    "generator kind numpy": (
        lambda: Sampler(never, NOISY)(X.numpy(), generator=torch.Generator()),
        TypeError,
        "generator.*numpy",
    ),
    "generators kind": (lambda: Sampler(never, NOISY)(X, generator=[5, 6]), TypeError, "generator.*int"),
    "bfloat16 numpy": (
        lambda: Sampler(Narrow(), PLAN)(X.numpy()),
        TypeError,
        "noise.*bfloat16",
    ),
    "cond list": (lambda: Sampler(never, PLAN)(X, cond={"p": ["a", "b"]}), TypeError, r"cond\['p'\].*list"),
    "interval number": (lambda: CFG(2.0, interval=0.5), ValueError, "interval.*0.5"),
    "clip text": (lambda: pyguide.compile("ddim", PATH, clip="a"), ValueError, "clip.*'a'"),
    "clip length": (lambda: pyguide.compile("ddim", PATH, clip=(1.0,)), ValueError, "clip"),
    "rho": (lambda: schedules.edm().path(4, rho=1e-3), ValueError, "rho.*0.001"),
    "solver hint": (lambda: pyguide.compile("DPM++ 2N", PATH), ValueError, "solver: .* did you mean 'dpmpp_2.'"),
    "prediction hint": (lambda: pyguide.compile("ddim", PATH, prediction="v_prediction"), ValueError, "is 'v'"),
    "cuda_graph on a CPU": (
        lambda: Sampler(never, PLAN, cuda_graph=True)(X),
        ValueError,
        "cuda_graph: expected noise on a CUDA device, got cpu",
    ),
    "cuda_graph of the reference": (
        lambda: Sampler(never, PLAN, backend="reference", cuda_graph=True),
        ValueError,
        "cuda_graph: the reference",
    ),
    "triton on a CPU": (lambda: Sampler(never, PLAN, backend="triton")(X), ValueError, "backend: 'triton'.*GPU"),
    "unit on edm": (
        lambda: Sampler(
            pyguide.models.wrap(never, time="unit"),
            pyguide.compile("ddim", schedules.edm().path(4), prediction="edm"),
        ),
        ValueError,
        "time.*edm",
    ),
    "beyond float32": (
        lambda: Sampler(never, EXTREME)(X),
        ValueError,
        "plan: row 1 has a coefficient beyond float32",
    ),
    "c_noise at alpha 0": (
        lambda: Sampler(
            pyguide.models.wrap(never, time="c_noise"),
            pyguide.compile("ddim", schedules.flow().path(4), prediction="flow"),
        ),
        ValueError,
        "c_noise.*alpha = 0",
    ),
}


@pytest.mark.parametrize("case", BEFORE_THE_MODEL.values(), ids=BEFORE_THE_MODEL)
def test_refused_before_the_model_is_called(case):
    call, kind, message = case
    with pytest.raises(kind, match=message):
        call()


OUTPUTS = {
    "a batch of 1 is not broadcast": (lambda x, t: x[:1] * 2, ValueError, r"\(2, 3, 4, 4\).*\(1, 3, 4, 4\)"),
    "channels": (lambda x, t: torch.cat([x, x], 1), ValueError, r"\(2, 3, 4, 4\).*\(2, 6, 4, 4\)"),
    "dtype": (lambda x, t: x.long(), TypeError, "int64"),
    "kind": (lambda x, t: x.numpy() * 2, TypeError, "torch tensor.*ndarray"),
    "nothing": (lambda x, t: None, TypeError, "NoneType"),
}


@pytest.mark.parametrize("case", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_that_do_not_fit(case, backend):
    model, kind, message = case
    with pytest.raises(kind, match=message):
        Sampler(model, PLAN, backend=backend)(X)


def test_outputs_that_require_grad():
    weight = torch.ones(1, requires_grad=True)

    def model(x, t):
        with torch.enable_grad():
            return x * weight

    with pytest.raises(ValueError, match="grad"):
        Sampler(model, PLAN)(X)


def test_branches_of_different_dtypes():
    dtypes = iter([torch.float32, torch.float16])
    with pytest.raises(TypeError, match="float16"):
        Sampler(lambda x, t: (x * 0.1).to(next(dtypes)), PLAN, CFG(2.0, batched=False))(X, cond={}, uncond={})


def test_blend_that_returns_something_else():
    plan = pyguide.compile("ddim", PATH, editable=True)
    with pytest.raises(ValueError, match=r"blend.*\(2, 3, 4, 4\).*\(1, 3, 4, 4\)"):
        Sampler(lambda x, t: x * 0.1, plan)(X, blend=lambda event: event.x[:1])
    with pytest.raises(ValueError, match=r"blend.*Tensor.*NoneType"):
        Sampler(lambda x, t: x * 0.1, plan)(X, blend=lambda event: None)


def test_randn_arguments():
    with pytest.raises(ValueError, match=r"seeds.*2.*3"):
        pyguide.randn([1, 2, 3], (2, 4))
    with pytest.raises(ValueError, match="shape"):
        pyguide.randn(0, (2, -4))
    assert pyguide.randn(0, (2, 3, 4), like=np.zeros(1, np.float16)).dtype == np.float16
