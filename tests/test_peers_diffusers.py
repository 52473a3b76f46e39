"""pyguide against diffusers' schedulers, live and unmodified; peers/diffusers_runs.py says how both are run.

distance is max |a - b| / max |b|. For every configuration, on the peer's own grid, its timesteps and sigmas as numbers:

    float32   |pyguide - peer| <= max(1e-5, 1.5 |peer - peer in float64|)
    float64   |pyguide - peer| <= 1e-9, for the compiled plan and for the solver run with tensors: the same formulas

and in float32 where our own names (spacing, offset, final_sigma, Karras, strength) name that grid. There the tables
differ: diffusers computes alphas_cumprod in float32, a thousand products that miss the float64 ones by up to 1e-6.
The limit is the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from peers.common import distance, mutants  # noqa: E402
from peers.diffusers_runs import (  # noqa: E402
    SHAPE,
    TIMES,
    Case,
    draw,
    peer_grid,
    run_ours,
    run_peer,
    start,
    supplied,
)

import pyguide  # noqa: E402
from pyguide import schedules, solvers  # noqa: E402

EXACT, CLOSE = 1e-9, 1e-5
F32, F64 = torch.float32, torch.float64

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
LEADING, TRAILING = {"timestep_spacing": "leading", "steps_offset": 1}, {"timestep_spacing": "trailing"}
V, X0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
MIN, KARRAS, ZERO_SNR = (
    {"final_sigmas_type": "sigma_min"},
    {"use_karras_sigmas": True},
    {"rescale_betas_zero_snr": True},
)
BH1, FULL = {"solver_type": "bh1"}, {"lower_order_final": False}
FREE, SD_MIN = {"clip_sample": False}, {"set_alpha_to_one": False}
EULER, ANCESTRAL, HEUN = "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"


def sd(**path: Any) -> Any:
    return schedules.scaled_linear(), path


def linear(**path: Any) -> Any:
    return schedules.linear(), path


def ddim(config: dict[str, Any], steps: int, eta: float = 0.0, rederive: bool = False, **rest: Any) -> Case:
    both = {"eta": eta, "use_clipped_model_output": rederive}
    return Case("DDIM", config, steps, options=both, step=both, **rest)


def dpm(config: dict[str, Any], steps: int, **rest: Any) -> Case:
    """Theirs lowers the last order below 15 steps, ours when asked."""
    options = {"lower_order_final": steps < 15 and config.get("lower_order_final", True)}
    return Case("DPMSolverMultistep", config, steps, options=options, **rest)


def unipc(order: int, config: dict[str, Any], steps: int, **rest: Any) -> Case:
    options = {name: config[name] for name in ("solver_type", "lower_order_final") if name in config}
    if "disable_corrector" in config:
        options["corrector"] = False
    return Case("UniPCMultistep", {"solver_order": order, **config}, steps, options={"order": order, **options}, **rest)


def flow(shift: float, steps: int, given: bool = False, heun: bool = False, **rest: Any) -> Case:
    """given: the sigmas 1, 1 - 1/N .. 1/N, as a pipeline passes them; else the scheduler's own."""
    sigmas = np.linspace(1, 1 / steps, steps).tolist() if given else None
    own = (schedules.flow(shift), {"spacing": "leading" if given else "linspace"}) if given or shift == 1 else None
    name = "FlowMatchHeunDiscrete" if heun else "FlowMatchEulerDiscrete"
    return Case(name, {"shift": shift}, steps, given=sigmas, own=own, **rest)


TRAIL, TRAIL_MIN = sd(spacing="trailing"), sd(spacing="trailing", final_sigma="min")
TRAIL_ZERO_SNR = (schedules.scaled_linear(zero_snr=True), {"spacing": "trailing"})
COSINE_CLIP = {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.8}

CASES: dict[str, Case] = {
    "ddim-leading-min": ddim({**SD, **FREE, **LEADING, **SD_MIN}, 50, own=sd(offset=1, final_sigma="min")),
    "ddim-leading": ddim({**SD, **FREE}, 20, own=sd()),
    "ddim-clip-eta-half": ddim(LINEAR, 25, 0.5, own=linear()),
    "ddim-clip-rederived-eta-1": ddim(LINEAR, 10, 1.0, True, own=linear()),
    "ddim-clip-min": ddim({**SD, **LEADING, **SD_MIN}, 25, own=sd(offset=1, final_sigma="min")),
    "ddim-clip-rederived-min": ddim({**SD, **LEADING, **SD_MIN}, 25, 0.0, True, own=sd(offset=1, final_sigma="min")),
    "ddim-v-zero-snr": ddim({**SD, **FREE, **V, **TRAILING, **ZERO_SNR}, 25, own=TRAIL_ZERO_SNR),
    "ddim-v-zero-snr-eta-1": ddim({**SD, **FREE, **V, **TRAILING, **ZERO_SNR}, 10, 1.0, own=TRAIL_ZERO_SNR),
    "ddim-sample-eta-1": ddim({**LINEAR, **FREE, **X0, **TRAILING}, 20, 1.0, own=linear(spacing="trailing")),
    "ddim-linspace": ddim(
        # where the grids agree: with as many steps as training steps, see the defects below
        {**LINEAR, **FREE, "timestep_spacing": "linspace", "num_train_timesteps": 100},
        100,
        own=(schedules.linear(train_steps=100), {"spacing": "linspace"}),
    ),
    "ddim-v-cosine-clip": ddim({**COSINE_CLIP, **V}, 5, own=(schedules.cosine(), {})),
    "ddim-img2img": ddim({**SD, **FREE, **LEADING, **SD_MIN}, 20, strength=0.6, own=sd(offset=1, final_sigma="min")),
    "euler-linspace": Case(EULER, SD, 25),
    "euler-v-leading": Case(EULER, {**SD, **LEADING, **V}, 20, own=sd(offset=1)),
    "euler-sample-trailing": Case(EULER, {**SD, **TRAILING, **X0}, 10, own=TRAIL),
    "euler-karras": Case(EULER, {**SD, **KARRAS}, 20, own=sd(sigmas="karras")),
    "euler-exponential": Case(EULER, {**SD, "use_exponential_sigmas": True}, 5, own=sd(sigmas="exponential")),
    "euler-min": Case(EULER, {**SD, **TRAILING, **MIN}, 20, own=TRAIL_MIN),
    "euler-v-zero-snr": Case(EULER, {**SD, **TRAILING, **V, **ZERO_SNR}, 50),  # sigma 4096, not our infinite one
    "euler-img2img": Case(EULER, {**SD, **LEADING}, 25, strength=0.8, own=sd(offset=1)),
    "ancestral-leading": Case(ANCESTRAL, {**SD, **LEADING}, 25, own=sd(offset=1)),
    "ancestral-linspace": Case(ANCESTRAL, SD, 50),
    "ancestral-v-trailing": Case(ANCESTRAL, {**SD, **V, **TRAILING}, 20, own=TRAIL),
    "ancestral-v-zero-snr": Case(ANCESTRAL, {**SD, **V, **TRAILING, **ZERO_SNR}, 10),
    "ancestral-img2img": Case(ANCESTRAL, {**SD, **LEADING}, 20, strength=0.5, own=sd(offset=1)),
    "heun-linspace": Case(HEUN, SD, 10),
    "heun-v-trailing": Case(HEUN, {**SD, **V, **TRAILING}, 20, own=TRAIL),
    "heun-sample-karras": Case(HEUN, {**SD, **X0, **KARRAS}, 25, own=sd(sigmas="karras")),
    "heun-clip": Case(HEUN, {**SD, **LEADING, "clip_sample": True}, 10, own=sd(offset=1)),
    "heun-img2img": Case(HEUN, {**SD, **LEADING}, 20, strength=0.5, own=sd(offset=1)),
    "dpm-trailing": dpm({**SD, **TRAILING}, 20, own=TRAIL),
    "dpm-min": dpm({**SD, **TRAILING, **MIN}, 25, own=TRAIL_MIN),
    "dpm-min-lower-order-final": dpm({**SD, **TRAILING, **MIN}, 10, own=TRAIL_MIN),
    "dpm-min-full-order": dpm({**SD, **TRAILING, **MIN, **FULL}, 5, own=TRAIL_MIN),
    "dpm-v-karras": dpm({**SD, **KARRAS, **V}, 20),  # its timesteps are rounded, ours are not: as numbers only
    "dpm-linspace": dpm(SD, 50),
    "dpm-sample-leading": dpm({**LINEAR, **LEADING, **X0}, 25),
    "dpm-v-zero-snr": dpm({**SD, **V, **TRAILING, **ZERO_SNR}, 20),
    "dpm-flow": dpm({**FLOW, "flow_shift": 3.0}, 20),
    "dpm-1-is-ddim": Case("DPMSolverMultistep", {**SD, **TRAILING, "solver_order": 1}, 20, own=TRAIL, solver="ddim"),
    "dpm-img2img": dpm({**SD, **TRAILING}, 25, strength=0.6, own=TRAIL),
    "unipc-1": unipc(1, {**SD, **TRAILING}, 20, own=TRAIL),
    "unipc-2": unipc(2, {**SD, **TRAILING}, 20, own=TRAIL),
    "unipc-3": unipc(3, {**SD, **TRAILING}, 25, own=TRAIL),
    "unipc-3-in-5-steps": unipc(3, {**SD, **TRAILING}, 5, own=TRAIL),
    "unipc-2-bh1-min": unipc(2, {**SD, **TRAILING, **MIN, **BH1}, 10, own=TRAIL_MIN),
    "unipc-3-bh1-min": unipc(3, {**SD, **TRAILING, **MIN, **BH1}, 20, own=TRAIL_MIN),
    "unipc-3-min-full-order": unipc(3, {**SD, **TRAILING, **MIN, **FULL}, 10, own=TRAIL_MIN),
    "unipc-2-predictor-only": unipc(2, {**SD, "disable_corrector": list(range(25))}, 25),
    "unipc-v-karras": unipc(2, {**SD, **KARRAS, **V}, 20),
    "unipc-sample-leading": unipc(2, {**LINEAR, **LEADING, **X0}, 50),
    "unipc-flow": unipc(2, {**FLOW, "flow_shift": 3.0}, 20),
    "unipc-3-flow": unipc(3, FLOW, 10),
    "unipc-v-zero-snr": unipc(2, {**SD, **V, **TRAILING, **ZERO_SNR}, 20),
    "unipc-img2img": unipc(2, {**SD, **TRAILING}, 20, strength=0.6, own=TRAIL),
    "flow-euler": flow(1.0, 20),
    "flow-euler-given": flow(1.0, 50, given=True),
    "flow-euler-shift": flow(3.0, 10),
    "flow-euler-shift-given-is-ddim": flow(3.0, 25, given=True, solver="ddim"),
    "flow-euler-img2img": flow(3.0, 20, given=True, strength=0.7),
    "flow-heun": flow(1.0, 10, heun=True),
    "flow-heun-shift": flow(3.0, 20, heun=True),
    "edm-karras": Case("EDMEuler", {}, 20, own=(schedules.edm(), {})),
    "edm-exponential": Case(
        "EDMEuler",
        {"sigma_schedule": "exponential", "sigma_min": 0.01},
        10,
        own=(schedules.edm(0.01), {"sigmas": "exponential"}),
    ),
}
every = pytest.mark.parametrize("name", CASES)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2


class Peer:
    """The two runs of a scheduler, our path on its grid, and the comparison as a verdict on any plan."""

    known: dict[str, Peer] = {}  # noqa: RUF012

    def __init__(self, case: Case) -> None:
        self.case, self.path = case, peer_grid(case)
        self.result = {F32: run_peer(case, F32), F64: run_peer(case, F64)}
        self.bound = {F32: max(CLOSE, 1.5 * distance(self.result[F32], self.result[F64])), F64: EXACT}

    @classmethod
    def of(cls, name: str) -> Peer:
        if name not in cls.known:
            cls.known[name] = cls(CASES[name])
        return cls.known[name]

    def agrees(self, plan: pyguide.Plan, dtype: torch.dtype) -> bool:
        return distance(run_ours(self.case, self.path, dtype, plan), self.result[dtype]) <= self.bound[dtype]


@every
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_float32(name: str, backend: str) -> None:
    peer = Peer.of(name)
    ours = run_ours(peer.case, peer.path, F32, backend=backend)
    assert distance(ours, peer.result[F32]) <= peer.bound[F32]


@every
def test_float64(name: str) -> None:
    peer = Peer.of(name)
    assert distance(run_ours(peer.case, peer.path, F64), peer.result[F64]) <= EXACT


@every
def test_solver_with_tensors(name: str) -> None:
    """solvers.sample, the reference, in float64."""
    peer, case = Peer.of(name), CASES[name]
    noises = supplied(100, F64)
    x = solvers.sample(
        case.plan(peer.path).solver,
        case.network,
        start(case, peer.path, F64),
        peer.path,
        prediction=case.prediction,
        clip=case.clip,
        noise=noises.__getitem__,
        **case.options,
    )
    assert distance(x, peer.result[F64]) <= EXACT


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.own])
def test_own_names(name: str) -> None:
    """Our names make the peer's grid, up to the float32 of its tables, and the same samples."""
    peer, path = Peer.of(name), CASES[name].own_path()
    # fractional timesteps are interpolated in a table, and Karras points start from sigma_min, which misses by 1.3e-5
    np.testing.assert_allclose(path.timestep, peer.path.timestep, rtol=1e-6, atol=2e-3)
    np.testing.assert_allclose(path.sigma**2, peer.path.sigma**2, rtol=3e-5, atol=2e-6)
    np.testing.assert_allclose(path.alpha**2, peer.path.alpha**2, rtol=3e-5, atol=2e-6)
    assert distance(run_ours(peer.case, path, F32), peer.result[F32]) <= peer.bound[F32]


def test_guided_as_in_a_pipeline() -> None:
    """Classifier-free guidance as Stable Diffusion's pipeline writes it, against CFG: one batch of both branches."""

    def network(x: Any, t: Any, y: Any) -> Any:
        return TIMES(x + y[:, None, None, None], t)

    case, uncond, cond = CASES["dpm-trailing"], torch.zeros(SHAPE[0]), torch.tensor([0.7, -0.4])
    path, result = peer_grid(case), {}
    for dtype in (F32, F64):
        scheduler, x = case.make(), draw(1).to(dtype)
        with torch.no_grad():
            for t in scheduler.timesteps:
                inputs = scheduler.scale_model_input(torch.cat([x] * 2), t)
                low, high = network(inputs, t, torch.cat([uncond, cond]).to(dtype)).chunk(2)
                x = scheduler.step(low + 7.5 * (high - low), t, x, return_dict=False)[0]
        result[dtype] = x
    sampler = pyguide.Sampler(network, case.plan(path), pyguide.CFG(7.5))
    ours = sampler(draw(1), cond={"y": cond}, uncond={"y": uncond})
    assert distance(ours, result[F32]) <= max(CLOSE, 1.5 * distance(result[F32], result[F64]))


DDIM_MUTATED = ("ddim-clip-eta-half", "ddim-clip-rederived-min", "ddim-sample-eta-1", "ddim-v-zero-snr")
EULER_MUTATED = ("ancestral-leading", "edm-karras", "flow-euler-given")
HEUN_MUTATED = ("heun-clip", "heun-v-trailing", "flow-heun")
MULTISTEP_MUTATED = ("dpm-min", "unipc-2", "unipc-3", "unipc-2-bh1-min", "unipc-flow")


@pytest.mark.parametrize("name", DDIM_MUTATED + EULER_MUTATED + HEUN_MUTATED + MULTISTEP_MUTATED)
def test_a_mutated_coefficient_is_found(name: str) -> None:
    """One coefficient times 1.001: the comparisons above fail for at least 99 of 100 coefficients.

    float32's limit alone sees 55 to 100 of 100: many move the result by less than 1e-5. float64's sees all.
    """
    peer = Peer.of(name)
    plan = peer.case.plan(peer.path)
    assert peer.agrees(plan, F32)
    assert peer.agrees(plan, F64)
    survivors, tried = [], 0
    for label, mutant in mutants(plan, 100, clipped(peer, plan)):
        tried += 1
        if peer.agrees(mutant, F64) and peer.agrees(mutant, F32):
            survivors.append(label)
    assert tried >= 75
    assert len(survivors) <= 0.01 * tried, f"{len(survivors)} of {tried} not found: {survivors}"


def clipped(peer: Peer, plan: pyguide.Plan) -> set[tuple[int, int]]:
    """(row, 2) and (row, 3) where an element of D lies on the lower or the upper bound."""
    noises = supplied(len(plan.stochastic_rows), F64)
    events = pyguide.Sampler(peer.case.network, plan).stream(start(peer.case, peer.path, F64), noises=noises)
    bounds = [(event.row + 1, j, event.denoised) for event in events for j in (2, 3)]
    return {(i, j) for i, j, denoised in bounds if (denoised == plan.table[i, j]).any()}


# ---- where the peer is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 15)])
def test_ddim_scheduler_lands_between_its_own_timesteps(spacing: str, steps: int) -> None:
    """DDIMScheduler steps down by 1000 // N whatever its grid is: to 899 where its next timestep is 888.

    The next evaluation tells the network a timestep that is not the state's. Ours lands where the next one starts.
    """
    case = ddim({**SD, **FREE, "timestep_spacing": spacing}, steps)
    scheduler, path = case.make(), peer_grid(case)
    first, second = scheduler.timesteps[:2].tolist()
    landing = first - 1000 // steps
    assert landing != second
    x = draw(1)
    there = scheduler.step(case.network(x, torch.tensor(first)), first, x, return_dict=False)[0]
    schedule = schedules.from_alphas_cumprod(scheduler.alphas_cumprod.tolist())
    ours = [
        next(pyguide.Sampler(case.network, case.plan(p)).stream(x)).x
        for p in (schedule.path(timesteps=[first, landing]), path)
    ]
    assert distance(ours[0], there) <= CLOSE
    assert distance(ours[1], there) > 1e-4
    assert path.alpha[1] == pytest.approx(float(scheduler.alphas_cumprod[second]) ** 0.5, rel=1e-6)


def test_trailing_timesteps_can_be_one_too_many() -> None:
    """np.arange(1000, 0, -1000 / 61) has 62 elements: the last timestep is -1, the noisiest level again."""
    for name in ("DDIM", "EulerDiscrete", "UniPCMultistep"):
        scheduler = getattr(diffusers, f"{name}Scheduler")(**TRAILING)
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


@pytest.mark.parametrize("config", [BH1, FULL], ids=["bh1", "full-order"])
def test_unipc_scheduler_is_not_finite_at_clean_data(config: dict[str, Any]) -> None:
    """Its last step multiplies an infinite h by zero (bh1), or divides by h_k / h = 0 (order 2). Ours takes the limit.

    In the limit the differences have no weight: the result is the last D, as with bh2 and lower_order_final.
    """
    case, usual = unipc(2, {**SD, **TRAILING, **config}, 10), unipc(2, {**SD, **TRAILING}, 10)
    assert not run_peer(case, F32).isfinite().any()
    path = peer_grid(case)
    last = [list(pyguide.Sampler(case.network, c.plan(path)).stream(draw(1)))[-1] for c in (case, usual)]
    for event in last:
        assert distance(event.x, event.denoised) <= CLOSE


def test_flow_schedulers_shift_the_end_of_their_grid_twice() -> None:
    """Without given sigmas they spread points down to an end that is shifted already, and then shift them all."""
    shifted = 3 * 0.001 / (1 + 2 * 0.001)
    for case in (CASES["flow-euler-shift"], CASES["flow-heun-shift"]):
        twice = 3 * shifted / (1 + 2 * shifted)
        assert peer_grid(case).sigma[-2] == pytest.approx(twice, rel=1e-6)
        assert schedules.flow(3.0).path(case.steps, spacing="linspace").sigma[-2] == pytest.approx(shifted, rel=1e-12)


@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_karras_to_the_smallest_sigma_repeats_a_level(name: str) -> None:
    """final_sigmas_type="sigma_min" on a Karras grid appends its last level again, an evaluation that moves nothing.

    Our path refuses such a grid; by name it arrives at the smallest sigma with its last step.
    """
    scheduler = getattr(diffusers, f"{name}Scheduler")(**SD, **KARRAS, **MIN)
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
    with pytest.raises(ValueError, match=r"strictly from more to less noise|at the smallest sigma"):
        peer_grid(Case(name, {**SD, **KARRAS, **MIN}, 10))
    ours = schedules.scaled_linear().path(9, sigmas="karras", final_sigma="min")
    np.testing.assert_allclose(ours.sigma / ours.alpha, scheduler.sigmas[:-1].double(), rtol=2e-5)
