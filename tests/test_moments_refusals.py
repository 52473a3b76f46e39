"""What set_moments, place_moments, set_quantile and a launch with moments refuse, before anything is changed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from launches import Tensor
from moments_cases import ROWS, Case, Kernel, Program
from test_moments import kernel, norm_ratio  # noqa: F401  the fixture

from pyguide import native

C: Any = native.C
if C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

ARGUMENTS = ("program", "parameters", "row_stride", "sample_stride", "plain", "plain_row_stride", "plain_sample_stride",
             "pattern", "partial", "moments", "outer", "reduce", "inner", "guided", "guided_source")  # fmt: skip
GOOD = norm_ratio()
SIZE = len(GOOD.packed())


def with_operation(i: int, *operation: Any) -> Program:
    operations = list(GOOD.operations)
    operations[i] = operation
    return GOOD._replace(operations=operations)


WRONG: dict[str, tuple[str, Any, str]] = {
    "parameters": ("parameters", 0, "parameters: no address"),
    "pattern": ("pattern", 0, "pattern: no address"),
    "row_stride": ("row_stride", -1, "row_stride: got -1, expected at least 0"),
    "sample_stride": ("sample_stride", -1, "sample_stride: got -1, expected at least 0"),
    "plain": ("plain", -1, "plain: got -1, expected at least 0"),
    "plain_row_stride": ("plain_row_stride", -1, "plain_row_stride: got -1, expected at least 0"),
    "plain_sample_stride": ("plain_sample_stride", -1, "plain_sample_stride: got -1, expected at least 0"),
    "short": ("program", b"\0" * 7, "program: got 7 bytes, expected 20 or more"),
    "cut": ("program", GOOD.packed()[:-1], f"program: got {SIZE - 1} bytes, expected {SIZE}"),
    "vectors": ("program", GOOD._replace(vectors=3), "program: vectors: got 3, expected 2 to 2"),
    "few": ("program", GOOD._replace(parameters=2), "program: parameters: got 2, expected 3 to 40"),
    "many": ("program", GOOD._replace(parameters=41), "program: parameters: got 41, expected 3 to 40"),
    "later": ("program", with_operation(1, "add", 0, 9, 0), "program: operation 1: register: got 9, expected 0 to 8"),
    "unread": ("program", with_operation(0, "sqrt", 0, 0, 8), "program: operation 0: register: got 8, expected 0 to 7"),
    "place": ("program", GOOD._replace(results=[(7, 0)]), "program: result 0: place: got 7, expected 0 to 6"),
    "from": ("program", GOOD._replace(results=[(0, 14)]), "program: result 0: register: got 14, expected 0 to 13"),
    "twice": ("program", GOOD._replace(results=[(2, 1), (2, 3)]), "program: result 1: place 2 has a result already"),
    "long": ("program", Program(2, 3, [("add", 0, 0, 0)] * 161), "program: operations: got 161, expected 0 to 160"),
    "results": ("program", GOOD._replace(results=[(0, 0)] * 41), "program: results: got 41, expected 0 to 40"),
    "code": ("program", GOOD.packed()[:20] + b"\x0a" + GOOD.packed()[21:],
             "program: operation 0: code: got 10, expected 0 to 9"),
    "reduce": ("reduce", -1, "reduce: got -1, expected at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_are_refused(kernel: Kernel, name: str) -> None:  # noqa: F811
    """And what was set before is still set."""
    argument, value, message = WRONG[name]
    case = Case(kernel, GOOD)
    arguments = case.arguments()
    if argument == "reduce":
        arguments += [1, value, 1, 1, 1]
    else:
        arguments[ARGUMENTS.index(argument)] = value.packed() if isinstance(value, Program) else value
    with pytest.raises(ValueError, match="^" + message):
        case.step.set_moments(*arguments)
    case.run()
    case.compare_moments(0)


GROUPS_WRONG: dict[str, tuple[str, Any, str]] = {
    "product": ("outer", 6, "outer, reduce, inner: got 6, 2, 7, expected a product of 70"),
    "outer": ("outer", -5, "outer, reduce, inner: got -5, 2, 7, expected a product of 70"),
    "overflow": ("outer", 2**62, "outer, reduce, inner: got "),
    "guided": ("guided", 0, "guided: no address"),
    "guided_source": ("guided_source", 0, "guided_source: no address"),
    "v": ("program", GOOD._replace(results=[(2, 0)]), "program: result 0: place 2 is of the step"),
    "b": ("program", GOOD._replace(results=[(5, 0)]), "program: result 0: place 5 is of the step"),
    "none": ("program", GOOD._replace(results=[]), "program: no results"),
}


@pytest.mark.parametrize("name", GROUPS_WRONG)
def test_groups_that_are_refused(kernel: Kernel, name: str) -> None:  # noqa: F811
    argument, value, message = GROUPS_WRONG[name]
    case = Case(kernel, GOOD, groups=(5, 2, 7))
    arguments = case.arguments()
    arguments[ARGUMENTS.index(argument)] = value.packed() if isinstance(value, Program) else value
    with pytest.raises(ValueError, match="^" + message):
        case.step.set_moments(*arguments)
    case.run()
    assert np.isfinite(case.guided).all()


def refuse(case: Case, message: str, call: str = "run") -> None:
    """And nothing is changed."""
    arrays = case.state.memory, case.weights, case.moments, case.partial, case.guided, case.samples, case.input.memory
    before = [a.tobytes() for a in arrays]
    with pytest.raises(ValueError, match="^" + message):
        case.run(call)
    assert [a.tobytes() for a in arrays] == before


def test_launches_that_are_refused(kernel: Kernel) -> None:  # noqa: F811
    case = Case(kernel, GOOD)
    case.samples["method"][1] = 0
    refuse(case, r"samples\[1\].method: got 0, expected 1")
    for call in ("run", "moments"):
        case = Case(kernel, GOOD)
        case.route[1, 0] = -1
        refuse(case, r"source\[1\]\[0\]: a branch with non-zero weight is absent", call)
    case = Case(kernel, GOOD)
    case.step.set_output(1, 0, 70, 70, 1)
    refuse(case, r"output\[1\]: no address is set")
    case = Case(kernel, GOOD, groups=(5, 2, 7))
    case.guided_source[1, 0] = 0
    refuse(case, r"guided_source\[1\]: expected the sample's own index in branch 0")
    case = Case(kernel, GOOD)
    case.clear_moments()
    case.weights[ROWS] = 0
    refuse(case, r"moments: set_moments\(\) was not called", "moments")
    case.step.run()


def test_overlaps_are_refused(kernel: Kernel) -> None:  # noqa: F811
    for name in ("output", "state", "input"):
        case = Case(kernel, GOOD, groups=(5, 2, 7))
        tensor = {"output": case.output[1], "state": case.state, "input": case.input}[name]
        case.guided = tensor.view.reshape(-1)[:140].reshape(2, 70)
        case.set_moments()
        refuse(case, rf".*{name}.*")
    assert isinstance(tensor, Tensor)


def test_a_learned_variance_is_read_where_the_step_reads_its_branch(kernel: Kernel) -> None:  # noqa: F811
    """By groups that is guided_source, which has no other branch than the first."""
    variance = np.zeros((2, 70), np.float32)
    for groups, branch in ((None, 0), (None, 1), ((5, 2, 7), 0), ((5, 2, 7), 1)):
        case = Case(kernel, GOOD, groups=groups)
        case.tables[:, 6:8] = -2, -1
        case.tables[:, 11] = 1  # n of s_0
        case.step.set_variance(variance.__array_interface__["data"][0], 70, 70, 1, branch)
        if groups and branch:
            refuse(case, r"source\[0\]: the variance branch is absent")
        else:
            assert np.isfinite(case.run().state.view).all()


def test_quantiles_that_are_refused(kernel: Kernel) -> None:  # noqa: F811
    bound = np.zeros(2, np.float32).__array_interface__["data"][0]
    case = Case(kernel, GOOD)
    for arguments, message in (
        ((1.5, 1, 2, bound), "quantile: got 1.5.*, expected 0 to 1"),
        ((math.nan, 1, 2, bound), "quantile: got -?nan, expected 0 to 1"),
        ((0.5, 0, 2, bound), "least: got 0.*, expected more than 0"),
        ((0.5, math.nan, 2, bound), "least: got -?nan, expected more than 0"),
        ((0.5, 3, 2, bound), "limit: got 2.*, expected at least 3"),
        ((0.5, 1, math.nan, bound), "limit: got -?nan, expected at least 1"),
        ((0.5, 1, 2, 0), "bound: no address"),
    ):
        with pytest.raises(ValueError, match="^" + message):
            case.step.set_quantile(*arguments)
    case.run()
    plain = Case(kernel, GOOD).run()
    assert case.bits(0) == plain.bits(0)


def test_place_moments_is_refused_without_addresses() -> None:
    case = Case(Kernel(C), GOOD)
    with pytest.raises(ValueError, match=r"^parameters: no address"):
        case.step.place_moments(0, 64)
    with pytest.raises(ValueError, match=r"^partial: no address"):
        case.step.place_moments(64, 0)
    case = Case(Kernel(C), GOOD, groups=(5, 2, 7))
    with pytest.raises(ValueError, match=r"^guided: no address"):
        case.step.place_moments(64, 0, 0, 0, 64)
    with pytest.raises(ValueError, match=r"^guided_source: no address"):
        case.step.place_moments(64, 0, 0, 64, 0)
    case.clear_moments()
    with pytest.raises(ValueError, match=r"^place_moments: set_moments\(\) was not called"):
        case.step.place_moments(64, 64)
