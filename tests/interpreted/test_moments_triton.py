"""The Triton kernels of the moments and of groups under their interpreter, against numpy in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install pyguide[triton]")

import torch
from moments_cases import METHODS, ROWS, Launch, operation

from pyguide.guidance.program import Program
from pyguide.layout import OPCODES, moments_count


@pytest.fixture(scope="module")
def kernels() -> Any:
    from pyguide.kernels import launch_triton

    return launch_triton


def slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


def check(launch: Launch, kernels: Any) -> Launch:
    launch.run(kernels)
    for b in range(launch.B):
        launch.check_sums(b)
        launch.check_block(b)
    return launch


# ---- whole samples ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("state", "output"), [("float32", "float16"), ("float64", "float64"), *map(slow, itertools.product(
        ("float32", "float64"), ("float32", "bfloat16")
    ))]
)  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_methods_and_types(kernels: Any, method: str, state: str, output: str) -> None:
    check(Launch(method=method, state=state, output=output, solver=2, space=(1.25, -0.75)), kernels)


@pytest.mark.parametrize("layout", ["last", "slice"])
def test_layouts(kernels: Any, layout: str) -> None:
    found, dense = (Launch(3, method="momentum", channels=3, inner=8, layout=x) for x in (layout, "dense"))
    check(found, kernels)
    dense.run(kernels)
    assert torch.equal(found.moments, dense.moments)
    assert torch.equal(found.weights, dense.weights)


@pytest.mark.parametrize("elements", [1, 7, 1025, 4097, *map(slow, (127, 128, 129, 1024, 4096, 8191, 40000))])
def test_lengths_around_a_tile_and_a_chunk(kernels: Any, elements: int) -> None:
    method = "optimal" if elements > 1 else "three"  # one element has no spread to project on
    launch = Launch(elements, method=method, channels=1, inner=elements, batch=1, space=(0.5, 2.0))
    launch.run(kernels)
    launch.check_sums(0)
    if elements > 1:
        launch.check_block(0)


def test_close_branches(kernels: Any) -> None:
    """At |c - u| = 1e-3 |u| the Gram matrix of the raw branches, summed in float32, has several per cent of |c - u|^2
    wrong; here each moment keeps its accuracy."""
    launch = Launch(1, channels=1, inner=3000)
    u, c = (m.double() for m in launch.outputs)
    launch.outputs[1] = (u + 1e-3 * (c - u)).float()
    launch.route[:] = np.arange(2)[None, :, None]
    check(launch, kernels)


def fuses(kernels: Any) -> bool:
    """Whether this interpreter rounds a fused multiply-add once."""
    import triton
    import triton.language as tl

    @triton.jit
    def fused(to: Any, x: Any) -> None:
        a = tl.load(x + tl.arange(0, 1))
        tl.store(to + tl.arange(0, 1), tl.fma(a, a, -(a * a)))

    to = torch.zeros(1)
    fused[(1,)](to, torch.full((1,), 1.0 + 2.0**-20))
    return to.item() != 0


def test_large_noise(kernels: Any) -> None:
    """At sigma 4096 the denoised estimate of a v model, p_x s_0 + p_m m_0, is 1e-3 of its terms."""
    if not fuses(kernels):
        pytest.skip("this interpreter rounds a fused multiply-add twice, no GPU does")
    sigma = 4096.0
    p_x, p_m = 1 / (1 + sigma**2), -sigma / np.sqrt(1 + sigma**2)
    launch = Launch(2, channels=1, inner=500, space=(p_x, p_m))
    x = sigma * np.random.default_rng(0).normal(size=launch.state.shape[1:])
    launch.state[0] = torch.as_tensor(x)
    launch.route[:] = np.arange(2)[None, :, None]
    for m in launch.outputs:  # so that what remains is of size 1
        m[:2] = ((p_x * launch.state[0].double() - m[:2].double()) / -p_m).float()
    launch.run(kernels)
    for b in range(2):
        launch.check_sums(b)


def test_sums_are_left_out_where_a_program_reads_none(kernels: Any) -> None:
    launch = check(Launch(), kernels)
    assert not launch.program.sums
    assert not launch.moments[:, :2].any()
    assert check(Launch(method="momentum"), kernels).program.sums


def test_without_results_no_block_is_written(kernels: Any) -> None:
    launch = Launch(program=Program(2, 3, (), (), True))
    before = launch.weights.clone()
    launch.run(kernels)
    assert torch.equal(before, launch.weights)
    for b in range(2):
        launch.check_sums(b)


def test_without_moments(kernels: Any) -> None:
    launch, other = Launch(), Launch()
    launch.run(kernels)
    other.run(kernels, moments=False)
    assert other.moments.isnan().all()
    assert torch.equal(launch.weights, other.weights)


# ---- the program ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("state", ["float64", slow("float32")])
def test_every_operation(kernels: Any, state: str) -> None:
    """On parameters: signs, zeros, infinities and NaN in every place."""
    nan, inf = np.nan, np.inf
    values = [(-1.5, 0.3), (0.3, -1.5), (0.7, 0.0), (0.0, 2.25), (nan, 1.0), (1.0, nan), (inf, -inf), (-inf, 2.0)]
    first = moments_count(3) + 3
    chain = [(code, first, first + 1, first + 2) for code in range(len(OPCODES))]
    program = Program(3, 6, tuple(chain), tuple((i, first + 3 + i) for i in range(len(chain))), True)
    launch = Launch(
        method="three", state=state, batch=len(values), channels=1, inner=3, program=program, extra=(0,) * 3
    )
    launch.parameters[..., 3:5], launch.parameters[..., 5] = values, 7.5
    assert launch.width == len(chain)
    launch.run(kernels)
    kind = np.dtype(state).type
    for b, (x, y) in enumerate(values):
        with np.errstate(all="ignore"):
            expected = np.array([operation(code, *np.float64((x, y, 7.5))) for code in range(len(OPCODES))]).astype(
                kind
            )
        found = launch.own_block(b).astype(kind)
        exp = OPCODES.index("exp")
        assert np.array_equal(np.delete(found, exp), np.delete(expected, exp), equal_nan=True), (x, y)
        assert np.allclose(found[exp], expected[exp], rtol=2 * np.finfo(kind).eps, atol=0, equal_nan=True)


def test_a_result_feeds_the_next_operation(kernels: Any) -> None:
    first = moments_count(2) + 3
    chain = [(OPCODES.index("mul"), 2, first, 0), (OPCODES.index("sqrt"), first + 1, 0, 0),
             (OPCODES.index("sub"), first + 2, first, 0)]  # fmt: skip
    program = Program(2, 4, tuple(chain), ((0, first + 1), (1, first + 2), (4, first + 3)), False)
    launch = Launch(program=program, extra=(3.0,), state="float64")
    launch.run(kernels)
    for b in range(2):
        norm = float(launch.moments[b, 2])
        root = np.sqrt(norm * 3.0)
        assert launch.own_block(b).tolist() == [norm * 3.0, root, 0, 0, root - 3.0, *[0] * (launch.width - 5)]


# ---- rows -------------------------------------------------------------------------------------------------------
def test_rows_that_do_not_act_take_the_plain_block(kernels: Any) -> None:
    launch = Launch(batch=4, rows=[0, 1, 2, ROWS], acting=False)
    before = launch.weights.clone()
    launch.outputs = [None, None]
    launch.run(kernels)
    for b in range(4):
        start, stop = (int(launch.samples["weights"][b]) + i for i in (0, launch.width))
        if b in (1, 2):
            assert np.array_equal(launch.own_block(b), launch.plain_block(b))
            assert not torch.equal(before[start:stop], launch.weights[start:stop])
        else:  # the prologue; at its end
            assert torch.equal(before[start:stop], launch.weights[start:stop])
    assert torch.equal(before[: int(launch.samples["weights"][0])], launch.weights[: int(launch.samples["weights"][0])])
    assert launch.moments.isnan().all()


def test_samples_at_different_rows(kernels: Any) -> None:
    launch = Launch(batch=5, rows=[1, 2, 0, ROWS, 2])
    launch.parameters[2, 4, 0] = 0
    launch.parameters[2, :, -1] *= 1.5
    launch.run(kernels)
    for b in (0, 1):
        launch.check_sums(b)
        launch.check_block(b)
    assert launch.moments[2:].isnan().all()
    assert np.array_equal(launch.own_block(4), launch.plain_block(4))


@pytest.mark.parametrize("absent", ["route", "output"])
def test_an_absent_branch_is_not_a_number_in_its_sample_alone(kernels: Any, absent: str) -> None:
    clean, launch = Launch(batch=3), Launch(batch=3)
    clean.run(kernels)
    if absent == "route":
        launch.route[1, 1, 1] = -1
    else:
        launch.outputs[1] = None
    launch.run(kernels)
    hit = [1] if absent == "route" else [0, 1, 2]
    for b in range(3):
        if b in hit:
            assert launch.moments[b, [3, 4]].isnan().all()  # <y_0, y_1>, <y_1, y_1>
            assert launch.moments[b, 2] == clean.moments[b, 2]
            assert np.isnan(launch.own_block(b)[0])
        else:
            assert torch.equal(launch.moments[b], clean.moments[b])


def test_not_a_number_stays_in_its_sample(kernels: Any) -> None:
    clean, launch = (Launch(batch=3, space=(0.5, 1.5), inner=600) for _ in range(2))
    launch.state[0, 1, 0, 3] = torch.nan
    for x in (clean, launch):
        x.run(kernels)
    assert launch.moments[1, [2, 3]].isnan().all()
    assert np.isnan(launch.own_block(1)[0])
    assert torch.equal(launch.moments[[0, 2]], clean.moments[[0, 2]])


def test_the_model_space_reads_no_state(kernels: Any) -> None:
    launch = Launch()
    launch.state[:] = torch.nan
    launch.run(kernels)
    for b in range(2):
        launch.check_sums(b)


# ---- bits -------------------------------------------------------------------------------------------------------
def alone(launch: Launch, b: int) -> None:
    """The same sample in a batch of its own, its outputs at another place."""
    launch.outputs = [m[launch.route[:, b, k].tolist()] for k, m in enumerate(launch.outputs)]
    launch.route = np.broadcast_to(np.arange(ROWS, dtype=np.int32)[:, None, None], (ROWS, 1, launch.K)).copy()
    launch.state = launch.state[:, b : b + 1].contiguous()
    launch.samples, launch.parameters = launch.samples[b : b + 1].copy(), launch.parameters[:, b : b + 1].copy()
    launch.moments, launch.guided, launch.B = launch.moments[:1], launch.guided[:1], 1


@pytest.mark.parametrize("groups", [None, (30, 40, 1), pytest.param((1, 3, 400), marks=pytest.mark.slow)])
def test_the_same_bits_in_any_batch(kernels: Any, groups: Any) -> None:
    make = lambda: Launch(4, method="momentum", batch=3, channels=3, inner=400, space=(0.5, 1.5), groups=groups)  # noqa: E731
    whole, other = make(), make()
    whole.run(kernels)
    other.outputs[0][int(other.route[1, 0, 0]), 0, 0] += 0.01  # control: its own numbers change, its neighbours' do not
    other.run(kernels)

    def results(launch: Launch, b: int) -> bytes:
        return b"".join(np.asarray(x).tobytes() for x in (launch.own_block(b), launch.moments[b], launch.guided[b],
                                                          launch.state[1, b]))  # fmt: skip

    for b in range(3):
        single = make()
        alone(single, b)
        single.run(kernels)
        assert results(single, 0) == results(whole, b)
        same = {int(whole.route[1, i, 0]) for i in range(3)}
        assert len(same) == 3
        assert (results(other, b) == results(whole, b)) == (b != 0)


# ---- groups -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("channels", "inner", "groups"),
    [
        (6, 8, (6, 8, 1)),  # tokens
        (4, 35, (1, 4, 35)),  # the channels of a place
        (5, 24, (5, 6, 4)),
        slow((3, 40, (1, 120, 1))),
        slow((2, 1500, (2, 1500, 1))),
        slow((70, 20, (1, 70, 20))),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_groups(kernels: Any, channels: int, inner: int, groups: tuple[int, int, int], method: str) -> None:
    Launch(5, method=method, channels=channels, inner=inner, groups=groups, space=(0.75, -1.25)).check_groups(kernels)


@pytest.mark.slow
def test_groups_of_one_element(kernels: Any) -> None:
    """Of which all is parallel: the other methods have 0/0 there."""
    Launch(5, method="three", channels=1, inner=4, groups=(4, 1, 1), space=(0.75, -1.25)).check_groups(kernels)


@pytest.mark.parametrize("state", ["float32", "float64"])
@pytest.mark.parametrize(("output", "layout"), [("float16", "slice"), ("float32", "last")])
def test_groups_types_and_layouts(kernels: Any, state: str, output: str, layout: str) -> None:
    Launch(6, method="momentum", solver=2, channels=6, inner=16, groups=(6, 16, 1), state=state, output=output,
           layout=layout).check_groups(kernels)  # fmt: skip


def test_groups_where_the_method_does_not_act(kernels: Any) -> None:
    """From the plain block: a coefficient of 0 reads nothing, the slots stay."""
    launch = Launch(7, method="momentum", batch=3, channels=4, inner=6, groups=(4, 6, 1), rows=[1, 0, 2])
    launch.parameters[1, 0, 0] = 0
    W = launch.width
    at = launch.plain + 3 * W
    launch.weights[at : at + 6] = torch.tensor([0.0, 0.5, 9.0, 9.0, 0.0, 2.0])  # w, v, o
    launch.route[1, 0, 0] = -1
    before, expected = launch.state.clone(), launch.expected_guided(0, launch.slots(0))
    acting = launch.expected_guided(2, launch.slots(2))
    launch.run(kernels)
    c, h = launch.branches(0)[1], before[1, 0].double().numpy().ravel()
    assert np.allclose(expected[0], 0.5 * c + 2 * h, rtol=1e-15, atol=0)
    assert (np.abs(launch.guided[0].double().numpy() - expected[0]) <= expected[1]).all()
    assert torch.equal(launch.state[:, :2], before[:, :2])
    assert launch.guided[1].isnan().all()  # the prologue
    assert (np.abs(launch.guided[2].double().numpy() - acting[0]) <= acting[1]).all()
    assert not torch.equal(launch.state[1, 2], before[1, 2])


def test_not_a_number_stays_in_its_group(kernels: Any) -> None:
    clean, launch = (Launch(8, channels=4, inner=8, groups=(4, 8, 1)) for _ in range(2))
    launch.outputs[1][int(launch.route[1, 1, 1]), 2, 5] = torch.nan
    for x in (clean, launch):
        x.run(kernels)
    found, others = launch.guided.reshape(2, 4, 8), clean.guided.reshape(2, 4, 8)
    assert found[1, 2].isnan().all()
    found[1, 2] = others[1, 2]
    assert torch.equal(found, others)


def test_nobody(kernels: Any) -> None:
    launch = Launch(batch=1)
    launch.B, launch.state, launch.samples = 0, launch.state[:, :0], launch.samples[:0]
    launch.run(kernels)
    assert launch.moments.isnan().all()


def test_what_a_launch_cannot_do(kernels: Any) -> None:
    launch = Launch(channels=4, inner=6, groups=(4, 5, 1))
    with pytest.raises(AssertionError, match="all of a sample"):
        launch.run(kernels)
    launch.groups, launch.guided = (4, 6, 1), launch.guided.T.contiguous().T
    with pytest.raises(AssertionError, match="walk"):
        launch.run(kernels)
