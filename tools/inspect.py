"""pyinfer-inspect: what a GGUF file holds, and the program that pyinfer makes of it."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import click
import numpy as np

from pyinfer.errors import FormatError, PyInferError
from pyinfer.gguf_file import GGUFFile, open_gguf
from pyinfer.model_store import find_model
from pyinfer.progress import format_amount
from pyinfer.section import body_bytes, read_section

_SHOWN_ITEMS = 6
_SHOWN_CHARACTERS = 72


def describe(file: GGUFFile) -> dict[str, Any]:
    """Everything that is shown, as JSON values; of long arrays only the length and the first items."""
    tensors = [
        {"name": each.name, "type": each.type.name, "shape": list(each.shape), "bytes": each.nbytes}
        for each in file.tensors.values()
    ]
    types: dict[str, dict[str, int]] = {}
    for each in file.tensors.values():
        total = types.setdefault(each.type.name, {"tensors": 0, "elements": 0, "bytes": 0})
        total["tensors"] += 1
        total["elements"] += each.columns * each.rows
        total["bytes"] += each.nbytes
    program, reason = _program(file)
    section, problem = _section(file)
    return {
        "file": str(file.path),
        "version": file.version,
        "bytes": file.file_bytes,
        "metadata": {key: _plain(value) for key, value in file.metadata.items()},
        "tensors": tensors,
        "types": types,
        "section": section,
        "section_error": problem,
        "program": program,
        "program_error": reason,
    }


def report(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"{found['file']}: GGUF version {found['version']}, {format_amount(found['bytes'], 'bytes')}, "
        f"{len(found['metadata'])} metadata keys, {len(found['tensors'])} tensors",
        "",
        "Metadata",
        *_table([(_printable(key), _shown(value)) for key, value in found["metadata"].items()]),
        "",
        "Tensors",
        *_table([(_printable(each["name"]), *_tensor_cells(each)) for each in found["tensors"]]),
        "",
        "Types",
        *_table([(name, *_total_cells(total)) for name, total in found["types"].items()]),
        *_section_lines(found["section"], found["section_error"]),
        "",
        "Program",
    ]
    if found["program"] is None:
        lines.append(f"  none: {_printable(found['program_error'])}")
    else:
        lines += [f"  {line}" for line in found["program"].splitlines()]
    return "\n".join(lines)


def _program(file: GGUFFile) -> tuple[str | None, str | None]:
    # Families bring the whole engine with them, which takes longer to import than most files take to read.
    from pyinfer.models import program_text

    try:
        return program_text(file), None
    except PyInferError as error:
        return None, str(error)


def _section(file: GGUFFile) -> tuple[dict[str, Any] | None, str | None]:
    try:
        section = read_section(file)
    except FormatError as error:
        return None, str(error)
    if section is None:
        return None, None
    entries = {
        name: {
            "info": entry.info,
            "arrays": {
                key: {"type": array.dtype.name, "shape": list(array.shape), "bytes": array.nbytes}
                for key, array in entry.arrays.items()
            },
        }
        for name, entry in section.entries.items()
    }
    return {"version": section.version, "begin": body_bytes(file), "entries": entries}, None


def _section_lines(section: dict[str, Any] | None, problem: str | None) -> list[str]:
    if section is None:
        return ["", "Placement section", f"  none: {_printable(problem)}"] if problem else []
    lines = ["", f"Placement section, version {section['version']}, from byte {section['begin']} on"]
    for name, entry in section["entries"].items():
        lines.append(f"  {_printable(name)}")
        rows = [(f"  {_printable(key)}", _shown_json(value)) for key, value in entry["info"].items()]
        lines += _table(rows)
        lines += _table(
            [(f"  {_printable(key)}", *_array_cells(each)) for key, each in entry["arrays"].items()]
        )
    return lines


def _shown_json(value: object) -> str:
    return _shown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _array_cells(array: dict[str, Any]) -> tuple[str, ...]:
    return (
        array["type"],
        " x ".join(map(str, array["shape"])) or "one",
        format_amount(array["bytes"], "bytes"),
    )


def _plain(value: object) -> object:
    """A metadata value as JSON has it, which knows no NaN and no arrays of NumPy."""
    if isinstance(value, (list, np.ndarray)):
        items = [_plain(item) for item in value[:_SHOWN_ITEMS]]
        return items if len(value) <= _SHOWN_ITEMS else {"length": len(value), "first": items}
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['length']} items: {_shown(value['first'])[:-1]}, ...]"
    if isinstance(value, list):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if not isinstance(value, str):
        return str(value)
    text = _printable(value[: _SHOWN_CHARACTERS + 1])
    return (
        text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({len(value)} characters)"
    )


def _printable(text: str) -> str:
    """A file's text must neither move the cursor of a terminal nor break a line."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _tensor_cells(tensor: dict[str, Any]) -> tuple[str, ...]:
    shape = " x ".join(str(length) for length in tensor["shape"])
    return tensor["type"], shape, format_amount(tensor["bytes"], "bytes")


def _total_cells(total: dict[str, int]) -> tuple[str, ...]:
    bits = 8 * total["bytes"] / total["elements"]
    size = format_amount(total["bytes"], "bytes")
    count = f"{total['tensors']} tensor{'s' if total['tensors'] > 1 else ''}"
    return count, f"{total['elements']} elements", size, f"{bits:.4g} bits each"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows with their columns one under the other; the last column may be as long as it likes."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)][:-1]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append(("  " + "  ".join([*cells, row[-1]])).rstrip())
    return lines


@click.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(file: str, as_json: bool) -> None:
    """Show metadata, tensors, their types and sizes, and the program of a GGUF FILE."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a vocabulary has letters that not every terminal has
    try:
        with open_gguf(find_model(file, offline=True)) as opened:
            found = describe(opened)
    except PyInferError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(found, ensure_ascii=False) if as_json else report(found))


if __name__ == "__main__":
    main()
