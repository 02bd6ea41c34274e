"""What the tools measure pyinfer by."""

from __future__ import annotations

import gguf
import pytest
from hf_checkpoints import FOLDER, converted, write_gguf

from pyinfer.names import GGMLType
from pyinfer.runtime.loader import load_model
from pyinfer_convert.checkpoint import open_checkpoint
from pyinfer_convert.requantize import requantize
from pyinfer_tools.engine import token_bytes
from pyinfer_tools.random_model import SHAPES, write_random_model

# Bytes for 32 columns: codes of 4 or 8 bits, and a half for every group of 32, of Q6_K of 16.
IN_MEMORY = {"q4_0": 18, "q5_0": 34, "q8_0": 34, "q6_k": 36}


@pytest.mark.parametrize("quant", ["q4_0", "q5_0", "q8_0"])
def test_a_token_reads_what_lies_in_memory(tmp_path, quant):
    """5-bit codes take 8 bits there: 34 bytes for 32 columns instead of the file's 22."""
    path = tmp_path / "model.gguf"
    write_random_model(path, SHAPES["tiny"], "f16")
    small = tmp_path / "small.gguf"
    requantize(path, small, GGMLType[quant.upper()])
    expected = 0
    for tensor in gguf.GGUFReader(small).tensors:
        columns, rows = tensor.shape[0], tensor.n_elements // tensor.shape[0]
        if tensor.name == "token_embd.weight":
            expected += tensor.n_bytes // rows  # one row, as it is in the file
        elif rows == 1:
            expected += 4 * columns
        else:
            kind = tensor.tensor_type.name.lower()
            expected += rows * columns // 32 * IN_MEMORY[kind]
    with load_model(small) as model:
        assert token_bytes(model) == expected


def test_learned_positions_are_one_row(tmp_path):
    with open_checkpoint(FOLDER / "opt") as checkpoint:
        metadata, tensors = converted(checkpoint)
    counts = []
    for rows in (66, 34):
        tensors["position_embd.weight"] = tensors["position_embd.weight"][:rows]
        write_gguf(tmp_path / "opt.gguf", metadata, tensors)
        with load_model(tmp_path / "opt.gguf") as model:
            counts.append(token_bytes(model))
    assert counts[0] == counts[1]
