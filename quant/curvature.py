"""What calibration knows of a matrix's inputs, in the form that error feedback uses.

GPTQ (Frantar et al. 2023, arXiv 2210.17323) quantizes a [O, I] matrix column by column and lets the
columns still to come make up for each error, so that the output error tr(E H E^T) is small rather
than the weight error; H [I, I] is the mean of x x^T over the inputs x that the matrix meets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moelite.quant.base import F32

Wide = npt.NDArray[np.floating[Any]]

# Added to H's diagonal, as a share of its mean: keeps the factor finite where inputs are few or
# some never differ from zero.
DAMPING = 0.01


class Curvature(NamedTuple):
    """importance float32 [I]: mean square of each input. factor float32 [I, I]: U, upper
    triangular, U^T U = (H + damping)^-1; root float32 [I, I]: R = U^-1, upper, R R^T = H + damping.

    After columns b..c got an error E = w - q, the columns behind them become
    W[:, c:] -= E @ inv(U[b:c, b:c]) @ U[b:c, c:], and inv(U[b:c, b:c]) = R[b:c, b:c]. The output
    error of the choice is |E @ R[b:c, b:c]|^2.
    """

    importance: F32
    factor: F32
    root: F32


def curvature(hessian: F32, damping: float = DAMPING) -> Curvature:
    """The Curvature of a mean x x^T [I, I], which is symmetric, without NaN.

    An input that was never seen has importance 0 and gets the mean of the others on its diagonal,
    so that its weights are rounded as without calibration. Float64 inside.
    """
    h = np.array(hessian, np.float64)
    diagonal = np.ascontiguousarray(np.diagonal(h))
    mean = float(diagonal.mean()) or 1.0
    h[np.diag_indices_from(h)] += np.where(diagonal > 0, damping * mean, mean)
    # H = R R^T with R upper triangular: Cholesky from the last row on
    root = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    factor = _inverse(root)
    return Curvature(
        importance=diagonal.astype(np.float32),
        factor=np.ascontiguousarray(np.triu(factor), np.float32),
        root=np.ascontiguousarray(np.triu(root), np.float32),
    )


def _inverse(root: Wide) -> Wide:
    # of an upper triangular matrix, by halves: a third of a general inverse's time at 1,536 columns
    half = len(root) // 2
    if half < 32:
        return np.linalg.inv(root)
    first, last = _inverse(root[:half, :half]), _inverse(root[half:, half:])
    out = np.zeros_like(root)
    out[:half, :half], out[half:, half:] = first, last
    out[:half, half:] = -first @ root[:half, half:] @ last
    return out
