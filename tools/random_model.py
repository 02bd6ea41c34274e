"""Write a llama GGUF with random weights in a real model's shape, to measure speed without a download.

    python -m pyinfer_tools.random_model --shape 7b --quant q4_0 -o random-7b.gguf

A few MB of random blocks are quantized once; every tensor reads them from its own offset. The number of
blocks is prime, so neighbouring rows differ. Weights have variance 1 / columns, so that activations neither
explode nor vanish.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from pyinfer.progress import Progress
from pyinfer_tools.vocabularies import add_sentencepiece

_POOL_BLOCKS = 65_521  # prime


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama model; kv_heads divides heads, heads divides embedding."""

    embedding: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    rope_base: float = 10_000.0


SHAPES = {
    "tiny": Shape(256, 2, 512, 4, 2, 512),
    "smollm2-135m": Shape(576, 30, 1536, 9, 3, 49152, tied=True, rope_base=100_000.0),
    "tinyllama-1b": Shape(2048, 22, 5632, 32, 4, 32000),
    "llama-1b": Shape(2048, 16, 8192, 32, 8, 128_256, tied=True, rope_base=500_000.0),
    "7b": Shape(4096, 32, 11008, 32, 32, 32000),
    "mistral-7b": Shape(4096, 32, 14336, 32, 8, 32000),
    "8b": Shape(4096, 32, 14336, 32, 8, 128_256, rope_base=500_000.0),
}
QUANTS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32")


class Pool:
    """Random blocks per type, and tensors cut from them."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._blocks: dict[tuple[Type, float], np.ndarray] = {}

    def tensor(self, kind: Type, rows: int, columns: int, deviation: float) -> np.ndarray:
        """Bytes uint8 [rows, bytes of a row] of a tensor whose values have the given standard deviation."""
        key = kind, deviation
        if key not in self._blocks:
            self._blocks[key] = self._make(kind, deviation)
        pool = self._blocks[key].reshape(-1)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        out = np.empty(rows * columns // per_block * block_bytes, np.uint8)
        item = len(pool) // _POOL_BLOCKS
        start = int(self._random.integers(_POOL_BLOCKS)) * item
        done = 0
        while done < len(out):
            count = min(len(pool) - start, len(out) - done)
            out[done : done + count] = pool[start : start + count]
            done, start = done + count, 0
        return out.reshape(rows, -1)

    def _make(self, kind: Type, deviation: float) -> np.ndarray:
        if kind == Type.Q6_K:
            return self._make_q6_k(deviation)
        values = self._random.standard_normal((_POOL_BLOCKS, 32), np.float32) * np.float32(deviation)
        return gguf.quants.quantize(values, kind).view(np.uint8)

    def _make_q6_k(self, deviation: float) -> np.ndarray:
        """Blocks: low 4 bits, high 2 bits, 16 scales, one f16 scale; uniform quants deviate by 18.5."""
        bits = self._random.integers(0, 256, (_POOL_BLOCKS, 192), np.uint8)
        scales = self._random.integers(64, 128, (_POOL_BLOCKS, 16)).astype(np.int8)
        scale = np.full((_POOL_BLOCKS, 1), deviation / (18.5 * 97), np.float16)
        return np.concatenate([bits, scales.view(np.uint8), scale.view(np.uint8)], axis=1)


def head_type(kind: Type, columns: int) -> Type:
    """Type of the output head (or tied embedding) that llama-quantize picks beside weights of type `kind`."""
    if kind in (Type.F32, Type.F16, Type.BF16, Type.Q8_0):
        return kind
    return Type.Q6_K if columns % 256 == 0 else Type.Q8_0


def tensor_list(shape: Shape, kind: Type) -> list[tuple[str, int, int, Type]]:
    """(name, rows, columns, type) of every tensor in file order; norms have rows 0."""
    head = head_type(kind, shape.embedding)
    d, kv = shape.embedding, shape.embedding // shape.heads * shape.kv_heads
    listed = [("token_embd.weight", shape.vocabulary, d, head if shape.tied else kind)]
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        listed += [
            (block + "attn_norm.weight", 0, d, Type.F32),
            (block + "attn_q.weight", d, d, kind),
            (block + "attn_k.weight", kv, d, kind),
            (block + "attn_v.weight", kv, d, kind),
            (block + "attn_output.weight", d, d, kind),
            (block + "ffn_norm.weight", 0, d, Type.F32),
            (block + "ffn_gate.weight", shape.feed_forward, d, kind),
            (block + "ffn_up.weight", shape.feed_forward, d, kind),
            (block + "ffn_down.weight", d, shape.feed_forward, kind),
        ]
    listed.append(("output_norm.weight", 0, d, Type.F32))
    if not shape.tied:
        listed.append(("output.weight", shape.vocabulary, d, head))
    return listed


def write_random_model(path: Path, shape: Shape, quant: str, seed: int = 0, progress=None) -> None:
    """Write the file; it gets its name only when complete. progress(bytes done, bytes in all)."""
    pool = Pool(seed)

    def data(name: str, rows: int, columns: int, kind: Type) -> np.ndarray:
        if not rows:
            return np.ones(columns, np.float32)
        deviation = 1.0 if name == "token_embd.weight" and not shape.tied else columns**-0.5
        return pool.tensor(kind, rows, columns, deviation)

    def describe(writer: gguf.GGUFWriter) -> None:
        add_metadata(writer, shape, quant)

    write_model(path, "llama", describe, tensor_list(shape, Type[quant.upper()]), data, progress)


def write_model(
    path: Path,
    architecture: str,
    describe: Callable[[gguf.GGUFWriter], None],
    tensors: list[tuple[str, int, int, Type]],
    data: Callable[[str, int, int, Type], np.ndarray],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a file of these tensors (as `tensor_list` gives them) one after another; it gets its name only
    when complete.

    describe : adds the metadata;  data : the bytes of a tensor;  progress(bytes done, bytes in all)
    """
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, architecture)
    describe(writer)
    done = total = 0
    for name, rows, columns, tensor_type in tensors:
        count = max(1, rows) * columns
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
        count_bytes = count // per_block * block_bytes
        dimensions = (rows, columns) if rows else (columns,)
        writer.add_tensor_info(name, dimensions, np.dtype(np.float32), count_bytes, tensor_type)
        total += count_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for name, rows, columns, tensor_type in tensors:
            made = data(name, rows, columns, tensor_type)
            writer.write_tensor_data(made)
            done += made.nbytes
            if progress:
                progress(done, total)
        writer.close()
        os.replace(part, path)
    finally:
        writer.close()
        part.unlink(missing_ok=True)


def add_metadata(writer: gguf.GGUFWriter, shape: Shape, quant: str) -> None:
    writer.add_name("random weights")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.embedding)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.embedding // shape.heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    names = {"f32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[names.get(quant, "MOSTLY_" + quant.upper())])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sentencepiece(writer, shape.vocabulary)


@click.command()
@click.option("--shape", "shape_name", type=click.Choice(list(SHAPES)), default="7b", show_default=True)
@click.option("--quant", type=click.Choice(QUANTS), default="q4_0", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--layers", type=click.IntRange(1), help="Fewer or more layers than the shape has.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace an existing file.")
def main(shape_name: str, quant: str, output: Path, layers: int | None, seed: int, force: bool) -> None:
    """Write a GGUF with random weights of a real model's shape."""
    if output.exists() and not force:
        raise click.ClickException(f"{output} exists already; give another name or --force")
    shape = SHAPES[shape_name]
    if layers:
        shape = replace(shape, layers=layers)
    with Progress(sys.stderr, "writing") as progress:
        write_random_model(output, shape, quant, seed, progress)
    click.echo(f"{output}: {output.stat().st_size:,} bytes", err=True)


if __name__ == "__main__":
    main()
