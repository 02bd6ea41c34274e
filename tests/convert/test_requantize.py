"""The requantized file against gguf's own reader and quantizers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type

from pyinfer.errors import FormatError, InputError, UnsupportedError
from pyinfer_convert.cli import main
from pyinfer_convert.requantize import TYPES, requantize

_MATRIX = "blk.0.attn_q.weight"
_ODD = "blk.0.odd.weight"  # 40 columns: no whole number of blocks


def _write(path, *, tied=False, source=Type.F32):
    random = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("test.count", 7)
    writer.add_int8("test.small", -7)
    writer.add_float64("test.exact", 0.1)
    writer.add_bool("test.yes", True)
    writer.add_key_value("test.ints", [1, 2], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT16)
    writer.add_token_list(["a", "ü", "</s>"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    values = {"token_embd.weight": (6, 64), "blk.0.attn_norm.weight": (64,), _MATRIX: (96, 64), _ODD: (3, 40)}
    if not tied:
        values["output.weight"] = (6, 64)
    tensors = {}
    for name, shape in values.items():
        tensor = random.standard_normal(shape, np.float32)
        tensors[name] = tensor
        if len(shape) == 2 and name == _MATRIX:
            packed = gguf.quants.quantize(tensor, source)
            tensors[name] = gguf.quants.dequantize(packed, source)
            writer.add_tensor(name, packed, raw_dtype=source)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _read(path):
    reader = gguf.GGUFReader(path)
    return reader, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("name", [name for name in TYPES if name not in ("q4_k", "q6_k")])
def test_matrices_get_the_values_that_gguf_quantizes(tmp_path, name):
    source = _write(tmp_path / "in.gguf", source=Type.Q8_0)
    requantize(tmp_path / "in.gguf", tmp_path / "out.gguf", TYPES[name])
    _, tensors = _read(tmp_path / "out.gguf")
    kind = Type[name.upper()]
    assert tensors[_MATRIX].tensor_type == kind
    expected = gguf.quants.quantize(source[_MATRIX], kind)
    np.testing.assert_array_equal(
        tensors[_MATRIX].data.view(np.uint8).ravel(), expected.view(np.uint8).ravel()
    )
    assert list(tensors[_MATRIX].shape) == [64, 96]


@pytest.mark.parametrize("tied", [False, True])
def test_head_norms_and_odd_columns_follow_the_rule(tmp_path, tied):
    source = _write(tmp_path / "in.gguf", tied=tied)
    summary = requantize(tmp_path / "in.gguf", tmp_path / "out.gguf", TYPES["q4_0"])
    _, tensors = _read(tmp_path / "out.gguf")
    found = {name: tensor.tensor_type for name, tensor in tensors.items()}
    expected = {
        "token_embd.weight": Type.Q8_0 if tied else Type.Q4_0,
        "blk.0.attn_norm.weight": Type.F32,
        _MATRIX: Type.Q4_0,
        _ODD: Type.F16,
    }
    if not tied:
        expected["output.weight"] = Type.Q8_0
    assert found == expected
    norm = "blk.0.attn_norm.weight"
    np.testing.assert_array_equal(tensors[norm].data, source[norm])
    assert sum(summary.tensors.values()) == len(expected)
    assert summary.bytes_after == sum(tensor.n_bytes for tensor in tensors.values()) < summary.bytes_before


def test_a_split_model_becomes_one_file(tmp_path):
    random = np.random.default_rng(4)
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama", split_max_tensors=1)
    writer.add_uint32("test.count", 7)
    values = {f"blk.{layer}.attn_q.weight": random.standard_normal((8, 32), np.float32) for layer in range(3)}
    for name, tensor in values.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    requantize(tmp_path / "in-00001-of-00003.gguf", tmp_path / "out.gguf", TYPES["q8_0"])
    reader, tensors = _read(tmp_path / "out.gguf")
    assert reader.fields["test.count"].contents() == 7
    assert not any(key.startswith("split.") for key in reader.fields)
    assert list(tensors) == list(values)
    for name, tensor in values.items():
        assert tensors[name].data.tobytes() == gguf.quants.quantize(tensor, Type.Q8_0).tobytes()


def test_integers_stay_and_unknown_packings_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_tensor("index", np.arange(64, dtype=np.int32).reshape(2, 32))
    writer.add_tensor("exact.weight", np.ones((2, 32), np.float64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"exact\.weight has type F64"):
        requantize(tmp_path / "in.gguf", tmp_path / "out.gguf", TYPES["q8_0"])
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]
    data = (tmp_path / "in.gguf").read_bytes()
    kind = data.index(b"exact.weight") + len(b"exact.weight") + 4 + 2 * 8
    assert data[kind] == Type.F64
    (tmp_path / "in.gguf").write_bytes(data[:kind] + bytes([Type.I64]) + data[kind + 1 :])
    requantize(tmp_path / "in.gguf", tmp_path / "out.gguf", TYPES["q8_0"])
    _, tensors = _read(tmp_path / "out.gguf")
    assert [tensor.tensor_type for tensor in tensors.values()] == [Type.I32, Type.I64]
    np.testing.assert_array_equal(tensors["index"].data, np.arange(64).reshape(2, 32))


def test_output_type_overrides_the_rule(tmp_path):
    _write(tmp_path / "in.gguf")
    requantize(tmp_path / "in.gguf", tmp_path / "out.gguf", TYPES["q4_0"], output_type=TYPES["f16"])
    _, tensors = _read(tmp_path / "out.gguf")
    assert tensors["output.weight"].tensor_type == Type.F16
    assert tensors["token_embd.weight"].tensor_type == Type.Q4_0


def test_metadata_keeps_values_and_types(tmp_path):
    _write(tmp_path / "in.gguf")
    requantize(tmp_path / "in.gguf", tmp_path / "out.gguf", TYPES["q5_1"])
    before, after = _read(tmp_path / "in.gguf")[0].fields, _read(tmp_path / "out.gguf")[0].fields
    for key, field in before.items():
        if key.startswith("GGUF.") or key == "general.file_type":
            continue
        assert (after[key].types, after[key].contents()) == (field.types, field.contents())
    assert after["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q5_1
    assert after["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION


def test_existing_files_are_kept(tmp_path):
    _write(tmp_path / "in.gguf")
    (tmp_path / "out.gguf").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"):
        requantize(tmp_path / "in.gguf", tmp_path / "out.gguf", TYPES["q4_0"])
    assert (tmp_path / "out.gguf").read_bytes() == b"mine"
    with pytest.raises(InputError, match="is the file to be read"):
        requantize(tmp_path / "in.gguf", tmp_path / "in.gguf", TYPES["q4_0"], force=True)
    requantize(tmp_path / "in.gguf", tmp_path / "out.gguf", TYPES["q4_0"], force=True)
    assert (tmp_path / "out.gguf").read_bytes()[:4] == b"GGUF"


def test_a_failure_leaves_nothing_behind(tmp_path):
    _write(tmp_path / "in.gguf")

    def interrupted(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        requantize(tmp_path / "in.gguf", tmp_path / "out.gguf", TYPES["q8_0"], progress=interrupted)
    (tmp_path / "torn.gguf").write_bytes((tmp_path / "in.gguf").read_bytes()[:-100])
    with pytest.raises(FormatError):
        requantize(tmp_path / "torn.gguf", tmp_path / "out.gguf", TYPES["q8_0"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.gguf", "torn.gguf"]


def test_progress_reaches_its_end(tmp_path):
    _write(tmp_path / "in.gguf")
    seen = []
    requantize(
        tmp_path / "in.gguf", tmp_path / "out.gguf", TYPES["q8_0"], progress=lambda *at: seen.append(at)
    )
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0


def test_command(tmp_path):
    _write(tmp_path / "in.gguf")
    arguments = [str(tmp_path / "in.gguf"), "-o", str(tmp_path / "out.gguf"), "--quant", "q4_1"]
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0 and "Q4_1" in first.stderr and first.stdout == ""
    second = CliRunner().invoke(main, arguments)
    assert second.exit_code != 0 and "--force" in second.stderr
    assert CliRunner().invoke(main, [*arguments, "--force", "--output-quant", "f32"]).exit_code == 0
    _, tensors = _read(tmp_path / "out.gguf")
    assert tensors["output.weight"].tensor_type == Type.F32
