"""tokenizer.model: the vocabulary of the sentencepiece library, a protobuf message, read by hand.

Source: sentencepiece_model.proto (field numbers); the protobuf encoding (wire types).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.text.vocabulary import SENTENCEPIECE, Kind
from pyinfer_convert.vocab_draft import Draft

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_BPE = 2  # trainer_spec.model_type
_ROLES = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SAVE_AGAIN = "load the tokenizer with transformers and save it, which writes tokenizer.json"

Field = tuple[int, int, int | bytes]


def read_sentencepiece(data: bytes, where: str, *, normalized_elsewhere: bool = False) -> Draft:
    """The vocabulary of a sentencepiece BPE model.

    where : the file's name, for errors;  normalized_elsewhere : tokenizer.json says how text is normalized
    raises FormatError, UnsupportedError (other algorithms, text normalization)
    """
    draft = Draft(where, SENTENCEPIECE, add_space_prefix=True)
    draft.specials = {"unk": 0, "bos": 1, "eos": 2}
    model_type = 1
    for number, _, value in _fields(data, where):
        if number == _PIECES:
            _add_piece(draft, _message(value, where))
        elif number == _TRAINER:
            for field, _, setting in _fields(_message(value, where), where):
                if field == 3:
                    model_type = setting
                elif field in _ROLES and isinstance(setting, int):
                    draft.specials[_ROLES[field]] = setting - (1 << 64) if setting >> 63 else setting
                elif field == 24 and setting:
                    raise UnsupportedError(
                        f"{where}: whitespace is a suffix, expected SentencePiece's prefix"
                    )
        elif number == _NORMALIZER:
            _read_normalizer(draft, _message(value, where), normalized_elsewhere)
    if not draft.texts:
        raise FormatError(f"{where}: holds no tokens, expected a SentencePiece model; fetch it again")
    if model_type != _BPE:
        raise UnsupportedError(
            f"{where}: SentencePiece algorithm {model_type}, expected {_BPE} (BPE), which is all that "
            "pyinfer has"
        )
    draft.specials = {role: number for role, number in draft.specials.items() if number in draft.texts}
    return draft


def _add_piece(draft: Draft, message: bytes) -> None:
    text, score, kind = b"", 0.0, int(Kind.NORMAL)
    for number, _, value in _fields(message, draft.where):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value[:4].ljust(4, b"\0"))
        elif number == 3 and isinstance(value, int):
            kind = value
    number = len(draft.texts)
    try:
        piece, known = text.decode(), Kind(kind)
    except ValueError:
        raise FormatError(
            f"{draft.where}: piece {number} is {text[:40]!r} of type {kind}; fetch it again"
        ) from None
    if math.isnan(score):
        raise FormatError(f"{draft.where}: piece {number} ({text[:40]!r}) has a score that is not a number")
    draft.add(number, piece, known, score)
    if known == Kind.USER_DEFINED:
        draft.add_special(number, piece, special=False)


def _read_normalizer(draft: Draft, message: bytes, elsewhere: bool) -> None:
    settings = {number: value for number, _, value in _fields(message, draft.where)}
    draft.add_space_prefix = bool(settings.get(3, 1))
    if elsewhere:
        return
    changes = {2: "a table of characters to replace", 4: "repeated spaces removed"}
    for number, change in changes.items():
        # Removing spaces is what the library does unless told otherwise.
        if settings.get(number, 1 if number == 4 else b""):
            raise UnsupportedError(
                f"{draft.where}: text is normalized with {change}, which GGUF files cannot say; {_SAVE_AGAIN}"
            )
    if not settings.get(5, 1):
        raise UnsupportedError(f"{draft.where}: spaces are not escaped, expected a vocabulary as of Llama 2")


def _message(value: int | bytes, where: str) -> bytes:
    if not isinstance(value, bytes):
        raise FormatError(f"{where}: a number stands where a message should, expected a SentencePiece model")
    return value


def _fields(data: bytes, where: str) -> Iterator[Field]:
    """(field number, wire type, value) of a protobuf message; fixed-size values are bytes."""
    at = 0
    try:
        while at < len(data):
            tag, at = _varint(data, at)
            wire = tag & 7
            if wire == _VARINT:
                value, at = _varint(data, at)
                yield tag >> 3, wire, value
                continue
            if wire == _BYTES:
                length, at = _varint(data, at)
            elif wire in (_FIXED32, _FIXED64):
                length = 4 if wire == _FIXED32 else 8
            else:
                raise ValueError
            if length > len(data) - at:
                raise ValueError
            yield tag >> 3, wire, data[at : at + length]
            at += length
    except (IndexError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"{where}: byte {at} of a message of {len(data)} bytes makes no sense, expected a SentencePiece "
            "model; fetch it again"
        ) from None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise ValueError
