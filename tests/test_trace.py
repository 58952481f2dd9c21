"""Recorded routing: the file and its checks, policies against an oracle, `moelite replay`."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelite.cache import LayerLRU
from moelite.cache import replay as replay_lookups
from moelite.cache import trace as module
from moelite.cache.policy import LayerMIN, count, curve, kept, overlap
from moelite.cache.trace import Trace, check_routes, read_trace, write_trace
from moelite.cli import main
from moelite.errors import UsageError

Layer = list[list[int]]
LINE = '{"tok": 0, "layers": [[0, 3], [2, 1]]}'


def random_routes(seed: int, tokens: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    """Distinct experts for every token and layer, low ids more often: [tokens, layers, top_k]."""
    rng = np.random.default_rng(seed)
    p = np.arange(experts, 0, -1) / np.arange(experts, 0, -1).sum()
    rows = [rng.choice(experts, top_k, replace=False, p=p) for _ in range(tokens * layers)]
    return np.array(rows, np.int32).reshape(tokens, layers, top_k)


def a_trace(tokens: int = 40, layers: int = 3, experts: int = 8, top_k: int = 2) -> Trace:
    routes = random_routes(1, tokens, layers, experts, top_k)
    return Trace(routes=routes, experts=experts, name="t.jsonl")


@st.composite
def lookups(draw: st.DrawFn) -> tuple[Layer, int]:
    """(up to 8 lookups of 1 to 3 of 5 experts, how many stay)."""
    one = st.permutations(range(5)).flatmap(lambda p: st.integers(1, 3).map(lambda k: p[:k]))
    return draw(st.lists(one, min_size=1, max_size=8)), draw(st.integers(0, 5))


def most_hits(layer: Layer, capacity: int) -> int:
    """The oracle: every choice of what stays after every lookup is tried."""
    best = {frozenset[int](): 0}
    for experts in layer:
        after: dict[frozenset[int], int] = {}
        for resident, hits in best.items():
            now = hits + len(resident.intersection(experts))
            there = sorted(resident.union(experts))
            for size in range(min(capacity, len(there)) + 1):
                for stay in map(frozenset, itertools.combinations(there, size)):
                    after[stay] = max(after.get(stay, 0), now)
        best = after
    return max(best.values())


@given(lookups())
@settings(deadline=None, max_examples=150)
def test_no_choice_of_what_stays_beats_belady(case: tuple[Layer, int]) -> None:
    layer, capacity = case
    policy, lru = LayerMIN(capacity, layer), LayerLRU(capacity)
    resident: set[int] = set()
    hits = 0
    for experts in layer:
        found = policy.lookup(experts)
        assert found.hits == [e for e in experts if e in resident]
        assert found.misses == [e for e in experts if e not in resident]
        resident = resident.union(experts).difference(found.evicted)
        assert len(resident) <= capacity
        hits += len(found.hits)
    assert hits == most_hits(layer, capacity)
    assert hits >= sum(len(lru.lookup(experts).hits) for experts in layer)


def test_lru_is_the_engines() -> None:
    trace, quotas = a_trace(), [1, 4, 3]
    order = [(i, ids) for row in trace.routes.tolist() for i, ids in enumerate(row)]
    found = count(trace, quotas)
    assert (found.hits, found.misses) == replay_lookups(order, dict(enumerate(quotas)))
    assert 0 < found.hits < found.misses + found.hits == trace.routes.size


def test_a_count_by_hand() -> None:
    routes = np.array([[[0, 1]], [[1, 2]], [[0, 1]], [[1, 3]]], np.int32)
    trace = Trace(routes=routes, experts=4)
    assert count(trace, [2]).hits == 3  # 1, then 1 again, then 1: lru never keeps 0 long enough
    assert count(trace, [2], policy="belady").hits == 4  # keeps 0 and 1 past the second token
    assert count(trace, [2], skip=1).hits == 3
    assert count(trace, [2], skip=2) == count(trace, [2], skip=2, policy="lru")
    assert count(trace, [2], skip=3).hit_rate == 0.5
    assert overlap(trace) == 3 / 6


def test_uneven_quotas_are_each_layers_own() -> None:
    trace = a_trace()
    quotas = [2, 5, 8]
    alone = [
        count(Trace(routes=trace.routes[:, i : i + 1], experts=8), [q])
        for i, q in enumerate(quotas)
    ]
    assert count(trace, quotas).hits == sum(found.hits for found in alone)


def test_the_curve_rises_to_every_expert_read_once() -> None:
    trace = a_trace(200)
    for policy in ("lru", "belady"):
        rates = curve(trace, [0.125, 0.25, 0.5, 0.75, 1.0], policy=policy)
        assert rates == sorted(rates)
        assert rates[-1] == 1 - trace.layers * 8 / trace.routes.size
    assert curve(trace, [0.25], skip=20) == [count(trace, [2, 2, 2], skip=20).hit_rate]


def test_a_fraction_is_rounded_to_experts() -> None:
    assert [kept(f, 6) for f in (0.125, 0.25, 0.5, 0.75, 1)] == [1, 2, 3, 5, 6]
    assert kept(0.01, 8) == 1
    for wrong in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(UsageError, match=r"is not in 0\.\.1"):
            kept(wrong, 8)


def test_a_trace_comes_back_as_written(tmp_path: Path) -> None:
    trace, file = a_trace(), tmp_path / "t.jsonl"
    write_trace(file, trace.routes)
    assert file.read_text().splitlines()[0] == json.dumps(
        {"tok": 0, "layers": trace.routes[0].tolist()}
    )
    found = read_trace(file)
    np.testing.assert_array_equal(found.routes, trace.routes)
    assert (found.tokens, found.layers, found.top_k, found.experts) == (40, 3, 2, 8)
    assert found.name == str(file)
    assert read_trace(file, experts=60).experts == 60
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text("old")
    with pytest.raises(AttributeError):
        write_trace(file, ["no array"])
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("t.jsonl", "old")]
    with pytest.raises(UsageError, match="cannot write"):
        write_trace(tmp_path / "none" / "t.jsonl", a_trace().routes)


def test_tokens_may_count_from_any_number(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(LINE.replace("0,", "7,", 1) + "\n" + LINE.replace("0,", "8,", 1))
    assert read_trace(file).tokens == 2


DAMAGE = {
    "": "is empty",
    "\n": "line 1: it is not JSON",
    "[1]": 'line 1: it is not an object with "tok" and "layers"',
    '{"tok": 0}': "not an object with",
    '{"tok": 0, "layers": [[1]], "x": 1}': "and nothing else",
    '{"tok": true, "layers": [[1]]}': "tok is True",
    '{"tok": -1, "layers": [[1]]}': "tok is -1",
    '{"tok": 0, "layers": []}': "layers is [], not a list of layers",
    '{"tok": 0, "layers": [[]]}': "MoE layer 0 is [], not a list of experts",
    '{"tok": 0, "layers": [[1], 2]}': "MoE layer 1 is 2",
    '{"tok": 0, "layers": [[1.0]]}': "MoE layer 0: expert 1.0 is not a whole number",
    '{"tok": 0, "layers": [["1"]]}': "expert '1' is not a whole number",
    '{"tok": 0, "layers": [[NaN]]}': "expert nan is not a whole number",
    '{"tok": 0, "layers": [[-1]]}': "expert -1 is not in 0..65535",
    '{"tok": 0, "layers": [[65536]]}': "expert 65536 is not in 0..65535",
    f'{{"tok": 0, "layers": [[{"9" * 4000}]]}}': "... is not in 0..65535",
    f'{{"tok": 0, "layers": [[{"9" * 5000}]]}}': "it is not JSON",
    '{"tok": 0, "layers": [[1, 2], [1]]}': "MoE layer 1 has 1 experts, the first has 2",
    '{"tok": 0, "layers": [[1, 2, 1]]}': "names an expert twice",
    "[" * 100_000: "line 1: ",
    LINE + "\n" + LINE: "line 2: tok is 0, not 1: tokens are missing",
    LINE + "\n\n": "line 2: it is not JSON",
    LINE
    + '\n{"tok": 1, "layers": [[1, 2]]}': "line 2: 1 MoE layers with 2 experts each, but 2 MoE",
    LINE + '\n{"tok": 1, "layers": [[1], [2]]}': "line 2: 2 MoE layers with 1 experts each, but 2",
    LINE + '\n{"tok": 1, "lay': "line 2: it is not JSON",
}


@pytest.mark.parametrize("text", DAMAGE, ids=lambda text: text[:30])
def test_what_is_no_trace_is_refused_by_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(text)
    with pytest.raises(UsageError, match=re.escape(DAMAGE[text])) as refused:
        read_trace(file)
    assert str(file) in refused.value.message
    assert len(refused.value.message) < 300 + len(str(file))


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t.jsonl"
    with pytest.raises(UsageError, match="cannot read"):
        read_trace(file)
    with pytest.raises(UsageError, match="cannot read"):
        read_trace(tmp_path)
    file.write_bytes(b"\xff\xfe" + LINE.encode("utf-16-le"))
    with pytest.raises(UsageError, match="line 1: it is not JSON"):
        read_trace(file)
    file.write_text(LINE)
    with pytest.raises(UsageError, match=r"expert 3 is not in 0\.\.2"):
        read_trace(file, experts=3)
    with pytest.raises(UsageError, match="0 experts a layer"):
        read_trace(file, experts=0)
    monkeypatch.setattr(module, "MAX_LINE_BYTES", len(LINE) - 1)
    with pytest.raises(UsageError, match="line 1: longer than"):
        read_trace(file)
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(module, "MAX_IDS", 3)
    with pytest.raises(UsageError, match="line 1: more than 3 expert ids"):
        read_trace(file)


@pytest.mark.parametrize(
    ("routes", "says"),
    [
        (np.zeros((2, 3, 2), np.int64), "routes are int64"),
        (np.zeros((3, 2), np.int32), r"int32 \[3, 2\]"),
        (np.zeros((0, 3, 2), np.int32), r"int32 \[0, 3, 2\]"),
        (np.zeros((1, 2, 2), np.int32), "2 MoE layers with 2 experts each; this model has 3"),
        (np.full((1, 3, 2), 8, np.int32), r"experts 8\.\.8; this model's layers have 0\.\.7"),
        (np.full((1, 3, 2), -1, np.int32), r"experts -1\.\.-1"),
        (np.full((1, 3, 2), 4, np.int32), "position 0 name an expert of MoE layer 0 twice"),
    ],
)
def test_routes_have_to_fit_the_model(routes: np.ndarray, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_routes(routes, layers=3, experts=8, top_k=2)
    check_routes(a_trace().routes, layers=3, experts=8, top_k=2)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "t.jsonl"
    write_trace(path, a_trace().routes)
    return str(path)


def test_replay_json(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.exit_code(["replay", file, "--cache", "0.25, 3,50%", "--skip", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["skipped"], found["layers"], found["top_k"]) == (40, 5, 3, 2)
    assert (found["experts"], found["experts_assumed"]) == (8, True)
    rows = [(r["cache"], r["experts_kept"], r["policy"]) for r in found["results"]]
    sizes = [("0.25", 2), ("3", 3), ("50%", 4)]
    assert rows == [(*size, policy) for policy in ("lru", "belady") for size in sizes]
    for row in found["results"]:
        want = count(a_trace(), [row["experts_kept"]] * 3, policy=row["policy"], skip=5)
        assert (row["hits"], row["misses"]) == (want.hits, want.misses)
        assert row["hit_rate"] == want.hit_rate


def test_replay_table_says_what_it_assumes(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.exit_code(["replay", file, "--cache", "0.5", "--policy", "lru"]) == 0
    out = capsys.readouterr().out
    assert "4 of 8" in out
    assert f"{100 * count(a_trace(), [4] * 3).hit_rate:.1f} %" in out
    assert "belady" not in out
    assert "8 experts a layer are assumed" in out
    assert main.exit_code(["replay", file, "--cache", "0.5", "--experts", "10"]) == 0
    out = capsys.readouterr().out
    assert "5 of 10" in out
    assert "assumed" not in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cache", "9"], "a cache of 9 experts is not in 1..8"),
        (["--cache", "0"], "a cache of 0 experts"),
        (["--cache", "1.5"], "1.5 of the experts is not in 0..1"),
        (["--cache", "150%"], "1.5 of the experts"),
        (["--cache", "half"], "'half' is not a cache size"),
        (["--cache", ""], "'' is not a cache size"),
        (["--policy", "fifo"], "unknown policy 'fifo'"),
        (["--skip", "40"], "--skip 40 leaves nothing of 40 tokens"),
        (["--skip", "-1"], "--skip -1"),
        (["--experts", "4"], "line 1: MoE layer"),
    ],
)
def test_replay_refuses(
    file: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.exit_code(["replay", file, *arguments]) == 2
    assert says in capsys.readouterr().err
