"""Streaming: pushes join to the whole text, and no push shows half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from vocabularies_trained import CORPUS, add_tokens, byte_level, sentencepiece

from pyinfer.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    words = [pre_tokenizers.Split(" ", "merged_with_next")]
    metadata, _ = byte_level(words, "gpt-2", size=400)
    return {
        "gpt2": Tokenizer.from_metadata(add_tokens(metadata, ["<|im_end|>"], kind=3)),
        "llama": Tokenizer.from_metadata(sentencepiece()[0]),
    }


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_pushes_join_to_the_bytes_of_all_tokens(tokenizers, model):
    ours = tokenizers[model]

    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(
            st.integers(0, ours.vocab_size - 1).filter(lambda number: number != ours.bos_id), max_size=40
        )
    )
    def check(ids):
        stream = ours.stream(special=True)
        pushed = [stream.push(number) for number in ids]
        whole = b"".join(map(ours.token_bytes, ids)).decode("utf-8", "replace")
        assert "".join(pushed) + stream.finish() == whole == ours.decode(ids, special=True)
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids)

    check()


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@given(text=st.one_of(st.text(max_size=30), st.sampled_from(CORPUS.splitlines())))
@settings(max_examples=200, deadline=None)
def test_no_push_cuts_a_character(tokenizers, model, text):
    ours = tokenizers[model]
    text = text.replace("\ufffd", "").replace("\u2581", "")
    stream = ours.stream()
    for number in ours.encode(text):
        assert "\ufffd" not in stream.push(number)
    assert stream.finish() == ""


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_character_comes_whole_with_its_last_byte(tokenizers, model):
    ours = tokenizers[model]
    ids = ours.encode("\U0001f980", bos=False)
    stream = ours.stream()
    shown = [stream.push(number) for number in ids]
    assert len(ids) >= 3
    assert "".join(shown[:-1]).strip() == "" and shown[-1] == "\U0001f980"


def test_what_never_becomes_a_character_is_replaced(tokenizers):
    ours = tokenizers["gpt2"]
    ids = ours.encode("\U0001f980")
    stream = ours.stream()
    assert stream.push(ids[0]) == ""
    assert stream.push(ours.encode("a")[0]) == "\ufffda"
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(ours.encode("a")[0]) == "a"


def test_control_tokens_show_only_on_request(tokenizers):
    ours = tokenizers["gpt2"]
    end = ours.vocab_size - 1
    assert ours.stream().push(end) == ""
    assert ours.stream(special=True).push(end) == "<|im_end|>"


def test_the_space_behind_a_begin_token_is_the_encoders(tokenizers):
    ours = tokenizers["llama"]
    first = ours.stream()
    pushed = [first.push(number) for number in ours.encode("the engine")]
    assert "".join(pushed) == "the engine"
    later = ours.stream()
    assert "".join(later.push(number) for number in ours.encode("the engine", bos=False)) == " the engine"
