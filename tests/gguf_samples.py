"""Small GGUF files for tests: good ones by the gguf package's writer, bad ones byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np

TOKENS = ["<unk>", "<s>", "</s>", "", "\u2581the", "caf\u00e9", "\U0001f600", "\x00", "a b"]
QUANT = gguf.GGMLQuantizationType


def writer(path: Path, **options) -> gguf.GGUFWriter:
    """A writer that already holds metadata of every value type."""
    made = gguf.GGUFWriter(path, "llama", **options)
    made.add_uint32("llama.block_count", 2)
    made.add_uint8("test.uint8", 255)
    made.add_int8("test.int8", -128)
    made.add_uint16("test.uint16", 65535)
    made.add_int16("test.int16", -32768)
    made.add_int32("test.int32", -(2**31))
    made.add_uint64("test.uint64", 2**64 - 1)
    made.add_int64("test.int64", -(2**63))
    made.add_float32("llama.rope.freq_base", 10000.5)
    made.add_float64("test.float64", 1e300)
    made.add_bool("tokenizer.ggml.add_bos_token", True)
    made.add_string("general.name", "n\u00e4me")
    made.add_token_list(TOKENS)
    made.add_token_scores([-0.5 * index for index in range(len(TOKENS))])
    made.add_token_types([3, 3, 3, 1, 1, 1, 1, 1, 1])
    made.add_array("test.bools", [True, False, True])
    made.add_array("test.nested", [[1, 2], [3]])
    return made


def add_tensors(made: gguf.GGUFWriter) -> None:
    """Tensors of one, two and three dimensions, plain and in blocks of 32 and 256."""
    random = np.random.default_rng(7)
    made.add_tensor("token_embd.weight", random.standard_normal((9, 64), np.float32))
    made.add_tensor("output_norm.weight", random.standard_normal(64, np.float32))
    made.add_tensor("blk.0.attn_q.weight", random.standard_normal((4, 64), np.float32).astype(np.float16))
    made.add_tensor("test.ids", np.arange(5, dtype=np.int32))
    for kind, shape in ((QUANT.Q4_0, (3, 64)), (QUANT.Q8_0, (2, 2, 32)), (QUANT.Q5_1, (32,))):
        values = gguf.quants.quantize(random.standard_normal(shape, np.float32), kind)
        made.add_tensor(f"blk.0.{kind.name}.weight", values, raw_dtype=kind)
    block = random.integers(0, 256, (2, 210), np.uint8)
    made.add_tensor("blk.1.ffn_up.weight", block, raw_dtype=QUANT.Q6_K)


def write_sample(path: Path, alignment: int | None = None) -> Path:
    made = writer(path)
    if alignment is not None:
        made.add_custom_alignment(alignment)
    add_tensors(made)
    finish(made)
    return path


def write_split(folder: Path, stem: str = "model", tensors_each: int = 3) -> list[Path]:
    """The same model in parts; returns them in order."""
    made = writer(folder / f"{stem}.gguf", split_max_tensors=tensors_each)
    add_tensors(made)
    finish(made)
    return sorted(folder.glob(f"{stem}-*-of-*.gguf"))


def write_tiny(path: Path) -> Path:
    """A file of about 600 bytes for thousands of mutations."""
    made = gguf.GGUFWriter(path, "llama")
    made.add_uint32("llama.block_count", 1)
    made.add_token_list(["a", "bc", "d\u00e9"])
    made.add_array("t.i", [1, 2, 3])
    made.add_array("t.n", [[1], [2, 3]])
    made.add_bool("t.b", True)
    made.add_tensor("one", np.arange(8, dtype=np.float32))
    made.add_tensor("two", np.zeros((2, 18), np.uint8), raw_dtype=QUANT.Q4_0)
    finish(made)
    return path


def finish(made: gguf.GGUFWriter) -> None:
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32_pair(key: str, value: int) -> bytes:
    return pair(key, 4, struct.pack("<I", value))


def array_pair(key: str, kind: int, count: int, values: bytes) -> bytes:
    return pair(key, 9, struct.pack("<IQ", kind, count) + values)


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def raw_gguf(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """The bytes of a file that says exactly this; `counts` (tensors, pairs) overrides the true ones."""
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    head = (
        b"GGUF" + struct.pack("<IQQ", version, tensor_count, pair_count) + b"".join(pairs) + b"".join(tensors)
    )
    return head + b"\0" * (-len(head) % alignment) + data
