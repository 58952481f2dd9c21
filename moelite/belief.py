"""How far a mean over few tokens is believed."""

from __future__ import annotations

import numpy as np

from moelite.quant.base import F32

PRIOR = 64  # tokens


def believed(hessian: F32, known: float, typical: F32 | None) -> F32:
    """A mean x x^T [I, I] as far as `known` tokens tell it; changed in place.

    typical [I]: mean squares to expect without knowing any token; None: all alike.
    """
    diagonal = np.diagonal(hessian).astype(np.float64)
    expected = diagonal.mean() or 1.0 if typical is None else typical
    mixed = (known * diagonal + PRIOR * expected) / (known + PRIOR)
    # never more than of the mean squares: what is left stays positive definite
    hessian *= np.float32(known / (known + max(len(diagonal), PRIOR)))
    np.fill_diagonal(hessian, mixed)
    return hessian
