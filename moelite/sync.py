"""How the threads of a team work on one kernel: pieces, phases, and entering late.

A kernel is a row of phases, each a number of pieces. A thread takes the next piece of the phase it
is in until none is left, then waits until all pieces of the phase are done, by whomever. So a phase
waits for work, never for a thread: one that the system has put aside takes nothing and holds up
nobody, and when it comes back it finds the phase over and moves on.

`sync` is int64 [SIZE], its words on cache lines of their own: word 0 the state of the job (below),
then for each phase the next piece and the pieces done.

State: job number * 2^20 + threads inside. Odd job numbers are open, even ones closed. A helper
counts itself in, and leaves again at once if the job it came for is no longer the one that is open.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from moelite.jit import inlined, kernel

PHASES = 12
_LINE = 8  # int64 words of a cache line
SIZE = (1 + 2 * PHASES) * _LINE
JOB = 1 << 20
_SPINS = 2000  # about 20 microseconds of polling before the core is offered to others

_I64 = ir.IntType(64)
_X86 = binding.get_process_triple().startswith(("x86_64", "i386", "i686"))
_YIELD = binding.address_of_symbol("sched_yield") is not None


def _add_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.atomic_rmw("add", builder.gep(array.data, [args[1]]), args[2], "acq_rel")


def _add(typingctx, array, index, step):
    return types.int64(array, types.int64, types.int64), _add_codegen


# add(array, index, step): atomically array[index] += step; returns what was there before
add: Any = intrinsic(_add)


def _read_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.load_atomic(builder.gep(array.data, [args[1]]), "acquire", 8)


def _read(typingctx, array, index):
    return types.int64(array, types.int64), _read_codegen


read: Any = intrinsic(_read)  # read(array, index): array[index], and all that was written before it


def _call_void(builder: Any, name: str, result: Any) -> None:
    from numba.core import cgutils

    kind = ir.FunctionType(result, [])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])


def _pause(typingctx):
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _X86:
            _call_void(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


def _yield_core(typingctx):
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _YIELD:
            _call_void(builder, "sched_yield", ir.IntType(32))
        return context.get_dummy_value()

    return types.void(), codegen


pause: Any = intrinsic(_pause)  # tells the core that this is a waiting loop
yield_core: Any = intrinsic(_yield_core)  # lets another thread have the core


@inlined
def take(sync, phase):
    """The next piece of a phase; past the last one when none is left."""
    return add(sync, (1 + 2 * phase) * _LINE, 1)


@inlined
def done(sync, phase):
    """One taken piece of a phase is finished, its results written."""
    add(sync, (2 + 2 * phase) * _LINE, 1)


@inlined
def wait(sync, phase, pieces):
    """Returns when all pieces of a phase are done."""
    spins = 0
    while read(sync, (2 + 2 * phase) * _LINE) < pieces:
        spins += 1
        if spins < _SPINS:
            pause()
        else:
            yield_core()


@kernel
def open_job(sync):
    """Readies `sync` for a new job and opens it; returns its number, which is odd."""
    for phase in range(PHASES):
        sync[(1 + 2 * phase) * _LINE] = 0
        sync[(2 + 2 * phase) * _LINE] = 0
    return add(sync, 0, JOB) // JOB + 1


@kernel
def close_job(sync):
    """Closes the open job and returns when no helper is inside."""
    add(sync, 0, JOB)
    spins = 0
    while read(sync, 0) % JOB:
        spins += 1
        if spins < _SPINS:
            pause()
        else:
            yield_core()


@kernel
def await_job(sync, last, spins):
    """The number of an open job other than `last`, or 0 if none was opened while polling."""
    for _ in range(spins):
        job = read(sync, 0) // JOB
        if job % 2 == 1 and job != last:
            return job
        pause()
    return np.int64(0)


@kernel
def enter(sync, job):
    """Counts the caller into a job, if it is the open one; False if it came too late."""
    if add(sync, 0, 1) // JOB == job:
        return True
    add(sync, 0, -1)
    return False


@kernel
def leave(sync):
    """Counts the caller out."""
    add(sync, 0, -1)
