"""How well a model predicts a text: perplexity, and its distance from a reference model.

Two protocols, whose numbers must not be compared with each other (a longer context lowers both):

    llama   windows of `context` tokens (512 as a rule), the first replaced by the BOS token if the
            tokenizer adds one; only the second half of a window is scored, positions
            context/2 + 1 ... context - 1, as llama.cpp's perplexity tool does.
    paper   windows of `context` tokens (2048 as a rule), no BOS; every position but the first.

Windows do not overlap and a last, shorter one is left out. Logits are float32 as the model gives
them; everything after is float64. T tokens of a piece, V vocabulary, N scored tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from moelite.errors import UsageError, VerificationError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Perplexity of one model. nll: mean of -ln p(token), in nats; *_se: standard errors."""

    protocol: str
    context: int
    windows: int
    tokens: int
    nll: float
    nll_se: float
    ppl: float
    ppl_se: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareReport:
    """A model beside a reference over the same tokens.

    kld_*: KL(reference || model) per token, in nats. top1_agreement: share of tokens where both
    rank the same token first. ln_ratio: ln(ppl of the model / ppl of the reference); its standard
    error is that of the paired differences, which is far below that of either perplexity.
    """

    reference: EvalReport
    model: EvalReport
    kld_mean: float
    kld_se: float
    kld_median: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    top1_agreement: float
    top1_se: float
    ln_ratio: float
    ln_ratio_se: float


@dataclass(slots=True)
class _Scores:
    """Per-token numbers, gathered piece by piece; `seconds` is the time inside the model."""

    nll: list[F64]
    seconds: float = 0.0


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


def log_softmax(logits: F32) -> F64:
    """ln p [T, V] float64 of logits [T, V] float32."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf: the NaN is reported where the token is scored
        wide -= wide.max(axis=1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


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
    session = model.session()
    scores = _Scores(nll=[])
    for done, window in enumerate(cut):
        for [logits], targets in _pieces([session], window, [scores]):
            for rows, wanted in _rows([logits], targets):
                scores.nll.append(_nll(rows[0], wanted))
        if progress:
            progress((done + 1) * context, len(cut) * context)
    return _report(scores, protocol=protocol, context=context, count=len(cut))


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

    Nothing is stored but four numbers per token, so the logits need not be kept or rounded.
    Raises UsageError if the vocabularies differ in size, else as `evaluate`.
    """
    cut = windows(ids, context=context, protocol=protocol, bos_id=bos_id)
    sessions = [reference.session(), model.session()]
    scores = [_Scores(nll=[]), _Scores(nll=[])]
    kld: list[F64] = []
    same: list[npt.NDArray[np.bool_]] = []
    for done, window in enumerate(cut):
        for pair, targets in _pieces(sessions, window, scores):
            _same_vocabulary(pair)
            for rows, wanted in _rows(pair, targets):
                for score, lp in zip(scores, rows, strict=True):
                    score.nll.append(_nll(lp, wanted))
                kld.append(_kld(*rows))
                same.append(rows[0].argmax(axis=1) == rows[1].argmax(axis=1))
        if progress:
            progress((done + 1) * context, len(cut) * context)
    reports = [_report(s, protocol=protocol, context=context, count=len(cut)) for s in scores]
    ln_ratio, ln_ratio_se = _mean(np.concatenate(scores[1].nll) - np.concatenate(scores[0].nll))
    divergence = np.concatenate(kld)
    kld_mean, kld_se = _mean(divergence)
    top1, top1_se = _mean(np.concatenate(same).astype(np.float64))
    median, p99, p999, most = (float(x) for x in np.quantile(divergence, (0.5, 0.99, 0.999, 1.0)))
    return CompareReport(
        reference=reports[0],
        model=reports[1],
        kld_mean=kld_mean,
        kld_se=kld_se,
        kld_median=median,
        kld_p99=p99,
        kld_p999=p999,
        kld_max=most,
        top1_agreement=top1,
        top1_se=top1_se,
        ln_ratio=ln_ratio,
        ln_ratio_se=ln_ratio_se,
    )


def _pieces(
    sessions: Sequence[ScoringSession], window: Window, scores: Sequence[_Scores]
) -> Iterator[tuple[list[F32], npt.NDArray[np.int64]]]:
    """(logits [T, V] of each session, the T tokens that came next), over the scored part."""
    ids, first = window.ids, window.first
    # The logits at position p predict ids[p + 1]; those before first - 1 are not needed, and
    # neither is the last token's.
    for session, score in zip(sessions, scores, strict=True):
        started = time.perf_counter()
        session.truncate(0)
        if first > 1:
            session.advance(ids[: first - 1])
        score.seconds += time.perf_counter() - started
    for start in range(first - 1, len(ids) - 1, PIECE_TOKENS):
        stop = min(start + PIECE_TOKENS, len(ids) - 1)
        logits = []
        for session, score in zip(sessions, scores, strict=True):
            started = time.perf_counter()
            logits.append(session.append(ids[start:stop]))
            score.seconds += time.perf_counter() - started
        yield logits, np.asarray(ids[start + 1 : stop + 1], np.int64)


def _rows(
    logits: Sequence[F32], targets: npt.NDArray[np.int64]
) -> Iterator[tuple[list[F64], npt.NDArray[np.int64]]]:
    """ln p of a few rows at a time, so that float64 copies stay small."""
    for start in range(0, len(targets), WIDE_ROWS):
        part = slice(start, start + WIDE_ROWS)
        yield [log_softmax(rows[part]) for rows in logits], targets[part]


def _nll(logprobs: F64, targets: npt.NDArray[np.int64]) -> F64:
    # logprobs [T, V], targets [T] -> [T]
    nll = -logprobs[np.arange(len(targets)), targets]
    if not np.isfinite(nll).all():
        raise VerificationError(
            "the model gave a NaN or infinite logit",
            fix="check the store: moelite quantize it anew from its checkpoint",
        )
    return np.asarray(nll, np.float64)


def _kld(reference: F64, model: F64) -> F64:
    # both [T, V] ln p -> [T]; below zero only by rounding (about 1e-16), and then zero
    p = np.exp(reference)
    with np.errstate(invalid="ignore"):  # 0 * inf where the reference rules a token out
        terms: F64 = np.where(p > 0, p * (reference - model), 0.0)
    return np.asarray(np.maximum(terms.sum(axis=1), 0.0), np.float64)


def _same_vocabulary(pair: Sequence[F32]) -> None:
    sizes = [logits.shape[1] for logits in pair]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the reference has a vocabulary of {sizes[0]} tokens, the model one of {sizes[1]}",
            fix="compare two stores of the same model",
        )


def _mean(values: F64) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is unknown, so NaN."""
    n = len(values)
    se = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), se


def _report(scores: _Scores, *, protocol: str, context: int, count: int) -> EvalReport:
    values = np.concatenate(scores.nll)
    nll, nll_se = _mean(values)
    ppl = math.exp(nll) if nll < 700 else math.inf
    return EvalReport(
        protocol=protocol,
        context=context,
        windows=count,
        tokens=len(values),
        nll=nll,
        nll_se=nll_se,
        ppl=ppl,
        ppl_se=ppl * nll_se,
        seconds=scores.seconds,
    )
