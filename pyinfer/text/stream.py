"""Token ids to text, one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Turns ids into text as they come: `push` returns what is certain, `finish` the rest.

    A character whose bytes are spread over several tokens is returned whole by the push of its last byte;
    bytes that are no UTF-8 become U+FFFD. The pushes and the finish joined are the decoded text of all ids.
    """

    def __init__(self, piece: Callable[[int], bytes], space_after: int | None = None):
        """piece: bytes that a token shows, empty if none. space_after: where this token comes first, the
        space behind it is the encoder's and is dropped.
        """
        self._piece = piece
        self._space_after = space_after
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._started = False
        self._drops_space = False

    def push(self, token: int) -> str:
        """Text that this token completes, possibly empty."""
        piece = self._piece(token)
        if not self._started:
            self._started = True
            self._drops_space = token == self._space_after
        elif self._drops_space and piece:
            self._drops_space = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD for an unfinished character. Then it starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._started = self._drops_space = False
        return rest
