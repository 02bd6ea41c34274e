"""Write a GGUF again with other tensor types, tensor by tensor.

Which tensor gets what follows llama.cpp's quantizer as far as its types can be written here: matrices get
the type asked for, the output head (the embedding, when tied) gets Q8_0 beside 4 and 5 bits, norms and
biases become F32, and a matrix whose columns do not fill whole blocks becomes F16.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from pyinfer import names
from pyinfer.errors import CapacityError, InputError, UnsupportedError
from pyinfer.gguf_file import GGUFFile, Tensor, open_gguf
from pyinfer.names import BLOCK, GGMLType

_SMALL_TYPES = (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1)
TYPES = {
    type_.name.lower(): type_
    for type_ in (*_SMALL_TYPES, GGMLType.Q8_0, GGMLType.F16, GGMLType.BF16, GGMLType.F32)
}
_FILE_TYPES = {  # general.file_type, llama.h enum llama_ftype
    GGMLType.F32: 0,
    GGMLType.F16: 1,
    GGMLType.Q4_0: 2,
    GGMLType.Q4_1: 3,
    GGMLType.Q8_0: 7,
    GGMLType.Q5_0: 8,
    GGMLType.Q5_1: 9,
    GGMLType.BF16: 32,
}
_INTEGERS = (GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64)
_BLOCK_VALUES = 4 << 20  # values unpacked at once: 16 MB as F32
_READER_KEYS = "GGUF."  # keys that GGUFReader makes up for the file's head


@dataclass(frozen=True)
class Summary:
    """Bytes of tensor data before and after, and how many tensors of each type were written."""

    bytes_before: int
    bytes_after: int
    tensors: dict[str, int]


def requantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type_: GGMLType,
    *,
    output_type: GGMLType | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write `source` again as `target` with matrices of `type_`.

    The file appears under its name only when it is complete.
    output_type : type of the output head instead of the rule's;  force : replace an existing file
    progress : called with (bytes read, bytes to read)
    raises InputError (target exists), FormatError or UnsupportedError (source), CapacityError (disk full)
    """
    target = Path(target)
    with open_gguf(source) as file:
        _check_target(file, target, force)
        head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
        chosen = {
            tensor.name: _choose(tensor, type_, output_type, tensor.name == head)
            for tensor in file.tensors.values()
        }
        with _temporary(target) as part:
            _write(file, chosen, type_, part, progress)
            os.replace(part, target)
        counts: dict[str, int] = {}
        for kind in chosen.values():
            counts[kind.name] = counts.get(kind.name, 0) + 1
        return Summary(
            sum(tensor.nbytes for tensor in file.tensors.values()),
            sum(_nbytes(tensor, chosen[tensor.name]) for tensor in file.tensors.values()),
            counts,
        )


def _check_target(file: GGUFFile, target: Path, force: bool) -> None:
    if not target.exists():
        return
    # Replacing the file that is being read would be safe on Linux only.
    if target.samefile(file.path):
        raise InputError(f"{target} is the file to be read; give the output another name")
    if not force:
        raise InputError(f"{target} exists already; give another name or --force")


def _choose(tensor: Tensor, type_: GGMLType, output_type: GGMLType | None, is_head: bool) -> GGMLType:
    """Type of one tensor in the new file."""
    if tensor.type in _INTEGERS:
        return tensor.type
    if len(tensor.shape) < 2 or tensor.name.endswith("_norm.weight"):
        return GGMLType.F32
    if is_head:
        if output_type is not None:
            type_ = output_type
        elif type_ in _SMALL_TYPES:
            type_ = GGMLType.Q8_0
    return type_ if tensor.columns % BLOCK[type_][0] == 0 else GGMLType.F16


def _nbytes(tensor: Tensor, type_: GGMLType) -> int:
    values, block_bytes = BLOCK[type_]
    return tensor.columns // values * block_bytes * tensor.rows


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A file beside `target` to write to; removed unless it was renamed."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.touch(exist_ok=False)
    except OSError as error:
        raise InputError(f"{target}: cannot write there: {error.strerror}") from error
    try:
        yield part
    except OSError as error:
        raise CapacityError(f"{target}: writing failed: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _write(file: GGUFFile, chosen: dict[str, GGMLType], type_: GGMLType, part: Path, progress) -> None:
    writer = gguf.GGUFWriter(part, file.architecture)
    try:
        _copy_metadata(file, type_, writer)
        for tensor in file.tensors.values():
            kind = chosen[tensor.name]
            shape = tuple(reversed(tensor.shape))
            stored = GGMLQuantizationType(kind)
            writer.add_tensor_info(
                tensor.name, shape, np.dtype(np.float32), _nbytes(tensor, kind), raw_dtype=stored
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = sum(tensor.nbytes for tensor in file.tensors.values())
        done = 0
        for tensor in file.tensors.values():
            writer.write_tensor_data(_converted(file, tensor, chosen[tensor.name]))
            file.drop_pages(tensor)
            done += tensor.nbytes
            if progress:
                progress(done, total)
    finally:
        writer.close()


def _copy_metadata(file: GGUFFile, type_: GGMLType, writer: gguf.GGUFWriter) -> None:
    """Copy every key with its type on disk, which only gguf's own reader keeps."""
    replaced = (names.ARCHITECTURE, names.FILE_TYPE, names.QUANTIZATION_VERSION)
    for key, field in gguf.GGUFReader(file.path).fields.items():
        if key.startswith((_READER_KEYS, "split.")) or key in replaced:
            continue
        value = field.contents()
        if isinstance(value, list) and not value:
            continue  # the writer cannot store an empty list, and no reader misses one
        writer.add_key_value(key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
        if key == names.ALIGNMENT:
            writer.data_alignment = int(value)
    writer.add_file_type(_FILE_TYPES[type_])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _converted(file: GGUFFile, tensor: Tensor, type_: GGMLType) -> np.ndarray:
    """The tensor's bytes in the new type, uint8 1-D; the mapped bytes themselves when the type stays."""
    if tensor.type == type_:
        return tensor.data
    rows = tensor.data.reshape(tensor.rows, -1)
    out = np.empty((tensor.rows, _nbytes(tensor, type_) // tensor.rows), np.uint8)
    step = max(1, _BLOCK_VALUES // tensor.columns)
    for start in range(0, tensor.rows, step):
        try:
            values = gguf.quants.dequantize(rows[start : start + step], GGMLQuantizationType(tensor.type))
        except (NotImplementedError, ValueError) as error:  # ValueError: a type newer than the gguf package
            raise UnsupportedError(
                f"{file.path.name}: {tensor.name} has type {tensor.type.name}, "
                "which cannot be unpacked here; start from a file of another type"
            ) from error
        values = np.ascontiguousarray(values, np.float32)
        out[start : start + step] = gguf.quants.quantize(values, GGMLQuantizationType(type_)).view(np.uint8)
    return out.reshape(-1)
