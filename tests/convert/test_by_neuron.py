"""--by-neuron: ffn_down of any model kept neuron by neuron, from a checkpoint or a GGUF, for any type."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from golden_files import dequantize
from hf_checkpoints import FOLDER, converted, golden_logits, write_gguf
from sparse_files import random_predictors, sparse_gguf

from pyinfer import names
from pyinfer.program.reference import Reference
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer_convert import cli
from pyinfer_convert.checkpoint import open_checkpoint

# silu, biases, gelu with a gate, gelu without, gelu with biases
DENSE = ("llama", "llama_bias", "gemma3", "falcon_7b", "galactica")
TOKENS = np.random.default_rng(5).integers(3, 60, 40)
BOUND = 1e-4  # of the largest logit
ROUNDINGS = 8e-2  # where activations are 8 bits


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """convert(code, *arguments) in a folder of its own -> what it says."""
    monkeypatch.chdir(tmp_path)

    def run(code, *arguments):
        done = CliRunner().invoke(cli.main, [str(each) for each in arguments])
        assert done.exit_code == code and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    return run


def logits(path: Path, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Dense: many rows in one step, then one row each."""
    with load_model(path, sparsity="dense") as model:
        session = Session(model, 64, 2)
        try:
            first = session.prefill(tokens[:-4], all_logits=True)
            return np.concatenate([first, *(session.step([token], [0]) for token in tokens[-4:])])
        finally:
            session.close()


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def tensors_of(path: str) -> dict[str, gguf.ReaderTensor]:
    return {each.name: each for each in gguf.GGUFReader(path).tensors}


def neuron_major(name: str) -> str:
    return name.replace(f".{names.FFN_DOWN}.", f".{names.FFN_DOWN_T}.")


@pytest.mark.parametrize("name", DENSE)
def test_a_checkpoint_by_neuron_computes_the_same(convert, name):
    convert(0, FOLDER / name, "--quant", "f32", "--by-neuron", "-o", "neurons.gguf")
    convert(0, FOLDER / name, "--quant", "f32", "-o", "plain.gguf")
    layers = json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    neurons, plain = tensors_of("neurons.gguf"), tensors_of("plain.gguf")
    assert list(neurons) == [neuron_major(each) for each in plain]
    assert sum(each.endswith("ffn_down_t.weight") for each in neurons) == layers
    for each, tensor in plain.items():
        expected = tensor.data.T if each.endswith("ffn_down.weight") else tensor.data
        np.testing.assert_array_equal(neurons[neuron_major(each)].data, expected, err_msg=each)
    tokens, expected = golden_logits(name)
    assert apart(logits(Path("neurons.gguf"), tokens), expected) < BOUND
    # of the plain GGUF the same, and back again
    convert(0, "plain.gguf", "--quant", "f32", "--by-neuron", "-o", "again.gguf")
    convert(0, "again.gguf", "--quant", "f32", "--plain", "-o", "back.gguf")
    for one, other in (("again.gguf", neurons), ("back.gguf", plain)):
        found = tensors_of(one)
        assert list(found) == list(other)
        for each, tensor in other.items():
            np.testing.assert_array_equal(found[each].data, tensor.data, err_msg=each)


@pytest.mark.parametrize("quant", ["q4_0", "q4_1", "q8_0"])
def test_a_gguf_of_blocks_by_neuron(convert, quant):
    """From Q4_1, as SmolLM2 comes: what has the type already stays as it is, ffn_down is packed anew."""
    convert(0, FOLDER / "llama", "--quant", "q4_1", "-o", "first.gguf")
    convert(0, "first.gguf", "--quant", quant, "-o", "plain.gguf")
    convert(0, "first.gguf", "--quant", quant, "--by-neuron", "-o", "neurons.gguf")
    first, plain, neurons = (tensors_of(f"{each}.gguf") for each in ("first", "plain", "neurons"))
    kind = gguf.GGMLQuantizationType[quant.upper()]
    for name, tensor in plain.items():
        found = neurons[neuron_major(name)]
        assert found.tensor_type == tensor.tensor_type
        if name.endswith("ffn_down.weight"):
            values = gguf.quants.dequantize(first[name].data, first[name].tensor_type)
            packed = gguf.quants.quantize(np.ascontiguousarray(values.T), kind)
            assert found.data.tobytes() == packed.tobytes()
        else:
            assert found.data.tobytes() == tensor.data.tobytes()
    values = logits(Path("neurons.gguf"))
    # Both have roundings of their own; Q8_0's are small.
    assert apart(values, logits(Path("plain.gguf"))) < (ROUNDINGS if quant == "q8_0" else 0.3)
    with load_model("neurons.gguf", sparsity="dense") as model:
        reference = Reference(model.program, dequantize)
        n = len(TOKENS)
        expected = reference.step(TOKENS, np.arange(n), np.zeros(n, int), np.arange(n))
    assert apart(values, expected) < ROUNDINGS


def test_what_is_by_neuron_already_stays(convert, tmp_path):
    sparse = sparse_gguf(tmp_path / "sparse.gguf", "relu_llama", "f32", random_predictors("relu_llama"))
    convert(0, sparse, "--quant", "f32", "-o", "usual.gguf")
    convert(0, sparse, "--quant", "f32", "--by-neuron", "-o", "neurons.gguf")
    assert Path("usual.gguf").read_bytes() == Path("neurons.gguf").read_bytes()
    assert "blk.1.fc2.weight" in tensors_of("neurons.gguf")


def test_what_cannot_be_by_neuron_is_one_sentence(convert, tmp_path):
    with open_checkpoint(FOLDER / "llama") as checkpoint:
        metadata, tensors = converted(checkpoint)
    narrow = {}
    for name, array in tensors.items():
        if name.endswith(("ffn_gate.weight", "ffn_up.weight")):
            array = array[:80]
        narrow[name] = array[:, :80] if name.endswith("ffn_down.weight") else array
    write_gguf(tmp_path / "narrow.gguf", metadata, narrow)
    said = convert(1, "narrow.gguf", "--quant", "f32", "--by-neuron", "-o", "out.gguf")
    assert "narrow.gguf: its layers have 80 neurons, expected a multiple of 32" in said
    without = {name: array for name, array in tensors.items() if "ffn_down" not in name}
    write_gguf(tmp_path / "without.gguf", metadata, without)
    said = convert(1, "without.gguf", "--by-neuron", "--dry-run", "-o", "out.gguf")
    assert "without.gguf: has no ffn_down to keep neuron by neuron; leave out --by-neuron" in said
    assert not Path("out.gguf").exists()
    assert "are opposites" in convert(2, FOLDER / "llama", "--plain", "--by-neuron")
