"""What the environment says, and what is said back when it makes no sense."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pyinfer import config
from pyinfer.errors import InputError


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in re.findall(r"^\| ([A-Z_]+) ", config.__doc__ or "", re.MULTILINE):
        monkeypatch.delenv(name, raising=False)


def test_every_variable_is_in_the_table() -> None:
    listed = set(re.findall(r"^\| ([A-Z_]+) ", config.__doc__ or "", re.MULTILINE))
    read = set(re.findall(r'_read\("([A-Z_]+)"\)', Path(config.__file__).read_text("utf-8")))
    assert listed == read - {"XDG_CACHE_HOME", "LOCALAPPDATA"} and len(listed) == 6


def test_the_cache_folder_of_each_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert config.cache_dir() == tmp_path / ".cache" / "pyinfer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert config.cache_dir() == tmp_path / ".cache" / "pyinfer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert config.cache_dir() == tmp_path / "xdg" / "pyinfer"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert config.cache_dir() == tmp_path / "Library" / "Caches" / "pyinfer"
    monkeypatch.setattr(sys, "platform", "win32")
    assert config.cache_dir() == tmp_path / "AppData" / "Local" / "pyinfer" / "Cache"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert config.cache_dir() == tmp_path / "local" / "pyinfer" / "Cache"
    monkeypatch.setenv("PYINFER_CACHE_DIR", str(tmp_path / "mine"))
    assert config.cache_dir() == tmp_path / "mine"


def test_an_unknown_home_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    with pytest.raises(InputError, match="PYINFER_CACHE_DIR"):
        config.cache_dir()


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.threads() is None
    monkeypatch.setenv("PYINFER_THREADS", " 3 ")
    assert config.threads() == 3
    monkeypatch.setenv("PYINFER_THREADS", "")
    assert config.threads() is None
    for bad in ("0", "-1", "two", "1.5", "1e3", "\u0663", "9" * 5000):
        monkeypatch.setenv("PYINFER_THREADS", bad)
        with pytest.raises(InputError, match=r"PYINFER_THREADS is .*expected a whole number"):
            config.threads()


def test_simd_level(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.simd_level() is None
    monkeypatch.setenv("PYINFER_SIMD", "AVX2")
    assert config.simd_level() == "avx2"


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.offline() is False
    for word, meaning in (
        ("1", True),
        ("Yes", True),
        ("on", True),
        ("true", True),
        ("0", False),
        ("off", False),
    ):
        monkeypatch.setenv("PYINFER_OFFLINE", word)
        assert config.offline() is meaning
    monkeypatch.setenv("PYINFER_OFFLINE", "maybe")
    with pytest.raises(InputError, match="PYINFER_OFFLINE is 'maybe', expected one of 1, true"):
        config.offline()


def test_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.hf_endpoint() == "https://huggingface.co" and config.hf_token() is None
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert config.hf_endpoint() == "https://mirror.example" and config.hf_token() == "secret"
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    with pytest.raises(InputError, match="HF_ENDPOINT is 'file:///etc'"):
        config.hf_endpoint()


def test_a_child_gets_the_environment_with_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "kept")
    child = config.child_environment(TMPDIR="there")
    assert child["HF_TOKEN"] == "kept" and child["TMPDIR"] == "there"
