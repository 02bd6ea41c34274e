"""A byte-level BPE tokenizer of any small size, as the files that Hugging Face checkpoints carry."""

from __future__ import annotations

import json

from pyinfer_tools.vocabularies import byte_characters

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def byte_level_files(size: int, *, apart: bool = False) -> dict[str, str]:
    """File name -> content. apart: vocab.json and merges.txt, as GPT-2 and OPT have them, not tokenizer.json.

    256 bytes, then merges of a space with a letter, then three special tokens.
    """
    letters = _LETTERS[: size - 256 - len(_SPECIAL)]
    tokens = [*byte_characters(), *(f"Ġ{letter}" for letter in letters), *_SPECIAL]
    if len(tokens) != size:
        raise AssertionError(f"a vocabulary of {size} cannot be made, 259 to 285 can")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [f"Ġ {letter}" for letter in letters]
    end = {"bos_token": _SPECIAL[0], "eos_token": _SPECIAL[0]}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": False, **end}
    files = {"tokenizer_config.json": _json(settings)}
    if apart:
        merge_lines = "\n".join(["#version: 0.2", *merges]) + "\n"
        return files | {"vocab.json": _json(vocabulary), "merges.txt": merge_lines}
    return files | {"tokenizer.json": _json(_tokenizer(vocabulary, merges))}


def _tokenizer(vocabulary: dict[str, int], merges: list[str]) -> dict:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    plain = {token: index for token, index in vocabulary.items() if token not in _SPECIAL}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[token], "content": token, **flags} for token in _SPECIAL],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": plain,
            "merges": merges,
        },
    }


def _json(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
