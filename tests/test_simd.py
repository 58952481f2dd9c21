"""The SIMD words against plain numpy, on every lowering this CPU can run."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from kernel_checks import FORCED, runs_here

from moelite import jit, simd


@jit.kernel
def _dots(w, u, q, signed, unsigned):
    for i in range(w.size // 32):
        a = simd.dot_i8(simd.zero_i32(), simd.load_i8x32(w, i * 32), simd.load_i8x32(q, i * 32))
        b = simd.dot_u7(simd.zero_i32(), simd.load_i8x32(u, i * 32), simd.load_i8x32(q, i * 32))
        simd.store_f32(signed, i * 8, simd.to_f32(a))
        simd.store_f32(unsigned, i * 8, simd.to_f32(b))


@jit.kernel
def _nibbles(codes, table, q, out):
    entries = simd.load_table16(table, 0)
    v = simd.load_i8x32(codes, 0)
    low = simd.lookup_low(entries, v)
    high = simd.lookup_high(entries, v)
    splat = simd.splat4(q, 4)
    simd.store_f32(out, 0, simd.to_f32(simd.dot_u7(simd.zero_i32(), low, splat)))
    simd.store_f32(out, 8, simd.to_f32(simd.dot_u7(simd.zero_i32(), high, splat)))


@jit.kernel
def _halves(x, half, back):
    for i in range(0, x.size, 8):
        simd.store_f16(half, i, simd.load_f32(x, i))
        simd.store_f32(back, i, simd.load_f16(half, i))


@jit.kernel
def _exps(x, out):
    for i in range(0, x.size, 8):
        simd.store_f32(out, i, simd.exp_f32(simd.load_f32(x, i)))


@jit.kernel
def _bytes(bits, v, out):
    # 0, 1, 2 by bits; those that `v` has too; 8 vectors turned, at their places
    made = simd.bits_i8(bits[0], bits[1])
    simd.store_i8x32(out, 0, made)
    simd.store_i8x32(out, 32, simd.and_i8(made, simd.load_i8x32(v, 0)))
    w = simd.transpose_i8x4(
        simd.load_i8x32(v, 0),
        simd.load_i8x32(v, 32),
        simd.load_i8x32(v, 64),
        simd.load_i8x32(v, 96),
        simd.load_i8x32(v, 128),
        simd.load_i8x32(v, 160),
        simd.load_i8x32(v, 192),
        simd.load_i8x32(v, 224),
    )
    simd.store_i8x32(out, 64, w[0])
    simd.store_i8x32(out, 96, w[1])
    simd.store_i8x32(out, 128, w[2])
    simd.store_i8x32(out, 160, w[3])
    simd.store_i8x32(out, 192, w[4])
    simd.store_i8x32(out, 224, w[5])
    simd.store_i8x32(out, 256, w[6])
    simd.store_i8x32(out, 288, w[7])


def check_integers() -> None:
    """Dot products at the extremes of both operands and at random, exact to the last unit."""
    rng = np.random.default_rng(0)
    ends = np.array([-127, 127, 0, 1], np.int8)
    w = np.concatenate(
        [np.full(64, -127, np.int8), np.full(64, 127, np.int8), rng.choice(ends, 2048)]
    )
    q = np.concatenate(
        [np.tile([-127, 127], 64).astype(np.int8), rng.integers(-127, 128, 2048, np.int8)]
    )
    q[:32], q[64:96], q[96:128] = -127, 127, -127  # the largest sums of both signs
    u = np.abs(w)
    signed, unsigned = np.zeros(w.size // 4, np.float32), np.zeros(w.size // 4, np.float32)
    _dots(w, u, q, signed, unsigned)
    wide = q.astype(np.int64)
    np.testing.assert_array_equal(signed, (w * wide).reshape(-1, 4).sum(1))
    np.testing.assert_array_equal(unsigned, (u * wide).reshape(-1, 4).sum(1))
    assert signed.max() == 4 * 127 * 127
    assert signed.min() == -4 * 127 * 127


def check_nibbles() -> None:
    """Table look-ups of all 16 codes in both nibbles."""
    codes = np.arange(32, dtype=np.uint8) * 7 % 16 | np.arange(32, dtype=np.uint8)[::-1] % 16 << 4
    table = np.arange(16, dtype=np.int8) * 8 + 7
    q = np.array([9, 9, 9, 9, 1, -20, 127, -127], np.int8)
    out = np.zeros(16, np.float32)
    _nibbles(codes, table, q, out)
    for half, shift in ((out[:8], 0), (out[8:], 4)):
        entries = table[codes >> shift & 15].astype(np.int64).reshape(8, 4)
        np.testing.assert_array_equal(half, (entries * q[4:]).sum(1))


def check_bytes() -> None:
    """Bits to bytes, bytewise and, and the transposition, byte by byte."""
    rng = np.random.default_rng(1)
    for low in (0, 1, 1 << 31, 0xFFFFFFFF, int(rng.integers(2**32))):
        bits = np.array([low, ~low & int(rng.integers(2**32))], np.uint32)
        v, out = rng.integers(0, 256, 256).astype(np.uint8), np.zeros(320, np.uint8)
        _bytes(bits, v, out)
        want = [int(bits[0]) >> i & 1 | (int(bits[1]) >> i & 1) * 2 for i in range(32)]
        assert out[:32].tolist() == want
        np.testing.assert_array_equal(out[32:64], np.array(want, np.uint8) & v[:32])
        turned = v.reshape(8, 8, 4).transpose(1, 0, 2).reshape(-1)
        np.testing.assert_array_equal(out[64:], turned)


def check_halves() -> None:
    """fp16 conversion both ways equals numpy's: subnormals, ties, overflow, infinities."""
    bits = np.arange(0, 1 << 32, 65537, dtype=np.uint32)
    near = np.arange(0x33000000, 0x48000000, 8191, dtype=np.uint32)
    ties = (np.arange(0x3F800000, 0x3F900000, 4096, dtype=np.uint32)).repeat(2)
    x = np.concatenate([bits, near, ties, -ties.view(np.int32).view(np.uint32)]).view(np.float32)
    x = x[~np.isnan(x)]
    x = x[: x.size // 8 * 8].copy()
    half, back = np.zeros(x.size, np.uint16), np.zeros(x.size, np.float32)
    _halves(x, half, back)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    np.testing.assert_array_equal(half, want.view(np.uint16))
    np.testing.assert_array_equal(back, want.astype(np.float32))


def check_exp() -> None:
    """exp within 2e-7 of float64's over its range, clamped and finite beyond."""
    x = np.concatenate([np.linspace(-87, 88, 40_000), [-1e30, 1e30, -np.inf, np.inf] * 2])
    x = x.astype(np.float32)
    out = np.zeros(x.size, np.float32)
    _exps(x, out)
    want = np.exp(np.clip(x.astype(np.float64), -87, 88))
    assert np.abs(out / want - 1).max() < 2e-7


CHECKS = {
    f.__name__: f for f in (check_integers, check_nibbles, check_bytes, check_halves, check_exp)
}


@pytest.mark.parametrize("check", CHECKS)
def test_words_on_this_cpu(check: str) -> None:
    CHECKS[check]()


@pytest.mark.parametrize("target", FORCED)
def test_words_on_other_targets(target: str) -> None:
    if not runs_here(target):
        pytest.skip(f"this CPU cannot run {target} code")
    code = (
        "import test_simd as t; from moelite import jit\n"
        f"assert jit.TARGET == {target!r}, jit.TARGET\n"
        "for check in t.CHECKS.values(): check()\nprint('all equal')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **FORCED[target]},
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "all equal", done.stderr


def test_cache_folder_follows_the_vocabulary(tmp_path, monkeypatch) -> None:
    """An edit in any kernel source gives another cache folder, so stale code is never run."""
    elsewhere = jit.cache_folder(tmp_path)
    copies = []
    for source in jit.kernel_sources():
        copy = tmp_path / source.name
        copy.write_bytes(source.read_bytes())
        os.utime(copy, (1, 1))
        copies.append(copy)
    assert len(copies) >= 12
    monkeypatch.setattr(jit, "kernel_sources", lambda: copies)
    before = jit.cache_folder(tmp_path)
    assert before != elsewhere  # another installation: numba would not find its code there
    assert before == jit.cache_folder(tmp_path)
    for copy in copies:
        kept = copy.read_bytes()
        copy.write_bytes(kept + b"# edited\n")
        os.utime(copy, (1, 1))
        assert jit.cache_folder(tmp_path) != before, copy.name
        copy.write_bytes(kept)
        os.utime(copy, (2, 2))
        assert jit.cache_folder(tmp_path) != before, f"{copy.name}, touched"
        os.utime(copy, (1, 1))


def test_an_edit_in_the_vocabulary_is_seen_by_a_cached_kernel(tmp_path) -> None:
    """A kernel inlines a word from another file; editing that file changes its result."""
    (tmp_path / "word.py").write_text(
        "from moelite.jit import inner\n@inner\ndef f(x):\n    return x + 1\n"
    )
    (tmp_path / "entry.py").write_text(
        "from moelite import jit\n"
        "import pathlib\n"
        "here = pathlib.Path(__file__).parent\n"
        "jit.kernel_sources = lambda: [here / 'word.py', here / 'entry.py']\n"
        "jit.CACHE_FOLDER = jit.cache_folder(here / 'cache')\n"
        "from word import f\n"
        "@jit.kernel\ndef g(x):\n    return f(x)\n"
        "print(g(1))\n"
    )

    def run() -> str:
        command = [sys.executable, "entry.py"]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    assert run() == "2\n"
    (tmp_path / "word.py").write_text(
        "from moelite.jit import inner\n@inner\ndef f(x):\n    return x + 100\n"
    )
    assert run() == "101\n"


def test_two_kernels_of_one_name_are_refused() -> None:
    """Cached machine code is linked by name: a factory must tag what it makes."""

    def make(tag: str):
        def same(x):
            return x

        return jit.inner(same, tag)

    make("first")
    make("second")
    with pytest.raises(RuntimeError, match="two kernels are called"):
        make("second")
