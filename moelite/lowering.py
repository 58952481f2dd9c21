"""How words of moelite.simd become instructions, target by target: LLVM IR, no numba.

Every function takes the target it emits for, so that code for a CPU which is not here can be made
and looked at, or run under an emulator. All targets give the same bits:

    vbmi     as vnni, and AVX-512-VBMI: vpermb looks bytes up by their low bits, whatever the others
    vnni     x86 with AVX-VNNI or AVX-512-VNNI+VL: vpdpbusd, 32 products in one instruction
    avx2     vpmaddubsw (int16 pair sums, which saturate: see `dot_u7`) + vpmaddwd
    neon     aarch64 with dot products: two sdot of 16 products
    plain    widening multiplies, for any other CPU
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

TARGETS = ("vbmi", "vnni", "avx2", "neon", "plain")
VNNI = ("vbmi", "vnni")

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
F32X8, I32X8 = ir.VectorType(ir.FloatType(), 8), ir.VectorType(I32, 8)
I8X16, I8X32 = ir.VectorType(I8, 16), ir.VectorType(I8, 32)
I16X8, I16X16, F16X8 = (
    ir.VectorType(ir.IntType(16), 8),
    ir.VectorType(ir.IntType(16), 16),
    ir.VectorType(ir.HalfType(), 8),
)


def call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """Calls an LLVM intrinsic, declared in the builder's module if it is not yet."""
    kind = ir.FunctionType(result, [a.type for a in args])
    function = builder.module.globals.get(name)
    return builder.call(function or ir.Function(builder.module, kind, name), args)


def lanes(builder: Any, x: Any, y: Any, order: list[int]) -> Any:
    """A vector of the lanes `order` of x and y, y's counted after x's."""
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(order)), order))


def _halves(builder: Any, v: Any) -> tuple[Any, Any]:
    n = v.type.count // 2
    return lanes(builder, v, v, list(range(n))), lanes(builder, v, v, list(range(n, 2 * n)))


def _join(builder: Any, low: Any, high: Any) -> Any:
    return lanes(builder, low, high, list(range(2 * low.type.count)))


# --- integer dot products -----------------------------------------------------------------------


def _dot4(b: Any, acc: Any, x: Any, y: Any, widen_x: Any) -> Any:
    # acc[i] + the sum of the 4 products of lane i, widened to 32 bits
    wide = ir.VectorType(I32, 32)
    product = b.mul(widen_x(x, wide), b.sext(y, wide))
    for start in range(4):
        acc = b.add(acc, lanes(b, product, product, [4 * i + start for i in range(8)]))
    return acc


def _sdot(b: Any, acc: Any, x: Any, y: Any) -> Any:
    parts = zip(_halves(b, acc), _halves(b, x), _halves(b, y), strict=True)
    name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
    return _join(b, *(call(b, name, a.type, [a, v, w]) for a, v, w in parts))


def dot_u7(b: Any, target: str, acc: Any, w: Any, x: Any) -> Any:
    """acc + 8 dot products of 4: w unsigned <= 127, x signed in [-127, 127].

    On avx2 two products are first summed in int16: 2 * 127 * 127 = 32,258 < 32,768, so it is exact.
    """
    if target in VNNI:
        args = [acc, b.bitcast(w, I32X8), b.bitcast(x, I32X8)]
        return call(b, "llvm.x86.avx512.vpdpbusd.256", I32X8, args)
    if target == "avx2":
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", I16X16, [w, x])
        ones = ir.Constant(I16X16, [1] * 16)
        return b.add(acc, call(b, "llvm.x86.avx2.pmadd.wd", I32X8, [pairs, ones]))
    if target == "neon":  # up to 127, unsigned bytes are signed ones
        return _sdot(b, acc, w, x)
    return _dot4(b, acc, w, x, b.zext)


def dot_i8(b: Any, target: str, acc: Any, w: Any, x: Any) -> Any:
    """acc + 8 dot products of 4, both signed in [-127, 127]. On x86: |w| times x with w's sign."""
    if target == "neon":
        return _sdot(b, acc, w, x)
    if target == "plain":
        return _dot4(b, acc, w, x, b.sext)
    zero = ir.Constant(I8X32, [0] * 32)
    size = b.select(b.icmp_signed("<", w, zero), b.neg(w), w)
    return dot_u7(b, target, acc, size, call(b, "llvm.x86.avx2.psign.b", I8X32, [x, w]))


# --- tables -------------------------------------------------------------------------------------


def lookup_low(b: Any, target: str, table: Any, v: Any) -> Any:
    """table[v & 15] for 32 bytes v; table: 16 bytes, in both halves of the vector."""
    if target == "vbmi":  # reads 5 bits, and the table is there twice
        return call(b, "llvm.x86.avx512.permvar.qi.256", I8X32, [table, v])
    return _lookup16(b, target, table, b.and_(v, ir.Constant(I8X32, [15] * 32)))


def lookup_high(b: Any, target: str, table: Any, v: Any) -> Any:
    """table[v >> 4] for 32 unsigned bytes v."""
    four = ir.Constant(I16X16, [4] * 16)  # AVX2 has no byte shift: a neighbour's bits come along
    shifted = b.bitcast(b.lshr(b.bitcast(v, I16X16), four), I8X32)
    return lookup_low(b, target, table, shifted)


def _lookup16(b: Any, target: str, table: Any, index: Any) -> Any:
    # index: 0..15
    if target in ("vnni", "avx2"):
        return call(b, "llvm.x86.avx2.pshuf.b", I8X32, [table, index])
    if target == "neon":
        entries, parts = _halves(b, table)[0], _halves(b, index)
        name = "llvm.aarch64.neon.tbl1.v16i8"
        return _join(b, *(call(b, name, I8X16, [entries, part]) for part in parts))
    out = ir.Constant(I8X32, ir.Undefined)
    for i in range(32):
        lane = ir.Constant(I32, i)
        at = b.zext(b.extract_element(index, lane), I32)
        out = b.insert_element(out, b.extract_element(table, at), lane)
    return out


def entries(b: Any, size: int, table: Any, codes: Any) -> list[Any]:
    """Entries of `size` bytes, 4, 8 or 16, for 8 codes: size / 4 vectors whose lane r holds the
    next 4 bytes of the entry of code r. table, codes: pointers to bytes.

    Loads and shuffles only: a table of 256 entries lies in the first-level cache, and on the CPU
    this was measured on a gather instruction is no faster than eight loads.
    """
    words, found = size // 4, []
    entry = ir.VectorType(I32, words).as_pointer()
    for r in range(8):
        code = b.zext(b.load(b.gep(codes, [ir.Constant(I64, r)]), align=1), I64)
        at = b.gep(table, [b.mul(code, ir.Constant(I64, size))])
        found.append(b.load(b.bitcast(at, entry), align=1))
    while len(found) > 1:  # neighbours joined: [word 0 of r, r + 1, .., word 1 of r, r + 1, ..]
        width = found[0].type.count
        n = width // words
        order = [v * width + w * n + i for w in range(words) for v in (0, 1) for i in range(n)]
        found = [lanes(b, x, y, order) for x, y in zip(found[::2], found[1::2], strict=True)]
    whole = found[0]
    parts = [lanes(b, whole, whole, list(range(w * 8, w * 8 + 8))) for w in range(words)]
    return [b.bitcast(part, I8X32) for part in parts]


# --- half precision -----------------------------------------------------------------------------


def _each(value: int) -> Any:
    return ir.Constant(I32X8, [value] * 8)


def half_to_f32(b: Any, native: bool, v: Any) -> Any:
    """8 IEEE halves, as 16-bit integers, to float32. native: the CPU has an instruction for it."""
    if native:
        return b.fpext(b.bitcast(v, F16X8), F32X8)
    # without the instruction LLVM would call a library that is not there. The half's bits, moved to
    # a float's place, times 2^112: right for normal and subnormal numbers.
    wide = b.zext(v, I32X8)
    bits = b.shl(b.and_(wide, _each(0x7FFF)), _each(13))
    scale = ir.Constant(F32X8, [2.0**112] * 8)
    finite = b.bitcast(b.fmul(b.bitcast(bits, F32X8), scale), I32X8)
    special = b.icmp_unsigned(">=", bits, _each(0x7C00 << 13))
    size = b.select(special, b.or_(bits, _each(0x7F800000)), finite)
    return b.bitcast(b.or_(size, b.shl(b.and_(wide, _each(0x8000)), _each(16))), F32X8)


def f32_to_half(b: Any, native: bool, v: Any) -> Any:
    """8 float32 to IEEE halves, as 16-bit integers, rounded to nearest, ties to even."""
    if native:
        return b.bitcast(b.fptrunc(v, F16X8), I16X8)
    raw = b.bitcast(v, I32X8)
    sign = b.lshr(b.and_(raw, _each(-0x80000000)), _each(16))
    size = b.and_(raw, _each(0x7FFFFFFF))
    odd = b.and_(b.lshr(size, _each(13)), _each(1))
    normal = b.lshr(b.add(b.add(size, _each(0xFFF - (112 << 23))), odd), _each(13))
    half = ir.Constant(F32X8, [0.5] * 8)  # adding it rounds at a half's last subnormal bit, 2^-24
    small = b.sub(b.bitcast(b.fadd(b.bitcast(size, F32X8), half), I32X8), _each(0x3F000000))
    out = b.select(b.icmp_unsigned("<", size, _each(113 << 23)), small, normal)
    out = b.select(b.icmp_unsigned(">=", size, _each(0x477FF000)), _each(0x7C00), out)
    out = b.select(b.icmp_unsigned(">", size, _each(0x7F800000)), _each(0x7E00), out)
    return b.trunc(b.or_(out, sign), I16X8)


# --- sums over lanes ----------------------------------------------------------------------------


def fold(b: Any, v: Any, join: Callable[[Any, Any], Any]) -> Any:
    """All 8 lanes joined: those 4 apart, then 2, then neighbours."""
    for step in (4, 2, 1):
        v = join(v, lanes(b, v, v, [(i + step) % 8 for i in range(8)]))
    return b.extract_element(v, ir.Constant(I32, 0))


def sums(b: Any, v: tuple[Any, ...]) -> Any:
    """Lane i: the sum of vector i of 8, by the additions of `fold`, two vectors in one."""

    def join(x: Any, y: Any, left: list[int], step: int) -> Any:
        return b.fadd(lanes(b, x, y, left), lanes(b, x, y, [i + step for i in left]))

    half = [join(v[i], v[i + 4], [0, 1, 2, 3, 8, 9, 10, 11], 4) for i in range(4)]
    quarter = [join(half[i], half[i + 1], [0, 1, 8, 9, 4, 5, 12, 13], 2) for i in (0, 2)]
    return join(quarter[0], quarter[1], [0, 2, 8, 10, 4, 6, 12, 14], 1)


def transpose(b: Any, v: Any) -> list[Any]:
    """8 vectors of 8 groups of 4 bytes -> vector i: group i of each. 24 shuffles."""
    v = [b.bitcast(x, I32X8) for x in v]
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    v = [lanes(b, v[i], v[i + 1], order) for i in range(0, 8, 2) for order in (low, high)]
    # v[2 i], v[2 i + 1]: groups 0 1 4 5 and 2 3 6 7 of vectors 2 i and 2 i + 1, in pairs
    low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    v = [lanes(b, v[i + k], v[i + 2 + k], o) for i in (0, 4) for k in (0, 1) for o in (low, high)]
    # v[k], v[4 + k]: groups k and 4 + k of vectors 0..3, of vectors 4..7
    low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    return [b.bitcast(lanes(b, v[k], v[4 + k], o), I8X32) for o in (low, high) for k in range(4)]


def bits(b: Any, ones: Any, twos: Any) -> Any:
    """Byte i: 1 where bit i of `ones` is set, else 2 where that of `twos` is, else 0."""
    flags = ir.VectorType(ir.IntType(1), 32)
    zero, one, two = (ir.Constant(I8X32, [n] * 32) for n in range(3))
    return b.select(b.bitcast(ones, flags), one, b.select(b.bitcast(twos, flags), two, zero))
