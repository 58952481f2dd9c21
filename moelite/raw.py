"""Addresses, prefetch and the clock, for compiled code.

Arrays travel to compiled code as (address, size) words of a job (moelite.words): the caller keeps
them alive while the job runs. Nothing here checks bounds.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic

from moelite.jit import inlined

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _address(typingctx, array):
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, _I64)

    return types.int64(array), codegen


address: Any = intrinsic(_address)  # of an array's first element


def _prefetch_at(typingctx, where):
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], _I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
        word = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(word, [place, *(ir.Constant(_I32, n) for n in (0, 3, 1))])  # read, keep, data
        return context.get_dummy_value()

    return types.void(types.int64), codegen


prefetch_at: Any = intrinsic(_prefetch_at)  # asks for the cache line at an address, valid or not


def _pointer_word(element: Any) -> Any:
    def pointer(typingctx, where):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return intrinsic(pointer)


_u8, _i8, _u16, _i32, _i64, _f32 = map(
    _pointer_word,
    (types.uint8, types.int8, types.uint16, types.int32, types.int64, types.float32),
)


@inlined
def u8_at(where, size):
    """uint8 [size] at an address."""
    return carray(_u8(where), size)


@inlined
def i8_at(where, size):
    """int8 [size] at an address."""
    return carray(_i8(where), size)


@inlined
def u16_at(where, size):
    """uint16 [size] at an address."""
    return carray(_u16(where), size)


@inlined
def i32_at(where, size):
    """int32 [size] at an address."""
    return carray(_i32(where), size)


@inlined
def i64_at(where, size):
    """int64 [size] at an address."""
    return carray(_i64(where), size)


@inlined
def f32_at(where, size):
    """float32 [size] at an address."""
    return carray(_f32(where), size)


def _bits(typingctx, word):
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], _I32), ir.FloatType())

    return types.float32(types.int64), codegen


f32_of: Any = intrinsic(_bits)  # the float32 whose bits are the low half of a word


def _ticks(typingctx):
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I64, [])
        if _ARM:  # the cycle counter is not for programs there; the system's timer is
            return builder.asm(kind, "mrs $0, cntvct_el0", "=r", [], True)
        word = cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter")
        return builder.call(word, [])

    return types.int64(), codegen


_ARM = binding.get_process_triple().startswith(("aarch64", "arm64"))
ticks: Any = intrinsic(_ticks)  # a clock of steady but unknown rate


def call(count: int) -> Any:
    """An intrinsic call(address, a0, ...) of compiled void (int64 * count)."""
    return _calling(count, ir.VoidType(), types.void)


def ask(count: int) -> Any:
    """An intrinsic ask(address, a0, ...) of compiled int64 (int64 * count)."""
    return _calling(count, _I64, types.int64)


def _calling(count: int, returned: Any, seen: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(returned, [_I64] * count)
        found = builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value() if seen is types.void else found

    names = ", ".join(f"a{i}" for i in range(count + 1))
    scope = {"result": seen(*[types.int64] * (count + 1)), "codegen": codegen}
    exec(f"def call(typingctx, {names}): return result, codegen", scope)
    return intrinsic(scope["call"])
