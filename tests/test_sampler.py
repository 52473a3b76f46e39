"""The sampling loop: what the model sees, how often it is called, what comes out, and where it may be changed."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch

import pyguide
from pyguide import CFG, Sampler, schedules, solvers

VP = schedules.scaled_linear()
PLANS = {
    "ddim": pyguide.compile("ddim", VP.path(12)),
    "ddim_clip": pyguide.compile("ddim", VP.path(12), clip=1.0),
    "ancestral": pyguide.compile("euler_ancestral", VP.path(12)),
    "heun_churn": pyguide.compile("heun", schedules.edm().path(8), prediction="edm", s_churn=4.0),
    "dpmpp_2m": pyguide.compile("dpmpp_2m", VP.path(12)),
    "unipc": pyguide.compile("unipc", VP.path(12)),
    "flow": pyguide.compile("euler", schedules.flow(3.0).path(12), prediction="flow"),
}
STOCHASTIC = ("ancestral", "heun_churn")
SHAPES = {"image": (3, 4, 8, 8), "odd": (3, 3, 7, 5), "tokens": (3, 17, 6), "video": (2, 4, 3, 5, 5), "flat": (3, 2)}


def network(x, t, y=None):
    """Smooth, bounded, elementwise and the same on numpy and torch: what batch it is in does not matter to a row."""
    tanh = np.tanh if isinstance(x, np.ndarray) else torch.tanh
    shift = 0.0 if y is None else y.reshape(-1, *[1] * (x.ndim - 1)) * 0.1
    return tanh(x * 0.5) + shift


def conditions(batch, like=None):
    y, zero = torch.arange(batch, dtype=torch.float32) + 1, torch.zeros(batch)
    if isinstance(like, np.ndarray):
        y, zero = y.numpy(), zero.numpy()
    return {"cond": {"y": y}, "uncond": {"y": zero}}


class Counting:
    """A model that remembers how many rows each call had and what it was told."""

    def __init__(self):
        self.rows, self.times, self.conds = [], [], []

    def __call__(self, x, t, **cond):
        self.rows.append(len(x))
        self.times.append(t.clone() if torch.is_tensor(t) else t.copy())
        self.conds.append(cond)
        return network(x, t, cond.get("y"))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_solver_run_in_float64(name, shape, backend):
    plan = PLANS[name]
    noise = pyguide.randn(3, shape, like=torch.empty(0)) * plan.init_scale
    given = conditions(shape[0])
    rng = torch.Generator().manual_seed(0)
    draws = [torch.randn(shape, generator=rng) for _ in plan.stochastic_rows]
    got = Sampler(network, plan, CFG(3.0), backend=backend)(noise, **given, noises=draws)
    left = iter(draws)

    def guided(x, t):
        out = [network(x, t, given[k]["y"].double()) for k in ("uncond", "cond")]
        return -2.0 * out[0] + 3.0 * out[1]

    kind = {"ddim_clip": ("ddim", {"clip": 1.0}), "ancestral": ("euler_ancestral", {}), "flow": ("euler", {})}
    kind["heun_churn"] = ("heun", {"s_churn": 4.0})
    solver, options = kind.get(name, (name, {}))
    path = {"flow": schedules.flow(3.0).path(12), "heun_churn": schedules.edm().path(8)}.get(name, VP.path(12))
    want = solvers.sample(
        solver, guided, noise.double(), path, prediction=plan.prediction, noise=lambda i: next(left).double(), **options
    )
    # float32 rounding of R steps on values of this size, the solver's coefficients being near 1
    bound = 8 * 2.0**-24 * plan.evaluations * max(1.0, float(want.abs().max()), plan.init_scale)
    assert float((got.double() - want).abs().max()) <= bound
    assert got.dtype == torch.float32
    assert got.shape == noise.shape


@pytest.mark.parametrize("name", PLANS)
def test_numpy_and_torch_are_the_same_bits(name):
    plan = PLANS[name]
    noise = pyguide.randn(5, (2, 3, 4, 4)) * np.float32(plan.init_scale)
    free = lambda x, t, y=None: x * 0.25  # noqa: E731  exact in both libraries
    a = Sampler(free, plan, CFG(2.0))(noise, **conditions(2, noise), seeds=9)
    b = Sampler(free, plan, CFG(2.0))(torch.from_numpy(noise), **conditions(2), seeds=9)
    assert isinstance(a, np.ndarray)
    assert a.tobytes() == b.numpy().tobytes()


def test_branches_are_stacked_uncond_first():
    model = Counting()
    Sampler(model, PLANS["ddim"], CFG(3.0))(torch.randn(2, 3, 4, 4), **conditions(2))
    assert model.rows == [4] * 12
    assert model.conds[0]["y"].tolist() == [0, 0, 1, 2]
    assert [t.tolist() for t in model.times] == [[int(t)] * 4 for t in PLANS["ddim"].timestep]
    assert model.times[0].dtype == torch.int64


def test_scales_of_exactly_0_and_1_and_the_interval_run_one_branch():
    def rows(guidance, batch=2):
        model = Counting()
        Sampler(model, PLANS["ddim"], guidance)(torch.randn(batch, 3, 4, 4), **conditions(batch))
        return model

    assert rows(CFG(1.0)).rows == [2] * 12
    assert rows(CFG(1.0)).conds[0]["y"].tolist() == [1, 2]
    assert rows(CFG(0.0)).conds[0]["y"].tolist() == [0, 0]
    assert rows(CFG(3.0, interval=(0.25, 0.5))).rows == [2] * 3 + [4] * 3 + [2] * 6
    sigma = PLANS["ddim"].sigma
    inside = rows(CFG(3.0, sigma_interval=(sigma[8], sigma[2])))
    assert inside.rows == [2, 2] + [4] * 6 + [2] * 4
    assert rows(CFG(lambda step, steps: 3.0 if step % 2 else 1.0)).rows == [2, 4] * 6
    mixed = rows(CFG([1.0, 0.0, 4.0]), batch=3)  # uncond: samples 1 and 2; cond: samples 0 and 2
    assert mixed.rows == [4] * 12
    assert mixed.conds[0]["y"].tolist() == [0, 0, 1, 3]
    assert rows(CFG(3.0, batched=False)).rows == [2, 2] * 12


def test_all_evaluations_of_a_step_are_guided_alike():
    plan, model = pyguide.compile("heun", VP.path(6)), Counting()
    Sampler(model, plan, CFG(3.0, interval=(0.5, 1.0)))(torch.randn(1, 3, 4, 4), **conditions(1))
    assert model.rows == [1] * 6 + [2] * 5
    low, high = plan.sigma[8], plan.sigma[4]  # of the steps 4 and 2: the interval is (low, high]
    model = Counting()
    Sampler(model, plan, CFG(3.0, sigma_interval=(low, high)))(torch.randn(1, 3, 4, 4), **conditions(1))
    assert model.rows == [1] * 4 + [2] * 4 + [1] * 3


def test_scale_1_is_the_conditional_model_bit_for_bit():
    plan, noise = PLANS["unipc"], torch.randn(2, 3, 4, 4)
    given = conditions(2)
    alone = Sampler(network, plan)(noise, cond=given["cond"])
    assert torch.equal(Sampler(network, plan, CFG(1.0))(noise, **given), alone)
    assert torch.equal(Sampler(network, plan, CFG(1.0))(noise, cond=given["cond"]), alone)  # uncond is not needed
    assert torch.equal(
        Sampler(network, plan, CFG(0.0))(noise, **given), Sampler(network, plan)(noise, cond=given["uncond"])
    )


def test_without_conditions_the_branches_differ_by_place():
    def halves(x, t):
        return torch.cat([x[:2] * 0.1, x[2:] * 0.3])  # uncond, cond

    got = Sampler(halves, PLANS["ddim"], CFG(2.0))(torch.ones(2, 3, 4))
    want = Sampler(lambda x, t: x * (2 * 0.3 - 0.1), PLANS["ddim"])(torch.ones(2, 3, 4))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_sequential_and_batched_branches_agree_bit_for_bit():
    noise = torch.randn(3, 3, 5, 5)
    for scale in (3.0, torch.tensor([1.0, 0.0, 4.0]), lambda step, steps: 1.0 + step):
        batched = Sampler(network, PLANS["dpmpp_2m"], CFG(scale))(noise, **conditions(3))
        assert torch.equal(
            Sampler(network, PLANS["dpmpp_2m"], CFG(scale, batched=False))(noise, **conditions(3)), batched
        )


def test_nested_conditions_and_values_that_are_not_arrays():
    seen = []

    def model(x, t, *, text, added, flag):
        seen.append((text.shape, added["time_ids"].tolist(), flag))
        return x * 0.1

    cond = {"text": torch.ones(2, 7, 3), "added": {"time_ids": torch.tensor([[1.0], [2.0]])}, "flag": "on"}
    uncond = {"text": torch.zeros(2, 7, 3), "added": {"time_ids": torch.zeros(2, 1)}, "flag": "on"}
    Sampler(model, PLANS["ddim"], CFG(2.0))(torch.randn(2, 3, 4, 4), cond=cond, uncond=uncond)
    assert seen[0] == ((4, 7, 3), [[0.0], [0.0], [1.0], [2.0]], "on")


def test_the_callers_arrays_are_left_alone_and_the_result_is_its_own():
    noise = torch.randn(2, 3, 4, 4)
    before, given = noise.clone(), conditions(2)
    sampler = Sampler(network, PLANS["dpmpp_2m"], CFG(2.0))
    first = sampler(noise, **given)
    kept = first.clone()
    second = sampler(noise, **given)
    assert torch.equal(noise, before)
    assert torch.equal(first, kept)
    assert torch.equal(first, second)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert first.untyped_storage().nbytes() == first.nbytes  # not a view of a larger buffer
    z = [torch.randn(2, 3, 4, 4) for _ in PLANS["ancestral"].stochastic_rows]
    copies = [x.clone() for x in z]
    Sampler(network, PLANS["ancestral"])(noise, noises=z)
    assert all(torch.equal(a, b) for a, b in zip(z, copies, strict=True))


# ---- noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCHASTIC)
def test_generators_draw_once_for_each_noisy_row(name):
    plan, noise = PLANS[name], torch.randn(2, 3, 4, 4)
    sampler = Sampler(network, plan)
    rng = torch.Generator().manual_seed(1)
    draws = [torch.randn(noise.shape, generator=rng) for _ in plan.stochastic_rows]
    want = sampler(noise, noises=draws)
    assert torch.equal(sampler(noise, generator=torch.Generator().manual_seed(1)), want)
    torch.manual_seed(1)
    assert torch.equal(sampler(noise), want)  # torch's global generator
    each = [torch.Generator().manual_seed(s) for s in (4, 5)]
    alone = [sampler(noise[i : i + 1], generator=torch.Generator().manual_seed(4 + i)) for i in range(2)]
    assert torch.equal(sampler(noise, generator=each), torch.cat(alone))
    rng = np.random.default_rng(2)
    draws = [rng.standard_normal(noise.shape).astype(np.float32) for _ in plan.stochastic_rows]
    numbers = noise.numpy()
    assert np.array_equal(sampler(numbers, generator=np.random.default_rng(2)), sampler(numbers, noises=draws))


def test_initial_noise_and_step_noise_are_different_streams():
    plan = PLANS["ancestral"]
    zero = lambda x, t: x * 0  # noqa: E731
    silent = [torch.zeros(1, 4, 8, 8) for _ in plan.stochastic_rows]
    noise = pyguide.randn(11, (1, 4, 8, 8), like=torch.empty(0))
    added = Sampler(zero, plan)(noise, seeds=11) - Sampler(zero, plan)(noise, noises=silent)
    correlation = float(torch.corrcoef(torch.stack([added.flatten(), noise.flatten()]))[0, 1])
    assert abs(correlation) < 5 / 16  # 5 / sqrt(256 elements): independent streams stay inside, equal ones give 1


# ---- reliability ------------------------------------------------------------------------------------------------


def test_check_reports_the_samples_that_met_nan():
    def poisoned(x, t):
        out = x * 0.1
        out[1, 0, 0, 0] = torch.nan
        return out

    noise = torch.randn(3, 3, 4, 4)
    for backend in ("native", "reference"):
        flagged = Sampler(poisoned, PLANS["ddim"], check="flag", backend=backend)
        out = flagged(noise)
        assert flagged.nonfinite.tolist() == [False, True, False]
        assert torch.isnan(out[1, 0, 0, 0])
        assert torch.isfinite(out[[0, 2]]).all()
        with pytest.raises(FloatingPointError, match=r"\[1\]"):
            Sampler(poisoned, PLANS["ddim"], check="raise", backend=backend)(noise)
    clipped = Sampler(poisoned, PLANS["ddim_clip"])(noise)
    assert torch.isnan(clipped[1, 0, 0, 0])  # a clip does not turn NaN into its bound


def test_one_sampler_serves_several_threads():
    sampler, noise = Sampler(network, PLANS["unipc"], CFG(2.0)), torch.randn(2, 3, 16, 16)
    want, got = sampler(noise, **conditions(2)), [None] * 4

    def work(i):
        got[i] = sampler(noise, **conditions(2))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(out, want) for out in got)


def test_buffers_are_kept_for_the_next_run_and_serve_any_other():
    seen, noise = [], torch.randn(2, 3, 4, 4)

    def model(x, t):
        seen.append(pyguide.arrays.pointer(x))
        return network(x, t)

    sampler = Sampler(model, PLANS["unipc"])
    want = sampler(noise)
    assert torch.equal(sampler(noise), want)
    assert len(set(seen)) == 1
    started = sampler.stream(noise)
    next(started)  # holds its buffers while others run
    fresh = Sampler(network, PLANS["unipc"])
    for other in (noise[:1], noise.double(), noise.half(), noise.numpy(), torch.randn(2, 5, 3), noise):
        assert np.array_equal(np.asarray(sampler(other)), np.asarray(fresh(other)))
    assert torch.equal([*started][-1].x, want)


def test_it_runs_inside_inference_mode_and_on_empty_batches():
    noise = torch.randn(2, 3, 4, 4)
    sampler = Sampler(network, PLANS["dpmpp_2m"])
    want = sampler(noise)
    with torch.inference_mode():
        assert torch.equal(sampler(noise), want)
    assert torch.equal(sampler(noise), want)
    assert Sampler(network, PLANS["ddim"])(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_what_is_written_through_pointers_counts_as_changed():
    versions = []

    def model(x, t):
        versions.append((x._version, t._version))
        return x * 0.1

    Sampler(model, PLANS["ddim"])(torch.randn(1, 3, 4, 4))
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(versions))
