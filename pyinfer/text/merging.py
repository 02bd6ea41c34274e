"""Words to token ids: byte-level BPE and SentencePiece BPE, both by merging neighbours, best pair first.

The dictionaries of the vocabulary are used as they are. Building the merge table of the `tokenizers`
library from them costs 45 ms for 49k tokens and over a second for a 262k SentencePiece vocabulary, at every
start of a program; words repeat, so a cache makes the encoding itself as fast.

Source: Sennrich et al. 2016 (BPE); sentencepiece (bpe_model) and llama.cpp (llama-vocab.cpp) for the order
of ties.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable

from pyinfer import names
from pyinfer.errors import FormatError, InputError
from pyinfer.text.vocabulary import Vocabulary

SPACE = "\u2581"  # how SentencePiece writes a space
_CACHED_WORDS = 1 << 16
_CACHED_CHARS = 64


def _byte_alphabet() -> dict[int, str]:
    """Byte -> the printable character that GPT-2 vocabularies write for it."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


CHAR_OF_BYTE = _byte_alphabet()
BYTE_OF_CHAR = {ord(char): byte for byte, char in CHAR_OF_BYTE.items()}


def merge(symbols: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Joins neighbours until no pair has a rank: lowest rank first, of equals the leftmost. O(n log n)."""
    count = len(symbols)
    queue = []
    for place in range(count - 1):
        found = rank(symbols[place], symbols[place + 1])
        if found is not None:
            queue.append((found, place, len(symbols[place]) + len(symbols[place + 1])))
    heapq.heapify(queue)
    before, after = list(range(-1, count - 1)), list(range(1, count + 1))
    while queue:
        _, place, chars = heapq.heappop(queue)
        next_place = after[place]
        # A pair only ever grows: other length means that one of the two was merged since.
        if (
            not symbols[place]
            or next_place >= count
            or len(symbols[place]) + len(symbols[next_place]) != chars
        ):
            continue
        symbols[place] += symbols[next_place]
        symbols[next_place] = ""
        after[place] = next_place = after[next_place]
        if next_place < count:
            before[next_place] = place
        for left, right in ((before[place], place), (place, next_place)):
            if left >= 0 and right < count:
                found = rank(symbols[left], symbols[right])
                if found is not None:
                    heapq.heappush(queue, (found, left, len(symbols[left]) + len(symbols[right])))
    return [symbol for symbol in symbols if symbol]


class _WordEncoder:
    """Encodes a text word by word, remembering short words."""

    def __init__(self, vocabulary: Vocabulary):
        self._pieces = vocabulary.pieces
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that contains no special token."""
        ids: list[int] = []
        cache = self._cache
        for word in self._words(text):
            found = cache.get(word)
            if found is None:
                found = tuple(self._encode_word(word))
                if len(word) <= _CACHED_CHARS:
                    if len(cache) >= _CACHED_WORDS:
                        cache.clear()
                    cache[word] = found
            ids.extend(found)
        return ids

    def _words(self, text: str) -> Iterable[str]:
        raise NotImplementedError

    def _encode_word(self, word: str) -> Iterable[int]:
        raise NotImplementedError


class ByteLevelEncoder(_WordEncoder):
    """`gpt2`: words by regular expression, symbols are bytes, merges have ranks."""

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        from tokenizers import Regex, pre_tokenizers

        row = vocabulary.pretokenizer
        assert row is not None
        self._ignore_merges = row.ignore_merges
        numbers = range(len(vocabulary.merges) - 1, -1, -1)
        self._ranks = dict(
            zip(reversed(vocabulary.merges), numbers, strict=True)
        )  # of equals the first stays
        self._splitter = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in row.patterns]
        )

    def _words(self, text: str) -> Iterable[str]:
        try:
            return [word for word, _ in self._splitter.pre_tokenize_str(text)]
        except (
            BaseException
        ) as error:  # the regex engine gives up on some texts with a panic, which is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise InputError(
                f"a text of {len(text)} characters cannot be cut into words; cut it into smaller parts"
            ) from None

    def _encode_word(self, word: str) -> Iterable[int]:
        symbols = word.encode().decode("latin-1").translate(CHAR_OF_BYTE)
        if self._ignore_merges and symbols in self._pieces:
            return [self._pieces[symbols]]
        ranks = self._ranks
        merged = merge(list(symbols), lambda left, right: ranks.get(f"{left} {right}"))
        ids = []
        for symbol in merged:
            number = self._pieces.get(symbol)
            if number is not None:
                ids.append(number)
            elif len(symbol) > 1:
                raise FormatError(
                    f"{names.MERGES} makes {symbol!r}, which is no ordinary token of {names.TOKENS}"
                )
            # A byte that the vocabulary lacks (SmolLM2 lacks 21) has no token and vanishes, as in llama.cpp.
        return ids


class SentencePieceEncoder(_WordEncoder):
    """`llama`: symbols are characters, a pair may merge if the result is a token, best score first."""

    def __init__(self, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        self._scores = vocabulary.scores
        self._bytes = vocabulary.bytes
        self._unknown_id = vocabulary.unknown_id
        if len(self._bytes) < 256 and self._unknown_id is None:
            raise FormatError(
                f"{names.TOKENS} has {len(self._bytes)} byte tokens of 256 and "
                f"{names.UNKNOWN_TOKEN_ID} is missing; expected one or the other"
            )
        # If no token has a space after another character, no merge crosses such a place: words can be cached.
        joined = "\0".join(vocabulary.pieces)
        crosses = re.search(f"[^{SPACE}\0]{SPACE}", joined) or joined.count("\0") >= len(vocabulary.pieces)
        self._word = re.compile("(?s).+" if crosses else f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+")

    def _words(self, text: str) -> Iterable[str]:
        return self._word.findall(text.replace(" ", SPACE))

    def _encode_word(self, word: str) -> Iterable[int]:
        ids: list[int] = []
        for symbol in merge(list(word), self._rank):
            number = self._pieces.get(symbol)
            if number is not None:
                ids.append(number)
                continue
            for byte in symbol.encode():
                number = self._bytes.get(byte, self._unknown_id)
                # A run of unknown characters is one unknown token.
                if number is not None and not (number == self._unknown_id and ids and ids[-1] == number):
                    ids.append(number)
        return ids

    def _rank(self, left: str, right: str) -> float | None:
        number = self._pieces.get(left + right)
        return None if number is None else -self._scores[number]
