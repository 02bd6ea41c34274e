"""Made-up vocabularies for made-up models: valid for every GGUF reader, deterministic, of any size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from gguf import GGUFWriter, TokenType

_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_PRINTABLE = [chr(code) for code in range(33, 127)]


def add_sentencepiece(writer: GGUFWriter, size: int) -> None:
    """A `llama` vocabulary: <unk>, <s>, </s>, 256 byte tokens, printable characters, then letter groups."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    pieces = itertools.chain(["▁"], _LETTERS, _groups("▁"), (c for c in _PRINTABLE if c not in _LETTERS))
    tokens += itertools.islice(pieces, size - len(tokens))
    types += [TokenType.NORMAL] * (size - len(types))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(size - 259)])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def add_byte_level(writer: GGUFWriter, size: int, pre: str) -> None:
    """A `gpt2` vocabulary: 256 byte characters, merges, then <|endoftext|>, <|im_start|>, <|im_end|>."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = byte_characters()
    merges = list(itertools.islice(_pairs(), size - len(tokens) - len(special)))
    tokens += [left + right for left, right in merges]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + special)
    writer.add_token_types([TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL] * len(special))
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_eos_token_id(size - 1)
    writer.add_pad_token_id(size - 3)
    writer.add_add_bos_token(False)


def byte_characters() -> list[str]:
    """The printable character that stands for each of the 256 bytes. Source: GPT-2's byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = itertools.count(256)
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _groups(space: str) -> Iterator[str]:
    """Letter groups, each also behind a space; every prefix comes before what it begins."""
    yield from (space + letter for letter in _LETTERS)
    for length in itertools.count(2):
        for letters in itertools.product(_LETTERS, repeat=length):
            group = "".join(letters)
            yield group
            yield space + group


def _pairs() -> Iterator[tuple[str, str]]:
    """Merges whose left side is already a token."""
    yield from (("Ġ", letter) for letter in _LETTERS)
    for length in itertools.count(2):
        for letters in itertools.product(_LETTERS, repeat=length):
            group = "".join(letters)
            yield group[:-1], group[-1]
