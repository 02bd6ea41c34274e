"""Files of models that stay as they came: commands that write into a model's own file refuse them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyinfer.errors import InputError
from pyinfer.model_store import MODELS, NamedModel, check_may_change, find_model, models_dir
from pyinfer.wheel import WheelFile
from pyinfer_convert.cli import main as convert

GOLDEN = Path(__file__).parent / "golden" / "llama.gguf"  # without a profile
CONTENT = GOLDEN.read_bytes()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYINFER_CACHE_DIR", str(tmp_path / "cache"))


def written(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT)
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as found:
        check_may_change(path)
    assert str(found.value).startswith(f"{path}: ") and "copy it first" in str(found.value)
    return str(found.value)


def test_files_of_ones_own_may_change(tmp_path, monkeypatch):
    check_may_change(written(tmp_path / "model.gguf"))
    check_may_change(tmp_path / "not" / "there.gguf")  # said by whoever opens it
    check_may_change(written(models_dir().parent / "models-of-mine" / "model.gguf"))
    monkeypatch.chdir(tmp_path)
    check_may_change("model.gguf")


def test_the_embedded_default_stays():
    assert "is a part of an installed package, expected a file of your own" in refused(find_model())
    refused(Path(os.path.relpath(find_model())))


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_what_pip_installed_stays(tmp_path, folder):
    assert "installed package" in refused(written(tmp_path / "lib" / folder / "some" / "model.gguf"))


def test_a_models_wheel_stays_wherever_it_is_installed(tmp_path, monkeypatch):
    path = written(tmp_path / "anywhere" / "tiny_wheel_of_tests" / "tiny.gguf")
    (path.parent / "__init__.py").touch()
    check_may_change(path)
    source = WheelFile("x==1", 1, "tiny_wheel_of_tests/tiny.gguf", len(CONTENT), "0")
    monkeypatch.setitem(MODELS, "tiny", NamedModel("tiny", source, "none"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "anywhere")])
    assert "installed package" in refused(path)


def test_what_was_fetched_stays(tmp_path):
    path = written(models_dir() / "organisation" / "repository" / "model.gguf")
    assert "is kept as it was fetched" in refused(path)
    linked = tmp_path / "linked.gguf"
    try:
        linked.symlink_to(path)
    except OSError:  # Windows, for some users
        return
    refused(linked)
    circle = tmp_path / "circle.gguf"
    circle.symlink_to(circle)
    check_may_change(circle)  # said by whoever opens it


@pytest.mark.parametrize(
    "command", [("profile", "--text", "words.txt"), ("place", "--vram", "0")], ids=lambda each: each[0]
)
def test_commands_refuse_it_and_change_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("some words\n" * 50, encoding="utf-8")
    name, *options = command
    path = written(models_dir() / "kept.gguf")
    done = CliRunner().invoke(convert, [name, str(path), *options])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {path}: is kept as it was fetched")
    assert path.read_bytes() == CONTENT


def test_a_dry_run_changes_nothing_and_may_look(tmp_path):
    path = written(models_dir() / "kept.gguf")
    done = CliRunner().invoke(convert, ["place", str(path), "--vram", "0", "--dry-run"])
    assert "has no profile of its neurons" in done.stderr
