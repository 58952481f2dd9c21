"""tokenizer.json rebuilt from a GGUF's metadata, for tokenizers of the models that moelite runs.

Two kinds, as tokenizer.ggml.model says:

"gpt2"   byte-level BPE. tokenizer.ggml.pre names how text is cut before merging; the cuts, and
         whether text is normalized first, are those of the models' own tokenizer.json files.
"llama"  SentencePiece BPE: spaces become U+2581, unknown characters bytes. There are scores instead
         of merges: a pair merges earlier the higher the score of what it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from moelite.config import short
from moelite.errors import CheckpointError, MoeliteError, UnsupportedError

_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # token types
_LONGEST = 1024  # characters of a token; splitting one at every place takes their square
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _words(*before: Any) -> list[Any]:
    """GPT-2's own cuts, after others."""
    return [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


# name: (how text is cut, whether the models' own tokenizers normalize it to NFC first)
_PRE: dict[str, tuple[Callable[[], list[Any]], bool]] = {
    "gpt-2": (lambda: _words(), False),
    "olmo": (lambda: _words(), True),
    "smollm": (lambda: _words(pre_tokenizers.Digits(individual_digits=True)), False),
    "qwen2": (lambda: _split(_QWEN2), True),
    "deepseek-r1-qwen": (lambda: _split(_QWEN2), True),
    "llama-bpe": (lambda: _split(_LLAMA3), False),
}


def build(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF. Raises UnsupportedError naming a kind that is not implemented."""
    kind = metadata.get(_KEY + "model")
    if kind not in {"gpt2", "llama"}:
        raise UnsupportedError(
            f"tokenizer.ggml.model is {short(kind)}; moelite reads 'gpt2' and 'llama'",
            fix="use the model's checkpoint, which has a tokenizer.json",
        )
    try:
        made = _byte_level(metadata) if kind == "gpt2" else _sentencepiece(metadata)
        _add_tokens(made, metadata)
        _surround(made, metadata, default=kind == "llama")
    except MoeliteError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"the GGUF's tokenizer cannot be built: {error}", fix="fetch it again"
        ) from error
    return made


def token_list(metadata: Mapping[str, Any]) -> list[str]:
    """Every token by id. Raises CheckpointError for what is no vocabulary."""
    tokens = metadata.get(_KEY + "tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise CheckpointError("the GGUF has no tokenizer.ggml.tokens", fix="fetch it again")
    if max(map(len, tokens)) > _LONGEST:
        raise CheckpointError(
            f"tokenizer.ggml.tokens has a token of {max(map(len, tokens))} characters;"
            f" at most {_LONGEST} are read"
        )
    return tokens


def _column(metadata: Mapping[str, Any], name: str, count: int, default: Any = None) -> list[Any]:
    """An array with one entry a token."""
    found = metadata.get(_KEY + name, default)
    if not isinstance(found, list) or len(found) != count:
        length = len(found) if isinstance(found, list) else "not"
        raise CheckpointError(
            f"tokenizer.ggml.{name} has {length} entries for {count} tokens", fix="fetch it again"
        )
    return found


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens = token_list(metadata)
    pre = metadata.get(_KEY + "pre")
    if pre not in _PRE:
        raise UnsupportedError(
            f"tokenizer.ggml.pre is {short(pre)}; moelite knows {', '.join(_PRE)}",
            fix="use the model's checkpoint, which has a tokenizer.json",
        )
    raw = metadata.get(_KEY + "merges")
    pairs = [tuple(pair.split(" ")) for pair in raw] if isinstance(raw, list) else []
    vocabulary = {token: index for index, token in enumerate(tokens)}
    known = all(len(p) == 2 and {*p, "".join(p)} <= vocabulary.keys() for p in pairs)
    if not pairs or not known:
        raise CheckpointError(
            "tokenizer.ggml.merges is missing, or has a pair that is not in the vocabulary",
            fix="fetch it again",
        )
    made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    cuts, composed = _PRE[pre]
    if composed:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(cuts())
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens = token_list(metadata)
    scores = _column(metadata, "scores", len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(vocabulary, scores),
            unk_token=_token(metadata, "unknown", tokens),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get(_KEY + "add_space_prefix", True) is not False
    prepend = [normalizers.Prepend("\u2581")] if prefix else []
    made.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return made


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a third, best score first, as transformers orders them."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, index in vocabulary.items():
        parts = [(token[:i], token[i:]) for i in range(1, len(token))]
        both = [pair for pair in parts if pair[0] in vocabulary and pair[1] in vocabulary]
        both.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(scores[index], len(a), len(b), a, b) for a, b in both]
    found.sort(key=lambda entry: entry[:3], reverse=True)
    return [(a, b) for *_, a, b in found]


def _add_tokens(made: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Control tokens are special; those a user added are matched as text, before anything else."""
    tokens = token_list(metadata)
    kinds = _column(metadata, "token_type", len(tokens), [1] * len(tokens))
    special = {_CONTROL, _UNKNOWN}
    made.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in special and token
        ]
    )
    made.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _USER and token
        ]
    )


def _surround(made: Tokenizer, metadata: Mapping[str, Any], *, default: bool) -> None:
    """The tokens that belong before and after every text."""
    tokens, ids = token_list(metadata), {}
    around: dict[str, list[str]] = {"bos": [], "eos": []}
    for name, wanted in (("bos", default), ("eos", False)):
        token = _token(metadata, name, tokens)
        if metadata.get(f"{_KEY}add_{name}_token", wanted) is True and token is not None:
            around[name] = [token]
            ids[token] = tokens.index(token)
    if ids:
        single = [*around["bos"], "$A", *around["eos"]]
        made.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, "$B"], special_tokens=list(ids.items())
        )


def _token(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> str | None:
    """The token that `name` ("bos", "unknown") says, if there is one."""
    index = metadata.get(f"{_KEY}{name}_token_id")
    return tokens[index] if type(index) is int and 0 <= index < len(tokens) else None
