"""Recipes: what they say, what they refuse, and stores and models that mix formats by them."""

from __future__ import annotations

import argparse
import json
import shutil
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import numpy as np
import pytest
from reference import Reference
from tiny_checkpoint import MIXTRAL, QWEN3_MOE, write_checkpoint

import moelite
from moelite.arch import Arch
from moelite.convert import quantize
from moelite.errors import StoreError, UsageError
from moelite.models import build
from moelite.quant import FORMATS
from moelite.quant.record import unpack_record
from moelite.recipe import Recipe, Rule, choose, load_recipe, numbers, parse, show_numbers
from moelite.store import ExpertKey, Store
from moelite.storefile import MANIFEST, describe, file_json, read_manifest, spans
from moelite.tensorfile import read_header

ROOT = Path(__file__).resolve().parent.parent
MIX = """
experts = "int4"
dense = "int8"

[[rule]]
part = "down"
format = "int8"

[[rule]]
part = "experts"
layers = "1-2"
experts = "0,3"
format = "bf16"

[[rule]]
part = "attention"
layers = "2"
format = "f32"
"""
IDS = [3, 17, 42, 99, 0, 56, 3, 3, 81, 12, 7]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "mix.toml"
    path.write_text(MIX)
    return path


def test_later_rules_win(recipe: Path) -> None:
    found = load_recipe(str(recipe))
    assert found.expert(0, 0) == ("int4", "int8")
    assert found.expert(1, 0) == ("bf16", "bf16")
    assert found.expert(1, 1) == ("int4", "int8")
    assert found.matrix("attention", 2) == "f32"
    assert found.matrix("attention", 1) == found.matrix("embeddings", None) == "int8"
    assert parse(found.as_json(), "again") == found


def test_the_matrices_of_attention_have_names(tmp_path: Path) -> None:
    """A rule of one of them wins over an earlier one of attention, and is written down."""
    rules = [{"part": "attention", "format": "int4"}, {"part": "v", "format": "bf16"}]
    write_checkpoint(tmp_path / "model", MIXTRAL)
    asked = parse({"experts": "int4", "rule": [*rules, {"part": "k", "format": "f32"}]}, "parts")
    quantize(tmp_path / "model", tmp_path / "store", recipe=asked, ram=None)
    tensors = read_manifest(tmp_path / "store" / MANIFEST).tensors
    name = "model.layers.1.self_attn.{}_proj.weight"
    formats = {p: tensors[name.format(p)].format for p in "qkvo"}
    assert tensors["lm_head.weight"].format == "int8"
    assert formats == {"q": "int4", "k": "f32", "v": "bf16", "o": "int4"}
    assert parse(asked.as_json(), "again") == asked


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("experts = 'int5'", "int5"),
        ("dense = 'int5'", "int5"),
        ("expert = 'int4'", "expert"),
        ("[[rule]]\npart = 'down'", "format"),
        ("[[rule]]\npart = 'router'\nformat = 'int4'", "router"),
        ("[[rule]]\npart = 'head'\nformat = 'int4'\nexperts = '1'", "experts"),
        ("[[rule]]\npart = 'down'\nformat = 'int4'\nlayers = '3-1'", "3-1"),
        ("[[rule]]\npart = 'down'\nformat = 'int4'\nlayers = 'all'", "all"),
        ("rule = 'down'", "rule"),
        ("experts = ", "TOML"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        load_recipe(str(path))


def test_options_and_a_recipe_exclude_each_other(recipe: Path) -> None:
    assert choose(None, None, None) == Recipe()
    assert choose(None, "int8", None) == Recipe(experts="int8")
    assert choose("int8", None, None) == Recipe(experts="int8")
    assert choose(str(recipe), None, None, "int4").low == "int4"
    with pytest.raises(UsageError, match="recipe"):
        choose("int8", "int4", None)
    with pytest.raises(UsageError, match="no recipe"):
        load_recipe("nowhere")


def test_numbers() -> None:
    assert numbers("0-2,7", "x") == {0, 1, 2, 7}
    assert show_numbers(frozenset({7, 1, 0, 2})) == "0-2,7"


def test_a_rule_beyond_the_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", MIXTRAL)
    for rule in (
        Rule(part="down", format="int8", layers=frozenset({3})),
        Rule(part="down", format="int8", experts=frozenset({4})),
    ):
        with pytest.raises(UsageError, match="a rule names"):
            moelite.quantize(tmp_path / "model", tmp_path / "store", recipe=Recipe(rules=(rule,)))


@pytest.fixture(scope="module", params=[MIXTRAL, QWEN3_MOE], ids=lambda c: c["model_type"])
def mixed(request: pytest.FixtureRequest, recipe: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    write_checkpoint(folder / "model", request.param)
    (folder / "model" / "tokenizer.json").unlink()
    moelite.quantize(folder / "model", folder / "store", recipe=str(recipe), low="int4")
    return folder / "store"


def test_a_store_of_tiers(mixed: Path) -> None:
    store = Store.open(mixed)
    entry = store.layers[2]
    assert [tier.formats for tier in entry.tiers] == [("bf16", "bf16"), ("int4", "int8")]
    assert entry.tier_of[:4] == (0, 1, 1, 0)
    assert min(e.slot_bytes for e in store.layers.values()) < entry.slot_bytes
    assert entry.slot_bytes == max(tier.record_bytes for tier in entry.tiers)
    assert sorted(store.expert_format.split(" + ")) == ["bf16", "int4", "int8"]
    assert moelite.footprint(mixed, ram="1GiB").store_bytes == pytest.approx(
        sum(f.bytes for n, f in store.manifest.files.items() if n.endswith("safetensors")),
        rel=0.2,
    )
    store.close()


def test_the_same_logits_at_every_budget(mixed: Path) -> None:
    """Slots of two sizes, from the least budget on; and as float64 computes the store's numbers."""
    whole = moelite.footprint(mixed, ram="4GiB", context=64)
    assert len(whole.slots.floating) == 2
    least, span = whole.minimum_bytes, whole.used_bytes - whole.minimum_bytes
    runs = []
    for budget in (least, least + span // 4, least + span // 2, whole.used_bytes):
        with moelite.load(mixed, ram=budget, context=64) as model:
            session = model.session()
            runs.append(np.stack([session.advance([i]).copy() for i in IDS]))
            assert model.stats().low == 0
            session = model.session()
            np.testing.assert_array_equal(session.append(IDS), runs[-1])
    for run in runs[1:]:
        np.testing.assert_array_equal(run, runs[0])
    assert whole.experts_resident == whole.experts_total


def stored_weights(path: Path, arch: Arch) -> dict[str, np.ndarray]:
    """The numbers that a store holds, under the checkpoint's names."""
    store, found = Store.open(path), {}
    for key in store.dense_keys():
        entry, packed = store.dense_entry(key), store.read_dense(key)
        plain = len(entry.shape) == 1
        found[key] = (
            packed.view(np.float32) if plain else FORMATS[entry.format].unpack(packed, *entry.shape)
        )
    for layer, entry in store.layers.items():
        record = np.zeros(entry.slot_bytes, np.uint8)
        for expert in range(entry.experts):
            store.read_record(ExpertKey(layer, expert), record)
            parts = unpack_record(entry.layout_of(expert), record)
            names = arch.layers[layer].mlp.experts.matrices
            for part, weight in zip(names, parts, strict=True):
                found[part.weight.at(expert).name] = weight
    store.close()
    return found


def test_mixed_formats_give_the_logits_of_their_numbers(tmp_path: Path, recipe: Path) -> None:
    """As float64 computes them: every tier, row and offset is the right one."""
    write_checkpoint(tmp_path / "model", MIXTRAL)
    (tmp_path / "model" / "tokenizer.json").unlink()
    exact = Recipe(
        experts="f32",
        dense="f32",
        rules=(
            Rule(part="experts", format="bf16", experts=frozenset({1, 2})),
            Rule(part="down", format="bf16", layers=frozenset({1})),
            Rule(part="gate_up", format="int8", layers=frozenset({2}), experts=frozenset({3})),
        ),
    )
    moelite.quantize(tmp_path / "model", tmp_path / "mix", recipe=exact)
    arch = build(MIXTRAL)
    want = Reference(arch, stored_weights(tmp_path / "mix", arch)).forward(IDS)
    with moelite.load(tmp_path / "mix", ram="1GiB", context=64, kv="f32") as model:
        found = model.forward(IDS)
    np.testing.assert_allclose(found, want, rtol=3e-3, atol=3e-3 * np.abs(want).max())


def test_low_plane_answers_at_once_and_is_counted(mixed: Path) -> None:
    least = moelite.footprint(mixed, ram="4GiB", context=64, low=True).minimum_bytes
    with moelite.load(mixed, ram=least, context=64, on_miss="low") as model:
        session = model.session()
        for i in IDS * 3:
            assert np.isfinite(session.advance([i])).all()
        stats = model.stats()
    assert stats.low == stats.misses > 0
    assert stats.wait_s == 0
    plan = moelite.footprint(mixed, ram=least, context=64, low=True)
    assert {part.name: part.bytes for part in plan.parts}["low plane"] == sum(
        entry.low_bytes for entry in Store.open(mixed).layers.values()
    )


def test_low_with_all_in_memory_gives_the_same_tokens(mixed: Path) -> None:
    with moelite.load(mixed, ram="1GiB", context=64) as model:
        want = model.forward(IDS)
    with moelite.load(mixed, ram="1GiB", context=64, on_miss="low") as model:
        model.forward(IDS * 4)  # a chunk waits, and leaves its experts in memory
        session = model.session()
        found = np.stack([session.advance([i]).copy() for i in IDS])
        assert model.stats().low == 0
    np.testing.assert_array_equal(found, want)


def test_a_store_without_a_low_plane_says_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", MIXTRAL)
    moelite.quantize(tmp_path / "model", tmp_path / "store")
    with pytest.raises(UsageError, match="no low plane"):
        moelite.load(tmp_path / "store", on_miss="low")
    with pytest.raises(UsageError, match="no low plane"):
        moelite.footprint(tmp_path / "store", low=True)


def test_the_low_plane_is_measured_against_waiting(mixed: Path) -> None:
    loader = SourceFileLoader("low_plane", str(ROOT / "scripts" / "low-plane"))
    script = module_from_spec(spec_from_loader("low_plane", loader))
    loader.exec_module(script)
    whole = script.budget(mixed, 1.0, context=len(IDS), low=False)
    assert moelite.footprint(mixed, ram=whole, context=len(IDS)).experts_resident == 12

    def least(store: Path, share: float, *, context: int, low: bool) -> int:
        plan = moelite.footprint(store, ram="1GiB", context=context, low=low)
        return plan.used_bytes if share == 1 else plan.minimum_bytes

    script.budget = least  # of so small a model a share of the experts is less than a buffer
    args = argparse.Namespace(shares=[0.2], skip=4, reads="auto")
    reference, wait, low = script.measure(mixed, IDS, args)
    assert reference["resident"] == 1
    assert wait["resident"] < 0.7
    assert (reference["kld_mean"], wait["kld_mean"], wait["low"]) == (0, 0, 0)
    assert low["low"] > 0
    assert low["kld_mean"] > 0
    assert "KL" in script.show(low, reference["tok_s"])


def test_damage_is_named_by_tier_and_plane(mixed: Path) -> None:
    store = Store.open(mixed)
    entry, name = store.layers[2], "experts-00002.safetensors"
    data = bytearray((mixed / name).read_bytes())
    header = store._open(name)[1]
    spots = {
        f"expert {entry.tier_of.index(1)} ": header.tensors["experts.1"].offset + 5,
        "expert 0, low plane": header.tensors["experts.low"].offset + 5,
    }
    store.close()
    for words, at in spots.items():
        data[at] ^= 1
        (mixed / name).write_bytes(data)
        with pytest.raises(StoreError, match=words):
            Store.open(mixed).verify_file(name)
        data[at] ^= 1
        (mixed / name).write_bytes(data)
    record = np.zeros(entry.slot_bytes, np.uint8)
    for expert in range(entry.experts):
        Store.open(mixed).read_record(ExpertKey(2, expert), record, verify=True)


QMOE = Recipe(
    experts="qmoe-ls",
    dense="int8",
    rules=(Rule(part="down", format="int4", layers=frozenset({1})),),
    low="qmoe",
)


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose records are as large as its weights make them."""
    folder = tmp_path_factory.mktemp("sized")
    write_checkpoint(folder / "model", MIXTRAL)
    (folder / "model" / "tokenizer.json").unlink()
    report = moelite.quantize(folder / "model", folder / "store", recipe=QMOE)
    rows = {(row.name, row.format): row.bytes_after for row in report.classes}
    entries = Store.open(folder / "store").layers.values()
    routed = sum(size for (name, _), size in rows.items() if name == "routed experts")
    assert routed == sum(entry.record_bytes for entry in entries)
    assert rows["low plane", "qmoe"] == sum(entry.low_bytes for entry in entries)
    return folder / "store"


def test_records_whose_size_the_weights_decide(sized: Path) -> None:
    arch = build(MIXTRAL)
    want = Reference(arch, stored_weights(sized, arch)).forward(IDS)
    with moelite.load(sized, ram="1GiB", context=64, kv="f32") as model:
        found = model.forward(IDS)
    # activations of 8 bits and few of them: an offset gone wrong is far beyond
    np.testing.assert_allclose(found, want, rtol=3e-2, atol=3e-2 * np.abs(want).max())
    least = moelite.footprint(sized, ram="1GiB", context=64, kv="f32").minimum_bytes
    with moelite.load(sized, ram=least, context=64, kv="f32") as model:
        np.testing.assert_array_equal(model.forward(IDS), found)
    assert not list(sized.glob("*.part"))


def test_an_interrupted_run_of_such_a_store_gives_the_same_bytes(
    sized: Path, tmp_path: Path
) -> None:
    class Stop:
        calls = 0

        def __call__(self, done: int, total: int, note: str) -> None:
            self.calls += note == "layer 2"
            if self.calls == 2:
                raise KeyboardInterrupt

    model = sized.parent / "model"
    with pytest.raises(KeyboardInterrupt):
        moelite.quantize(model, tmp_path / "store", recipe=QMOE, progress=Stop())
    report = moelite.quantize(model, tmp_path / "store", recipe=QMOE)
    assert report.resumed
    for path in sized.iterdir():
        assert path.read_bytes() == (tmp_path / "store" / path.name).read_bytes(), path.name


def test_a_record_that_leads_a_kernel_astray_is_refused(sized: Path, tmp_path: Path) -> None:
    """Also one whose checksum is right: the file may come from anyone."""
    shutil.copytree(sized, tmp_path / "store")
    path = tmp_path / "store" / "experts-00000.safetensors"
    store = Store.open(tmp_path / "store")
    begin = store._open(path.name)[1].tensors["experts"].offset
    store.close()
    data = bytearray(path.read_bytes())
    data[begin : begin + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    manifest = json.loads((tmp_path / "store" / "moelite.json").read_text())
    found = describe(path, list(spans(read_header(path, StoreError))))
    manifest["files"][path.name] = file_json(found)
    (tmp_path / "store" / "moelite.json").write_text(json.dumps(manifest))
    record = np.zeros(store.layers[0].slot_bytes, np.uint8)
    with pytest.raises(StoreError, match="expert 0"):
        Store.open(tmp_path / "store").load_record(ExpertKey(0, 0), record)
