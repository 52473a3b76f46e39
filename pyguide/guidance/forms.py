"""The three forms of classifier guidance as columns q of a plan's rows, or as rows of their own."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..layout import Row, join_row
from ..path import Floats
from ..plan import Plan

NEARLY_NOISE = 1e4  # sigma^2 / alpha: cosine schedules from their last timestep, which trailing spacing begins with


class GuidedPlan(NamedTuple):
    """A plan whose rows read the gradient g, and who is called at each of its evaluations."""

    plan: Plan
    model: NDArray[np.bool_]  # [R]
    classifier: NDArray[np.bool_]  # [R]
    ordinals: tuple[int, ...]  # [R + 1] of the rows' noise: their index in the plan that was guided

    @staticmethod
    def unguided(plan: Plan) -> GuidedPlan:
        every = np.ones(plan.evaluations, bool)
        return GuidedPlan(plan, every, ~every, tuple(range(plan.evaluations + 1)))


def guide(plan: Plan, form: str, acting: NDArray[np.bool_], bounded: bool = False) -> GuidedPlan:
    """The plan with a classifier's gradient in its rows. ValueError naming form and what the plan lacks for it.

    acting: [R] the evaluations inside the guidance's intervals. bounded: D is clipped by a bound of its own.
    """
    if form == "input":
        return _input(plan)
    columns = _score(plan, acting, bounded) if form == "score" else _mean(plan)
    rows = [plan.rows[0], *(row._replace(q=q.tolist()) for row, q in zip(plan.rows[1:], columns, strict=True))]
    guided = replace(plan, table=np.array([join_row(row) for row in rows]))
    return GuidedPlan.unguided(guided)._replace(classifier=(columns != 0).any(axis=1))


def _score(plan: Plan, acting: NDArray[np.bool_], bounded: bool) -> Floats:
    """q [R, M]: D += (sigma^2 / alpha) g and E -= sigma g of the evaluation that a row consumes.

    q_r = d_r sigma^2 / alpha - (e_r / e_m) sigma, with e_m = -alpha a_g / sigma the share of the model's output in E.
    """
    if plan.learned_variance:
        raise ValueError(
            "form: 'score' cannot be had with a learned variance, which multiplies the gradient; expected 'mean'"
        )
    q, faint = np.zeros((plan.evaluations, plan.slots)), list[int]()
    for i, row in enumerate(plan.rows[1:]):
        alpha, sigma, d, e = plan.alpha[i], plan.sigma[i], np.array(row.d), np.array(row.e)
        if (bounded or np.isfinite([row.clip_lo, row.clip_hi]).any()) and e.any():
            raise ValueError(
                f"form: 'score' moves D and E together, and row {i + 1} of {plan.solver} takes D clipped and E as it "
                "was; compile it without clip and noise_apart, or with use_clipped_model_output=True (ddim)"
            )
        if alpha == 0:  # pure noise: p(y | x) does not depend on x
            continue
        if sigma**2 > NEARLY_NOISE * alpha and acting[i] and (d.any() or e.any()):
            faint.append(i)
        q[i] = d * (sigma**2 / alpha)
        if e.any():
            q[i] += e * (sigma**2 / (alpha * row.a_g))
    if faint:
        factor = max(plan.sigma[i] ** 2 / plan.alpha[i] for i in faint)
        warnings.warn(
            f"form='score' multiplies the gradient by sigma^2 / alpha, up to {factor:.0g} in {plan.solver}'s first "
            f"{len(faint)} of {plan.evaluations} evaluations, where x is almost pure noise; the gradient of a trained "
            "classifier does not vanish there as that of an exact one: leave them out with interval or sigma_interval",
            RuntimeWarning,
            stacklevel=5,
        )
    return q


def _mean(plan: Plan) -> Floats:
    """q [R, 1]: the variance Sigma of the Gaussian that a row draws from."""
    if plan.slots > 1 or np.isnan(plan.variance).any():
        raise ValueError(
            f"form: 'mean' shifts the mean of a Gaussian transition, and {plan.solver} is not made of such steps; "
            "expected ddpm, an ancestral solver of one evaluation a step, or form='score'"
        )
    if not plan.variance.any():
        raise ValueError(
            f"form: 'mean' scales the gradient by the variance of a step, and {plan.solver} adds no noise; "
            "expected form='score'"
        )
    return np.asarray(plan.variance[:, None])


def _input(plan: Plan) -> GuidedPlan:
    """After each step but the last a row x += g, with the classifier alone called at the new x and its timestep."""
    if plan.slots > 1 and not plan.editable:
        raise ValueError(
            f"form: 'input' changes x between the steps of {plan.solver}; compile the plan with editable=True"
        )
    order: list[int] = []  # evaluations of the plan
    ordinals = [0]
    model: list[bool] = []
    rows = [plan.rows[0]]
    names = [plan.names[0]] if plan.names else []
    for i, row in enumerate(plan.rows[1:]):
        order.append(i)
        model.append(True)
        rows.append(row)
        ordinals.append(i + 1)
        names += plan.names[i + 1 : i + 2]
        if i + 1 < plan.evaluations and plan.step[i + 1] != plan.step[i]:
            order.append(i + 1)
            model.append(False)
            rows.append(_correction(row, plan.slots))
            ordinals.append(i + 1)
            names += plan.names[i + 1 : i + 2]
    variance = np.where(model, plan.variance[order], np.nan)
    guided = replace(
        plan,
        table=np.array([join_row(row) for row in rows]),
        variance=variance,
        names=tuple(names),
        **{name: getattr(plan, name)[order] for name in ("timestep", "sigma", "alpha", "step")},
    )
    called = np.array(model)
    return GuidedPlan(guided, called, ~called, tuple(ordinals))


def _correction(before: Row, slots: int) -> Row:
    """x += g, everything else as it was; the model's input is due again."""
    zeros = [0.0] * slots
    kept = np.eye(slots).tolist()
    first = [1.0, *zeros[1:]]
    head = (0.0, 0.0, -np.inf, np.inf, before.c_in, before.timestep, 0.0, 0.0)
    return Row(*head, kept, zeros, zeros, zeros, first)
