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
_STORAGES = {"f4": "FloatStorage", "f2": "HalfStorage", "f8": "DoubleStorage", "i8": "LongStorage"}


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
        stride = changes.get("stride", tuple(step // array.itemsize for step in array.strides))
        out += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + _text("storage")
        out += (
            b"ctorch\n" + _STORAGES[array.dtype.str[1:]].encode() + b"\n" + _text(str(number)) + _text("cpu")
        )
        out += _number(changes.get("elements", array.size)) + b"tQ" + _number(changes.get("offset", 0))
        out += _tuple(array.shape) + _tuple(stride) + b"\x89ccollections\nOrderedDict\n)RtRs"
    return out + b"."


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
