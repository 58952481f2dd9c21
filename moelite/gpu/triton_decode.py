"""Triton: how the tiles of every format become float32, for the kernels of triton_tiles.py.

A tile is looked at in lanes [8 rows, units, tiles]: a unit is UNIT neighbouring columns, 8 where
codes are 4 bits, else 4, so a lane of 4-bit or 8-bit codes is one 32-bit word. Neighbouring units
of a group of blocks follow one another in memory: a warp reads one run of bytes. Rows come first
because the compiler gives a table's lookups the first dimension as the one that threads run along:
so they keep the layout of the codes, and nothing is exchanged between threads.

KIND of a format is its place in KINDS; functions that depend on it are resolved when compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

KINDS = ("int8", "int4", "int4-f16", "mxfp4", "nf4", "nf4-dq", "vq")
INT8 = tl.constexpr(0)
INT4 = tl.constexpr(1)
INT4_F16 = tl.constexpr(2)
MXFP4 = tl.constexpr(3)
NF4 = tl.constexpr(4)
NF4_DQ = tl.constexpr(5)
VQ = tl.constexpr(6)


@triton.jit
def signed(word, j: tl.constexpr):
    """Byte j of int32 words, as float32."""
    return ((word << (24 - 8 * j)) >> 24).to(tl.float32)


@triton.jit
def entry(at, table, code, there, OWN: tl.constexpr):
    """What codes 0..15 stand for, float32. OWN: the int8 table is in the tile's head."""
    if OWN:
        value = tl.load((at + 32).to(tl.pointer_type(tl.int8)) + code, mask=there, other=0)
        value = value.to(tl.float32)
    else:
        value = tl.load(table + code)
    return value


@triton.jit
def nibbles(at, table, word, there, OWN: tl.constexpr):
    """The 8 columns of lanes of 4-bit codes: low halves first."""
    return (
        entry(at, table, word & 15, there, OWN),
        entry(at, table, (word >> 8) & 15, there, OWN),
        entry(at, table, (word >> 16) & 15, there, OWN),
        entry(at, table, (word >> 24) & 15, there, OWN),
        entry(at, table, (word >> 4) & 15, there, OWN),
        entry(at, table, (word >> 12) & 15, there, OWN),
        entry(at, table, (word >> 20) & 15, there, OWN),
        entry(at, table, (word >> 28) & 15, there, OWN),
    )


@triton.jit
def vq_word(at, table, lanes, there, PLANE: tl.constexpr, D: tl.constexpr):
    """4 bytes of the entry that a plane's codes name. lanes: (block, column of the block, row).

    PLANE: bytes of a block before the plane's codes, and of all its planes. D: an entry's length.
    """
    block, column, row = lanes
    code_at = 16 + block * PLANE[1] + PLANE[0] + column // D * 8 + row
    code = tl.load(at + code_at, mask=there, other=0).to(tl.int32)
    return tl.load(table + code * (D // 4) + column % D // 4)


@triton.jit
def values(
    at,
    lanes,
    there,
    table,
    second,
    KIND: tl.constexpr,
    HEAD: tl.constexpr,
    SCALES: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    """UNIT float32 tensors, one a column, of lanes before their scales.

    at: uint8 pointers [1, 1, tiles]; lanes: (first block of the run, unit of the run, row).
    """
    first, unit, row = lanes
    words = at.to(tl.pointer_type(tl.int32))
    if KIND == VQ:
        block, column = first + unit // 8, unit % 8 * 4
        size: tl.constexpr = 256 // D0 + (256 // D1 if D1 else 0)
        where = block, column, row
        word = vq_word(at, table, where, there, (0, size), D0)
        found = signed(word, 0), signed(word, 1), signed(word, 2), signed(word, 3)
        if D1:
            more = vq_word(at, second, where, there, (256 // D0, size), D1)
            found = (
                found[0] + signed(more, 0),
                found[1] + signed(more, 1),
                found[2] + signed(more, 2),
                found[3] + signed(more, 3),
            )
    elif KIND == INT8:
        # words before a block's codes: the scales of its group and of those before it
        skip = (first + unit // 8) // 8 * (2 * SCALES) + 2 * SCALES
        word = tl.load(words + skip + first * 64 + unit * 8 + row, mask=there, other=0)
        found = signed(word, 0), signed(word, 1), signed(word, 2), signed(word, 3)
    else:
        skip = HEAD // 4 + (first + unit // 4) // 8 * (2 * SCALES) + 2 * SCALES
        word = tl.load(words + skip + first * 32 + unit * 8 + row, mask=there, other=0)
        found = nibbles(at, table, word, there, KIND == INT4 or KIND == INT4_F16)
    return found


@triton.jit
def nested_absmax(at, place, span, row, spans, there, held, absmax, HEAD: tl.constexpr):
    """nf4-dq's absmax: of codes at byte `place` of a tile, see quant/nf4_dq.py."""
    head = at.to(tl.pointer_type(tl.float32))
    code = tl.load(at + HEAD + place + row, mask=there, other=0).to(tl.int32)
    before = tl.load(head + 1, mask=held, other=0).to(tl.int32)
    nested = tl.load(head + 2 + (before + span + row * spans) // 256, mask=there, other=0)
    return tl.load(absmax + code) * nested + tl.load(head, mask=held, other=0)


@triton.jit
def block_scale(
    at,
    block,
    row,
    there,
    held,
    spans,
    absmax,
    KIND: tl.constexpr,
    HEAD: tl.constexpr,
    SCALES: tl.constexpr,
):
    """The scales of lanes' blocks, float32. block: [1, units, 1]; held: whether a tile is
    there, [1, 1, tiles]; spans: absmax of a row."""
    codes: tl.constexpr = 2048 if KIND == INT8 else 1024  # of a group
    group, inner = block // 8 * (8 * SCALES + codes), block % 8
    if KIND == INT8 or KIND == INT4_F16:
        halves = (at + HEAD).to(tl.pointer_type(tl.float16))
        scale = tl.load(halves + group // 2 + inner * 8 + row, mask=there, other=0).to(tl.float32)
    elif KIND == INT4:
        bytes_ = (at + HEAD).to(tl.pointer_type(tl.int8))
        scale = tl.load(bytes_ + group + inner * 8 + row, mask=there, other=0).to(tl.float32)
    elif KIND == MXFP4:
        e = tl.load(at + HEAD + group + inner * 8 + row, mask=there, other=2).to(tl.int32)
        # 2^(e - 128): below 2^-126 what is left of the mantissa's leading bits
        bits = tl.where(e > 1, (e - 1) << 23, 0x00200000 << e)
        scale = bits.to(tl.float32, bitcast=True)
    elif KIND == NF4:
        words = (at + HEAD).to(tl.pointer_type(tl.float32))
        scale = tl.load(words + group // 4 + inner // 2 * 8 + row, mask=there, other=0)
    else:
        place = group + inner // 2 * 8
        scale = nested_absmax(at, place, block // 2, row, spans, there, held, absmax, HEAD)
    return scale


@triton.jit
def row_scale(at, row, there, KIND: tl.constexpr):
    """The factor of whole rows, float32 [8, 1, tiles], of the kinds that have one."""
    if KIND == VQ:
        halves = at.to(tl.pointer_type(tl.uint16))
        bits = tl.load(halves + row, mask=there, other=0).to(tl.int32) << 16
        scale = bits.to(tl.float32, bitcast=True)
    else:
        scale = tl.load(at.to(tl.pointer_type(tl.float32)) + row, mask=there, other=0)
    return scale
