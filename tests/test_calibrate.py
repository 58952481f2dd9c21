"""Calibration's way through a model, and what it hands to formats, against float64 references."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from reference import Reference
from tiny_checkpoint import MIXTRAL, QWEN3_MOE, write_checkpoint

from moelite import calibrate
from moelite.arch import Arch, MoE
from moelite.belief import PRIOR, believed
from moelite.calibrate import Calibrator, Text, cut
from moelite.checkpoint import open_checkpoint, read
from moelite.convert import quantize
from moelite.forward import DenseWeights
from moelite.models import build
from moelite.quant import FORMATS
from moelite.quant.curvature import Curvature
from moelite.store import Store
from moelite.storefile import DENSE

F32 = FORMATS["f32"]


class Spy:
    """The f32 format, remembering the Curvature of every matrix."""

    exact = True
    curved = True

    def __init__(self) -> None:
        self.curves: list[Curvature] = []

    def pack(self, weight: np.ndarray, curve: Curvature | None = None) -> np.ndarray:
        assert curve is not None
        self.curves.append(curve)
        return F32.pack(weight)

    def nbytes(self, rows: int, cols: int) -> int:
        return F32.nbytes(rows, cols)

    def tile_bytes(self, cols: int) -> int:
        return F32.tile_bytes(cols)

    def unpack(self, packed: np.ndarray, rows: int, cols: int) -> np.ndarray:
        return F32.unpack(packed, rows, cols)


def nothing_finished(layer: int, expert: int) -> calibrate.Matrices:
    raise AssertionError("no layer was packed before")


def calibrated(model: Path, store: Path, text: Text, spy: Spy, spill: Path | None = None):
    """(Calibrator, Arch) after every expert of a checkpoint was packed without loss."""
    source = open_checkpoint(model)
    arch = build(source.config)
    weights = DenseWeights(store / DENSE, Store.open(store).manifest.tensors)
    walk = Calibrator(arch, weights, text, nothing_finished, spill)
    for number in arch.moe_layers:
        mlp = arch.layers[number].mlp
        assert isinstance(mlp, MoE)
        for expert in range(mlp.num_experts):
            gate, up, down = (read(source, p.weight.at(expert)) for p in mlp.experts.matrices)
            walk.pack(number, expert, [(spy, spy)], (gate, up, down))
    return walk, arch


def residual(walk: Calibrator, text: Text) -> np.ndarray:
    return walk._x.read(np.arange(text.tokens))


@pytest.mark.parametrize(("model_type", "variant"), tiny_models.variants())
def test_the_residual_is_the_models_own(model_type: str, variant: str, tmp_path: Path) -> None:
    """Nothing quantized, the residual behind the last experts is what float64 has there."""
    pytest.importorskip("torch", reason="tiny models are made with torch")
    tiny_models.write_checkpoint(model_type, variant, tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "store", experts="f32", dense="f32")
    ids = [tiny_models.prompt(model_type, variant, n) for n in (40, 23)]
    text = Text(tuple(map(tuple, ids)))
    walk, arch = calibrated(tmp_path / "model", tmp_path / "store", text, Spy())
    reference = Reference(arch, tiny_models.weights(tmp_path / "model"))
    want = []
    for sequence in ids:
        reference.forward(sequence)
        want.append(reference.states[arch.moe_layers[-1] + 1])
    exact = np.concatenate(want)
    assert np.abs(residual(walk, text) - exact).max() < 3e-5 * np.abs(exact).max()


class Recorder(Reference):
    """Notes (layer, expert, routing weight, residual, inputs, hidden) of every routed token."""

    def __init__(self, arch: Arch, weights) -> None:  # type: ignore[no-untyped-def]
        super().__init__(arch, weights)
        self.seen: dict[tuple[int, int], list[tuple[float, np.ndarray, np.ndarray]]] = {}

    def forward(self, ids):  # type: ignore[no-untyped-def]
        for number in range(len(self.arch.layers)):
            for expert in range(getattr(self.arch.layers[number].mlp, "num_experts", 0)):
                self.seen.setdefault((number, expert), [])
        return super().forward(ids)

    def _moe(self, moe: MoE, x: np.ndarray) -> np.ndarray:
        number = next(i for i, layer in enumerate(self.arch.layers) if layer.mlp is moe)
        layer = self.arch.layers[number]
        before = self.states[number]
        mid = before + self._attention(layer.attention, self._norm(layer.input_norm, before))
        energy = np.mean(mid * mid, -1)
        scores = np.exp(self._linear(moe.router.linear, x))
        scores /= scores.sum(-1, keepdims=True)
        order = np.argsort(-scores, axis=-1, kind="stable")[:, : moe.router.top_k]
        for t, row in enumerate(order):
            weights = scores[t, row]
            if moe.router.renormalize:
                weights = weights / weights.sum()
            for expert, weight in zip(row, weights * moe.router.scale, strict=True):
                gate, up = (
                    self._read(p.weight.at(int(expert))) @ x[t]
                    for p in (moe.experts.gate, moe.experts.up)
                )
                hidden = gate / (1 + np.exp(-gate)) * up
                self.seen[number, int(expert)].append((weight**2 / energy[t], x[t], hidden))
        return super()._moe(moe, x)


def test_an_expert_is_told_what_its_tokens_say(tmp_path: Path) -> None:
    """H of both its inputs, each token by (routing weight)^2 / mean(residual^2), in float64."""
    tensors = write_checkpoint(tmp_path / "model", QWEN3_MOE)
    quantize(tmp_path / "model", tmp_path / "store", dense="f32")
    text, spy = cut(np.random.default_rng(5).integers(0, 101, 150).tolist(), 50), Spy()
    _, arch = calibrated(tmp_path / "model", tmp_path / "store", text, spy)
    recorder = Recorder(arch, tensors)
    seen: dict[tuple[int, int], list[tuple[float, np.ndarray, np.ndarray]]] = {}
    for ids in text.sequences:
        recorder.seen = {}
        recorder.forward(ids)
        for key, tokens in recorder.seen.items():
            seen.setdefault(key, []).extend(tokens)
    curves = iter(spy.curves)
    for (layer, _), tokens in sorted(seen.items()):
        every = [t for (number, _), part in seen.items() if number == layer for t in part]
        gate, up, down = next(curves), next(curves), next(curves)
        assert gate is up
        for curve, place in ((gate, 1), (down, 2)):
            count = np.array([t[0] for t in tokens])
            x = np.array([t[place] for t in tokens])
            count /= count.sum()
            h, known = (x * count[:, None]).T @ x, 1 / np.square(count).sum()
            diagonal = np.diagonal(h).copy()
            h *= known / (known + max(len(h), PRIOR))
            expected = np.full(len(h), diagonal.mean())
            if place == 1:  # each token of the layer once, by its residual alone
                unique = {t[1].tobytes(): t for t in every}
                expected = typical(recorder, layer, text, unique)
            np.fill_diagonal(h, (known * diagonal + PRIOR * expected) / (known + PRIOR))
            damped = h + 0.01 * np.diagonal(h).mean() * np.eye(len(h))
            root = curve.root.astype(np.float64)
            np.testing.assert_allclose(curve.importance, np.diagonal(h), rtol=1e-3)
            assert np.abs(root @ root.T - damped).max() < 1e-4 * np.abs(damped).max()
    assert next(curves, None) is None


def typical(recorder: Recorder, layer: int, text: Text, _: object) -> np.ndarray:
    """Mean squares of what the layer's experts read, over all tokens."""
    total, seen = 0.0, 0.0
    spec = recorder.arch.layers[layer]
    for ids in text.sequences:
        recorder.forward(ids)
        before = recorder.states[layer]
        mid = before + recorder._attention(spec.attention, recorder._norm(spec.input_norm, before))
        x = recorder._norm(spec.post_norm, mid)
        count = 1 / np.mean(mid * mid, -1)
        total, seen = total + count @ (x * x), seen + count.sum()
    return np.asarray(total / seen)


def test_few_tokens_are_believed_little() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4000, 80)) @ rng.normal(size=(80, 80))
    h = x.T @ x / len(x)
    prior = np.full(80, 7, np.float32)
    many = believed(h.astype(np.float32), 1e9, prior)
    np.testing.assert_allclose(many, h, rtol=1e-5)
    none = believed(np.zeros((80, 80), np.float32), 0.0, prior)
    np.testing.assert_array_equal(none, np.diag(prior))
    half = believed(h.astype(np.float32), 80.0, prior)
    off = ~np.eye(80, dtype=bool)
    np.testing.assert_allclose(half[off], h[off] / 2, rtol=1e-5)
    np.testing.assert_allclose(
        np.diagonal(half), (80 * np.diagonal(h) + PRIOR * 7) / (80 + PRIOR), rtol=1e-5
    )
    one = np.outer(x[0], x[0]).astype(np.float32)[:8, :8]
    assert np.linalg.eigvalsh(believed(one, 1.0, np.zeros(8, np.float32))).min() > -1e-6
    flat = np.diagonal(believed(h.astype(np.float32), 0.0, None))
    np.testing.assert_allclose(flat, np.diagonal(h).mean(), rtol=1e-5)


def test_an_expert_that_no_token_reached_is_packed_all_the_same(tmp_path: Path) -> None:
    """With its layer's mean squares alone; and it is reported, as one that saw few tokens is."""
    tensors = write_checkpoint(tmp_path / "model", MIXTRAL)
    tensors["model.embed_tokens.weight"] += 1
    for layer in range(3):  # all inputs are positive, and so is no weight of expert 2's
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        tensors[name][2] = -np.abs(tensors[name]).max()
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] *= 0.01
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"][:] = 1
    write_checkpoint(tmp_path / "model", MIXTRAL, tensors)
    ids = np.random.default_rng(1).integers(0, 100, 900).tolist()
    report = quantize(tmp_path / "model", tmp_path / "store", calibrate=ids)
    found = {(r.layer, r.expert): r.tokens for r in report.rare}
    assert found[0, 2] == 0
    assert len([key for key in found if key[0] == 0]) < 4, "some expert saw many"
    assert max(found.values()) < 256
    Store.open(tmp_path / "store").close()


def test_text_is_cut_into_sequences() -> None:
    assert cut([1, 2, 3, 4, 5], 2).sequences == ((1, 2), (3, 4), (5,))
    assert cut([1, 2, 3, 4, 5], 3, bos_id=9).sequences == ((9, 1, 2), (9, 3, 4), (9, 5))
    assert cut([1, 2, 3], 2).digest != cut([1, 2, 3], 3).digest


def test_the_spilled_stream_holds_the_same_rows(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", MIXTRAL)
    quantize(tmp_path / "model", tmp_path / "store")
    text = cut(np.random.default_rng(7).integers(0, 100, 130).tolist(), 40)
    (tmp_path / "spill").mkdir()
    held, _ = calibrated(tmp_path / "model", tmp_path / "store", text, Spy())
    spilled, _ = calibrated(tmp_path / "model", tmp_path / "store", text, Spy(), tmp_path / "spill")
    np.testing.assert_array_equal(residual(held, text), residual(spilled, text))
    spilled.close()
    assert not list((tmp_path / "spill").iterdir()), "its file has no name"


def test_experts_come_in_their_order(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", MIXTRAL)
    quantize(tmp_path / "model", tmp_path / "store")
    source = open_checkpoint(tmp_path / "model")
    weights = DenseWeights(
        tmp_path / "store" / DENSE, Store.open(tmp_path / "store").manifest.tensors
    )
    walk = Calibrator(
        build(json.loads(source.files["config.json"])), weights, cut([1] * 60), nothing_finished
    )
    zeros = (
        np.zeros((96, 64), np.float32),
        np.zeros((96, 64), np.float32),
        np.zeros((64, 96), np.float32),
    )
    with pytest.raises(AssertionError, match="order"):
        walk.pack(0, 1, [(F32, F32)], zeros)
