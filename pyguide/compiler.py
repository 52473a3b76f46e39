"""solver x path x prediction -> Plan: trace, realise, convert, and certify before anything is returned."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from . import reference
from .layout import CLIP, Row, Weights, join_row
from .path import Floats, Level, NoisePath
from .plan import Plan
from .prediction import check_prediction, conversion
from .realize import Realization, realize
from .solvers.registry import ArrayModel, Solver, clip_bounds, prepare
from .trace import LearnedVariance, Trace, TraceError, trace

MAGNITUDES = (1e-2, 1.0, 1e2)  # of the replayed states: a clamp or a branch on values shows at one of them
LIMIT = 1e-9  # of the residual
REPLAY = 1e-8  # of the replay, where rounding grows with the solver's state; what a trace cannot see is far above it
ALMOST_ZERO = -(2.0**-126)  # var_lo of a row that learns log Sigma = 0: var_lo = var_hi = 0 says that it learns nothing
GROWTH = 1e3  # of a state over what it starts from: above, it is the first thing that a failed replay is put down to


def compile(
    solver: str | Solver,
    path: NoisePath,
    *,
    prediction: str = "epsilon",
    clip: float | tuple[float, float] | None = None,
    editable: bool = False,
    noise_apart: bool = False,
    **options: Any,
) -> Plan:
    """Compile a sampler into a table that one kernel can run.

    solver: a name from `solvers.names()`, an alias ("DPM++ 2M Karras", a scheduler's class name in diffusers), a solver
        function, or a k-diffusion function f(model, x, sigmas, ...).
    path: the grid, from `Schedule.path`.
    prediction: what the network predicts: epsilon, v, sample, flow, edm or score.
    clip: bound of the predicted clean sample, a number or (low, high).
    editable: keep the plan exact when the caller changes x between rows (`blend`), as the solver run with arrays would
        be if its input to the model were changed in place.
    noise_apart: keep the noise estimate apart from the clean sample, as a clip does: for CFGPlusPlus, which makes them
        of different combinations of the branches.
    options: the solver's own.

    Raises ValueError or TypeError naming the argument, TraceError (a TypeError) naming the row for a solver that is not
    linear in its states, and CertificateError if the table does not reproduce the solver.
    """
    check_prediction(prediction)
    low, high = clip_bounds(clip)
    run = prepare(solver, path, options)
    function, path, options = run.function, run.path, run.options
    record = trace(function, path, clipped=clip is not None or noise_apart, editable=editable, **options)
    rows = realize(record, path.init_scale)
    if not rows.residual <= LIMIT:
        raise CertificateError(
            f"the rows miss the solver's linear forms by {rows.residual:.1e} (limit {LIMIT:.0e}); its state grows to "
            f"{rows.growth:.0e} times what it starts from"
        )
    table = _table(record, rows, prediction, (low, high))
    end = path.level(path.steps)
    plan = Plan(
        table=table,
        timestep=np.array([level.timestep for level in record.levels]),
        sigma=np.array([level.sigma for level in record.levels]),
        alpha=np.array([level.alpha for level in record.levels]),
        variance=_variance(record),
        step=_steps(record.levels, path),
        end=(end.alpha, end.sigma),
        slots=rows.T.shape[1],
        steps=path.steps,
        residual=rows.residual,
        replay_error=0.0,
        solver=run.name,
        prediction=prediction,
        editable=editable,
        init_scale=path.init_scale,
        train_steps=path.schedule.train_steps,
        integer_time=path.schedule.discrete and all(level.timestep.is_integer() for level in record.levels),
        names=tuple(tuple(names) for names in rows.names),
    )
    try:
        error = _replay(plan, rows, record, function, (low, high), options)
    except Exception as failure:
        raise TraceError(
            f"{plan.solver}: traced, but run with float64 numpy arrays it raised {type(failure).__name__}: {failure}; "
            "coefficients are numbers or numpy scalars, noise is noise(i)"
        ) from failure
    if not error <= REPLAY:
        why = "it has a step that depends on values, or a clamp that the trace cannot see"
        if rows.growth > GROWTH:
            why = f"on this path its state grows to {rows.growth:.0e} times what it starts from, and cancels again"
        raise CertificateError(f"{plan.solver}: the table and the solver run in float64 differ by {error:.1e}; {why}")
    object.__setattr__(plan, "replay_error", error)
    return plan


class CertificateError(ArithmeticError):
    """A compiled table does not reproduce its solver; nothing is returned in that case."""


def _table(record: Trace, rows: Realization, prediction: str, clip: tuple[float, float]) -> Floats:
    """Rows in terms of the model's output: D = clip(a_x x + a_g G), and E = e_x x + e_g U folded into T and e."""
    sigma_data = record.path.schedule.sigma_data
    maps = []
    for i, level in enumerate(record.levels):
        try:
            maps.append(conversion(prediction, level, sigma_data))
        except ValueError as error:
            raise ValueError(f"{error} (row {i})") from None
    R = len(maps)
    table = []
    for i in range(R + 1):
        T, e, d = rows.T[i].copy(), rows.e[i].copy(), rows.d[i]
        a_x = a_g = c_in = timestep = 0.0
        if i:
            before = maps[i - 1]
            a_x, a_g = before.a_x, before.a_m
            T[:, 0] += e * before.e_x
            e *= before.e_m
        if i < R:
            c_in, timestep = maps[i].c_in, record.levels[i].timestep
        low, high = clip if i and d.any() else (-np.inf, np.inf)
        var_lo, var_hi = _logarithms(record, i)
        zeros = [0.0] * len(d)
        table.append(
            join_row(
                Row(
                    a_x,
                    a_g,
                    low,
                    high,
                    c_in,
                    timestep,
                    var_lo,
                    var_hi,
                    T.tolist(),
                    d.tolist(),
                    e.tolist(),
                    rows.n[i].tolist(),
                    zeros,
                )
            )
        )
    out = np.array(table)
    for i, row in enumerate(out):
        if not np.isfinite(np.delete(row, CLIP)).all():
            raise CertificateError(f"row {i}: a coefficient is not finite: {row}")
    return out


def _logarithms(record: Trace, i: int) -> tuple[float, float]:
    """(var_lo, var_hi) of a row; both 0 where its variance is not learned."""
    variance = record.variances.get(i)
    if not isinstance(variance, LearnedVariance):
        return 0.0, 0.0
    return variance.low if variance.low or variance.high else ALMOST_ZERO, variance.high


def _variance(record: Trace) -> Floats:
    """Sigma of rows 1 .. R: as the solver states it (`Output.gaussian`), 1 where it is learned, NaN where it is not
    stated."""
    stated = [record.variances.get(i, np.nan) for i in range(1, len(record.inputs) + 1)]
    return np.array([1.0 if isinstance(variance, LearnedVariance) else variance for variance in stated])


def _steps(levels: list[Level], path: NoisePath) -> np.ndarray:
    """The solver step of each evaluation.

    An evaluation at a grid point, or at the level that churn made of one, opens the step of that point, unless the next
    evaluation does: then it closed the step before (the second evaluation of Heun's method). One between grid points
    belongs to the step that is open. Where no levels are labelled (a k-diffusion function with churn), one that is
    noisier than the last opens a step, and the others lie in the grid's intervals.
    """
    step: list[int] = []
    for k, level in enumerate(levels):
        ahead = levels[k + 1] if k + 1 < len(levels) else None
        if ahead is None:
            closes = False
        elif level.step is not None and ahead.step is not None:
            closes = ahead.step == level.step
        else:
            closes = ahead.lam <= level.lam
        if closes and step:
            step.append(step[-1])
        elif level.step is not None:
            step.append(level.step)
        elif step and (levels[0].step is not None or level.lam == levels[k - 1].lam):
            step.append(step[-1])
        elif step and level.lam < levels[k - 1].lam:
            step.append(step[-1] + 1)
        else:
            step.append(int(np.searchsorted(path.lam, level.lam, side="right")) - 1)
    return np.clip(np.array(step, np.int64), 0, path.steps - 1)


def _replay(
    plan: Plan,
    rows: Realization,
    record: Trace,
    function: Callable[..., Any],
    clip: tuple[float, float],
    options: dict[str, Any],
) -> float:
    """Largest relative distance between the table and the solver itself, in float64, with a random network.

    Each of the states has its own magnitude; edits are made in place, as a caller's would be. A network of a learned
    plan has random variance channels. A plan of one slot has its stated variances too, by a gradient g of magnitude
    1/sigma that shifts the means by Sigma g, as classifier guidance does: the last row adds no noise.
    """
    path = record.path
    rng = np.random.default_rng(0)
    size = 16
    magnitude = np.repeat(np.array(MAGNITUDES), size)
    bend, shift, bias = (
        rng.uniform(0.2, 1.0, len(magnitude)),
        rng.uniform(-1, 1, len(magnitude)),
        rng.uniform(-1, 1, 3 * size),
    )

    def network(x: Floats, t: Any) -> Floats:
        out = np.asarray(magnitude * np.tanh(bend * x / magnitude + shift * np.sin(np.mean(t) / 100) + bias))
        if not plan.learned_variance:
            return out
        v = np.cos(3 * bias + np.mean(t))  # not of x: noise that it scales would make a long run chaotic
        return np.concatenate([out, like_x(v)], axis=1)

    def like_x(values: Floats) -> Floats:
        """[1, C], with channels, where a network returns twice as many."""
        return values[None] if plan.learned_variance else values

    start = like_x(rng.standard_normal(len(magnitude)) * magnitude * path.init_scale)
    edits = rng.standard_normal((plan.evaluations, len(magnitude))) * magnitude * (0.1 if plan.editable else 0.0)
    draws: list[tuple[int, Floats]] = []  # (row, z) in the order of drawing
    shifted = record.variances if plan.slots == 1 else {}

    def gradient(evaluation: int) -> Floats:
        return like_x(np.cos(np.arange(len(magnitude)) + evaluation) * magnitude / plan.sigma[evaluation])

    def solve() -> list[Floats]:
        """The solver's model inputs and its result."""
        states: list[Floats] = []

        def edit(row: int, x: Floats) -> None:
            if plan.editable:
                x += edits[row]
            states.append(x.copy())

        model = ArrayModel(
            network,
            path,
            plan.prediction,
            clip,
            before=edit,
            learned=plan.learned_variance,
            gradient=gradient if shifted else None,
        )

        def noise(step: int = 0) -> Floats:
            draws.append((model.evaluations, like_x(rng.standard_normal(len(magnitude)) * magnitude)))
            return draws[-1][1].copy()

        result = function(model, start.copy(), path.drawing(noise), noise=noise, **options)
        return [*states, result]

    def run() -> list[Floats]:
        """The same of the table."""
        states: list[Floats] = []
        slots: list[Any] = [start.copy()] + [np.full_like(start, np.nan)] * (plan.slots - 1)
        weights = Weights([1.0], None, [0.0] * plan.slots, [[0.0]] * plan.slots, [])
        output = v = None
        drawn = {i: [z for _, z in group] for i, group in itertools.groupby(draws, lambda draw: draw[0])}
        for i, row in enumerate(plan.rows):
            z = np.tensordot(rows.draws[i], np.array(drawn[i]), 1) if any(row.n) else None
            g = None
            if i in shifted:
                row, g = row._replace(q=[float(plan.variance[i - 1])]), gradient(i - 1)
            operands: dict[str, Any] = {"noise": z, "gradient": g, "variance": v}
            slots = reference.step(row, slots, [output], weights if i else None, **operands).slots
            if i < plan.evaluations:
                if plan.editable:
                    slots[0] = slots[0] + edits[i]
                output = network(slots[0] * row.c_in, row.timestep)
                if plan.learned_variance:
                    output, v = np.split(output, 2, axis=1)
            states.append(slots[0])
        return states

    def distance(found: list[Floats], wanted: list[Floats]) -> float:
        a, b = (np.array(states).reshape(plan.evaluations + 1, len(MAGNITUDES), size) for states in (found, wanted))
        return float((np.abs(a - b).max(axis=2) / np.maximum(np.abs(b).max(axis=2), 1e-300)).max())  # max keeps NaN

    wanted = solve()
    return distance(run(), wanted)


__all__ = ["CertificateError", "TraceError", "compile"]
