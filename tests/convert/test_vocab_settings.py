"""Tokenizer files of checkpoints: roles, ends, chat templates, counts, and what is refused in one "
"sentence."""

from __future__ import annotations

import pytest
from checkpoint_files import read_tokenizer

from pyinfer.errors import FormatError, PyInferError, UnsupportedError
from pyinfer.text.tokenizer import Tokenizer

GGML = "tokenizer.ggml."


def spec_of(**changes: object) -> dict:
    spec = {
        "added_tokens": [
            {"id": 4, "content": "<bos>", "special": True},
            {"id": 5, "content": "<eos>", "special": True},
            {"id": 6, "content": "<turn>", "special": True},
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "aba": 3}, "merges": ["a b", "ab a"]},
    }
    return {**spec, **changes}


def test_roles_come_from_text_before_numbers(tmp_path) -> None:
    settings = {"eos_token": {"content": "<eos>"}, "bos_token": None}
    files = {
        "tokenizer.json": spec_of(),
        "tokenizer_config.json": settings,
        "special_tokens_map.json": {"pad_token": "b"},
    }
    metadata = read_tokenizer(tmp_path, files, {"bos_token_id": 4, "eos_token_id": 0, "pad_token_id": -1})
    roles = {
        key: metadata.get(GGML + key + "_token_id") for key in ("bos", "eos", "padding", "unknown", "mask")
    }
    assert roles == {"bos": 4, "eos": 5, "padding": 1, "unknown": None, "mask": None}
    assert metadata[GGML + "add_bos_token"] is False and metadata[GGML + "add_eos_token"] is False


def test_further_ends_of_the_generation_configuration_count(tmp_path) -> None:
    files = {"tokenizer.json": spec_of(), "generation_config.json": {"eos_token_id": [5, 6, 3, 2]}}
    metadata = read_tokenizer(tmp_path / "1", files, {"eos_token_id": [5, 6]})
    assert metadata[GGML + "eos_token_id"] == 5
    assert [metadata[GGML + "eot_token_id"], metadata[GGML + "eom_token_id"]] == [6, 3]
    assert Tokenizer.from_metadata(metadata).end_ids == {5, 6, 3}
    files["generation_config.json"] = {"eos_token_id": 6}
    assert Tokenizer.from_metadata(read_tokenizer(tmp_path / "2", files, {"eos_token_id": 5})).end_ids == {
        5,
        6,
    }


def template(*names: str, ids: dict | None = None) -> dict:
    pieces = [{"Sequence": {"id": "A"}} if name == "A" else {"SpecialToken": {"id": name}} for name in names]
    known = {"<bos>": [4], "<eos>": [5]} if ids is None else ids
    tokens = {name: {"id": name, "ids": numbers, "tokens": [name]} for name, numbers in known.items()}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": tokens}


@pytest.mark.parametrize(
    "processor, settings, bos, eos",
    [
        (None, {}, False, False),
        (template("<bos>", "A"), {}, True, False),
        (template("<bos>", "A", "<eos>"), {}, True, True),
        (
            {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<bos>", "A")]},
            {},
            True,
            False,
        ),
        (None, {"add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}, True, False),
        (
            template("<bos>", "A"),
            {"add_bos_token": False, "tokenizer_class": "LlamaTokenizerFast"},
            False,
            False,
        ),
        (
            template("<bos>", "A"),
            {"add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"},
            True,
            False,
        ),
        (None, {"add_eos_token": True, "tokenizer_class": "LlamaTokenizer"}, False, True),
    ],
)
def test_what_stands_around_a_text(tmp_path, processor, settings, bos, eos) -> None:
    files = {"tokenizer.json": spec_of(post_processor=processor), "tokenizer_config.json": settings}
    metadata = read_tokenizer(tmp_path, files, {"bos_token_id": 4, "eos_token_id": 5})
    assert Tokenizer.from_metadata(metadata).encode("ab") == [4] * bos + [2] + [5] * eos


def test_more_than_one_token_around_a_text_is_refused(tmp_path) -> None:
    spec = spec_of(post_processor=template("<bos>", "<eos>", "A"))
    with pytest.raises(UnsupportedError, match=r"tokens \[4, 5\] are put around every text"):
        read_tokenizer(tmp_path, {"tokenizer.json": spec})


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": "{{ a }}"}}, "{{ a }}"),
        ({"tokenizer_config.json": {"chat_template": "old"}, "chat_template.jinja": "{{ ü }}"}, "{{ ü }}"),
        ({"chat_template.json": {"chat_template": "{{ c }}"}}, "{{ c }}"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "t"},
                        {"name": "default", "template": "d"},
                    ]
                }
            },
            "d",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "t"}]}}, None),
    ],
)
def test_chat_templates(tmp_path, files, expected) -> None:
    assert (
        read_tokenizer(tmp_path, {"tokenizer.json": spec_of(), **files}).get("tokenizer.chat_template")
        == expected
    )


def test_the_file_gets_a_token_for_every_row(tmp_path) -> None:
    files = {"tokenizer.json": spec_of()}
    assert len(read_tokenizer(tmp_path / "1", files)[GGML + "tokens"]) == 7
    assert read_tokenizer(tmp_path / "2", files, {"vocab_size": 9})[GGML + "tokens"][6:] == [
        "<turn>",
        "[PAD7]",
        "[PAD8]",
    ]
    assert len(read_tokenizer(tmp_path / "3", files, {"vocab_size": 9}, rows=8)[GGML + "tokens"]) == 8
    # Additions without a row are left out, a vocabulary without rows is an error.
    assert read_tokenizer(tmp_path / "4", files, {"vocab_size": 5})[GGML + "tokens"] == [
        "a",
        "b",
        "ab",
        "aba",
        "<bos>",
    ]
    with pytest.raises(
        FormatError, match=r"the tokenizer has 7 tokens, but the embedding has 3 rows \(aba has id 3\)"
    ):
        read_tokenizer(tmp_path / "5", files, {"vocab_size": 3})
    with pytest.raises(FormatError, match=r"vocab_size is 99999999999, expected a count"):
        read_tokenizer(tmp_path / "6", files, {"vocab_size": 99999999999})


def model_of(**changes: object) -> dict:
    return spec_of(model={**spec_of()["model"], **changes})


BYTE_LEVEL = {**spec_of()["pre_tokenizer"], "trim_offsets": True}
REFUSED = {
    "no tokenizer": (
        {},
        FormatError,
        r"the folder has no tokenizer, expected tokenizer\.json, tokenizer\.model, or",
    ),
    "no merges.txt": (
        {"vocab.json": {"a": 0}},
        FormatError,
        r"the folder has vocab\.json but no merges\.txt, .*; fetch merges\.txt too",
    ),
    "no vocab.json": (
        {"merges.txt": "a b"},
        FormatError,
        r"the folder has merges\.txt but no vocab\.json, .*; fetch vocab\.json too",
    ),
    "no merges": ({"tokenizer.json": model_of(merges=None)}, FormatError, r"tokenizer\.json: has no merges"),
    "merges of three": (
        {"tokenizer.json": model_of(merges=["a b c"])},
        FormatError,
        r"merge 0 is a b c, expected two",
    ),
    "merges of numbers": ({"tokenizer.json": model_of(merges=[[1, 2]])}, FormatError, r"merge 0 is \[1, 2\]"),
    "an id twice": (
        {"tokenizer.json": model_of(vocab={"a": 0, "b": 0})},
        FormatError,
        r"tokens a and b both have id 0",
    ),
    "a huge id": (
        {"tokenizer.json": model_of(vocab={"a": 1 << 40})},
        FormatError,
        r"token a has id 1099511627776",
    ),
    "a negative id": ({"tokenizer.json": model_of(vocab={"a": -1})}, FormatError, r"token a has id -1"),
    "an id of text": ({"tokenizer.json": model_of(vocab={"a": "0"})}, FormatError, r"token a has id a str"),
    "a vocabulary of pairs": (
        {"tokenizer.json": model_of(vocab=[["a", 0.0]])},
        FormatError,
        r"vocab is a list",
    ),
    "Unigram": (
        {"tokenizer.json": model_of(type="Unigram")},
        UnsupportedError,
        r"the model is Unigram, expected BPE",
    ),
    "WordPiece": (
        {"tokenizer.json": model_of(continuing_subword_prefix="##")},
        UnsupportedError,
        r"continuing_subword_prefix",
    ),
    "no model": ({"tokenizer.json": {"pre_tokenizer": BYTE_LEVEL}}, FormatError, r"model is a NoneType"),
    "an added token without id": (
        {"tokenizer.json": spec_of(added_tokens=[{"content": "x"}])},
        FormatError,
        r"token x has id a NoneType",
    ),
    "added tokens of text": (
        {"tokenizer.json": spec_of(added_tokens=["x"])},
        FormatError,
        r"added_tokens is no list",
    ),
    "a template without ids": (
        {"tokenizer.json": spec_of(post_processor=template("<bos>", "A", ids={}))},
        FormatError,
        r"no id for <bos>",
    ),
    "lower case": (
        {"tokenizer.json": spec_of(normalizer={"type": "Lowercase"})},
        UnsupportedError,
        r"normalized by Lowercase",
    ),
    "a prefix for bytes": (
        {"tokenizer.json": spec_of(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True})},
        UnsupportedError,
        r"puts a space in front of a text",
    ),
    "an unknown step": (
        {
            "tokenizer.json": spec_of(
                pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, BYTE_LEVEL]}
            )
        },
        UnsupportedError,
        r"step .*Whitespace.* is not known; known are Split, Digits",
    ),
    "unknown words": (
        {
            "tokenizer.json": spec_of(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [
                        {
                            "type": "Split",
                            "pattern": {"Regex": "[aeiou]+"},
                            "behavior": "Isolated",
                            "invert": False,
                        },
                        BYTE_LEVEL,
                    ],
                }
            )
        },
        UnsupportedError,
        r"words are cut by \[aeiou\]\+ then .*which is none of pyinfer's ways",
    ),
    "words that are no regex": (
        {
            "tokenizer.json": spec_of(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [
                        {
                            "type": "Split",
                            "pattern": {"Regex": "[a"},
                            "behavior": "Isolated",
                            "invert": False,
                        },
                        BYTE_LEVEL,
                    ],
                }
            )
        },
        FormatError,
        r"the pre-tokenizer cannot be used",
    ),
    "characters without spaces": (
        {"tokenizer.json": spec_of(pre_tokenizer=None)},
        UnsupportedError,
        r"spaces are not replaced by",
    ),
    "words of characters": (
        {
            "tokenizer.json": spec_of(
                pre_tokenizer={
                    "type": "Metaspace",
                    "replacement": "\u2581",
                    "prepend_scheme": "always",
                    "split": True,
                },
                model={
                    "type": "BPE",
                    "vocab": {"a": 0, "\u2581": 1, "a\u2581": 2},
                    "merges": [["a", "\u2581"]],
                },
            )
        },
        UnsupportedError,
        r"words are cut at spaces although tokens have spaces inside",
    ),
    "nested": (
        {
            "tokenizer.json": '{"model": {"vocab": {}}, "normalizer": '
            + '{"type": "Sequence", "normalizers": [' * 300
            + "null"
            + "]}" * 300
            + "}"
        },
        PyInferError,
        r"tokenizer\.json",
    ),
    "no SentencePiece model": (
        {"tokenizer.model": b"IQ== 0\nIg== 1\n"},
        FormatError,
        r"expected a SentencePiece model",
    ),
    "merges.txt of bytes": (
        {
            "vocab.json": {"a": 0},
            "merges.txt": b"\xff",
            "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"},
        },
        FormatError,
        r"merges\.txt: byte 0 is no UTF-8",
    ),
    "a prefix in front of words": (
        {"vocab.json": {"a": 0}, "merges.txt": b"", "tokenizer_config.json": {"add_prefix_space": True}},
        UnsupportedError,
        r"add_prefix_space is true",
    ),
    "a template of bytes": (
        {"tokenizer.json": spec_of(), "chat_template.jinja": b"\xff"},
        FormatError,
        r"chat_template\.jinja: byte 0",
    ),
}


@pytest.mark.parametrize("files, error, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path, files, error, message) -> None:
    with pytest.raises(error, match=message) as raised:
        read_tokenizer(tmp_path, files)
    assert "\n" not in str(raised.value)


def test_a_begin_token_beyond_the_vocabulary_is_refused(tmp_path) -> None:
    with pytest.raises(
        FormatError, match=r"config\.json: bos_token_id is 700, expected one of the vocabulary's 7"
    ):
        read_tokenizer(tmp_path, {"tokenizer.json": spec_of()}, {"bos_token_id": 700})
