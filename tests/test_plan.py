"""Plan: a value. Immutable, hashable, comparable, pickled and written to JSON without losing a bit; readable; safe to
share."""

from __future__ import annotations

import json
import math
import pickle
import re
import threading
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from samplers import SOLVERS, case_name, path_of, table_rows, undefined

import pyguide
from pyguide import Plan, schedules


def make(solver: str = "unipc", path: str = "scaled-leading", **options: Any) -> Plan:
    return pyguide.compile(solver, path_of(path), **({"prediction": "v", "clip": 1.0} | options))


FIELDS = ("timestep", "sigma", "alpha", "step", "variance", "table")


def assert_same(a: Plan, b: Plan) -> None:
    for name in a.__dataclass_fields__:
        left, right = getattr(a, name), getattr(b, name)
        if name in FIELDS:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right
            assert type(left) is type(right)
    assert a == b
    assert hash(a) == hash(b)


# ---- what it says ----------------------------------------------------------------------------------------------------
def test_interface() -> None:
    path = path_of("scaled-leading")
    plan = make()
    R, M = 7, 3
    assert (plan.evaluations, plan.slots, plan.steps, plan.format) == (R, M, 7, 2)
    assert plan.table.shape == (R + 1, 8 + M * M + 4 * M)
    assert plan.table.dtype == np.float64
    for name, expected in (("timestep", path.timestep), ("sigma", path.sigma[:-1]), ("alpha", path.alpha[:-1])):
        np.testing.assert_array_equal(getattr(plan, name), expected)
    np.testing.assert_array_equal(plan.step, np.arange(7))
    assert np.isnan(plan.variance).all()  # of order 2: its rows are no Gaussian transitions
    assert plan.learned_variance is False
    assert plan.end == (1, 0)
    assert (plan.solver, plan.prediction, plan.editable, plan.train_steps) == ("unipc", "v", False, 1000)
    assert 0 <= plan.residual <= 1e-12
    assert 0 <= plan.replay_error <= 1e-12
    assert plan.init_scale == 1
    assert make(path="edm").init_scale == 80
    assert len(plan.rows) == R + 1
    for row, values in zip(plan.rows, table_rows(plan), strict=True):
        np.testing.assert_array_equal([*row[:8]], values.head)
        for name in "Tdenq":
            np.testing.assert_array_equal(getattr(row, name), getattr(values, name))


def test_levels() -> None:
    path, plan = path_of("flow-3"), make("dpmpp_2m", "flow-3")
    for i in range(plan.evaluations):
        level = plan.level(i)
        assert (level.alpha, level.sigma, level.timestep) == (path.alpha[i], path.sigma[i], path.timestep[i])
        assert level.lam == pytest.approx(path.lam[i], rel=1e-12)
    assert plan.level(0).lam == -math.inf
    assert (plan.level(7).alpha, plan.level(7).sigma, plan.level(7).lam) == (1, 0, math.inf)


# ---- a value ---------------------------------------------------------------------------------------------------------
def test_immutable() -> None:
    plan = make()
    for name in plan.__dataclass_fields__:
        with pytest.raises(FrozenInstanceError):
            setattr(plan, name, getattr(plan, name))
    for name in FIELDS:
        with pytest.raises(ValueError, match=r"read-only"):
            getattr(plan, name)[0] = 0
    table = plan.table.copy()
    other = replace(plan, table=table)
    table[:] = 7
    assert_same(plan, other)  # the plan has its own copy


def test_equality_and_hash_are_by_value() -> None:
    plan, twin = make(), make()
    assert plan is not twin
    assert_same(plan, twin)
    assert len({plan, twin}) == 1
    others = [
        make(order=3),
        make(clip=2.0),
        make(prediction="sample"),
        make(editable=True),
        make("ddim"),
        make(path="scaled-karras"),
    ]
    table = plan.table.copy()
    table[3, 8] = np.nextafter(table[3, 8], 2)
    others.append(replace(plan, table=table))
    others.append(replace(plan, variance=np.zeros(7)))
    assert len({plan, *others}) == 1 + len(others)
    assert all(plan != other for other in others)
    assert plan != "plan"
    assert plan is not None


@pytest.mark.parametrize("case", SOLVERS, ids=case_name)
@pytest.mark.parametrize("path", ["scaled-karras", "zero-snr", "flow-3", "edm"])
def test_json_and_pickle_are_exact(case: Any, path: str) -> None:
    if undefined(path_of(path), case[0], case[1], "v"):
        return
    for clip in (None, (-math.inf, 1.5)):  # infinities in both bounds, or in one
        plan = make(case[0], path, clip=clip, editable=True, **case[1])
        text = plan.to_json()
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert '"-inf"' in text
        assert_same(plan, Plan.from_json(text))
        assert Plan.from_json(text).to_json() == text
        again = pickle.loads(pickle.dumps(plan))
        assert_same(plan, again)
        with pytest.raises(ValueError, match=r"read-only"):
            again.table[0, 0] = 1


@pytest.mark.parametrize("variance", ["small", "large", "learned", "learned_range"])
def test_a_plan_with_its_variance_is_a_value(variance: str) -> None:
    plan = make("ddpm", variance=variance)
    assert plan.learned_variance == variance.startswith("learned")
    for again in (Plan.from_json(plan.to_json()), pickle.loads(pickle.dumps(plan)), make("ddpm", variance=variance)):
        assert_same(again, plan)
        assert again.learned_variance == plan.learned_variance
    assert len({make("ddpm", variance=other) for other in ("small", "large", "learned", "learned_range")}) == 4
    if not plan.learned_variance:
        assert replace(plan, variance=plan.variance * (1 + 1e-15)) != plan
        assert replace(plan, variance=np.full(7, np.nan)) == replace(plan, variance=np.full(7, -np.nan))


# ---- JSON from elsewhere ---------------------------------------------------------------------------------------------
def broken(**changes: Any) -> str:
    values = json.loads(make("ddim", eta=0.5).to_json())
    for name, change in changes.items():
        values[name] = change(values[name]) if callable(change) else change
    return json.dumps(values)


def in_table(row: int, column: int, value: Any) -> Any:
    def change(table: list[list[Any]]) -> list[list[Any]]:
        table[row][column] = value
        return table

    return change


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"plan"', "{}", '{"format": 1}', "[" * 100_000, '{"format": 2}']
)
def test_json_that_is_no_plan(text: str) -> None:
    with pytest.raises(ValueError, match=r"^text: "):
        Plan.from_json(text)


def test_json_fields() -> None:
    values = json.loads(make("ddim").to_json())
    for name in values:
        less = {k: v for k, v in values.items() if k != name}
        with pytest.raises(ValueError, match=r"^text: "):
            Plan.from_json(json.dumps(less))
        with pytest.raises(ValueError, match=r"text|" + name):
            Plan.from_json(json.dumps(values | {name: None}))
        with pytest.raises(ValueError, match=r"text|" + name):
            Plan.from_json(json.dumps(values | {name: {"a": 1}}))
    with pytest.raises(ValueError, match=r"^text: "):
        Plan.from_json(json.dumps(values | {"more": 1}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format 2, got format 1"),
        ({"format": "2"}, "format"),
        ({"slots": 2}, "table: expected shape"),
        ({"slots": 0}, "slots: expected 1 to 8"),
        ({"slots": 9}, "slots: expected 1 to 8"),
        ({"slots": 1.5}, "slots"),
        ({"slots": True}, "slots"),
        ({"slots": "1"}, "slots"),
        ({"steps": 0}, "step"),
        ({"steps": 3}, "step: expected values in"),
        ({"step": lambda s: [-1, *s[1:]]}, "step: expected values in"),
        ({"step": lambda s: [0.5, *s[1:]]}, "step: expected integers"),
        ({"step": lambda s: s[1:]}, "step: expected shape"),
        ({"sigma": lambda s: s[1:]}, "sigma: expected shape"),
        ({"sigma": lambda s: [[v] for v in s]}, "sigma: expected shape"),
        ({"sigma": lambda s: ["inf", *s[1:]]}, "sigma: every value must be finite"),
        ({"alpha": lambda s: ["nan", *s[1:]]}, "alpha: every value must be finite"),
        ({"alpha": lambda s: [math.nan, *s[1:]]}, "alpha: every value must be finite"),
        ({"variance": lambda v: v[1:]}, "variance: expected shape"),
        ({"variance": lambda v: [[c] for c in v]}, "variance: expected shape"),
        ({"variance": lambda v: [*v[1:], -1e-9]}, "variance: expected values >= 0"),
        ({"variance": lambda v: ["inf", *v[1:]]}, "variance: expected values >= 0"),
        ({"variance": lambda v: ["-inf", *v[1:]]}, "variance: expected values >= 0"),
        ({"variance": lambda v: [None, *v[1:]]}, "malformed"),
        ({"table": in_table(2, 6, -1.0)}, "variance: row 2 learns its own, log Sig -1.0 to 0.0; expected 1 beside it"),
        ({"table": in_table(2, 7, 1.0)}, "variance: row 2 learns its own"),
        ({"table": in_table(0, 7, -1.0)}, "got none: row 0 runs before any evaluation"),
        ({"table": in_table(2, 6, "nan")}, "table: row 2"),
        ({"table": in_table(2, 7, "-inf")}, "table: row 2"),
        ({"timestep": []}, "at least one evaluation"),
        ({"timestep": lambda s: [s[0] + 1, *s[1:]]}, "timestep: expected those of the table"),
        ({"table": lambda t: t[1:]}, "table: expected shape"),
        ({"table": lambda t: [[*row, 0.0] for row in t]}, "table: expected shape"),
        ({"table": lambda t: [t[0][:-1], *t[1:]]}, "malformed"),
        ({"table": lambda t: t[0]}, "table: expected shape"),
        ({"table": in_table(2, 8, "nan")}, "table: row 2"),
        ({"table": in_table(2, 8, "inf")}, "table: row 2"),
        ({"table": in_table(2, 8, 1e999)}, "table: row 2"),
        ({"table": in_table(2, 8, 10**400)}, "malformed"),
        ({"table": in_table(2, 8, "x")}, "malformed"),
        ({"table": in_table(2, 8, None)}, "malformed"),
        ({"table": in_table(3, 2, "nan")}, "table: row 3"),  # a clip that is not a number
        ({"table": in_table(3, 2, 5.0)}, "table: row 3"),  # an empty clip
        ({"table": in_table(0, 0, 1.0)}, "row 0 runs before any evaluation"),
        ({"table": in_table(0, 9, 1.0)}, "row 0 runs before any evaluation"),
        ({"table": in_table(0, 10, 1.0)}, "row 0 runs before any evaluation"),
        ({"end": [1.0]}, "end: expected"),
        ({"end": [1.0, "inf"]}, "end: expected"),
        ({"init_scale": "nan"}, "init_scale"),
        ({"init_scale": math.nan}, "init_scale"),
        ({"residual": math.inf}, "residual"),
        ({"replay_error": math.nan}, "replay_error"),
        ({"solver": 3}, "solver"),
        ({"editable": 1}, "editable"),
        ({"names": [["x"]]}, "names"),
        ({"train_steps": 1e3}, "train_steps"),
    ],
)
def test_malformed_json_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Plan.from_json(broken(**changes))


def test_rows_and_variances_agree_on_what_is_learned() -> None:
    values = json.loads(make("ddpm", variance="learned_range").to_json())
    for other in (0.5, 0.0, "nan"):
        changed = values | {"variance": [*values["variance"][:3], other, *values["variance"][4:]]}
        with pytest.raises(ValueError, match=r"^variance: row 4 learns its own, log Sig .*; expected 1 beside it, got"):
            Plan.from_json(json.dumps(changed))


def test_the_unbroken_one_passes() -> None:
    assert_same(Plan.from_json(broken()), make("ddim", eta=0.5))


# ---- readable --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", SOLVERS, ids=case_name)
def test_print(case: Any) -> None:
    plan = make(case[0], "scaled-leading", **case[1])
    first, *lines = str(plan).splitlines()
    assert first == repr(plan)
    for word in (plan.solver, plan.prediction, f"slots={plan.slots}", f"evaluations={plan.evaluations}"):
        assert word in first
    assert len(lines) == plan.evaluations + 1
    for i, (line, row) in enumerate(zip(lines, table_rows(plan), strict=True)):
        assert line.startswith(f"row {i:4d}")
        assert "\t" not in line
        if i < plan.evaluations:
            assert f"{plan.timestep[i]:.4f}" in line
        for matrix in (row.T, row.d, row.n):
            rows = matrix if matrix.ndim == 2 else matrix[:, None]
            for r, values in enumerate(rows):
                for c, value in enumerate(values):
                    kept = matrix is row.T and r == c and np.count_nonzero(row.coefficients[r]) == 1 and value == 1
                    if value not in (0, 1) and not kept:
                        assert f"{value:+.5g}".lstrip("+") in line
        assert ("clip(" in line) == (i > 0)
        assert (" z" in line) == bool(row.n.any())


def test_printing_of_a_learned_variance() -> None:
    plan = make("ddpm", variance="learned_range")
    for i, (line, row) in enumerate(zip(str(plan).splitlines()[1:], plan.rows, strict=True)):
        assert ("sqrt(Sig) z" in line) == (0 < i < 7)
        assert (f"log Sig = {row.var_lo:.5g} {row.var_hi - row.var_lo:+.5g} (v + 1)/2;" in line) == (i > 0)
    guided = plan.table.copy()
    guided[1:, -1] = 1.0  # q
    assert all("Sig g" in line for line in str(replace(plan, table=guided)).splitlines()[2:])
    assert "Sig" not in str(make("ddpm"))


# ---- shared between threads ------------------------------------------------------------------------------------------
def test_threads() -> None:
    """Compilation and every lazy property from eight threads at once give what one thread gives."""
    expected = [make(case[0], "scaled-leading", **case[1]) for case in SOLVERS[:10]]
    shared, results, errors, gate = make(order=3), [], [], threading.Barrier(8)

    def work(seed: int) -> None:
        try:
            gate.wait()
            for k in range(10):
                case = SOLVERS[(seed + k) % 10]
                assert make(case[0], "scaled-leading", **case[1]) == expected[(seed + k) % 10]
            results.append((shared.rows, hash(shared), shared.stochastic_rows, str(shared), shared.to_json()))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(results) == 8
    assert all(result == results[0] for result in results)


def test_compiling_is_deterministic() -> None:
    for case in SOLVERS:
        path = schedules.linear().path(12)
        tables = [pyguide.compile(case[0], path, prediction="v", **case[1]).table.tobytes() for _ in range(2)]
        assert tables[0] == tables[1]


def test_a_table_that_reads_a_slot_before_it_is_written_is_refused() -> None:
    values = json.loads(pyguide.compile("dpmpp_2m", schedules.scaled_linear().path(6)).to_json())
    M = values["slots"]
    for row in values["table"]:  # no row writes slot 1 any more; the last one reads it
        row[8 + M : 8 + 2 * M] = [0.0] * M
        for vector in range(4):
            row[8 + M * M + vector * M + 1] = 0.0
    with pytest.raises(ValueError, match=r"table: row 2 reads slot 1, which no row before it has written"):
        pyguide.Plan.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("field", "value"),
    [("init_scale", 10**400), ("residual", 10**400), ("train_steps", -1), ("sigma", [[[[[[1.0]]]]]]), ("steps", 0)],
)
def test_hostile_fields_are_value_errors(field: str, value: object) -> None:
    values = json.loads(pyguide.compile("ddim", schedules.scaled_linear().path(3)).to_json())
    values[field] = value
    with pytest.raises(ValueError):  # noqa: PT011  each names its own field
        pyguide.Plan.from_json(json.dumps(values))


def test_deep_nesting_is_a_value_error() -> None:
    values = pyguide.compile("ddim", schedules.scaled_linear().path(3)).to_json()
    head, _, tail = values.partition('"sigma": [')
    with pytest.raises(ValueError, match="text"):
        pyguide.Plan.from_json(head + '"sigma": [' + "[" * 5000 + "1.0" + "]" * 5000 + ", " + tail)
