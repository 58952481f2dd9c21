"""What the threads of a team run: tokens through the layers, a batch of experts, the head.

A job is a row of words (moelite.words): its kind, the address of the model's Program, then its
arguments. So a token whose experts are in memory costs one call from Python, and helpers take jobs
without Python at all.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types

from moelite import ops
from moelite.dispatch import unpack_row
from moelite.jit import entry, inlined, inner, kernel
from moelite.kernels import attention, feed_forward, first_row, head, product, query_matrix
from moelite.program import FeedForwardJob, LayerWords, Program, Sum
from moelite.quant.base import PAGE, Act
from moelite.raw import address, ask, call, i64_at, ticks
from moelite.routing import route_row
from moelite.sync import (
    RING,
    Crew,
    await_job,
    close_job,
    enter,
    finish,
    leave,
    open_job,
    slot_of,
    stop_job,
    stopped,
    take,
)
from moelite.words import field, offset_of, reader, size_of

LAYERS, EXPERTS, HEAD, READS = range(4)  # kinds of jobs
PARTS = ("attention", "router", "experts", "dense", "head")  # what Program.times counts
_ATTENTION, _ROUTER, _EXPERTS, _DENSE, _HEAD = range(5)

LAYER_PHASES = 20  # the most that a layer takes, 18, and room for embedding and head
# how the next layer's experts are guessed: not at all, its router applied to this layer's router
# input, or to the residual normed by the next layer's norm
NO_GUESS, OWN_NORM, NEXT_NORM = range(3)
JOB_WORDS = 96  # the longest job, EXPERTS, has 66


LAYER_WORDS = size_of(LayerWords)
_PROGRAM_WORDS = size_of(Program)

_program = reader(Program, "program")
_expert_job = reader(FeedForwardJob, "expert_job")
_act = reader(Act, "act")
_sum = reader(Sum, "sum")
_JOB_AT = 2  # behind the tiers
_ACT_AT = _JOB_AT + size_of(FeedForwardJob)
_SUM_AT = _ACT_AT + size_of(Act)
# where in the words of an EXPERTS job its tiers, number of parts, weights' address and tokens are
EXPERTS_TIERS = 2
EXPERTS_PARTS = 2 + _JOB_AT + offset_of(FeedForwardJob, "parts")
EXPERTS_WEIGHTS = 2 + _SUM_AT + offset_of(Sum, "weights")
EXPERTS_TOKENS = 2 + _SUM_AT + size_of(Sum)

_buffers, _router_matrix = field(LayerWords, "buffers"), field(LayerWords, "attention.router")
_post_norm = field(LayerWords, "attention.post_norm")
_routed, _dense_part = field(LayerWords, "routed"), field(LayerWords, "dense")
_top_k = field(LayerWords, "routed.rule.top_k")
_dense_rows = field(LayerWords, "dense.total.size")


@inner
def _clock(crew, times, part, since):
    # adds what passed `since` to the time of a part; returns now
    now = ticks()
    if crew.tid == 0:
        times[part] += now - since
    return now


@inlined
def _embed(crew, phase, program, ids):
    io = program.buffers
    mine = 0
    piece = take(crew, phase, ids.size)
    while piece < ids.size:
        unpack_row(program.embed, ids[piece], io.x[piece * io.x_width : (piece + 1) * io.x_width])
        mine += 1
        piece = take(crew, phase, ids.size)
    finish(crew, phase, mine, ids.size)


@inlined
def _router(crew, phase, table, at, tokens):
    matrix, io = _router_matrix(table, at), _buffers(table, at)
    to = tokens, io.router_logits, io.router_width
    product(crew, phase, matrix, io.normed, io.rows, to, first_row(crew, matrix))


@inner
def _choose_one(table, at):
    # one token's experts, and where they are; whether one is missing that nothing stands in for
    routed, logits = _routed(table, at), _buffers(table, at).router_logits
    job, out = routed.job, (routed.selected, routed.weights, 0)
    route_row(logits, 0, routed.rule, routed.given, routed.scores, out)
    missing = False
    for k in range(routed.rule.top_k):
        expert = np.int64(routed.selected[k])
        job.base[k] = np.int64(routed.slots[expert]) * PAGE
        job.tier[k] = routed.tier_of[expert]
        if job.base[k] < 0:
            job.base[k] = expert * routed.low_bytes
            job.tier[k] = routed.low_tier
            missing = missing or routed.low_tier < 0
        job.first[k + 1] = k + 1
        job.target[k] = k
    return missing


@inlined
def _look_ahead(crew, phase, program, at, guess):
    # the logits that the router of the layer at words[at] would give for what there is by now
    io, act, matrix = program.buffers, program.buffers.normed, _router_matrix(program.table, at)
    if guess == NEXT_NORM:
        act, mine = program.ahead.act, 0
        piece = take(crew, phase, 1)
        while piece < 1:
            ops.norm_run(io.x, 0, _post_norm(program.table, at), act.x, 0)
            mine += 1
            piece = take(crew, phase, 1)
        finish(crew, phase, mine, 1)
    to = np.int64(1), program.ahead.logits, program.ahead.logits.size
    product(crew, phase + 1, matrix, act, io.rows, to, first_row(crew, matrix))


@inner
def _guess_missing(program, at):
    # the guessed experts of the layer at words[at]; whether one is missing
    routed, ahead = _routed(program.table, at), program.ahead
    out = routed.guessed, ahead.weights, 0
    route_row(ahead.logits, 0, routed.rule, ahead.free, routed.scores, out)
    missing = False
    for k in range(routed.rule.top_k):
        if routed.slots[routed.guessed[k]] < 0:
            missing = True
    return missing


@inlined
def _choose(crew, phase, program, at, tokens, guess):
    # many tokens, or an expert that is missing or soon will be: the job ends here, it is Python's
    # turn. guess: the next layer's experts are guessed, too
    mine = 0
    piece = take(crew, phase, 1)
    while piece < 1:
        stop = tokens > 1 or _choose_one(program.table, at)
        if guess and _guess_missing(program, at + LAYER_WORDS):
            stop = True
        if stop:
            stop_job(crew, phase)
        mine += 1
        piece = take(crew, phase, 1)
    finish(crew, phase, mine, 1)


# --- parts compiled alone -----------------------------------------------------------------------
#
# Each is called by address, like a format's code. What is compiled alone is not compiled once more
# with every function that calls it, and two of them are compiled side by side.

ROUTED, SHARED, BATCH = range(3)  # what `feed` computes


def _attention(sync, size, slot, team, tid, phase, table, words, at, tokens, start):  # noqa: PLR0913
    crew = Crew(i64_at(sync, size), slot, team, tid)
    attention(crew, phase, i64_at(table, words), at, tokens, start)


def _feed(sync, size, slot, team, tid, phase, words, count, at, what, tokens, after):  # noqa: PLR0913
    # routed experts and dense part of the layer at words[at], or a batch of experts: the words of a
    # job. One feed_forward for all three.
    crew, table = Crew(i64_at(sync, size), slot, team, tid), i64_at(words, count)
    most = tokens
    if what == BATCH:
        tiers = i64_at(table[at], table[at + 1])
        job = _expert_job(table, at + _JOB_AT)
        act, total = _act(table, at + _ACT_AT), _sum(table, at + _SUM_AT)
        most = np.int64(1)
        for j in range(job.parts):
            most = max(most, job.first[j + 1] - job.first[j])
    else:
        io = _buffers(table, at)
        act = io.normed
        if what == ROUTED:
            routed = _routed(table, at)
            tiers, job, total = routed.tiers, routed.job, routed.total
        else:
            dense = _dense_part(table, at)
            tiers, job, total = dense.tiers, dense.job, dense.total
            to = tokens, dense.gates, 8
            product(crew, phase, dense.gate, act, io.rows, to, after)
            phase += 1
    feed_forward(crew, phase, tiers, act, job, total, (most, tokens, after))


_ALONE: dict[str, tuple[Any, int]] = {"attention": (_attention, 11), "feed": (_feed, 12)}


@functools.cache
def part_address(name: str) -> int:
    """Where the compiled code of a part is, "attention" or "feed"; compiles it if need be."""
    function, count = _ALONE[name]
    return int(entry(function, types.void(*[types.int64] * count)).address)


_call_attention, _call_feed = call(11), call(12)


@inlined
def _attend(crew, phase, program, at, tokens, start):
    table, sync = program.table, crew.sync
    _call_attention(
        program.attention,
        *(address(sync), sync.size, crew.slot, crew.team, crew.tid, phase),
        *(address(table), table.size, at, tokens, start),
    )


@inlined
def _feed_layer(crew, phase, program, at, what, tokens, after):
    table, sync = program.table, crew.sync
    _call_feed(
        program.feed,
        *(address(sync), sync.size, crew.slot, crew.team, crew.tid, phase),
        *(address(table), table.size, at, what, tokens, after),
    )


# --- jobs ---------------------------------------------------------------------------------------

# A record to read: its file, where in it, the address it goes to, its bytes, and whether a part
# of it did not come. Behind all records lie the parts: address and bytes, as preadv wants them.
READ_WORDS, READ_PART, READ_FAILED = 5, 1 << 18, 4
_preadv = ask(5)


@inlined
def _read_records(crew, phase, table, job):
    # each thread asks the system for parts of records, which it has in memory or not at all
    system, flags, records, parts = job
    mine = 0
    piece = take(crew, phase, records * parts)
    while piece < records * parts:
        at, part = piece // parts * READ_WORDS, piece % parts * READ_PART
        room = records * READ_WORDS + 2 * piece
        table[room] = table[at + 2] + part
        table[room + 1] = size = min(table[at + 3] - part, READ_PART)
        if size > 0:
            place = address(table) + 8 * room
            if _preadv(system, table[at], place, 1, table[at + 1] + part, flags) != size:
                table[at + READ_FAILED] = 1
        mine += 1
        piece = take(crew, phase, records * parts)
    finish(crew, phase, mine, records * parts)


@inner
def _layers(crew, program, ids, position, first, guess):
    # tokens through the layers from `first` on, until experts are needed that Python has to see to:
    # returns that layer, else -1. Where it goes on after one, its shared expert is due.
    now, phase, table = ticks(), np.int64(0), program.table
    tokens, times = ids.size, program.times
    if first == 0:
        _embed(crew, phase, program, ids)
        phase += 1
    elif _dense_rows(table, (first - 1) * LAYER_WORDS):
        at = (first - 1) * LAYER_WORDS
        after = first_row(crew, query_matrix(table, at))
        _feed_layer(crew, phase, program, at, SHARED, tokens, after)
        phase += 4
        now = _clock(crew, times, _DENSE, now)
    for number in range(first, program.layers):
        at = number * LAYER_WORDS
        after = first_row(crew, program.head)
        if number + 1 < program.layers:
            after = first_row(crew, query_matrix(table, at + LAYER_WORDS))
        _attend(crew, phase, program, at, tokens, position)
        phase += 7
        now = _clock(crew, times, _ATTENTION, now)
        if _top_k(table, at):
            _router(crew, phase, table, at, tokens)
            kind = np.int64(NO_GUESS)
            if tokens == 1 and number + 1 < program.layers and _top_k(table, at + LAYER_WORDS):
                kind = guess
            if kind:
                _look_ahead(crew, phase + 1, program, at + LAYER_WORDS, kind)
                phase += 2
            _choose(crew, phase + 1, program, at, tokens, kind)
            now = _clock(crew, times, _ROUTER, now)
            if stopped(crew, phase + 1):
                return number
            _feed_layer(crew, phase + 2, program, at, ROUTED, tokens, after)
            phase += 5
            now = _clock(crew, times, _EXPERTS, now)
        if _dense_rows(table, at):
            _feed_layer(crew, phase, program, at, SHARED, tokens, after)
            phase += 4
            now = _clock(crew, times, _DENSE, now)
    return np.int64(-1)


@inlined
def _run(crew, words):
    program, row, phase = _program(i64_at(words[1], _PROGRAM_WORDS), 0), words[2], np.int64(0)
    if words[0] == LAYERS:
        ids = i64_at(words[2], words[3])
        row = np.int64(-1)
        stop = _layers(crew, program, ids, words[4], words[5], words[6])
        if crew.tid == 0:  # nobody else: he may be late, and this another job's
            program.state[0] = stop
        if stop < 0:
            # one token's logits are wanted as soon as it is through
            row = np.int64(0) if ids.size == 1 else row
            phase += (program.layers - words[5] + 1) * LAYER_PHASES
    elif words[0] == EXPERTS:
        now, sync = ticks(), crew.sync
        _call_feed(
            program.feed,
            *(address(sync), sync.size, crew.slot, crew.team, crew.tid, phase),
            *(address(words), words.size, 2, BATCH, words[EXPERTS_TOKENS], 0),
        )
        _clock(crew, program.times, _EXPERTS, now)
        row = np.int64(-1)
    elif words[0] == READS:
        job = words[4], words[5], words[6], words[7]
        _read_records(crew, phase, i64_at(words[2], words[3]), job)
        row = np.int64(-1)
    if row >= 0:
        now = ticks()
        io = program.buffers
        head(crew, phase, program.norm, program.head, io, row, program.logits)
        _clock(crew, program.times, _HEAD, now)


@kernel
def clock():
    """The ticks that Program.times counts; their rate is the system's."""
    return ticks()


@kernel
def work(tid, team, sync, jobs, number, phases, polls):
    """Thread 0: runs job `number`, of up to `phases` phases. Others: take jobs as they are opened.

    jobs int64 [RING * JOB_WORDS]: job n is row n % RING. A helper returns the number of the last
    job it saw once none was opened for `polls` polls; `number` is the one it saw before.
    """
    found = number
    if tid == 0:
        open_job(sync, team, number, phases)
    else:
        found = await_job(sync, number, polls)
    while found:
        number = found
        if tid == 0 or enter(sync, number):
            slot, row = slot_of(sync, number), number % RING * JOB_WORDS
            _run(Crew(sync, slot, team, tid), jobs[row : row + JOB_WORDS])
            if tid == 0:
                close_job(sync)
                return number
            leave(sync, slot)
        found = await_job(sync, number, polls)
    return number
