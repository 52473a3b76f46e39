"""What the tests of the sampler compiler share: paths, solvers and their options, and two runs that owe nothing to the
package.

`run_solver` runs a solver function with a model written from the definitions alone (x = alpha x0 + sigma noise, the
output as a combination of x0 and noise, a 2 x 2 solve). `run_table` reads a plan's table by its published layout. Both
take the same network, noises and edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

import pyguide
from pyguide import schedules, solvers
from pyguide.layout import MAX_SLOTS
from pyguide.trace import trace

STEPS = 7
PREDICTIONS = ("epsilon", "v", "sample", "flow", "edm", "score")
CLIPS = (None, 1.0, (-0.5, 2.0))


def _vp(schedule: Any) -> dict[str, Callable[[], Any]]:
    return {
        "leading": lambda: schedule.path(STEPS, offset=1),
        "trailing": lambda: schedule.path(STEPS, spacing="trailing"),
        "linspace": lambda: schedule.path(STEPS, spacing="linspace"),
        "karras": lambda: schedule.path(STEPS, sigmas="karras"),
        "exponential-min": lambda: schedule.path(STEPS, sigmas="exponential", final_sigma="min"),
        "img2img": lambda: schedule.path(2 * STEPS, strength=0.5),
    }


_PATHS: dict[str, Callable[[], Any]] = {
    **{f"linear-{k}": v for k, v in _vp(schedules.linear()).items()},
    **{f"scaled-{k}": v for k, v in _vp(schedules.scaled_linear()).items()},
    **{f"cosine-{k}": v for k, v in _vp(schedules.cosine()).items()},
    "zero-snr": lambda: schedules.scaled_linear(zero_snr=True).path(STEPS, spacing="trailing"),
    "flow-1": lambda: schedules.flow().path(STEPS),
    "flow-3": lambda: schedules.flow(3.0).path(STEPS),
    "flow-3-linspace": lambda: schedules.flow(3.0).path(STEPS, spacing="linspace", strength=0.8),
    "edm": lambda: schedules.edm().path(STEPS),
    "edm-min": lambda: schedules.edm().path(STEPS, final_sigma="min"),
}
PATHS = list(_PATHS)


@cache
def path_of(name: str) -> Any:
    return _PATHS[name]()


# (solver, options, slots that its recurrence needs; two numbers where edits between rows need one more)
Slots = int | tuple[int, int]
LISTED: list[tuple[str, dict[str, Any], Slots]] = [
    ("ddim", {}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("ddim", {"eta": 1.0, "use_clipped_model_output": True}, 1),
    ("ddpm", {}, 1),
    ("ddpm", {"variance": "large"}, 1),
    ("euler", {}, 1),
    ("euler", {"s_churn": 4.0, "s_tmin": 0.1, "s_noise": 1.002}, 1),
    ("euler_ancestral", {}, 1),
    ("euler_ancestral", {"eta": 0.4, "s_noise": 1.1}, 1),
    ("heun", {}, 2),
    ("heun", {"s_churn": 3.0, "s_noise": 1.003, "s_tmax": 50.0}, 2),
    ("dpm2", {}, 2),
    ("dpm2", {"s_churn": 3.0, "s_tmin": 0.1}, 2),
    ("dpm2_ancestral", {}, 2),
    ("dpmpp_1", {}, 1),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m", {"lower_order_final": True, "solver_type": "heun"}, 2),
    ("dpmpp_3m", {}, 3),
    ("dpmpp_3m", {"lower_order_final": True}, 3),
    ("dpmpp_2s", {}, 2),
    ("dpmpp_2s", {"inner": "grid", "solver_type": "heun"}, 2),
    ("dpmpp_3s", {}, (2, 3)),
    ("dpmpp_3s", {"inner": "grid", "lower_order_final": True}, (2, 3)),
    ("dpmpp_2s_ancestral", {}, 2),
    ("dpmpp_sde", {}, 2),
    ("dpmpp_sde", {"eta": 0.5, "r": 0.4, "s_noise": 1.01}, 2),
    ("dpmpp_2m_sde", {}, 2),
    ("dpmpp_2m_sde", {"solver_type": "heun", "eta": 0.4}, 2),
    ("dpmpp_3m_sde", {}, 3),
    ("dpm_solver_1", {}, 1),
    ("dpm_solver_2m", {}, 2),
    ("dpm_solver_2m", {"solver_type": "heun", "lower_order_final": True}, 2),
    ("dpm_solver_3m", {}, 3),
    ("dpm_solver_2m_sde", {}, 2),
    ("dpm_solver_2s", {}, 2),
    ("dpm_solver_3s", {}, (2, 3)),
    ("unipc", {}, 3),
    ("unipc", {"order": 1}, 2),
    ("unipc", {"order": 1, "corrector": False}, 1),
    ("unipc", {"corrector": False, "solver_type": "bh1"}, 2),
    ("unipc", {"solver_type": "bh1", "lower_order_final": False}, 3),
    ("unipc", {"order": 3}, 4),
    ("unipc", {"order": 3, "solver_type": "bh1", "lower_order_final": False}, 4),
    ("unipc", {"order": 3, "corrector": False}, 3),
    ("unipc", {"predict_x0": False, "disable_corrector": (0, 3)}, 3),
    ("deis", {}, 2),
    ("deis", {"order": 3}, 3),
    ("lms", {}, 4),
    ("lms", {"order": 2}, 2),
    ("plms", {}, 4),
    ("pndm", {}, (5, 6)),
    ("ipndm", {}, 4),
    ("sa_solver", {}, 3),
    ("sa_solver", {"predictor_order": 3, "corrector_order": 4, "tau": 0.5}, 4),
    ("lcm", {}, 1),
    ("lcm", {"timestep_scaling": None}, 1),
    ("tcd", {}, 1),
]
# a solver that is registered and not listed is certified with its defaults, whatever slots it takes
SOLVERS = LISTED + [(name, {}, MAX_SLOTS) for name in solvers.names() if name not in {case[0] for case in LISTED}]


def slots_of(case: tuple[str, dict[str, Any], Slots], editable: bool) -> int:
    return case[2] if isinstance(case[2], int) else case[2][editable]


def case_name(case: tuple[str, dict[str, Any], Slots]) -> str:
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())])


def undefined(path: Any, solver: str, options: dict[str, Any], prediction: str) -> bool:
    """Combinations that theory rules out: epsilon and score say nothing about x0 at alpha = 0; churn adds noise without
    scaling the data, which a flow path cannot. A solver that is not listed may refuse pure noise too."""
    at_noise = bool(path.alpha[0] == 0)
    flow = bool(np.allclose(path.alpha + path.sigma, 1))
    listed = any(solver == case[0] for case in LISTED)
    return (at_noise and (prediction in ("epsilon", "score") or (not listed and _refuses(solver, path)))) or (
        flow and "s_churn" in options
    )


def _refuses(solver: str, path: Any) -> bool:
    try:
        trace(solvers.resolve(solver), path)
    except ValueError as error:
        return str(error).startswith("path: ")
    return False


# ---- a random network, and what it is told ---------------------------------------------------------------------------
class Network:
    """A bounded, smooth, nonlinear function of (x, t) of its own at every element; magnitudes span six decades."""

    def __init__(self, seed: int, size: int = 8, magnitudes: Iterable[float] = (3e-3, 0.7, 2e2)) -> None:
        rng = np.random.default_rng(seed)
        self.magnitude = np.repeat(np.array(list(magnitudes)), size)
        self.parts = len(self.magnitude) // size
        n = len(self.magnitude)
        self.gain, self.phase, self.offset = rng.uniform(0.3, 0.9, n), rng.uniform(0, 6, n), rng.uniform(-1, 1, n)
        self.start = rng.standard_normal(n) * self.magnitude
        self.noises = rng.standard_normal((200, n)) * self.magnitude
        self.edits = 0.2 * rng.standard_normal((200, n)) * self.magnitude

    def __call__(self, x: Any, t: float) -> Any:
        return self.magnitude * (
            np.arctan(self.gain * x / self.magnitude + self.offset) + 0.3 * np.cos(self.phase + t / 170)
        )

    def distance(self, a: Any, b: Any) -> float:
        """Largest relative distance over the magnitudes; NaN counts as infinite."""
        worst = 0.0
        for part in np.split(np.arange(len(self.magnitude)), self.parts):
            worst = np.fmax(worst, np.nan_to_num(np.abs(a[part] - b[part]).max(), nan=np.inf) / np.abs(b[part]).max())
        return float(worst)


def clean_and_noise(prediction: str, x: Any, m: Any, alpha: float, sigma: float, sigma_data: float) -> tuple[Any, Any]:
    """(x0, noise) from the definitions: x = alpha x0 + sigma noise and m = p x0 + q noise."""
    if prediction == "edm":  # Karras et al. 2022, table 1, for y = x / alpha at s = sigma / alpha
        if alpha == 0:  # the limit s -> infinity: c_skip y -> 0, c_out -> sigma_data
            return sigma_data * m, x / sigma
        s, y = sigma / alpha, x / alpha
        root = np.sqrt(s**2 + sigma_data**2)
        x0 = sigma_data**2 / root**2 * y + s * sigma_data / root * m
        return x0, (x - alpha * x0) / sigma
    p, q = {"epsilon": (0, 1), "v": (-sigma, alpha), "sample": (1, 0), "flow": (-1, 1), "score": (0, -1 / sigma)}[
        prediction
    ]
    determinant = alpha * q - sigma * p
    return (q * x - sigma * m) / determinant, (alpha * m - p * x) / determinant


def network_input(prediction: str, x: Any, alpha: float, sigma: float, sigma_data: float) -> Any:
    return x / np.sqrt(sigma**2 + (alpha * sigma_data) ** 2) if prediction == "edm" else x


class Output:
    def __init__(self, denoised: Any, noise: Any) -> None:
        self.denoised, self.noise = denoised, noise

    def gaussian(self, mean: Any, variance: float, z: Any) -> Any:
        return mean if z is None else mean + np.sqrt(variance) * z


@dataclass
class Run:
    inputs: list[Any] = field(default_factory=list)  # x at each evaluation, edits included
    draws: dict[int, list[Any]] = field(default_factory=dict)  # row -> the solver's draws
    result: Any = None
    condition: float = 0.0  # of a table's rows: largest |coefficient| times sum |operands| over |next x|, the largest


def run_solver(
    function: Callable[..., Any],
    path: Any,
    network: Network,
    prediction: str,
    clip: Any,
    edited: bool,
    options: Any,
    wobble: int = 0,
) -> Run:
    """The solver with arrays. wobble: change every input and output of the network by one ulp, at random (a seed)."""
    low, high = (-np.inf, np.inf) if clip is None else clip if isinstance(clip, tuple) else (-clip, clip)
    run, sign = Run(), np.random.default_rng(wobble)

    def model(x: Any, level: Any) -> Output:
        here = path.level(level) if isinstance(level, int) else level
        if edited:
            x += network.edits[len(run.inputs)]
        if wobble:
            x *= 1 + 2.0**-52 * sign.choice([-1, 1], len(x))
        run.inputs.append(x.copy())
        data = path.schedule.sigma_data
        m = network(network_input(prediction, x, here.alpha, here.sigma, data), here.timestep)
        if wobble:
            m = m * (1 + 2.0**-52 * sign.choice([-1, 1], len(m)))
        clean, noise = clean_and_noise(prediction, x, m, here.alpha, here.sigma, data)
        return Output(np.clip(clean, low, high), noise)

    def noise(step: int) -> Any:
        z = network.noises[sum(map(len, run.draws.values()))]
        run.draws.setdefault(len(run.inputs), []).append(z)
        return z.copy()

    run.result = function(model, network.start * path.init_scale, path.drawing(noise), noise=noise, **options)
    return run


# ---- the table, by its layout ----------------------------------------------------------------------------------------
@dataclass
class TableRow:
    head: Any  # a_x a_g clip_lo clip_hi c_in timestep var_lo var_hi
    T: Any
    d: Any
    e: Any
    n: Any
    q: Any

    @property
    def coefficients(self) -> Any:  # [M, M + 4]
        return np.column_stack([self.T, self.d, self.e, self.n, self.q])

    @property
    def reads(self) -> set[int]:
        read = {int(c) for c in np.flatnonzero(self.T.any(axis=0))}
        return read | ({0} if self.d.any() and self.head[0] != 0 else set())

    @property
    def writes(self) -> set[int]:
        return {int(r) for r in np.flatnonzero(self.coefficients.any(axis=1))} | {0}


def table_rows(plan: Any) -> list[TableRow]:
    M = int(np.sqrt(4 + plan.table.shape[1] - 8)) - 2  # W - 8 = M M + 4 M = (M + 2)^2 - 4
    assert plan.table.shape[1] == 8 + M * M + 4 * M
    assert plan.slots == M
    rows = []
    for values in plan.table:
        head, T, rest = values[:8], values[8 : 8 + M * M].reshape(M, M), values[8 + M * M :].reshape(4, M)
        rows.append(TableRow(head, T, *rest))
    return rows


def live_slots(rows: list[TableRow]) -> list[set[int]]:
    """Slots that row i or a later one reads before they are written; [0] must be {0} at most."""
    live: set[int] = {0}  # the result
    out = []
    for row in reversed(rows):
        kept = {r for r in live if r not in row.writes}
        live = kept | row.reads
        out.append(live)
    return out[::-1]


def run_table(plan: Any, network: Any, draws: dict[int, list[Any]], start: Any, edits: Any = None) -> Run:
    """The plan, one row after another. Every slot that nothing reads again is NaN; so is noise that a row does not
    use."""
    rows = table_rows(plan)
    live = live_slots(rows)
    assert live[0] <= {0}, f"slots {live[0] - {0}} are read before they are written"
    nan = np.full_like(start, np.nan)
    slots, run, m = [start.copy(), *[nan.copy()] * (plan.slots - 1)], Run(), nan
    for i, row in enumerate(rows):
        slots = [s if c in live[i] else nan.copy() for c, s in enumerate(slots)]
        a_x, a_g, low, high, c_in, timestep = row.head[:6]
        D = nan
        if row.d.any():
            D = np.clip(sum(c * v for c, v in ((a_x, slots[0]), (a_g, m)) if c != 0), low, high)
        z = draws[i][0] if row.n.any() else nan
        new = list(slots)
        for r in row.writes:
            operands = [*slots, D, m, z, nan]
            read = [(c, v) for c, v in zip(row.coefficients[r], operands) if c != 0]
            new[r] = sum((c * v for c, v in read), np.zeros_like(start))
            for part in np.split(np.arange(len(start)), network.parts) if r == 0 else ():
                size = max(abs(c) for c, _ in read) * sum(np.abs(v[part]).max() for _, v in read)
                run.condition = max(run.condition, float(size / np.abs(new[0][part]).max()))
        slots = new
        if i < plan.evaluations:
            if edits is not None:
                slots[0] = slots[0] + edits[i]
            run.inputs.append(slots[0])
            m = network(c_in * slots[0], timestep)
    run.result = slots[0]
    return run


def replay_error(plan: Any, run: Run, network: Network, path: Any, edited: bool) -> float:
    """Largest relative distance of the table from a run of the solver, over every model input and the result.

    `run.condition`: what the rows make of coefficients that are solved for to the rounding of the largest one.
    """
    table = run_table(plan, network, run.draws, network.start * path.init_scale, network.edits if edited else None)
    run.condition = table.condition
    pairs = zip([*table.inputs, table.result], [*run.inputs, run.result])
    assert len(table.inputs) == len(run.inputs)
    return max(network.distance(a, b) for a, b in pairs)


def rounding(
    run: Run, function: Any, path: Any, network: Network, prediction: str, clip: Any, edited: bool, options: Any
) -> float:
    """How far the solver itself moves if its network's inputs and outputs change by an ulp: its own float64
    accuracy."""
    worst = 0.0
    for seed in (1, 2, 3):
        other = run_solver(function, path, network, prediction, clip, edited, options, wobble=seed)
        pairs = zip([*other.inputs, other.result], [*run.inputs, run.result])
        worst = max(worst, *(network.distance(a, b) for a, b in pairs))
    return worst


def compiled(solver: Any, path: Any, prediction: str, **options: Any) -> Any:
    return pyguide.compile(solver, path, prediction=prediction, **options)
