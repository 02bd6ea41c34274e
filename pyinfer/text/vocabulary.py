"""The vocabulary of a GGUF file, checked: texts, kinds, special ids, which tokens end a text.

Nothing here encodes or decodes. Every check runs before anything is built from the metadata, and at C speed
over whole arrays, because a vocabulary is read at each start of the program.

Source: the GGUF specification (tokenizer.ggml.*); llama.cpp (llama-vocab.cpp) for defaults and ends of text.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pyinfer import names
from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.text.pretokenizers import Pretokenizer, find_pretokenizer

SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"
MAX_TOKEN_CHARS = 1 << 16

FIM_PAD_TOKEN_ID = "tokenizer.ggml.fim_pad_token_id"
FIM_REP_TOKEN_ID = "tokenizer.ggml.fim_rep_token_id"
FIM_SEP_TOKEN_ID = "tokenizer.ggml.fim_sep_token_id"

# Tokens that end a text in some model. A file that calls one of these an ordinary token is mistaken.
# fmt: off
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_utterance>", "<turn|>",
    "<|tool_response>", "<｜end▁of▁sentence｜>",
)
# fmt: on
# The same, but some vocabularies have these as plain text (HTML): they count only where the file says so.
# fmt: off
_ENDS_IF_CONTROL = (
    "</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<|fim_pad|>", "<fim-pad>", "<fim_pad>",
    "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
    "<|file_sep|>",
)
# fmt: on


class Kind(enum.IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Texts and ids. `pieces` holds what merging may make: no control, unknown or byte token."""

    model: str
    texts: list[str]
    pieces: dict[str, int]
    bytes: dict[int, int]  # byte -> id of its <0x..> token; only in a llama vocabulary
    control: frozenset[int]  # control and unknown: never made from plain text, not shown when decoding
    user_defined: tuple[int, ...]  # found in text before anything else
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    end_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    pretokenizer: Pretokenizer | None
    scores: list[float]
    merges: list[str]  # "left right", in order


def read_vocabulary(metadata: Mapping[str, object]) -> Vocabulary:
    """Checks the tokenizer keys of a GGUF file; FormatError or UnsupportedError names the key."""
    model = _text(metadata, names.TOKENIZER_MODEL)
    if model not in (SENTENCEPIECE, BYTE_LEVEL):
        raise UnsupportedError(
            f"{names.TOKENIZER_MODEL} is {model[:80]!r}; pyinfer has llama (SentencePiece), gpt2 (bytes)"
        )
    texts = _texts(metadata)
    kinds = _kinds(metadata, len(texts))
    ids = dict(zip(texts, range(len(texts)), strict=True))
    if len(ids) != len(texts):
        twice = next(text for number, text in enumerate(texts) if ids[text] != number)
        raise FormatError(f"{names.TOKENS} has {twice[:80]!r} twice; every token must be different")
    spm = model == SENTENCEPIECE
    bos_id = _id(metadata, names.BOS_TOKEN_ID, len(texts), 1 if spm else None)
    eos_id = _id(metadata, names.EOS_TOKEN_ID, len(texts), 2 if spm else None)
    end_ids, forced = _ends(metadata, ids, kinds, eos_id)
    control = frozenset(np.flatnonzero((kinds == Kind.CONTROL) | (kinds == Kind.UNKNOWN)).tolist()) | forced
    user_defined = np.flatnonzero(kinds == Kind.USER_DEFINED).tolist()
    byte_ids = _byte_ids(texts, kinds) if spm else {}
    for number in control.union(byte_ids.values()):
        del ids[texts[number]]
    pretokenizer = None if spm else find_pretokenizer(_text(metadata, names.TOKENIZER_PRE, "default"))
    add_bos_default = spm if pretokenizer is None else pretokenizer.add_bos
    return Vocabulary(
        model=model,
        texts=texts,
        pieces=ids,
        bytes=byte_ids,
        control=control,
        user_defined=tuple(number for number in user_defined if number not in control),
        bos_id=bos_id,
        eos_id=eos_id,
        unknown_id=_id(metadata, names.UNKNOWN_TOKEN_ID, len(texts), 0 if kinds[0] == Kind.UNKNOWN else None),
        end_ids=end_ids,
        add_bos=_adds(metadata, names.ADD_BOS_TOKEN, add_bos_default, bos_id, names.BOS_TOKEN_ID),
        add_eos=_adds(metadata, names.ADD_EOS_TOKEN, False, eos_id, names.EOS_TOKEN_ID),
        add_space_prefix=spm and _flag(metadata, names.ADD_SPACE_PREFIX, True),
        pretokenizer=pretokenizer,
        scores=_scores(metadata, len(texts)) if spm else [],
        merges=[] if spm else _merges(metadata),
    )


def _ends(
    metadata: Mapping[str, object], ids: dict[str, int], kinds: np.ndarray, eos_id: int | None
) -> tuple[frozenset[int], frozenset[int]]:
    """Every id that ends a text, and those of them that are control whatever the file says."""
    forced = {ids[text] for text in _ENDS if text in ids}
    found = set(forced)
    found.update(ids[t] for t in _ENDS_IF_CONTROL if t in ids and kinds[ids[t]] == Kind.CONTROL)
    texts = {text for text in _ENDS if text in ids}
    # Harmony and Solar end a message, not the turn, with <|end|>; their turn ends with these.
    if "<|end|>" in texts and (texts >= {"<|return|>", "<|call|>"} or texts >= {"<|flush|>", "<|calls|>"}):
        found.discard(ids["<|end|>"])
        forced.discard(ids["<|end|>"])
    if "<|tool_response>" in texts and "</s>" in ids:
        found.discard(ids["</s>"])
    for key in (names.EOT_TOKEN_ID, names.EOM_TOKEN_ID, FIM_PAD_TOKEN_ID, FIM_REP_TOKEN_ID, FIM_SEP_TOKEN_ID):
        number = _id(metadata, key, len(ids), None)
        if number is not None:
            found.add(number)
    if eos_id is not None:
        found.add(eos_id)
    return frozenset(found), frozenset(forced)


def _texts(metadata: Mapping[str, object]) -> list[str]:
    texts = metadata.get(names.TOKENS)
    if texts is None:
        raise FormatError(f"{names.TOKENS} is missing; the file has no vocabulary, convert the model again")
    if not _all_text(texts) or not texts:
        raise FormatError(f"{names.TOKENS} is {_found(texts)}; expected a list of strings with at least one")
    texts = list(texts)
    if max(map(len, texts)) > MAX_TOKEN_CHARS:
        number = next(i for i, text in enumerate(texts) if len(text) > MAX_TOKEN_CHARS)
        raise FormatError(
            f"{names.TOKENS}[{number}] has {len(texts[number])} characters, more than {MAX_TOKEN_CHARS}"
        )
    if "" in texts:  # padding of the embedding: several of them must not look like duplicates
        texts = [text or f"[EMPTY_{number}]" for number, text in enumerate(texts)]
    return texts


def _kinds(metadata: Mapping[str, object], count: int) -> np.ndarray:
    if names.TOKEN_TYPE not in metadata:
        return np.full(count, Kind.NORMAL, np.int32)
    kinds = _numbers(metadata, names.TOKEN_TYPE, count, "iu")
    if kinds.min() < 0 or kinds.max() > max(Kind):
        raise FormatError(
            f"{names.TOKEN_TYPE} has values {kinds.min()} to {kinds.max()}; expected 1 to {max(Kind)}"
        )
    return kinds


def _byte_ids(texts: list[str], kinds: np.ndarray) -> dict[int, int]:
    """byte -> token, for tokens of kind BYTE, written <0x0A>."""
    byte_ids = {}
    for number in np.flatnonzero(kinds == Kind.BYTE).tolist():
        text = texts[number]
        if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            raise FormatError(
                f"{names.TOKENS}[{number}] is a byte token and reads {text[:80]!r}; expected <0x00> to <0xFF>"
            )
        byte_ids[int(text[3:5], 16)] = number
    return byte_ids


def _scores(metadata: Mapping[str, object], count: int) -> list[float]:
    scores = _numbers(metadata, names.SCORES, count, "iuf")
    if np.isnan(scores).any():
        raise FormatError(
            f"{names.SCORES}[{int(np.isnan(scores).argmax())}] is not a number; expected finite scores"
        )
    return scores.tolist()


def _merges(metadata: Mapping[str, object]) -> list[str]:
    merges = metadata.get(names.MERGES)
    if merges is None:
        raise FormatError(f"{names.MERGES} is missing; a gpt2 vocabulary needs it, convert the model again")
    if not _all_text(merges):
        raise FormatError(f"{names.MERGES} is {_found(merges)}; expected a list of strings")
    # Counting at once is cheap; where faults cancel out, those lines never match a pair. What merges make is
    # checked when they are used, since looking up each costs 100 ms for Llama 3.
    if "".join(merges).count(" ") != len(merges):
        number = next(number for number, merge in enumerate(merges) if merge.count(" ") != 1)
        raise FormatError(
            f"{names.MERGES}[{number}] is {merges[number][:80]!r}; expected two pieces and one space"
        )
    return list(merges)


def _numbers(metadata: Mapping[str, object], key: str, count: int, number_kinds: str) -> np.ndarray:
    if key not in metadata:
        raise FormatError(f"{key} is missing; expected {count} numbers, one for each token")
    value = metadata[key]
    if isinstance(value, list) and set(map(type, value)) <= {int, float}:
        value = np.asarray(value)
    array = value if isinstance(value, np.ndarray) else np.zeros(())
    if array.ndim != 1 or array.dtype.kind not in number_kinds:
        raise FormatError(f"{key} is {_found(value)}; expected {count} numbers, one for each token")
    if len(array) != count:
        raise FormatError(f"{key} has {len(array)} values, but {names.TOKENS} has {count} tokens")
    return array


def _id(metadata: Mapping[str, object], key: str, count: int, default: int | None) -> int | None:
    value = metadata.get(key)
    if value is None:
        return default if default is not None and default < count else None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise FormatError(f"{key} is {_found(value)}; expected a token id below {count}")
    if not 0 <= value < count:
        raise FormatError(f"{key} is {value}; expected a token id below {count}")
    return int(value)


def _adds(metadata: Mapping[str, object], key: str, default: bool, number: int | None, id_key: str) -> bool:
    adds = _flag(metadata, key, default)
    if adds and number is None and key in metadata:
        raise FormatError(f"{key} is true, but {id_key} is missing; expected the id of the token to add")
    return adds and number is not None


def _flag(metadata: Mapping[str, object], key: str, default: bool) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, (bool, np.bool_)):
        raise FormatError(f"{key} is {_found(value)}; expected true or false")
    return bool(value)


def _text(metadata: Mapping[str, object], key: str, default: str | None = None) -> str:
    value = metadata.get(key, default)
    if value is None:
        raise FormatError(f"{key} is missing; the file has no tokenizer, convert the model again")
    if not isinstance(value, str):
        raise FormatError(f"{key} is {_found(value)}; expected a string")
    return value


def _all_text(value: object) -> bool:
    return isinstance(value, (list, tuple)) and set(map(type, value)) <= {str}


def _found(value: object) -> str:
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return f"an array of {len(value)} values"
    return repr(value)[:80]
