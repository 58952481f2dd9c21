"""What an architecture file hands over: the model as data.

A decoder is a list of layers built from orthogonal parts: norm, rope, attention, router, expert
feed-forward, block wiring, tensor layout. `moelite/models/<model_type>.py` fills these in from a
config; the decoder runs them and knows no model. Tensor names are the checkpoint's own, so every
error names the tensor as the user's files do.

Shape letters: H hidden_size, V vocab_size, N num_heads, NK num_kv_heads, D head_dim, E num_experts,
K top_k, I expert_size (or the width of a dense feed-forward part).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """Where one [O, I] matrix (or [O] vector) lives in a checkpoint.

    name: tensor name; may hold "{expert}".
    stacked: the tensor is [E, ...]; take index `expert` of axis 0.
    transpose: stored [I, O]; swap the last two axes after indexing.
    rows: (start, stop, step) of the output rows to take, after transposing; None takes all.
    expert: which expert, once chosen with `at`.
    """

    name: str
    stacked: bool = False
    transpose: bool = False
    rows: tuple[int, int, int] | None = None
    expert: int | None = None

    def at(self, expert: int) -> TensorRef:
        """This tensor for one expert."""
        return replace(self, name=self.name.replace("{expert}", str(expert)), expert=expert)

    @property
    def key(self) -> str:
        """The name under which a store keeps it: unique per matrix."""
        part = "" if self.rows is None else f"[{self.rows[0]}:{self.rows[1]}:{self.rows[2]}]"
        return self.name + part


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMSNorm w * x / sqrt(mean(x^2) + eps), or LayerNorm. weight None: no learned scale."""

    weight: TensorRef | None
    size: int
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: TensorRef | None = None
    offset: float = 0.0  # 1.0 where the checkpoint stores w - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """y [T, rows] = x [T, cols] @ W.T (+ bias)."""

    weight: TensorRef
    rows: int
    cols: int
    bias: TensorRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of the first 2 * len(inv_freq) dimensions of a head.

    angle(p, i) = p * inv_freq[i]; cos and sin are multiplied by `scale` (yarn's attention factor).
    style "half" pairs dimension i with i + n; "interleaved" pairs 2i with 2i + 1.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0
    style: Literal["half", "interleaved"] = "half"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query attention. scale multiplies q.k before the causal softmax."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    rope: Rope | None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    qk_norm_over: Literal["head", "full"] = (
        "head"  # one head of D, or all heads at once, before rope
    )
    clip: float | None = None  # clamp q, k, v to [-clip, clip] after projection and qk norm
    window: int | None = None  # each token sees itself and the window - 1 before it

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        return self.q, self.k, self.v, self.o


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedMLP:
    """down(act(gate(x)) * up(x))."""

    gate: Linear
    up: Linear
    down: Linear
    activation: Literal["silu"] = "silu"

    @property
    def matrices(self) -> tuple[Linear, Linear, Linear]:
        """gate, up and down."""
        return self.gate, self.up, self.down


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """logits [T, E] -> selected_experts [T, K], routing_weights [T, K].

    Pipeline: scores = score(logits); top-k of the scores; weights = those scores, divided by their
    sum if `renormalize`; times `scale`. Ties go to the lower expert id.
    """

    linear: Linear
    top_k: int
    score: Literal["softmax"] = "softmax"
    renormalize: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """Routed experts plus, where the model has one, an always-on shared expert.

    experts: the matrices of one expert; its TensorRefs are completed with `.at(expert)`.
    shared_gate: the shared expert's output is times sigmoid(x . w); None: times 1.
    """

    router: Router
    num_experts: int
    experts: GatedMLP
    shared: GatedMLP | None = None
    shared_gate: Linear | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """x += attention(input_norm(x)); x += mlp(post_norm(x))   (wiring "pre")."""

    input_norm: Norm
    attention: Attention
    post_norm: Norm
    mlp: GatedMLP | MoE


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """A whole decoder. head.weight == embed where the embeddings are tied."""

    model_type: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    embed: TensorRef
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear

    @property
    def tied(self) -> bool:
        return self.head.weight == self.embed

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that hold routed experts."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.mlp, MoE))
