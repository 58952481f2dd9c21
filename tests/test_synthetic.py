"""scripts/synthetic*: random stores and GGUF files, small enough to look at every weight."""

from __future__ import annotations

import hashlib
import runpy
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import synthetic
import synthetic_routing
from synthetic_gguf import random_blocks, write_gguf
from tiny_checkpoint import layout_of

from moelite.bench import bench
from moelite.engine import load
from moelite.errors import StoreError, UsageError
from moelite.models import build
from moelite.quant import FORMATS
from moelite.quant.base import empty_packed
from moelite.quant.record import unpack_record
from moelite.store import ExpertKey, Store

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
OWN = {
    "olmoe": {"intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 4},
    "mixtral-8x7b": {"intermediate_size": 96},
    "qwen3-30b-a3b": {
        "moe_intermediate_size": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "head_dim": 32,
    },
}


def small(shape: str = "olmoe", **changes: Any) -> dict[str, Any]:
    """A named shape with everything made small."""
    return {**synthetic.config_of(shape), **SMALL, **OWN[shape], **changes}


def write(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> Path:
    out = folder / "store"
    synthetic.write_store(config or small(), out, name="small", **options)
    return out


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file: pytest takes minutes to show how two files differ."""
    found = sorted(folder.rglob("*"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in found if p.is_file()}


@pytest.mark.parametrize(
    ("name", "experts", "top_k", "size", "heads", "params"),
    [
        ("olmoe", 64, 8, 1024, (16, 16, 128), 6.9e9),
        ("mixtral-8x7b", 8, 2, 14336, (32, 8, 128), 46.7e9),
        ("qwen3-30b-a3b", 128, 8, 768, (32, 4, 128), 30.5e9),
    ],
)
def test_the_shapes_are_those_of_the_models(
    name: str, experts: int, top_k: int, size: int, heads: tuple[int, ...], params: float
) -> None:
    config = synthetic.config_of(name)
    arch = build(config)
    mlp, a = arch.layers[0].mlp, arch.layers[0].attention
    assert (mlp.num_experts, mlp.router.top_k, mlp.experts.gate.rows) == (experts, top_k, size)
    assert (a.num_heads, a.num_kv_heads, a.head_dim) == heads
    assert not arch.tied
    source = synthetic.RandomSource(config, name, 0)
    total = sum(np.prod(source.shape(tensor)) for tensor in source.names())
    assert total == pytest.approx(params, rel=0.005)


@pytest.mark.parametrize("shape", synthetic.SHAPES)
@pytest.mark.parametrize("formats", [("int4", "int8"), ("int8", "int4")])
def test_a_store_is_sound_and_runs(tmp_path: Path, shape: str, formats: tuple[str, str]) -> None:
    out = write(tmp_path, small(shape), formats=formats)
    store = Store.open(out)
    assert (store.expert_format, store.dense_format) == formats
    for name in store.manifest.files:
        store.verify_file(name)
    store.close()
    with load(out, context=64, ram="1GiB", threads=1) as model:
        logits = model.forward(list(range(40)))
        assert np.isfinite(logits).all()
        assert 0.2 < logits.std() < 5
        assert bench(model, prompt=8, gen=2, repeat=1).decode_tok_s > 0


@pytest.mark.parametrize("fmt", synthetic.FORMATS_DRAWN)
def test_weights_have_zero_mean_and_the_size_asked_for(fmt: str) -> None:
    shape = (256, 512)
    packed = empty_packed(FORMATS[fmt], *shape)
    synthetic.random_packed(fmt, shape, 0.02, synthetic.generator(1), packed)
    check_weights(FORMATS[fmt].unpack(packed, *shape), 0.02)


@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_gguf_weights_have_zero_mean_and_the_size_asked_for(fmt: str) -> None:
    blocks = random_blocks(fmt, (4, 64, 512), 0.02, synthetic.generator(1))
    kind = {"int4": gguf.GGMLQuantizationType.Q4_0, "int8": gguf.GGMLQuantizationType.Q8_0}[fmt]
    check_weights(gguf.dequantize(blocks, kind).reshape(256, 512), 0.02)


def check_weights(weight: np.ndarray, std: float) -> None:
    """weight [256, 512]: zero mean within error, `std`, and nothing that repeats."""
    assert weight.std() == pytest.approx(std, rel=0.02)
    # 6 standard errors; uniform codes under scales of one sign lie 40 away
    assert abs(weight.mean()) < 6 * std / np.sqrt(weight.size)
    assert np.abs(weight.mean(axis=1)).max() < 7 * std / np.sqrt(weight.shape[1])
    for axis in (0, 1):
        other = weight if axis else weight.T
        like = np.corrcoef(other)
        np.fill_diagonal(like, 0)
        assert np.abs(like).max() < 7 / np.sqrt(other.shape[1])


def test_what_adds_to_the_residual_is_smaller(tmp_path: Path) -> None:
    store = Store.open(write(tmp_path, small(num_hidden_layers=8)))
    found = {}
    for name in ("self_attn.q_proj", "self_attn.o_proj"):
        key = f"model.layers.3.{name}.weight"
        entry = store.dense_entry(key)
        weight = FORMATS[entry.format].unpack(store.read_dense(key), *entry.shape)
        found[name] = weight.std() * np.sqrt(weight.shape[1])
    record = np.empty(layout_of(store).record_bytes, np.uint8)
    store.read_record(ExpertKey(3, 5), record)
    store.close()
    _, up, down = unpack_record(layout_of(store), record)
    found["up"], found["down"] = (w.std() * np.sqrt(w.shape[1]) for w in (up, down))
    want = {"self_attn.q_proj": 1, "self_attn.o_proj": 1 / 4, "up": 1, "down": 1 / 4}
    assert found == pytest.approx(want, rel=0.1)


def test_int8_codes_never_are_minus_128() -> None:
    out = np.empty(100_000, np.int8)
    synthetic.fill_int8(out, synthetic.generator(1))
    assert (out.min(), out.max()) == (-127, 127)
    assert abs(out.mean()) < 6 * 73.6 / np.sqrt(out.size)


def test_no_two_experts_are_alike(tmp_path: Path) -> None:
    store = Store.open(write(tmp_path, small(num_hidden_layers=2)))
    record = np.empty(layout_of(store).record_bytes, np.uint8)
    found = []
    for key in (ExpertKey(layer, expert) for layer in range(2) for expert in range(16)):
        store.read_record(key, record)
        gate, up, _ = unpack_record(layout_of(store), record)
        found += [gate.reshape(-1), up.reshape(-1)]
    store.close()
    like = np.corrcoef(found)
    np.fill_diagonal(like, 0)
    assert np.abs(like).max() < 6 / np.sqrt(found[0].size)


def test_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, seed=seed)
        write_gguf(small(), tmp_path / name / "x.gguf", seed=seed)
    one, same, other = (digests(tmp_path / name) for name in "abc")
    assert one == same
    assert {name for name in one if one[name] == other[name]} == {"config.json"}
    prints = [Store.open(tmp_path / name / "store").manifest.fingerprint for name in "ac"]
    assert prints[0] != prints[1]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine").touch()
    with pytest.raises(StoreError, match="not empty"):
        write(tmp_path)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["mine"]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'gpt2' is no shape"):
        synthetic.config_of("gpt2")
    with pytest.raises(UsageError, match="--layers 0"):
        synthetic.config_of("olmoe", 0)
    with pytest.raises(UsageError, match="'bf16' cannot be drawn"):
        write(tmp_path, formats=("int4", "bf16"))
    with pytest.raises(UsageError, match="whole blocks"):
        write(tmp_path, small(vocab_size=100))


def test_routing_is_spread(tmp_path: Path) -> None:
    # deep: every layer may make tokens more alike
    out = write(tmp_path, small(num_hidden_layers=24, num_key_value_heads=4))
    rows = synthetic_routing.expert_use(out)
    assert [row.layer for row in rows] == list(range(24))
    for row in rows:
        assert row.used == 1
        assert row.even - 0.1 < row.entropy < row.even + 0.02
        assert row.busiest < 0.7


def test_routing_that_is_not_spread_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every router row alike: the choice is always the first experts."""
    plain = synthetic.random_plain

    def alike(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        found = plain(shape, rng)
        return found if len(shape) == 1 else np.repeat(found[:1], shape[0], axis=0)

    monkeypatch.setattr(synthetic, "random_plain", alike)
    (row,) = synthetic_routing.expert_use(write(tmp_path))
    assert (row.used, row.busiest) == (4 / 16, 1)
    assert row.entropy == pytest.approx(0.5)


@pytest.mark.parametrize("fmt", ["int4", "int8"])
@pytest.mark.parametrize("shape", synthetic.SHAPES)
def test_a_gguf_holds_the_same_shape(tmp_path: Path, shape: str, fmt: str) -> None:
    config = small(shape)
    write_gguf(config, tmp_path / "x.gguf", fmt=fmt)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    kind = {"olmoe": "olmoe", "mixtral-8x7b": "llama", "qwen3-30b-a3b": "qwen3moe"}[shape]
    facts = {key: field.contents() for key, field in reader.fields.items()}
    assert facts["general.architecture"] == kind
    assert facts[f"{kind}.vocab_size"] == 128
    assert facts[f"{kind}.attention.head_count_kv"] == 2
    experts = config.get("num_experts", 8)
    assert facts[f"{kind}.expert_count"] == experts
    assert facts["tokenizer.ggml.model"] == "none"
    found = {t.name: t for t in reader.tensors}
    source = synthetic.RandomSource(config, shape, 0)
    assert sum(t.n_elements for t in found.values()) == sum(
        np.prod(source.shape(name)) for name in source.names()
    )
    size = config.get("moe_intermediate_size", config["intermediate_size"])
    assert found["blk.0.ffn_down_exps.weight"].shape.tolist() == [size, 64, experts]
    assert found["blk.0.ffn_gate_inp.weight"].shape.tolist() == [64, experts]
    for name, tensor in found.items():
        plain = "norm" in name or "gate_inp" in name
        want = "F32" if plain else {"int4": "Q4_0", "int8": "Q8_0"}[fmt]
        assert tensor.tensor_type.name == want, name
        assert tensor.data_offset % 32 == 0
        if not plain:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
            std = 1 if name == "token_embd.weight" else tensor.shape[0] ** -0.5
            if "attn_output" in name or "down" in name:
                std /= 2**0.5  # adds to the residual of a model with one layer
            assert weight.std() == pytest.approx(std, rel=0.1), name
            assert abs(weight.mean()) < 7 * std / np.sqrt(weight.size), name


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(Path(synthetic.__file__).with_name("synthetic-checkpoint"))
    monkeypatch.setattr(synthetic, "SHAPES", {"olmoe": small()})
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    arguments = [script, "olmoe", str(out), "--gguf", str(file), "--dense", "int4", "--check"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--layers", "2"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "experts int4, dense int4" in shown
    assert "entropy" in shown
    assert len(Store.open(out).manifest.layers) == 2
    assert file.exists()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == StoreError.exit_code
    assert "is not empty" in capsys.readouterr().err
