"""The commands beside the conversion (profile, predict, place): how they are told apart from sources."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pyinfer_convert import cli

HF = Path(__file__).parents[1] / "golden" / "hf"


def convert(*arguments):
    return CliRunner().invoke(cli.main, [str(each) for each in arguments], prog_name="pyinfer-convert")


def test_every_file_of_a_command_is_a_command():
    files = {path.stem.removeprefix("cli_") for path in Path(cli.__file__).parent.glob("cli_*.py")}
    assert files == cli.COMMANDS.keys()


def test_help_lists_the_commands_and_imports_none_of_them():
    code = (
        "import sys; from pyinfer_convert.cli import main\n"
        "main(['--help'], prog_name='pyinfer-convert', standalone_mode=False)\n"
        "heavy = 'numba', 'gguf', 'pyinfer.runtime.loader'\n"
        "print([m for m in sys.modules if m in heavy or m.startswith('pyinfer_convert.cli_')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "Usage: pyinfer-convert [OPTIONS] SRC"
    for name, text in cli.COMMANDS.items():
        assert next(line for line in lines if line.split()[:2] == [name, "MODEL"]).endswith(text)
    assert lines[-1] == "[]"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_has_its_own_usage(name):
    shown = convert(name, "--help")
    assert shown.exit_code == 0
    assert shown.stdout.startswith(f"Usage: pyinfer-convert {name} [OPTIONS] MODEL")
    assert "--requant" not in shown.stdout
    wrong = convert(name)
    assert (wrong.exit_code, wrong.stdout) == (2, "") and f"pyinfer-convert {name}" in wrong.stderr
    assert convert(name, "model.gguf", "--no-such-option").exit_code == 2


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_gets_what_stands_behind_its_name(name, monkeypatch):
    given = []

    @click.command()
    @click.argument("model")
    @click.option("--text")
    @click.pass_context
    def command(context, model, text):
        given.append((model, text))
        context.exit(7)

    module = importlib.import_module(f"pyinfer_convert.cli_{name}")
    monkeypatch.setattr(module, name, command)
    assert convert(name, "a.gguf", "--text", "b.txt").exit_code == 7
    assert given == [("a.gguf", "b.txt")]


def test_a_folder_with_the_name_of_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(HF / "llama", tmp_path / "profile")
    done = convert("./profile", "--quant", "f32")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "profile-f32.gguf").exists()
    done = convert("--quant", "f32", "profile", "-o", "first.gguf")  # behind an option it is a source
    assert done.exit_code == 0, done.stderr
    assert convert("profile").exit_code == 2  # the command, which wants a model
    assert "./profile" in convert("--help").stdout
