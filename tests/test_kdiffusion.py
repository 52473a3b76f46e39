"""k-diffusion functions, f(model, x, sigmas, ...), compiled and run as they are. The functions below are written for
this test."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from samplers import Network, replay_error

import pyguide
from pyguide import schedules, solvers

torch = pytest.importorskip("torch")


def append_dims(x: Any, count: int) -> Any:
    return x[(...,) + (None,) * (count - x.ndim)]


def to_d(x: Any, sigma: Any, denoised: Any) -> Any:
    return (x - denoised) / append_dims(sigma, x.ndim)


@torch.no_grad()
def sample_euler(
    model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=1e9, s_noise=1.0
):
    extra_args = {} if extra_args is None else extra_args
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigmas[i] <= s_tmax else 0.0
        sigma_hat = sigmas[i] * (gamma + 1)
        if gamma > 0:
            x = x + torch.randn_like(x) * s_noise * (sigma_hat**2 - sigmas[i] ** 2) ** 0.5
        denoised = model(x, sigma_hat * s_in, **extra_args)
        d = to_d(x, sigma_hat, denoised)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigma_hat, "denoised": denoised})
        x = x + d * (sigmas[i + 1] - sigma_hat)
    return x


@torch.no_grad()
def sample_ancestral(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, noise_sampler=None):
    noise_sampler = (lambda sigma, sigma_next: torch.randn_like(x)) if noise_sampler is None else noise_sampler
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in)
        up = min(
            sigmas[i + 1], eta * (sigmas[i + 1] ** 2 * (sigmas[i] ** 2 - sigmas[i + 1] ** 2) / sigmas[i] ** 2) ** 0.5
        )
        down = (sigmas[i + 1] ** 2 - up**2) ** 0.5
        x = x + to_d(x, sigmas[i], denoised) * (down - sigmas[i])
        if sigmas[i + 1] > 0:
            x = x + noise_sampler(sigmas[i], sigmas[i + 1]) * up
    return x


@torch.no_grad()
def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    s_in = x.new_ones([x.shape[0]])
    old = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in)
        t, t_next = -sigmas[i].log(), -sigmas[i + 1].log()
        h = t_next - t
        mix = denoised
        if old is not None and sigmas[i + 1] > 0:
            r = (t + sigmas[i - 1].log()) / h
            mix = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old
        x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * mix
        old = denoised
    return x


@torch.no_grad()
def sample_midpoint(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DPM2: the second evaluation lies between grid points."""
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        d = to_d(x, sigmas[i], model(x, sigmas[i] * s_in))
        if sigmas[i + 1] == 0:
            x = x + d * (sigmas[i + 1] - sigmas[i])
            continue
        mid = (sigmas[i].log() / 2 + sigmas[i + 1].log() / 2).exp()
        x_mid = x + d * (mid - sigmas[i])
        x = x + to_d(x_mid, mid, model(x_mid, mid * s_in)) * (sigmas[i + 1] - sigmas[i])
    return x


class BrownianTreeNoiseSampler:
    """What k-diffusion takes by default; a function that refers to it is given `path.brownian` in its place."""

    def __init__(self, x: Any, sigma_min: Any, sigma_max: Any) -> None:
        raise AssertionError("the adapter has to bring the noise sampler")


@torch.no_grad()
def sample_sde(model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, noise_sampler=None):
    """DPM++ SDE: the noise of the half step is part of the noise of the whole one."""
    if noise_sampler is None:
        noise_sampler = BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max())
    s_in = x.new_ones([x.shape[0]])

    def arrive(denoised, sigma, end):
        up = eta * end * (1 - (end / sigma) ** 2) ** 0.5
        down = (end**2 - up**2) ** 0.5
        return denoised + (x - denoised) * (down / sigma) + noise_sampler(sigma, end) * up

    for sigma, end in itertools.pairwise(sigmas):
        denoised = model(x, sigma * s_in)
        if end == 0:
            return denoised
        half = (sigma * end) ** 0.5
        x = arrive(model(arrive(denoised, sigma, half), half * s_in), sigma, end)
    return x


CASES = [
    (sample_euler, {}, 1, 1),
    (sample_euler, {"s_churn": 3.0, "s_noise": 1.01}, 1, 1),
    (sample_ancestral, {"eta": 0.7}, 1, 1),
    (sample_dpmpp_2m, {}, 2, 1),
    (sample_midpoint, {}, 2, 2),
    (sample_sde, {}, 2, 2),
    (sample_sde, {"eta": 0.6}, 2, 2),
]
PATHS = {"edm": schedules.edm().path(8), "vp": schedules.scaled_linear().path(8, sigmas="karras")}


def run_as_it_is(function: Any, path: Any, network: Network, edited: bool, options: Any) -> Any:
    """The function itself on float64 tensors: y = x / alpha, sigma / alpha, an epsilon network of the state x."""
    from samplers import Run

    run = Run()
    ratio = path.sigma / path.alpha

    def denoiser(y: Any, sigma: Any) -> Any:
        value = float(sigma[0])
        alpha, s = (1.0, value) if path.init_scale > 1 else (1 / np.hypot(1, value), value / np.hypot(1, value))
        state = y * alpha
        if edited:
            state += torch.from_numpy(network.edits[len(run.inputs)])
            y.copy_(state / alpha)  # as a callback would
        run.inputs.append(state.numpy().copy())
        t = path.at(-np.log(value)).timestep
        return (state - s * torch.from_numpy(network(state.numpy(), t))) / alpha

    def draw(*_: Any) -> Any:
        z = network.noises[sum(map(len, run.draws.values()))]
        run.draws.setdefault(len(run.inputs), []).append(z)
        return torch.from_numpy(z.copy())

    class Fixed(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return draw() if func is torch.randn_like else func(*args, **(kwargs or {}))

    inner: list[Any] = []  # (its interval, its noise) of the step that is under way

    def two_draws(sigma: Any, end: Any) -> Any:
        """First over (sigma, half), then over (sigma, end): the part after half is independent of the first."""
        if not inner or inner[0] != sigma:
            inner[:] = [sigma, end, draw()]
            return inner[2]
        share = (sigma - inner[1]) / (sigma - end)
        return inner[2] * share.sqrt() + draw() * (1 - share).sqrt()

    if function is sample_sde:
        options = {**options, "noise_sampler": two_draws}
    with Fixed():
        y = function(
            denoiser, torch.from_numpy(network.start * path.init_scale) / path.alpha[0], torch.tensor(ratio), **options
        )
    run.result = y.numpy() * path.alpha[-1]
    return run


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize(("function", "options", "slots", "per_step"), CASES)
def test_functions_compile_as_they_are(
    function: Any, options: Any, slots: int, per_step: int, edited: bool, name: str
) -> None:
    path, network = PATHS[name], Network(seed=3)
    plan = pyguide.compile(function, path, editable=edited, **options)
    assert plan.slots == slots
    assert plan.evaluations == 8 * per_step - (per_step - 1)
    assert plan.solver == function.__name__
    assert max(plan.residual, plan.replay_error) <= 1e-11
    run = run_as_it_is(function, path, network, edited, options)
    assert replay_error(plan, run, network, path, edited) <= 1e-11


@pytest.mark.parametrize("name", PATHS)
def test_twins_give_the_same_table(name: str) -> None:
    """Euler, its ancestral form, DPM++ 2M and DPM++ SDE in k-diffusion's terms equal the built-in solvers, coefficient
    by coefficient."""
    for function, options, twin, same in (
        (sample_euler, {}, "euler", {}),
        (sample_ancestral, {"eta": 0.7}, "euler_ancestral", {"eta": 0.7}),
        (sample_dpmpp_2m, {}, "dpmpp_2m", {}),
        (sample_sde, {}, "dpmpp_sde", {}),
    ):
        ours, theirs = pyguide.compile(twin, PATHS[name], **same), pyguide.compile(function, PATHS[name], **options)
        np.testing.assert_allclose(ours.table, theirs.table, rtol=1e-9, atol=1e-11 * PATHS[name].init_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_run(dtype: Any) -> None:
    """solvers.sample runs it with torch tensors or numpy arrays; draws come from `noise`, in the order in which they
    are made."""
    path = PATHS["edm"]
    x = torch.randn(2, 3, 4, dtype=dtype, generator=torch.Generator().manual_seed(0)) * path.init_scale
    kept, order, told = x.clone(), [], []

    def model(x: Any, t: Any) -> Any:
        told.append(float(t[0]))
        torch.randn_like(torch.zeros(3))  # the network's own random numbers are its own
        return np.tanh(x) if isinstance(x, np.ndarray) else x.tanh()

    def noise(i: int) -> Any:
        order.append(i)
        return torch.full((2, 3, 4), float(i), dtype=dtype)

    out = solvers.sample(sample_euler, model, x, path, noise=noise, s_churn=3.0)
    assert out.dtype == dtype
    assert torch.equal(x, kept)
    assert order == list(range(8))
    plain = solvers.sample(sample_euler, model, x.numpy(), path, noise=lambda i: noise(i).numpy(), s_churn=3.0)
    assert isinstance(plain, np.ndarray)
    np.testing.assert_allclose(plain, out.numpy(), rtol=1e-5)
    told.clear()
    solvers.sample(sample_euler, model, x, path)
    np.testing.assert_allclose(told, path.timestep, rtol=1e-6)  # grid levels, though sigma was float32


def draws_of(function: Any, path: Any) -> tuple[Any, list[int]]:
    """(the result over unit vectors as noises, the step that each draw was told)."""
    told: list[int] = []

    def noise(i: int) -> Any:
        told.append(i)
        return np.eye(1, 40, len(told) - 1)

    return solvers.sample(function, lambda x, t: x * 0, np.zeros((1, 40)), path, prediction="sample", noise=noise), told


def test_noise_samplers() -> None:
    """Two calls over one interval: one noise where the function's own default is a Brownian tree, two where it draws
    independently; through functools.partial and a decorator too."""

    def twice(model, x, sigmas, noise_sampler):
        model(x, sigmas[0] * x.new_ones([x.shape[0]]))
        return noise_sampler(sigmas[0], sigmas[1]) + noise_sampler(sigmas[0], sigmas[1])

    @torch.no_grad()
    def independent(model, x, sigmas, noise_sampler=None):
        sampler = (lambda sigma, end: torch.randn_like(x)) if noise_sampler is None else noise_sampler
        return twice(model, x, sigmas, sampler)

    @torch.no_grad()
    def of_a_tree(model, x, sigmas, noise_sampler=None):
        sampler = BrownianTreeNoiseSampler(x, sigmas[-2], sigmas[0]) if noise_sampler is None else noise_sampler
        return twice(model, x, sigmas, sampler)

    @torch.no_grad()
    def of_a_tree_made_later(model, x, sigmas, noise_sampler=None):
        def make():
            return BrownianTreeNoiseSampler(x, sigmas[-2], sigmas[0])

        return twice(model, x, sigmas, make() if noise_sampler is None else noise_sampler)

    path = PATHS["edm"]
    for function in (independent, functools.partial(independent)):
        out, told = draws_of(function, path)
        np.testing.assert_array_equal(out[0, :3], [1, 1, 0])
        assert told == [0, 1]
    for function in (of_a_tree, functools.partial(of_a_tree), of_a_tree_made_later):
        out, told = draws_of(function, path)
        np.testing.assert_array_equal(out[0, :3], [2, 0, 0])
        assert told == [0]
    out, told = draws_of(sample_sde, path)
    assert told == [i for i in range(7) for _ in range(2)]
    assert draws_of("dpmpp_sde", path)[1] == told
    np.testing.assert_allclose(out, draws_of("dpmpp_sde", path)[0], rtol=1e-12)


def test_rounded_times_are_those_of_the_grid() -> None:
    """In float32 exp(log(s)) is not s; the noises of neighbouring steps are independent all the same, one each."""

    def sample_logs(model, x, sigmas, noise_sampler=None):
        noise_sampler = noise_sampler or BrownianTreeNoiseSampler(x, sigmas[-1], sigmas[0])
        model(x, sigmas[0] * x.new_ones([x.shape[0]]))
        rounded = sigmas.log().exp()
        assert (rounded[1:-1] != sigmas[1:-1]).any()
        return [noise_sampler(rounded[i], sigmas[i + 1]) for i in range(len(sigmas) - 2)]

    told, path = [], PATHS["vp"]

    def noise(i: int) -> Any:
        told.append(i)
        return torch.eye(1, 40)[0].roll(len(told) - 1)[None]

    x = torch.zeros(1, 40)
    rows = solvers.resolve(sample_logs)(lambda x, level: Denoised(x), x, path.drawing(noise), noise=noise)
    assert told == list(range(7))
    assert torch.equal(torch.cat(rows), torch.eye(7, 40))


class Denoised:
    def __init__(self, x: Any) -> None:
        self.denoised = x


def test_a_hidden_clamp_is_caught() -> None:
    def sample_clamped(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            x = x + to_d(x, sigmas[i], model(x, sigmas[i] * x.new_ones([1]))) * (sigmas[i + 1] - sigmas[i])
            x = x.clamp(-5, 5) if isinstance(x, torch.Tensor) else x
        return x

    with pytest.raises(pyguide.CertificateError):
        pyguide.compile(sample_clamped, PATHS["vp"])


def own_grid(model, x, sigma_min, sigma_max, n, extra_args=None):
    raise AssertionError("the adapter refuses it")


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"^path: .*alpha = 0"):
        pyguide.compile(sample_euler, schedules.flow().path(4), prediction="flow")
    with pytest.raises(TypeError, match=r"^solver: own_grid makes its own grid from sigma_min to sigma_max"):
        pyguide.compile(own_grid, PATHS["edm"])
    with pytest.raises(TypeError, match=r"s_chrun"):
        pyguide.compile(sample_euler, PATHS["edm"], s_chrun=1.0)
    with pytest.raises(pyguide.TraceError, match=r"row 1: .*clamp"):
        pyguide.compile(lambda model, x, sigmas: torch.clamp(model(x, sigmas[0]), -1, 1), PATHS["edm"])
