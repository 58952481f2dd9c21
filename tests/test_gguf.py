"""GGUF files: the models of a checkpoint, tensor types as ggml decodes them, tokenizers, lies."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from gguf_files import write_gguf
from safetensors.numpy import load_file

import moelite
from moelite.arch import TensorRef
from moelite.errors import CheckpointError, MoeliteError, UnsupportedError
from moelite.inputs import open_source, read_config
from moelite.models import build
from moelite.sources import open_folder
from moelite.sources.codes import Codes
from moelite.sources.gguf_file import read_gguf
from moelite.sources.gguf_tensors import Rows
from moelite.tokenizer import Tokenizer

GGML = Path(__file__).parent / "encoded" / "ggml"
Type = gguf.GGMLQuantizationType
# variants whose settings a GGUF can hold; llama.cpp fixes renormalization and has no mscale ratio
VARIANTS = [
    *(("mixtral", v) for v in ("plain", "mha-tied", "odd-sizes", "one-expert-of-five")),
    *(("mixtral", v) for v in ("all-experts", "linear-rope")),
    *(("olmoe", v) for v in ("plain", "clipped-gqa", "attention-bias", "odd-sizes")),
    *(("qwen2_moe", v) for v in ("plain", "tied-mqa-no-bias", "odd-sizes", "yarn")),
    *(("qwen3_moe", v) for v in ("plain", "wide-heads-tied", "attention-bias")),
    ("qwen3_moe", "odd-sizes"),
]

pytestmark = pytest.mark.parity


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    tiny_models.write_checkpoint("mixtral", "plain", tmp_path / "model")
    return tmp_path / "model"


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


# --- whole models ---


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS)
def test_a_gguf_is_its_checkpoint(model_type: str, variant: str, tmp_path: Path) -> None:
    """The same architecture, tensor for tensor the same numbers, so the same store."""
    tiny_models.write_checkpoint(model_type, variant, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    source = open_folder(tmp_path / "model.gguf")
    assert build(source.config) == build(config_of(tmp_path / "model"))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert source.names() == sorted(tensors)
    for name, want in tensors.items():
        assert source.shape(name) == want.shape
        assert source.dtype(name) == "F32"
        assert source.nbytes(name) == want.nbytes
        np.testing.assert_array_equal(source.raw(name), want)
        np.testing.assert_array_equal(source.raw(name, 3, 11), want[3:11])
        np.testing.assert_array_equal(source.raw(name, 19, 31), want[19:31])  # of other heads


@pytest.mark.parametrize("model_type", sorted({m for m, _ in VARIANTS}))
def test_a_gguf_runs_as_transformers_runs_its_checkpoint(model_type: str, tmp_path: Path) -> None:
    tiny_models.write_checkpoint(model_type, "plain", tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    report = moelite.quantize(tmp_path / "model.gguf", tmp_path / "a", experts="f32", dense="f32")
    moelite.quantize(tmp_path / "model", tmp_path / "b", experts="f32", dense="f32")
    files = sorted(p.name for p in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert report.source == "model.gguf"
    assert report.encodings == {"F32": report.bytes_before}
    ids = tiny_models.prompt(model_type, "plain", 20)
    want = tiny_models.logits(tiny_models.load(tmp_path / "model"), ids)
    with moelite.load(tmp_path / "a", kv="f32") as model:
        got = model.forward(ids)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()  # as test_parity has it


def test_codes_in_a_store(mixtral: Path, tmp_path: Path) -> None:
    """Quantized tensors reach the store as ggml decodes them; a dry run counts their bytes."""
    kinds = {"_exps.weight": Type.Q8_0, "attn_q.weight": Type.Q4_0, "attn_k.weight": Type.Q4_0}
    config = config_of(mixtral) | {"intermediate_size": 64}
    made = tiny_models.weights(mixtral)
    rng = np.random.default_rng(0)
    for name, tensor in made.items():
        if "experts" in name:
            shape = tuple(64 if n == 48 else n for n in tensor.shape)
            made[name] = rng.normal(0, 0.1, shape).astype(np.float32)
    (mixtral / "config.json").write_text(json.dumps(config))
    from safetensors.numpy import save_file

    save_file(made, mixtral / "model.safetensors")
    write_gguf(mixtral, tmp_path / "q.gguf", kinds=kinds)
    source: Any = open_folder(tmp_path / "q.gguf")
    decoded = {name: source.raw(name) for name in source.names()}
    for name, want in made.items():
        kind = Type.Q8_0 if "experts" in name else Type.Q4_0
        if "experts" in name or "q_proj" in name or "k_proj" in name:
            # quantizing rows in another order gives the same rows
            want = gguf.dequantize(gguf.quantize(want, kind), kind)
        np.testing.assert_array_equal(decoded[name], want)
        coded = source.coded(TensorRef(name=name), 5, 40)
        if coded is not None:
            np.testing.assert_array_equal(numbers(coded), want[5:40])
    report = moelite.quantize(tmp_path / "q.gguf", tmp_path / "s", experts="f32", dense="f32")
    assert report.encodings["Q8_0"] == 3 * 8 * 3 * 64 * 64 // 32 * 34
    assert report.encodings["Q4_0"] == 3 * (64 + 32) * 64 // 32 * 18
    assert report.bytes_before == sum(report.encodings.values())
    save_file(decoded, mixtral / "model.safetensors")
    moelite.quantize(mixtral, tmp_path / "t", experts="f32", dense="f32")
    for name in ("dense.safetensors", "experts-00001.safetensors"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "t" / name).read_bytes()


def test_a_split_model(mixtral: Path, tmp_path: Path) -> None:
    write_gguf(mixtral, tmp_path / "m.gguf", split=3)
    first = tmp_path / "m-00001-of-00003.gguf"
    source = open_folder(first)
    for name, want in tiny_models.weights(mixtral).items():
        np.testing.assert_array_equal(source.raw(name), want)
    with pytest.raises(CheckpointError, match="part 1 of 3") as caught:
        open_folder(tmp_path / "m-00002-of-00003.gguf")
    assert "00001-of-00003" in caught.value.fix
    (tmp_path / "m-00003-of-00003.gguf").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf is missing"):
        open_folder(first)
    (tmp_path / "m-00002-of-00003.gguf").rename(tmp_path / "m-00003-of-00003.gguf")
    (tmp_path / "elsewhere").rename(tmp_path / "m-00002-of-00003.gguf")
    with pytest.raises(CheckpointError, match=r"is not part 2 of"):
        open_folder(first)


def test_a_folder_with_one_gguf(mixtral: Path, tmp_path: Path) -> None:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    write_gguf(mixtral, folder / "m.gguf", split=2)
    assert open_folder(folder).source == "m-00001-of-00002.gguf"
    write_gguf(mixtral, folder / "other.gguf")
    with pytest.raises(CheckpointError, match="several GGUF models"):
        open_folder(folder)


def test_a_gguf_that_is_not_there(tmp_path: Path) -> None:
    """Not a hub id, though it looks like one."""
    with pytest.raises(CheckpointError, match=r"no file models/x\.gguf"):
        open_source("models/x.gguf", offline=True)
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(CheckpointError, match="no GGUF file"):
        open_source(tmp_path / "x.gguf")


def test_fused_and_single_experts(mixtral: Path, tmp_path: Path) -> None:
    tensors = write_gguf(mixtral, tmp_path / "m.gguf")
    want = tiny_models.weights(mixtral)
    for how in ("fused", "single"):
        writer = gguf.GGUFWriter(tmp_path / f"{how}.gguf", "llama")
        _copy_facts(tmp_path / "m.gguf", writer)
        for name, tensor in tensors.items():
            if "_exps" not in name:
                writer.add_tensor(name, tensor)
            elif how == "single":
                for e, one in enumerate(tensor):
                    writer.add_tensor(name.replace("_exps.weight", f".{e}.weight"), one)
            elif "ffn_gate_exps" in name:
                both = np.concatenate([tensor, tensors[name.replace("gate", "up")]], axis=1)
                writer.add_tensor(name.replace("gate", "gate_up"), both)
            elif "ffn_down" in name:
                writer.add_tensor(name, tensor)
        _finish(writer)
        source = open_folder(tmp_path / f"{how}.gguf")
        assert build(source.config) == build(config_of(mixtral))
        for name, tensor in want.items():
            np.testing.assert_array_equal(source.raw(name), tensor)


def _copy_facts(path: Path, writer: gguf.GGUFWriter) -> None:
    for key, field in gguf.GGUFReader(path).fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- tensor types ---


def numbers(coded: Codes) -> np.ndarray:
    """What the codes say, in float32."""
    entries = coded.codes if coded.kind == "int8" else coded.table[coded.codes]
    return entries.astype(np.float32) * np.repeat(coded.scales, coded.block, axis=1)


@pytest.mark.parametrize("name", sorted(p.stem for p in GGML.glob("*.safetensors")))
def test_a_type_is_decoded_as_ggml_decodes_it(tmp_path: Path, name: str) -> None:
    made = load_file(GGML / f"{name}.safetensors")
    kind = Type[name]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("x", made["data"], raw_dtype=kind)
    _finish(writer)
    entry = read_gguf(tmp_path / "t.gguf").tensors["x"]
    assert entry.shape == made["want"].shape
    rows = Rows(entry, entry.shape)
    assert rows.dtype == name
    assert rows.nbytes == made["data"].nbytes
    np.testing.assert_array_equal(rows.rows(0, 3), made["want"])
    np.testing.assert_array_equal(rows.rows(1, 2), made["want"][1:2])
    coded = rows.coded(1, 3)
    known = {"Q8_0": "int8", "Q4_0": "int4", "IQ4_NL": "int4", "MXFP4": "mxfp4"}
    assert (coded.kind if coded else None) == known.get(name)
    if coded is not None:
        np.testing.assert_array_equal(numbers(coded), made["want"][1:3])


def test_a_type_that_cannot_be_decoded(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    size = gguf.GGML_QUANT_SIZES[Type.Q8_K][1]
    writer.add_tensor("x", np.zeros((1, size), np.uint8), raw_dtype=Type.Q8_K)
    _finish(writer)
    entry = read_gguf(tmp_path / "t.gguf").tensors["x"]
    with pytest.raises(UnsupportedError, match="'x' is Q8_K"):
        Rows(entry, entry.shape)


# --- small files ---


def test_the_small_files(mixtral: Path, tmp_path: Path) -> None:
    keys = {
        "tokenizer.ggml.eot_token_id": 5,
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.05,
    }
    write_gguf(mixtral, tmp_path / "m.gguf", keys=keys)
    files = open_folder(tmp_path / "m.gguf").files
    assert sorted(files) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads(files["generation_config.json"]) == {
        "bos_token_id": 1,
        "do_sample": True,
        "eos_token_id": [2, 5],
        "pad_token_id": 0,
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_k": 20,
    }
    read = Tokenizer.from_files(files)
    assert read.eos_ids == {2, 5}
    assert read.bos_id == 1
    assert read.render([{"role": "user", "content": "hi"}]) == "hi"
    assert read.decode(read.encode("cab c", special=True)) == "cab c"
    config, size, manifest = read_config(tmp_path / "m.gguf")
    assert build(config) == build(config_of(mixtral))
    assert manifest is None
    assert size == len(files["tokenizer.json"])


# --- what is refused ---


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.scaling.attn_factor": 0.5}, "attn_factor"),
        ({"llama.attention.clamp_kqv": 3.0}, "clamp_kqv"),
        ({"llama.expert_gating_func": 2}, "expert_gating_func"),
        ({"llama.expert_weights_norm": False}, "expert_weights_norm"),
        ({"llama.attention.key_length": 15}, "value_length|key_length|rope"),
        ({"llama.final_logit_softcapping": 30.0}, r"final_logit_softcapping.*does not know"),
    ],
)
def test_settings_that_change_the_maths(
    mixtral: Path, tmp_path: Path, keys: dict[str, Any], match: str
) -> None:
    write_gguf(mixtral, tmp_path / "m.gguf", keys=keys)
    with pytest.raises(UnsupportedError, match=match) as caught:
        open_folder(tmp_path / "m.gguf")
    assert caught.value.fix


def test_a_tensor_that_nobody_knows(mixtral: Path, tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    write_gguf(mixtral, tmp_path / "m.gguf", extra=extra)
    with pytest.raises(UnsupportedError, match=r"'rope_freqs\.weight' is nothing"):
        open_folder(tmp_path / "m.gguf")


def test_other_models(tmp_path: Path) -> None:
    for arch, experts in (("llama", None), ("gemma", 4)):
        writer = gguf.GGUFWriter(tmp_path / f"{arch}.gguf", arch)
        if experts:
            writer.add_expert_count(experts)
        writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
        _finish(writer)
        with pytest.raises(UnsupportedError, match=f"'{arch}' model"):
            open_folder(tmp_path / f"{arch}.gguf")


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _header(version: int = 3, tensors: int = 1, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def _tensor(sides: tuple[int, ...] = (4,), kind: int = 0, at: int = 0, name: str = "x") -> bytes:
    text = _string(name) + struct.pack("<I", len(sides))
    return text + struct.pack(f"<{len(sides)}Q", *sides) + struct.pack("<IQ", kind, at)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "ends|left"),
        (b"GGUF", "left"),
        (b"GGML" + bytes(60), "no GGUF file"),
        (_header(1) + _tensor(), "version 1"),
        (_header(3 << 24) + _tensor(), "little endian"),
        (_header(tensors=1 << 40), "count"),
        (_header(entries=1 << 40), "count"),
        (_header(entries=1) + struct.pack("<Q", 1 << 60), "left"),
        (_header(entries=1) + _string("k") + struct.pack("<I", 13), "type 13"),
        (_header(entries=1) + _string("k") + struct.pack("<IIQ", 9, 0, 1 << 62), "count"),
        (_header(entries=1) + _string("k") + struct.pack("<IIQ", 9, 9, 1), "arrays"),
        (_header(entries=2) + 2 * (_string("k") + struct.pack("<IB", 0, 1)), "twice"),
        (_header(entries=1) + struct.pack("<Q", 2) + b"\xff\xfe", "utf-8"),
        (_header() + _tensor((1 << 50,)), "count"),
        (_header() + _tensor((1 << 39, 1 << 39)), "ends at byte"),
        (_header() + _tensor((0,)), "blocks"),
        (_header() + _tensor(()), "blocks"),
        (_header() + _tensor((1, 1, 1, 1, 1)), "count"),
        (_header() + _tensor((33,), kind=2), "whole blocks of 32"),
        (_header() + _tensor(at=1 << 62), "ends at byte"),
        (_header() + _tensor(kind=9999), "type 9999"),
        (_header(tensors=2) + _tensor() + _tensor(), "twice"),
        (
            _header(entries=1) + _string("general.alignment") + struct.pack("<II", 4, 0)
            + _tensor(), "alignment",
        ),
    ],
)  # fmt: skip
def test_headers_that_lie(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data + bytes(64 if data.startswith(b"GGUF\x03") and len(data) > 40 else 0))
    with pytest.raises(MoeliteError, match=match):
        read_gguf(path)


def test_a_file_cut_after_it_was_opened(mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(mixtral, path)
    source = open_folder(path)
    path.write_bytes(path.read_bytes()[:-8000])
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        [source.raw(name) for name in source.names()]
