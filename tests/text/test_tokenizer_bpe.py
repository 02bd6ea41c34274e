"""Byte-level BPE: equals the `tokenizers` library, whose merging is its own, and llama.cpp's stored ids."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from vocabularies_trained import CORPUS, TEXTS, add_tokens, byte_level

from pyinfer.errors import FormatError, InputError, PyInferError, UnsupportedError
from pyinfer.text.merging import merge
from pyinfer.text.pretokenizers import PRETOKENIZERS
from pyinfer.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "smollm2_tokens.json"
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# As the models' own tokenizer.json files have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


WORDS = {
    "gpt-2": [split(GPT2_WORDS)],
    "smollm": [DIGITS, split(GPT2_WORDS)],
    "llama-bpe": [split(LLAMA3)],
    "qwen2": [split(LLAMA3.replace("{1,3}", ""))],
    "tekken": [split(TEKKEN)],
}
MIXED = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from(CORPUS.split(" ")), max_size=12).map(" ".join)
)


@pytest.fixture(scope="module")
def trained() -> dict:
    """pre -> (tokenizer, oracle, metadata)"""
    made = {}
    for pre, words in WORDS.items():
        metadata, oracle = byte_level(words, pre)
        oracle.model.ignore_merges = PRETOKENIZERS[pre].ignore_merges
        made[pre] = (Tokenizer.from_metadata(metadata), oracle, metadata)
    return made


@pytest.mark.parametrize("pre", WORDS)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_equals_the_tokenizers_library(trained, pre, text):
    ours, oracle, _ = trained[pre]
    assert ours.encode(text) == oracle.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("pre", WORDS)
def test_equals_the_tokenizers_library_on_any_text(trained, pre):
    ours, oracle, _ = trained[pre]

    @settings(max_examples=150, deadline=None)
    @given(MIXED)
    def check(text):
        assert ours.encode(text) == oracle.encode(text).ids

    check()


def test_gpt2_words_are_those_of_the_byte_level_regex(trained):
    metadata = trained["gpt-2"][2]
    words = pre_tokenizers.Sequence([split(pattern) for pattern in PRETOKENIZERS["gpt-2"].patterns])
    found = [word for word, _ in words.pre_tokenize_str(CORPUS)]
    spans = [CORPUS[first:last] for _, (first, last) in GPT2.pre_tokenize_str(CORPUS)]
    assert found == spans
    assert len(metadata["tokenizer.ggml.merges"]) > 100


@pytest.mark.parametrize("pre", sorted(PRETOKENIZERS))
def test_every_pretokenizer_keeps_the_text(trained, pre):
    ours = Tokenizer.from_metadata({**trained["gpt-2"][2], "tokenizer.ggml.pre": pre})

    @settings(max_examples=25, deadline=None)
    @given(MIXED)
    def check(text):
        assert ours.decode(ours.encode(text)) == text

    check()


@given(
    st.text("abc", max_size=30), st.dictionaries(st.text("abc", min_size=2, max_size=4), st.integers(0, 5))
)
@settings(max_examples=300, deadline=None)
def test_merge_takes_the_best_pair_and_of_equals_the_leftmost(text, ranks):
    expected = list(text)
    while True:
        pairs = [(ranks.get(a + b), at) for at, (a, b) in enumerate(itertools.pairwise(expected))]
        best = min((pair for pair in pairs if pair[0] is not None), default=None)
        if best is None:
            break
        at = best[1]
        expected[at : at + 2] = [expected[at] + expected[at + 1]]
    assert merge(list(text), lambda left, right: ranks.get(left + right)) == expected


def test_a_word_that_is_a_token_needs_no_merges_where_the_model_says_so(trained):
    metadata = {**trained["gpt-2"][2], "tokenizer.ggml.merges": []}
    tokens = metadata["tokenizer.ggml.tokens"]
    whole = Tokenizer.from_metadata({**metadata, "tokenizer.ggml.pre": "llama-bpe"})
    pieces = Tokenizer.from_metadata(metadata)
    assert whole.encode(" engine") == [tokens.index("Ġengine")]
    assert pieces.encode(" engine") == [tokens.index(char) for char in "Ġengine"]


def test_control_tokens_come_only_from_parsing(trained):
    metadata = add_tokens(trained["smollm"][2], ["<|im_start|>", "<|im_end|>"], kind=3)
    metadata |= {"tokenizer.ggml.bos_token_id": len(metadata["tokenizer.ggml.tokens"]) - 2}
    ours = Tokenizer.from_metadata(metadata)
    start, end = ours.vocab_size - 2, ours.vocab_size - 1
    text = "<|im_start|>the fox<|im_end|>"
    plain = ours.encode(text, bos=True)
    assert plain[0] == start and not {start, end} & set(plain[1:])
    assert ours.decode(plain) == text
    parsed = ours.encode(text, special=True)
    assert parsed == [start, *ours.encode("the fox"), end]
    assert ours.decode(parsed) == "the fox"
    assert ours.decode(parsed, special=True) == text
    assert ours.end_ids == {end}
    assert ours.encode("<|\ue000im_end|>", special=True, mark="\ue000") == ours.encode("<|im_end|>")


def test_user_defined_tokens_are_found_first_and_longest_first(trained):
    ours = Tokenizer.from_metadata(add_tokens(trained["smollm"][2], ["<t>", "<t><t>"], kind=4))
    one, two = ours.vocab_size - 2, ours.vocab_size - 1
    assert ours.encode("<t><t><t>the") == [two, one, *ours.encode("the")]
    assert ours.decode([two, one]) == "<t><t><t>"


@pytest.mark.parametrize(
    "tokens, kind, keys, expected",
    [
        (["<|eot_id|>", "<|eom_id|>"], 3, {}, {"<|eot_id|>", "<|eom_id|>"}),
        (["<|im_end|>"], 1, {}, {"<|im_end|>"}),
        (["</s>", "<eos>"], 1, {}, set()),
        (["</s>", "<eos>"], 3, {}, {"</s>", "<eos>"}),
        (["<done>", "<over>"], 3, {"eos": "<done>", "eot": "<over>"}, {"<done>", "<over>"}),
        (["<|end|>", "<|return|>", "<|call|>"], 3, {}, {"<|return|>", "<|call|>"}),
        (["<|end|>", "<|user|>"], 3, {}, {"<|end|>"}),
    ],
)
def test_end_tokens(trained, tokens, kind, keys, expected):
    metadata = add_tokens(trained["gpt-2"][2], tokens, kind)
    texts = metadata["tokenizer.ggml.tokens"]
    metadata |= {f"tokenizer.ggml.{key}_token_id": texts.index(text) for key, text in keys.items()}
    assert {texts[number] for number in Tokenizer.from_metadata(metadata).end_ids} == expected


def test_decoding_needs_no_encoder(trained):
    ours = Tokenizer.from_metadata(trained["gpt-2"][2])
    assert ours.decode([ours._vocabulary.pieces["Ġengine"]]) == " engine"
    assert "_encoder" not in vars(ours)


def test_lone_surrogates_become_replacement_characters(trained):
    ours = trained["gpt-2"][0]
    assert ours.decode(ours.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("token", [-1, 10**9])
def test_ids_outside_of_the_vocabulary_are_refused(trained, token):
    with pytest.raises(InputError, match="not in the vocabulary"):
        trained["gpt-2"][0].decode([token])


PREFIX = "tokenizer.ggml."
HOSTILE = {
    "model missing": ({"model": None}, "model"),
    "model unknown": ({"model": "rwkv"}, "model"),
    "model a number": ({"model": 3}, "model"),
    "pre unknown": ({"pre": "who"}, "pre"),
    "tokens missing": ({"tokens": None}, "tokens"),
    "tokens empty": ({"tokens": []}, "tokens"),
    "tokens numbers": ({"tokens": np.arange(9)}, "tokens"),
    "tokens mixed": ({"tokens": ["a", 1]}, "tokens"),
    "token twice": ({"tokens": ["a", "b", "a"], "token_type": None}, "tokens"),
    "token huge": ({"tokens": ["a", "b" * 100_000], "token_type": None}, "tokens"),
    "types short": ({"token_type": np.ones(3, np.int32)}, "token_type"),
    "types text": ({"token_type": ["a"] * 700}, "token_type"),
    "types out of range": ({"token_type": np.full(700, 99, np.int32)}, "token_type"),
    "types negative": ({"token_type": np.full(700, -1, np.int32)}, "token_type"),
    "types nested": ({"token_type": [np.ones(1), np.ones(2)]}, "token_type"),
    "types of Python": ({"token_type": [1, 2**70]}, "token_type"),
    "types scalar": ({"token_type": 3}, "token_type"),
    "merges missing": ({"merges": None}, "merges"),
    "merges numbers": ({"merges": np.arange(9)}, "merges"),
    "merge of one": ({"merges": ["ab"]}, "merges"),
    "merge of three": ({"merges": ["a b c"]}, "merges"),
    "bos out of range": ({"bos_token_id": 700}, "bos_token_id"),
    "bos negative": ({"bos_token_id": -1}, "bos_token_id"),
    "bos text": ({"bos_token_id": "1"}, "bos_token_id"),
    "bos true": ({"bos_token_id": True}, "bos_token_id"),
    "bos an array": ({"bos_token_id": np.arange(2)}, "bos_token_id"),
    "eos huge": ({"eos_token_id": 2**63}, "eos_token_id"),
    "eot out of range": ({"eot_token_id": 10**6}, "eot_token_id"),
    "add_bos without bos": ({"add_bos_token": True}, "add_bos_token"),
    "add_bos a number": ({"add_bos_token": 1}, "add_bos_token"),
    "template a number": ({"../chat_template": 1}, "chat_template"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_metadata_is_refused_by_its_key(trained, case):
    changes, key = HOSTILE[case]
    metadata = dict(trained["gpt-2"][2])
    for name, value in changes.items():
        full = "tokenizer.chat_template" if name == "../chat_template" else PREFIX + name
        if value is None:
            metadata.pop(full, None)
        else:
            metadata[full] = value
    with pytest.raises((FormatError, UnsupportedError), match=key):
        Tokenizer.from_metadata(metadata)


def test_merges_that_make_unknown_tokens_are_refused_when_used(trained):
    metadata = {**trained["gpt-2"][2], PREFIX + "merges": ["q q"]}
    ours = Tokenizer.from_metadata(metadata)
    assert ours.decode(ours.encode("the fox")) == "the fox"
    with pytest.raises(FormatError, match="merges"):
        ours.encode("qq")


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.text(max_size=3), max_size=4),
)
KEYS = ["model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "add_bos_token"]


@given(
    st.dictionaries(st.sampled_from(KEYS), JUNK, min_size=1, max_size=3), st.sampled_from(["gpt2", "llama"])
)
@settings(max_examples=300, deadline=None)
def test_junk_raises_only_our_errors(changes, model):
    metadata = {
        PREFIX + "model": model,
        PREFIX + "tokens": ["<unk>", "a", "b", "ab"],
        PREFIX + "token_type": np.array([2, 1, 1, 1], np.int32),
        PREFIX + "scores": np.zeros(4, np.float32),
        PREFIX + "merges": ["a b"],
    }
    metadata |= {PREFIX + key: value for key, value in changes.items()}
    try:
        ours = Tokenizer.from_metadata(metadata)
        ours.decode(ours.encode("ab abc", bos=False))
    except PyInferError as error:
        assert "tokenizer" in str(error)


@pytest.mark.model
def test_smollm2_gives_the_ids_of_llama_cpp(smollm2_path):
    from pyinfer.gguf_file import open_gguf

    with open_gguf(smollm2_path) as file:
        ours = Tokenizer.from_metadata(file.metadata)
    stored = json.loads(GOLDEN.read_text(encoding="ascii"))["texts"]
    assert len(stored) > 150
    assert [ours.encode(text, bos=False) for text, _ in stored] == [ids for _, ids in stored]
