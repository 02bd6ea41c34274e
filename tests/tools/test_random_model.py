"""Random models read back by gguf: shapes, types, spread of the values, a whole vocabulary."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type

from pyinfer_tools.random_model import QUANTS, SHAPES, main, tensor_list, write_random_model
from pyinfer_tools.vocabularies import byte_characters


@pytest.mark.parametrize("quant", QUANTS)
def test_weights_have_the_stated_spread(tmp_path, quant):
    path = tmp_path / "model.gguf"
    write_random_model(path, SHAPES["tiny"], quant)
    reader = gguf.GGUFReader(path)
    kind = Type[quant.upper()]
    head = Type.Q6_K if quant.startswith(("q4", "q5")) else kind
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all()
        if values.ndim == 1:
            assert tensor.tensor_type == Type.F32 and (values == 1.0).all()
            continue
        expected = 1.0 if tensor.name == "token_embd.weight" else values.shape[1] ** -0.5
        assert tensor.tensor_type == (head if tensor.name == "output.weight" else kind)
        assert values.std() == pytest.approx(expected, rel=0.05)
        assert abs(values.mean()) < 0.05 * expected
        assert len(np.unique(values, axis=0)) == len(values)


def test_names_and_keys_fit_the_shape(tmp_path):
    path = tmp_path / "model.gguf"
    write_random_model(path, SHAPES["tiny"], "q4_0")
    reader = gguf.GGUFReader(path)
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.attn_k.weight"] == [256, 128]
    assert shapes["blk.1.ffn_down.weight"] == [512, 256]
    assert len(shapes) == 3 + 2 * 9
    field = {key: value.contents() for key, value in reader.fields.items()}
    tokens = field["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == len(tokens) == 512 == shapes["token_embd.weight"][1]
    assert len(field["tokenizer.ggml.scores"]) == len(field["tokenizer.ggml.token_type"]) == 512
    assert field["llama.attention.head_count_kv"] == 2


def test_7b_has_the_size_of_llama_2_7b_q4_0():
    total = 0
    for _, rows, columns, kind in tensor_list(SHAPES["7b"], Type.Q4_0):
        values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        total += max(1, rows) * columns // values * block_bytes
    assert total == pytest.approx(3.825e9, rel=0.002)


def test_seed_decides_the_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_model(tmp_path / name, SHAPES["tiny"], "q8_0", seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_command_keeps_existing_files(tmp_path):
    path = tmp_path / "model.gguf"
    arguments = ["--shape", "tiny", "--layers", "1", "-o", str(path)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    before = path.read_bytes()
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code != 0 and "exists already" in again.stderr
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]


def test_byte_characters_are_those_of_gpt2():
    from tokenizers.pre_tokenizers import ByteLevel

    characters = byte_characters()
    assert sorted(characters) == sorted(ByteLevel.alphabet())
    pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("a ü\n")
    expected = "".join(characters[byte] for byte in "a ü\n".encode())
    assert "".join(text for text, _ in pieces) == expected
