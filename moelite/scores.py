"""From logits to numbers per token, and from these to means with their standard errors.

Logits are float32 as a model gives them; everything after is float64. T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moelite.agreement import RouterReport
from moelite.errors import VerificationError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


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
class Distance:
    """A model's predictions beside a reference's over the same tokens.

    kld_*: KL(reference || model) per token, in nats. top1_agreement: share of tokens where both
    rank the same token first. rms_dp: root mean square of the change of the right token's
    probability, 0..1. ln_ratio: ln(ppl of the model / ppl of the reference); its standard error is
    that of the paired differences, which is far below that of either perplexity.
    """

    kld_mean: float
    kld_se: float
    kld_median: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    top1_agreement: float
    top1_se: float
    rms_dp: float
    rms_dp_se: float
    ln_ratio: float
    ln_ratio_se: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareReport(Distance):
    """A Distance with the perplexities of both. routers: None where nobody told their choices."""

    reference: EvalReport
    model: EvalReport
    routers: RouterReport | None = None


@dataclass(slots=True)
class Scores:
    """-ln p of one model's tokens, gathered piece by piece; `seconds` is the time inside it."""

    nll: list[F64] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, logprobs: F64, targets: I64) -> None:
        """logprobs [T, V] and the tokens [T] that came next."""
        self.nll.append(nll(logprobs, targets))

    def report(self, *, protocol: str, context: int, windows: int) -> EvalReport:
        values = np.concatenate(self.nll)
        found, error = mean(values)
        ppl = math.exp(found) if found < 700 else math.inf
        return EvalReport(
            protocol=protocol,
            context=context,
            windows=windows,
            tokens=len(values),
            nll=found,
            nll_se=error,
            ppl=ppl,
            ppl_se=ppl * error,
            seconds=self.seconds,
        )


@dataclass(slots=True)
class Pairs:
    """What two models said of the same tokens, gathered piece by piece."""

    kld: list[F64] = field(default_factory=list)
    same: list[F64] = field(default_factory=list)
    dp: list[F64] = field(default_factory=list)
    dnll: list[F64] = field(default_factory=list)

    def add(self, reference: F64, model: F64, targets: I64) -> None:
        """ln p [T, V] of both, and the tokens [T] that came next."""
        before, after = nll(reference, targets), nll(model, targets)
        self.kld.append(kld(reference, model))
        same = reference.argmax(axis=1) == model.argmax(axis=1)
        self.same.append(same.astype(np.float64))
        self.dp.append(np.exp(-after) - np.exp(-before))
        self.dnll.append(after - before)

    def distance(self) -> Distance:
        """Over all tokens so far."""
        parts = self.kld, self.same, self.dp, self.dnll
        return distance(*(np.concatenate(part) for part in parts))


def distance(divergence: F64, same: F64, dp: F64, dnll: F64) -> Distance:
    """The Distance of per-token numbers [T]: KL, 1 where the first tokens agree else 0, p(right
    token) of the model less that of the reference, and so of -ln p."""
    kld_mean, kld_se = mean(divergence)
    top1, top1_se = mean(same)
    ln_ratio, ln_ratio_se = mean(dnll)
    square, square_se = mean(dp**2)
    rms = math.sqrt(square)
    median, p99, p999, most = (float(x) for x in np.quantile(divergence, (0.5, 0.99, 0.999, 1.0)))
    return Distance(
        kld_mean=kld_mean,
        kld_se=kld_se,
        kld_median=median,
        kld_p99=p99,
        kld_p999=p999,
        kld_max=most,
        top1_agreement=top1,
        top1_se=top1_se,
        rms_dp=rms,
        rms_dp_se=square_se / (2 * rms) if rms else 0.0,  # as of a function of the mean square
        ln_ratio=ln_ratio,
        ln_ratio_se=ln_ratio_se,
    )


def log_softmax(logits: F32) -> F64:
    """ln p [T, V] float64 of logits [T, V] float32."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf: the NaN is reported where the token is scored
        wide -= wide.max(axis=1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def nll(logprobs: F64, targets: I64) -> F64:
    """-ln p [T] of the tokens [T]; VerificationError if one is NaN or infinite."""
    found = -logprobs[np.arange(len(targets)), targets]
    if not np.isfinite(found).all():
        raise VerificationError(
            "the model gave a NaN or infinite logit",
            fix="check the store: moelite quantize it anew from its checkpoint",
        )
    return np.asarray(found, np.float64)


def kld(reference: F64, model: F64) -> F64:
    """KL(reference || model) [T] of ln p [T, V]; below zero only by rounding (1e-16), then zero."""
    p = np.exp(reference)
    with np.errstate(invalid="ignore"):  # 0 * inf where the reference rules a token out
        terms: F64 = np.where(p > 0, p * (reference - model), 0.0)
    return np.asarray(np.maximum(terms.sum(axis=1), 0.0), np.float64)


def mean(values: F64) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is unknown, so NaN."""
    n = len(values)
    se = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), se
