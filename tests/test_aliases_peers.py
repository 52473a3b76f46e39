"""An alias that is the name of a scheduler of diffusers samples what that class does by default, on its own grid.

float64, at 1e-9 of the live, unmodified scheduler: below and above the 15 steps where its last steps change their
order.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from peers.common import distance  # noqa: E402
from peers.diffusers_cases import Case  # noqa: E402
from peers.diffusers_ours import F64, Ours  # noqa: E402
from peers.diffusers_runs import run  # noqa: E402
from peers.diffusers_stored import EXACT  # noqa: E402

from pyguide.solvers.aliases import ALIASES  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
# the two Parallel ones are DDIM and DDPM with another interface; IPNDM drops its first evaluation, see the defects
NAMES = [n for n in ALIASES if n.endswith("Scheduler") and "Parallel" not in n and not n.startswith("IPNDM")]

BOTH_ENDS = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")


@pytest.mark.parametrize("steps", [9, 10, 20])
@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_by_name(name: str, steps: int) -> None:
    scheduler = name.removesuffix("Scheduler")
    # by default PNDM's last step would go from a level to itself, and at odd T // N it is off by half a timestep
    config = {"steps_offset": 1} if scheduler == "PNDM" else {}
    steps = 5 if scheduler == "PNDM" and steps == 9 else steps
    ends = ["zero", "sigma_min"] if scheduler in BOTH_ENDS else [None]
    for end in ends:
        case = Case(scheduler, config if end is None else {**config, "final_sigmas_type": end}, steps, name)
        peer = run(case, F64)
        ours = Ours(case, peer)
        assert distance(ours.sample(ours.plan, F64), peer.x) <= EXACT, end


def test_every_scheduler_whose_solver_is_here_has_an_alias() -> None:
    """Of all scheduler classes of diffusers, those without an alias are other methods or other interfaces."""
    classes = {name for name in dir(diffusers) if name.endswith("Scheduler") and "Flax" not in name}
    unnamed = {name.removesuffix("Scheduler") for name in classes - set(ALIASES)}
    assert not unnamed & {"DPMSolverMultistep", "FlowMatchLCM", "LCM", "UniPCMultistep"}
    assert classes >= {name for name in ALIASES if name.endswith("Scheduler")}
