"""Reading config.json, and the rotary frequencies that come from it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moelite.arch import Rope
from moelite.config import HFConfig
from moelite.errors import CheckpointError, UnsupportedError
from moelite.rope import read_rope


def test_values_are_read_under_any_of_their_names() -> None:
    hf = HFConfig({"b": 3, "x": 1, "f": True, "t": "word", "l": [1, 2]})
    assert hf.integer("a", "b") == 3
    assert hf.number("x", low=0, high=2) == 1.0
    assert isinstance(hf.number("x", low=0, high=2), float)
    assert hf.flag("f") is True
    assert hf.text("t") == "word"
    assert hf.items("l", int) == (1, 2)
    hf.finish()


def test_null_is_absent() -> None:
    hf = HFConfig({"a": None, "never_asked": None})
    assert hf.integer("a", default=7) == 7
    assert not hf.has("a")
    assert hf.items("a", int) is None
    assert hf.nested("a") is None
    hf.must_be("a", False)
    with pytest.raises(CheckpointError, match="does not say a or b,"):
        hf.integer("a", "b")
    hf.finish()


def test_two_names_must_agree() -> None:
    assert HFConfig({"a": 2, "b": 2}).integer("a", "b") == 2
    with pytest.raises(CheckpointError, match="a = 2, b = 3"):
        HFConfig({"a": 2, "b": 3}).integer("a", "b")


@pytest.mark.parametrize("value", ["3", 3.0, True, 0, 11, [3]])
def test_integers_are_integers_in_range(value: object) -> None:
    with pytest.raises(CheckpointError, match="an integer from 1 to 10"):
        HFConfig({"a": value}).integer("a", high=10)
    assert HFConfig({"a": 10}).integer("a", high=10) == 10
    assert HFConfig({"a": 1}).integer("a", high=10) == 1


@pytest.mark.parametrize("value", ["3", True, -0.1, 2.1, math.nan, math.inf, 10**400, [1.0]])
def test_numbers_are_finite_and_in_range(value: object) -> None:
    with pytest.raises(CheckpointError, match="a number from 0 to 2"):
        HFConfig({"a": value}).number("a", low=0, high=2)


@pytest.mark.parametrize("value", [{"a": 1}, [True], ["x"], [1.0], list(range(5000))])
def test_lists_hold_one_kind(value: object) -> None:
    with pytest.raises(CheckpointError, match="a list of"):
        HFConfig({"a": value}).items("a", int)


def test_must_be_tells_true_from_one() -> None:
    hf = HFConfig({"a": 1, "b": 1.0})
    hf.must_be("a", 1.0)
    hf.must_be("b", 1)
    hf.must_be("absent", 5)
    with pytest.raises(
        UnsupportedError, match=r"a = 1 in config\.json is not implemented; only True"
    ):
        hf.must_be("a", True)


def test_unread_keys_are_refused_with_their_names() -> None:
    with pytest.raises(UnsupportedError, match="'sinks', 'temperature'"):
        HFConfig({"temperature": 2, "sinks": 1, "dtype": "x", "image_token_id": 3}).finish()
    with pytest.raises(UnsupportedError) as caught:
        HFConfig({"quantization_config": {}}).finish()
    assert "bf16" in caught.value.fix


def test_nested_objects_keep_their_own_account() -> None:
    outer = HFConfig({"inner": {"a": 1, "b": 2}})
    inner = outer.nested("inner")
    assert inner is not None
    assert inner.integer("a") == 1
    outer.finish()
    with pytest.raises(UnsupportedError, match=r"inner in config\.json sets 'b'"):
        inner.finish()


def test_messages_stay_short_and_escaped() -> None:
    with pytest.raises(CheckpointError) as caught:
        HFConfig({"a": "\x1b[2J" + "x" * 10_000}).integer("a")
    assert len(caught.value.message) < 200
    assert "\x1b" not in caught.value.message


def rope(**raw: Any) -> Rope:
    hf = HFConfig(raw)
    found = read_rope(hf, head_dim=8, max_positions=1024)
    hf.finish()
    return found


def test_plain_frequencies() -> None:
    found = rope(rope_theta=10000)
    assert found.inv_freq == pytest.approx((1.0, 0.1, 0.01, 0.001), rel=1e-15)
    assert found.scale == 1.0
    assert found.style == "half"


def test_old_and_new_spelling() -> None:
    new = rope(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    assert new.inv_freq == pytest.approx((0.25, 0.025, 0.0025, 0.00025), rel=1e-15)
    assert rope(rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0}) == new
    assert rope(rope_theta=1e4, rope_scaling={"rope_type": "linear", "factor": 4}) == new
    assert rope(rope_theta=1e4, rope_parameters={"rope_type": "linear", "factor": 4}) == new


def test_contradictions_are_refused() -> None:
    with pytest.raises(CheckpointError, match="contradicts itself: rope_theta = 5"):
        rope(rope_theta=5.0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with pytest.raises(CheckpointError, match="both rope_parameters and rope_scaling"):
        rope(rope_theta=5.0, rope_parameters={"factor": 1.0}, rope_scaling={"factor": 2.0})
    with pytest.raises(CheckpointError, match="rope_theta"):
        rope(rope_parameters={"rope_type": "default"})


def test_yarn_by_hand() -> None:
    """theta 10000, 8 dimensions, 1024 positions of old, 32 and 1 turns: dimension
    8 ln(1024 / 64 pi) / 2 ln 10000 = 0.71 -> 0 and 8 ln(1024 / 2 pi) / 2 ln 10000 = 2.21 -> 3,
    so the ramp over i = 0..3 is 0, 1/3, 2/3, 1."""
    found = rope(rope_theta=1e4, rope_scaling={"type": "yarn", "factor": 4.0})
    want = (1.0, 0.1 * (2 / 3 + 1 / 12), 0.01 * (1 / 3 + 1 / 6), 0.001 / 4)
    assert found.inv_freq == pytest.approx(want, rel=1e-12)
    assert found.scale == pytest.approx(0.1 * math.log(4) + 1, rel=1e-15)


def test_yarn_attention_factor() -> None:
    yarn = {"type": "yarn", "factor": 4.0}
    given = rope(rope_theta=1e4, rope_scaling={**yarn, "attention_factor": 1.25})
    assert given.scale == 1.25
    ratio = rope(rope_theta=1e4, rope_scaling={**yarn, "mscale": 2.0, "mscale_all_dim": 1.0})
    assert ratio.scale == pytest.approx(
        (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1), rel=1e-15
    )


def test_llama3_by_hand() -> None:
    """Turns within 64 positions: 64 f / 2 pi = 10.2, 1.02, 0.1, 0.01; kept from 4 on, divided by
    8 up to 1, blended between: 1.0186 keeps 0.0186 / 3."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    keep = (6.4 / (2 * math.pi) - 1) / 3
    want = (1.0, 0.1 * keep + 0.0125 * (1 - keep), 0.01 / 8, 0.001 / 8)
    assert rope(rope_theta=1e4, rope_scaling=scaling).inv_freq == pytest.approx(want, rel=1e-12)
    with pytest.raises(CheckpointError, match="high_freq_factor"):
        rope(rope_theta=1e4, rope_scaling={**scaling, "high_freq_factor": 1.0})
    with pytest.raises(CheckpointError, match="original_max_position_embeddings"):
        rope(
            rope_theta=1e4,
            rope_scaling={**scaling, "original_max_position_embeddings": None},
        )


def test_yarn_extremes_stay_finite() -> None:
    for original in (1, 1 << 31):
        for theta in (1.0001, 1e15):
            found = rope(
                rope_theta=theta,
                rope_scaling={
                    "type": "yarn",
                    "factor": 1e6,
                    "beta_fast": 1e-3,
                    "beta_slow": 1e6,
                    "original_max_position_embeddings": original,
                },
            )
            assert all(math.isfinite(f) for f in found.inv_freq)
