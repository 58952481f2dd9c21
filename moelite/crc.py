"""zlib's CRC-32 at the speed at which records arrive.

A run checks each record once, on the threads that read, while all cores compute: at zlib's 3 to 4
GB/s that made reading a long prompt 15 % slower; this gives 12 (docs/LOG.md). By carry-less
multiplication: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
Instruction" (Intel, 2009): 64 bytes are folded onto the next 64, so that 16 bytes with the same
remainder are left, which zlib reduces. CPUs without that instruction use zlib for all of it.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from moelite.jit import CARRYLESS, kernel
from moelite.quant.base import U8

_STEP = 64  # bytes folded at once
_LEAST = 4 * _STEP
# x^(512 +- 32) and x^(128 +- 32) modulo the polynomial 0x04C11DB7, bits reversed
_BY_64 = (0x0154442BD4, 0x01C6E41596)
_BY_16 = (0x01751997D0, 0x00CCAA009E)

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_V = ir.VectorType(_I64, 2)


def _codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    # args: address of the data, its bytes (a multiple of 64, at least 128), address of 16 bytes
    data, size, out = args
    kind = ir.FunctionType(_V, [_V, _V, _I8])
    word = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.pclmulqdq")

    def load(offset: Any) -> Any:
        place = builder.inttoptr(builder.add(data, offset), _V.as_pointer())
        return builder.load(place, align=1)

    def fold(value: Any, factors: tuple[int, int], onto: Any) -> Any:
        by = ir.Constant(_V, list(factors))
        low = builder.call(word, [value, by, ir.Constant(_I8, 0x00)])
        high = builder.call(word, [value, by, ir.Constant(_I8, 0x11)])
        return builder.xor(builder.xor(low, high), onto)

    lanes = [load(ir.Constant(_I64, 16 * i)) for i in range(4)]
    lanes[0] = builder.xor(lanes[0], ir.Constant(_V, [0xFFFFFFFF, 0]))  # zlib's first remainder
    start, body = builder.basic_block, builder.append_basic_block("fold")
    after = builder.append_basic_block("folded")
    builder.branch(body)
    builder.position_at_end(body)
    at, held = builder.phi(_I64), [builder.phi(_V) for _ in lanes]
    at.add_incoming(ir.Constant(_I64, _STEP), start)
    for phi, lane in zip(held, lanes, strict=True):
        phi.add_incoming(lane, start)
    nexts = [
        fold(phi, _BY_64, load(builder.add(at, ir.Constant(_I64, 16 * i))))
        for i, phi in enumerate(held)
    ]
    then = builder.add(at, ir.Constant(_I64, _STEP))
    at.add_incoming(then, body)
    for phi, value in zip(held, nexts, strict=True):
        phi.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", then, size), body, after)
    builder.position_at_end(after)
    rest = nexts[0]
    for lane in nexts[1:]:
        rest = fold(rest, _BY_16, lane)
    builder.store(rest, builder.inttoptr(out, _V.as_pointer()), align=1)
    return context.get_dummy_value()


def _fold_all(typingctx, data, size, out):
    return types.void(types.int64, types.int64, types.int64), _codegen


_fold_64: Any = intrinsic(_fold_all)


@kernel
def _fold(data, size, out):
    _fold_64(data, size, out)


def crc32(data: U8) -> int:
    """The CRC-32 of contiguous bytes, uint8 [n], as zlib.crc32 gives it; without the GIL."""
    if not CARRYLESS or data.size < _LEAST:
        return zlib.crc32(data.data)
    whole = data.size // _STEP * _STEP
    rest = np.empty(16, np.uint8)
    _fold(data.ctypes.data, whole, rest.ctypes.data)
    return zlib.crc32(data[whole:].data, zlib.crc32(rest.data, 0xFFFFFFFF))
