"""The command pyinfer-convert: exit codes, what it says, what it writes."""

from __future__ import annotations

import signal
from pathlib import Path

import gguf
import pytest
from click.testing import CliRunner

from pyinfer.gguf_file import open_gguf
from pyinfer_convert import cli

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


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_it_between_two_parts_and_leaves_nothing(convert, tmp_path, monkeypatch, name, code):
    number, calls = getattr(signal, name), []
    before = signal.getsignal(number)

    def quantize(*_, **__):
        signal.raise_signal(number)
        calls.append(number)  # the running part comes to its end

    monkeypatch.setattr("pyinfer_convert.pipeline.quantize_rows", quantize)
    assert convert(HF / "llama").exit_code == code
    assert calls == [number]
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(number) is before


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
