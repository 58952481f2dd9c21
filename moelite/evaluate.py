"""How well a model predicts a text: perplexity, and its distance from a reference model.

Two protocols, whose numbers must not be compared with each other (a longer context lowers both):

    llama   windows of `context` tokens (512 as a rule), the first replaced by the BOS token if the
            tokenizer adds one; only the second half of a window is scored, positions
            context/2 + 1 ... context - 1, as llama.cpp's perplexity tool does.
    paper   windows of `context` tokens (2048 as a rule), no BOS; every position but the first.

Windows do not overlap and a last, shorter one is left out. T tokens of a piece, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from moelite.agreement import Agreement, Choices, listen, restore
from moelite.errors import UsageError
from moelite.scores import F32, F64, I64, CompareReport, EvalReport, Pairs, Scores, log_softmax

# of the protocols; the first is what most published numbers of llama.cpp have, the second papers'
CONTEXTS = {"llama": 512, "paper": 2048}
Progress = Callable[[int, int], None]  # (tokens done, tokens in all)

# Logits of one piece: 64 x 150,000 float32 = 37 MiB, whatever the window.
PIECE_TOKENS = 64
# Rows of it widened to float64 at a time.
WIDE_ROWS = 8


class ScoringSession(Protocol):
    """What scoring asks of a session: logits [T, V] with kept keys and values, and to forget."""

    def append(self, ids: Sequence[int], /) -> F32: ...
    def advance(self, ids: Sequence[int], /) -> F32: ...
    def truncate(self, length: int, /) -> None: ...


class ScoringModel(Protocol):
    """What scoring asks of a model."""

    def session(self) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """`ids` the model reads; `ids[first:]` are predicted and scored."""

    ids: tuple[int, ...]
    first: int


def windows(
    ids: Sequence[int],
    *,
    context: int,
    protocol: Literal["llama", "paper"],
    bos_id: int | None = None,
) -> list[Window]:
    """Cut `ids` as `protocol` says. bos_id: the BOS token if the tokenizer adds one (llama only).

    Raises UsageError for an unknown protocol, a context below 4, or too short a text.
    """
    if protocol not in ("llama", "paper"):
        raise UsageError(f"unknown protocol {protocol!r}", fix="use llama or paper")
    if context < 4:
        raise UsageError(f"a window of {context} tokens is too short", fix="--context 512")
    if len(ids) < context:
        raise UsageError(
            f"the text has {len(ids)} tokens, less than one window of {context}",
            fix=f"give a longer text, or --context {max(len(ids), 4)}",
        )
    found = []
    for start in range(0, len(ids) - context + 1, context):
        piece = tuple(int(i) for i in ids[start : start + context])
        if protocol == "llama":
            head = piece[:1] if bos_id is None else (bos_id,)
            found.append(Window(ids=head + piece[1:], first=context // 2 + 1))
        else:
            found.append(Window(ids=piece, first=1))
    return found


def scoring_bytes(vocab_size: int) -> int:
    """Memory that scoring takes beside the model: logits of a piece, float64 copies of rows."""
    return vocab_size * (4 * PIECE_TOKENS + 8 * 6 * WIDE_ROWS)


def evaluate(
    model: ScoringModel,
    ids: Sequence[int],
    *,
    context: int = 512,
    protocol: Literal["llama", "paper"] = "llama",
    bos_id: int | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Perplexity of `model` on the tokens `ids`.

    Raises UsageError if the text holds no window, VerificationError if a logit is NaN or infinite.
    """
    cut = windows(ids, context=context, protocol=protocol, bos_id=bos_id)
    session, scores = model.session(), Scores()
    for done, window in enumerate(cut):
        for [logits], targets in pieces([session], window, [scores]):
            for [rows], wanted in _rows([logits], targets):
                scores.add(rows, wanted)
        if progress:
            progress((done + 1) * context, len(cut) * context)
    return scores.report(protocol=protocol, context=context, windows=len(cut))


def compare(
    reference: ScoringModel,
    model: ScoringModel,
    ids: Sequence[int],
    *,
    context: int = 512,
    protocol: Literal["llama", "paper"] = "llama",
    bos_id: int | None = None,
    progress: Progress | None = None,
) -> CompareReport:
    """Both models over the same windows, piece by piece: KL(reference || model) and more.

    Nothing is stored but a few numbers per token, so the logits need not be kept or rounded.
    Raises UsageError if the vocabularies or the experts differ in number, else as `evaluate`.
    """
    cut = windows(ids, context=context, protocol=protocol, bos_id=bos_id)
    models = [reference, model]
    sessions, scores = [one.session() for one in models], [Scores(), Scores()]
    pairs, agreement, choices = Pairs(), Agreement(), [Choices(), Choices()]
    before = listen(models, choices)
    try:
        for done, window in enumerate(cut):
            for pair, targets in pieces(sessions, window, scores, choices):
                _same_vocabulary(pair)
                for rows, wanted in _rows(pair, targets):
                    for score, lp in zip(scores, rows, strict=True):
                        score.add(lp, wanted)
                    pairs.add(rows[0], rows[1], wanted)
                agreement.add(choices[0].take(), choices[1].take())
            if progress:
                progress((done + 1) * context, len(cut) * context)
    finally:
        restore(models, before)
    reports = [s.report(protocol=protocol, context=context, windows=len(cut)) for s in scores]
    return CompareReport(
        reference=reports[0],
        model=reports[1],
        routers=agreement.report(),
        **dataclasses.asdict(pairs.distance()),
    )


def pieces(
    sessions: Sequence[ScoringSession],
    window: Window,
    scores: Sequence[Scores],
    choices: Sequence[Choices] = (),
) -> Iterator[tuple[list[F32], I64]]:
    """(logits [T, V] of each session, the T tokens that came next), over the scored part.

    choices: told which experts the session's model takes in that part.
    """
    ids, first = window.ids, window.first
    # The logits at position p predict ids[p + 1]; those before first - 1 are not needed, and
    # neither is the last token's.
    for session, score in zip(sessions, scores, strict=True):
        started = time.perf_counter()
        session.truncate(0)
        if first > 1:
            session.advance(ids[: first - 1])
        score.seconds += time.perf_counter() - started
    for choice in choices:
        choice.listening = True
    for start in range(first - 1, len(ids) - 1, PIECE_TOKENS):
        stop = min(start + PIECE_TOKENS, len(ids) - 1)
        logits = []
        for session, score in zip(sessions, scores, strict=True):
            started = time.perf_counter()
            logits.append(session.append(ids[start:stop]))
            score.seconds += time.perf_counter() - started
        yield logits, np.asarray(ids[start + 1 : stop + 1], np.int64)
    for choice in choices:
        choice.listening = False


def _rows(logits: Sequence[F32], targets: I64) -> Iterator[tuple[list[F64], I64]]:
    """ln p of a few rows at a time, so that float64 copies stay small."""
    for start in range(0, len(targets), WIDE_ROWS):
        part = slice(start, start + WIDE_ROWS)
        yield [log_softmax(rows[part]) for rows in logits], targets[part]


def _same_vocabulary(pair: Sequence[F32]) -> None:
    sizes = [logits.shape[1] for logits in pair]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the reference has a vocabulary of {sizes[0]} tokens, the model one of {sizes[1]}",
            fix="compare two stores of the same model",
        )
