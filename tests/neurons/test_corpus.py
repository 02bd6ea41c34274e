"""Calibration text: the same windows however much of it is read, and clear words for what is no text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from pyinfer.errors import InputError
from pyinfer.neurons import corpus as module
from pyinfer.neurons.corpus import read_corpus

BOS = 99


class Letters:
    """A tokenizer whose tokens are the letters."""

    bos_id = BOS

    def __init__(self, add_bos: bool = True) -> None:
        self.add_bos = add_bos
        self.parts: list[str] = []

    def encode(self, text: str, *, bos: bool) -> list[int]:
        assert bos is False
        self.parts.append(text)
        return [ord(letter) for letter in text]


def read(path: Path, window: int = 8, most: int = 1000, **options):
    return read_corpus(path, Letters(**options), window, most)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "text.txt"


def test_windows_begin_with_the_begin_token(path: Path) -> None:
    path.write_text("abcdefghij\nklmnop", encoding="utf-8")
    found = read(path)
    assert [window.tolist() for window in found.windows] == [
        [BOS, *map(ord, "abcdefg")],
        [BOS, *map(ord, "hij\nklm")],
        [BOS, *map(ord, "nop")],
    ]
    assert found.tokens == 17 + 3 and found.name == "text.txt"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(window.dtype == np.int32 for window in found.windows)
    plain = read(path, add_bos=False)
    assert [len(window) for window in plain.windows] == [8, 8, 1]


def test_fewer_windows_are_the_first_ones(path: Path) -> None:
    """So that counting more of a text later goes on where it ended; its hash is always of all of it."""
    path.write_text("".join(f"line {number}\n" for number in range(40_000)), encoding="utf-8")
    whole = read(path, most=1 << 40)
    assert whole.tokens == path.stat().st_size + len(whole.windows)
    for most in (0, 1, 7, 9000):
        few = read(path, most=most)
        assert len(few.windows) == most and few.sha256 == whole.sha256
        assert all(np.array_equal(*pair) for pair in zip(few.windows, whole.windows))


def test_text_is_cut_at_line_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(module, "_MOST_PART", 40)
    text = "one\ntwo two two\n\n" + "x" * 100 + "\n\u00e9\u20ac\U0001f600" * 20
    path.write_text(text, encoding="utf-8", newline="")
    letters = Letters()
    read_corpus(path, letters, 8, 1000)  # type: ignore[arg-type]
    assert "".join(letters.parts) == text and len(letters.parts) > 5
    cuts = [part for part in letters.parts[:-1] if not part.endswith("\n")]
    assert all(len(part) > 40 and set(part) == {"x"} for part in cuts) and len(cuts) < 4


def test_a_byte_order_mark_is_no_text(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbfab")
    assert read(path).windows[0].tolist() == [BOS, ord("a"), ord("b")]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty, expected a plain text file"),
        (b"\xef\xbb\xbf", "holds no text"),
        (b"ab\0c", "byte 2 is 0, expected plain text in UTF-8; is it a binary file?"),
        (b"ab\n" * 50_000 + b"\0", "byte 150000 is 0"),
        (b"abc\xff\n", "byte 3 is not valid UTF-8, expected plain text"),
        (b"a" * 65_535 + b"\xe2\x82", "byte 65535 is not valid UTF-8"),
        (b"a" * 65_535 + b"\xe2\x82\xacb\xe2x", "byte 65539 is not valid UTF-8"),
        (b"a" * 65_535 + b"\xe2z", "byte 65535 is not valid UTF-8"),
        ("text".encode("utf-16-le"), "byte 1 is 0"),
    ],
)
def test_what_is_no_text(path: Path, data: bytes, words: str) -> None:
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read(path)
    assert words in str(caught.value) and str(caught.value).startswith(f"{path}: ")


def test_what_cannot_be_read(tmp_path: Path, path: Path) -> None:
    for place in (path, tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read(place)
    path.write_bytes(b"text")
    with pytest.raises(InputError, match="windows of 1 tokens have no room"):
        read(path, window=1)
