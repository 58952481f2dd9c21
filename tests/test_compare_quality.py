"""scripts/compare-quality: the GGUF, the importance matrix, the numbers; llama.cpp where it is."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import math
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import checkpoint_gguf
import gguf
import numpy as np
import pytest
import quality
from tiny_checkpoint import MIXTRAL, shapes, weights

from moelite.errors import MoeliteError, UsageError

HERE = importlib.util.find_spec("llama_cpp") is not None
CONFIG = {**MIXTRAL, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


class Source:
    """A checkpoint in memory."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.source = config, "tiny"
        self.files = {"config.json": json.dumps(config).encode()}
        self.tensors = weights(config)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        return "F32"

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.tensors[name][start:stop]


@pytest.fixture
def worker(monkeypatch):
    """The worker's module; llama_cpp is a stand-in where it is not installed."""
    if not HERE:
        stand_in = types.ModuleType("llama_cpp")
        stand_in.llama_cpp = types.ModuleType("llama_cpp.llama_cpp")
        monkeypatch.setitem(sys.modules, "llama_cpp", stand_in)
    found = importlib.import_module("llama_quality_worker")
    yield found
    sys.modules.pop("llama_quality_worker", None)


def read(path: Path) -> dict[str, np.ndarray]:
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in tensors}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_gguf_holds_the_checkpoint(tmp_path: Path, dtype: str) -> None:
    source = Source(CONFIG)
    checkpoint_gguf.write(source, tmp_path / "x.gguf", dtype=dtype)
    found, have = read(tmp_path / "x.gguf"), source.tensors
    assert sum(x.size for x in found.values()) == sum(math.prod(s) for s in shapes(CONFIG).values())
    near = {"atol": 0, "rtol": 0 if dtype == "f32" else 2**-8}
    for layer in range(2):
        moe = f"model.layers.{layer}.block_sparse_moe"
        for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            stack = found[f"blk.{layer}.ffn_{ours}_exps.weight"]
            for expert in range(4):
                want = have[f"{moe}.experts.{expert}.{theirs}.weight"]
                np.testing.assert_allclose(stack[expert], want, **near)
        router = found[f"blk.{layer}.ffn_gate_inp.weight"]
        assert np.array_equal(router, have[f"{moe}.gate.weight"])
        # one head's rows i and i + D/2 turn together: llama.cpp wants them side by side
        head = have[f"model.layers.{layer}.self_attn.q_proj.weight"][16:32]
        want = np.stack([head[:8], head[8:]], axis=1).reshape(16, 64)
        np.testing.assert_allclose(found[f"blk.{layer}.attn_q.weight"][16:32], want, **near)
        value = have[f"model.layers.{layer}.self_attn.v_proj.weight"]
        np.testing.assert_allclose(found[f"blk.{layer}.attn_v.weight"], value, **near)
    np.testing.assert_allclose(found["output.weight"], have["lm_head.weight"], **near)


def test_experts_alone_are_changed(tmp_path: Path) -> None:
    source = Source(CONFIG)
    checkpoint_gguf.write(source, tmp_path / "a.gguf", dtype="f32")
    checkpoint_gguf.write(source, tmp_path / "b.gguf", dtype="f32", change=lambda w: 2 * w)
    before, after = read(tmp_path / "a.gguf"), read(tmp_path / "b.gguf")
    for name, weight in before.items():
        assert np.array_equal(after[name], weight * (2 if "_exps" in name else 1)), name


def test_tensors_of_another_file_are_taken_as_they_are(tmp_path: Path) -> None:
    source = Source(CONFIG)
    checkpoint_gguf.write(source, tmp_path / "a.gguf", dtype="f32", change=lambda w: 3 * w)
    down = {t.name: t for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors if "down_" in t.name}
    checkpoint_gguf.write(source, tmp_path / "b.gguf", ready=down)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert kinds["blk.1.ffn_down_exps.weight"] == "F32"
    assert kinds["blk.1.ffn_up_exps.weight"] == "BF16"
    found = read(tmp_path / "b.gguf")
    assert np.array_equal(
        found["blk.1.ffn_down_exps.weight"], down["blk.1.ffn_down_exps.weight"].data
    )


def test_sizes_count_the_whole_file_and_the_experts(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    checkpoint_gguf.write(Source(CONFIG), path)
    found = quality.sizes(path)
    params = sum(math.prod(shape) for shape in shapes(CONFIG).values())
    assert found["bits_per_parameter"] == 8 * path.stat().st_size / params
    assert found["expert_bpw"] == 16
    assert found["types"]["ffn_up_exps"] == {"BF16": 2}
    assert found["types"]["attn_norm"] == {"F32": 2}


def test_types_of_an_expert_in_words() -> None:
    types_of = {"attn_q": {"Q8_0": 30}, "ffn_gate_exps": {"IQ4_NL": 30}}
    types_of["ffn_down_exps"] = {"IQ3_S": 15, "Q4_K": 15}
    assert quality.summary(types_of) == "gate IQ4_NL, down 15 IQ3_S + 15 Q4_K"


def test_scores_are_plain_sums(worker) -> None:
    rng = np.random.default_rng(3)
    reference, rows = (rng.normal(0, 2, (6, 9)).astype(np.float32) for _ in range(2))
    wanted = rng.integers(0, 9, 6)
    found = worker.compared(reference, rows, wanted)
    for t in range(6):
        p, q = (np.exp(x[t].astype(np.float64)) for x in (reference, rows))
        p, q = p / p.sum(), q / q.sum()
        assert found["nll"][t] == pytest.approx(-math.log(q[wanted[t]]), rel=1e-12)
        assert found["nll_reference"][t] == pytest.approx(-math.log(p[wanted[t]]), rel=1e-12)
        assert found["dp"][t] == pytest.approx(q[wanted[t]] - p[wanted[t]], rel=1e-9)
        kld = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found["kld"][t] == pytest.approx(kld, rel=1e-9)
        assert found["same"][t] == (p.argmax() == q.argmax())


def test_importance_is_the_mean_square_of_what_each_expert_met(worker) -> None:
    rng = np.random.default_rng(4)
    found = worker.Importance(str)
    sums, counts = np.zeros((5, 6)), np.zeros(5)
    for _ in range(2):  # two batches
        ids = np.array([rng.permutation(4)[:2] for _ in range(7)], np.int32)  # 4: never met
        shared, own = rng.normal(size=(1, 7, 1, 6)), rng.normal(size=(1, 7, 2, 6))
        found.add("gate", shared.astype("f4"), ids[None, None], 5)
        found.add("down", own.astype("f4"), ids[None, None], 5)
        found.add("plain", shared[:, :, 0].astype("f4")[None], None, 1)
        for token in range(7):
            for rank, expert in enumerate(ids[token]):
                sums[expert] += own[0, token, rank].astype("f4").astype("f8") ** 2
                counts[expert] += 1
    means = found.means()
    want = sums / np.maximum(counts, 1)[:, None]
    want[4] = 1
    np.testing.assert_allclose(means["down"].reshape(5, 6), want, rtol=1e-6)
    assert (means["gate"].reshape(5, 6)[4] == 1).all()
    assert found.counts["plain"].tolist() == [14]
    weighted = (found.sums["gate"].sum(axis=0)) / 2  # every token meets two experts
    np.testing.assert_allclose(means["plain"], weighted / 14, rtol=1e-6)


def test_a_tensor_is_read_where_it_lies(worker) -> None:
    values = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    tensor = worker.Tensor()
    view = values[:, ::2]  # a strided one
    tensor.ne[:], tensor.nb[:] = (4, 2, 2, 1), (4, *view.strides[1::-1], view.strides[0] * 2)
    tensor.data = view.ctypes.data
    assert np.array_equal(worker.array_of(tensor, np.float32)[0], view)
    assert ctypes.sizeof(worker.Tensor) == 320  # ggml's, up to its name's end


def test_rows_split_the_tokens_between_the_texts() -> None:
    rng = np.random.default_rng(5)
    scores = {key: rng.random(8) for key in ("nll", "nll_reference", "kld", "same", "dp")}
    found = {"bytes": 10, "bits_per_parameter": 4.5, "expert_bpw": 4.4, "types": {}}
    first, second = quality.rows("Q4_0", {**found, "scores": scores}, [Path("d/a"), Path("d/b")])
    assert (first["text"], second["text"], second["tokens"]) == ("a", "b", 4)
    assert second["kld_mean"] == pytest.approx(scores["kld"][4:].mean())
    assert second["ppl"] == pytest.approx(math.exp(scores["nll"][4:].mean()))
    assert first["ppl_reference"] == pytest.approx(math.exp(scores["nll_reference"][:4].mean()))
    ratio = (scores["nll"] - scores["nll_reference"])[4:].mean()
    assert second["ln_ratio"] == pytest.approx(ratio)
    assert second["rms_dp"] == pytest.approx(math.sqrt((scores["dp"][4:] ** 2).mean()))


def test_types_that_were_measured_are_kept(tmp_path: Path, monkeypatch) -> None:
    rng = np.random.default_rng(6)
    asked = []

    def measured(setting: object, name: str) -> dict[str, Any]:
        asked.append(name)
        scores = {key: rng.random(4) for key in ("nll", "nll_reference", "kld", "same", "dp")}
        return {"bits_per_parameter": 4.0, "types": {}, "scores": scores}

    monkeypatch.setattr(quality, "quantized", measured)
    out, texts = tmp_path / "rows.json", [Path("a"), Path("b")]
    quality.run(None, ["Q8_0"], texts, out, lambda note: None)
    table = quality.run(None, ["Q8_0", "Q4_0"], texts, out, lambda note: None)
    assert asked == ["Q8_0", "Q4_0"]
    assert json.loads(out.read_text()) == table
    assert [row["name"] for row in table] == ["Q8_0", "Q8_0", "Q4_0", "Q4_0"]


def test_nf4_is_that_of_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="NF4 is bitsandbytes' own: pip install bitsandbytes")
    weight = np.random.default_rng(7).normal(0, 0.1, (4, 128)).astype(np.float32)
    found = quality.through_nf4(weight)
    blocks, rounded = weight.reshape(-1, 64), found.reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1)
    np.testing.assert_allclose(np.abs(rounded).max(axis=1), absmax, rtol=1e-5)
    assert all(len(np.unique(row)) <= 16 for row in rounded)
    assert np.abs(found - weight).max() <= 0.16 * absmax.max()  # half the widest gap


def script(monkeypatch, *arguments: object) -> int:
    path = Path(quality.__file__).with_name("compare-quality")
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    return ended.value.code


def test_the_script_refuses_what_makes_no_sense(tmp_path, monkeypatch, capsys) -> None:
    text = tmp_path / "a.txt"
    common = ["smollm2-moe", "--text", text, "--out", tmp_path / "o.json"]
    code = script(monkeypatch, *common, "--calibration", "b.txt", "--types", "Q4_0,Q9_9")
    assert code == UsageError.exit_code
    assert "unknown types: Q9_9" in capsys.readouterr().err
    assert script(monkeypatch, *common, "--calibration", text) == UsageError.exit_code
    assert "cannot both calibrate and judge" in capsys.readouterr().err


@pytest.mark.skipif(HERE, reason="this interpreter has llama-cpp-python")
def test_an_interpreter_without_llama_cpp_is_told(tmp_path: Path) -> None:
    setting = quality.Setting(
        source=Source(CONFIG), python=sys.executable, work=tmp_path, threads=1
    )
    with pytest.raises(MoeliteError, match=r"(?s)logits failed.*llama_cpp") as caught:
        setting.ask("logits", gguf="x", windows="y", first=1, out="z")
    assert "--llama" in caught.value.fix


@pytest.mark.skipif(not HERE, reason="needs llama-cpp-python")
def test_llama_cpp_computes_what_moelite_computes(tmp_path: Path, monkeypatch) -> None:
    """Float32 weights on both sides: the GGUF is the checkpoint, the windows are the same."""
    from moelite.convert import quantize
    from moelite.engine import load

    config = {**CONFIG, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 128}
    source = Source(config)
    monkeypatch.setattr(quality, "FIRST", 17)  # windows of 32 tokens
    quantize(source, tmp_path / "store", experts="f32", dense="f32")
    setting = quality.Setting(source=source, python=sys.executable, work=tmp_path / "w", threads=1)
    ids = np.random.default_rng(8).integers(3, 128, (2, 32)).astype(np.int32)
    quality.prepare(setting, ids, ids[:1])
    got = np.load(tmp_path / "w" / "reference.npy")
    assert got.shape == (2, 15, 128)
    with load(tmp_path / "store", kv="f32", context=32) as model:
        for window, rows in zip(ids, got, strict=True):
            want = model.forward(window.tolist())[-len(rows) - 1 : -1]
            np.testing.assert_allclose(rows, want, atol=1e-4)
    found = quality.quantized(setting, "Q4_0")
    assert found["types"]["ffn_up_exps"] == {"Q4_0": 2}
    assert 0 < found["scores"]["kld"].mean() < 1
    importance = np.load(tmp_path / "w" / "imatrix.npz")
    assert importance["blk.0.ffn_down_exps.weight"].shape == (4 * 256,)
    embedded = source.tensors["model.embed_tokens.weight"][ids[0]].astype(np.float64)
    scale = np.sqrt(np.square(embedded).mean(axis=1, keepdims=True) + config["rms_norm_eps"])
    normed = embedded / scale * source.tensors["model.layers.0.input_layernorm.weight"]
    want = np.square(normed).mean(axis=0)
    np.testing.assert_allclose(importance["blk.0.attn_q.weight"], want, rtol=1e-4)
    for layer in (0, 1):  # the last layer's experts met every token, too
        gate, up = (importance[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up"))
        assert np.array_equal(gate, up)
        assert (gate.reshape(4, 128) != 1).all()
