"""Options of solvers: what is no value of an option is refused by the option's name, before any model call."""

from __future__ import annotations

import dataclasses
import fractions
import inspect
import math
from typing import Any

import numpy as np
import pytest
from handwritten import PATHS, X, fail, run

import pyguide
from pyguide import solvers
from pyguide.solvers import churn

VP, EDM = PATHS["vp"], PATHS["edm"]


# ---- every option of every solver ------------------------------------------------------------------------------------
def options_of(name: str) -> dict[str, Any]:
    """Name and default of each."""
    parameters = inspect.signature(solvers.entry(name).function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "noise"}


ANYWHERE = ["nonsense", b"1", object(), [[1], [2, 3]], [0.5, 0.5], np.ones(2), np.ones((1, 1)), 1j, {}]
OF_TYPE: dict[type, list[Any]] = {
    bool: [*ANYWHERE, None, 0, 1, 1.0, "True", math.nan],
    int: [*ANYWHERE, None, True, np.True_, 2.0, np.float64(2), "2", math.nan, math.inf, -1, 5, 10**30],
    float: [*ANYWHERE, True, np.False_, np.array(True), "0.5", math.nan, np.float32("nan"), -0.5, -math.inf, 10**400],
    str: [*ANYWHERE, None, True, 0, 0.5, math.nan, "", ("midpoint", "heun")],
}
MAY_BE_INFINITE = ("s_churn", "s_tmin", "s_tmax")
# the default does not tell the type: a number or a function of the timestep; indices of steps
TAU = [bad for bad in OF_TYPE[float] if bad is not None] + [lambda t, bad=bad: bad for bad in OF_TYPE[float]]
STEPS = [
    3,
    0.5,
    None,
    True,
    "nonsense",
    "01",
    (-1,),
    (1.5,),
    (True,),
    (0, VP.steps),
    range(99),
    [[0]],
    np.ones(2),
    {None},
]


def refused(option: str, default: Any) -> list[Any]:
    if option == "tau":
        return [*TAU, lambda t: None]
    if option == "disable_corrector":
        return STEPS
    values = OF_TYPE[type(default)]
    if type(default) is float:
        values = [*values, *([] if option in MAY_BE_INFINITE else [math.inf])]
        values = [*values, *([] if option == "timestep_scaling" else [None])]
    return values


def test_the_kinds_of_values_are_these() -> None:
    kinds = {option: type(default) for name in solvers.names() for option, default in options_of(name).items()}
    assert {option for option, kind in kinds.items() if kind not in OF_TYPE} == {"tau", "disable_corrector"}
    assert len(kinds) >= 18


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in solvers.names() for option in options_of(name)], ids=str
)
def test_nonsense_is_refused_by_name_before_the_model_runs(name: str, option: str) -> None:
    for bad in refused(option, options_of(name)[option]):
        for running in (
            lambda bad=bad: solvers.sample(name, fail, X, VP, prediction="sample", **{option: bad}),
            lambda bad=bad: pyguide.compile(name, VP, prediction="sample", **{option: bad}),
        ):
            with pytest.raises(ValueError, match=rf"(?s)^{option}: expected .*, got .") as caught:
                running()
            assert "of shape" in str(caught.value) or str(caught.value).endswith(f"got {bad!r}") or callable(bad)


# ---- ranges, with the message that states them -----------------------------------------------------------------------
RANGES = [
    *((name, "eta", r"a number in \[0, 1\]", (-0.1, 1.1, math.inf)) for name in ("ddim", "tcd")),
    *(
        (name, option, "a finite number >= 0", (-0.1, math.nan, math.inf))
        for name in solvers.names()
        for option, default in options_of(name).items()
        if option == "s_noise" or (option == "eta" and name not in ("ddim", "tcd"))
    ),
    *((name, "s_churn", "a number >= 0", (-1.0, math.nan)) for name in ("euler", "heun", "dpm2")),
    ("dpmpp_sde", "r", r"a number in \(0, 1\]", (0.0, 1.1, -1.0)),
    ("lcm", "timestep_scaling", "a finite number > 0 or None", (0.0, -1.0)),
    ("sa_solver", "tau", "a finite number >= 0, or a function of the timestep that gives one", (-0.1,)),
    *((name, "order", "an integer from 1 to 3", (0, 4, 2.5)) for name in ("deis", "unipc")),
    *((name, "order", "an integer from 1 to 4", (0, 5)) for name in ("lms", "ipndm")),
    ("sa_solver", "predictor_order", "an integer from 1 to 4", (0, 5, 1.5)),
    ("sa_solver", "corrector_order", "an integer from 0 to 4", (-1, 5, 1.5)),
    ("ddpm", "variance", '"small", "large", "learned" or "learned_range"', ("fixed_small", "learned_log")),
    ("dpm_solver_3s", "inner", '"midpoint" or "grid"', ("half",)),
    *((name, "solver_type", '"midpoint" or "heun"', ("bh1",)) for name in ("dpmpp_2s", "dpm_solver_2m", "dpmpp_3m")),
    ("unipc", "solver_type", '"bh1" or "bh2"', ("bh3", "midpoint")),
    ("unipc", "predict_x0", "True or False", (1,)),
    ("unipc", "disable_corrector", "indices of steps, from 0 to 5", ((6,), (2, -1))),
]


@pytest.mark.parametrize(("name", "option", "wanted", "values"), RANGES, ids=str)
def test_ranges(name: str, option: str, wanted: str, values: Any) -> None:
    for bad in values:
        with pytest.raises(ValueError, match=rf"^{option}: expected {wanted}, got [-0-9n'i(lhbm]"):
            solvers.sample(name, fail, X, VP, prediction="sample", **{option: bad})


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2"])
def test_the_interval_of_churn_is_not_empty(name: str) -> None:
    with pytest.raises(ValueError, match=r"^s_tmin: expected a number <= s_tmax = 0.5, got 2$"):
        solvers.sample(name, fail, X, EDM, prediction="sample", s_churn=1.0, s_tmin=2, s_tmax=0.5)
    run(name, EDM, s_churn=math.inf, s_tmin=0.5, s_tmax=0.5)  # one level at most, and as much noise as there may be


# ---- numbers of every kind are numbers -------------------------------------------------------------------------------
NUMBERS = [np.float32(0.5), np.float16(0.5), np.array(0.5), np.array(0.5, np.float32), fractions.Fraction(1, 2)]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name in solvers.names()
        for option, default in options_of(name).items()
        if type(default) is float or option == "tau"
    ],
    ids=str,
)
def test_numbers_of_other_types_are_floats(name: str, option: str) -> None:
    """Exactly: 0.5 in float16 is 0.5, and what follows is computed in float64."""
    with_churn = {"s_churn": 1.0} if option in ("s_tmin", "s_tmax", "s_noise") and "s_churn" in options_of(name) else {}
    wanted = run(name, VP, **{**with_churn, option: 0.5})
    for value in NUMBERS:
        np.testing.assert_array_equal(run(name, VP, **{**with_churn, option: value}), wanted)
    if option == "tau":
        for value in NUMBERS:
            np.testing.assert_array_equal(run(name, VP, tau=lambda t, value=value: value), wanted)
    np.testing.assert_array_equal(
        run(name, VP, **{**with_churn, option: 1}), run(name, VP, **{**with_churn, option: np.array(1, np.uint8)})
    )


def test_integers_and_truth_of_numpy() -> None:
    wanted = run("unipc", VP, order=3, corrector=True, disable_corrector=(0, 5))
    for order in (np.int64(3), np.array(3), np.uint8(3)):
        got = run("unipc", VP, order=order, corrector=np.True_, disable_corrector=np.array([5, 0]))
        np.testing.assert_array_equal(got, wanted)


def test_churn_holds_floats() -> None:
    made = churn.Churn(VP, 1, np.float32(0.5), np.array(2), np.float16(1))  # type: ignore[arg-type]
    values = [getattr(made, f.name) for f in dataclasses.fields(made)[1:]]
    assert values == [1.0, 0.5, 2.0, 1.0]
    assert {type(value) for value in values} == {float}
