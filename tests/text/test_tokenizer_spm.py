"""SentencePiece BPE: equals the sentencepiece library on vocabularies that it trains here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies_trained import CORPUS, TEXTS, add_tokens, sentencepiece

from pyinfer.errors import FormatError
from pyinfer.text.tokenizer import Tokenizer

MIXED = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from(CORPUS.split(" ")), max_size=12).map(" ".join)
)
VARIANTS = {
    "llama": {},
    "no prefix": {"add_dummy_prefix": False},
    "pieces across spaces": {"split_by_whitespace": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 400},
}


@pytest.fixture(scope="module")
def trained() -> dict:
    """name -> (tokenizer, oracle, metadata)"""
    made = {}
    for name, options in VARIANTS.items():
        metadata, oracle = sentencepiece(**options)
        made[name] = (Tokenizer.from_metadata(metadata), oracle, metadata)
    return made


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_equals_sentencepiece(trained, name, text):
    ours, oracle, _ = trained[name]
    assert ours.encode(text, bos=False) == oracle.encode(text)


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_sentencepiece_on_any_text(trained, name):
    ours, oracle, _ = trained[name]

    @settings(max_examples=150, deadline=None)
    @given(MIXED)
    def check(text):
        assert ours.encode(text, bos=False) == oracle.encode(text)

    check()


def test_a_vocabulary_with_pieces_across_spaces_was_tested(trained):
    tokens = trained["pieces across spaces"][2]["tokenizer.ggml.tokens"]
    assert any("\u2581" in token.lstrip("\u2581") for token in tokens)


@pytest.mark.parametrize("name", ["llama", "no prefix"])
def test_decoding_what_begins_with_the_begin_token_gives_the_text_back(trained, name):
    ours = trained[name][0]

    @settings(max_examples=150, deadline=None)
    @given(MIXED.filter(lambda text: "\u2581" not in text))
    def check(text):
        ids = ours.encode(text)
        assert ids[0] == ours.bos_id
        assert ours.decode(ids) == text

    check()


def test_a_continuation_keeps_its_space(trained):
    ours = trained["llama"][0]
    tokens = trained["llama"][2]["tokenizer.ggml.tokens"]
    number = tokens.index("\u2581the")
    assert ours.decode([number]) == " the"
    assert ours.decode([ours.bos_id, number, number]) == "the the"


def test_control_byte_and_unknown_tokens_never_come_from_text(trained):
    ours, _, metadata = trained["llama"]
    kinds = metadata["tokenizer.ggml.token_type"]
    text = "<s></s><unk><0x41><0xE2>"
    ids = ours.encode(text, bos=False)
    assert all(kinds[number] in (1, 6) for number in ids)
    assert ours.decode([ours.bos_id, *ids]) == text
    assert "<0x41>" not in [metadata["tokenizer.ggml.tokens"][number] for number in ids]
    assert ours.encode("</s>a", bos=False, special=True)[0] == ours.eos_id


def test_control_tokens_are_not_merged_from_their_letters():
    tokens = ["<unk>", "<s>", "</s>", "<", "/", "s", ">", "</", "s>", "\u2581"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(len(tokens), np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1, 1, 1, 1, 1], np.int32),
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert Tokenizer.from_metadata(metadata).encode("</s>", bos=False) == [7, 8]


def test_a_piece_after_a_special_token_gets_the_prefix_again(trained):
    ours = trained["llama"][0]
    parsed = ours.encode("the</s>the", special=True)
    the = ours.encode("the", bos=False)
    assert parsed == [ours.bos_id, *the, ours.eos_id, *the]


def test_user_defined_newlines_as_in_gemma(trained):
    ours = Tokenizer.from_metadata(add_tokens(trained["no prefix"][2], ["\n", "\n\n", "  "], kind=4))
    one, two, spaces = ours.vocab_size - 3, ours.vocab_size - 2, ours.vocab_size - 1
    assert ours.encode("\n\n\n", bos=False) == [two, one]
    assert ours.encode("the  \nthe", bos=False) == [
        *ours.encode("the", bos=False), spaces, one, *ours.encode("the", bos=False),
    ]  # fmt: skip
    assert ours.decode(ours.encode("a\n\n  b")) == "a\n\n  b"


def test_equal_scores_merge_from_the_left(trained):
    tokens = ["<unk>", "a", "aa", "aaa"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(4, np.float32),
        "tokenizer.ggml.token_type": np.array([2, 1, 1, 1], np.int32),
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert Tokenizer.from_metadata(metadata).encode("aaaaa", bos=False) == [3, 2]


@pytest.mark.parametrize(
    "key, value",
    [
        ("scores", None),
        ("scores", np.zeros(3, np.float32)),
        ("scores", np.full(600, np.nan, np.float32)),
        ("scores", ["a"] * 600),
        ("tokens", ["<0xZZ>"] + [f"t{number}" for number in range(599)]),
        ("bos_token_id", 600),
        ("add_space_prefix", "yes"),
    ],
)
def test_hostile_metadata_is_refused_by_its_key(trained, key, value):
    metadata = dict(trained["llama"][2])
    metadata["tokenizer.ggml.token_type"] = np.full(600, 1 if key != "tokens" else 6, np.int32)
    if value is None:
        del metadata["tokenizer.ggml." + key]
    else:
        metadata["tokenizer.ggml." + key] = value
    with pytest.raises(FormatError, match=key):
        Tokenizer.from_metadata(metadata)


def test_without_byte_tokens_and_unknown_token_no_text_can_be_encoded():
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["a"],
        "tokenizer.ggml.scores": np.zeros(1, np.float32),
    }
    ours = Tokenizer.from_metadata(metadata)
    assert ours.decode([0]) == "a"
    with pytest.raises(FormatError, match="unknown_token_id"):
        ours.encode("a")
