"""safetensors: 8 bytes of header length, a JSON header, the tensors one after the other.

Source: the safetensors format description (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.gguf_metadata import quoted
from pyinfer_convert.tensor_file import (
    DTYPES,
    MAX_DIMENSIONS,
    StoredTensor,
    TensorFile,
    is_shape,
    map_file,
    stored_bytes,
)

# The header of a 400B model has about 1 MB; a hostile one costs some 30 times its size while it is parsed.
MAX_HEADER_BYTES = 32 << 20
_METADATA = "__metadata__"


def open_safetensors(path: Path) -> TensorFile:
    """Open a safetensors file; every tensor's type, shape and place is checked before anything is read.

    raises FormatError (file, tensor, found, expected), UnsupportedError (element type), ModelNotFoundError
    """
    file_map = map_file(path, "a safetensors file")
    try:
        return TensorFile(path, file_map, _read_header(file_map, path.name))
    except BaseException:
        file_map.close()
        raise


def _read_header(file_map: mmap.mmap, file: str) -> dict[str, StoredTensor]:
    file_bytes = len(file_map)
    length = int.from_bytes(file_map[:8], "little")
    if file_bytes < 8 or length > file_bytes - 8:
        raise FormatError(
            f"{file}: says that its header has {length} bytes, but the file has {file_bytes} bytes; "
            "expected a whole safetensors file, fetch it again"
        )
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"{file}: the header has {length} bytes, expected at most {MAX_HEADER_BYTES}")
    header = _parse(file_map[8 : 8 + length], file)
    header.pop(_METADATA, None)
    data_start = 8 + length
    tensors = {name: _describe(name, entry, data_start, file) for name, entry in header.items()}
    _check_places(tensors, data_start, file_bytes, file)
    return tensors


def _parse(text: bytes, file: str) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{file}: the header is no JSON ({str(error)[:80]}); fetch the file again"
        ) from None
    if not isinstance(header, dict):
        raise FormatError(f"{file}: the header is a {type(header).__name__}, expected an object of tensors")
    return header


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{quoted(name)} occurs twice")
        found[name] = value
    return found


def _describe(name: str, entry: object, data_start: int, file: str) -> StoredTensor:
    where = f"{file}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise FormatError(
            f"{where} is described by {str(entry)[:80]}, expected dtype, shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedError(f"{where} has type {str(dtype)[:40]!r}, expected one of {', '.join(DTYPES)}")
    if not is_shape(shape):
        raise FormatError(
            f"{where} has shape {str(shape)[:80]}, expected a list of at most {MAX_DIMENSIONS} whole numbers"
        )
    if not _is_range(offsets):
        raise FormatError(f"{where} has data_offsets {str(offsets)[:80]}, expected [first, last]")
    nbytes = stored_bytes(dtype, tuple(shape))
    if offsets[1] - offsets[0] != nbytes:
        raise FormatError(
            f"{where} of type {dtype} and shape {shape} takes {offsets[1] - offsets[0]} bytes, expected "
            f"{nbytes}"
        )
    return StoredTensor(name, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _is_range(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not all(type(each) is int for each in value):
        return False
    return 0 <= value[0] <= value[1]


def _check_places(tensors: dict[str, StoredTensor], data_start: int, file_bytes: int, file: str) -> None:
    """Tensors follow one another without a gap up to the end of the file, as the format demands."""
    for tensor in tensors.values():
        last = tensor.start + tensor.nbytes
        if last > file_bytes:
            raise FormatError(
                f"{file}: tensor {quoted(tensor.name)} ends at byte {last}, but the file "
                f"has {file_bytes} bytes; it was cut off, fetch it again"
            )
    stop, before = data_start, "the header"
    for tensor in sorted(tensors.values(), key=lambda each: (each.start, each.nbytes)):
        where = f"{file}: tensor {quoted(tensor.name)}"
        if tensor.start != stop:
            fault = "overlaps" if tensor.start < stop else "leaves a gap behind"
            raise FormatError(f"{where} starts at byte {tensor.start}, expected {stop}: it {fault} {before}")
        stop, before = tensor.start + tensor.nbytes, quoted(tensor.name)
    if stop != file_bytes:
        raise FormatError(f"{file}: the file has {file_bytes} bytes, but its tensors end at byte {stop}")
