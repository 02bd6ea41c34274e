"""GGUF files that lie: each is refused with place, found and expected, before any allocation."""

from __future__ import annotations

import contextlib
import gc
import random
import struct
import tracemalloc
from pathlib import Path

import gguf_samples as samples
import pytest
from gguf_samples import array_pair, pair, raw_gguf, tensor, text, u32_pair

from pyinfer import names
from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.gguf_file import GGUFFile, open_gguf
from pyinfer.gguf_metadata import read_header
from pyinfer.names import BLOCK

ONE = tensor("w", (8,))
BAD = {
    "empty": (b"", FormatError, "is empty"),
    "short": (b"GG", FormatError, r"byte 0 says b'GG', expected b'GGUF'"),
    "only magic": (b"GGUF", FormatError, r"ends at byte 4, expected 24"),
    "magic": (b"GGML" + raw_gguf()[4:], FormatError, r"byte 0 says b'GGML', expected b'GGUF'"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", FormatError, "git lfs pull"),
    "powerinfer": (b"PWRI" + raw_gguf(version=0)[4:], FormatError, "version 0, expected 2 or 3"),
    "version 0": (raw_gguf(version=0), FormatError, "version 0, expected 2 or 3"),
    "version 1": (raw_gguf(version=1), UnsupportedError, "version 1 is too old, expected 2 or 3"),
    "version 4": (raw_gguf(version=4), UnsupportedError, "version 4 is newer than pyinfer, expected 2 or 3"),
    "version junk": (raw_gguf(version=0x41414141), FormatError, "expected 2 or 3"),
    "big endian": (raw_gguf(version=3 << 24), UnsupportedError, "big endian"),
    "tensor count": (
        raw_gguf(counts=(2**63, 0)),
        FormatError,
        r"tensor count at byte 8 counts 9223372036854775808",
    ),
    "pair count": (
        raw_gguf(counts=(0, 2**60)),
        FormatError,
        r"metadata count at byte 16 counts 1152921504606846976",
    ),
    "key length": (
        raw_gguf((struct.pack("<Q", 2**60) + b"k" * 99,)),
        FormatError,
        r"key at byte 24 has 1152921504",
    ),
    "key utf-8": (
        raw_gguf((pair(b"\xff\xfe", 0, b"\0"),)),
        FormatError,
        r"key at byte 24 is not valid UTF-8",
    ),
    "key twice": (
        raw_gguf((u32_pair("k", 1), u32_pair("k", 2))),
        FormatError,
        r"key k at byte 41 occurs twice",
    ),
    "value type": (
        raw_gguf((pair("k.x", 13, b"\0" * 8),)),
        UnsupportedError,
        r"k\.x at byte 35 has value type 13",
    ),
    "string length": (
        raw_gguf((pair("k", 8, struct.pack("<Q", 2**60) + b"x" * 32),)),
        FormatError,
        r"k at byte 45 needs 1152921504606846976 bytes, expected at most the 51",
    ),
    "string utf-8": (
        raw_gguf((pair("k", 8, text(b"ab\xc3")),)),
        FormatError,
        r"k at byte 37 is not valid UTF-8",
    ),
    "array count": (
        raw_gguf((array_pair("k", 5, 2**61, b"\0" * 64),)),
        FormatError,
        r"k at byte 41 counts 2305843009213693952, expected at most 19",
    ),
    "string array count": (
        raw_gguf((array_pair("k", 8, 2**50, text("a")),)),
        FormatError,
        r"k at byte 41 counts 1125899906842624",
    ),
    "string in array": (
        raw_gguf((array_pair("k", 8, 2, text("ab") + struct.pack("<Q", 2**60)),), alignment=1),
        FormatError,
        r"k\[1\] at byte 67 needs 1152921504606846976",
    ),
    "utf-8 in array": (
        raw_gguf((array_pair("k", 8, 2, text("ab") + text(b"\x80")),)),
        FormatError,
        r"k\[1\] at byte 59 is not",
    ),
    "array type": (
        raw_gguf((array_pair("k", 77, 1, b"\0" * 64),)),
        UnsupportedError,
        r"k at byte 37 has value type 77",
    ),
    "array depth": (
        raw_gguf((array_pair("k", 9, 1, struct.pack("<IQ", 9, 1) * 5000),)),
        UnsupportedError,
        "nests arrays, expected at most 4",
    ),
    "alignment 0": (
        raw_gguf((u32_pair(names.ALIGNMENT, 0),)),
        FormatError,
        r"general\.alignment is 0, expected a power",
    ),
    "alignment 24": (raw_gguf((u32_pair(names.ALIGNMENT, 24),)), FormatError, r"alignment is 24"),
    "alignment text": (
        raw_gguf((pair(names.ALIGNMENT, 8, text("32")),)),
        FormatError,
        r"expected a power of two",
    ),
    "alignment array": (
        raw_gguf((array_pair(names.ALIGNMENT, 4, 0, b""),)),
        FormatError,
        r"is an array, expected",
    ),
    "alignment huge": (
        raw_gguf((u32_pair(names.ALIGNMENT, 2**31),), (ONE,), b"\0" * 32),
        FormatError,
        r"tensor w .* takes bytes 2147483648 to",
    ),
    "no dimensions": (
        raw_gguf((), (tensor("w", ()),), b"\0" * 32),
        FormatError,
        r"tensor w has 0 dimensions at byte 33",
    ),
    "dimensions": (
        raw_gguf((), (text("w") + struct.pack("<I", 2**32 - 1) + b"\0" * 64,)),
        FormatError,
        r"tensor w has 4294967295 dimensions at byte 33, expected 1 to 4",
    ),
    "dimension 0": (raw_gguf((), (tensor("w", (8, 0)),), b"\0" * 32), FormatError, r"shape \(8, 0\)"),
    "product": (
        raw_gguf((), (tensor("w", (2**32, 2**32, 2**32, 4)),), b"\0" * 32),
        FormatError,
        r"takes bytes 96 to 1267650600228229401496703205472",
    ),
    "product wraps to 0": (
        raw_gguf((), (tensor("w", (2**62, 4)),), b"\0" * 32),
        FormatError,
        r"tensor w .* takes bytes",
    ),
    "type": (raw_gguf((), (tensor("w", (8,), 99),), b"\0" * 32), UnsupportedError, r"tensor w has type 99"),
    "type withdrawn": (
        raw_gguf((), (tensor("w", (32,), 31),), b"\0" * 32),
        UnsupportedError,
        r"w has type Q4_0_4_4",
    ),
    "ragged block": (
        raw_gguf((), (tensor("w", (48,), 2),), b"\0" * 64),
        FormatError,
        r"w has 48 columns.*32 as Q4_0",
    ),
    "past the end": (
        raw_gguf((), (ONE,), b"\0" * 31),
        FormatError,
        r"tensor w .* takes bytes 64 to 96, expected to end within the file's 95 bytes",
    ),
    "offset huge": (
        raw_gguf((), (tensor("w", (8,), 0, 2**64 - 32),), b"\0" * 32),
        FormatError,
        r"tensor w .* takes bytes 18446744073709551648",
    ),
    "misaligned": (
        raw_gguf((), (tensor("w", (8,), 0, 4),), b"\0" * 64),
        FormatError,
        r"tensor w has offset 4, expected a multiple of 32",
    ),
    "overlap": (
        raw_gguf((), (tensor("b", (8,), 0, 32), tensor("a", (16,), 0, 0)), b"\0" * 64),
        FormatError,
        r"tensor b starts at byte \d+, inside tensor a",
    ),
    "same place": (
        raw_gguf((), (ONE, tensor("v", (8,))), b"\0" * 32),
        FormatError,
        r"tensor v starts .* inside tensor w",
    ),
    "name twice": (
        raw_gguf((), (ONE, tensor("w", (8,), 0, 32)), b"\0" * 64),
        FormatError,
        r"tensor w occurs twice",
    ),
    "name length": (
        raw_gguf((), (struct.pack("<Q", 2**60) + b"w" * 64,)),
        FormatError,
        r"tensor name at byte 24 has 1152921504606846976 bytes",
    ),
    "name utf-8": (
        raw_gguf((), (tensor(b"\xc0\x80", (8,)),), b"\0" * 32),
        FormatError,
        r"tensor name at byte 24 is not",
    ),
    "split count": (
        raw_gguf((u32_pair(names.SPLIT_COUNT, 3),)),
        FormatError,
        r"holds part 1 of 3.*00001-of-00003\.gguf",
    ),
    "split no": (
        raw_gguf((u32_pair(names.SPLIT_COUNT, 3), pair(names.SPLIT_NO, 8, text("x")))),
        FormatError,
        r"split\.no is not a count",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_place_found_and_expected(tmp_path: Path, case: str) -> None:
    content, error, words = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert message.startswith("bad.gguf: ") and "\n" not in message and len(message) < 400


def test_names_in_errors_stay_short_and_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw_gguf((pair("a\nb\x1b[31m" + "x" * 60000, 99, b"\0" * 8),)))
    with pytest.raises(UnsupportedError) as caught:
        open_gguf(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


EXTREMES = [
    0,
    1,
    2,
    3,
    4,
    5,
    8,
    9,
    13,
    31,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**60,
    2**63,
    2**64 - 1,
]


def mutations(content: bytes, seed: int):
    """Every truncation, and at every byte a flip, an extreme 32-bit and 64-bit number; then splices."""
    chance = random.Random(seed)
    for length in range(len(content)):
        yield content[:length]
    for at in range(len(content)):
        for _ in range(2):
            yield content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
        yield content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
        for form in ("<I", "<Q"):
            value = chance.choice(EXTREMES) % 2 ** (8 * struct.calcsize(form))
            yield content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]
    for _ in range(600):
        start, stop, target = (chance.randrange(len(content)) for _ in range(3))
        start, stop = sorted((start, stop))
        replaced = chance.randrange(2) * (stop - start)
        yield content[:target] + content[start:stop] + content[target + replaced :]


def assert_whole(file: GGUFFile, file_bytes: int) -> None:
    """What was accepted must be usable: every byte of every tensor can be read and sizes fit together."""
    assert file.file_bytes == file_bytes
    for name, each in file.tensors.items():
        elements, block_bytes = BLOCK[each.type]
        assert each.name == name and each.columns % elements == 0
        assert each.nbytes == each.columns * each.rows // elements * block_bytes == len(each.data.tobytes())


def test_thousands_of_mutations_raise_only_the_two_errors(tmp_path: Path) -> None:
    content = samples.write_tiny(tmp_path / "tiny.gguf").read_bytes()
    path = tmp_path / "mutant.gguf"
    count = accepted = 0
    reasons = set()
    for mutant in mutations(content, seed=20240229):
        path.write_bytes(mutant)
        count += 1
        try:
            with open_gguf(path) as file:
                assert_whole(file, len(mutant))
            accepted += 1
        except (FormatError, UnsupportedError) as error:
            assert str(error).startswith(path.name)
            reasons.add("".join(letter for letter in str(error) if not letter.isdigit())[12:40])
    assert count >= 2000 and 50 <= accepted < count // 2
    assert len(reasons) > 40  # the mutants reach many different checks


def test_a_lying_file_allocates_no_more_than_a_small_multiple_of_its_size(tmp_path: Path) -> None:
    content = samples.write_tiny(tmp_path / "tiny.gguf").read_bytes()
    chance = random.Random(5)
    gc.collect()
    tracemalloc.start()
    try:
        for mutant in chance.sample(list(mutations(content, seed=7)), 700):
            base = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            with contextlib.suppress(FormatError, UnsupportedError):
                read_header(mutant, "mutant")
            assert tracemalloc.get_traced_memory()[1] - base < 64 * len(content)
    finally:
        tracemalloc.stop()
