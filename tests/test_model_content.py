"""Finding models by name: a file counts as the model by its content, which is read once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pyinfer import model_store
from pyinfer.errors import ModelNotFoundError
from pyinfer.model_store import MODELS, NamedModel, find_model, models_dir
from pyinfer.wheel import WheelFile

CONTENT = b"GGUF" + bytes(range(256)) * 400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYINFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PYINFER_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def source(cache: Path, monkeypatch: pytest.MonkeyPatch) -> WheelFile:
    """A registered model `tiny`, whose fetch puts the right content in place."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    made = WheelFile("tiny==1.0", 1, "tiny_model_of_tests/tiny.gguf", len(CONTENT), digest)
    monkeypatch.setitem(MODELS, "tiny", NamedModel("tiny", made, "test"))
    monkeypatch.setattr(
        model_store, "fetch_wheel_file", lambda source, target, progress: target.write_bytes(CONTENT)
    )
    return made


def write_installed(folder: Path, content: bytes) -> Path:
    path = folder / "site" / "tiny_model_of_tests" / "tiny.gguf"
    path.parent.mkdir(parents=True)
    (path.parent / "__init__.py").write_text("")
    path.write_bytes(content)
    return path


OTHER = bytes(len(CONTENT))


def test_a_file_of_the_right_size_with_other_content_is_not_used(
    cache: Path, source: WheelFile, tmp_path, monkeypatch
) -> None:
    installed = write_installed(tmp_path, OTHER)
    monkeypatch.syspath_prepend(installed.parents[1])
    target = models_dir() / "tiny.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(OTHER)
    with pytest.raises(ModelNotFoundError, match="tiny: damaged in the cache folder"):
        find_model("tiny", offline=True)
    assert find_model("tiny") == target and target.read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["cached", "fetched", "installed"])
def test_content_is_checked_once_and_again_after_a_change(
    cache: Path, source: WheelFile, tmp_path, monkeypatch, place: str
) -> None:
    path = models_dir() / "tiny.gguf"
    if place == "installed":
        path = write_installed(tmp_path, CONTENT)
        monkeypatch.syspath_prepend(path.parents[1])
    elif place == "cached":
        path.parent.mkdir(parents=True)
        path.write_bytes(CONTENT)
    read: list[Path] = []
    real = model_store.sha256_of
    monkeypatch.setattr(model_store, "sha256_of", lambda path: read.append(path) or real(path))
    assert [find_model("tiny") for _ in range(3)] == [path] * 3
    assert read == ([] if place == "fetched" else [path])  # the fetch itself checks
    before = path.stat().st_mtime_ns
    path.write_bytes(OTHER)
    os.utime(path, ns=(before + 10**9, before + 10**9))
    with pytest.raises(ModelNotFoundError, match="network may not be used"):
        find_model("tiny", offline=True)
    path.write_bytes(CONTENT)
    assert find_model("tiny", offline=True) == path


def test_an_installed_file_is_used_where_nothing_can_be_noted(
    source: WheelFile, tmp_path: Path, monkeypatch
) -> None:
    path = write_installed(tmp_path, CONTENT)
    monkeypatch.syspath_prepend(path.parents[1])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYINFER_CACHE_DIR", str(tmp_path / "file"))
    assert [find_model("tiny", offline=True) for _ in range(2)] == [path] * 2
