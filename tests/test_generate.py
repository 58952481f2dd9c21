"""Sampling, stopping, prefix reuse and the record of an answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from fakes import FakeModel, sidecars
from hypothesis import given, settings
from hypothesis import strategies as st

from moelite.errors import MoeliteError, UsageError
from moelite.generate import (
    Generation,
    StopScanner,
    chat,
    chat_stream,
    complete,
    generate,
    reuse,
    stream,
)
from moelite.sampling import Sampler, SamplingOptions, candidates

HI = [{"role": "user", "content": "hi"}]


def kept(scores: list[float] | np.ndarray, **options: float) -> list[int]:
    ids, weights = candidates(
        np.asarray(scores, np.float64), SamplingOptions(temperature=1, **options)
    )
    assert len(ids) == len(weights)
    return [int(i) for i in ids]


def logs(*weights: float) -> np.ndarray:
    return np.log(np.asarray(weights, np.float64))


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert Sampler(SamplingOptions()).pick(np.array([1, 5, 5, 2], np.float32)) == 1


def test_top_k() -> None:
    scores = [0.1, 3, 2, 3, 1]
    assert kept(scores, top_k=1) == [1]
    assert kept(scores, top_k=3) == [1, 2, 3]
    assert kept(scores, top_k=9) == kept(scores) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_fewest_that_hold_the_mass() -> None:
    scores = logs(0.1, 0.5, 0.15, 0.25)
    assert kept(scores, top_p=0.4) == [1]
    assert kept(scores, top_p=0.51) == [1, 3]
    assert kept(scores, top_p=0.76) == [1, 2, 3]
    assert kept(scores, top_p=0.999) == [0, 1, 2, 3]
    assert kept(scores, top_p=1e-9) == [1]


def test_min_p_is_relative_to_the_likeliest() -> None:
    scores = logs(0.5, 0.26, 0.24)
    assert kept(scores, min_p=0.5) == [0, 1]
    assert kept(scores, min_p=1.0) == [0]
    assert kept(scores, min_p=0.4) == [0, 1, 2]


def test_temperature_comes_before_top_p() -> None:
    scores = logs(0.6, 0.3, 0.1)
    at = [
        len(candidates(scores, SamplingOptions(temperature=t, top_p=0.75))[0]) for t in (0.5, 1, 4)
    ]
    assert at == [1, 2, 3]


def test_top_p_of_a_large_vocabulary() -> None:
    scores = np.random.default_rng(0).normal(size=20_000) * 3
    flat = np.zeros(5_000)
    assert len(kept(flat, top_p=0.5)) == 2_500
    for top_p in (0.1, 0.7, 0.99):
        order = np.argsort(-scores, kind="stable")
        mass = np.cumsum(np.exp(scores[order]))
        want = order[: 1 + np.count_nonzero(mass[:-1] < top_p * mass[-1])]
        assert kept(scores, top_p=top_p) == sorted(want.tolist())


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(4))
def test_same_candidates_as_transformers(seed: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    scores = np.random.default_rng(seed).normal(size=3_000).astype(np.float32) * 2
    options = SamplingOptions(temperature=0.8, top_k=200, top_p=0.9, min_p=0.02)
    x = torch.tensor(scores)[None]
    for step in (
        theirs.TemperatureLogitsWarper(options.temperature),
        theirs.TopKLogitsWarper(options.top_k),
        theirs.TopPLogitsWarper(options.top_p),
        theirs.MinPLogitsWarper(options.min_p),
    ):
        x = step(None, x)
    want = torch.softmax(x[0], -1).numpy()
    ids, weights = candidates(scores.astype(np.float64), options)
    assert ids.tolist() == np.flatnonzero(want).tolist()
    assert 5 < len(ids) < 200
    np.testing.assert_allclose(weights / weights.sum(), want[ids], rtol=1e-5)


@pytest.mark.parity
def test_same_repetition_penalty_as_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    scores = np.array([3.0, 2.9, -1.0, 2.0], np.float32)
    seen = [0, 0, 2]
    x = theirs.RepetitionPenaltyLogitsProcessor(1.5)(
        torch.tensor([seen]), torch.tensor(scores)[None]
    )
    pick = Sampler(SamplingOptions(repetition_penalty=1.5)).pick(scores, seen)
    assert pick == int(x.argmax()) == 1


def test_draws_follow_the_weights() -> None:
    sampler = Sampler(SamplingOptions(temperature=1, seed=3))
    scores = logs(0.2, 0.5, 0.3).astype(np.float32)
    counts = np.bincount([sampler.pick(scores) for _ in range(4000)], minlength=3)
    np.testing.assert_allclose(counts / 4000, [0.2, 0.5, 0.3], atol=0.03)


def test_a_seed_fixes_the_draws_and_none_does_not() -> None:
    scores = np.zeros(1000, np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1, seed=seed))
        return [sampler.pick(scores) for _ in range(5)]

    assert draws(7) == draws(7) == [625, 897, 775, 225, 300]
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_scores_without_a_number_are_noticed() -> None:
    with pytest.raises(MoeliteError, match="not a number"):
        Sampler(SamplingOptions(temperature=1)).pick(np.full(4, np.nan, np.float32))
    with pytest.raises(MoeliteError, match="not a number"):
        Sampler(SamplingOptions()).pick(np.full(4, np.nan, np.float32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"top_k": -1},
        {"seed": -1},
        {"stop": ("",)},
        {"repetition_penalty": 0},
    ],
)
def test_senseless_options_are_refused_by_name(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        SamplingOptions(**wrong)


def test_other_programs_words_are_corrected() -> None:
    with pytest.raises(TypeError, match="'max_new_tokens'; use max_tokens"):
        complete(FakeModel(), "x", max_new_tokens=3)
    with pytest.raises(TypeError, match="there are ignore_eos, max_tokens"):
        SamplingOptions().updated(nonsense=1)


def test_options_from_the_models_authors() -> None:
    def advised(**config: object) -> SamplingOptions:
        return SamplingOptions.from_generation_config(config)

    assert advised() == SamplingOptions()
    assert advised(temperature=0.6, top_p=0.9) == SamplingOptions()
    assert advised(do_sample=True, temperature=0.6, top_p=0.9, top_k=20) == SamplingOptions(
        temperature=0.6, top_p=0.9, top_k=20
    )
    assert advised(do_sample=True) == SamplingOptions(temperature=1.0)
    assert advised(repetition_penalty=1.1) == SamplingOptions(repetition_penalty=1.1)


def pieces(text: str, cuts: list[int]) -> Iterator[str]:
    at = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    return (text[a:b] for a, b in itertools.pairwise(at))


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 99)),
)
@settings(max_examples=300, deadline=None)
def test_stop_texts_end_the_text_however_it_is_cut(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    scanner, out = StopScanner(stop), ""
    for piece in pieces(text, cuts):
        shown, hit = scanner.push(piece)
        out += shown
        if hit:
            break
    else:
        hit = False
        out += scanner.flush()
    assert hit == any(s in text for s in stop)
    assert text.startswith(out)
    assert not any(s in out for s in stop)
    if not hit:
        assert out == text


def test_text_that_may_become_a_stop_text_is_held_back() -> None:
    scanner = StopScanner(["</s>"])
    assert scanner.push("a</") == ("a", False)
    assert scanner.push("b<") == ("</b", False)
    assert scanner.push("/s>c") == ("", True)


def test_an_answer_and_its_record() -> None:
    model = FakeModel({"hi": "Hello ☃!"})
    done = chat(model, HI)
    assert done.text == "Hello ☃!"
    assert done.finish_reason == "stop"
    assert model.tokenizer.decode(done.ids) == done.text
    assert 2 not in done.ids
    stats = done.stats
    assert stats.prompt_tokens == len(model.tokenizer.encode_chat(HI))
    assert (stats.reused_tokens, stats.generated_tokens) == (0, len(done.ids))
    assert stats.experts.misses == len(done.ids) + 1
    assert stats.ttft_s > 0
    assert stats.prefill_tok_s > 0
    assert stats.decode_tok_s > 0


def test_steps_spell_the_text() -> None:
    model = FakeModel({"hi": "Hé"})
    steps = list(chat_stream(model, HI))
    assert [s.text for s in steps] == ["H", "", "é", ""]
    assert [s.finish_reason for s in steps] == [None, None, None, "stop"]
    assert steps[-1].token_id == 2


def test_stop_length_and_context() -> None:
    model = FakeModel({"hi": "one two three four"})
    assert chat(model, HI, stop=("o th", "xx")).text == "one tw"
    assert chat(model, HI, stop="two").finish_reason == "stop"
    short = chat(model, HI, max_tokens=4)
    assert (len(short.ids), short.finish_reason) == (4, "length")
    prompt = model.tokenizer.encode_chat(HI)
    tight = FakeModel({"hi": "one two three four"}, context=len(prompt) + 5)
    full = chat(tight, HI)
    assert (len(full.ids), full.finish_reason) == (5, "context")
    on = complete(model, prompt, ignore_eos=True, max_tokens=30)
    assert len(on.ids) == 30


def test_held_text_comes_out_at_the_end() -> None:
    model = FakeModel({"hi": "ab<"})
    assert chat(model, HI, stop=("<x",)).text == "ab<"
    assert chat(model, HI, stop=("<x",), max_tokens=3).text == "ab<"
    torn = FakeModel({"hi": "☃"})
    assert chat(torn, HI, max_tokens=2).text == "\ufffd"


def test_prompts_that_cannot_be_answered() -> None:
    model = FakeModel(context=20)
    with pytest.raises(UsageError, match="the prompt is empty"):
        stream(model, [])
    with pytest.raises(UsageError, match="20 tokens; the context holds 20"):
        stream(model, list(range(3, 23)))


def test_a_kept_prefix_is_not_computed_again() -> None:
    model = FakeModel({"hi": "Hello"})
    session = model.session()
    options = SamplingOptions()
    first = generate(session, model.tokenizer, model.tokenizer.encode_chat(HI), options)
    text = "".join(step.text for step in first)
    talk = [*HI, {"role": "assistant", "content": text}, {"role": "user", "content": "more"}]
    ids = model.tokenizer.encode_chat(talk)
    before = session.computed
    second = generate(session, model.tokenizer, ids, options)
    next(second)
    assert session.computed - before == len(ids) - second.reused_tokens
    assert second.reused_tokens == first.prompt_tokens + len(first.ids)
    assert session.ids[: len(ids)] == ids


def test_reuse_leaves_one_token_to_compute() -> None:
    session = FakeModel().session()
    session.ids = [5, 6, 7]
    assert reuse(session, [5, 6, 7]) == 2
    assert session.ids == [5, 6]
    assert reuse(session, [9]) == 0
    assert session.ids == []


def test_prefill_reports_and_can_be_stopped() -> None:
    model = FakeModel()
    session = model.session()
    seen: list[tuple[int, int]] = []

    def watch(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 128:
            raise InterruptedError

    ids = list(range(3, 203))
    with pytest.raises(InterruptedError):
        next(generate(session, model.tokenizer, ids, SamplingOptions(), on_prefill=watch))
    assert seen == [(64, 200), (128, 200)]
    assert session.ids == ids[:128]


def test_stopping_keeps_what_was_computed() -> None:
    model = FakeModel({"hi": "Hello world"})
    session = model.session()
    generation = generate(
        session, model.tokenizer, model.tokenizer.encode_chat(HI), SamplingOptions()
    )
    for _ in range(3):
        next(generation)
    generation.close()
    assert generation.completion.text == "Hello wo"[: len(generation.text)]
    assert len(session.ids) == generation.prompt_tokens + 2
    assert generation.finish_reason is None
    assert list(generation) == []


def test_complete_adds_what_the_tokenizer_puts_in_front() -> None:
    model = FakeModel()
    generation = stream(model, "ab", max_tokens=2)
    assert isinstance(generation, Generation)
    list(generation)
    assert generation.prompt_tokens == len(model.tokenizer.encode("ab", special=True))


def test_the_models_own_sampling_is_the_default() -> None:
    warm = FakeModel(files=sidecars(do_sample=True, temperature=50.0))
    assert len({complete(warm, "ab", max_tokens=8, seed=n).ids for n in range(3)}) == 3
    cold = FakeModel()
    assert len({complete(cold, "ab", max_tokens=8, seed=n).ids for n in range(3)}) == 1
