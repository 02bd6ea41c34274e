"""Writes safetensors files and files like those of torch.save by hand, byte for byte, whole or damaged."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pyinfer_convert.checkpoint import open_checkpoint
from pyinfer_convert.vocab import tokenizer_metadata

_NAMES = {"f4": "F32", "f2": "F16", "f8": "F64", "i8": "I64", "u1": "U8"}
_STORAGES = {
    "f4": "FloatStorage",
    "f2": "HalfStorage",
    "f8": "DoubleStorage",
    "i8": "LongStorage",
    "i4": "IntStorage",
    "u1": "ByteStorage",
    "b1": "BoolStorage",
    "u2": "BFloat16Storage",
}


def safetensors(tensors: Mapping[str, np.ndarray], header: dict | None = None, **changes: dict) -> bytes:
    """A file of these tensors, uint16 as BF16; header: in place of the right one; changes: of its entries."""
    entries: dict = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        dtype = "BF16" if array.dtype == np.uint16 else _NAMES[array.dtype.str[1:]]
        place = [len(data), len(data) + array.nbytes]
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": place}
        data += array.tobytes()
    for name, change in changes.items():
        entries[name] = {**entries.get(name, {}), **change}
    text = json.dumps(entries if header is None else header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def torch_pickle(tensors: Mapping[str, np.ndarray], **changes: object) -> bytes:
    """The pickle of a dictionary of tensors; changes: offset, stride or elements of every tensor."""
    out = b"\x80\x02}"
    for number, (name, array) in enumerate(tensors.items()):
        out += (
            _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + _arguments(number, array, changes) + b"Rs"
        )
    return out + b"."


def torch_tensor_pickle(array: np.ndarray, *, view: bytes = b"") -> bytes:
    """The pickle of one tensor; view: pickled, what the older format has behind a storage."""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return b"\x80\x02" + rebuild + _arguments(0, array, {}, view) + b"R."


def torch_typed_pickle(
    array: np.ndarray,
    function: bytes = b"ctorch._utils\n_rebuild_tensor_v2\n",
    kind: bytes = b"ctorch\nTensor\n",
    state: bytes = b"}",
    *,
    arguments: bytes | None = None,
) -> bytes:
    """The pickle of {"x": a tensor with attributes}; all but the first: instructions in place of the right
    ones.
    """
    given = _arguments(0, array, {}) if arguments is None else arguments
    typed = b"ctorch._tensor\n_rebuild_from_type_v2\n(" + function + kind + given + state + b"tR"
    return b"\x80\x02}" + _text("x") + typed + b"s."


def _arguments(number: int, array: np.ndarray, changes: Mapping[str, object], view: bytes = b"") -> bytes:
    """What a tensor is rebuilt from: storage, offset, shape, stride, no gradient, no hooks."""
    stride = changes.get("stride", tuple(step // array.itemsize for step in array.strides))
    out = b"((" + _text("storage") + b"ctorch\n" + _STORAGES[array.dtype.str[1:]].encode() + b"\n"
    out += _text(str(number)) + _text("cpu") + _number(changes.get("elements", array.size)) + view + b"tQ"
    out += _number(changes.get("offset", 0)) + _tuple(array.shape) + _tuple(stride)
    return out + b"\x89ccollections\nOrderedDict\n)Rt"


def torch_legacy_file(array: np.ndarray, **changes: bytes) -> bytes:
    """One tensor in torch's format before 1.6; changes: of the pickles version, machine, tensor and keys, of
    the count of elements in front of the data, or of the data.
    """
    parts = {
        "magic": b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
        "version": b"\x80\x02M\xe9\x03.",
        "machine": b"\x80\x02}" + _text("little_endian") + b"\x88s.",
        "tensor": torch_tensor_pickle(array, view=b"N"),
        "keys": b"\x80\x02]" + _text("0") + b"a.",
        "count": struct.pack("<q", array.size),
        "data": array.tobytes(),
    }
    return b"".join({**parts, **changes}.values())


def torch_file(
    tensors: Mapping[str, np.ndarray], pickle: bytes | None = None, *, compression: int = 0, **changes: object
) -> bytes:
    """A file like those of torch.save; pickle: in place of the right one."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", torch_pickle(tensors, **changes) if pickle is None else pickle)
        for number, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{number}", array.tobytes())
    return file.getvalue()


def write_folder(folder: Path, files: Mapping[str, object]) -> Path:
    """A checkpoint's folder; values that are no bytes are written as JSON, text as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, str):
            content = content.encode()
        elif not isinstance(content, bytes):
            content = json.dumps(content).encode()
        (folder / name).write_bytes(content)
    return folder


def tokenizer_folder(folder: Path, files: Mapping[str, object], config: dict | None = None) -> Path:
    """A checkpoint with these tokenizer files and as good as no weights."""
    weights = safetensors({"x": np.zeros(1, np.float32)})
    return write_folder(
        folder / "model", {"config.json": config or {}, "model.safetensors": weights, **files}
    )


def read_tokenizer(
    folder: Path, files: Mapping[str, object], config: dict | None = None, rows: int | None = None
) -> dict[str, object]:
    """The tokenizer keys of a checkpoint with these files."""
    with open_checkpoint(tokenizer_folder(folder, files, config)) as checkpoint:
        return tokenizer_metadata(checkpoint, rows)


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _number(number: object) -> bytes:
    assert isinstance(number, int)
    return b"\x8a\x08" + struct.pack("<q", number)


def _tuple(numbers: object) -> bytes:
    assert isinstance(numbers, tuple)
    return b"(" + b"".join(_number(number) for number in numbers) + b"t"
