"""Chat templates: equal to jinja2 without our limits; hostile ones end soon; message texts stay text."""

from __future__ import annotations

import json
import sys
import threading
import time
import tracemalloc

import jinja2.sandbox
import pytest
from chat_templates import HOSTILE, NS, TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from toy_engine import toy_tokenizer
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
        with pytest.raises(MissingExtraError, match=r"pip install jinja2$"):
            ChatTemplate(None)
    finally:
        chat._sandbox_class.cache_clear()


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (["role"], "a chat message is 'role'; expected a dict with a role and a content"),
        ([{"content": "a"}], "a chat message is .*expected a dict with a role"),
        ("hi", "chat messages are a str; expected a list of dicts"),
        (None, "chat messages are a NoneType; expected a list"),
        ({"role": "user"}, "chat messages are a dict; expected a list"),
        ([{"role": "user", "content": object()}], "chat messages contain a object; expected text"),
    ],
)
def test_what_is_no_chat_is_named_once(messages, words):
    tokenizer = toy_tokenizer()
    with pytest.raises(InputError, match=f"^{words}"):
        encode_chat(tokenizer, messages)


SOURCES = st.text(alphabet=st.sampled_from("{}%#'\"[]()|~+*. \nabmessagforinifenddsetx01<>=-"), max_size=60)


@given(SOURCES)
@settings(max_examples=300, deadline=None)
def test_junk_raises_only_our_errors(source):
    try:
        ChatTemplate(source).render(TALK)
    except PyInferError as error:
        assert "template" in str(error)
