"""The tiny Hugging Face checkpoints of tests/golden/hf, and their way into a GGUF of plain floats."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from click.testing import CliRunner

from pyinfer import names
from pyinfer.models.checkpoint import bind, family_of, load
from pyinfer_convert import cli
from pyinfer_convert.checkpoint import Checkpoint

FOLDER = Path(__file__).resolve().parent / "golden" / "hf"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def golden_logits(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int [T] and transformers' logits float32 [T, V]."""
    stored = np.load(FOLDER / name / "logits.npz")
    return stored["tokens"], stored["logits"]


def converted(checkpoint: Checkpoint) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Metadata and float32 tensors of the file that a checkpoint becomes."""
    family = family_of(checkpoint.config)
    tensors = {}
    for rule in bind(family.tensors(checkpoint.config), checkpoint):
        array = load(rule, checkpoint)
        if array.dtype == np.uint16:
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[rule.name] = array.astype(np.float32)
    return family.metadata(checkpoint.config), tensors


def convert_f32(name: str, path: Path) -> Path:
    """A tiny checkpoint as an F32 GGUF with its tokenizer, by the command itself."""
    done = CliRunner().invoke(cli.main, [str(FOLDER / name), "-o", str(path), "--quant", "f32"])
    assert done.exit_code == 0, done.stderr
    return path


def write_gguf(path: Path, metadata: dict[str, object], tensors: dict[str, np.ndarray]) -> None:
    """An F32 file without a tokenizer."""
    writer = gguf.GGUFWriter(path, str(metadata[names.ARCHITECTURE]))
    for key, value in metadata.items():
        if key == names.ARCHITECTURE:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[type(value)](key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
