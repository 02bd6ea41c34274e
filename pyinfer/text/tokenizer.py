"""Text to token ids and back, from the metadata of a GGUF file.

Special tokens are cut out of a text first, longest first; what lies between goes to the word encoder of the
vocabulary's model. The encoder is made at the first use: decoding does not need it.

Source: llama.cpp (llama-vocab.cpp) for the order of these steps and for the space that `llama` vocabularies
put in front of a text; `tokenizers` cuts words for byte-level vocabularies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from pyinfer import names
from pyinfer.errors import FormatError, InputError
from pyinfer.text.merging import BYTE_OF_CHAR, SPACE, ByteLevelEncoder, SentencePieceEncoder
from pyinfer.text.stream import StreamDecoder
from pyinfer.text.vocabulary import SENTENCEPIECE, Vocabulary, read_vocabulary

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Tokenizer of one model.

    >>> tokenizer = Tokenizer.from_metadata(file.metadata)  # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode("Hello"))  # doctest: +SKIP
    'Hello'
    """

    def __init__(self, vocabulary: Vocabulary, chat_template: str | None = None):
        self._vocabulary = vocabulary
        self.chat_template = chat_template
        self.vocab_size = len(vocabulary.texts)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.end_ids = vocabulary.end_ids
        self.add_bos = vocabulary.add_bos
        self.add_eos = vocabulary.add_eos
        self._is_sentencepiece = vocabulary.model == SENTENCEPIECE
        self._byte_of = {number: byte for byte, number in vocabulary.bytes.items()}
        self._plain = vocabulary.control.union(vocabulary.user_defined)  # their texts are written as they are

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """From the metadata of a GGUF file; FormatError or UnsupportedError names the key at fault."""
        template = metadata.get(names.CHAT_TEMPLATE)
        if template is not None and not isinstance(template, str):
            raise FormatError(f"{names.CHAT_TEMPLATE} is a {type(template).__name__}; expected a string")
        return cls(read_vocabulary(metadata), template)

    def encode(
        self, text: str, *, bos: bool | None = None, special: bool = False, mark: str = ""
    ) -> list[int]:
        """Token ids of a text.

        bos: put the begin token in front; None: begin and end tokens as the model wants. special: texts of
        control tokens become these tokens; otherwise they stay text. mark: dropped from the text once
        control tokens are found, so that one with a mark inside stays text.
        """
        ids: list[int] = []
        if bos or (bos is None and self.add_bos):
            if self.bos_id is None:
                raise InputError(
                    f"this model has no begin token ({names.BOS_TOKEN_ID} is missing); use bos=False"
                )
            ids.append(self.bos_id)
        after_special = True
        for part in self._parts(_SURROGATE.sub("\ufffd", text), special, mark):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
            else:
                prefixed = after_special and self._vocabulary.add_space_prefix
                ids.extend(self._encoder.encode(" " + part if prefixed else part))
                after_special = False
        if bos is None and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of token ids; special: control tokens show their text instead of nothing.

        The space that encode puts behind a begin token is dropped where ids start with it; ids that do not
        are taken as the continuation of a text, whose leading space counts.
        """
        stream = self.stream(special=special)
        return "".join([stream.push(number) for number in ids]) + stream.finish()

    def stream(self, *, special: bool = False) -> StreamDecoder:
        """A decoder that takes one id at a time; its joined output is decode(ids)."""
        shown = self.token_bytes if special else self._shown_bytes
        return StreamDecoder(shown, self.bos_id if self._vocabulary.add_space_prefix else None)

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token stands for; of a control token, its name."""
        if not 0 <= token < self.vocab_size:
            raise InputError(f"token {token} is not in the vocabulary; expected 0 to {self.vocab_size - 1}")
        text = self._vocabulary.texts[token]
        if token in self._plain:
            return text.encode("utf-8", "replace")
        if self._is_sentencepiece:
            byte = self._byte_of.get(token)
            return text.replace(SPACE, " ").encode("utf-8", "replace") if byte is None else bytes((byte,))
        try:
            return (
                text.translate(BYTE_OF_CHAR).encode("latin-1") if text.isprintable() else _mixed_bytes(text)
            )
        except UnicodeEncodeError:
            return _mixed_bytes(text)

    def token_text(self, token: int | None) -> str:
        """The name of a token in the vocabulary, as templates write it; empty for None."""
        return "" if token is None else self._vocabulary.texts[token]

    @cached_property
    def control_texts(self) -> frozenset[str]:
        """Texts that become control tokens with encode(special=True)."""
        return frozenset(self._vocabulary.texts[number] for number in self._vocabulary.control)

    def _shown_bytes(self, token: int) -> bytes:
        return b"" if token in self._vocabulary.control else self.token_bytes(token)

    @cached_property
    def _encoder(self) -> ByteLevelEncoder | SentencePieceEncoder:
        make = SentencePieceEncoder if self._is_sentencepiece else ByteLevelEncoder
        return make(self._vocabulary)

    @cached_property
    def _specials(self) -> dict[bool, list[int]]:
        """Ids to look for in a text, longest text first: with control tokens (True) or without."""
        texts = self._vocabulary.texts
        both = sorted(
            self._plain, key=lambda number: (-len(texts[number].encode("utf-8", "replace")), number)
        )
        return {True: both, False: [number for number in both if number not in self._vocabulary.control]}

    def _parts(self, text: str, special: bool, mark: str) -> list[str | int]:
        parts = self._cut([text] if text else [], text, self._specials[special])
        if not mark:
            return parts
        whole: list[str | int] = []
        for part in parts:
            if isinstance(part, int) or mark not in part:
                whole.append(part)
            elif part := part.replace(mark, ""):
                whole.extend(self._cut([part], part, self._specials[False]))
        return whole

    def _cut(self, parts: list[str | int], text: str, specials: Sequence[int]) -> list[str | int]:
        for number in specials:
            name = self._vocabulary.texts[number]
            if name not in text:
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                first, *others = part.split(name)
                for piece in ([first] if first else []), *(([number, p] if p else [number]) for p in others):
                    cut.extend(piece)
            parts = cut
        return parts


def _mixed_bytes(text: str) -> bytes:
    """Bytes of a byte-level token with characters outside of the alphabet, which stand for themselves."""
    return b"".join(
        bytes((BYTE_OF_CHAR[ord(char)],)) if ord(char) in BYTE_OF_CHAR else char.encode("utf-8", "replace")
        for char in text
    )
