"""Variances of Gaussian transitions: fixed ones and those that a model learns, in solvers, traces, plans and runs.

guided-diffusion's formulas (gaussian_diffusion.py and respace.py, Nichol and Dhariwal 2021) are written out here in
float64, in its own terms of betas; the package computes in lam = log(alpha / sigma).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from handwritten import same

import pyguide
from pyguide import CertificateError, Plan, TraceError, compiler, reference, schedules, solvers
from pyguide.layout import Weights
from pyguide.trace import LearnedVariance

KINDS = ("small", "large", "learned", "learned_range")
ULP = 2.0**-53
BAR = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
BETAS = {  # betas
    "linear": np.linspace(1e-4, 0.02, 1000),
    "cosine": np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(BAR)]),
}
PATHS = {
    "linear": schedules.linear().path(7),
    "min": schedules.linear().path(6, final_sigma="min"),
    "number": schedules.cosine().path(6, offset=90, final_sigma=0.05),
    "zero-snr": schedules.scaled_linear(zero_snr=True).path(6, spacing="trailing"),
    "edm": schedules.edm().path(6),
    "edm-min": schedules.edm(0.05, 10.0).path(5, final_sigma="min"),
    "flow": schedules.flow(3.0).path(6),
}
X = np.random.default_rng(0).standard_normal((2, 3, 4))
Z = np.random.default_rng(1).standard_normal((40, 2, 3, 4))


def network(x: Any, t: Any) -> Any:
    """m and v [B, 2C, *]: v leaves [-1, 1], as a model's may."""
    time = 0.01 * float(t[0])
    return np.concatenate([np.tanh(x + math.sin(time)), 1.3 * np.cos(2 * x + time)], axis=1)


def plain(x: Any, t: Any) -> Any:
    return network(x, t)[:, : x.shape[1]]


def compiled(path: Any, variance: str, prediction: str = "v", **options: Any) -> Plan:
    return pyguide.compile("ddpm", path, prediction=prediction, variance=variance, **options)


def sampled(
    path: Any, variance: str, prediction: str = "v", net: Any = None, like: Any = np.array, **options: Any
) -> Any:
    """The reference run, with arrays made by `like`."""
    drawn, net = iter(Z), net or (network if variance.startswith("learned") else plain)
    options |= {"prediction": prediction, "variance": variance, "noise": lambda i: like(next(drawn))}
    return solvers.sample("ddpm", net, like(X * path.init_scale), path, **options)


def run_table(plan: Plan, net: Any = network, gradient: Any = None) -> Any:
    """The plan's rows through reference.step; gradient(i): shifts row i + 1 by Sigma g."""
    slots: list[Any] = [X * plan.init_scale] + [np.full_like(X, np.nan)] * (plan.slots - 1)
    weights, out, v, draws = Weights([1.0], None, [0.0] * plan.slots, [[0.0]] * plan.slots, []), None, None, iter(Z)
    for i, row in enumerate(plan.rows):
        g = None
        if gradient is not None and i:
            row, g = row._replace(q=[float(plan.variance[i - 1])]), gradient(i - 1)
        z = next(draws) if any(row.n) else None
        operands: dict[str, Any] = {"noise": z, "gradient": g, "variance": v}
        slots = reference.step(row, slots, [out], weights if i else None, **operands).slots
        if i < plan.evaluations:
            out = net(slots[0] * row.c_in, [row.timestep])
            if plan.learned_variance:
                out, v = np.split(out, 2, axis=1)
    return slots[0]


# ---- guided-diffusion, in its own terms ------------------------------------------------------------------------------
class Process(NamedTuple):
    """A GaussianDiffusion over the betas of a respaced process, t ascending."""

    betas: Any
    bar: Any
    before: Any  # alphas_cumprod_prev
    posterior: Any  # posterior_variance
    clipped: Any  # posterior_log_variance_clipped
    error: Any  # relative error of betas and posterior, theirs and ours together

    def step(self, x: Any, t: int, output: Any, z: Any, learned: bool) -> tuple[Any, Any]:
        """p_sample of an epsilon model with learned variance, clip_denoised: p_mean_variance, then the draw; and the
        sum of the sizes of its terms."""
        epsilon, v = np.split(output, 2, axis=1)
        clean = [np.sqrt(1 / self.bar[t]) * x, -np.sqrt(1 / self.bar[t] - 1) * epsilon]
        one = self.betas[t] * np.sqrt(self.before[t]) / (1 - self.bar[t])
        two = (1 - self.before[t]) * np.sqrt(1 - self.betas[t]) / (1 - self.bar[t])
        frac = (v + 1) / 2
        log_variance = v if learned else frac * np.log(self.betas[t]) + (1 - frac) * self.clipped[t]
        noise = (t != 0) * np.exp(0.5 * log_variance) * z
        size = one * (np.abs(clean[0]) + np.abs(clean[1])) + np.abs(two * x) + np.abs(noise)
        return one * np.clip(sum(clean), -1, 1) + two * x + noise, size


def process(betas: Any, kept: list[int]) -> Process:
    """SpacedDiffusion over timesteps `kept`.

    error: their new alphas_cumprod multiply back from 1 - a/a', three roundings for each timestep, and are subtracted
    from 1; our lam is a difference of logarithms, of which 1 - exp(2 (lam - lam')) is taken.
    """
    base = np.cumprod(1 - betas)[kept]
    new = 1 - base / np.append(1.0, base[:-1])
    bar = np.cumprod(1 - new)
    before = np.append(1.0, bar[:-1])
    posterior = new * (1 - before) / (1 - bar)
    clipped = np.log(np.append(posterior[1], posterior[1:])) if len(kept) > 1 else np.log(new)
    lam = 0.5 * np.abs(np.log(bar / (1 - bar)))
    theirs = (3 * len(kept) + 4) * (1 / new + 1 / (1 - bar) + np.append(0, 1 / (1 - before[1:])))
    error = ULP * (theirs + 16 * (lam.max() + 1) * (1 - bar) / new)
    return Process(new, bar, before, posterior, clipped, error)


@pytest.mark.parametrize("respacing", ["25", "10,10,5", "ddim25", "3", pytest.param("1000", marks=pytest.mark.slow)])
@pytest.mark.parametrize("betas", BETAS)
def test_variances_are_those_of_guided_diffusion(betas: str, respacing: str) -> None:
    """FIXED_SMALL, FIXED_LARGE (whose first is the posterior variance of the second), LEARNED, LEARNED_RANGE."""
    path = schedules.from_alphas_cumprod(np.cumprod(1 - BETAS[betas])).path(timesteps=respacing)
    theirs = process(BETAS[betas], [int(t) for t in path.timestep[::-1]])
    assert theirs.error.max() < 1e-7  # of 1,000 timesteps; 1e-9 of 25
    for variance, wanted in (
        ("small", theirs.posterior),
        ("large", np.append(theirs.posterior[1], theirs.betas[1:])),
    ):
        plan = compiled(path, variance, "epsilon")
        assert not plan.learned_variance
        error = np.maximum(theirs.error, theirs.error[1])  # the first entry may be the second's
        assert (np.abs(plan.variance[::-1] - wanted) <= error * wanted).all()
        drawn = np.array([row.n[0] for row in plan.rows[1:]])
        np.testing.assert_allclose(drawn[:-1] ** 2, plan.variance[:-1], rtol=1e-12)
        assert drawn[-1] == 0
    plan = compiled(path, "learned_range", "epsilon")
    lo, hi = plan.table[1:, 6][::-1], plan.table[1:, 7][::-1]
    assert (np.abs(lo - theirs.clipped) <= np.maximum(theirs.error, theirs.error[1]) + 4 * ULP * np.abs(lo)).all()
    assert (np.abs(hi - np.log(theirs.betas)) <= theirs.error + 4 * ULP * np.abs(hi)).all()
    plan = compiled(path, "learned", "epsilon")
    assert (plan.table[1:, 6:8] == (-1, 1)).all()
    assert (plan.variance == 1).all()


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("betas", BETAS)
def test_rows_are_p_sample(betas: str, variance: str) -> None:
    """Each row from their state: four coefficients with their errors, times what they multiply."""
    path = schedules.from_alphas_cumprod(np.cumprod(1 - BETAS[betas])).path(timesteps="10,10,5")
    kept = [int(t) for t in path.timestep[::-1]]
    theirs, x = process(BETAS[betas], kept), X
    plan = compiled(path, variance, "epsilon", clip=1.0)
    for i, row in enumerate(plan.rows[1:]):
        t = len(kept) - 1 - i
        output, z = network(x, [kept[t]]), Z[i]
        wanted, size = theirs.step(x, t, output, z, variance == "learned")
        m, v = np.split(output, 2, axis=1)
        got = reference.step(row, [x], [m], Weights([1.0], None, [0.0], [[0.0]], []), noise=z, variance=v).slots[0]
        error = 4 * max(theirs.error[t], theirs.error[1]) + 64 * ULP
        assert (np.abs(got - wanted) <= error * size).all()
        x = wanted


# ---- every path ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PATHS)
def test_variances_by_conditioning_gaussians(name: str) -> None:
    """Given x0, (x', x) is normal with covariance [[s'^2, r s'^2], [r s'^2, s^2]]: Var(x | x') is beta, and
    Var(x' | x) is beta~, by its Schur complements in extended precision."""
    path, wide = PATHS[name], np.longdouble
    alpha, sigma = path.alpha.astype(wide), path.sigma.astype(wide)
    r = alpha[:-1] / alpha[1:]
    beta = sigma[:-1] ** 2 - (r * sigma[1:]) ** 2
    posterior = sigma[1:] ** 2 - (r * sigma[1:] ** 2) ** 2 / sigma[:-1] ** 2
    lam = np.abs(path.lam[np.isfinite(path.lam)]).max()
    limit = 16 * ULP * float((lam + 1) * (sigma[:-1] ** 2 / beta).max())
    assert limit < 1e-9
    clean = path.sigma[-1] == 0
    floor = np.append(posterior[:-1], posterior[-2] if clean else posterior[-1]).astype(float)
    large = np.append(beta[:-1], floor[-1] if clean else beta[-1]).astype(float)
    np.testing.assert_allclose(compiled(path, "small").variance, posterior.astype(float), rtol=limit, atol=0)
    np.testing.assert_allclose(compiled(path, "large").variance, large, rtol=limit, atol=0)
    learned = compiled(path, "learned_range")
    np.testing.assert_allclose(np.exp(learned.table[1:, 6]), floor, rtol=2 * limit, atol=0)
    np.testing.assert_allclose(np.exp(learned.table[1:, 7]), beta.astype(float), rtol=2 * limit, atol=0)
    assert (learned.variance == 1).all()
    for variance in KINDS:
        rows = compiled(path, variance).rows
        assert [any(row.n) for row in rows] == [False, *[True] * (path.steps - 1), not clean]


@pytest.mark.parametrize("prediction", ["v", "sample", "edm"])
@pytest.mark.parametrize("variance", KINDS)
@pytest.mark.parametrize("name", PATHS)
def test_the_table_is_the_solver(name: str, variance: str, prediction: str) -> None:
    """In float64, with a random network of 2C channels; the solver has numpy arrays or torch tensors."""
    torch = pytest.importorskip("torch")
    path = PATHS[name]
    for clip in (None, 1.0):
        plan = compiled(path, variance, prediction, clip=clip)
        assert plan.learned_variance == variance.startswith("learned")
        assert max(plan.residual, plan.replay_error) <= 1e-12
        wanted = sampled(path, variance, prediction, clip=clip)
        net = network if plan.learned_variance else plain
        same(run_table(plan, net), wanted)
        net = lambda x, t, net=net: torch.from_numpy(net(x.numpy(), t))  # noqa: E731
        same(sampled(path, variance, prediction, net, torch.from_numpy, clip=clip).numpy(), wanted)


def test_the_exponential_is_taken_in_the_precision_of_the_state() -> None:
    """float32 states and a float16 model, whose outputs do not depend on x: 8 roundings of 2^-24 in each of 6 rows."""
    path = PATHS["min"]
    out = np.linspace(-1, 1, X.size * 2).reshape(2, 6, 4).astype(np.float16)
    exact = sampled(path, "learned_range", "sample", lambda x, t: out.astype(np.float64))
    got = sampled(path, "learned_range", "sample", lambda x, t: out, lambda values: values.astype(np.float32))
    assert got.dtype == np.float32
    assert np.abs(got - exact).max() <= 6 * 8 * 2**-24 * max(np.abs(X).max(), np.abs(Z).max())


# ---- one step --------------------------------------------------------------------------------------------------------
def test_one_step() -> None:
    """Nothing comes before: beta, where guided-diffusion has no process of one timestep."""
    path = schedules.linear().path(timesteps=[400])
    beta = 1 - np.cumprod(1 - BETAS["linear"])[400]
    assert compiled(path, "small").variance.tolist() == [0]
    assert compiled(path, "large").variance == pytest.approx([beta], rel=1e-12)
    assert compiled(path, "learned_range").table[1, 6:8] == pytest.approx([math.log(beta)] * 2, rel=1e-12)
    same(sampled(path, "learned_range"), sampled(path, "small"))


def test_a_learned_logarithm_of_0_is_still_learned() -> None:
    """From pure noise in one step beta = 1, and var_lo = var_hi = 0 would say that the model has C channels."""
    for path in (schedules.flow().path(1), schedules.linear(zero_snr=True).path(1, spacing="trailing")):
        plan = compiled(path, "learned_range")
        assert plan.learned_variance
        assert np.exp(plan.table[1, 6:8]).tolist() == [1, 1]
        assert np.float32(plan.table[1, 6]) != 0
        same(run_table(plan), sampled(path, "learned_range"))


# ---- refused ---------------------------------------------------------------------------------------------------------
def test_unknown_variances_are_refused() -> None:
    for bad in ("fixed_small", "range", "", None, 1):
        for running in (compiled, sampled) if isinstance(bad, str) else (compiled,):
            with pytest.raises(ValueError, match=r'^variance: expected "small", "large", "learned" or "learned_range"'):
                running(PATHS["edm"], bad)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("variance", ["small", "learned"])
def test_a_wrong_number_of_channels_names_the_model(variance: str, steps: int) -> None:
    """After one evaluation: a transition tells what is expected, which until then may be either."""
    path, calls = schedules.scaled_linear().path(steps), []
    for channels in (1, 2, 3, 4, 5, 6, 7, 9, 12):

        def net(x: Any, t: Any, channels: int = channels) -> Any:
            calls.append(channels)
            return np.zeros((2, channels, 4))

        if channels == (6 if variance == "learned" else 3):
            assert np.isfinite(sampled(path, variance, net=net)).all()
            continue
        shape = r"\(2, 3, 4\)"
        if variance == "learned" and channels == 3:
            shape = r"\(2, 6, 4\), C channels and as many of its learned variance"
        with pytest.raises(ValueError, match=rf"^model: expected an output of shape {shape}, got \(2, {channels}, 4\)"):
            sampled(path, variance, net=net)
        assert calls.count(channels) == 1


def test_an_array_without_channels_has_no_learned_variance() -> None:
    with pytest.raises(ValueError, match=r"^model: expected an output of shape \[B, 2C, \*\], .*got \(5,\)$"):
        solvers.sample("ddpm", lambda x, t: x, np.ones(5), PATHS["edm"], prediction="v", variance="learned")


# ---- solvers of one's own --------------------------------------------------------------------------------------------
def history(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
    """Two slots: x and the last D. The variance of the last row stays, without noise."""
    last = 0.0
    for i in range(path.steps):
        out = model(x, i)
        z = noise(i) if i + 1 < path.steps else None
        x = out.gaussian(x * 0.3 + out.denoised * 0.5 + last * 0.2, LearnedVariance(-2.0, -0.5), z)
        last = out.denoised
    return x


def first_alone(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
    """One row learns its variance, one states a number, the others say nothing."""
    for i in range(path.steps):
        out = model(x, i)
        x = x * 0.5 + out.denoised * 0.5
        if i < 2:
            x = out.gaussian(x, LearnedVariance(-2.0, 0.5) if i == 0 else 0.36, noise(i))
    return x


@pytest.mark.parametrize("editable", [False, True])
@pytest.mark.parametrize(
    ("solver", "slots", "variance", "low"),
    [(history, 2, np.ones(7), np.full(7, -2.0)), (first_alone, 1, [1, 0.36, *[np.nan] * 5], [-2.0, *[0.0] * 6])],
)
def test_solvers_of_ones_own(solver: Any, slots: int, variance: Any, low: Any, editable: bool) -> None:
    path, drawn = PATHS["linear"], iter(Z)
    plan = pyguide.compile(solver, path, prediction="v", editable=editable, clip=1.0)
    assert (plan.slots, plan.learned_variance) == (slots, True)
    assert plan.table[1:, 6].tolist() == list(low)
    np.testing.assert_array_equal(plan.variance, variance)
    assert max(plan.residual, plan.replay_error) <= 1e-12
    got = solvers.sample(solver, network, X, path, prediction="v", noise=lambda i: next(drawn).copy(), clip=1.0)
    same(run_table(plan), got)


def misuse(change: Any) -> Any:
    def solver(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
        before = noise(0)
        first = model(x + before, 0)
        out = model(first.denoised, 1)
        return change(first, out, out.denoised, noise, before)

    return solver


S = LearnedVariance(-1.0, 1.0)
MISUSED = {
    "twice": (lambda f, o, D, n, b: o.gaussian(o.gaussian(D, 1.0, None), 1.0, n(1)), "a row has one gaussian"),
    "of another": (lambda f, o, D, n, b: f.gaussian(D, S, n(1)), "made of the evaluation before it"),
    "no state": (lambda f, o, D, n, b: o.gaussian(1.0, 1.0, n(1)), "a state as mean and .* got float"),
    "no z": (lambda f, o, D, n, b: o.gaussian(D, 1.0, 0.5), "or None as z, got float"),
    "scaled": (lambda f, o, D, n, b: o.gaussian(D, S, n(1) * 2.0), "as it was drawn"),
    "old z": (lambda f, o, D, n, b: o.gaussian(D, S, b), "drawn in this row"),
    "D as z": (lambda f, o, D, n, b: o.gaussian(D, S, D), "drawn in this row"),
    "more noise": (lambda f, o, D, n, b: o.gaussian(D + n(1), S, n(1)), "the mean of a gaussian holds noise"),
    "only mean": (lambda f, o, D, n, b: o.gaussian(D + n(1), 0.5, None), "the mean of a gaussian holds noise"),
    "changed": (lambda f, o, D, n, b: o.gaussian(D, S, n(1)) * 0.5, "what a gaussian draws is the state"),
    "forgotten": (lambda f, o, D, n, b: D + 0 * o.gaussian(D, 0.5, n(1)), "what a gaussian draws is the state"),
    "added": (lambda f, o, D, n, b: o.gaussian(D, 0.5, None) + n(1), "what a gaussian draws is the state"),
}


@pytest.mark.parametrize(("change", "message"), MISUSED.values(), ids=MISUSED)
def test_misuse_is_refused_by_the_trace(change: Any, message: str) -> None:
    with pytest.raises(TraceError, match=rf"^row 2: .*{message}"):
        pyguide.compile(misuse(change), PATHS["linear"])


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf, "1", None, True, np.ones(2), (0.0, 1.0)])
def test_what_is_no_variance(bad: Any) -> None:
    solver = misuse(lambda f, o, D, n, b: o.gaussian(D, bad, n(1)))
    with pytest.raises(ValueError, match=r"^variance: expected a finite number >= 0 or LearnedVariance"):
        pyguide.compile(solver, PATHS["linear"])
    with pytest.raises(ValueError, match=r"^variance: expected a finite number >= 0 or LearnedVariance"):
        solvers.sample(solver, plain, X, PATHS["linear"])
    for name, values in (("low", (bad, 0.0)), ("high", (0.0, bad))):
        if not isinstance(bad, float) or not math.isfinite(bad):
            with pytest.raises(ValueError, match=rf"^{name}: expected the logarithm of a variance, got"):
                LearnedVariance(*values)


# ---- the certificate -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_wrong_logarithm_is_caught(monkeypatch: Any, variance: str, column: int) -> None:
    """In every row, the last one too, which adds no noise; by the compiler and by a run of the mutated table."""
    path, honest = schedules.linear().path(5), compiler._logarithms
    plan, gradient = compiled(path, variance), lambda i: np.cos(Z[i])
    wanted = run_table(plan, gradient=gradient)
    scale = 1 + 1e-3 * np.eye(2)[column]
    for wrong in range(1, 6):
        with monkeypatch.context() as patch:
            changed = lambda record, i, wrong=wrong: honest(record, i) * (scale if i == wrong else np.ones(2))  # noqa: E731
            patch.setattr(compiler, "_logarithms", changed)
            with pytest.raises(CertificateError, match="the table and the solver run in float64 differ"):
                compiled(path, variance)
        table = plan.table.copy()
        table[wrong, 6 + column] *= 1 + 1e-3
        assert np.abs(run_table(replace(plan, table=table), gradient=gradient) - wanted).max() > compiler.REPLAY


@pytest.mark.parametrize("variance", KINDS)
def test_a_wrong_variance_is_caught(monkeypatch: Any, variance: str) -> None:
    """The variances beside the table, and that a row of a learned plan states 1."""
    path, honest = schedules.linear().path(5), compiler._variance
    for wrong in range(5):
        if compiled(path, variance).variance[wrong] == 0:
            continue  # of "small" at clean data
        for factor in (1 + 1e-3, 0.0):
            scale = np.where(np.arange(5) == wrong, factor, 1.0)
            with monkeypatch.context() as patch:
                patch.setattr(compiler, "_variance", lambda *args, scale=scale: honest(*args) * scale)
                with pytest.raises((CertificateError, ValueError), match=r"differ by|^variance: row \d learns its own"):
                    compiled(path, variance)
