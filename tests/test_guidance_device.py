"""Methods that need moments on a GPU, over the simulated kernels: runs and captures."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import recorded  # noqa: E402
from guidance_methods import METHODS, PLANS, Net, conds, start  # noqa: E402

from pyguide import CustomGuidance, DynamicThresholding, Sampler, backends, native  # noqa: E402
from pyguide.device import CudaStep  # noqa: E402

THRESHOLDED = {
    **METHODS,
    "thresholded": DynamicThresholding(METHODS["apg"], 0.9),
    "thresholded tokens": DynamicThresholding(METHODS["apg tokens"], 0.9),
}


def sample(guidance: Any, plan: str, x: Any, **options: Any) -> Any:
    inner = getattr(guidance, "guidance", guidance)
    seeds = {"seeds": 7} if PLANS[plan].stochastic_rows else {}
    sampler = Sampler(Net(doubled="learned" in plan), PLANS[plan], guidance, **options)
    return sampler(x, conds=conds(inner, len(x)), **seeds)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, simulated: Any) -> Any:
    """Call it: from then on everything runs on the simulated GPU, whose memory is the host's."""

    def switch() -> None:
        monkeypatch.setattr(native, "C", simulated)
        monkeypatch.setattr(backends, "stepper", lambda backend, device: CudaStep)

    return switch


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", THRESHOLDED)
def test_a_run_gives_what_the_equation_gives(name: str, plan: str, on_gpu: Any) -> None:
    x = start(2, 2, 4, 6)
    expected = sample(THRESHOLDED[name], plan, x, backend="reference")
    on_gpu()
    torch.testing.assert_close(sample(THRESHOLDED[name], plan, x), expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, simulated: Any) -> recorded.Recorder:
    return recorded.install(monkeypatch, simulated)


@pytest.mark.parametrize("name", THRESHOLDED)
def test_a_captured_run_has_the_bits_of_the_loop(name: str, recorder: recorded.Recorder) -> None:
    guidance, x = THRESHOLDED[name], start(2, 2, 8, 8, dtype=torch.float32)
    eager = sample(guidance, "dpmpp_2m_sde", x)
    sampler = Sampler(Net(), PLANS["dpmpp_2m_sde"], guidance, cuda_graph=True)
    for run in (1, 2):
        got = sampler(x, conds=conds(getattr(guidance, "guidance", guidance), 2), seeds=7)
        assert torch.equal(got, eager), run
    assert recorder.recorded == (2 if name in ("zero star", "interval") else 1)
    assert recorder.replayed == 2 * PLANS["dpmpp_2m_sde"].evaluations


def test_a_function_of_the_moments_is_captured_with_its_interval(recorder: recorded.Recorder) -> None:
    """Where it does not act, another graph has the host's weights: also if the branches are the same."""

    def half(moments: Any) -> Any:
        return moments["cond"] * (0.5 + 0.0 * moments["cond"].norm())

    guidance = CustomGuidance(("cond",), half, interval=(0.25, 0.75))
    x = start(2, 2, 8, 8, dtype=torch.float32)
    expected = sample(guidance, "ddim", x)
    captured = Sampler(Net(), PLANS["ddim"], guidance, cuda_graph=True)(x, conds=conds(guidance, 2))
    assert torch.equal(captured, expected)
    assert recorder.recorded == 2
