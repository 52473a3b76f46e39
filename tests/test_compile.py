"""solver x path x prediction x options -> plan: certificates, slots, coefficients, edits, and that the certificates can
fail."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from samplers import (
    CLIPS,
    LISTED,
    PATHS,
    PREDICTIONS,
    SOLVERS,
    Network,
    case_name,
    path_of,
    replay_error,
    rounding,
    run_solver,
    slots_of,
    table_rows,
    undefined,
)

import pyguide
from pyguide import CertificateError, compiler, realize, schedules, solvers
from pyguide.trace import trace

EXACT = 1e-12  # what the issue asks of plan against solver in float64
STOCHASTIC = ("ddpm", "euler_ancestral", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde")
STOCHASTIC += ("dpmpp_3m_sde", "dpm_solver_2m_sde", "sa_solver", "lcm", "tcd")
# what extrapolates or works with E = (x - alpha D) / sigma, whose own weights are larger near clean data
LARGER = (
    "dpm2_ancestral",
    "dpmpp_sde",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpm_solver_3m",
    "dpm_solver_2m_sde",
    "deis",
    "lms",
)
LARGER += ("pndm", "sa_solver")


@pytest.mark.parametrize("case", SOLVERS, ids=case_name)
@pytest.mark.parametrize("path_name", PATHS)
def test_every_sampler_is_reproduced(path_name: str, case: Any) -> None:
    """Both certificates, the slots of the design, and a second replay with another network, seed, magnitudes and code.

    The bound is 1e-12, or, where that is more, what rounding allows: the operations of a row, at least 32, times the
    response of the solver itself to one ulp in its network's inputs and outputs (epsilon at sigma / alpha = 2e4, Heun's
    first step on a cosine schedule) or times a rounding of the largest coefficient; 64 roundings of a row's largest
    coefficient on all that it reads; 32 residuals.
    """
    (solver, options, _), path = case, path_of(path_name)
    function, network = solvers.resolve(solver), Network(seed=11)
    for k, prediction in enumerate(PREDICTIONS):
        # every clip and both values of editable meet every solver, path and prediction over the table
        turn = k + PATHS.index(path_name) + SOLVERS.index(case)
        clip, edited = CLIPS[turn % 3], turn // 3 % 2 == 0
        compiling = partial(pyguide.compile, solver, path, prediction=prediction, clip=clip, editable=edited, **options)
        if undefined(path, solver, options, prediction):
            with pytest.raises(ValueError, match=r"^(path|s_churn|prediction):"):
                compiling()
            continue
        plan = compiling()
        assert plan.residual <= EXACT
        assert plan.slots <= slots_of(case, edited), (prediction, clip, edited)
        run = run_solver(function, path, network, prediction, clip, edited, options)
        limit = EXACT
        error = replay_error(plan, run, network, path, edited)
        if max(error, plan.replay_error) > EXACT:
            similar = Network(0, 16, compiler.MAGNITUDES)
            operations = 2 * plan.slots * (plan.slots + 4)  # of a row
            limit = max(limit, operations * 2.0**-53 * np.abs(np.delete(plan.table, [2, 3, 5], axis=1)).max())
            limit = max(limit, 32 * plan.residual, 64 * 2.0**-53 * run.condition)
            for net in (network, similar):
                run = run_solver(function, path, net, prediction, clip, edited, options)
                limit = max(
                    limit, max(32, operations) * rounding(run, function, path, net, prediction, clip, edited, options)
                )
        assert error <= limit, (prediction, clip, edited, error, limit, plan.replay_error)
        assert plan.replay_error <= limit, (prediction, clip, edited, plan.replay_error, limit)
        assert plan.evaluations == len(run.inputs)


@pytest.mark.parametrize("case", LISTED, ids=case_name)
def test_slots_are_those_of_the_design(case: Any) -> None:
    """Equality, where the run is long enough for the highest order: fewer would contradict realisation theory."""
    solver, options, _ = case
    for schedule in (schedules.linear(), schedules.cosine(), schedules.flow(3.0), schedules.edm()):
        path = schedule.path(14)
        if not undefined(path, solver, options, "v"):
            for editable in (False, True):
                plan = pyguide.compile(solver, path, prediction="v", editable=editable, **options)
                assert plan.slots == slots_of(case, editable)


@pytest.mark.parametrize("case", SOLVERS, ids=case_name)
@pytest.mark.parametrize("clip", CLIPS)
def test_edits_between_rows(case: Any, clip: Any) -> None:
    """An edit of x at every boundary is answered as by the solver whose x is changed in place; at no cost in slots."""
    solver, options, _ = case
    path, network = path_of("scaled-leading"), Network(seed=5)
    plan = pyguide.compile(solver, path, prediction="v", clip=clip, editable=True, **options)
    run = run_solver(solvers.resolve(solver), path, network, "v", clip, True, options)
    assert plan.slots <= slots_of(case, True)
    assert replay_error(plan, run, network, path, True) <= EXACT
    assert plan.editable


@pytest.mark.parametrize(
    ("solver", "options"), [("dpmpp_2m", {}), ("unipc", {}), ("unipc", {"order": 3}), ("heun", {})]
)
def test_edits_are_seen_by_the_certificate(solver: str, options: dict[str, Any]) -> None:
    """The control of the test above: the natural plan without edit atoms, run with edits, is not the solver."""
    path, network = path_of("scaled-leading"), Network(seed=5)
    plain = pyguide.compile(solver, path, prediction="v", **options)
    run = run_solver(solvers.resolve(solver), path, network, "v", None, True, options)
    exact = pyguide.compile(solver, path, prediction="v", editable=True, **options)
    assert replay_error(exact, run, network, path, True) <= EXACT
    if not np.array_equal(plain.table, exact.table):
        assert replay_error(plain, run, network, path, True) > 1e-3


@pytest.mark.parametrize("editable", [False, True])
@pytest.mark.parametrize(
    "path",
    [
        schedules.linear().path(30, offset=1),
        schedules.scaled_linear().path(30, spacing="trailing"),
        schedules.scaled_linear().path(30, sigmas="karras"),
        schedules.cosine().path(30, offset=1),
        schedules.flow().path(30),
        schedules.flow(3.0).path(30),
        schedules.edm().path(30),
    ],
    ids=["linear", "trailing", "karras", "cosine", "flow", "flow-3", "edm"],
)
def test_coefficients_stay_near_one(path: Any, editable: bool) -> None:
    """T and d of every solver, in data units (x, D), are at most 5 at 30 steps, and 32 where the method's are large.

    A coefficient c costs c roundings of its operand, and all operands have the size of the data or of the noisy x: with
    5 the terms of a row are a few times its result, so that float32 costs less than one decimal digit. Third
    differences over a long last step, E of a small sigma, and UniPC's B(h) = -h (bh1), where bh2's expm1(-h) is at most
    1, are large by definition. The parity tests bound what float32 makes of them.
    """
    for solver, options, _ in LISTED:
        if undefined(path, solver, options, "v"):
            continue
        plan = pyguide.compile(solver, path, prediction="v", editable=editable, **options)
        large = solver in LARGER or options.get("solver_type") == "bh1" or options.get("predict_x0") is False
        for i, row in enumerate(table_rows(plan)):
            largest = max(np.abs(row.T).max(), np.abs(row.d).max())
            assert largest <= (32 if large else 5), (solver, options, i, largest)


def test_no_noise_no_n_and_unused_heads() -> None:
    for case in SOLVERS:
        plan = pyguide.compile(case[0], path_of("scaled-leading"), **case[1])
        noisy = case[0] in STOCHASTIC if "eta" not in case[1] else case[1]["eta"] > 0
        stochastic = noisy or "s_churn" in case[1]
        rows = table_rows(plan)
        assert any(row.n.any() for row in rows) == stochastic
        assert plan.stochastic_rows == tuple(i for i, row in enumerate(rows) if row.n.any())
        for i, row in enumerate(rows):
            assert not row.q.any()
            assert (row.head[6:8] == 0).all()
            assert tuple(row.head[2:4]) == (-math.inf, math.inf)
            if i == 0:
                assert not row.head[:2].any()
                assert not row.d.any()
                assert not row.e.any()
        assert (rows[-1].head[4:6] == 0).all()  # the last row makes no model input


def test_variances_of_plans_that_state_none() -> None:
    """n^2 if x is all there is and each evaluation is a step, NaN otherwise. DDIM's at eta 1 (Song et al. 2021, eq. 16)
    is the posterior variance of DDPM, which states it."""
    path = path_of("linear-leading")
    for solver, options in (("ddim", {"eta": 0.5}), ("ddim", {}), ("euler_ancestral", {})):
        plan = pyguide.compile(solver, path, **options)
        assert plan.variance.tolist() == [row.n[0] ** 2 for row in table_rows(plan)[1:]]
        assert not plan.learned_variance
    ddpm = pyguide.compile("ddpm", path).variance
    np.testing.assert_allclose(pyguide.compile("ddim", path, eta=1.0).variance, ddpm, rtol=1e-12)
    for solver in ("heun", "unipc", "dpmpp_2m_sde", "dpmpp_sde"):
        assert np.isnan(pyguide.compile(solver, path).variance).all()


def test_table_head_holds_clip_and_input_scale() -> None:
    path = path_of("edm")
    plan = pyguide.compile("dpmpp_2m", path, prediction="edm", clip=(-0.5, 2.0))
    for i, row in enumerate(table_rows(plan)):
        if i:
            assert tuple(row.head[2:4]) == (-0.5, 2.0)
        if i < plan.evaluations:
            assert row.head[4] == pytest.approx(1 / math.sqrt(path.sigma[i] ** 2 + 0.25), rel=1e-15)  # Karras, table 1
            assert row.head[5] == pytest.approx(math.log(path.sigma[i]) / 4, rel=1e-15)


def test_last_row_to_clean_data_is_the_clean_sample() -> None:
    """To sigma = 0 they return D: T = 0 exactly, so x may hold anything.

    Not the ones whose variable is sigma / alpha, in which the last step has a history like any other, nor UniPC on the
    noise, whose corrector moves x after E was taken, nor lcm, whose boundary condition keeps some of x.
    """
    for solver, options, _ in LISTED:
        own_variable = solver in ("deis", "lms", "ipndm", "plms", "pndm") or options.get("predict_x0") is False
        if own_variable or (solver == "lcm" and not options):
            continue
        row = table_rows(pyguide.compile(solver, path_of("linear-leading"), prediction="sample", **options))[-1]
        assert row.d[0] == 1, (solver, options)
        assert not row.T.any()
        assert row.head[0] == 0  # a sample prediction does not read x either


def test_clipped_solver_keeps_the_raw_noise_estimate() -> None:
    """DDIM with clip: e is not 0 (the raw E), and it is 0 where E is derived again from the clipped D."""
    raw = table_rows(pyguide.compile("ddim", path_of("linear-leading"), clip=1.0))
    again = table_rows(pyguide.compile("ddim", path_of("linear-leading"), clip=1.0, use_clipped_model_output=True))
    free = table_rows(pyguide.compile("ddim", path_of("linear-leading")))
    assert all(row.e[0] != 0 for row in raw[1:-1])
    assert not any(row.e.any() for row in [*again, *free])


@pytest.mark.parametrize(
    ("solver", "options", "per_step", "first"),
    [
        ("ddim", {}, 1, 0),
        ("unipc", {}, 1, 0),
        ("euler", {"s_churn": 1.0}, 1, 0),
        ("euler", {"s_churn": 9.0, "s_tmin": 0.3, "s_tmax": 5.0}, 1, 0),
        ("heun", {}, 2, 0),
        ("heun", {"s_churn": 5.0}, 2, 0),
        ("dpm2", {"s_churn": 1.0}, 2, 0),
        ("dpm2", {"s_churn": 40.0, "s_tmin": 0.3, "s_tmax": 5.0}, 2, 0),
        ("dpmpp_sde", {}, 2, 0),
        ("dpmpp_3s", {}, 3, 0),
        ("plms", {}, 1, 1),
        ("pndm", {}, 1, 9),
    ],
)
def test_steps_of_evaluations(solver: str, options: dict[str, Any], per_step: int, first: int) -> None:
    """first: evaluations more in the first step (PLMS), or three more in each of the first three (PNDM)."""
    for steps in (6, 30):
        for path in (schedules.linear().path(steps), schedules.scaled_linear().path(steps, sigmas="karras")):
            plan = pyguide.compile(solver, path, prediction="v", **options)
            counts = np.full(steps, per_step)
            counts[: max(1, first // 3)] += min(first, 3)
            if per_step > 1:
                counts[-1] = 1  # to sigma 0
            assert plan.step.tolist() == np.repeat(np.arange(steps), counts).tolist()


# ---- the certificates can fail ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("solver", "options"), [("ddim", {"eta": 0.5}), ("heun", {"s_churn": 3.0}), ("unipc", {"order": 3})]
)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_mutated_coefficient_is_caught(solver: str, options: dict[str, Any], clip: Any) -> None:
    """Every single number of the table that is not 0, times 1 + 1e-3, is seen by the replay."""
    path, network = path_of("scaled-leading"), Network(seed=2)
    plan = pyguide.compile(solver, path, prediction="v", clip=clip, **options)
    run = run_solver(solvers.resolve(solver), path, network, "v", clip, False, options)
    assert replay_error(plan, run, network, path, False) <= EXACT
    for i, j in np.argwhere(np.isfinite(plan.table) & (plan.table != 0)):
        table, timestep = plan.table.copy(), plan.timestep.copy()
        table[i, j] *= 1 + 1e-3
        if j == 5:
            timestep[i] = table[i, j]
        mutant = replace(plan, table=table, timestep=timestep)
        error = replay_error(mutant, run, network, path, False)
        assert error > compiler.REPLAY, f"row {i}, column {j}: {plan.table[i, j]}"


@pytest.mark.parametrize(("solver", "options"), [("ddim", {"eta": 0.5}), ("heun", {}), ("unipc", {"order": 3})])
@pytest.mark.parametrize("name", ["T", "d", "e", "n"])
def test_compile_refuses_a_wrong_realisation(monkeypatch: Any, solver: str, options: Any, name: str) -> None:
    """The compiler's own certificates: a coefficient off by 1e-3 fails the residual, and the replay where it is not
    looked at."""
    path = path_of("scaled-leading")
    honest = realize.realize
    residual = realize._Realizer(trace(solvers.resolve(solver), path, clipped=True, **options), 1.0)._residual
    seen = []

    def mutated(record: Any, scale: float) -> Any:
        rows = honest(record, scale)
        values = getattr(rows, name)
        places = np.argwhere(values != 0)
        if len(places):
            values[tuple(places[len(places) // 2])] *= 1 + 1e-3
        seen.append((len(places), residual(rows)))
        return rows  # with the residual of the honest one

    monkeypatch.setattr(compiler, "realize", mutated)
    try:
        pyguide.compile(solver, path, clip=1.0, **options)
    except CertificateError:
        assert seen[0][0] > 0
        assert seen[0][1] > 1e-9
    else:
        assert seen[0][0] == 0  # this solver has no such coefficient


def test_residual_above_the_limit_is_refused(monkeypatch: Any) -> None:
    honest = realize.realize
    for value in (1e-8, math.nan):
        monkeypatch.setattr(compiler, "realize", lambda *a, v=value: replace(honest(*a), residual=v))
        with pytest.raises(CertificateError, match=r"linear forms"):
            pyguide.compile("ddim", path_of("edm"))


# ---- cost ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("solver", "options"), [("ddim", {}), ("heun", {"s_churn": 3.0}), ("dpmpp_2m", {}), ("unipc", {"order": 3})]
)
@pytest.mark.parametrize("editable", [False, True])
def test_work_grows_linearly(monkeypatch: Any, solver: str, options: Any, editable: bool) -> None:
    """Factorisations per row do not grow with the number of steps, and stay under 8; the solver is run twice, R calls
    each."""
    counts = {"calls": 0}
    for name in ("lstsq", "pinv", "svd"):
        honest = getattr(np.linalg, name)

        def counted(*args: Any, honest: Any = honest, **kwargs: Any) -> Any:
            counts["calls"] += 1
            return honest(*args, **kwargs)

        monkeypatch.setattr(np.linalg, name, counted)
    per_row = []
    for steps in (40, 80, 160):
        counts["calls"] = 0
        path = schedules.scaled_linear().path(steps)
        plan = pyguide.compile(solver, path, prediction="v", editable=editable, **options)
        per_row.append(counts["calls"] / plan.evaluations)
        record = trace(solvers.resolve(solver), path, editable=editable, **options)
        assert len(record.inputs) == plan.evaluations
    assert max(per_row) <= 8
    assert per_row[2] <= per_row[0] * 1.5


@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
def test_from_one_step_to_a_thousand(steps: int) -> None:
    for solver, options, slots in [("ddim", {"eta": 0.5}, 1), ("unipc", {}, 3)]:
        plan = pyguide.compile(solver, schedules.linear().path(steps), prediction="v", clip=1.0, **options)
        assert plan.evaluations == steps
        assert plan.slots <= min(slots, steps)
        assert plan.residual <= EXACT
        assert plan.replay_error <= EXACT


# ---- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"solver": "dpmsolver++"}, ValueError, "solver"),
        ({"solver": 3}, TypeError, "solver"),
        ({"path": 7}, TypeError, "path"),
        ({"prediction": "x0"}, ValueError, "prediction"),
        ({"clip": -1.0}, ValueError, "clip"),
        ({"clip": 0}, ValueError, "clip"),
        ({"clip": math.nan}, ValueError, "clip"),
        ({"clip": (2, 1)}, ValueError, "clip"),
        ({"order": 2}, TypeError, "order"),
        ({"eta": 1.5}, ValueError, "eta"),
        ({"eta": math.nan}, ValueError, "eta"),
        ({"solver": "unipc", "order": 4}, ValueError, "order"),
        ({"solver": "unipc", "solver_type": "bh3"}, ValueError, "solver_type"),
        ({"solver": "heun", "s_churn": -1.0}, ValueError, "s_churn"),
        ({"solver": "heun", "s_churn": math.nan}, ValueError, "s_churn"),
        ({"solver": "euler_ancestral", "eta": -0.1}, ValueError, "eta"),
        ({"solver": "euler_ancestral", "eta": math.nan}, ValueError, "eta"),
        ({"noise": 1}, TypeError, "noise"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^{name}:"):
        pyguide.compile(**({"solver": "ddim", "path": path_of("linear-leading")} | arguments))


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_pure_noise_needs_another_prediction(prediction: str) -> None:
    with pytest.raises(ValueError, match=r"prediction: .*alpha=0.*row 0"):
        pyguide.compile("ddim", path_of("zero-snr"), prediction=prediction)
