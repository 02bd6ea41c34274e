"""Vocabularies of checkpoints: what pyinfer makes of the files encodes as the libraries that read them do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import safetensors, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Oracle
from vocabularies_trained import CORPUS, TEXTS, byte_level, sentencepiece

from pyinfer.errors import FormatError, PyInferError, UnsupportedError
from pyinfer.text.pretokenizers import PRETOKENIZERS
from pyinfer.text.tokenizer import Tokenizer
from pyinfer_convert.checkpoint import open_checkpoint
from pyinfer_convert.vocab import tokenizer_metadata

MIXED = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from(CORPUS.split(" ")), max_size=12).map(" ".join)
)
WEIGHTS = {"model.safetensors": safetensors({"x": np.zeros(1, np.float32)})}
GGML = "tokenizer.ggml."


def split(pattern: str, behavior: str = "isolated", invert: bool = False):
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_OTHERWISE = LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)").replace(
    r"\p{N}{1,3}", r"\p{N}\p{N}?\p{N}?"
)
# As the tokenizer.json files of the models have them.
WORDS = {
    "gpt-2": [GPT2],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    "falcon": [pre_tokenizers.Punctuation("contiguous"), GPT2, split("[0-9][0-9][0-9]")],
    "dbrx": [split(LLAMA3)],
    "dbrx spelled otherwise": [split(LLAMA3_OTHERWISE)],
    "qwen2": [split(LLAMA3.replace("{1,3}", ""))],
    "qwen2 by what lies between": [split(LLAMA3.replace("{1,3}", ""), "removed", True)],
}


def folder_of(tmp_path: Path, files: dict, config: dict | None = None) -> Path:
    return write_folder(tmp_path / "model", {"config.json": config or {}, **WEIGHTS, **files})


def read(
    tmp_path: Path, files: dict, config: dict | None = None, rows: int | None = None
) -> dict[str, object]:
    with open_checkpoint(folder_of(tmp_path, files, config)) as checkpoint:
        return tokenizer_metadata(checkpoint, rows)


@pytest.fixture(scope="module")
def byte_trained(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """name -> (metadata, oracle) of a tokenizer.json with added tokens and a begin token."""
    made = {}
    for name, words in WORDS.items():
        _, oracle = byte_level(words, "gpt-2")
        if len(words) == 1 and isinstance(words[0], pre_tokenizers.ByteLevel):
            oracle.pre_tokenizer = words[0]
        elif name == "falcon" or name == "smollm":
            oracle.pre_tokenizer = pre_tokenizers.Sequence(words)
        oracle.add_special_tokens(["<|begin|>", "<|end|>"])
        oracle.add_tokens([AddedToken("    four", normalized=False), AddedToken("THE END", normalized=False)])
        begin = oracle.token_to_id("<|begin|>")
        oracle.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
        )
        folder = tmp_path_factory.mktemp("byte")
        made[name] = read(folder, {"tokenizer.json": oracle.to_str()}), oracle
    return made


@pytest.mark.parametrize("name", WORDS)
def test_a_byte_level_file_encodes_as_the_library(byte_trained, name) -> None:
    metadata, oracle = byte_trained[name]
    assert metadata[GGML + "model"] == "gpt2" and metadata[GGML + "pre"] == name.split()[0]
    ours = Tokenizer.from_metadata(metadata)
    for text in TEXTS:
        assert ours.encode(text) == oracle.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text

    @settings(max_examples=100, deadline=None)
    @given(MIXED)
    def check(text):
        assert ours.encode(text) == oracle.encode(text).ids

    check()


def test_added_tokens_are_control_or_found_in_text(byte_trained) -> None:
    metadata, oracle = byte_trained["gpt-2"]
    kinds = dict(zip(metadata[GGML + "tokens"], metadata[GGML + "token_type"].tolist()))
    assert kinds["<|begin|>"] == kinds["<|end|>"] == 3 and kinds["THE END"] == 4 and kinds["a"] == 1
    assert metadata[GGML + "add_bos_token"] and metadata[GGML + "bos_token_id"] == oracle.token_to_id(
        "<|begin|>"
    )
    ours = Tokenizer.from_metadata(metadata)
    text = "x<|end|>THE END    four"
    assert ours.encode(text, special=True) == oracle.encode(text).ids


def test_a_vocabulary_that_looks_words_up_whole_gets_a_row_that_does(tmp_path) -> None:
    _, oracle = byte_level([split(LLAMA3)], "llama-bpe")
    oracle.model.ignore_merges = True
    metadata = read(tmp_path, {"tokenizer.json": oracle.to_str()})
    assert metadata[GGML + "pre"] == "llama-bpe" and not metadata[GGML + "add_bos_token"]
    ours = Tokenizer.from_metadata(metadata)
    assert all(ours.encode(text) == oracle.encode(text).ids for text in TEXTS)


@pytest.mark.parametrize("name", sorted(PRETOKENIZERS))
def test_every_row_is_found_from_its_own_patterns(tmp_path, name) -> None:
    row = PRETOKENIZERS[name]
    steps = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
        for each in row.patterns
    ]
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    spec = {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "ignore_merges": row.ignore_merges},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, bytes_only]},
    }
    found = PRETOKENIZERS[read(tmp_path, {"tokenizer.json": spec})[GGML + "pre"]]
    assert (found.patterns, found.ignore_merges) == (row.patterns, row.ignore_merges)


# ---- SentencePiece


def as_transformers_does(metadata: dict, *, metaspace: bool) -> Oracle:
    """A tokenizer.json of a SentencePiece vocabulary: every way to make a piece is a merge, best piece "
    "first."""
    tokens, kinds = metadata[GGML + "tokens"], metadata[GGML + "token_type"]
    vocab = {text: number for number, text in enumerate(tokens)}
    merges = []
    for number in sorted(range(len(tokens)), key=lambda each: -metadata[GGML + "scores"][each]):
        text = tokens[number]
        ways = [(text[:cut], text[cut:]) for cut in range(1, len(text)) if kinds[number] == 1]
        merges += sorted(
            (pair for pair in ways if pair[0] in vocab and pair[1] in vocab),
            key=lambda p: (vocab[p[0]], vocab[p[1]]),
        )
    bytes_too = bool((kinds == 6).any())
    oracle = Oracle(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=bytes_too))
    prefix = metadata[GGML + "add_space_prefix"]
    if metaspace:
        oracle.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first" if prefix else "never", split=False
        )
    else:
        steps = [normalizers.Prepend("\u2581")] if prefix else []
        oracle.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    oracle.add_special_tokens([tokens[each] for each in range(len(tokens)) if kinds[each] in (2, 3)])
    begin = metadata[GGML + "bos_token_id"]
    oracle.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    oracle.decoder = decoders.ByteFallback()
    return oracle


VARIANTS = {
    "llama": {},
    "no prefix": {"add_dummy_prefix": False},
    "pieces across spaces": {"split_by_whitespace": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 400},
    "user defined": {
        "user_defined_symbols": ["<|im_start|>", "\u2581\u2581", "engine"],
        "add_dummy_prefix": False,
    },
    "other ids": {"pad_id": 0, "bos_id": 3, "eos_id": 2, "unk_id": 1},
}
NO_EOS = {"tokenizer_config.json": {"add_eos_token": False}}


@pytest.fixture(scope="module")
def pieces() -> dict:
    """name -> (metadata by the library's own functions, processor)"""
    return {name: sentencepiece(**options) for name, options in VARIANTS.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sentencepiece_model_alone_is_read_whole(tmp_path, pieces, name) -> None:
    expected, processor = pieces[name]
    metadata = read(tmp_path, {"tokenizer.model": processor.serialized_model_proto(), **NO_EOS})
    user = expected[GGML + "token_type"] == 4
    shown = [
        text.replace("\u2581", " ") if of_user else text
        for text, of_user in zip(expected[GGML + "tokens"], user)
    ]
    assert metadata[GGML + "tokens"] == shown
    for key in ("scores", "token_type"):
        assert np.array_equal(metadata[GGML + key], expected[GGML + key])
    for key in ("model", "bos_token_id", "eos_token_id", "unknown_token_id", "add_space_prefix"):
        assert metadata[GGML + key] == expected[GGML + key]
    assert metadata.get(GGML + "padding_token_id", -1) == processor.pad_id()
    ours = Tokenizer.from_metadata(metadata)
    for text in (*TEXTS, "<|im_start|>engine  engines"):
        assert ours.encode(text) == [processor.bos_id(), *processor.encode(text)], text


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with tokenizer.model"])
@pytest.mark.parametrize("metaspace", [False, True], ids=["normalizer", "metaspace"])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("user defined", "other ids")])
def test_a_tokenizer_json_like_sentencepiece_encodes_as_the_library(
    tmp_path, pieces, name, metaspace, beside
) -> None:
    expected, processor = pieces[name]
    oracle = as_transformers_does(expected, metaspace=metaspace)
    files = {"tokenizer.json": oracle.to_str()}
    if beside:
        files["tokenizer.model"] = processor.serialized_model_proto()
    metadata = read(tmp_path, files)
    assert metadata[GGML + "model"] == "llama" and metadata[GGML + "unknown_token_id"] == processor.unk_id()
    assert metadata[GGML + "add_space_prefix"] == expected[GGML + "add_space_prefix"]
    assert np.array_equal(metadata[GGML + "token_type"], expected[GGML + "token_type"])
    ours = Tokenizer.from_metadata(metadata)
    for text in TEXTS:
        # The library's Metaspace puts no space before a text that has one, SentencePiece and llama.cpp do.
        if text and not (metaspace and text.startswith(" ")):
            assert ours.encode(text) == oracle.encode(text).ids, text
        assert ours.encode(text, bos=False) == processor.encode(text), text

    @settings(max_examples=100, deadline=None)
    @given(MIXED)
    def check(text):
        assert ours.encode(text, bos=False) == processor.encode(text)

    check()


def test_scores_of_merges_order_tokens_as_the_scores_do(tmp_path, pieces) -> None:
    expected, _ = pieces["llama"]
    metadata = read(tmp_path, {"tokenizer.json": as_transformers_does(expected, metaspace=False).to_str()})
    merged = [
        number for number, text in enumerate(expected[GGML + "tokens"])
        if expected[GGML + "token_type"][number] == 1 and len(text) > 1
    ]  # fmt: skip
    order = [
        np.argsort(-scores[merged], kind="stable").tolist()
        for scores in (metadata[GGML + "scores"], expected[GGML + "scores"])
    ]
    assert len(merged) > 100 and order[0] == order[1]


def test_merges_that_no_scores_can_say_are_refused(tmp_path, pieces) -> None:
    metadata, processor = pieces["llama"]
    spec = json.loads(as_transformers_does(metadata, metaspace=False).to_str())
    merges = spec["model"]["merges"]
    ways = [
        index
        for index, pair in enumerate(merges)
        if sum("".join(each) == "".join(pair) for each in merges) > 1
    ]
    lost = json.loads(json.dumps(spec))
    del lost["model"]["merges"][ways[-1]]
    with pytest.raises(
        UnsupportedError, match=r"is not merged from .*put the model's tokenizer\.model beside it"
    ):
        read(tmp_path / "lost", {"tokenizer.json": lost})
    moved = json.loads(json.dumps(spec))
    moved["model"]["merges"].insert(0, moved["model"]["merges"].pop(ways[-1]))
    with pytest.raises(UnsupportedError, match=r"is merged at two places of the list"):
        read(tmp_path / "moved", {"tokenizer.json": moved})
    beside = read(
        tmp_path / "beside", {"tokenizer.json": lost, "tokenizer.model": processor.serialized_model_proto()}
    )
    assert np.array_equal(beside[GGML + "scores"], metadata[GGML + "scores"])


def test_files_of_two_models_are_refused(tmp_path, pieces) -> None:
    spec = as_transformers_does(pieces["llama"][0], metaspace=False).to_str()
    other = pieces["pieces across spaces"][1].serialized_model_proto()
    with pytest.raises(
        FormatError, match=r"tokenizer\.json: token \d+ is .*, but .* in tokenizer\.model; fetch"
    ):
        read(tmp_path, {"tokenizer.json": spec, "tokenizer.model": other})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_type": "unigram", "vocab_size": 400}, r"SentencePiece algorithm 1, expected 2 \(BPE\)"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"normalized with a table of characters"),
        ({"remove_extra_whitespaces": True}, r"normalized with repeated spaces removed"),
        ({"treat_whitespace_as_suffix": True}, r"whitespace is a suffix"),
    ],
)
def test_sentencepiece_models_beyond_gguf_are_refused(tmp_path, options, message) -> None:
    _, processor = sentencepiece(**options)
    with pytest.raises(UnsupportedError, match=rf"tokenizer\.model: .*{message}"):
        read(tmp_path, {"tokenizer.model": processor.serialized_model_proto()})


def test_damaged_sentencepiece_models_are_refused_or_read(tmp_path, pieces) -> None:
    whole = pieces["llama"][1].serialized_model_proto()
    with open_checkpoint(folder_of(tmp_path, {})) as checkpoint:

        @settings(max_examples=150, deadline=None)
        @given(st.integers(0, len(whole) - 1), st.integers(0, 255), st.integers(0, len(whole)))
        def check(place, byte, stop):
            damaged = bytearray(whole)
            damaged[place] = byte
            (checkpoint.path / "tokenizer.model").write_bytes(bytes(damaged[:stop]))
            try:
                Tokenizer.from_metadata(tokenizer_metadata(checkpoint)).encode("Hello")
            except PyInferError as error:
                assert "\n" not in str(error)

        check()


# ---- vocab.json and merges.txt


def opt_files(tmp_path: Path) -> tuple[dict, Oracle]:
    """A vocabulary with OPT's first four tokens, and the library's reading of the same two files."""
    _, trained = byte_level([split(PRETOKENIZERS["gpt-2"].patterns[0])], "gpt-2")
    model = json.loads(trained.to_str())["model"]
    texts = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        *sorted(model["vocab"], key=model["vocab"].get),
        "madeupword0000",
    ]
    vocab = json.dumps({text: number for number, text in enumerate(texts)})
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"
    folder = write_folder(tmp_path / "library", {"vocab.json": vocab, "merges.txt": merges})
    oracle = Oracle(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    oracle.pre_tokenizer = GPT2
    end = {"__type": "AddedToken", "content": "</s>", "normalized": True}
    settings = {
        "bos_token": end, "eos_token": end, "unk_token": end, "pad_token": "<pad>",
        "add_bos_token": True, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer",
    }  # fmt: skip
    return {"vocab.json": vocab, "merges.txt": merges, "tokenizer_config.json": settings}, oracle


def test_opt_begins_with_its_end_token(tmp_path) -> None:
    files, oracle = opt_files(tmp_path)
    count = oracle.get_vocab_size()
    metadata = read(tmp_path, files, {"model_type": "opt", "vocab_size": count + 7, "bos_token_id": 2})
    assert metadata[GGML + "pre"] == "gpt-2" and metadata[GGML + "add_bos_token"] is True
    ids = [metadata[GGML + f"{role}_token_id"] for role in ("bos", "eos", "unknown", "padding")]
    assert ids == [2, 2, 2, 1]
    assert metadata[GGML + "tokens"][count:] == [f"[PAD{count + number}]" for number in range(7)]
    kinds = metadata[GGML + "token_type"].tolist()
    assert kinds[:4] == [1, 3, 3, 1] and kinds[count:] == [5] * 7
    ours = Tokenizer.from_metadata(metadata)
    assert ours.vocab_size == count + 7 and ours.end_ids == {2}
    for text in TEXTS:
        assert ours.encode(text) == [2, *oracle.encode(text).ids], text
    assert ours.decode(ours.encode(CORPUS)) == CORPUS


def test_the_class_or_the_type_says_how_words_are_cut(tmp_path) -> None:
    files, _ = opt_files(tmp_path)
    assert (
        read(tmp_path / "1", {**files, "tokenizer_config.json": {}}, {"model_type": "opt"})[GGML + "pre"]
        == "gpt-2"
    )
    settings = {"tokenizer_class": "Qwen2TokenizerFast"}
    assert read(tmp_path / "2", {**files, "tokenizer_config.json": settings})[GGML + "pre"] == "qwen2"
    with pytest.raises(
        UnsupportedError, match=r"does not say how its tokenizer cuts words; load the tokenizer"
    ):
        read(tmp_path / "3", {**files, "tokenizer_config.json": {}})


def test_added_tokens_of_elder_files(tmp_path) -> None:
    files, oracle = opt_files(tmp_path)
    count = oracle.get_vocab_size()
    files["added_tokens.json"] = {"<|a|>": count, "plain": count + 1, "<s>": 0}
    files["special_tokens_map.json"] = {"additional_special_tokens": ["<|a|>", {"content": "<s>"}]}
    metadata = read(tmp_path / "1", files, {"vocab_size": count + 2})
    assert metadata[GGML + "tokens"][count:] == ["<|a|>", "plain"]
    assert metadata[GGML + "token_type"][count:].tolist() == [3, 4] and metadata[GGML + "token_type"][0] == 3
    files["tokenizer_config.json"]["added_tokens_decoder"] = {
        str(count): {"content": "<|a|>", "special": False}
    }
    files["special_tokens_map.json"] = {}
    assert read(tmp_path / "2", files)[GGML + "token_type"][count:].tolist() == [4, 4]


# ---- roles, ends, templates, counts


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
    metadata = read(tmp_path, files, {"bos_token_id": 4, "eos_token_id": 0, "pad_token_id": -1})
    roles = {
        key: metadata.get(GGML + key + "_token_id") for key in ("bos", "eos", "padding", "unknown", "mask")
    }
    assert roles == {"bos": 4, "eos": 5, "padding": 1, "unknown": None, "mask": None}
    assert metadata[GGML + "add_bos_token"] is False and metadata[GGML + "add_eos_token"] is False


def test_further_ends_of_the_generation_configuration_count(tmp_path) -> None:
    files = {"tokenizer.json": spec_of(), "generation_config.json": {"eos_token_id": [5, 6, 3, 2]}}
    metadata = read(tmp_path / "1", files, {"eos_token_id": [5, 6]})
    assert metadata[GGML + "eos_token_id"] == 5
    assert [metadata[GGML + "eot_token_id"], metadata[GGML + "eom_token_id"]] == [6, 3]
    assert Tokenizer.from_metadata(metadata).end_ids == {5, 6, 3}
    files["generation_config.json"] = {"eos_token_id": 6}
    assert Tokenizer.from_metadata(read(tmp_path / "2", files, {"eos_token_id": 5})).end_ids == {5, 6}


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
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<bos>", "A")]}, {}, True, False),
        (None, {"add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast"}, True, False),
        (template("<bos>", "A"), {"add_bos_token": False, "tokenizer_class": "LlamaTokenizerFast"}, False, False),
        (template("<bos>", "A"), {"add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}, True, False),
        (None, {"add_eos_token": True, "tokenizer_class": "LlamaTokenizer"}, False, True),
    ],
)  # fmt: skip
def test_what_stands_around_a_text(tmp_path, processor, settings, bos, eos) -> None:
    files = {"tokenizer.json": spec_of(post_processor=processor), "tokenizer_config.json": settings}
    metadata = read(tmp_path, files, {"bos_token_id": 4, "eos_token_id": 5})
    assert Tokenizer.from_metadata(metadata).encode("ab") == [4] * bos + [2] + [5] * eos


def test_more_than_one_token_around_a_text_is_refused(tmp_path) -> None:
    spec = spec_of(post_processor=template("<bos>", "<eos>", "A"))
    with pytest.raises(UnsupportedError, match=r"tokens \[4, 5\] are put around every text"):
        read(tmp_path, {"tokenizer.json": spec})


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": "{{ a }}"}}, "{{ a }}"),
        ({"tokenizer_config.json": {"chat_template": "old"}, "chat_template.jinja": "{{ ü }}"}, "{{ ü }}"),
        ({"chat_template.json": {"chat_template": "{{ c }}"}}, "{{ c }}"),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}},
            "d",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "t"}]}}, None),
    ],
)  # fmt: skip
def test_chat_templates(tmp_path, files, expected) -> None:
    assert read(tmp_path, {"tokenizer.json": spec_of(), **files}).get("tokenizer.chat_template") == expected


def test_the_file_gets_a_token_for_every_row(tmp_path) -> None:
    files = {"tokenizer.json": spec_of()}
    assert len(read(tmp_path / "1", files)[GGML + "tokens"]) == 7
    assert read(tmp_path / "2", files, {"vocab_size": 9})[GGML + "tokens"][6:] == [
        "<turn>",
        "[PAD7]",
        "[PAD8]",
    ]
    assert len(read(tmp_path / "3", files, {"vocab_size": 9}, rows=8)[GGML + "tokens"]) == 8
    # Additions without a row are left out, a vocabulary without rows is an error.
    assert read(tmp_path / "4", files, {"vocab_size": 5})[GGML + "tokens"] == ["a", "b", "ab", "aba", "<bos>"]
    with pytest.raises(
        FormatError, match=r"the tokenizer has 7 tokens, but the embedding has 3 rows \(aba has id 3\)"
    ):
        read(tmp_path / "5", files, {"vocab_size": 3})
    with pytest.raises(FormatError, match=r"vocab_size is 99999999999, expected a count"):
        read(tmp_path / "6", files, {"vocab_size": 99999999999})


def model_of(**changes: object) -> dict:
    return spec_of(model={**spec_of()["model"], **changes})


BYTE_LEVEL = {**spec_of()["pre_tokenizer"], "trim_offsets": True}
REFUSED = {
    "no tokenizer": ({}, FormatError, r"the folder has no tokenizer, expected tokenizer\.json, tokenizer\.model, or"),
    "no merges.txt": ({"vocab.json": {"a": 0}}, FormatError, r"the folder has no tokenizer"),
    "no merges": ({"tokenizer.json": model_of(merges=None)}, FormatError, r"tokenizer\.json: has no merges"),
    "merges of three": ({"tokenizer.json": model_of(merges=["a b c"])}, FormatError, r"merge 0 is a b c, expected two"),
    "merges of numbers": ({"tokenizer.json": model_of(merges=[[1, 2]])}, FormatError, r"merge 0 is \[1, 2\]"),
    "an id twice": ({"tokenizer.json": model_of(vocab={"a": 0, "b": 0})}, FormatError, r"tokens a and b both have id 0"),
    "a huge id": ({"tokenizer.json": model_of(vocab={"a": 1 << 40})}, FormatError, r"token a has id 1099511627776"),
    "a negative id": ({"tokenizer.json": model_of(vocab={"a": -1})}, FormatError, r"token a has id -1"),
    "an id of text": ({"tokenizer.json": model_of(vocab={"a": "0"})}, FormatError, r"token a has id a str"),
    "a vocabulary of pairs": ({"tokenizer.json": model_of(vocab=[["a", 0.0]])}, FormatError, r"vocab is a list"),
    "Unigram": ({"tokenizer.json": model_of(type="Unigram")}, UnsupportedError, r"the model is Unigram, expected BPE"),
    "WordPiece": ({"tokenizer.json": model_of(continuing_subword_prefix="##")}, UnsupportedError, r"continuing_subword_prefix"),
    "no model": ({"tokenizer.json": {"pre_tokenizer": BYTE_LEVEL}}, FormatError, r"model is a NoneType"),
    "an added token without id": (
        {"tokenizer.json": spec_of(added_tokens=[{"content": "x"}])}, FormatError, r"token x has id a NoneType",
    ),
    "added tokens of text": ({"tokenizer.json": spec_of(added_tokens=["x"])}, FormatError, r"added_tokens is no list"),
    "a template without ids": (
        {"tokenizer.json": spec_of(post_processor=template("<bos>", "A", ids={}))}, FormatError, r"no id for <bos>",
    ),
    "lower case": (
        {"tokenizer.json": spec_of(normalizer={"type": "Lowercase"})}, UnsupportedError, r"normalized by Lowercase",
    ),
    "a prefix for bytes": (
        {"tokenizer.json": spec_of(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True})},
        UnsupportedError, r"puts a space in front of a text",
    ),
    "an unknown step": (
        {"tokenizer.json": spec_of(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, BYTE_LEVEL]})},
        UnsupportedError, r"step .*Whitespace.* is not known; known are Split, Digits",
    ),
    "unknown words": (
        {"tokenizer.json": spec_of(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "[aeiou]+"}, "behavior": "Isolated", "invert": False}, BYTE_LEVEL]})},
        UnsupportedError, r"words are cut by \[aeiou\]\+ then .*which is none of pyinfer's ways",
    ),
    "words that are no regex": (
        {"tokenizer.json": spec_of(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "[a"}, "behavior": "Isolated", "invert": False}, BYTE_LEVEL]})},
        FormatError, r"the pre-tokenizer cannot be used",
    ),
    "characters without spaces": (
        {"tokenizer.json": spec_of(pre_tokenizer=None)}, UnsupportedError, r"spaces are not replaced by",
    ),
    "words of characters": (
        {"tokenizer.json": spec_of(
            pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
            model={"type": "BPE", "vocab": {"a": 0, "\u2581": 1, "a\u2581": 2}, "merges": [["a", "\u2581"]]})},
        UnsupportedError, r"words are cut at spaces although tokens have spaces inside",
    ),
    "nested": (
        {"tokenizer.json": '{"model": {"vocab": {}}, "normalizer": ' + '{"type": "Sequence", "normalizers": [' * 300
            + "null" + "]}" * 300 + "}"}, PyInferError, r"tokenizer\.json",
    ),
    "no SentencePiece model": ({"tokenizer.model": b"IQ== 0\nIg== 1\n"}, FormatError, r"expected a SentencePiece model"),
    "merges.txt of bytes": (
        {"vocab.json": {"a": 0}, "merges.txt": b"\xff", "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
        FormatError, r"merges\.txt: byte 0 is no UTF-8",
    ),
    "a prefix in front of words": (
        {"vocab.json": {"a": 0}, "merges.txt": b"", "tokenizer_config.json": {"add_prefix_space": True}},
        UnsupportedError, r"add_prefix_space is true",
    ),
    "a template of bytes": (
        {"tokenizer.json": spec_of(), "chat_template.jinja": b"\xff"}, FormatError, r"chat_template\.jinja: byte 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("files, error, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path, files, error, message) -> None:
    with pytest.raises(error, match=message) as raised:
        read(tmp_path, files)
    assert "\n" not in str(raised.value)


def test_a_begin_token_beyond_the_vocabulary_is_refused(tmp_path) -> None:
    with pytest.raises(
        FormatError, match=r"config\.json: bos_token_id is 700, expected one of the vocabulary's 7"
    ):
        read(tmp_path, {"tokenizer.json": spec_of()}, {"bos_token_id": 700})
