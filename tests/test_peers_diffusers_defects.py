"""Where diffusers' schedulers are wrong: the levels that they start from, walk on and end at. pyguide does it right.

Each test states the defect by name, shows it in the installed diffusers, and shows what pyguide does. Of steps:
test_peers_diffusers_defects_steps.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from peers.common import distance, draw  # noqa: E402
from peers.diffusers_cases import (  # noqa: E402
    FREE,
    KARRAS,
    LEADING,
    MIN,
    NAMED,
    SD,
    TRAILING,
    Case,
    ddim,
    euler,
)
from peers.diffusers_ours import F64, TIMES, UNIT, Ours  # noqa: E402
from peers.diffusers_points import POINT, PointNetwork, exact  # noqa: E402
from peers.diffusers_runs import make, run, scheduler_class  # noqa: E402

import pyguide  # noqa: E402
from pyguide import schedules, solvers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CLOSE = 1e-5
ROUNDED = 1e-6  # the tables are float32: their sigma at a timestep misses the one of alphas_cumprod by up to 2^-22


def off_the_line(case: Case) -> tuple[float, float]:
    """How far the peer and pyguide end from where data that are one point lead, on the peer's grid."""
    network = PointNetwork(make(case, wide=True).alphas_cumprod, case.prediction)
    peer = run(case, F64, model=network)
    ours = Ours(case, peer)
    wanted = exact(ours.start(F64), ours.path)
    return distance(peer.x, wanted), distance(ours.solve(network=network), wanted)


# ---- where a run starts -------------------------------------------------------------------------------------------
def test_pndm_in_image_to_image_runs_a_level_ahead_of_its_state() -> None:
    """Its list repeats the second timestep, for the two evaluations of the first step. A slice of it does not: the
    third evaluation is told, and steps from, a level below the state's."""
    whole = Case("PNDM", {**SD, **LEADING, "skip_prk_steps": True}, 20, "plms")
    peer, ours = off_the_line(whole)
    assert max(peer, ours) <= ROUNDED
    peer, ours = off_the_line(replace(whole, strength=0.6))
    assert peer > 5e-3
    assert ours <= ROUNDED


def test_lms_in_image_to_image_weighs_derivatives_that_it_does_not_have() -> None:
    """It takes its order from the place in the whole grid: 4 in the first step of a run that begins at the tenth. Of
    the four weights, which add up to the step, it uses the one that it has a derivative for."""
    four = Case("LMSDiscrete", {**SD, **LEADING}, 20, "lms", {"order": 4}, step={"order": 4})
    peer, ours = off_the_line(four)
    assert max(peer, ours) <= ROUNDED
    peer, ours = off_the_line(replace(four, strength=0.5))
    assert peer > 1e-2
    assert ours <= ROUNDED


@pytest.mark.parametrize("curve", ["karras", "exponential", "flow"])
def test_sa_solver_starts_image_to_image_at_another_level(curve: str) -> None:
    """Its add_noise looks alphas_cumprod up at the timestep, which was rounded to a whole one; on a flow's grid too,
    whose states are not those of alphas_cumprod. Its step goes by sigmas."""
    config = {**SD, f"use_{curve}_sigmas": True, **({"prediction_type": "flow_prediction"} if curve == "flow" else {})}
    case = Case("SASolver", config, 10, "sa_solver", strength=0.5, null=True)
    scheduler, path = make(case, wide=True), Ours(case, run(case, F64)).path
    scheduler.set_begin_index(case.first)
    start = scheduler.add_noise(draw(2).double(), draw(1).double(), scheduler.timesteps[case.first : case.first + 1])
    wanted = path.noise_at(draw(2).double(), draw(1).double())
    assert distance(start, wanted) > 1e-4
    other = Case("DEISMultistep", config, 10, "deis", strength=0.5, null=True)  # the same grid, but by sigmas
    scheduler = make(other, wide=True)
    scheduler.set_begin_index(case.first)
    start = scheduler.add_noise(draw(2).double(), draw(1).double(), scheduler.timesteps[case.first : case.first + 1])
    assert distance(start, wanted) <= CLOSE**2


def test_ipndm_throws_its_first_evaluation_away() -> None:
    """Its grid starts at alpha = 0, where D = 0/0; it divides by 1e-8 instead, and so takes D for 0 whatever the
    network says. The velocity is -D there."""
    case = Case("IPNDM", {}, 10, "ipndm")
    scheduler = make(case)
    assert scheduler.alphas[0] == 0
    x, t = draw(1), scheduler.timesteps[0]
    for velocity in (UNIT(x, t), torch.full_like(x, -POINT), torch.full_like(x, 1e3)):
        scheduler = make(case)
        after = scheduler.step(velocity, t, x, return_dict=False)[0]
        assert distance(after, x * scheduler.betas[1]) <= CLOSE
    alpha, sigma = scheduler.alphas[:2].double().numpy(), scheduler.betas[:2].double().numpy()
    path = pyguide.NoisePath(alpha, sigma, np.array([1.0]), schedules.scaled_linear())
    network = lambda x, t: torch.full_like(x, -POINT)  # noqa: E731
    ours = solvers.sample("ipndm", network, x.double(), path, prediction="v")
    assert distance(ours, exact(x.double(), path)) <= 1e-12


# ---- which levels a run walks on ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 15)])
def test_ddim_scheduler_lands_between_its_own_timesteps(spacing: str, steps: int) -> None:
    """DDIMScheduler steps down by 1000 // N whatever its grid is: to 899 where its next timestep is 888.

    The next evaluation tells the network a timestep that is not the state's. Ours lands where the next one starts.
    """
    case = ddim({**SD, **FREE, "timestep_spacing": spacing}, steps)
    scheduler = make(case)
    first, second = scheduler.timesteps[:2].tolist()
    landing = first - 1000 // steps
    assert landing != second
    x = draw(1)
    there = scheduler.step(TIMES(x, torch.tensor(first)), first, x, return_dict=False)[0]
    schedule = schedules.from_alphas_cumprod(scheduler.alphas_cumprod.double().tolist())
    ours = []
    for times in ([first, landing], [first, second]):
        plan = pyguide.compile("ddim", schedule.path(timesteps=times))
        ours.append(next(pyguide.Sampler(TIMES, plan).stream(x)).x)
    assert distance(ours[0], there) <= CLOSE
    assert distance(ours[1], there) > 1e-4
    if spacing == "trailing":  # linspace starts with data that are no point's: its last step goes nowhere
        peer, own = off_the_line(case)
        assert peer > 1e-3
        assert own <= ROUNDED


def test_pndm_scheduler_lands_between_its_own_timesteps() -> None:
    """As DDIMScheduler: it steps down by 1000 // N, and its trailing grid does not, unless N divides 1000."""
    peer, ours = off_the_line(Case("PNDM", {**SD, **TRAILING, "skip_prk_steps": True}, 15, "plms"))
    assert peer > 1e-3
    assert ours <= ROUNDED


def test_pndm_scheduler_evaluates_its_runge_kutta_midpoints_elsewhere() -> None:
    """With an odd 1000 // N its half step goes 12 of 25 timesteps down and the network is told 13. Ours agree."""
    case = Case("PNDM", {**SD, **LEADING}, 40, "pndm")
    peer, ours = off_the_line(case)
    assert peer > 1e-6
    assert ours <= 1e-12


def test_trailing_timesteps_can_be_one_too_many() -> None:
    """np.arange(1000, 0, -1000 / 61) has 62 elements: the last timestep is -1, the noisiest level again."""
    for name in ("DDIM", "DDPM", "EulerDiscrete", "UniPCMultistep", "DEISMultistep"):
        scheduler = scheduler_class(name)(**TRAILING)
        scheduler.set_timesteps(61)
        assert len(scheduler.timesteps) == 62
        assert scheduler.timesteps[-1] == -1
        assert schedules.linear().path(61, spacing="trailing").timestep.tolist() == scheduler.timesteps[:-1].tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_of_all_step_counts(spacing: str) -> None:
    """Apart from that extra element, and one step of linspace, which diffusers puts at the clean end."""
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    for steps in range(2 if spacing == "linspace" else 1, 1000, 7):
        scheduler.set_timesteps(steps)
        ours = schedules.linear().path(steps, spacing=spacing).timestep
        np.testing.assert_array_equal(ours, scheduler.timesteps[:steps].numpy())


def test_log_linear_sigmas_belong_to_other_timesteps() -> None:
    """EulerDiscreteScheduler(interpolation_type="log_linear") spreads its sigmas in log and leaves the timesteps as
    they are. It makes N + 1 of them and appends the end: the run never arrives at it. Ours tells what belongs to the
    level."""
    case = euler({**SD, **TRAILING, "interpolation_type": "log_linear"}, 20)
    peer, _ = off_the_line(case)
    assert peer > 0.1
    assert len(make(case).sigmas) == len(make(case).timesteps) + 2
    path = schedules.scaled_linear().path(20, sigmas="exponential", final_sigma="min")
    assert run(case, F64).sigmas == pytest.approx(path.sigma / path.alpha, rel=2e-5)
    network = PointNetwork(schedules.scaled_linear().alphas_cumprod)
    ours = solvers.sample("euler", network, draw(1).double(), path)
    assert distance(ours, exact(draw(1).double(), path)) <= 1e-10


def test_flow_schedulers_shift_the_end_of_their_grid_twice() -> None:
    """Without given sigmas they spread points down to an end that is shifted already, and then shift them all."""
    shifted = 3 * 0.001 / (1 + 2 * 0.001)
    for name in ("flow-euler-shift", "flow-heun-shift"):
        twice = 3 * shifted / (1 + 2 * shifted)
        case = NAMED[name]
        assert run(case, F64).sigmas[-2] == pytest.approx(twice, rel=1e-6)
        assert schedules.flow(3.0).path(case.steps, spacing="linspace").sigma[-2] == pytest.approx(shifted, rel=1e-12)


# ---- where a run ends ---------------------------------------------------------------------------------------------
def _ends(**config: Any) -> list[tuple[str, dict[str, Any]]]:
    both = {**SD, **KARRAS, **config}
    return [(name, both) for name in ("EulerDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *_ends(**MIN),
        ("DEISMultistep", {**SD, **KARRAS}),
        ("SASolver", {**SD, **KARRAS}),
        ("EDMEuler", MIN),
        ("EDMDPMSolverMultistep", MIN),
        ("CosineDPMSolverMultistep", MIN),
    ],
)
def test_a_sigma_grid_to_the_smallest_sigma_repeats_a_level(name: str, config: dict[str, Any]) -> None:
    """It appends its last level again (DEIS and SA-Solver, which end nowhere else, always): a whole evaluation of the
    network that moves nothing, or, in single steps and with a corrector, one more at the level where the run ends.

    Our path refuses such a grid; by name it arrives at the smallest sigma with its last step.
    """
    scheduler = scheduler_class(name)(**config)
    scheduler.set_timesteps(10)
    repeated = scheduler.sigmas.double().numpy()
    assert repeated[-1] == pytest.approx(repeated[-2], rel=1e-6)
    edm = "EDM" in name or "Cosine" in name
    schedule = schedules.edm(0.3, 500.0) if "Cosine" in name else schedules.edm() if edm else schedules.scaled_linear()
    alpha = np.ones(11) if edm else 1 / np.hypot(1, repeated)
    level = np.append(repeated[:-1], repeated[-2])  # EDM's differ by a rounding
    with pytest.raises(ValueError, match="strictly from more to less noise"):
        pyguide.NoisePath(alpha, alpha * level, np.arange(10)[::-1], schedule)
    curve = "exponential" if "Cosine" in name else "karras"
    ours = schedule.path(9, sigmas=curve, final_sigma="min")
    np.testing.assert_allclose(ours.sigma / ours.alpha, repeated[:-1], rtol=2e-5)


@pytest.mark.parametrize(("name", "solver"), [("DEISMultistep", "deis"), ("SASolver", "sa_solver"), ("TCD", "tcd")])
def test_some_schedulers_never_reach_clean_data(name: str, solver: str) -> None:
    """DEISMultistepScheduler and SASolverScheduler end at their smallest sigma and have no option for less;
    TCDScheduler has one, set_alpha_to_one, on by default, and does not use it. Ours end wherever the path does."""
    config = {"set_alpha_to_one": True} if name == "TCD" else TRAILING
    case = Case(name, {**SD, **config}, 10, solver)
    peer = run(case, F64)
    assert peer.sigmas[-1] > 0.02
    path = schedules.scaled_linear().path(10, spacing="trailing")
    network, z = PointNetwork(peer.table, "v"), draw(3).double()
    ours = solvers.sample(solver, network, draw(1).double(), path, prediction="v", noise=lambda step: z)
    assert distance(ours, torch.full_like(ours, POINT)) <= CLOSE


def test_ddpm_with_large_variance_adds_noise_to_the_finished_sample() -> None:
    """DDPMScheduler leaves out the noise of a step from t = 0, Ho et al. 2020 that of the last step. With an offset,
    and on trailing grids, that starts at t > 0: "fixed_large" adds noise of sqrt(beta) to clean data."""
    config = {**SD, **FREE, **LEADING, "variance_type": "fixed_large"}
    case = Case("DDPM", config, 10, "ddpm", {"variance": "large"})
    peer = run(case, F64)
    ours = Ours(case, peer)
    assert peer.told[-1] == 1
    added = (1 - peer.table[1]) ** 0.5
    assert added > 0.04
    clean = ours.solve()
    assert distance(peer.x - clean, added * ours.normals[2][9].double()) <= CLOSE**1.5
    assert len(ours.plan.stochastic_rows) == 9
