"""Run as a script: what Triton's compiler makes of the step kernels for GPUs that need not be here, one cubin a file.

    python tests/sass_triton.py FOLDER ARCH,.. CASE,..

The launches are the package's own, on CPU tensors; a driver that only names its architecture stands in for CUDA's, and
every launch ends once it is compiled. Files are named CASE.KERNEL.sm_ARCH.cubin.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pyguide.kernels import launch_triton as step_triton
from pyguide.layout import SAMPLE, row_width, weights_width

# type of the model's tensors (the state is float32), branches, slots, of which guidance slots, other options
CASES: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "float32": ("float32", 2, 1, 0, {}),
    "bfloat16": ("bfloat16", 2, 1, 0, {}),
    "float16": ("float16", 2, 1, 0, {}),
    "single": ("float32", 1, 1, 0, {}),
    "multistep": ("bfloat16", 2, 2, 0, {"check": True}),
    "slots": ("float16", 2, 3, 0, {}),
    "three": ("float32", 3, 3, 1, {}),
    "refresh": ("bfloat16", 2, 1, 0, {"refresh": True}),
}


class Compiler:
    """In place of Triton's CUDA driver: one architecture after the other."""

    arch = 0

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def launch(model: str, K: int, S: int, SG: int, options: dict[str, Any]) -> None:
    """A launch of two samples of 4 x 64 x 64 elements."""
    B, shape = 2, (4, 64, 64)
    operands = [[torch.zeros(B, *shape, dtype=getattr(torch, model)) for _ in range(K)] for _ in range(2)]
    step_triton.step(
        torch.zeros(S, B, *shape),
        *operands,
        [torch.zeros(B) for _ in range(K)],
        torch.zeros(B, SAMPLE.itemsize // 4, dtype=torch.int32),
        torch.zeros(3 * row_width(S - SG)),
        torch.zeros(3 * weights_width(K, S, SG)),
        torch.zeros(B * K, dtype=torch.int32),
        torch.zeros(B * K, dtype=torch.int32),
        guidance_slots=SG,
        **options,
    )


def main(folder: Path, archs: list[str], cases: list[str]) -> None:
    compiler = Compiler()
    driver.set_active(compiler)
    run, case = JITFunction.run, ""

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        (folder / f"{case}.{self.fn.__name__}.sm_{compiler.arch}.cubin").write_bytes(kernel.asm["cubin"])

    JITFunction.run = compile_only
    for arch in archs:
        compiler.arch = int(arch)
        for case in cases:
            if case == "normals":
                step_triton.normals(torch.zeros(4096), 1, 2, 3)
            else:
                launch(*CASES[case])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","))
