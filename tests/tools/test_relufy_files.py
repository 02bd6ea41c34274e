"""What relufy reads and writes, without torch: folding of thresholds, checkpoints, bad teachers."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from checkpoint_files import safetensors
from click.testing import CliRunner
from hf_checkpoints import FOLDER, converted, golden_logits

from pyinfer.errors import FormatError, UnsupportedError
from pyinfer_convert.checkpoint import open_checkpoint
from pyinfer_tools import relufy
from pyinfer_tools.relufy_files import (
    GATE,
    UP,
    fold,
    read_teacher,
    shared_threshold,
    write_atomically,
    write_safetensors,
    write_student,
)


def _jump(z: np.ndarray, theta: np.ndarray | float) -> np.ndarray:
    return np.where(z > theta, z, 0.0)


def test_folded_rows_fire_and_weigh_as_before():
    random = np.random.default_rng(1)
    gate, up = (random.standard_normal((96, 64)).astype(np.float32) for _ in range(2))
    theta = np.exp(random.uniform(-6, 3, 96)).astype(np.float32)
    new_gate, new_up = fold(gate, up, theta, 0.25)
    x = random.standard_normal((500, 64))
    z, wanted_up = x @ gate.T.astype(np.float64), x @ up.T.astype(np.float64)
    wanted = _jump(z, theta) * wanted_up
    found = _jump(x @ new_gate.T.astype(np.float64), 0.25) * (x @ new_up.T.astype(np.float64))
    clear = np.abs(z - theta) > 1e-5 * np.abs(theta)  # rounding to float32 may cross the threshold itself
    assert clear.mean() > 0.999
    assert np.array_equal((found != 0)[clear], (wanted != 0)[clear])
    np.testing.assert_allclose(found[clear], wanted[clear], rtol=1e-5, atol=1e-5)
    assert 0.05 < (wanted != 0).mean() < 0.95


def test_the_shared_threshold_is_the_geometric_mean_in_two_digits():
    assert shared_threshold(np.array([[0.01, 1.0], [0.1, 0.1]])) == 0.1
    assert shared_threshold(np.array([[0.123, 0.123]])) == 0.12


def test_a_written_student_is_converted_with_its_activation(tmp_path):
    teacher = read_teacher(FOLDER / "llama")
    theta = np.random.default_rng(2).uniform(0.05, 0.5, (2, 96)).astype(np.float32)
    threshold = write_student(tmp_path / "student", teacher, teacher.tensors, theta)
    again = read_teacher(tmp_path / "student", "fatrelu")
    assert again.shape == teacher.shape
    for index in range(2):
        names = GATE.format(index), UP.format(index)
        wanted = fold(teacher.tensors[names[0]], teacher.tensors[names[1]], theta[index], threshold)
        for name, array in zip(names, wanted):
            assert np.array_equal(again.tensors[name], array)
    assert np.array_equal(again.tensors["lm_head.weight"], teacher.tensors["lm_head.weight"])
    with open_checkpoint(tmp_path / "student") as checkpoint:
        metadata, tensors = converted(checkpoint)
        assert checkpoint.json("tokenizer.json") is not None
    assert metadata["pyinfer.activation"] == f"fatrelu:{threshold:g}"
    name = "blk.1.ffn_gate.weight"
    assert np.array_equal(tensors[name], again.tensors[GATE.format(1)])


def test_only_known_teachers_are_taken(tmp_path):
    for name, error, message in [
        ("mistral", UnsupportedError, "architectures is .*MistralForCausalLM.*expected"),
        ("relu_llama", UnsupportedError, "hidden_act is 'relu', expected 'silu'"),
        ("llama_bias", UnsupportedError, "attention_bias is True"),
        ("llama_rope_llama3", UnsupportedError, "rope_type is 'llama3', expected 'default'"),
    ]:
        with pytest.raises(error, match=message):
            read_teacher(FOLDER / name)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    shutil.copyfile(FOLDER / "llama" / "config.json", folder / "config.json")
    tensors = dict(read_teacher(FOLDER / "llama").tensors)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((95, 64), np.float32)
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    with pytest.raises(FormatError, match=r"layers.1.mlp.up_proj.weight has shape \(95, 64\), expected"):
        read_teacher(folder)


def test_safetensors_are_those_that_others_write(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float32)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert (tmp_path / "model.safetensors").read_bytes() == safetensors(tensors)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "state"
    write_atomically(path, b"first")

    def fail(*_names):
        raise OSError("killed")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="killed"):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"


def test_without_torch_one_sentence_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = CliRunner().invoke(relufy.main, [str(FOLDER / "llama"), "-o", str(tmp_path / "out")])
    assert found.exit_code == 1
    assert found.output.strip() == "Error: relufy trains with torch; run: pip install pyinfer[train]"
    assert not (tmp_path / "out").exists()


def test_the_golden_teacher_is_read_as_it_was_written():
    """The embedding row of a token, taken from the checkpoint's bytes by hand."""
    teacher = read_teacher(FOLDER / "llama")
    raw = (FOLDER / "llama" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])["model.embed_tokens.weight"]
    start = 8 + length + entry["data_offsets"][0]
    row = int(golden_logits("llama")[0][3])
    wanted = np.frombuffer(raw, "<f2", 64, start + row * 128)
    assert np.array_equal(teacher.tensors["model.embed_tokens.weight"][row], wanted.astype(np.float32))
