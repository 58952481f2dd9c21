"""A small SIMD vocabulary for numba: 256-bit vectors as values inside an njit kernel.

Each word is an `@intrinsic` that emits LLVM IR. Float words are plain LLVM vector operations and
give the same bits on every CPU (`llvm.fma` rounds once everywhere). Integer dot products and table
lookups have one lowering per target, all exact, so all equal: see moelite.lowering.

The target is the host's, unless numba was told to compile for another CPU (NUMBA_CPU_NAME,
NUMBA_CPU_FEATURES): then it follows those, which is how tests force `plain` and `avx2`.

Values: f32x8 (8 float32), i32x8 (8 int32), i8x32 (32 bytes, signed or not as the word says).
Loads and stores take a one-dimensional array and an ELEMENT offset into it, and check no bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from moelite import lowering
from moelite.jit import HALF_INSTRUCTIONS, TARGET, inlined

# --- vector types -------------------------------------------------------------------------------

_ELEMENT = {"i8": ir.IntType(8), "i32": ir.IntType(32), "f32": ir.FloatType()}
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


class Simd(types.Type):
    """numba type of a vector of `count` elements."""

    def __init__(self, element: str, count: int) -> None:
        self.llvm = ir.VectorType(_ELEMENT[element], count)
        super().__init__(name=f"{element}x{count}")


@register_model(Simd)
class _SimdModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Simd) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


f32x8 = Simd("f32", 8)
i32x8 = Simd("i32", 8)
i8x32 = Simd("i8", 32)
_F8, _I8, _B32 = f32x8.llvm, i32x8.llvm, i8x32.llvm
_H8 = ir.VectorType(ir.HalfType(), 8)
_W8 = ir.VectorType(ir.IntType(16), 8)


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    mask = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, one, mask)


def _call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _word(result: Any, params: tuple[Any, ...], emit: Callable[..., Any]) -> Any:
    """An intrinsic of fixed types: emit(builder, *llvm values) -> llvm value."""

    def typer(*args: Any) -> Any:
        return result(*params)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit(builder, *args)

    names = ", ".join(f"a{i}" for i in range(len(params)))
    scope: dict[str, Any] = {"typer": typer, "codegen": codegen}
    # numba asks for a function with exactly as many parameters as the word has
    exec(
        f"def word(typingctx{', ' if names else ''}{names}): return typer({names}), codegen", scope
    )
    return intrinsic(scope["word"])


def _pointer(context: Any, builder: Any, signature: Any, args: Any, vector: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.bitcast(builder.gep(array.data, [args[1]]), vector.as_pointer())


def _loader(result: Any, memory: Any, widen: Callable[..., Any]) -> Any:
    """An intrinsic word(array, offset): loads `memory`, an LLVM type, and makes it a `result`."""

    @intrinsic
    def load(typingctx, arr, off):
        def codegen(context, builder, signature, args):
            where = _pointer(context, builder, signature, args, memory)
            return widen(builder, builder.load(where, align=1))

        return result(arr, off), codegen

    return load


def _storer(value: Any, memory: Any, narrow: Callable[..., Any]) -> Any:
    """An intrinsic word(array, offset, value): narrows the value and stores it as `memory`."""

    @intrinsic
    def store(typingctx, arr, off, val):
        def codegen(context, builder, signature, args):
            where = _pointer(context, builder, signature, args[:2], memory)
            builder.store(narrow(builder, args[2]), where, align=1)
            return context.get_dummy_value()

        return types.void(arr, off, value), codegen

    return store


def _same(builder: Any, value: Any) -> Any:
    return value


def _bf16_to_f32(b: Any, v: Any) -> Any:
    wide = b.zext(v, _I8)
    return b.bitcast(b.shl(wide, ir.Constant(_I8, [16] * 8)), _F8)


# --- float words --------------------------------------------------------------------------------

load_f32 = _loader(f32x8, _F8, _same)
load_f16 = _loader(
    f32x8, _W8, lambda b, v: lowering.half_to_f32(b, HALF_INSTRUCTIONS, v)
)  # IEEE half, in a uint16 array
load_bf16 = _loader(f32x8, _W8, _bf16_to_f32)  # in a uint16 array
store_f32 = _storer(f32x8, _F8, _same)
store_f16 = _storer(f32x8, _W8, lambda b, v: lowering.f32_to_half(b, HALF_INSTRUCTIONS, v))
store_one = _storer(types.float32, ir.FloatType(), _same)  # one float, as bytes where they are
splat_f32 = _word(f32x8, (types.float32,), lambda b, x: _splat(b, x, _F8))
# one element of an array, 8 times. array[offset] would also ask whether the offset is negative,
# which costs three instructions a use in the innermost loops.
splat_f32_at = _loader(f32x8, ir.FloatType(), lambda b, v: _splat(b, v, _F8))
splat_i32_at = _loader(i32x8, _I32, lambda b, v: _splat(b, v, _I8))
zero_f32 = _word(f32x8, (), lambda b: ir.Constant(_F8, [0.0] * 8))
add_f32 = _word(f32x8, (f32x8, f32x8), lambda b, x, y: b.fadd(x, y))
sub_f32 = _word(f32x8, (f32x8, f32x8), lambda b, x, y: b.fsub(x, y))
mul_f32 = _word(f32x8, (f32x8, f32x8), lambda b, x, y: b.fmul(x, y))
div_f32 = _word(f32x8, (f32x8, f32x8), lambda b, x, y: b.fdiv(x, y))
fma_f32 = _word(  # x * y + z, rounded once
    f32x8, (f32x8, f32x8, f32x8), lambda b, x, y, z: _call(b, "llvm.fma.v8f32", _F8, [x, y, z])
)
max_f32 = _word(  # where either is NaN: the second
    f32x8, (f32x8, f32x8), lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y)
)
min_f32 = _word(f32x8, (f32x8, f32x8), lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
abs_f32 = _word(f32x8, (f32x8,), lambda b, x: _call(b, "llvm.fabs.v8f32", _F8, [x]))
round_f32 = _word(  # to the nearest integer, ties to even
    f32x8, (f32x8,), lambda b, x: _call(b, "llvm.nearbyint.v8f32", _F8, [x])
)


sum_f32 = _word(types.float32, (f32x8,), lambda b, v: lowering.fold(b, v, b.fadd))


sums_f32 = _word(
    f32x8, (f32x8,) * 8, lambda b, *v: lowering.sums(b, v)
)  # lane i: sum_f32 of the i-th, bit for bit
largest_f32 = _word(
    types.float32,
    (f32x8,),
    lambda b, v: lowering.fold(b, v, lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y)),
)


def _pow2(b: Any, v: Any) -> Any:
    n = b.add(b.fptosi(v, _I8), ir.Constant(_I8, [127] * 8))
    return b.bitcast(b.shl(n, ir.Constant(_I8, [23] * 8)), _F8)


pow2_f32 = _word(f32x8, (f32x8,), _pow2)  # 2 ** v for whole v in [-126, 127]


@inlined
def exp_f32(x):
    """e**x of 8 floats, relative error < 2e-7 on [-87, 88]; beyond, as at the nearer end.

    x = n ln 2 + r, |r| <= ln(2)/2; e**r by its Taylor polynomial of degree 7 (remainder 5e-9).
    """
    x = max_f32(min_f32(x, splat_f32(numba.float32(88.0))), splat_f32(numba.float32(-87.0)))
    n = round_f32(mul_f32(x, splat_f32(numba.float32(1.4426950408889634))))
    r = fma_f32(n, splat_f32(numba.float32(-0.693145751953125)), x)
    r = fma_f32(n, splat_f32(numba.float32(-1.428606765330187e-06)), r)
    p = splat_f32(numba.float32(1.0 / 5040))
    p = fma_f32(p, r, splat_f32(numba.float32(1.0 / 720)))
    p = fma_f32(p, r, splat_f32(numba.float32(1.0 / 120)))
    p = fma_f32(p, r, splat_f32(numba.float32(1.0 / 24)))
    p = fma_f32(p, r, splat_f32(numba.float32(1.0 / 6)))
    p = fma_f32(p, r, splat_f32(numba.float32(0.5)))
    p = fma_f32(p, r, splat_f32(numba.float32(1.0)))
    p = fma_f32(p, r, splat_f32(numba.float32(1.0)))
    return mul_f32(p, pow2_f32(n))


# --- integer words ------------------------------------------------------------------------------

load_i8x32 = _loader(i8x32, _B32, _same)
load_i8_as_f32 = _loader(
    f32x8, ir.VectorType(ir.IntType(8), 8), lambda b, v: b.sitofp(b.sext(v, _I8), _F8)
)  # 8 signed bytes


def _half_power(b: Any, v: Any) -> Any:
    wide = b.zext(v, _I8)
    one, two = ir.Constant(_I8, [1] * 8), ir.Constant(_I8, [2] * 8)
    normal = b.shl(b.sub(wide, one), ir.Constant(_I8, [23] * 8))
    small = b.shl(ir.Constant(_I8, [1 << 21] * 8), wide)  # subnormal
    return b.bitcast(b.select(b.icmp_unsigned("<", wide, two), small, normal), _F8)


load_e8m0_half = _loader(  # 8 bytes e: 2 ** (e - 128), half of what an MX scale stands for
    f32x8, ir.VectorType(ir.IntType(8), 8), _half_power
)
store_i8x32 = _storer(i8x32, _B32, _same)
store_f32_as_i8 = _storer(  # 8 whole floats in [-127, 127] to 8 signed bytes
    f32x8,
    ir.VectorType(ir.IntType(8), 8),
    lambda b, v: b.trunc(b.fptosi(v, _I8), ir.VectorType(ir.IntType(8), 8)),
)
zero_i32 = _word(i32x8, (), lambda b: ir.Constant(_I8, [0] * 8))
sum_i32 = _word(types.int32, (i32x8,), lambda b, v: lowering.fold(b, v, b.add))
f32_as_i32 = _word(i32x8, (f32x8,), lambda b, v: b.fptosi(v, _I8))
add_i32 = _word(i32x8, (i32x8, i32x8), lambda b, x, y: b.add(x, y))
to_f32 = _word(f32x8, (i32x8,), lambda b, x: b.sitofp(x, _F8))
splat_i8 = _word(i8x32, (types.int8,), lambda b, x: _splat(b, x, _B32))
add_i8 = _word(i8x32, (i8x32, i8x32), lambda b, x, y: b.add(x, y))  # wraps
and_i8 = _word(i8x32, (i8x32, i8x32), lambda b, x, y: b.and_(x, y))
bits_i8 = (
    _word(  # byte i: 1 where bit i of the first, 2 where bit i of the second, of distinct bits
        i8x32, (types.uint32, types.uint32), lambda b, x, y: lowering.bits(b, x, y)
    )
)
splat4 = _loader(i8x32, _I32, lambda b, v: b.bitcast(_splat(b, v, _I8), _B32))  # 4 bytes, 8 times
load_table16 = _loader(  # a 16-byte table, in both halves
    i8x32,
    ir.VectorType(ir.IntType(8), 16),
    lambda b, v: b.shuffle_vector(v, v, ir.Constant(ir.VectorType(_I32, 32), [*range(16)] * 2)),
)


def _transpose(b: Any, *v: Any) -> Any:
    out = ir.Constant(ir.ArrayType(_B32, 8), ir.Undefined)
    for i, vector in enumerate(lowering.transpose(b, list(v))):
        out = b.insert_value(out, vector, i)
    return out


transpose_i8x4 = _word(  # 8 vectors of 8 groups of 4 bytes -> as many: the i-th has group i of each
    types.UniTuple(i8x32, 8), (i8x32,) * 8, _transpose
)


lookup_low = _word(  # table[v & 15]
    i8x32, (i8x32, i8x32), lambda b, *a: lowering.lookup_low(b, TARGET, *a)
)
lookup_high = _word(  # table[v >> 4]
    i8x32, (i8x32, i8x32), lambda b, *a: lowering.lookup_high(b, TARGET, *a)
)


def _entries(size: int) -> Any:
    """An intrinsic word(table, codes, offset): for 8 codes from codes[offset], their entries of
    `size` bytes in a byte table of 256, as size / 4 vectors of 4 bytes a code: see lowering."""
    result = i8x32 if size == 4 else types.UniTuple(i8x32, size // 4)

    @intrinsic
    def entries(typingctx, table, codes, off):
        def codegen(context, builder, signature, args):
            byte, at = ir.IntType(8), signature.args[1:]
            where = _pointer(context, builder, at[0](*at), args[1:], byte)
            entry = context.make_array(signature.args[0])(context, builder, args[0]).data
            found = lowering.entries(builder, size, entry, where)
            return found[0] if size == 4 else context.make_tuple(builder, result, found)

        return result(table, codes, off), codegen

    return entries


entries4, entries8, entries16 = _entries(4), _entries(8), _entries(16)
dot_u7 = _word(i32x8, (i32x8, i8x32, i8x32), lambda b, *a: lowering.dot_u7(b, TARGET, *a))
dot_i8 = _word(i32x8, (i32x8, i8x32, i8x32), lambda b, *a: lowering.dot_i8(b, TARGET, *a))


# --- 512-bit vectors, where jit.WIDE ------------------------------------------------------------

f32x16 = Simd("f32", 16)
i32x16 = Simd("i32", 16)
i8x64 = Simd("i8", 64)
_F16, _I16, _B64 = f32x16.llvm, i32x16.llvm, i8x64.llvm


def _dot_u8_wide(b: Any, acc: Any, w: Any, x: Any) -> Any:
    args = [acc, b.bitcast(w, _I16), b.bitcast(x, _I16)]
    return _call(b, "llvm.x86.avx512.vpdpbusd.512", _I16, args)


class Wide:
    """The words of a product over many tokens, 16 lanes; `Narrow` has the same with 8."""

    lanes = 16
    splat_f32 = _word(f32x16, (types.float32,), lambda b, x: _splat(b, x, _F16))
    zero = _word(f32x16, (), lambda b: ir.Constant(_F16, [0.0] * 16))
    load_codes = _loader(i8x64, _B64, _same)
    load_scales = _loader(f32x16, _F16, _same)
    store = _storer(f32x16, _F16, _same)
    splat4 = _loader(i8x64, _I32, lambda b, v: b.bitcast(_splat(b, v, _I16), _B64))
    splat_f32_at = _loader(f32x16, ir.FloatType(), lambda b, v: _splat(b, v, _F16))
    splat_i32_at = _loader(i32x16, _I32, lambda b, v: _splat(b, v, _I16))
    zero_i32 = _word(i32x16, (), lambda b: ir.Constant(_I16, [0] * 16))
    add_i32 = _word(i32x16, (i32x16, i32x16), lambda b, x, y: b.add(x, y))
    mul = _word(f32x16, (f32x16, f32x16), lambda b, x, y: b.fmul(x, y))
    fma = _word(
        f32x16,
        (f32x16, f32x16, f32x16),
        lambda b, x, y, z: _call(b, "llvm.fma.v16f32", _F16, [x, y, z]),
    )
    to_f32 = _word(f32x16, (i32x16,), lambda b, x: b.sitofp(x, _F16))
    dot_u8 = _word(i32x16, (i32x16, i8x64, i8x64), _dot_u8_wide)


class Narrow:
    """The same words with 8 lanes."""

    lanes = 8
    splat_f32 = splat_f32
    zero, load_codes, load_scales, store = zero_f32, load_i8x32, load_f32, store_f32
    splat4, splat_f32_at, splat_i32_at = splat4, splat_f32_at, splat_i32_at
    zero_i32, add_i32, mul, fma, to_f32 = zero_i32, add_i32, mul_f32, fma_f32, to_f32
    dot_u8 = dot_u7  # of unsigned codes up to 127; with vnni up to 255
