"""The placement section of a file, byte by byte; makes the example in docs/placement.md.

`python -m pyinfer_tools.section_dump model.gguf` shows a file's, without a name it writes the example.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from pyinfer.errors import FormatError, PyInferError
from pyinfer.gguf_file import open_gguf
from pyinfer.names import GGMLType
from pyinfer.section import Entry, Section, body_bytes, read_section, write_section
from pyinfer_convert.writer import TensorEntry, header

FILE = Path("docs") / "placement.md"  # of a checkout, in which the tool is run
BEGIN, END = "<!-- begin example -->", "<!-- end example -->"
_ROW, _MOST_ROWS = 16, 8
# Bytes and meaning; of numbers the value is shown, too.
_HEADER = (
    (8, "magic"),
    (4, "version:"),
    (4, "reserved, 0"),
    (8, "sequence:"),
    (8, "length of the section, bytes:"),
    (16, "hash of the model"),
    (8, "length of the directory, bytes:"),
    (4, "reserved, 0"),
    (4, "crc32 of the 60 bytes before"),
)
_FOOTER = (
    (8, "length of the section, bytes:"),
    (8, "sequence:"),
    (4, "version:"),
    (4, "crc32 of all bytes before"),
    (8, "magic"),
)


def dump(path: Path) -> str:
    """Lines of offset, bytes in hexadecimal, meaning; of long arrays only the first bytes.

    raises FormatError where there is no section, or a damaged one
    """
    with open_gguf(path) as file:
        section, begin, path = read_section(file), body_bytes(file), file.bodies[-1].path
    if section is None:
        raise FormatError(f"{path.name}: has no placement section")
    with open(path, "rb") as opened:
        opened.seek(begin)
        data = opened.read()
    return "\n".join(line for start, part, meaning in _fields(data) for line in _lines(start, part, meaning))


def _fields(data: bytes) -> Iterator[tuple[int, bytes, str]]:
    """Offset, bytes and meaning of everything in a (valid) section."""
    yield from _numbers(data, 0, _HEADER)
    length = int.from_bytes(data[48:56], "little")
    at = 64 + length
    text = data[64:at]
    yield 64, text, "directory"
    for name, entry in json.loads(text).items():
        for key, array in entry["arrays"].items():
            yield from _padding(data, at)
            at = -(-at // 32) * 32
            shape, dtype = array["shape"], np.dtype(array["type"])
            n_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            yield at, data[at : at + n_bytes], f"{name}, {key}: {array['type']} {shape}"
            at += n_bytes
    yield from _padding(data, at)
    yield from _numbers(data, -(-at // 32) * 32, _FOOTER)


def _numbers(data: bytes, at: int, fields: tuple[tuple[int, str], ...]) -> Iterator[tuple[int, bytes, str]]:
    for n_bytes, meaning in fields:
        part = data[at : at + n_bytes]
        number = f" {int.from_bytes(part, 'little')}" if meaning.endswith(":") else ""
        yield at, part, f"{meaning}{number}"
        at += n_bytes


def _padding(data: bytes, at: int) -> Iterator[tuple[int, bytes, str]]:
    end = -(-at // 32) * 32
    if end > at:
        yield at, data[at:end], "zeros up to a multiple of 32"


def _lines(start: int, part: bytes, meaning: str) -> Iterator[str]:
    rows = [part[at : at + _ROW] for at in range(0, len(part), _ROW)] or [b""]
    for number, row in enumerate(rows):
        if number == _MOST_ROWS and meaning != "directory":
            yield f"{'...':>5}"
            break
        # Text as text where that is what stands there.
        said = row.decode("ascii", "replace") if meaning in ("directory", "magic") else ""
        left = meaning if number == 0 else ""
        yield f"{start + number * _ROW:>5}  {row.hex(' '):<47}  {left:<10} {said}".rstrip()


def example() -> str:
    """The dump of a small section, behind a model of one tensor."""
    tensor = TensorEntry("output_norm.weight", (8,), GGMLType.F32)
    model = header({"general.architecture": "llama"}, [tensor]) + np.ones(8, "<f4").tobytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(model)
        counts = np.array([[300, 2, 0], [256, 511, 7]])
        entry = Entry({"tokens": 512}, {"counts": counts, "often": counts > 255})
        write_section(path, Section({"example": entry}))
        return dump(path)


def updated(text: str) -> str:
    """The document with the example as it is now."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise click.ClickException(f"{FILE.name}: has not the two lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n```\n{example()}\n```\n\n{END}{after}"


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
def main(file: Path | None) -> None:
    """Show FILE's placement section byte by byte; without FILE write the example in docs/placement.md."""
    if file is None:
        FILE.write_text(updated(FILE.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
        return
    try:
        print(dump(file))
    except PyInferError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
