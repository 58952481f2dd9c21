"""Products of a format's kernel against `unpack` and float64, for this process's target.

Run as a program it checks the worst cases and some random ones on the target that the environment
forces, and prints which that was.
"""

from __future__ import annotations

import sys

import numpy as np
from llvmlite import binding

from moelite import jit
from moelite.dispatch import matrix_of, multiply, new_act, quantize_row
from moelite.quant import FORMATS
from moelite.quant.base import F32, U8, Job, pad
from moelite.quant.codes import IQ4_NL, Q4_0, Coded

# What makes numba compile for another target; the results are the same bits.
FORCED = {
    "vnni": {
        "NUMBA_CPU_NAME": "cascadelake",
        "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+f16c,+ssse3,+avx512f,+avx512vl,+avx512vnni,"
        "+avx512bw,+avx512dq",
    },
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+f16c,+ssse3",
    },
    "plain": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
}
_NEEDED = {"vnni": "avx512vnni", "avx2": "avx2"}


def runs_here(target: str) -> bool:
    """Whether this CPU runs code compiled for a target of FORCED."""
    here = binding.get_process_triple().startswith("x86_64")
    needed = _NEEDED.get(target)
    return here and (needed is None or bool(binding.get_host_cpu_features().get(needed)))


# Float32 sums of a few thousand terms, against the sum of their sizes.
TOLERANCE = 1e-6


def product(name: str, weight: F32, x: F32, base: int = 0) -> tuple[F32, F32, F32]:
    """`product_of` the packed weight."""
    return product_of(name, FORMATS[name].pack(weight), weight.shape, x, base)


def product_of(
    name: str, packed: U8, shape: tuple[int, int], x: F32, base: int = 0
) -> tuple[F32, F32, F32]:
    """(kernel's x @ W.T, the same in float64 of what the kernel is given, the sum of the terms'
    sizes), all [T, O]. base: the matrix begins that many bytes into a longer array.
    """
    fmt, (rows, cols), tokens = FORMATS[name], shape, len(x)
    act = new_act(tokens, cols, quantized=True)
    act.x.reshape(tokens, -1)[:, :cols] = x
    for row in range(tokens):
        quantize_row(act, row)
    width = pad(rows, 8)
    out = np.full((tokens, width), np.nan, np.float32)
    order = np.arange(tokens, dtype=np.int32)
    job = Job(order, order, 0, tokens, out.reshape(-1), width)
    # what lies around a matrix must not matter: here it is as bad as can be
    around = np.full(base + packed.size + 64, 0xFF, np.uint8)
    around[base : base + packed.size] = packed
    multiply(matrix_of(name, around, base, rows, cols), act, job, 0, rows, 0)
    seen = x.astype(np.float64)
    if fmt.planes:
        q = act.q.reshape(tokens, -1, 32).astype(np.float64)
        if fmt.planes == 2:
            q += act.rest.reshape(tokens, -1, 32) / 254
        seen = (q * act.scale.reshape(tokens, -1, 1)).reshape(tokens, -1)[:, :cols]
    back = fmt.unpack(packed, rows, cols).astype(np.float64)
    return out[:, :rows], seen @ back.T, np.abs(seen) @ np.abs(back).T


def check(name: str, weight: F32, x: F32, base: int = 0) -> None:
    """Raises AssertionError where the kernel is wrong."""
    close(*product(name, weight, x, base))


def close(got: F32, want: F32, size: F32) -> None:
    """Raises AssertionError where a product is not what it should be."""
    np.testing.assert_array_less(np.abs(got - want), TOLERANCE * size + 1e-30)


def worst(name: str, tokens: int) -> None:
    """Weights and activations at their limits, of equal and of alternating signs.

    A pair of products is then 2 * 127 * 127: it fits int16, twice that does not.
    """
    rows, cols = 40, 2048
    ones, turns = np.ones(cols, np.float32), np.where(np.arange(cols) % 2, 1, -1)
    halves = np.where(np.arange(cols) % 8 < 4, 1, -1)
    weights = np.stack([s * v for v in (ones, turns, halves, ones) for s in (1, -1)] * 5)
    x = np.stack([(-1) ** t * (ones, turns, halves)[t % 3] for t in range(tokens)])
    check(name, weights[:rows].astype(np.float32), x.astype(np.float32))
    # 126.5 of 127 steps: the second plane of the activations is at its limit, too
    x = x * np.where(np.arange(cols) % 32, 126.5 / 127, 1)
    check(name, weights[:rows].astype(np.float32), x.astype(np.float32))


def random(name: str, seed: int, shape: tuple[int, int], tokens: int, base: int = 0) -> None:
    """Normal weights and activations, some of them zero, some blocks far larger than others.

    Rows are as long as `shape` says, or what comes next of what the format can hold.
    """
    rng, shape = np.random.default_rng(seed), (shape[0], pad(shape[1], FORMATS[name].row_multiple))
    weight = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 2, (shape[0], 1))
    x = rng.normal(size=(tokens, shape[1])) * 10.0 ** rng.integers(-3, 4, (tokens, 1))
    x[rng.random(x.shape) < 0.1] = 0
    check(name, weight.astype(np.float32), x.astype(np.float32), base)


def carried(tokens: int) -> None:
    """int4-f16 with tables of others, which use all of int8, at their limits and at random."""
    rng = np.random.default_rng(tokens)
    limits = np.array([-127, 127] * 8, np.int8)
    for table in (limits, IQ4_NL, Q4_0):
        codes = rng.integers(0, 16, (40, 2048)).astype(np.uint8)
        codes[:2], codes[2:4] = [[0], [1]], [[15], [0]]
        scales = (rng.normal(size=(40, 64)) * 0.01).astype(np.float16).astype(np.float32)
        packed = FORMATS["int4-f16"].from_codes(Coded(table, codes, scales))
        x = rng.normal(size=(tokens, 2048)).astype(np.float32)
        x[::2] = np.sign(x[::2])
        x[0] = 1
        close(*product_of("int4-f16", packed, codes.shape, x))


if __name__ == "__main__":
    # one format for each kernel: of vq, entries of 16, 8 and 4 bytes in one plane and in two
    for fmt in ("int8", "int4", "int4-f16", "nf4", "vq-1.5", "vq-3", "qmoe"):
        for count in (1, 5, 9, 21):
            worst(fmt, count)
            random(fmt, count, (75, 72), count)
            random(fmt, count, (16, 2080), count, 64)
    for count in (1, 9):
        carried(count)
    sys.stdout.write(jit.TARGET)
