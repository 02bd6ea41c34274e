"""Calibration text as windows of tokens: what a profile is counted on and predictors learn from.

Every window is a sequence of its own that begins with the model's begin token, if it wants one. Windows
depend on the text and the tokenizer alone, so counting may stop behind any of them and go on later.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyinfer.errors import InputError
from pyinfer.text.tokenizer import Tokenizer

WINDOW_TOKENS = 256
_BLOCK_BYTES = 1 << 16  # text is encoded in parts of about this size, cut at line ends
_MOST_PART = 1 << 20  # characters, where a text has no line ends


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text, cut into windows: int32 ids of at most the window's length, the begin token included.

    name : of its file;  sha256 : of the whole file, hexadecimal
    """

    name: str
    sha256: str
    windows: list[np.ndarray]

    @property
    def tokens(self) -> int:
        return sum(len(window) for window in self.windows)


def read_corpus(path: Path, tokenizer: Tokenizer, window_tokens: int, most_windows: int) -> Corpus:
    """The first windows of a text file.

    raises InputError where it cannot be read, is empty, or is no UTF-8 text
    """
    head = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    each = window_tokens - len(head)
    if each < 1:
        raise InputError(f"windows of {window_tokens} tokens have no room for text, expected at least 2")
    digest = hashlib.sha256()
    ids: list[int] = []
    for part in _parts(path, digest):
        if len(ids) < each * most_windows:
            ids += tokenizer.encode(part, bos=False)
    if not ids and most_windows:
        raise InputError(f"{path}: holds no text, expected a plain text file")
    cut = range(0, min(len(ids), each * most_windows), each)
    windows = [np.array(head + ids[start : start + each], np.int32) for start in cut]
    return Corpus(path.name, digest.hexdigest(), windows)


def _parts(path: Path, digest: hashlib._Hash) -> Iterator[str]:
    """The text in parts that end with a line; the same file always falls into the same parts."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    pending, done = "", 0
    try:
        with open(path, "rb") as file:
            while True:
                block = file.read(_BLOCK_BYTES)
                digest.update(block)
                if 0 in block:
                    raise _no_text(path, f"byte {done + block.index(0)} is 0")
                try:
                    text = decode(block, not block)
                except UnicodeDecodeError as error:  # of this block and up to three bytes of the one before
                    place = done + len(block) - len(error.object) + error.start
                    raise _no_text(path, f"byte {place} is not valid UTF-8") from None
                if not done:
                    text = text.removeprefix("\ufeff")
                done += len(block)
                pending += text
                end = pending.rfind("\n") + 1
                if not block or (not end and len(pending) > _MOST_PART):
                    end = len(pending)
                if end:
                    yield pending[:end]
                    pending = pending[end:]
                if not block:
                    break
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not done:
        raise InputError(f"{path}: the file is empty, expected a plain text file")


def _no_text(path: Path, why: str) -> InputError:
    return InputError(f"{path}: {why}, expected plain text in UTF-8; is it a binary file?")
