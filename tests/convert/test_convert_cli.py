"""The command pyinfer-convert: exit codes, what it says, what it writes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from checkpoint_files import torch_file
from click.testing import CliRunner

from pyinfer.gguf_file import open_gguf
from pyinfer_convert import cli, pipeline

HF = Path(__file__).parents[1] / "golden" / "hf"


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """convert(*arguments) in a folder of its own -> click's result."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        found = CliRunner().invoke(cli.main, [str(each) for each in arguments])
        assert found.stdout == ""
        return found

    return run


def test_a_checkpoint_becomes_a_file_named_after_it(convert, tmp_path):
    done = convert(HF / "llama", "--quant", "q8_0")
    assert done.exit_code == 0, done.stderr
    assert "llama-q8_0.gguf: " in done.stderr and "Q8_0" in done.stderr and "/s of input" in done.stderr
    with open_gguf(tmp_path / "llama-q8_0.gguf") as file:
        assert file.architecture == "llama"
        assert file.get("general.file_type") == gguf.LlamaFileType.MOSTLY_Q8_0


def test_a_gguf_is_requantized(convert, tmp_path):
    assert convert(HF / "llama", "--quant", "f32", "-o", "first-f32.gguf").exit_code == 0
    done = convert("first-f32.gguf", "--quant", "q4_1", "--requant")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "first-q4_1.gguf").exists()
    refused = convert(HF / "llama", "--requant")
    assert refused.exit_code == 1 and "--requant is for a GGUF file" in refused.stderr


def test_dry_run_writes_nothing(convert, tmp_path):
    done = convert(HF / "opt", "--quant", "q4_k", "--dry-run", "-v")
    assert done.exit_code == 0 and "nothing was written" in done.stderr
    assert "no whole blocks of Q4_K" in done.stderr and "ffn_down_t.weight" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_what_the_real_run_would(convert, tmp_path, monkeypatch):
    (tmp_path / "there.gguf").write_bytes(b"mine")
    for target, message in (("there.gguf", "exists already"), ("no/out.gguf", "does not exist")):
        real, dry = convert(HF / "llama", "-o", target), convert(HF / "llama", "-o", target, "--dry-run")
        assert real.exit_code == dry.exit_code == 1 and message in dry.stderr
        assert real.stderr.splitlines()[-1] == dry.stderr.splitlines()[-1]
        assert "nothing was written" in dry.stderr
    assert convert(HF / "llama", "-o", "there.gguf", "--dry-run", "--force").exit_code == 0
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    shutil.copytree(HF / "llama", tmp_path / "model")
    onto = convert("model", "-o", "model/config.json", "--dry-run", "--force")
    assert onto.exit_code == 1 and "is the file to be read" in onto.stderr
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    full = convert(HF / "llama", "-o", "out.gguf", "--dry-run")
    assert full.exit_code == 1 and "the disk has 5 B left" in full.stderr


def test_an_adapter_beside_the_weights_is_mentioned(convert, tmp_path):
    shutil.copytree(HF / "llama", tmp_path / "model")
    assert "LoRA" not in convert("model", "-o", "first.gguf").stderr
    (tmp_path / "model" / "adapter_model.safetensors").touch()
    done = convert("model", "-o", "second.gguf")
    assert done.exit_code == 0 and done.stderr.count("adapter") == 2
    assert (
        "note: model: the LoRA adapter in this folder (adapter_model.safetensors) is not merged"
        in done.stderr
    )
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()


@pytest.mark.parametrize("name", ["nemotron", "relu_llama"])
def test_plain_means_the_same_for_a_gguf(convert, tmp_path, name):
    """F32 both ways: through a sparse file and --plain, or plain at once, the model is the same."""
    layers = json.loads((HF / name / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    assert convert(HF / name, "--quant", "f32", "--plain", "-o", "expected.gguf").exit_code == 0
    assert convert(HF / name, "--quant", "f32", "-o", "sparse.gguf").exit_code == 0
    writer = gguf.GGUFReader(tmp_path / "sparse.gguf")
    assert sum("ffn_down_t" in each.name for each in writer.tensors) == layers
    assert convert("sparse.gguf", "--quant", "f32", "--plain", "-o", "found.gguf").exit_code == 0
    expected, found = (gguf.GGUFReader(tmp_path / f"{each}.gguf") for each in ("expected", "found"))
    assert [each.name for each in found.tensors] == [each.name for each in expected.tensors]
    for one, other in zip(found.tensors, expected.tensors):
        assert one.shape.tolist() == other.shape.tolist() and one.tensor_type == other.tensor_type
        np.testing.assert_array_equal(one.data, other.data, err_msg=one.name)
    keys = [key for key in expected.fields if key not in ("general.name", "GGUF.kv_count")]
    assert [found.fields[key].contents() for key in keys] == [expected.fields[key].contents() for key in keys]
    assert found.fields.keys() == expected.fields.keys()


def test_plain_takes_predictors_out(convert, tmp_path):
    layers = json.loads((HF / "opt" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    (tmp_path / "predictors").mkdir()
    random = np.random.default_rng(1)
    reader = gguf.GGUFReader
    assert convert(HF / "opt", "--quant", "f32", "--plain", "-o", "plain.gguf").exit_code == 0
    shapes = {each.name: each.shape for each in reader(tmp_path / "plain.gguf").tensors}
    embedding, neurons = shapes["blk.0.ffn_up.weight"]
    for layer in range(layers):
        parts = {"fc1.weight": (16, embedding), "fc2.weight": (neurons, 16)}
        file = torch_file({each: random.standard_normal(parts[each]).astype("f2") for each in parts})
        (tmp_path / "predictors" / f"model_{layer}.pt").write_bytes(file)
    (tmp_path / "predictors" / "config.json").write_text('{"sparse_threshold": 0.5}', encoding="utf-8")
    assert convert(HF / "opt", "--predictor", "predictors", "--quant", "f16", "-o", "own.gguf").exit_code == 0
    assert any("fc1" in each.name for each in reader(tmp_path / "own.gguf").tensors)
    assert convert("own.gguf", "--plain", "--quant", "f16", "-o", "out.gguf").exit_code == 0
    found = reader(tmp_path / "out.gguf")
    assert {each.name for each in found.tensors} == shapes.keys()
    assert not any("powerinfer" in key for key in found.fields)
    refused = convert(HF / "opt", "--plain", "--predictor", "predictors")
    assert refused.exit_code == 2 and "leave out --plain or --predictor" in refused.stderr
    refused = convert(HF / "opt", "--plain", "--format", "powerinfer")
    assert refused.exit_code == 2 and "leave out --plain or --format powerinfer" in refused.stderr


def test_a_source_that_is_no_model_says_what_to_give(convert, tmp_path):
    empty = convert("")
    assert empty.exit_code == 1 and "the source is empty, expected a folder" in empty.stderr
    shutil.copytree(HF / "llama", tmp_path / "model")
    for name in ("model.safetensors", "config.json", "tokenizer.model", "pytorch_model.bin"):
        (tmp_path / "model" / name).touch()
        found = convert(f"model/{name}")
        assert found.exit_code == 1 and f"give {tmp_path / 'model'}" in found.stderr, found.stderr
        assert "one file of a checkpoint" in found.stderr
    assert convert(HF / "llama", "-o", "real.gguf").exit_code == 0
    (tmp_path / "real.gguf").rename(tmp_path / "ggml-model.bin")  # the name that elder files have
    assert convert("ggml-model.bin", "--quant", "f16", "-o", "again.gguf").exit_code == 0


def test_existing_files_need_force(convert, tmp_path):
    assert convert(HF / "llama", "-o", "out.gguf").exit_code == 0
    before = (tmp_path / "out.gguf").read_bytes()
    again = convert(HF / "llama", "-o", "out.gguf", "--quant", "f16")
    assert again.exit_code == 1 and "--force" in again.stderr and "Traceback" not in again.stderr
    assert (tmp_path / "out.gguf").read_bytes() == before
    assert convert(HF / "llama", "-o", "out.gguf", "--quant", "f16", "--force").exit_code == 0
    assert (tmp_path / "out.gguf").read_bytes() != before


def test_wrong_usage_is_2_and_wrong_input_is_1(convert, tmp_path):
    assert convert(HF / "llama", "--quant", "q9").exit_code == 2
    assert convert().exit_code == 2
    missing = convert("no/such/folder/at/all")
    assert missing.exit_code == 1 and "error: " in missing.stderr and "Traceback" not in missing.stderr
    assert convert("missing.gguf").exit_code == 1
    (tmp_path / "text.gguf").write_text("not a model")
    assert convert("text.gguf").exit_code == 1
    verbose = convert("text.gguf", "-v")
    assert verbose.exit_code == 1 and "Traceback" in verbose.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.gguf"]


def test_an_interrupt_says_so_and_leaves_nothing(convert, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyinfer_convert.pipeline.quantize_rows", interrupted)
    done = convert(HF / "llama")
    assert done.exit_code == 130 and "interrupted" in done.stderr
    assert list(tmp_path.iterdir()) == []


ENDING = [name for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


@pytest.fixture
def handler(request):
    """handler(number, function): handle a signal so for one test, whatever started the tests."""
    previous = {}

    def handle(number, function):
        previous[number] = signal.signal(number, function)

    yield handle
    for number, function in previous.items():
        signal.signal(number, function)


@pytest.mark.parametrize("name", ENDING)
def test_a_signal_ends_it_between_two_parts_and_leaves_nothing(convert, handler, tmp_path, monkeypatch, name):
    number, calls = getattr(signal, name), []
    handler(number, signal.SIG_DFL)
    before = signal.getsignal(number)

    def quantize(*_, **__):
        signal.raise_signal(number)
        calls.append(number)  # the running part comes to its end

    monkeypatch.setattr("pyinfer_convert.pipeline.quantize_rows", quantize)
    done = convert(HF / "llama")
    assert done.exit_code == 128 + number and "interrupted; nothing was written" in done.stderr
    assert calls == [number]
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(number) is before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the signal of a closed terminal is POSIX's")
def test_a_conversion_that_shall_outlive_its_terminal_does(convert, handler, tmp_path, monkeypatch):
    """As nohup starts it."""
    handler(signal.SIGHUP, signal.SIG_IGN)
    quantize = pipeline.quantize_rows

    def closing(*arguments, **named):
        signal.raise_signal(signal.SIGHUP)
        quantize(*arguments, **named)

    monkeypatch.setattr(pipeline, "quantize_rows", closing)
    assert convert(HF / "llama", "-o", "out.gguf").exit_code == 0
    assert (tmp_path / "out.gguf").exists() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_terminal_that_is_gone_hinders_no_clean_end(convert, tmp_path, monkeypatch):
    """Whatever is said to it fails, in the middle of the work."""

    def gone(*_, **__):
        raise OSError(5, "Input/output error")

    def quantize(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(cli.click, "echo", gone)
        monkeypatch.setattr(cli.Progress, "__call__", gone)

    monkeypatch.setattr("pyinfer_convert.pipeline.quantize_rows", quantize)
    assert convert(HF / "llama").exit_code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, expected",
    [
        ("tiny", "tiny-q4_0.gguf"),
        ("tiny.Q8_0", "tiny-q4_0.gguf"),
        ("tiny-Q4_K_M", "tiny-q4_0.gguf"),
        ("tiny-fp16", "tiny-q4_0.gguf"),
        ("f16", "f16-q4_0.gguf"),
        ("Llama-3.2-1B", "Llama-3.2-1B-q4_0.gguf"),
    ],
)
def test_default_name(name, expected):
    assert cli.default_name(name, "q4_0") == expected
