"""Counter-based noise: published vectors, moments, streams, and the float32 normals against the float64 formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest

from pyguide import native
from pyguide.layout import TAG_INITIAL, TAG_STEP

C: Any = native.C
if C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

ISAS = C.isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    C.set_isa(request.param)
    yield request.param
    C.set_isa(ISAS[-1])


def normals(
    count: int, seed: int, *, ordinal: int = 0, tag: int = TAG_INITIAL, first: int = 0, dtype: str = "float32"
) -> Any:
    out = np.full(count + 8, np.nan, np.float32 if dtype == "float32" else np.float64)
    C.normals(out.ctypes.data + 4 * out.itemsize, dtype, count, seed, ordinal, tag, first)
    assert np.isnan(out[:4]).all()
    assert np.isnan(out[-4:]).all()
    return out[4:-4]


# Random123 1.14, tests/kat_vectors: philox4x32, 10 rounds
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: Any, key: Any, expected: Any) -> None:
    assert C.philox(counter, key) == expected
    assert oracle.philox(counter, key) == expected
    assert C.philox(counter, key, 9) != expected


@pytest.mark.parametrize("first", [0, 1, 2**32 * 4 - 20, 2**40 + 7])
def test_normals_against_the_formula(isa: str, first: int) -> None:
    """Every ISA's integers are exact (a wrong one would be off by order 1) and |z - z*| <= 4 * 2^-24 r."""
    for seed, count in ((2**64 - 1, 333), (12345, 600), (0, 1)):
        exact, radius = oracle.normals(first, count, seed, 3, TAG_STEP)
        z = normals(count, seed, ordinal=3, tag=TAG_STEP, first=first)
        assert (abs(z - exact) <= 4 * 2.0**-24 * radius).all()
        wide = normals(count, seed, ordinal=3, tag=TAG_STEP, first=first, dtype="float64")
        assert (abs(wide - exact) <= 8 * 2.0**-53 * radius).all()


def test_normals_many_against_double(isa: str) -> None:
    """A million normals against the same integers in double; the radius bounds |z| and is recovered from the pair."""
    z, wide = normals(1 << 20, 7), normals(1 << 20, 7, dtype="float64")
    radius = np.repeat(np.hypot(wide[::2], wide[1::2]), 2)
    assert (abs(z - wide) <= 4 * 2.0**-24 * radius).all()


def test_extreme_uniforms() -> None:
    """The smallest radius in a few million draws is still accurate relative to itself (u near 1)."""
    z, wide = normals(1 << 22, 99), normals(1 << 22, 99, dtype="float64")
    radius = np.hypot(wide[::2], wide[1::2])
    least = np.argsort(radius)[:64]
    assert radius[least[0]] < 2e-3
    error = np.hypot(z[::2] - wide[::2], z[1::2] - wide[1::2])[least]
    assert (error <= np.sqrt(2) * 4 * 2.0**-24 * radius[least]).all()


def test_moments() -> None:
    """Within 5 standard errors; the variances of z, z^2, z^3, z^4 are 1, 2, 15, 96."""
    n = 1 << 20
    z = normals(n, 2024).astype(np.float64)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) <= 5 * np.sqrt(variance / n)
    for lag in (1, 2, 4):  # neighbours, the pair of one radius, the next counter
        assert abs((z[:-lag] * z[lag:]).mean()) <= 5 / np.sqrt(n)
    words = np.array([C.philox((q, 0, 0, TAG_INITIAL), (5, 0)) for q in range(1 << 14)]).ravel()
    u = (words + 0.5) * 2.0**-32
    assert abs(u.mean() - 0.5) <= 5 * np.sqrt(1 / 12 / u.size)
    assert abs((u**2).mean() - 1 / 3) <= 5 * np.sqrt(4 / 45 / u.size)
    assert abs((z[:-1] * z[:-1]).mean()) > 0.5  # negative control of the correlation test


def test_streams_differ_and_repeat() -> None:
    reference = normals(64, 1)
    assert (normals(64, 1) == reference).all()
    others = [normals(64, seed) for seed in (2, 1 + (1 << 32))]
    others += [normals(64, 1, **change) for change in ({"tag": TAG_STEP}, {"ordinal": 1}, {"first": 64})]
    for other in others:
        assert not (other == reference).any()
        assert abs((other * reference).mean()) < 5 / np.sqrt(64)


def test_offset_and_length_do_not_change_bits(isa: str) -> None:
    reference = normals(1600, 11)
    for first, count in ((0, 1), (1, 3), (3, 64), (4, 1000), (511, 600), (513, 1)):
        assert normals(count, 11, first=first).tobytes() == reference[first : first + count].tobytes()
    assert normals(8, 11, first=1).tobytes() != reference[:8].tobytes()  # negative control


def test_narrow_types_round_once() -> None:
    z = normals(100, 3)
    half = np.zeros(100, np.float16)
    C.normals(half.ctypes.data, "float16", 100, 3, 0, TAG_INITIAL)
    assert (half == z.astype(np.float16)).all()
    brain = np.zeros(100, np.uint16)
    C.normals(brain.ctypes.data, "bfloat16", 100, 3, 0, TAG_INITIAL)
    assert (brain == oracle.encode(z, "bfloat16")).all()


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="ptr"):
        C.normals(0, "float32", 4, 0, 0, 0)
    with pytest.raises(ValueError, match="count"):
        C.normals(0, "float32", -1, 0, 0, 0)
    with pytest.raises(ValueError, match="type"):
        C.normals(0, "int64", 0, 0, 0, 0)
