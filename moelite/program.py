"""What a model is to compiled code: NamedTuples whose words lie in tables (moelite.words).

A layer is one row of a table, LayerWords; every array named there lives as long as the model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moelite import ops
from moelite.attention import AttentionShape
from moelite.quant.base import F32, U8, Act, Matrix
from moelite.routing import Rule
from moelite.words import I32, I64


class Shaping(NamedTuple):
    """What happens to queries and keys between their product and attention.

    Empty arrays stand for parts a layer has not. q_norm and k_norm run over one head, or over all
    heads at once; size 0 means none. cos, sin [context * rotary]: rotary 0 means no rotation.
    """

    q_bias: F32
    k_bias: F32
    v_bias: F32
    q_norm: ops.NormWeights
    k_norm: ops.NormWeights
    clip: np.float32  # infinity: none
    cos: F32
    sin: F32
    rotary: int
    interleaved: bool


class AttentionWeights(NamedTuple):
    """What one layer's attention multiplies by; o_bias may be empty.

    router: the MoE router's matrix, 0 rows where the layer has none.
    """

    input_norm: ops.NormWeights
    q: Matrix
    k: Matrix
    v: Matrix
    shaping: Shaping
    o: Matrix
    o_bias: F32
    post_norm: ops.NormWeights
    router: Matrix


class LayerBuffers(NamedTuple):
    """The workspace of a chunk of T tokens, flat float32, rows `width`s apart; see Workspace."""

    x: F32
    x_width: int
    q: F32
    q_width: int
    k: F32
    v: F32
    k_width: int
    y: F32
    normed: Act
    attended: Act
    router_logits: F32
    router_width: int
    scratch: F32  # [threads * scratch_width]
    scratch_width: int
    rows: I32  # 0, 1, 2, ...


class FeedForward(NamedTuple):
    """The matrices of gated feed-forward parts: a dense one, or experts of one tier.

    gate_up: gate and up interleaved tile by tile. Part j's begins at
    gate_up.packed[gate_up.base + base[j]], and so on, with `base` of the job.
    """

    gate_up: Matrix
    down: Matrix


class FeedForwardJob(NamedTuple):
    """Which parts compute which rows: part j computes positions first[j] .. first[j + 1].

    tier [parts]: which FeedForward of a table, whose shapes are all the same, a part is of.
    source [P] int32: activation row of position p. target [P] int32: row of `out` it writes.
    hidden: the Act [P] that feeds `down`. scratch float32 [threads * scratch_width]: a strip of
    gate_up's products, for all positions of a part. parts: how many of them, the length of base.
    """

    base: I64
    tier: I32
    first: I64
    source: I32
    target: I32
    places: I32  # 0 .. P - 1: the workspace row of each position
    hidden: Act
    scratch: F32
    scratch_width: int
    out: F32
    width: int
    parts: int


class Sum(NamedTuple):
    """x [T * width] += sum over k < top_k, in order, of weights [T * K] * parts [T * K * width].

    gates: 8 floats a token, the first a logit whose sigmoid multiplies the
    weights; or empty.
    """

    x: F32
    width: int
    size: int
    parts: F32
    weights: F32
    top_k: int
    gates: F32


class Routed(NamedTuple):
    """The routed experts of a layer as one token uses them. rule.top_k 0: the layer has none.

    slots [E]: the page of the arena where an expert's record begins, or -1. tiers: the words of the
    layer's FeedForwards; tier_of [E]: which of them an expert is. low_tier: the one that stands in
    for an expert that is not in memory, or -1: its records, low_bytes each, all are. given [K]:
    experts to take whatever the router says, or -1. selected, weights [K]: what was chosen. guessed
    [K]: what the layer before expects it to choose. scores [E]: scratch. job.base, tier, first and
    target are filled by the token's step.
    """

    rule: Rule
    slots: I32
    tier_of: I32
    low_tier: int
    low_bytes: int
    given: I32
    selected: I32
    weights: F32
    guessed: I32
    scores: F32
    tiers: I64
    job: FeedForwardJob
    total: Sum


class Dense(NamedTuple):
    """A dense feed-forward part, or the shared expert; total.size 0: none.

    tiers: the words of its FeedForward.
    gate: the one-row matrix whose product with a token goes to gates [T * 8]; 0 rows: none.
    """

    tiers: I64
    job: FeedForwardJob
    total: Sum
    gate: Matrix
    gates: F32


class LayerWords(NamedTuple):
    """All of one layer; every array lives as long as the model."""

    attention: AttentionWeights
    shape: AttentionShape
    buffers: LayerBuffers
    k: U8
    v: U8
    routed: Routed
    dense: Dense


class Ahead(NamedTuple):
    """Buffers of a guess at the next layer's experts: its router's input, of one token, its logits
    [E] and weights [K]. free [K]: -1, no expert is given."""

    act: Act
    logits: F32
    weights: F32
    free: I32


class Program(NamedTuple):
    """A model: its table of layers, and what comes before and after them.

    table [layers * LAYER_WORDS]: the words of each LayerWords. attention, feed: addresses of the
    parts that are compiled alone (moelite.step). state [8]: first the layer whose
    experts are missing, or -1. times [8]: ticks by PARTS, on the caller's thread.
    """

    table: I64
    layers: int
    attention: int
    feed: int
    embed: Matrix
    norm: ops.NormWeights
    head: Matrix
    buffers: LayerBuffers
    ahead: Ahead
    logits: F32
    state: I64
    times: I64
