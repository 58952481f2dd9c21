"""Chat templates: rendered as transformers does, and kept from doing harm."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections import OrderedDict
from typing import Any

import jinja2
import pytest
from chat_templates import CHATML, LLAMA3, MISTRAL, QWEN3, STRICT_ROLES, TEMPLATES

from moelite.errors import CheckpointError
from moelite.sandbox import LimitError, concat, plain
from moelite.template import (
    ChatTemplate,
    TemplateError,
    find_template,
    merge_system,
    special_tokens,
)

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "Hello <b>"}
TALK = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "Hi! [/INST] {{ 7 }}"},
    {"role": "user", "content": "Ünï ☃ 'quotes' \"double\"\n\nlines"},
]
THOUGHT = [
    USER,
    {"role": "assistant", "content": "Four.", "reasoning_content": "2+2"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFour!"},
    {"role": "user", "content": "and now?"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "now & <here>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TOOL_TALK = [
    {"role": "user", "content": "weather in Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
    },
    {"role": "tool", "content": '{"rain": true}'},
]


def transformers_text(source: str, messages: list[dict[str, Any]], **values: Any) -> str | None:
    """What transformers renders; None where the template refuses the messages."""
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    try:
        rendered, _ = theirs.render_jinja_template(
            [messages], chat_template=source, **TOKENS, **values
        )
    except jinja2.TemplateError:
        return None
    text: str = rendered[0]
    return text


@pytest.mark.parity
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("messages", [[USER], TALK, TALK[1:], THOUGHT, TOOL_TALK])
@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_as_transformers(
    name: str, messages: list[dict[str, Any]], generate: bool
) -> None:
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    want = transformers_text(TEMPLATES[name], messages, add_generation_prompt=generate)
    if want is None:
        with pytest.raises(TemplateError, match=r"roles|content"):
            template.render(messages, add_generation_prompt=generate)
        return
    assert template.render(messages, add_generation_prompt=generate) == want
    assert len(want) > 10


@pytest.mark.parity
@pytest.mark.parametrize(
    "values",
    [
        {"tools": [TOOL]},
        {"enable_thinking": False},
        {"tools": [TOOL, TOOL], "enable_thinking": True},
    ],
)
def test_same_branches_as_transformers(values: dict[str, Any]) -> None:
    for messages in (TALK, TOOL_TALK):
        want = transformers_text(QWEN3, messages, add_generation_prompt=True, **values)
        assert ChatTemplate(QWEN3, TOKENS).render(messages, **values) == want


def test_blocks_are_trimmed_as_in_chat_templates() -> None:
    source = (
        "{% for m in messages %}\n    {%- if true %}\n  {{ m.content }}\n{% endif %}\n{% endfor %}"
    )
    assert ChatTemplate(source).render([USER]) == "  Hello <b>\n"


def test_json_is_not_html_escaped() -> None:
    assert ChatTemplate("{{ messages | tojson }}").render([USER]).endswith('"Hello <b>"}]')
    assert '\n  {\n    "' in ChatTemplate("{{ messages | tojson(indent=2) }}").render([USER])


def test_what_templates_call() -> None:
    source = (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}"
        "{%- if ns.n > 2 -%}{%- break -%}{%- endif -%}{%- generation -%}{{ m.role.upper() }}"
        "{%- endgeneration -%}{%- endfor -%}{{ strftime_now('%Y')|length }}{{ dict(a=1)['a'] }}"
        "{{ ' ' ~ messages|map(attribute='role')|join(',') }}{{ 'x' * 3 }}{{ '%05d' % 7 }}"
        "{{ '{}-{}'.format(1, 'b') }}{{ [1, 2][::-1] }}{{ 'a,b'.split(',')[1] }}"
    )
    assert (
        ChatTemplate(source).render(TALK)
        == "SYSTEMUSER41 system,user,assistant,userxxx000071-b[2, 1]b"
    )


def test_the_template_says_why_it_refuses() -> None:
    with pytest.raises(TemplateError, match="Conversation roles must alternate"):
        ChatTemplate(STRICT_ROLES).render([USER, USER])


def test_a_refused_system_role_moves_into_the_first_question() -> None:
    template = ChatTemplate(STRICT_ROLES)
    with pytest.raises(TemplateError):
        template.render(TALK)
    merged = template.render_chat(TALK)
    assert "user: Be brief.\n\nHello <b>" in merged
    assert "system" not in merged
    assert merge_system([USER]) is None
    with pytest.raises(TemplateError):
        template.render_chat([USER, USER])


BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999)"
    " %}{% endfor %}{% endfor %}{% endfor %}",
    "huge range": "{% for a in range(10**9) %}{% endfor %}",
    "repeated text": "{{ 'a' * 10**9 }}",
    "repeated list": "{{ ([1] * 10**9)|length }}",
    "text made by loops": "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaa"
    "{% endfor %}{% endfor %}",
    "join": "{{ (range(99999)|list)|join('a' * 99999) }}",
    "join method": "{{ ('a' * 99999).join('b' * 99999) }}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}a{% endmacro %}"
    "{{ f(60) }}",
    "doubling with ~": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "doubling with +": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "doubling with set": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}{{ ns.x }}",
    "shared lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "shared dicts": "{% set ns = namespace(x=1) %}{% for i in range(60) %}"
    "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x|tojson }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "percent width": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "format width": "{{ '{:999999999}'.format(1) }}",
    "format argument": "{{ '{:{}}'.format(1, '999999999') }}",
    "format filter": "{{ '%999999999d'|format(1) }}",
    "centred": "{{ 'a'.center(999999999) }}",
    "padded": "{{ 'a'.ljust(999999999) }}",
    "zeros": "{{ 'a'.zfill(999999999) }}",
    "replaced": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace filter": "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "indent": "{{ ('\n' * 99999)|indent('b' * 99999) }}",
    "json indent": "{{ (range(99999)|list)|tojson(indent=99999) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "tabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "sorted forever": "{% for i in range(99999) %}{% set x = range(99999)|sort %}{% endfor %}",
    "namespaces in namespaces": "{% set ns = namespace(x=namespace(y=1)) %}{% for i in range(60) %}"
    "{% set ns.x = namespace(a=ns.x, b=[ns.x, ns.x]) %}{% endfor %}{{ ns.x }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped(name: str) -> None:
    if name == "namespaces in namespaces":
        assert "Namespace" in ChatTemplate(BOMBS[name]).render([USER], time_limit_s=0.5)
        return
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="template"):
            ChatTemplate(BOMBS[name]).render([USER], time_limit_s=0.5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 5
    assert peak < 100 << 20


def test_text_is_refused_before_it_is_joined() -> None:
    assert concat(["a"] * 3) == "aaa"
    with pytest.raises(LimitError, match="too long"):
        concat(iter(["a" * 1_000_000] * 9))


def test_a_long_conversation_is_no_bomb() -> None:
    long = [{"role": "user", "content": "word " * 100_000}] * 4
    assert len(ChatTemplate(CHATML).render(long)) > 2_000_000


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ dict.__class__.__base__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{% include 'x' %}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ 'a'.encode() }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(CheckpointError, match="template"):
        ChatTemplate(source).render([USER])


def test_messages_become_plain_data() -> None:
    class Text(str):
        def system(self) -> str:
            return "called"

    value = plain(OrderedDict(a=Text("x"), b=(1, True, None, 2.5), c=object()))
    assert value == {"a": "x", "b": [1, True, None, 2.5], "c": "<object>"}
    assert type(value) is dict
    assert type(value["a"]) is str
    with pytest.raises(TemplateError):
        ChatTemplate("{{ messages[0].content.system() }}").render(
            [{"role": "user", "content": Text("x")}]
        )


@pytest.mark.parametrize("source", ["{% for %}", "{{ 1 ", "{% nonsense %}", "x" * (2 << 20)])
def test_what_is_no_template_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="template"):
        ChatTemplate(source)


def test_where_a_template_is_found() -> None:
    config = b'{"chat_template": "in config", "bos_token": {"content": "<s>"}, "eos_token": "</s>"}'
    two = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    many = json.dumps({"chat_template": two}).encode()
    assert find_template({}) is None
    assert find_template({"tokenizer_config.json": config}) == "in config"
    assert find_template({"tokenizer_config.json": many}) == "D"
    both = {"tokenizer_config.json": config, "chat_template.jinja": "in file ü".encode()}
    assert find_template(both) == "in file ü"
    assert special_tokens({"tokenizer_config.json": config}) == TOKENS
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        find_template({"tokenizer_config.json": b"{"})
    with pytest.raises(CheckpointError, match="UTF-8"):
        find_template({"chat_template.jinja": b"\xff"})


def test_the_special_tokens_reach_the_template() -> None:
    assert ChatTemplate(LLAMA3, TOKENS).render([USER]).startswith("<s><|start_header_id|>user")
    assert ChatTemplate(MISTRAL, TOKENS).render([USER]) == "<s>[INST] Hello <b> [/INST]"
