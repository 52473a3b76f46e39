"""The installed diffusers: it gives what is stored, and it is matched where more than a scheduler is at work."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from peers.common import SEED, SHAPE, distance, draw  # noqa: E402
from peers.diffusers_cases import NAMED  # noqa: E402
from peers.diffusers_ours import F32, F64, TIMES, Ours  # noqa: E402
from peers.diffusers_runs import make, run  # noqa: E402
from peers.diffusers_stored import CASES, EXACT, stored  # noqa: E402

import pyguide  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _some() -> list[str]:
    """Of each solver of each scheduler class the last case of at most 20 steps."""
    return list({(case.scheduler, case.solver): name for name, case in CASES.items() if case.steps <= 20}.values())


@pytest.mark.parametrize("name", _some())
def test_the_stored_results_are_what_diffusers_gives(name: str) -> None:
    """As a peer of the stored ones, within the limits that hold for pyguide; the grid is the same."""
    case = stored(name)
    live = {dtype: run(case.case, dtype) for dtype in (F32, F64)}
    assert distance(live[F64].x, case.peer[F64]) <= EXACT
    assert distance(live[F32].x, case.peer[F32]) <= case.bound[F32]
    assert live[F64].told == pytest.approx(case.run.told, abs=1e-9)
    assert live[F64].sigmas == pytest.approx(case.run.sigmas, rel=1e-6)
    assert live[F64].inner == pytest.approx(case.run.inner, rel=1e-6)


@pytest.mark.parametrize("name", ["ddim-clip-eta-half", "ddpm-sigmoid", "ancestral-leading", "dpm2-ancestral-leading"])
def test_a_generator_draws_for_both(name: str) -> None:
    """From generators of one seed: the peer draws once a step, and so does a sampler that is handed one."""
    case = Ours(NAMED[name], run(NAMED[name], F64))
    generator = torch.Generator().manual_seed(SEED)
    ours = pyguide.Sampler(case.network, case.plan)(case.start(F32), generator=generator)
    assert distance(ours, run(NAMED[name], F32).x) <= stored(name).bound[F32]


def test_guided_as_in_a_pipeline() -> None:
    """Classifier-free guidance as Stable Diffusion's pipeline writes it, against CFG: one batch of both branches."""

    def network(x: Any, t: Any, y: Any) -> Any:
        return TIMES(x + y[:, None, None, None], t)

    case, uncond, cond = stored("dpm-trailing"), torch.zeros(SHAPE[0]), torch.tensor([0.7, -0.4])
    result = {}
    for dtype in (F32, F64):
        scheduler, x = make(case.case), draw(1).to(dtype)
        with torch.no_grad():
            for t in scheduler.timesteps:
                inputs = scheduler.scale_model_input(torch.cat([x] * 2), t)
                low, high = network(inputs, t, torch.cat([uncond, cond]).to(dtype)).chunk(2)
                x = scheduler.step(low + 7.5 * (high - low), t, x, return_dict=False)[0]
        result[dtype] = x
    sampler = pyguide.Sampler(network, case.plan, pyguide.CFG(7.5))
    ours = sampler(draw(1), cond={"y": cond}, uncond={"y": uncond})
    assert distance(ours, result[F32]) <= max(1e-5, 1.5 * distance(result[F32], result[F64]))
