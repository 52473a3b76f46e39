"""Small cases of every path on a GPU: compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

Every launch is checked against the oracle too. Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an
allocation of its own and a byte behind it belongs to nobody; a capture needs the cache, so --graphs goes without that.
--dry: the same cases on the CPU's kernel, and Triton in its interpreter where TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (0, 1, 2)]

import gpu_support  # noqa: E402
import launches  # noqa: E402
import torch  # noqa: E402
from gpu_support import PLANS, SEEDS, STOCHASTIC, DeviceLaunch, Module, conditions, free, initial  # noqa: E402
from step_cases import STEP, Case  # noqa: E402

import pyguide  # noqa: E402
from pyguide import CFG, Sampler, backends  # noqa: E402

# (what, options of launches.Launch): dense and not, every dtype, each optional operand, several blocks with a tail
LAUNCHES: list[tuple[str, dict[str, Any]]] = [
    ("one element", {"inner": 1}),
    ("dense", {"inner": 64, "slots": (2,), "denoised": True}),
    ("dense, several blocks", {"inner": 20_000, "slots": (2,), "batch": 3}),
    ("a tail", {"inner": 4099, "channels": 3, "noise": "philox", "batch": 3}),
    ("16 bits", {"inner": 4104, "output": "bfloat16", "inputs": "bfloat16", "noise": "philox"}),
    ("mixed types", {"inner": 520, "output": "float16", "inputs": "bfloat16", "time": "int64"}),
    ("16-bit outputs alone", {"inner": 1032, "output": "float16"}),
    ("float64", {"inner": 131, "state": "float64", "output": "float64", "inputs": "float64", "noise": "philox"}),
    ("channels last", {"inner": 37, "channels": 5, "layout": "last", "slots": (3,), "batch": 3}),
    ("gaps", {"inner": 65, "channels": 3, "layout": "gap", "denoised": True, "noise": "tensor"}),
    ("unaligned", {"inner": 64, "offset": 3, "slots": (2,), "output": "float16", "inputs": "float16"}),
    ("every operand", {"inner": 100, "channels": 2, "slots": (3, 2), "guidance_slots": 1, "gradient": True,
                       "variance": True, "bound": True, "denoised": True, "noise": "tensor", "check": True}),
    ("many branches and slots", {"inner": 33, "branches": 8, "slots": (8, 5), "guidance_slots": 2, "absent": True}),
    ("rows and routes apart", {"inner": 80, "batch": 5, "slots": (1, 3, 2), "row": (0, 3, 1, 2), "routes": True,
                               "absent": True, "noise": "philox"}),
]  # fmt: skip


def step(dry: bool) -> None:
    """Launches of the packed step, and what it refreshes."""
    kind: Any = launches.Launch if dry else DeviceLaunch
    for seed, (what, options) in enumerate(LAUNCHES):
        print(" ", what, flush=True)
        kind(seed, density=0.9, **options).run_and_compare()
    launch = kind(4, batch=3, inner=70, slots=(2,), row=1)
    launch.samples["end"] = 3, 2, 3
    launch.run()
    launch.refresh()


def samplers(device: str, backend: str, *, graphs: bool) -> None:
    """Runs of every plan; captured ones too. Of Triton's, which compiles for each, a few; in its interpreter one."""
    few = ("unipc", "ancestral") if device == "cuda" else ("ancestral",)
    for name in PLANS if backend == "native" else few:
        results = []
        for captured in (False, True) if graphs else (False,):
            drawn = {"seeds": SEEDS} if name in STOCHASTIC else {}
            sampler = Sampler(free, PLANS[name], CFG(3.0), backend=backend, cuda_graph=captured, check="flag")
            for _ in range(2 if device == "cuda" else 1):
                results.append(sampler(initial(SEEDS, device=device), **conditions(SEEDS, device), **drawn))
            assert not sampler.nonfinite.any()
        assert all(torch.equal(result, results[0]) for result in results), name
    editable = pyguide.compile("dpmpp_2m", gpu_support.VP.path(3), editable=True)
    sampler = Sampler(free, editable, CFG(3.0, interval=(0.2, 0.7)), backend=backend)
    noise = initial(SEEDS[:2], device=device, dtype=torch.bfloat16)
    list(sampler.stream(noise, **conditions(SEEDS[:2], device), blend=lambda event: event.x * 0.5))


def operators(device: str) -> None:
    for name in ("plain", "bf16", "double"):
        args, options = Case(name).copy()
        each = lambda v: [x.to(device) for x in v] if isinstance(v, list) else v  # noqa: E731
        args = [v.to(device) if torch.is_tensor(v) else each(v) for v in args]
        STEP(*args, **{key: v.to(device) if torch.is_tensor(v) else v for key, v in options.items()})
    assert torch.isfinite(torch.ops.pyguide.randn(torch.tensor([1, 2], device=device), (2, 3, 5))).all()
    assert torch.isfinite(pyguide.randn(1, (2, 4, 33), like=torch.empty(0, device=device))).all()


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--dry", action="store_true", help="on the CPU")
    made.add_argument("--graphs", action="store_true", help="captured loops too")
    options = made.parse_args()
    device = "cpu" if options.dry else "cuda"
    DeviceLaunch.C = Module()
    start = time.monotonic()

    def done(what: str) -> None:
        if not options.dry:
            torch.cuda.synchronize()
        print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)

    for backend in backends.FUSED:
        why = backends.why_not(backend, device)
        if why is not None:
            print(f"{backend}: left out: {why}")
            if backend == "native":
                raise SystemExit(f"native: {why}")
            continue
        if backend == "native":
            step(options.dry)
            done("launches")
            operators(device)
            done("operators")
        samplers(device, backend, graphs=options.graphs)
        done(f"samplers, {backend}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
