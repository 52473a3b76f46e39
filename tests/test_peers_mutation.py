"""Every coefficient of every solver's table matters to the comparisons with the peers: a change of 1e-3 is found.

One coefficient at a time, multiplied by 1.001. A mutant is found where the limits of test_peers_diffusers.py or of
test_peers_kdiffusion.py fail; float64's, 1e-9, does nearly all of the work, and float32's is asked about the rest. Some
hundreds for each solver, from runs that are short and stay away from pure noise: where a step forgets what came before
(LCM, TCD), or alpha is 1e-4, a coefficient has no weight in the result, and there is nothing to find.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from peers.common import distance, mutants, mutations, results  # noqa: E402
from peers.diffusers_ours import F32, F64  # noqa: E402
from peers.diffusers_stored import CASES, EXACT, stored  # noqa: E402
from test_peers_kdiffusion import META, OURS, case_of  # noqa: E402

import pyguide  # noqa: E402
from pyguide import solvers  # noqa: E402

WANTED, EACH = 400, 100
ALONE: set[str] = set()  # solvers that no peer has


def _eligible(name: str) -> bool:
    case = CASES[name]
    forgets = case.solver in ("lcm", "tcd")
    near_noise = "rescale_betas_zero_snr" in case.config or case.config.get("beta_schedule") == "squaredcos_cap_v2"
    dense = bool(case.config.get("use_beta_sigmas"))  # steps so small that they hardly move anything
    c_skip = case.options.get("timestep_scaling", 10.0) in (None, 0.01) or case.solver != "lcm"  # else it is 1e-8
    return case.steps <= (5 if forgets else 25) and not near_noise and not dense and c_skip


def _diffusers(solver: str) -> Iterator[tuple[str, Any, Any, Any, Any, Any]]:
    """(name, plan, network, start, noises, the peer's float64 result) of stored runs with a solver."""
    for name in (name for name, case in CASES.items() if case.solver == solver and _eligible(name)):
        case = stored(name)
        yield name, case.plan, case.network, case.start(F64), case.noises(case.plan, F64), case.peer[F64]


def _kdiffusion(solver: str) -> Iterator[tuple[str, Any, Any, Any, Any, Any]]:
    """The same of k-diffusion's, in at most 12 steps."""
    for name, (sampler, *_) in META["cases"].items():
        case = case_of(name)
        if OURS.get(sampler, sampler) != solver or case.steps > 12 or len(case.plans) > 1:
            continue
        (plan,) = case.plans
        noises = case.noises(F64, len(plan.stochastic_rows)) if plan.stochastic_rows else None
        peer = case.peer["float64"] * float(case.path.alpha[-1])
        yield name, plan, case.network, case.start(F64), noises, peer


def _clipped(plan: Any, network: Any, start: Any, noises: Any) -> set[tuple[int, int]]:
    """(row, 2) and (row, 3) where an element of D lies on the lower or the upper bound."""
    events = pyguide.Sampler(network, plan).stream(start, noises=noises)
    bounds = [(event.row + 1, j, event.denoised) for event in events for j in (2, 3)]
    return {(i, j) for i, j, denoised in bounds if (denoised == plan.table[i, j]).any()}


def test_every_solver_has_a_peer() -> None:
    """One that no peer has belongs into ALONE: nothing here can vouch for its coefficients."""
    known = {case.solver for case in CASES.values()} | {
        OURS.get(sampler, sampler) for sampler, *_ in META["cases"].values()
    }
    assert known >= set(solvers.names()) - ALONE
    assert not known & ALONE


@pytest.mark.parametrize("solver", sorted(set(solvers.names()) - ALONE))
def test_a_mutated_coefficient_is_found(solver: str) -> None:
    """At least 99 of 100, in each solver."""
    survivors, tried, names = [], 0, 0
    for source in (_diffusers, _kdiffusion):
        for name, plan, network, start, noises, peer in source(solver):
            if tried >= WANTED:
                break
            labels, tables = zip(*mutations(plan, EACH, _clipped(plan, network, start, noises)))
            found = results(plan, [plan.table, *tables], network, start, noises)
            assert distance(found[0], peer) <= EXACT, f"{name}: the plan itself"
            own = pyguide.Sampler(network, plan)(start, noises=noises)
            assert distance(found[0], own) <= 1e-13, f"{name}: the rows run here are not the sampler's"
            tried, names = tried + len(labels), names + 1
            missed = {label for label, x in zip(labels, found[1:]) if distance(x, peer) <= EXACT}
            if missed and source is _diffusers:  # float32's limit, which is wider, rarely sees what float64's did not
                case, every = stored(name), mutants(plan, EACH, _clipped(plan, network, start, noises))
                missed = {label for label, mutant in every if label in missed and case.agrees(mutant, F32)}
            survivors += [f"{name}: {label}" for label in missed]
    assert tried >= 150
    assert names >= 2
    assert len(survivors) <= 0.01 * tried, f"{len(survivors)} of {tried} not found: {survivors}"
