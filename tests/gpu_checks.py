"""What the tests of moelite.gpu share: matrices with garbage around, and float64's answers.

Run as a program under TRITON_INTERPRET=1 it checks the Triton kernels with the same functions that
pytest runs on the torch ones: `python tests/gpu_checks.py NAME...`, all if none is named.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from moelite.dispatch import matrix_of, multiply, new_act, quantize_row
from moelite.gpu.products import Kernels, kernels_for
from moelite.quant import FORMATS
from moelite.quant.base import F32, U8, Job, pad, pair_rows
from moelite.quant.codes import IQ4_NL, Coded
from moelite.quant.record import join, pack_gate_up

TOLERANCE = 3e-6  # of the sum of the sizes of the terms: float32 sums of a few thousand alike
CPU = torch.device("cpu")

# rows that are no multiple of 8 or 32, columns of less than a block, a group, and more than both
SHAPES = [(75, 72), (40, 20), (1, 7), (17, 96), (24, 608), (9, 1344)]


def shape_for(name: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape with rows as long as the format can hold."""
    return shape[0], pad(shape[1], FORMATS[name].row_multiple)


def random_bytes(name: str, shape: tuple[int, int], seed: int) -> U8:
    """A packed matrix of normal weights of sizes that differ by row."""
    rng = np.random.default_rng(seed + 100)
    weight = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 2, (shape[0], 1))
    return FORMATS[name].pack(weight.astype(np.float32))


def inside(packed: U8, base: int, behind: int = 192) -> Any:
    """A uint8 tensor that holds a matrix from `base` on; all around is as bad as can be."""
    around = np.full(base + packed.size + behind, 0xFF, np.uint8)
    around[base : base + packed.size] = packed
    return torch.from_numpy(around)


def seen(name: str, x: F32) -> tuple[Any, F32]:
    """(the Act, x as the CPU kernels of a format read it, float32 [T, cols])."""
    tokens, cols = x.shape
    act = new_act(tokens, cols, quantized=True)
    act.x.reshape(tokens, -1)[:, :cols] = x
    for row in range(tokens):
        quantize_row(act, row)
    if FORMATS[name].planes == 0:
        return act, x
    codes = act.q.reshape(tokens, -1, 32).astype(np.float32)
    if FORMATS[name].planes == 2:
        codes += act.rest.reshape(tokens, -1, 32).astype(np.float32) * np.float32(1 / 254)
    read = codes * act.scale.reshape(tokens, -1, 1)
    return act, read.reshape(tokens, -1)[:, :cols]


def cpu_product(name: str, packed: U8, shape: tuple[int, int], act: Any, tokens: int) -> F32:
    """[tokens, rows] of the compiled CPU kernel."""
    rows, cols = shape
    out = np.zeros((tokens, pad(rows, 8)), np.float32)
    order = np.arange(tokens, dtype=np.int32)
    job = Job(order, order, 0, tokens, out.reshape(-1), pad(rows, 8))
    whole = np.concatenate([packed, np.zeros(64, np.uint8)])
    multiply(matrix_of(name, whole, 0, rows, cols), act, job, 0, rows, 0)
    return out[:, :rows]


def close(got: Any, want: Any, size: Any) -> None:
    """Raises AssertionError where a product is off by more than TOLERANCE of its terms' sizes."""
    error = np.abs(np.asarray(got, np.float64) - want)
    np.testing.assert_array_less(error, TOLERANCE * np.asarray(size) + 1e-30)


def check_product(
    kernels: Kernels, name: str, packed: U8, shape: tuple[int, int], x: F32, base: int = 64
) -> None:
    """`linear` against float64 of `unpack`, and against the CPU kernel."""
    act, read = seen(name, x)
    got = kernels.linear(name, torch.from_numpy(read), inside(packed, base), base, *shape).numpy()
    assert got.shape == (len(x), shape[0])
    back = FORMATS[name].unpack(packed, *shape).astype(np.float64)
    size = np.abs(read.astype(np.float64)) @ np.abs(back).T
    close(got, read.astype(np.float64) @ back.T, size)
    close(got, cpu_product(name, packed, shape, act, len(x)), 2 * size)


# --- checks: each takes the kernels, most of them a format ---------------------------------------


def linear(kernels: Kernels, name: str) -> None:
    """Shapes of all kinds, few tokens and many."""
    for seed, shape in enumerate(SHAPES):
        shape = shape_for(name, shape)
        x = np.random.default_rng(seed).normal(size=((1, 3, 6)[seed % 3], shape[1]))
        packed = random_bytes(name, shape, seed)
        check_product(kernels, name, packed, shape, x.astype(np.float32), 64 * (seed % 3))


def extremes(kernels: Kernels, name: str) -> None:
    """Weights and activations at their limits, of equal and of alternating signs; and 4-bit codes
    of every value with a table that is not moelite's own."""
    ones, turns = np.ones(1024, np.float32), np.where(np.arange(1024) % 2, 1, -1)
    weight = np.stack([s * v for v in (ones, turns) for s in (1, -1)]).astype(np.float32)
    rng = np.random.default_rng(3)
    x = np.stack([ones, turns, ones * 126.5 / 127, rng.normal(size=1024)]).astype(np.float32)
    check_product(kernels, name, FORMATS[name].pack(weight), weight.shape, x)
    if name == "nf4-dq":  # absmax of more than one nested block, which begin amid a tile's
        packed = random_bytes(name, (26, 704), 8)
        x = rng.normal(size=(1, 704)).astype(np.float32)
        check_product(kernels, name, packed, (26, 704), x)
    if name == "int4-f16":
        codes = rng.integers(0, 16, (16, 288)).astype(np.uint8)
        scales = rng.normal(size=(16, 9)).astype(np.float16).astype(np.float32)
        packed = FORMATS[name].from_codes(Coded(IQ4_NL, codes, scales))  # type: ignore[attr-defined]
        check_product(kernels, name, packed, codes.shape, rng.normal(size=(1, 288)).astype("f4"))


def unpack(kernels: Kernels, name: str) -> None:
    """Bit for bit what numpy gives."""
    for seed, shape in enumerate(SHAPES):
        shape, base = shape_for(name, shape), 64 * seed
        packed = random_bytes(name, shape, seed)
        got = kernels.unpack(name, inside(packed, base), base, *shape).numpy()
        want = FORMATS[name].unpack(packed, *shape)
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def experts(kernels: Kernels, name: str) -> None:
    """Three matrices of an arena, one that is not there, rows in another order."""
    shape = shape_for(name, (9, 72))
    matrices = [random_bytes(name, shape, seed) for seed in range(3)]
    step = pad(max(m.size for m in matrices), 64) + 64
    arena = np.full(4 * step, 0xFF, np.uint8)
    for slot, packed in zip((3, 0, 1), matrices, strict=True):
        arena[slot * step : slot * step + packed.size] = packed
    bases = torch.tensor([3 * step, -1, 0, step])
    x = np.random.default_rng(5).normal(size=(4, shape[1])).astype(np.float32)
    back = [FORMATS[name].unpack(m, *shape).astype(np.float64) for m in matrices]
    back = [back[0], np.zeros_like(back[0]), back[1], back[2]]
    for rows, kind in ((x, torch.int32), (x[:1], torch.int64)):
        given = torch.from_numpy(rows)
        got = kernels.experts(name, given, torch.from_numpy(arena), bases, *shape)
        for k in range(4):
            row = rows[k % len(rows)].astype(np.float64)
            close(got[k], back[k] @ row, np.abs(back[k]) @ np.abs(row))
        target = torch.tensor([2, 0, 4, 1], dtype=kind)
        out = torch.full((5, shape[0]), 7.0)
        kernels.experts(name, given, torch.from_numpy(arena), bases, *shape, out=out, target=target)
        assert torch.equal(out[[2, 4, 1]], got[[0, 2, 3]])
        assert (out[[0, 3]] == 7).all()


def gated(kernels: Kernels, name: str) -> None:
    """silu(gate) * up of an interleaved product, rounded as the CPU rounds it."""
    for size in (40, 76, 300):
        both = np.random.default_rng(size).normal(size=(3, pair_rows(size))) * 3
        tiles = both.astype(np.float32).reshape(3, -1, 2, 8).astype(np.float64)
        gate, up = (tiles[:, :, h].reshape(3, -1)[:, :size] for h in (0, 1))
        exact = gate / (1 + np.exp(-gate)) * up
        got = kernels.gated(torch.from_numpy(both.astype(np.float32)), size, name).numpy()
        assert got.shape == (3, size)
        close_rounded(name, got, exact)


def close_rounded(name: str, got: F32, exact: Any) -> None:
    """`got` is `exact` rounded for a format; where rounding ties, either neighbour will do."""
    _, want = seen(name, exact.astype(np.float32))
    off = np.abs(got - want) > 1e-6 * np.abs(want) + 1e-7
    step = np.abs(exact).max() / 127 * {0: 0, 1: 1, 2: 1 / 254}[FORMATS[name].planes]
    assert off.mean() < 0.02
    assert np.abs(got - want).max() <= step * 1.01 + 2e-6 * np.abs(exact).max()


def gate_up(kernels: Kernels, name: str) -> None:
    """An expert's gate and up as a record holds them, then `gated`."""
    shape = shape_for(name, (11, 40))
    rng, fmt = np.random.default_rng(4), FORMATS[name]
    gate, up = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    packed = pack_gate_up(fmt, gate, up)
    if fmt.exact:
        np.testing.assert_array_equal(packed, join(fmt, shape, fmt.pack(gate), fmt.pack(up)))
    _, x = seen(name, rng.normal(size=(1, shape[1])).astype(np.float32))
    both = kernels.experts(
        name,
        torch.from_numpy(x),
        inside(packed, 128),
        torch.tensor([128]),
        pair_rows(shape[0]),
        shape[1],
    )
    got = kernels.gated(both, shape[0], "f32").numpy()
    back = fmt.unpack(packed, pair_rows(shape[0]), shape[1]).reshape(-1, 2, 8, shape[1])
    g, u = (back[:, h].reshape(-1, shape[1])[: shape[0]] @ x[0] for h in (0, 1))
    np.testing.assert_allclose(got[0], g / (1 + np.exp(-g)) * u, rtol=1e-4, atol=1e-4)


def rounding(kernels: Kernels, name: str) -> None:
    """Bit for bit the numbers that the CPU's int8 planes stand for, NaN and tiny blocks too."""
    rng = np.random.default_rng(2)
    for cols in (32, 7, 200):
        x = rng.normal(size=(3, cols)) * 10.0 ** rng.integers(-3, 4, (3, 1))
        x[rng.random(x.shape) < 0.1] = 0
        x[0, :5] = [1, 0.5, -0.25, 2.5, -127]
        odd = np.zeros((4, cols))
        odd[0], odd[1, 0], odd[2, 0], odd[3, 0] = 1e-39, np.nan, -np.inf, 1e-30
        both = np.concatenate([x, odd]).astype(np.float32)
        _, want = seen(name, both)
        got = kernels.rounded(name, torch.from_numpy(both)).numpy()
        np.testing.assert_array_equal(got, want)


def normed(kernels: Kernels) -> None:
    """Both kinds of norm, with and without weight and bias, rounded and not."""
    for seed, (kind, cols) in enumerate([("rms", 96), ("layer", 100), ("rms", 300), ("layer", 7)]):
        rng = np.random.default_rng(seed + 100)
        x = rng.normal(size=(3, cols)).astype(np.float32) * 3 + 1
        weight, bias = (rng.normal(size=cols).astype(np.float32) for _ in range(2))
        exact = x.astype(np.float64)
        exact = exact - exact.mean(1, keepdims=True) if kind == "layer" else exact
        exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5)
        for w, b in ((weight, bias), (weight, None), (None, None)):
            want = exact if w is None else exact * w
            want = want if b is None else want + b
            args = (None if a is None else torch.from_numpy(a) for a in (w, b))
            given = torch.from_numpy(x), *args, 1e-5, kind
            np.testing.assert_allclose(kernels.normed(*given), want, rtol=1e-5, atol=1e-5)
            for name in ("int4", "int8"):
                close_rounded(name, kernels.normed(*given, name).numpy(), want)


def add_experts(kernels: Kernels) -> None:
    """Sums in the router's order, with a gate and without."""
    for tokens, top_k, cols in ((1, 8, 96), (3, 2, 1100)):
        rng = np.random.default_rng(cols)
        x, parts = rng.normal(size=(tokens, cols)), rng.normal(size=(tokens * top_k, cols))
        weights, gate = rng.random((tokens, top_k)), rng.normal(size=tokens)
        total = (weights[..., None] * parts.reshape(tokens, top_k, -1)).sum(1)
        f32 = [torch.from_numpy(a.astype(np.float32)) for a in (parts, weights, gate)]
        for with_gate in (False, True):
            got = torch.from_numpy(x.astype(np.float32))
            kernels.add_experts(got, *f32[: 3 if with_gate else 2])
            factor = 1 / (1 + np.exp(-gate[:, None])) if with_gate else 1
            np.testing.assert_allclose(got, x + total * factor, rtol=1e-5, atol=1e-5)


def attend(kernels: Kernels) -> None:
    """One token over f16 and f32 kv, lengths at and around every boundary, windows."""
    cases = [((8, 2, 16), 300, torch.float16), ((3, 3, 24), 70, torch.float32)]
    cases.append(((12, 2, 80), 40, torch.float16))
    cases.append(((64, 64, 8), 200, torch.float32))  # two blocks for each part of the context
    for (heads, kv_heads, size), context, kind in cases:
        rng = np.random.default_rng(heads)
        q = rng.normal(size=(1, heads, size)).astype(np.float32)
        # what lies beyond the length must not matter
        k, v = (torch.full((kv_heads, context, size), torch.nan, dtype=kind) for _ in range(2))
        for length in (1, 33, context) if heads < 64 else (context,):
            for tensor in (k, v):
                filled = torch.from_numpy(rng.normal(size=(kv_heads, length, size)))
                tensor[:, :length] = filled.to(kind)
            for window in (0, 17) if heads < 64 else (0,):
                first = max(0, length - window) if window else 0
                want = _softmax(q, k[:, first:length], v[:, first:length], size**-0.5)
                for given in (length, torch.tensor([length], dtype=torch.int32)):
                    got = kernels.attend(torch.from_numpy(q), k, v, given, size**-0.5, window)
                    assert got.shape == q.shape
                    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def _softmax(q: F32, k: Any, v: Any, scale: float) -> Any:
    keys, values = k.numpy().astype(np.float64), v.numpy().astype(np.float64)
    grouped = q.astype(np.float64).reshape(len(keys), -1, q.shape[2])
    scores = np.exp(grouped @ keys.transpose(0, 2, 1) * scale)
    return (scores / scores.sum(2, keepdims=True) @ values).reshape(q.shape)


BY_FORMAT: tuple[Callable[..., None], ...] = (
    *(linear, extremes, unpack, experts, gated, gate_up, rounding),
)
# one format for each kernel, and of vq for each length of entries, alone and in two planes
KINDS = ("f32", "bf16", "int8", "int4", "int4-f16", "mxfp4", "nf4", "nf4-dq")
KINDS += ("vq-0.5", "vq-1.5", "vq-3", "qmoe")
OTHERS: tuple[Callable[..., None], ...] = (normed, add_experts, attend)


def let_arrays_of_one_be_numbers() -> None:
    # Triton's interpreter has scalars as arrays [1], which numpy 2.4 no longer takes as an index
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        index = lambda self: int(self.handle.data.reshape(-1)[0])  # noqa: E731
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patched


def main(names: list[str]) -> None:
    """Runs checks under Triton's interpreter and prints each that passed."""
    let_arrays_of_one_be_numbers()
    np.seterr(all="ignore")  # masked lanes divide by zero
    kernels = kernels_for(CPU, "triton")
    SHAPES[:] = [(1, 7), (17, 96), (9, 608)]  # the interpreter takes a millisecond an operation
    for check in BY_FORMAT:
        for name in names or KINDS:
            started = time.perf_counter()
            check(kernels, name)
            sys.stdout.write(f"{check.__name__} {name} {time.perf_counter() - started:.2f}\n")
    for check in OTHERS:
        check(kernels)
        sys.stdout.write(f"{check.__name__}\n")


if __name__ == "__main__":
    main(sys.argv[1:])


def greedy(model: Any, seed: int) -> list[int]:
    """Eight greedy tokens after a prompt of six drawn ones."""
    prompt = np.random.default_rng(seed).integers(3, 100, 6).tolist()
    session, ids = model.session(), []
    logits = session.advance(prompt)
    for _ in range(8):
        ids.append(int(logits.argmax()))
        logits = session.advance(ids[-1:])
    return ids
