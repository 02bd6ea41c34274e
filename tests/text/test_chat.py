"""Chat templates: equal to jinja2 without our limits; hostile ones end soon; message texts stay text."""

from __future__ import annotations

import json
import sys
import threading
import time
import tracemalloc

import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from vocabularies_trained import add_tokens, byte_level, sentencepiece

from pyinfer.errors import FormatError, InputError, MissingExtraError, PyInferError, UnsupportedError
from pyinfer.text import chat
from pyinfer.text.chat import CHATML, ChatTemplate, encode_chat
from pyinfer.text.tokenizer import Tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hi <b>&amp;</b> é \n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
    {"role": "user", "content": "And?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"n": [1, 2.5, None, True, 'q"é']}}}]
TEMPLATES = {
    "chatml": CHATML,
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.first and system %}"
        "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}"
        "{% else %}{% set text = m.content %}{% endif %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{% else %}"
        "{{ ' ' ~ text.strip() ~ ' ' ~ eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "trimmed blocks": (
        "{% for m in messages %}\n    {% if m.content %}\n{{ m.content | trim }}\n    {% endif %}\n"
        "{% endfor %}\n"
    ),
    "tools": (
        "{% if tools is not none %}{{ tools | tojson(indent=4) }}{{ tools|tojson }}{% endif %}"
        "{{ documents is none }}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0, last='') %}{% for m in messages %}"
        "{% set ns.n = ns.n + m.content|length %}"
        "{% if m.content.startswith('A') and '?' in m.content %}{% set ns.last = m.content %}"
        "{% break %}{% endif %}"
        "{% if m.role != 'user' %}{% continue %}{% endif %}{{ loop.index }}{{ loop.last }}"
        "{{ loop.length }}{% endfor %}"
        "{{ ns.n }} {{ ns.last }} {{ ns.n ** 2 // 3 - 1.5 }}"
    ),
    "macros": (
        "{% macro show(value, deep=false) -%}{% if value is mapping %}{% for k, v in value.items() %}"
        "{{ k }}={{ show(v, deep=true) }};"
        "{% endfor %}{% elif value is string %}'{{ value }}'{% elif value is iterable %}"
        "{% for v in value %}{{ show(v) }},{% endfor %}"
        "{% else %}{{ value }}{% endif %}{%- endmacro %}{{ show(messages) }}{{ show(tools) }}"
        "{% macro w() %}<{{ caller(1) }}>{% endmacro %}{% call(x) w() %}{{ x }}{% endcall %}"
    ),
    "methods in loops": (
        "{% for m in messages %}{% set parts = m.content.split('</think>') %}"
        "{{ parts[-1].lstrip('\\n') }}|{{ parts|length }}|"
        "{{ m.content.replace('H', 'J').upper() }}|{{ ','.join(['a', 'b']) }}|"
        "{{ m.get('x', 'none') }}|{{ m.content[1:4] }}"
        "|{{ m.content[::-1] }}|{{ '{:>5}|{}'.format(m.role, loop.index) }}|"
        "{{ '%s-%02d' % (m.role, loop.index) }}{% endfor %}"
    ),
    "filters": (
        "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|map('trim')|join('; ') }}"
        "{{ messages|rejectattr('role', 'in', ['user', 'system'])|list|length }}"
        "{{ [3, 1, 2]|sort|join(',') }}{{ [1, 1, 2]|unique|list }}"
        "{{ 'a-b'|replace('-', '+')|upper|title }}{{ nothing|default('d') }}"
        "{{ {'b': 1, 'a': 2}|dictsort }}{{ [1, 2]|first }}"
        "{{ (messages|first).role|capitalize }}{{ 'x\\ny'|indent(2) }}{{ '<'|e }}"
        "{{ messages|map(attribute='role')|unique|list }}"
        "{{ '%d' | format(3) }}{{ ['x', 'y']|reverse|list }}{{ 3.7|int }}{{ '5'|int + 1 }}"
        "{{ [1, 2, 3]|max }}{{ 1 if messages|select('none') }}"
    ),
    "blocks": (
        "{% set text %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}[{{ text }}]"
        "{% filter upper %}abc{{ text }}{% endfilter %}"
        "{% with a = 1, b = [1, 2] %}{{ a }}{{ b }}{% endwith %}{% for i in range(3) %}{{ i }}"
        "{% else %}none{% endfor %}"
        "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }}"
        "{% endfor %}{# remark #}{% raw %}{{ }}{% endraw %}"
    ),
}


def unlimited(source: str, **variables) -> str:
    """The same rendering by jinja2's own sandbox, set up as Hugging Face documents it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    return environment.from_string(source).render(
        documents=None, bos_token="<s>", eos_token="</s>", **variables
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_jinja2_without_limits(name, tools, prompt):
    source = TEMPLATES[name]
    expected = unlimited(source, messages=TALK, tools=tools, add_generation_prompt=prompt)
    assert ChatTemplate(source, "<s>", "</s>").render(TALK, prompt, tools=tools) == expected


def test_generation_blocks_show_their_content():
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert ChatTemplate(source).render([{"role": "user", "content": "a"}]) == "a"


def test_a_template_can_refuse_messages():
    with pytest.raises(InputError, match="roles must alternate"):
        ChatTemplate(TEMPLATES["llama 2"]).render([TALK[1], TALK[1]])


def test_strftime_now_gives_the_date():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]) in {
        time.strftime("%Y"),
        str(int(time.strftime("%Y")) + 1),
    }


NS = "{% set ns = namespace(x='aaaa', y='aaaa') %}"
TIMES = NS + "{% for i in range(90) %}"
LONG = "{% set s = 'a' * 4000000 %}{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested text": (
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}"
        "{% endfor %}"
    ),
    "nested text in a set": (
        "{% set y %}{% for a in range(99999) %}{% for b in range(999) %}xxxxxxxx{% endfor %}"
        "{% endfor %}{% endset %}"
    ),
    "long range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "text times": "{{ 'a' * 10 ** 9 }}",
    "text times times": "{{ 'a' * 1000 * 1000 * 1000 * 1000 }}",
    "list times": "{{ [1] * 10 ** 9 }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "square": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "double by plus": TIMES + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "double by tilde": TIMES + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "double by block": TIMES + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "double list": TIMES + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "double dict": TIMES + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    "double dict call": TIMES + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "double tuples": (
        TIMES + "{% set ns.x = (ns.x, ns.x) %}{% set ns.y = (ns.y, ns.y) %}{% endfor %}{{ ns.x == ns.y }}"
    ),
    "double arguments": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}"
        "{% endmacro %}{{ m(60, 1) }}"
    ),
    "macro without end": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "macro that branches": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}"
    ),
    "loop in itself": "{% for a in range(999) recursive %}{{ loop(range(999)) }}{% endfor %}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "percent": "{{ '%*d' % (1000000000, 1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "replace": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "replace filter": "{% set x = 'a' * 100000 %}{{ x | replace('a', x) }}",
    "join": "{% set x = 'a' * 100000 %}{{ x.join(range(99999) | map('string')) }}",
    "join filter": "{% set x = 'a' * 100000 %}{{ range(99999) | join(x) }}",
    "indent": "{{ 'a\nb' | indent(1000000000) }}",
    "tojson indent": "{{ [1] | tojson(indent=1000000000) }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "slices kept": LONG + "{% set ns.x = namespace(a=s[1:], b=ns.x) %}{% endfor %}",
    "copies kept": LONG + "{% set ns.x = namespace(a=s | upper, b=ns.x) %}{% endfor %}",
    "words kept": (
        "{% set s = 'ab ' * 300000 %}{% set ns = namespace(x=0) %}{% for i in range(999) %}"
        "{% set ns.x = namespace(a=s.split(), b=ns.x) %}{% endfor %}"
    ),
    "search": (
        "{% set s = 'a' * 2000000 + 'b' %}{% for i in range(9999) %}"
        + "{{ s.find('c') }}" * 2000
        + "{% endfor %}"
    ),
    "compare": LONG + "{% if s == s[:3999999] + 'b' %}{% endif %}" * 999 + "{% endfor %}",
    "sort": (
        "{% set x = range(30000) | map('string') | list %}{% for i in range(9999) %}"
        "{% set y = x | sort %}{% endfor %}"
    ),
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ messages.__init__.__globals__ }}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update(role='x') }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "block": "{% block x %}{{ self.x() }}{% endblock %}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nots": "{{ " + "not " * 30000 + "1 }}",
    "dots": "{{ a" + ".b" * 60000 + " }}",
    "pluses": "{{ 1" + "+1" * 60000 + " }}",
    "open braces": "{{" * 65000,
    "open remarks": "{#" * 65000,
    "digits": "{{ " + "9" * 100000 + " }}",
    "too long": "x" * 200_000,
    "no template": "{% for %}",
    "unknown filter": "{{ 1 | nope }}",
    "unknown name": "{{ nope.a.b }}",
    "unknown function": "{{ nope() }}",
    "division": "{{ 1 / 0 }}",
    "wide date": "{{ strftime_now('%1000000000d') }}",
    "function of Python": "{{ range.__globals__['x'] }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_soon(name):
    start = time.thread_time()
    with pytest.raises((UnsupportedError, FormatError), match=r"tokenizer\.chat_template"):
        ChatTemplate(HOSTILE[name]).render(TALK)
    assert time.thread_time() - start < 10  # against hanging only: the limit itself is 1.5 seconds


@pytest.mark.parametrize(
    "name", ["slices kept", "copies kept", "words kept", "nested text in a set", "double list"]
)
def test_hostile_templates_need_little_memory(name):
    tracemalloc.start()
    try:
        with pytest.raises(UnsupportedError):
            ChatTemplate(HOSTILE[name]).render(TALK)
        assert tracemalloc.get_traced_memory()[1] < 400_000_000
    finally:
        tracemalloc.stop()


def test_long_chains_do_not_overflow_the_stack():
    source = "{% set ns = namespace(x=[1]) %}{% for i in range(50000) %}{% set ns.x = WHAT %}{% endfor %}done"
    for what in ("ns.x | map('string')", "namespace(a=ns.x)", "{}[ns.x]"):
        assert ChatTemplate(source.replace("WHAT", what)).render([]) == "done"


def test_namespaces_print_without_their_content():
    source = NS + "{% for i in range(60) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ [ns.x] }}"
    assert ChatTemplate(source).render([]) == "[<Namespace>]"


def test_a_long_conversation_is_no_attack():
    talk = [{"role": "user" if at % 2 == 0 else "assistant", "content": "word " * 400} for at in range(400)]
    for name in ("chatml", "llama 2", "methods in loops", "filters", "macros"):
        assert len(ChatTemplate(TEMPLATES[name]).render(talk)) > 100_000


@pytest.mark.parametrize(
    "message", [None, 3, "text", {"content": "no role"}, {"role": 3}, {"role": "user", "content": {1, 2}}]
)
def test_messages_that_are_none_are_refused(tokenizer, message):
    with pytest.raises(InputError, match="chat message"):
        encode_chat(tokenizer, [message])


def test_endless_data_in_messages_is_refused():
    talk: dict = {"role": "user", "content": "x"}
    talk["self"] = talk
    with pytest.raises(InputError, match="nested"):
        ChatTemplate(None).render([talk])


@pytest.fixture(scope="module")
def metadata() -> dict:
    made, _ = byte_level([pre_tokenizers.Split(" ", "merged_with_next")], "gpt-2", size=400)
    return add_tokens(made, ["<|im_start|>", "<|im_end|>", "<s>", "|><|", "user\n<"], kind=3)


@pytest.fixture(scope="module")
def tokenizer(metadata) -> Tokenizer:
    return Tokenizer.from_metadata(metadata)


def expected_ids(tokenizer, talk) -> list[int]:
    """chatml put together by hand, every content encoded as plain text."""
    first = tokenizer.vocab_size - 5
    ids = []
    for message in talk:
        ids += [first, *tokenizer.encode(f"{message['role']}\n{message['content']}"), first + 1]
        ids += tokenizer.encode("\n")
    return [*ids, first, *tokenizer.encode("assistant\n")]


def test_without_a_template_chatml_is_used_where_the_vocabulary_has_it(tokenizer, metadata):
    assert encode_chat(tokenizer, TALK) == expected_ids(tokenizer, TALK)
    assert encode_chat(tokenizer, TALK, add_generation_prompt=False) == expected_ids(tokenizer, TALK)[:-len(
        tokenizer.encode("assistant\n")) - 1]  # fmt: skip
    plain = Tokenizer.from_metadata({**metadata, "tokenizer.ggml.token_type": None} | {
        "tokenizer.ggml.tokens": [t.replace("im_", "xm_") for t in metadata["tokenizer.ggml.tokens"]],
        "tokenizer.ggml.token_type": metadata["tokenizer.ggml.token_type"],
    })  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"tokenizer\.chat_template is missing"):
        encode_chat(plain, TALK)


PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "<|im_",
    "start|>",
    "end|>",
    "<",
    "|>",
    "<|",
    "<s>",
    " ",
    "\n",
    "fox",
    "\ue000",
    "user",
]


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_look_alikes_of_control_tokens_stay_text(tokenizer, contents):
    talk = [{"role": "user", "content": content} for content in contents]
    assert encode_chat(tokenizer, talk) == expected_ids(tokenizer, talk)


def test_roles_and_tool_arguments_are_text_too(metadata):
    source = CHATML.replace("message.content", "message.content|tojson")
    ours = Tokenizer.from_metadata({**metadata, "tokenizer.chat_template": source})
    first = ours.vocab_size - 5
    ids = encode_chat(ours, [{"role": "user<|im_end|>", "content": {"<s>": ["<|im_start|>"]}}])
    assert [number for number in ids if number >= first] == [first, first + 1, first]
    assert 'user<|im_end|>\n{"<s>": ["<|im_start|>"]}' in ours.decode(ids)


def test_control_tokens_that_a_template_composes_are_tokens(metadata):
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|im_' ~ 'end|>' }}{% endfor %}"
    ours = Tokenizer.from_metadata({**metadata, "tokenizer.chat_template": source})
    first = ours.vocab_size - 5
    ids = encode_chat(ours, [{"role": "im_start", "content": "the fox"}])
    assert ids == [first, *ours.encode("the fox"), first + 1]


def test_the_begin_token_comes_once(metadata):
    bos = len(metadata["tokenizer.ggml.tokens"]) - 3
    base = {**metadata, "tokenizer.ggml.bos_token_id": bos, "tokenizer.ggml.add_bos_token": True}
    for source in (CHATML, "{{ bos_token }}" + CHATML):
        ids = encode_chat(Tokenizer.from_metadata({**base, "tokenizer.chat_template": source}), TALK)
        assert ids[0] == bos and ids.count(bos) == 1


def test_contents_of_text_parts_are_joined(tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]}]
    assert encode_chat(tokenizer, parts) == encode_chat(tokenizer, [{"role": "user", "content": "the fox"}])


def test_sentencepiece_vocabularies_chat_too():
    source = "{% for m in messages %}{{ bos_token }}[INST] {{ m.content }} [/INST]{{ eos_token }}{% endfor %}"
    ours = Tokenizer.from_metadata(sentencepiece()[0] | {"tokenizer.chat_template": source})
    ids = encode_chat(ours, [{"role": "user", "content": "</s>the fox"}])
    assert ids == [ours.bos_id, *ours.encode("[INST] </s>the fox [/INST]", bos=False), ours.eos_id]


def test_several_threads_may_use_one_template():
    template = ChatTemplate(TEMPLATES["methods in loops"])
    expected, found = template.render(TALK), []
    threads = [
        threading.Thread(target=lambda: found.extend(template.render(TALK) for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 80


def test_without_jinja2_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    chat._sandbox_class.cache_clear()
    try:
        with pytest.raises(MissingExtraError, match="pip install"):
            ChatTemplate(None)
    finally:
        chat._sandbox_class.cache_clear()


SOURCES = st.text(alphabet=st.sampled_from("{}%#'\"[]()|~+*. \nabmessagforinifenddsetx01<>=-"), max_size=60)


@given(SOURCES)
@settings(max_examples=300, deadline=None)
def test_junk_raises_only_our_errors(source):
    try:
        ChatTemplate(source).render(TALK)
    except PyInferError as error:
        assert "template" in str(error)
