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

from pyguide.guidance.program import Program
from pyguide.kernels import launch_triton as step_triton
from pyguide.layout import OPCODES, SAMPLE, moments_count, row_width, weights_width

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
# type of the logits, classes, whether the target is a distribution, type of the scale
CLASSIFIERS: dict[str, tuple[str, int, bool, str]] = {
    "classifier": ("float32", 1000, False, "float32"),
    "classifier_half": ("bfloat16", 1000, False, "float32"),
    "classifier_float16": ("float16", 1000, True, "float32"),
    "classifier_few": ("float32", 10, False, "float32"),
    "classifier_double": ("float64", 1000, False, "float64"),
    "classifier_double_distribution": ("float64", 21841, True, "float64"),
    "classifier_distribution": ("float32", 1000, True, "float32"),
    "classifier_wide": ("float32", 2048, False, "float32"),
    "classifier_many": ("float32", 21841, False, "float32"),
    "classifier_many_half": ("bfloat16", 21841, False, "float32"),
    "classifier_many_distribution": ("float32", 21841, True, "float64"),
    "classifier_strided": ("float32", 1000, False, "float32"),
}
# type of the model's tensors, of the state, branches, guidance slots, size of a group's [outer, reduce, inner] or none
MOMENTS: dict[str, tuple[str, str, int, int, tuple[int, int, int] | None]] = {
    "moments": ("float32", "float32", 2, 0, None),
    "moments_half": ("bfloat16", "float32", 2, 0, None),
    "moments_slot": ("float16", "float32", 3, 1, None),
    "moments_many": ("float32", "float32", 6, 2, None),
    "moments_double": ("float64", "float64", 2, 1, None),
    "groups": ("float32", "float32", 2, 1, (256, 64, 1)),
    "groups_half": ("bfloat16", "float32", 2, 0, (1, 4, 4096)),
    "groups_long": ("float32", "float32", 3, 1, (4, 4096, 1)),
    "groups_many": ("float16", "float32", 6, 2, (4, 64, 64)),
    "groups_double": ("float64", "float64", 2, 1, (256, 64, 1)),
}
# type of the model's tensors, of the state, elements along each side of a sample of 3 channels
QUANTILES: dict[str, tuple[str, str, int]] = {
    "quantile": ("float32", "float32", 64),
    "quantile_half": ("bfloat16", "float32", 64),
    "quantile_large": ("float32", "float32", 128),
    "quantile_double": ("float64", "float64", 32),
    "quantile_double_large": ("float64", "float64", 64),
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


def launch_classifier(case: str) -> None:
    """The last three samples of five: everything that a launch can have."""
    model, classes, distribution, kind = CLASSIFIERS[case]
    real, logits = getattr(torch, kind), torch.zeros(3, classes, dtype=getattr(torch, model))
    step_triton.classifier_grad(
        logits.t().contiguous().t() if "strided" in case else logits,
        torch.zeros(5, classes, dtype=real) if distribution else torch.zeros(5, 2, dtype=torch.int64),
        torch.zeros(4, 5, dtype=real),
        samples=torch.zeros(5, SAMPLE.itemsize // 4, dtype=torch.int32),
        first=2,
        grad=torch.empty_like(logits, memory_format=torch.contiguous_format),
        log_prob=torch.zeros(5, dtype=real),
        check=True,
    )


def launch_moments(case: str) -> None:
    """A program with every opcode, over all moments and parameters, that fills the whole block."""
    model, real, K, SG, groups = MOMENTS[case]
    S, B, shape, state = 1 + SG, 2, (4, 64, 64), getattr(torch, real)
    count, width = moments_count(K + SG), weights_width(K, S, SG)
    fixed = count + 5
    chain = [(code % len(OPCODES), max(fixed + code - 1, 0), code % fixed, (7 * code) % fixed) for code in range(fixed)]
    step_triton.moments(
        torch.zeros(S, B, *shape, dtype=state),
        [torch.zeros(B, *shape, dtype=getattr(torch, model)) for _ in range(K)],
        torch.zeros(B, SAMPLE.itemsize // 4, dtype=torch.int32),
        torch.zeros((3 + B) * width, dtype=state),
        torch.zeros(B * K, dtype=torch.int32),
        route_stride=0,
        guidance_slots=SG,
        program=Program(K + SG, 5, tuple(chain), tuple((i, fixed + i % len(chain)) for i in range(width)), True),
        parameters=torch.zeros(3, B, 5, dtype=torch.float64),
        row_stride=5 * B,
        sample_stride=5,
        plain=0,
        plain_row_stride=width,
        plain_sample_stride=0,
        partial=torch.zeros(B, 4, count, dtype=torch.float64),
        moments=None if groups else torch.zeros(B, count, dtype=torch.float64),
        **dict(zip(("outer", "reduce", "inner"), groups, strict=True), guided=torch.zeros(B, 16384, dtype=state))
        if groups
        else {},
    )


def launch_quantile(case: str) -> None:
    model, real, size = QUANTILES[case]
    S, K, B, shape, state = 2, 2, 2, (3, size, size), getattr(torch, real)
    step_triton.quantile(
        torch.zeros(S, B, *shape, dtype=state),
        [torch.zeros(B, *shape, dtype=getattr(torch, model)) for _ in range(K)],
        torch.zeros(B, SAMPLE.itemsize // 4, dtype=torch.int32),
        torch.zeros(3 * row_width(S), dtype=state),
        torch.zeros(3 * weights_width(K, S, 0), dtype=state),
        torch.zeros(B * K, dtype=torch.int32),
        branches=K,
        route_stride=0,
        guidance_slots=0,
        quantile=0.995,
        least=1.0,
        limit=2.0,
        bound=torch.zeros(B, dtype=state),
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
            elif case in CLASSIFIERS:
                launch_classifier(case)
            elif case in MOMENTS:
                launch_moments(case)
            elif case in QUANTILES:
                launch_quantile(case)
            else:
                launch(*CASES[case])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","))
