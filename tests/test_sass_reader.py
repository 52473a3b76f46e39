"""tests/sass.py reads off a compiled kernel what is in it: kernels whose code is known, among them bad ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sass

SOURCE = """
extern "C" {
__global__ void narrow(float* to, const float* from) { to[threadIdx.x] = 2.f * from[threadIdx.x]; }

__global__ void wide(float4* to, const float4* from) {
  const float4 a = from[threadIdx.x], b = from[threadIdx.x + 64];
  to[threadIdx.x] = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__global__ void one_by_one(float4* to, const volatile float4* from) {
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    float x, y, z, w;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x), "=f"(y), "=f"(z), "=f"(w)
                 : "l"(from + threadIdx.x + 64 * i));
    sum += x * y + z * w;
    asm volatile("st.global.v4.f32 [%0], {%1, %1, %1, %1};" :: "l"(to + threadIdx.x + 64 * i), "f"(sum));
  }
}

__global__ void hinted(float4* to, const float4* from, const float* scale) {
  float4 a;
  asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(a.x), "=f"(a.y), "=f"(a.z), "=f"(a.w)
               : "l"(from + threadIdx.x));
  a.x *= *scale;
  asm volatile("st.global.L1::no_allocate.v4.f32 [%0], {%1, %2, %3, %4};"
               :: "l"(to + threadIdx.x), "f"(a.x), "f"(a.y), "f"(a.z), "f"(a.w));
}

__global__ void __launch_bounds__(1024, 1) spilled(float* to, const float* from) {
  float v[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) v[i] = from[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) to[i * 1024 + threadIdx.x] = v[i] * v[127 - i] + v[i * 7 % 128];
}

__global__ void indexed(float* to, const int* from) {
  float v[64] = {};
  for (int i = 0; i < 99; ++i) v[from[i] & 63] += 1.f;
  to[threadIdx.x] = v[from[99] & 63];
}

__global__ void greedy(float* to, const float* from) {
  float v[80];
#pragma unroll
  for (int i = 0; i < 80; ++i) v[i] = from[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 80; ++i) to[i * 1024 + threadIdx.x] = v[79 - i];
}

__global__ void half(float2* to, const float2* from) {
  float2 a;
  asm volatile("ld.global.L1::no_allocate.v2.f32 {%0, %1}, [%2];" : "=f"(a.x), "=f"(a.y) : "l"(from + threadIdx.x));
  asm volatile("st.global.L1::no_allocate.v2.f32 [%0], {%1, %2};" :: "l"(to + threadIdx.x), "f"(a.x), "f"(a.y));
}

__global__ void trigonometry(float* to, const float* from) { to[threadIdx.x] = sinf(from[threadIdx.x]); }
__global__ void rough(float* to, const float* from) { to[threadIdx.x] = __sinf(from[threadIdx.x]); }
__global__ void division(float* to, const float* from) { to[threadIdx.x] = from[threadIdx.x] / to[threadIdx.x]; }

__global__ void halves(unsigned short* to, const unsigned short* from) { to[threadIdx.x] = from[threadIdx.x]; }
__global__ void pairs(float2* to, const float2* from) { to[threadIdx.x] = from[threadIdx.x]; }
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], sass.Kernel]:
    folder = tmp_path_factory.mktemp("reader")
    source = folder / "known.cu"
    source.write_text(SOURCE)
    cubins = sass.extract(sass.compile_cuda(source, folder), folder)
    return {(k.name, arch): k for arch, [cubin] in cubins.items() for k in sass.read(cubin, arch)}


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_known_code(kernels: dict[tuple[str, str], sass.Kernel], arch: str) -> None:
    def of(name: str) -> sass.Kernel:
        return kernels[name, arch]

    def widths(name: str, kind: str, hint: str | None = None) -> list[int]:
        return [i.bits for i in of(name).select(kind, hint)]

    for name, bits in {"narrow": 32, "halves": 16, "pairs": 64}.items():
        assert widths(name, "global_load") == widths(name, "global_store") == [bits]
    assert widths("wide", "global_load") == [128, 128]
    assert widths("wide", "global_store") == [128]
    assert of("wide").in_flight() == 2
    assert of("one_by_one").in_flight() == 1  # the first is used before the second is issued
    assert of("narrow").in_flight() == 0
    assert of("narrow").in_flight(bits=32) == 1

    assert sorted(widths("hinted", "global_load")) == [32, 128]
    assert widths("hinted", "global_load", "no_allocate") == widths("hinted", "global_store", "no_allocate") == [128]
    assert widths("wide", "global_load", "no_allocate") == []

    clean = of("wide")
    assert 8 <= clean.registers <= 32
    assert clean.stack == clean.local == 0
    assert not clean.select("local_memory")
    assert of("spilled").registers == 64  # 65,536 registers for 1,024 threads
    assert of("spilled").stack > 0
    assert of("spilled").select("local_memory")
    assert of("indexed").stack >= 256
    assert of("indexed").select("local_memory")

    assert sass.problems(of("wide")) == sass.problems(of("narrow")) == sass.problems(of("division")) == []
    assert "bytes of local memory" in sass.problems(of("spilled"))[0]
    assert "accesses to local memory, the first: STL" in sass.problems(of("spilled"))[1]
    assert len(sass.problems(of("indexed"))) == 2
    assert sass.problems(of("greedy"))[0] == f"{of('greedy').registers} registers, expected at most 64"
    assert re.fullmatch(r"MUFU\.SIN at 0x.*: an approximation", sass.problems(of("rough"))[0])
    assert sass.bulk_problems(of("hinted"), "no_allocate", in_flight=1) == []
    assert sass.bulk_problems(of("hinted"), "no_allocate") == ["1 bulk loads in flight, expected at least 2"]
    assert sass.bulk_problems(of("wide"), "no_allocate") == ["no bulk loads", "no bulk stores"]
    assert re.fullmatch(
        "LDG.*NA.64 at 0x.*: a bulk access of 64 bits", sass.bulk_problems(of("half"), "no_allocate")[0]
    )

    assert of("division").calls == [c for c in of("division").calls if re.search("div_rn.*slowpath", c)] != []
    assert of("wide").calls == []
    assert of("trigonometry").count("FFMA") > 5
    assert of("wide").count("FADD") == 4
    assert of("wide").count("FFMA") == 0


def test_a_missing_tool_fails_in_ci_and_skips_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"nvcc was not found; install CUDA .*cuda-toolkit"):
        sass.missing("nvcc")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match=r"nvdisasm was not found; install .*triton"):
        sass.missing("nvdisasm")


def test_an_old_nvcc_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that does not know the newest architecture would leave it unproved."""
    for name, archs in (("old", "compute_80 compute_90"), ("new", "compute_90 compute_120")):
        tool = tmp_path / name / "nvcc"
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/sh\necho {archs}\n")
        tool.chmod(0o755)
    monkeypatch.setattr(sass, "candidates", lambda tool: [tmp_path / "old" / tool, tmp_path / "new" / tool])
    assert sass.require.__wrapped__("nvcc") == tmp_path / "new" / "nvcc"


def test_a_compiler_error_is_told(tmp_path: Path) -> None:
    sass.require("nvcc")
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void f() { nonsense; }\n")
    with pytest.raises(RuntimeError, match=r"broken\.cu.*nonsense"):
        sass.compile_cuda(source, tmp_path, archs=["90"])
