"""What calibration tells of the matrices that every token passes, against a float64 reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from reference import Reference

from moelite.arch import Arch, Linear, MoE, TensorRef
from moelite.belief import PRIOR
from moelite.calibrate import Calibrator, Matrices, Text, calibration_bytes
from moelite.checkpoint import Source, open_checkpoint, read
from moelite.forward import Rows, unrouted
from moelite.models import build
from moelite.quant import FORMATS
from moelite.quant.curvature import Curvature
from moelite.tradeoff import SourceWeights


def rounded(weight: np.ndarray) -> np.ndarray:
    """Far from the original, so that it shows which of the two was read."""
    return (np.round(weight * 4) / 4).astype(np.float32)


class Rounding:
    """Weights whose attention and dense matrices are there, rounded, once they were packed."""

    def __init__(self, source: Source, arch: Arch) -> None:
        self._source, self._plain = source, SourceWeights(source)
        self.curves: dict[str, Curvature] = {}
        self.parts: dict[str, Linear] = {}
        for layer in arch.layers:
            mlp = unrouted(layer.mlp)
            for part in (*layer.attention.linears, *(() if mlp is None else mlp.matrices)):
                self.parts[part.weight.key] = part

    def wanted(self, part: Linear) -> bool:
        return part.weight.key in self.parts

    def original(self, part: Linear) -> np.ndarray:
        return read(self._source, part.weight)

    def pack(self, part: Linear, curve: Curvature) -> None:
        assert part.weight.key not in self.curves, "once"
        self.curves[part.weight.key] = curve

    def matrix(self, part: Linear) -> np.ndarray:
        if part.weight.key in self.parts:
            assert part.weight.key in self.curves, f"{part.weight.key} is read before it is packed"
            return rounded(self.original(part))
        return self._plain.matrix(part)

    def vector(self, ref: TensorRef) -> np.ndarray:
        return self._plain.vector(ref)

    def embed(self, ref: TensorRef, ids: Sequence[int]) -> Iterator[tuple[Rows, np.ndarray]]:
        return self._plain.embed(ref, ids)


def nothing_finished(layer: int, expert: int) -> Matrices:
    raise AssertionError("no layer was packed before")


class Oracle:
    """Inputs of every matrix, in a model whose matrices before it are rounded."""

    def __init__(self, arch: Arch, tensors: Mapping[str, np.ndarray], packer: Rounding) -> None:
        names = {part.weight.name for part in packer.parts.values()}
        self.arch, self.model = (
            arch,
            Reference(arch, {k: rounded(w) if k in names else w for k, w in tensors.items()}),
        )
        self.first = Reference(arch, tensors)

    def inputs(self, ids: Sequence[int]) -> Iterator[tuple[Linear, np.ndarray, np.ndarray]]:
        """(matrix, what it reads [T, I], what each token counts [T])."""
        self.model.forward(ids)
        for x, layer in zip(self.model.states, self.arch.layers, strict=False):
            a, normed = layer.attention, self.model._norm(layer.input_norm, x)
            for part in (a.q, a.k, a.v):
                yield part, normed, np.ones(len(x))
            yield a.o, *self.heads(a, x, normed)
            if (mlp := unrouted(layer.mlp)) is None:
                continue
            mid = x + self.model._attention(a, normed)
            count = 1 / np.mean(mid * mid, -1)
            n = self.model._norm(layer.post_norm, mid)
            if isinstance(layer.mlp, MoE) and layer.mlp.shared_gate is not None:
                gate = 1 / (1 + np.exp(-self.model._linear(layer.mlp.shared_gate, n)))
                count = count * gate[:, 0] ** 2
            yield mlp.gate, n, count
            yield mlp.up, n, count
            g = self.model._linear(mlp.gate, n)
            yield mlp.down, g / (1 + np.exp(-g)) * self.model._linear(mlp.up, n), count

    def heads(self, a, x, normed) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
        """What o reads, and its tokens' counts: o itself is not rounded yet."""
        weights = dict(self.model._weights)
        weights[a.o.weight.name] = self.first._weights[a.o.weight.name]
        mid = x + Reference(self.arch, weights)._attention(a, normed)
        one = Linear(weight=TensorRef(name="one"), rows=a.o.cols, cols=a.o.cols)
        weights["one"] = np.eye(a.o.cols)
        y = Reference(self.arch, weights)._attention(replace(a, o=one), normed)
        return y, 1 / np.mean(mid * mid, -1)


@pytest.mark.parametrize(("model_type", "variant"), tiny_models.variants())
def test_a_matrix_is_told_what_it_reads(model_type: str, variant: str, tmp_path: Path) -> None:
    """Through everything before it as it was packed; each token by 1 / mean(residual^2), but for
    q, k and v all alike."""
    pytest.importorskip("torch", reason="tiny models are made with torch")
    tiny_models.write_checkpoint(model_type, variant, tmp_path)
    source = open_checkpoint(tmp_path)
    arch = build(source.config)
    packer = Rounding(source, arch)
    sequences = [tiny_models.prompt(model_type, variant, n) for n in (40, 23)]
    text = Text(tuple(map(tuple, sequences)))
    walk = Calibrator(arch, packer, text, nothing_finished, dense=packer)
    for number, layer in enumerate(arch.layers):
        walk.enter(number)
        for expert in range(layer.mlp.num_experts if isinstance(layer.mlp, MoE) else 0):
            assert isinstance(layer.mlp, MoE)
            parts = [read(source, p.weight.at(expert)) for p in layer.mlp.experts.matrices]
            walk.pack(number, expert, [(FORMATS["f32"],) * 2], (parts[0], parts[1], parts[2]))
    oracle = Oracle(arch, tiny_models.weights(tmp_path), packer)
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for ids in sequences:
        for part, x, count in oracle.inputs(ids):
            seen.setdefault(part.weight.key, []).append((x, count))
    assert packer.curves.keys() == seen.keys() == packer.parts.keys()
    for key, found in seen.items():
        x, count = (np.concatenate(parts) for parts in zip(*found, strict=True))
        check(packer.curves[key], x, count / count.sum())


def check(curve: Curvature, x: np.ndarray, count: np.ndarray) -> None:
    h, known = (x * count[:, None]).T @ x, 1 / np.square(count).sum()
    diagonal = np.diagonal(h).copy()
    h *= known / (known + max(len(h), PRIOR))
    np.fill_diagonal(h, (known * diagonal + PRIOR * diagonal.mean()) / (known + PRIOR))
    damped = h + 0.01 * np.diagonal(h).mean() * np.eye(len(h))
    root = curve.root.astype(np.float64)
    np.testing.assert_allclose(curve.importance, np.diagonal(h), rtol=2e-3)
    assert np.abs(root @ root.T - damped).max() < 2e-4 * np.abs(damped).max()


def test_packing_a_wide_dense_matrix_takes_memory(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="tiny models are made with torch")
    model_type, variant = tiny_models.variants()[0]
    tiny_models.write_checkpoint(model_type, variant, tmp_path)
    arch = build(open_checkpoint(tmp_path).config)
    wide = Linear(weight=TensorRef(name="wide"), rows=4096, cols=4096)
    more = calibration_bytes(arch, 512, curved=[wide]) - calibration_bytes(arch, 512)
    # the matrix itself, and its square as float64 and as two factors in float32
    assert more > 4096 * 4096 * (4 + 8 + 2 * 4)
