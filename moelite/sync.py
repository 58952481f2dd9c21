"""How the threads of a team work on one job: phases, pieces, entering late, leaving at once.

A job is a row of phases, each a number of pieces. Every thread owns an equal run of a phase's
pieces and takes them in order, so that it reads memory in a stream; when its own run is out it
takes from the others'. Then it waits until all pieces of the phase are done, by whomever. So a
phase waits for work, never for a thread: one that the system has put aside holds up the piece it
is in, and when it comes back it finds the phase over and moves on.

`sync` is int64 [sync_size(team, phases)], every word on a cache line of its own: line 0 the number
of the job that is open, or 0; then RING slots. Job n lives in slot n % RING: line 0 of a slot
counts the threads inside, then come for each phase a line of pieces done and, for each thread, a
line of pieces taken from its run. A job is over when its last piece is done; who still is inside
finds nothing to take. Only its slot has to wait for him before it is used again, RING jobs later:
so nobody waits for a thread to wake up just to leave.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from moelite.jit import inlined, inner

RING = 8
_LINE = 8  # int64 words of a cache line
_SPINS = 2000  # about 20 microseconds of polling before the core is offered to others

_I64 = ir.IntType(64)
_ARM = binding.get_process_triple().startswith(("aarch64", "arm64"))
_X86 = binding.get_process_triple().startswith(("x86_64", "i386", "i686"))
_YIELD = binding.address_of_symbol("sched_yield") is not None


class Crew(NamedTuple):
    """One thread in an open job: number tid of `team`; the job's slot begins at sync[slot]."""

    sync: npt.NDArray[np.int64]
    slot: int
    team: int
    tid: int


def slot_words(team: int, phases: int) -> int:
    """int64 words of one slot for jobs of up to `phases` phases."""
    return (1 + phases * (team + 1)) * _LINE


def sync_size(team: int, phases: int) -> int:
    """int64 words of `sync`."""
    return _LINE + RING * slot_words(team, phases)


def _add_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.atomic_rmw("add", builder.gep(array.data, [args[1]]), args[2], "seq_cst")


def _add(typingctx, array, index, step):
    return types.int64(array, types.int64, types.int64), _add_codegen


# add(array, index, step): atomically array[index] += step; returns what was there before
add: Any = intrinsic(_add)


def _write_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, args[0])
    builder.store_atomic(args[2], builder.gep(array.data, [args[1]]), "seq_cst", 8)
    return context.get_dummy_value()


def _write(typingctx, array, index, value):
    return types.void(array, types.int64, types.int64), _write_codegen


write: Any = intrinsic(_write)  # array[index] = value, after all that was written before it


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
        elif _ARM:  # `isb` waits about as long as pause; `yield` does nothing on most cores
            builder.asm(ir.FunctionType(ir.VoidType(), []), "isb", "", [], True)
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
def own(crew, pieces, tid):
    """(first, last + 1) of the run of pieces that thread `tid` takes first."""
    return (
        (pieces * tid + crew.team - 1) // crew.team,
        (pieces * (tid + 1) + crew.team - 1) // crew.team,
    )


@inner
def take(crew, phase, pieces):
    """The next piece of a phase; `pieces` when none is left."""
    line = crew.slot + (1 + phase * (crew.team + 1)) * _LINE
    who = crew.tid
    for _ in range(crew.team):
        first, last = own(crew, pieces, who)
        at = line + (1 + who) * _LINE
        # asked first: an add on another's line takes the line from him
        if read(crew.sync, at) < last - first:
            n = add(crew.sync, at, 1)
            if n < last - first:
                return first + n
        who = who + 1 if who + 1 < crew.team else 0
    return np.int64(pieces)


@inner
def finish(crew, phase, mine, pieces):
    """Reports `mine` pieces as done, their results written; returns when all are."""
    at = crew.slot + (1 + phase * (crew.team + 1)) * _LINE
    if mine:
        add(crew.sync, at, mine)
    spins = 0
    while read(crew.sync, at) < pieces:
        spins += 1
        if spins < _SPINS:
            pause()
        else:
            yield_core()


@inlined
def slot_of(sync, number):
    """Where the slot of job `number` begins."""
    return _LINE + number % RING * ((sync.size - _LINE) // RING)


@inner
def open_job(sync, team, number, phases):
    """Readies the slot of job `number` for `phases` phases, and opens it if there are helpers.

    Nobody may be inside the slot: see `Team.run`.
    """
    slot = slot_of(sync, number)
    sync[slot + 1] = 0
    for i in range(phases * (team + 1)):
        sync[slot + (1 + i) * _LINE] = 0
    if team > 1:
        write(sync, 0, number)
    return slot


@inlined
def stop_job(crew, phase):
    """Says that the job ends with this phase, from within it; to be asked after it, by `stopped`.

    Kept in the slot: a thread that comes back late must see what was said in its own job. With the
    phase: a thread that was put aside may be phases behind the one that stops.
    """
    crew.sync[crew.slot + 1] = phase + 1


@inlined
def stopped(crew, phase):
    """Whether the job ended with `phase`, which is over."""
    return crew.sync[crew.slot + 1] == phase + 1


@inlined
def close_job(sync):
    """Closes the open job: nobody enters it any more."""
    write(sync, 0, 0)


@inner
def await_job(sync, last, spins):
    """The number of an open job other than `last`, or 0 if none was opened while polling."""
    for _ in range(spins):
        job = read(sync, 0)
        if job and job != last:
            return job
        pause()
    return np.int64(0)


@inner
def enter(sync, number):
    """Counts the caller into a job, if it still is the open one."""
    slot = slot_of(sync, number)
    add(sync, slot, 1)
    if read(sync, 0) == number:
        return True
    add(sync, slot, -1)
    return False


@inlined
def leave(sync, slot):
    """Counts the caller out of the job in a slot."""
    add(sync, slot, -1)
