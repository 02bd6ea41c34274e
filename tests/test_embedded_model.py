"""The default model is a part of the package: found without a network, also in a zip file, and run."""

from __future__ import annotations

import importlib.resources
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pyinfer import model_store
from pyinfer.errors import CapacityError, ModelNotFoundError
from pyinfer.gguf_file import open_gguf
from pyinfer.model_store import DEFAULT_MODEL, MODELS, EmbeddedFile, find_model, models_dir
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer.runtime.stats import layer_stats
from pyinfer.section import read_section
from pyinfer_convert.cli import main as convert

STORIES = Path(__file__).parent / "golden" / "stories.txt"

MOST_BYTES = 16 << 20
PACKAGE = Path(model_store.__file__).parent
CONTENT = b"GGUF" + bytes(range(256)) * 40
FIND = "from pyinfer.model_store import find_model; print(find_model(offline=True))"
PATIENCE_SECONDS = 120  # kernels may have to be compiled


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYINFER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def zipped(folder: Path, content: bytes | None) -> Path:
    """The package in a zip file, with this as its model."""
    path = folder / "package.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for each in PACKAGE.rglob("*.py"):
            archive.write(each, each.relative_to(PACKAGE.parent))
        if content is not None:
            archive.writestr("pyinfer/data/stories15m-relu.gguf", content)
    return path


def find_in(archive: Path, **environment: str) -> subprocess.CompletedProcess:
    """find_model in a Python that has the package from there alone."""
    code = f"import sys; sys.path.insert(0, {str(archive)!r}); {FIND}"
    given = {**os.environ, "PYTHONPATH": "", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=given, timeout=PATIENCE_SECONDS
    )


def test_it_is_where_the_package_is_and_nothing_is_written(cache):
    path = find_model(offline=True)
    assert path == find_model(DEFAULT_MODEL) == PACKAGE / "data" / "stories15m-relu.gguf"
    assert path.stat().st_size <= MOST_BYTES
    assert not cache.exists()
    with open_gguf(path) as file:
        assert file.architecture == "llama"


def test_it_is_sparse_and_reads_its_predictors():
    """What models.md says of it, on the start of the text that its section was made from."""
    with load_model(find_model(offline=True), observe="stats") as model:
        assert model.plan.modes == {"predicted"} and not model.notices
        session = Session(model, 256, 2)
        tokens = model.tokenizer.encode(STORIES.read_text(encoding="utf-8")[:4000])[:256]
        for first in range(0, 256, 16):
            session.prefill(tokens[first : first + 16])
        layers = layer_stats(session)
        session.close()
    assert sum(each.fired for each in layers) / len(layers) < 0.30
    assert sum(each.recall for each in layers) / len(layers) >= 0.985
    assert sum(each.skipped for each in layers) / len(layers) > 0.5


def test_its_section_can_be_made_again(tmp_path):
    """`profile`, `predict` and `place` on the same text give the same arrays."""
    made, model = tmp_path / "made.gguf", tmp_path / "model.gguf"
    shutil.copy(find_model(offline=True), model)
    for command in (
        ["profile", str(model), "--text", str(STORIES), "--fresh"],
        ["predict", str(model), "--text", str(STORIES), "-o", str(made)],
        ["place", str(made), "--vram", "0"],
    ):
        result = CliRunner().invoke(convert, command)
        assert result.exit_code == 0, result.output
    with open_gguf(find_model(offline=True)) as shipped, open_gguf(made) as again:
        expected, found = read_section(shipped), read_section(again)
    assert expected is not None and found is not None and set(found.entries) == set(expected.entries)
    np.testing.assert_array_equal(
        found.entries["profile"].arrays["counts"], expected.entries["profile"].arrays["counts"]
    )
    # Least squares of another processor may round otherwise.
    np.testing.assert_allclose(
        found.entries["predictors"].arrays["thresholds"],
        expected.entries["predictors"].arrays["thresholds"],
        atol=0.1,
    )


def test_it_is_copied_out_of_a_zip_file(cache, tmp_path):
    archive, target = zipped(tmp_path, CONTENT), models_dir() / "stories15m-relu.gguf"
    for before in (None, CONTENT, CONTENT[:-1], b"x" * len(CONTENT)):
        if before is not None:
            target.write_bytes(before)
        found = find_in(archive)
        assert found.returncode == 0, found.stderr
        assert found.stdout.strip() == str(target)
        assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir() if path.suffix != ".lock"] == [target.name]


def test_a_copy_that_is_there_needs_no_writing(cache, tmp_path):
    archive, target = zipped(tmp_path, CONTENT), models_dir() / "stories15m-relu.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    modified = target.stat().st_mtime_ns
    assert find_in(archive).stdout.strip() == str(target)
    assert target.stat().st_mtime_ns == modified


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    found = find_in(zipped(tmp_path, CONTENT), PYINFER_CACHE_DIR=str(tmp_path / "file"))
    assert found.returncode == 1
    last = found.stderr.splitlines()[-1]
    assert (
        last.startswith("pyinfer.errors.ModelNotFoundError: ") and "PYINFER_CACHE_DIR names another" in last
    )


def test_no_space_for_a_copy_is_one_sentence(cache, tmp_path, monkeypatch):
    archive = zipped(tmp_path, CONTENT)
    monkeypatch.setattr(importlib.resources, "files", lambda _: zipfile.Path(archive, "pyinfer/"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5}))
    with pytest.raises(CapacityError, match=r"stories15m-relu\.gguf needs 10244 bytes"):
        find_model()
    assert not (models_dir() / "stories15m-relu.gguf").exists()


def test_a_missing_file_is_one_sentence(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(ModelNotFoundError, match=rf"^{DEFAULT_MODEL}: .*missing.*install pyinfer again"):
        find_model()
    found = find_in(zipped(tmp_path, None))
    assert found.returncode == 1 and "is missing, expected it as a part of pyinfer" in found.stderr


def test_the_default_is_the_embedded_model():
    assert [name for name, model in MODELS.items() if isinstance(model.source, EmbeddedFile)] == [
        DEFAULT_MODEL
    ]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pyinfer", *arguments],
        capture_output=True, stdin=subprocess.DEVNULL, timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip


def test_it_tells_a_story_with_no_network():
    done = command("Once upon a time", "--offline", "--temp", "0", "-n", "40")
    assert done.returncode == 0, done.stderr
    story = done.stdout.decode()
    assert len(story.split()) > 15 and "there was" in story
    assert b"fetching" not in done.stderr
    again = command("Once upon a time", "--offline", "--temp", "0", "-n", "40")
    assert again.stdout.decode() == story


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals in the standard library")
def test_without_a_prompt_it_says_how_to_chat():
    import pty

    person, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pyinfer"],
            stdin=terminal, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False,
        )  # fmt: skip
    finally:
        os.close(person)
        os.close(terminal)
    assert (done.returncode, done.stdout) == (1, "")
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: stories15m-relu.gguf has no chat template")
    assert "as prompt" in line and "-m smollm2-135m to chat" in line
    assert "smollm2-135m" in MODELS
