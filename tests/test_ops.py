"""The torch operators against the reference in float64, and opcheck."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from step_cases import BF16, CASES, F16, F32, F64, I64, STEP, Case

import pyguide
from pyguide.layout import SAMPLE


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "extras"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_float64(name, extras, row, on):
    for stacked in (True, False):
        case = Case(name, extras=extras, stacked=stacked, row=row)
        if extras and name in ("flat", "double"):
            case.options["noise"] = case.z
        if row == 0 and extras:
            case.args[5][0, 6:8] = 0  # the prologue has no model output, and so no variance
        args, options = case.copy()
        untouched = [t.clone() for t in (*args[4], *args[5:9])]
        STEP(*args, **options)
        case.check(args, options)
        for before, now in zip(untouched, (*args[4], *args[5:9])):
            assert torch.equal(before, now)
        now = args[3].numpy().view(SAMPLE).ravel()
        np.testing.assert_array_equal(now["row"], case.samples["row"] + 1)
        for b, k in np.ndindex(case.B, case.K):
            if now["row"][b] < now["end"][b]:
                told = args[2][0 if stacked else k][case.index[b, k]]
                assert float(told) == 7 * case.samples["row"][b]


def test_walks_channels_last_and_a_part_of_a_wider_buffer(on):
    case = Case(channels_last=True)
    assert not case.args[4][0].is_contiguous()
    assert not case.args[1][0].is_contiguous()
    args, options = case.copy()
    wide = torch.full((4, 7, 4, 5), 5.0)
    args[1] = [wide[:, 2:5]]  # a model input with channels of its own around x
    STEP(*args, **options)
    case.check(args, options)
    assert (wide[:, :2] == 5).all()
    assert (wide[:, 5:] == 5).all()


@pytest.mark.parametrize("extras", [False, True], ids=["bare", "extras"])
@pytest.mark.parametrize("name", CASES)
def test_opcheck_step(name, extras):
    for stacked in (True, False):
        case = Case(name, extras=extras, stacked=stacked)
        torch.library.opcheck(STEP, tuple(case.args), case.options)


def test_schema_declares_what_is_written():
    # opcheck compares with allclose: a row that advances by one among the bits of `samples` escapes it
    written = [a.name for a in STEP._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["state", "inputs", "times", "samples", "denoised"]


def test_opcheck_step_prologue_and_reference(on):
    case = Case(row=0)
    case.args[5][0, 6:8] = 0
    torch.library.opcheck(STEP, tuple(case.args), case.options | {"noise": case.z, "check": True})


@pytest.mark.parametrize("dtype", [None, F16, BF16, F64])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1), (3,), (0, 4), (2, 0)])
def test_randn(shape, dtype, on):
    torch._dynamo.reset()
    seeds = torch.tensor([7, -1, 2**62][: shape[0]], dtype=I64)  # -1: the bits of 2^64 - 1
    torch.library.opcheck(torch.ops.pyguide.randn.default, (seeds, list(shape)), {"dtype": dtype})
    got = torch.ops.pyguide.randn(seeds, shape, dtype=dtype)
    want = pyguide.randn([s % 2**64 for s in seeds.tolist()], shape, like=torch.empty(0, dtype=dtype or F32))
    assert torch.equal(got, want)
    assert got.dtype == want.dtype
    compiled = torch.compile(
        lambda s: torch.ops.pyguide.randn(s, shape, dtype=dtype) + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(seeds), want + 1)


def test_randn_refuses():
    with pytest.raises(TypeError, match=r"seeds: expected torch\.int64, got torch\.float32"):
        torch.ops.pyguide.randn(torch.zeros(2), (2, 3))
    with pytest.raises(ValueError, match=r"seeds: expected one per sample of shape \(3, 3\), got shape \(2,\)"):
        torch.ops.pyguide.randn(torch.zeros(2, dtype=I64), (3, 3))
    with pytest.raises(TypeError, match=r"dtype: expected .* got torch\.int32"):
        torch.ops.pyguide.randn(torch.zeros(2, dtype=I64), (2, 3), dtype=torch.int32)
