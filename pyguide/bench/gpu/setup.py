"""What a run of the GPU suite is made of: where, with which back ends, how large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ... import backends
from ...backends import Backend
from ..clock import Clock, CudaClock, HostClock
from ..extras import missing, require
from ..step import compile_error

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """Shapes of x and steps of the samplers."""

    small: tuple[Shape, ...]  # latents of usual size
    large: tuple[Shape, ...]  # the first: of every solver and dtype
    replay_steps: int  # in one graph: many, because its reset counts
    throughput_steps: int
    host_steps: int
    end_steps: int
    counted_steps: tuple[int, int]  # of two runs: what the longer one has more of is counted
    unet: Shape
    solvers: tuple[str, ...] = ("dpmpp_2m", "ddim", "unipc")  # the first is the one that peers are compared with
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")  # of model inputs and outputs


FULL = Sizes(
    small=((1, 4, 64, 64), (1, 16, 128, 128)),
    large=((4, 16, 512, 512), (16, 16, 512, 512)),  # a slot of the state: 67 MB, 268 MB
    replay_steps=100,
    throughput_steps=20,
    host_steps=50,
    end_steps=25,
    counted_steps=(10, 50),
    unet=(1, 4, 64, 64),
)
TINY = Sizes(
    small=((1, 4, 4, 4),),
    large=((1, 4, 4, 8),),
    replay_steps=5,
    throughput_steps=5,
    host_steps=5,
    end_steps=4,
    counted_steps=(2, 3),
    unet=(1, 4, 16, 16),
    solvers=("dpmpp_2m", "unipc"),
    dtypes=("float32", "bfloat16"),
)


@dataclass(frozen=True)
class Setup:
    """clock: "cuda", or "host" for a rehearsal, whose rows measure nothing. compiler: backend of torch.compile, None
    without it. dependent: whether programmatic dependent launch can be switched on."""

    clock: Clock
    sizes: Sizes
    backends: tuple[Backend, ...]
    compiler: str | None
    dependent: bool
    rounds: int
    seconds: float  # of each contender in a round

    @property
    def on_gpu(self) -> bool:
        return self.clock.name == "cuda"

    def row(self, what: str, contender: str) -> dict[str, Any]:
        """What every row of the suite begins with."""
        return {"suite": "gpu", "what": what, "clock": self.clock.name, "contender": contender}


def prepare(device: str, *, dry: bool, rounds: int, compiled: bool, notes: list[str]) -> Setup:
    """The setup for a device; what is left out and why goes into `notes`.

    dry: tiny sizes, the host's clock, torch.compile without a compiler behind it. Triton takes part in that only under
    its interpreter (TRITON_INTERPRET=1).
    """
    kind = "cpu" if dry else "cuda"
    runs: list[Backend] = []
    for name in backends.FUSED:
        why = backends.why_not(name, kind)
        if why is None:
            runs.append(name)  # type: ignore[arg-type]  # FUSED holds names of back ends
        else:
            notes.append(f"The back end {name} was left out: {why}")
    if missing("diffusers") is not None:
        notes.append(f"No comparison with stock diffusers: {missing('diffusers')}")
    why = None if compiled else "--no-compile was given"
    why = why or (None if dry else compile_error(device))
    if why is not None:
        notes.append(f"No comparison with torch.compile: {why}")
    compiler = None if why is not None else "eager" if dry else "inductor"
    if dry:
        return Setup(HostClock(), TINY, tuple(runs), compiler, False, 1, 0.0)
    dependent = require("torch").cuda.get_device_capability(device) >= (9, 0)
    return Setup(CudaClock(device), FULL, tuple(runs), compiler, dependent, rounds, 0.02)
