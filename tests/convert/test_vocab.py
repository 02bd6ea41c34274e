"""Vocabularies of checkpoints: what pyinfer makes of the files encodes as the libraries that read them do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import read_tokenizer, tokenizer_folder, write_folder
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
        made[name] = read_tokenizer(folder, {"tokenizer.json": oracle.to_str()}), oracle
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
    metadata = read_tokenizer(tmp_path, {"tokenizer.json": oracle.to_str()})
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
    found = PRETOKENIZERS[read_tokenizer(tmp_path, {"tokenizer.json": spec})[GGML + "pre"]]
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
    metadata = read_tokenizer(tmp_path, {"tokenizer.model": processor.serialized_model_proto(), **NO_EOS})
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
    metadata = read_tokenizer(tmp_path, files)
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
    metadata = read_tokenizer(
        tmp_path, {"tokenizer.json": as_transformers_does(expected, metaspace=False).to_str()}
    )
    merged = [
        number
        for number, text in enumerate(expected[GGML + "tokens"])
        if expected[GGML + "token_type"][number] == 1 and len(text) > 1
    ]
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
        read_tokenizer(tmp_path / "lost", {"tokenizer.json": lost})
    moved = json.loads(json.dumps(spec))
    moved["model"]["merges"].insert(0, moved["model"]["merges"].pop(ways[-1]))
    with pytest.raises(UnsupportedError, match=r"is merged at two places of the list"):
        read_tokenizer(tmp_path / "moved", {"tokenizer.json": moved})
    beside = read_tokenizer(
        tmp_path / "beside", {"tokenizer.json": lost, "tokenizer.model": processor.serialized_model_proto()}
    )
    assert np.array_equal(beside[GGML + "scores"], metadata[GGML + "scores"])


def test_files_of_two_models_are_refused(tmp_path, pieces) -> None:
    spec = as_transformers_does(pieces["llama"][0], metaspace=False).to_str()
    other = pieces["pieces across spaces"][1].serialized_model_proto()
    with pytest.raises(
        FormatError, match=r"tokenizer\.json: token \d+ is .*, but .* in tokenizer\.model; fetch"
    ):
        read_tokenizer(tmp_path, {"tokenizer.json": spec, "tokenizer.model": other})


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
        read_tokenizer(tmp_path, {"tokenizer.model": processor.serialized_model_proto()})


def test_damaged_sentencepiece_models_are_refused_or_read(tmp_path, pieces) -> None:
    whole = pieces["llama"][1].serialized_model_proto()
    with open_checkpoint(tokenizer_folder(tmp_path, {})) as checkpoint:

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
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "pad_token": "<pad>",
        "add_bos_token": True,
        "add_prefix_space": False,
        "tokenizer_class": "GPT2Tokenizer",
    }
    return {"vocab.json": vocab, "merges.txt": merges, "tokenizer_config.json": settings}, oracle


def test_opt_begins_with_its_end_token(tmp_path) -> None:
    files, oracle = opt_files(tmp_path)
    count = oracle.get_vocab_size()
    metadata = read_tokenizer(
        tmp_path, files, {"model_type": "opt", "vocab_size": count + 7, "bos_token_id": 2}
    )
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
        read_tokenizer(tmp_path / "1", {**files, "tokenizer_config.json": {}}, {"model_type": "opt"})[
            GGML + "pre"
        ]
        == "gpt-2"
    )
    settings = {"tokenizer_class": "Qwen2TokenizerFast"}
    assert (
        read_tokenizer(tmp_path / "2", {**files, "tokenizer_config.json": settings})[GGML + "pre"] == "qwen2"
    )
    with pytest.raises(
        UnsupportedError, match=r"does not say how its tokenizer cuts words; load the tokenizer"
    ):
        read_tokenizer(tmp_path / "3", {**files, "tokenizer_config.json": {}})


def test_added_tokens_of_elder_files(tmp_path) -> None:
    files, oracle = opt_files(tmp_path)
    count = oracle.get_vocab_size()
    files["added_tokens.json"] = {"<|a|>": count, "plain": count + 1, "<s>": 0}
    files["special_tokens_map.json"] = {"additional_special_tokens": ["<|a|>", {"content": "<s>"}]}
    metadata = read_tokenizer(tmp_path / "1", files, {"vocab_size": count + 2})
    assert metadata[GGML + "tokens"][count:] == ["<|a|>", "plain"]
    assert metadata[GGML + "token_type"][count:].tolist() == [3, 4] and metadata[GGML + "token_type"][0] == 3
    files["tokenizer_config.json"]["added_tokens_decoder"] = {
        str(count): {"content": "<|a|>", "special": False}
    }
    files["special_tokens_map.json"] = {}
    assert read_tokenizer(tmp_path / "2", files)[GGML + "token_type"][count:].tolist() == [4, 4]
