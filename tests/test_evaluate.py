"""Perplexity and KL divergence against plain float64 sums on a model whose logits are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from moelite import evaluate as ev
from moelite.errors import UsageError, VerificationError

V = 11


@dataclass
class KnownSession:
    """Logits depend on the token and its position alone: a table, looked up."""

    table: npt.NDArray[np.float32]  # [position, token, V]
    seen: list[int] = field(default_factory=list)
    largest: int = 0

    def append(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        self.largest = max(self.largest, len(ids))
        out = [self.table[len(self.seen) + i, token] for i, token in enumerate(ids)]
        self.seen += ids
        return np.asarray(out, np.float32)

    def advance(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        self.seen += ids
        return self.table[len(self.seen) - 1, ids[-1]]

    def truncate(self, length: int) -> None:
        del self.seen[length:]


class KnownModel:
    def __init__(self, seed: int, *, positions: int = 512, vocab: int = V) -> None:
        rng = np.random.default_rng(seed)
        self.table = rng.normal(0, 3, (positions, vocab, vocab)).astype(np.float32)
        self.opened: list[KnownSession] = []

    def session(self) -> KnownSession:
        self.opened.append(KnownSession(self.table))
        return self.opened[-1]


def text(n: int, seed: int = 5) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, V, n)]


def probabilities(model: KnownModel, position: int, token: int) -> npt.NDArray[np.float64]:
    """The oracle's softmax: exponentials over their sum, one row, in float64."""
    e = np.exp(model.table[position, token].astype(np.float64))
    return e / e.sum()


def scored(ids: list[int], context: int, protocol: str, bos: int | None) -> list[tuple[int, ...]]:
    """(position, token read, token predicted) of every scored token, spelled out."""
    found = []
    for start in range(0, len(ids) // context * context, context):
        window = ids[start : start + context]
        if protocol == "llama" and bos is not None:
            window = [bos, *window[1:]]
        lowest = context // 2 if protocol == "llama" else 0
        found += [(p, window[p], window[p + 1]) for p in range(lowest, context - 1)]
    return found


@pytest.mark.parametrize("protocol", ["llama", "paper"])
@pytest.mark.parametrize("context", [8, 9, 300])
@pytest.mark.parametrize("bos", [None, 3])
def test_perplexity_is_the_plain_sum(protocol, context, bos) -> None:
    model, ids = KnownModel(1), text(context * 2 + 3)
    report = ev.evaluate(model, ids, context=context, protocol=protocol, bos_id=bos)
    nll = [
        -math.log(probabilities(model, p, a)[b]) for p, a, b in scored(ids, context, protocol, bos)
    ]
    assert report.tokens == len(nll)
    assert report.windows == 2
    assert report.nll == pytest.approx(np.mean(nll), rel=1e-12)
    assert report.ppl == pytest.approx(math.exp(np.mean(nll)), rel=1e-12)
    assert report.nll_se == pytest.approx(np.std(nll, ddof=1) / math.sqrt(len(nll)), rel=1e-12)
    assert report.ppl_se == pytest.approx(report.ppl * report.nll_se, rel=1e-12)


def test_llama_protocol_scores_255_tokens_of_a_window_of_512() -> None:
    """As llama.cpp does: first = n_ctx / 2, count = n_ctx - 1 - first."""
    [window] = ev.windows(list(range(600)), context=512, protocol="llama", bos_id=1000)
    assert len(window.ids) - window.first == 255
    assert window.ids[0] == 1000
    assert window.ids[window.first] == 257


def test_paper_protocol_keeps_the_text_and_scores_all_but_the_first() -> None:
    first, second = ev.windows(list(range(20)), context=8, protocol="paper", bos_id=1000)
    assert (first.ids, second.ids) == (tuple(range(8)), tuple(range(8, 16)))
    assert first.first == 1


def test_uniform_logits_give_a_perplexity_of_the_vocabulary_size() -> None:
    model = KnownModel(0)
    model.table[:] = 0
    report = ev.evaluate(model, text(16), context=8, protocol="paper")
    assert report.ppl == pytest.approx(V, rel=1e-12)
    assert report.nll_se == pytest.approx(0, abs=1e-12)


def test_large_logits_do_not_overflow() -> None:
    model = KnownModel(0)
    model.table += np.float32(1e4)
    same = KnownModel(0)
    same.table = model.table - np.float32(1e4)
    a, b = (ev.evaluate(m, text(16), context=8, protocol="paper") for m in (model, same))
    assert a.nll == pytest.approx(b.nll, rel=1e-9)


def test_windows_start_afresh_and_pieces_stay_small() -> None:
    model = KnownModel(2)
    ev.evaluate(model, text(1024), context=512, protocol="paper")
    [session] = model.opened
    assert len(session.seen) == 511
    assert session.largest == ev.PIECE_TOKENS


def test_progress_ends_at_the_total() -> None:
    seen: list[tuple[int, int]] = []
    ev.evaluate(KnownModel(2), text(27), context=8, progress=lambda a, b: seen.append((a, b)))
    assert seen == [(8, 24), (16, 24), (24, 24)]


@pytest.mark.parametrize("protocol", ["llama", "paper"])
def test_comparison_is_the_plain_sum(protocol) -> None:
    reference, model, ids, context = KnownModel(1), KnownModel(1), text(150 * 2), 150
    model.table = model.table + np.random.default_rng(9).normal(0, 0.5, model.table.shape).astype(
        "f4"
    )
    report = ev.compare(reference, model, ids, context=context, protocol=protocol)
    kld, same, ratio, dp = [], [], [], []
    for at, read, wanted in scored(ids, context, protocol, None):
        p, q = probabilities(reference, at, read), probabilities(model, at, read)
        kld.append(sum(p[i] * (math.log(p[i]) - math.log(q[i])) for i in range(V)))
        same.append(p.argmax() == q.argmax())
        ratio.append(math.log(p[wanted]) - math.log(q[wanted]))
        dp.append(q[wanted] - p[wanted])
    n = len(kld)
    assert report.kld_mean == pytest.approx(np.mean(kld), rel=1e-9)
    assert report.kld_se == pytest.approx(np.std(kld, ddof=1) / math.sqrt(n), rel=1e-9)
    assert report.kld_median == pytest.approx(np.median(kld), rel=1e-9)
    assert report.kld_p99 == pytest.approx(np.percentile(kld, 99), rel=1e-9)
    assert report.kld_p999 == pytest.approx(np.percentile(kld, 99.9), rel=1e-9)
    assert report.kld_max == pytest.approx(max(kld), rel=1e-9)
    assert report.top1_agreement == np.mean(same)
    assert 0.5 < report.top1_agreement < 1
    rms = math.sqrt(sum(d * d for d in dp) / n)
    assert report.rms_dp == pytest.approx(rms, rel=1e-9)
    spread = np.std(np.square(dp), ddof=1) / math.sqrt(n)
    assert report.rms_dp_se == pytest.approx(spread / (2 * rms), rel=1e-9)
    assert report.ln_ratio == pytest.approx(np.mean(ratio), rel=1e-9)
    assert report.ln_ratio_se == pytest.approx(np.std(ratio, ddof=1) / math.sqrt(n), rel=1e-9)
    assert report.ln_ratio == pytest.approx(math.log(report.model.ppl / report.reference.ppl))


def test_the_reference_is_the_first_model() -> None:
    """KL is not symmetric: the one the other way round is another number."""
    a, b, ids = KnownModel(1), KnownModel(2), text(64)
    one = ev.compare(a, b, ids, context=32, protocol="paper")
    two = ev.compare(b, a, ids, context=32, protocol="paper")
    assert one.kld_mean != pytest.approx(two.kld_mean, rel=1e-3)
    assert (
        one.reference.nll == two.model.nll == ev.evaluate(a, ids, context=32, protocol="paper").nll
    )


def test_a_model_agrees_with_itself_exactly() -> None:
    report = ev.compare(KnownModel(3), KnownModel(3), text(64), context=32)
    assert (report.kld_mean, report.kld_max, report.top1_agreement) == (0.0, 0.0, 1.0)
    assert (report.ln_ratio, report.ln_ratio_se) == (0.0, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_logit_is_an_error_and_not_a_number(value) -> None:
    model = KnownModel(1)
    model.table[5, :, 2] = value
    with pytest.raises(VerificationError, match="NaN or infinite"):
        ev.evaluate(model, text(16), context=8, protocol="paper")


def test_tokens_ruled_out_by_both_models_do_not_spoil_the_divergence() -> None:
    a, b = KnownModel(1), KnownModel(2)
    a.table[:, :, 10] = b.table[:, :, 10] = -np.inf
    ids = [i % 10 for i in text(64)]
    assert 0 < ev.compare(a, b, ids, context=32).kld_mean < math.inf


def test_vocabularies_of_different_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="11 tokens, the model one of 12"):
        ev.compare(KnownModel(1), KnownModel(1, vocab=12), text(32), context=16)


@pytest.mark.parametrize(
    ("n", "context", "protocol", "says"),
    [
        (7, 8, "llama", "7 tokens, less than one window of 8"),
        (9, 3, "llama", "too short"),
        (9, 8, "wikitext", "unknown protocol 'wikitext'"),
    ],
)
def test_what_cannot_be_scored_is_refused(n, context, protocol, says) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        ev.evaluate(KnownModel(1), text(n), context=context, protocol=protocol)
    assert caught.value.fix


def test_scoring_memory_covers_a_piece() -> None:
    assert ev.scoring_bytes(1000) >= 4 * 1000 * ev.PIECE_TOKENS + 8 * 1000 * ev.WIDE_ROWS
