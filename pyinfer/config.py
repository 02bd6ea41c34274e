"""The only file that reads the environment.

| variable          | meaning                                                | default                       |
|-------------------|--------------------------------------------------------|-------------------------------|
| PYINFER_CACHE_DIR | folder for fetched models and compiled kernels         | `pyinfer` in the user's cache |
| PYINFER_SIMD      | use this form of the kernels instead of the best one   | the processor's best          |
| PYINFER_THREADS   | number of threads where the caller names none          | chosen from the processor     |
| PYINFER_OFFLINE   | 1, true, yes or on: never use the network              | off                           |
| HF_ENDPOINT       | base address for models of Hugging Face repositories   | https://huggingface.co        |
| HF_TOKEN          | token for private or gated Hugging Face repositories   | none                          |

The user's cache is `$XDG_CACHE_HOME` or `~/.cache`, on macOS `~/Library/Caches`, on Windows `%LOCALAPPDATA%`
(there with a last folder `Cache`). Variables are read at each call, so a change takes effect at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pyinfer.errors import InputError

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def cache_dir() -> Path:
    """The folder for everything that can be fetched or made again; it need not exist yet."""
    chosen = _read("PYINFER_CACHE_DIR")
    if chosen is not None:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = _read("LOCALAPPDATA")
        local = Path(base) if base is not None else _home() / "AppData" / "Local"
        return local / "pyinfer" / "Cache"
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "pyinfer"
    base = _read("XDG_CACHE_HOME")
    # The XDG specification has relative paths ignored.
    if base is not None and os.path.isabs(base):
        return Path(base) / "pyinfer"
    return _home() / ".cache" / "pyinfer"


def simd_level() -> str | None:
    """Name of the kernel form to use, in lower case; None means the best one; the caller checks it."""
    chosen = _read("PYINFER_SIMD")
    return None if chosen is None else chosen.lower()


def threads() -> int | None:
    """Number of threads; None means none was asked for. Raises InputError for anything but 1, 2, 3 ..."""
    chosen = _read("PYINFER_THREADS")
    if chosen is None:
        return None
    if not (chosen.isascii() and chosen.isdigit() and len(chosen) <= 6 and int(chosen) > 0):
        raise InputError(f"PYINFER_THREADS is {chosen[:40]!r}, expected a whole number from 1 to 999999")
    return int(chosen)


def offline() -> bool:
    """Whether the network must not be used. Raises InputError for a value that is neither yes nor no."""
    chosen = (_read("PYINFER_OFFLINE") or "0").lower()
    if chosen not in _TRUE + _FALSE:
        raise InputError(f"PYINFER_OFFLINE is {chosen!r}, expected one of {', '.join(_TRUE + _FALSE)}")
    return chosen in _TRUE


def hf_endpoint() -> str:
    """Base address of Hugging Face or a mirror of it, without a slash at the end. Raises InputError."""
    chosen = _read("HF_ENDPOINT") or "https://huggingface.co"
    if not chosen.lower().startswith(("https://", "http://")):
        raise InputError(
            f"HF_ENDPOINT is {chosen!r}, expected an address that starts with https:// or http://"
        )
    return chosen.rstrip("/")


def hf_token() -> str | None:
    return _read("HF_TOKEN")


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a program that pyinfer starts: the user's own, with these variables changed."""
    return {**os.environ, **changes}


def _read(variable: str) -> str | None:
    """The value without surrounding blanks; an empty one counts as not set."""
    return os.environ.get(variable, "").strip() or None


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise InputError("the home folder is unknown, expected PYINFER_CACHE_DIR to name a folder") from None
