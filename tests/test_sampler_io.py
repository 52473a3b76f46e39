"""What passes between a sampler and its model: dtypes, memory formats, views, and how the time is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyguide
from pyguide import CFG, Sampler, schedules

VP = schedules.scaled_linear()
PLANS = {name: pyguide.compile(name, VP.path(12)) for name in ("ddim", "dpmpp_2m", "unipc")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_model_state_and_result(dtype):
    seen = set()

    def model(x, t):
        seen.add((x.dtype, t.dtype))
        return x * 0.1

    noise = torch.randn(2, 3, 4, 4, dtype=dtype)
    out = Sampler(model, PLANS["unipc"])(noise)
    told = torch.float64 if dtype == torch.float64 else torch.int64
    assert out.dtype == dtype
    assert seen == {(dtype, told)}


def test_a_module_decides_the_dtype_of_its_input_and_an_output_may_have_another():
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.25, dtype=torch.float16))

        def forward(self, x, t):
            assert x.dtype == torch.float16
            return (x * self.scale).float()

    noise = torch.randn(2, 3, 4, 4)
    out = Sampler(Half(), PLANS["dpmpp_2m"])(noise)
    assert out.dtype == torch.float32
    want = Sampler(lambda x, t: x.half().float() * 0.25, PLANS["dpmpp_2m"])(noise)
    torch.testing.assert_close(out, want, rtol=0, atol=2e-3)


def test_outputs_in_any_memory_format_and_outputs_that_are_the_input():
    noise = torch.randn(2, 3, 4, 6)
    want = Sampler(lambda x, t: x * 0.25, PLANS["unipc"])(noise)
    formats = {
        "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last),
        "slice of 2C": lambda y: torch.cat([y, y * torch.nan], 1)[:, :3],
        "transposed": lambda y: y.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": lambda y: torch.stack([y, y * torch.nan], -1)[..., 0],
    }
    for name, shuffle in formats.items():
        out = Sampler(lambda x, t, shuffle=shuffle: shuffle(x * 0.25), PLANS["unipc"])(noise)
        assert torch.equal(out, want), name
    want = Sampler(lambda x, t: x.clone(), PLANS["unipc"], CFG(2.0))(noise, **{k: {} for k in ("cond", "uncond")})
    for same in (lambda x, t: x, lambda x, t: x.view(x.shape)):
        assert torch.equal(Sampler(same, PLANS["unipc"], CFG(2.0))(noise, cond={}, uncond={}), want)
    numbers = noise.numpy()
    assert np.array_equal(
        Sampler(lambda x, t: x, PLANS["unipc"])(numbers), Sampler(lambda x, t: x.copy(), PLANS["unipc"])(numbers)
    )


def test_outputs_whose_memory_is_not_their_values():
    """Fields of packed records lie between items, negated views hold the opposite of their values."""
    noise = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    want = Sampler(lambda x, t: x * 0.25, PLANS["unipc"])(noise)

    def packed(x, t):
        record = np.zeros(x.shape, [("pad", "u1"), ("value", "f4")])
        record["value"] = x * 0.25
        return record["value"]

    def reversed_fields(x, t):
        record = np.zeros(x.shape, [("pad", "u1"), ("value", "f4")])
        record["value"] = (x * 0.25)[..., ::-1]
        return record["value"][..., ::-1]

    for model in (packed, reversed_fields):
        assert np.array_equal(Sampler(model, PLANS["unipc"])(noise), want)

    def lazily_negated(x, t):
        out = torch.complex(torch.zeros_like(x), x * -0.25).conj().imag
        assert out.is_neg()
        return out

    got = Sampler(lazily_negated, PLANS["unipc"])(torch.from_numpy(noise))
    assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("batched", [True, False])
def test_outputs_that_are_an_earlier_input(backend, batched):
    """A model that keeps its inputs and answers with one of them: what it returns is read before it is overwritten."""
    given = {"cond": {"y": torch.ones(2)}, "uncond": {"y": torch.zeros(2)}}

    def run(keep):
        kept = []

        def model(x, t, y):
            kept.append(keep(x))
            return kept[-2 if len(kept) > 1 else -1]

        return Sampler(model, PLANS["ddim"], CFG(2.0, batched=batched), backend=backend)(torch.ones(2, 3, 4), **given)

    # all buffers hold the newest input: that is what the model returns, whichever it picks
    now = Sampler(lambda x, t, y: x.clone(), PLANS["ddim"], CFG(2.0, batched=batched), backend=backend)
    assert torch.equal(run(lambda x: x), now(torch.ones(2, 3, 4), **given))


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 10, 28])
def test_the_dtype_of_time_does_not_depend_on_the_number_of_steps(steps):
    def told(path, prediction):
        seen = []
        model = lambda x, t: (seen.append(t.dtype), x * 0.1)[1]  # noqa: E731
        Sampler(model, pyguide.compile("ddim", path, prediction=prediction))(torch.ones(1, 2, 2))
        return set(seen)

    assert told(schedules.flow().path(steps), "flow") == {torch.float32}
    assert told(VP.path(steps), "epsilon") == {torch.int64}
    assert told(VP.path(steps, sigmas="karras"), "epsilon") <= {torch.float32, torch.int64}


@pytest.mark.parametrize("time", ["timestep", "unit", "sigma", "c_noise"])
def test_time_conventions(time):
    plan, told = PLANS["dpmpp_2m"], []
    model = pyguide.models.wrap(lambda x, t: (told.append(float(t[0])), x * 0.1)[1], time=time)
    Sampler(model, plan)(torch.randn(1, 3, 2, 2, dtype=torch.float64))
    want = {
        "timestep": plan.timestep,
        "unit": plan.timestep / 1000,
        "sigma": plan.sigma,
        "c_noise": np.log(plan.sigma / plan.alpha) / 4,
    }[time]
    np.testing.assert_array_equal(told, want)
