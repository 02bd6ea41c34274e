"""Files in the cache folder that are whole or absent: one maker at a time, made aside, put in place at once.

A process may be killed at any moment. What it leaves is a folder or a lock that the next maker of that file
finds without an owner, because the system gives up the locks of dead processes.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pyinfer.errors import CapacityError, ModelNotFoundError

try:
    import fcntl
except ImportError:
    fcntl = None
    import msvcrt

_POLL_SECONDS = 0.1
_BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Only one process at a time makes `target`; the others wait here. Makes the folder of `target`."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(target.name + ".lock")
    while True:
        with disk_errors(target):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if _lock(handle) and _is_current(handle, path):
            break
        os.close(handle)
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        if fcntl is not None:
            # Removed before it is released: whoever still waits for this one finds that it is not current.
            path.unlink(missing_ok=True)
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        # Where a file system has no locks, two processes may do the work twice, and the result is the same.
        return error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
    return True


def _is_current(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, removed at the end together with those of killed makers of `target`.

    To be used by the owner of `exclusive(target)`.
    """
    prefix = f".{target.name}."
    for stale in target.parent.glob(glob.escape(prefix) + "*"):
        shutil.rmtree(stale, ignore_errors=True)
    with disk_errors(target):
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(made: Path, target: Path) -> None:
    """Put a finished file in its place; after a power failure it is there whole or not at all."""
    with disk_errors(target):
        with open(made, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(made, target)


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Say in one sentence what the system refused; errors of pyinfer pass."""
    try:
        yield
    except (CapacityError, ModelNotFoundError):
        raise
    except OSError as error:
        folder = target.parent
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise CapacityError(
                f"{folder}: no space left for {target.name}; make space or set PYINFER_CACHE_DIR"
            ) from error
        raise ModelNotFoundError(
            f"{folder}: {target.name} cannot be written there ({error.strerror or error}); "
            "expected a writable folder, PYINFER_CACHE_DIR names another one"
        ) from error


def need_space(target: Path, nbytes: int) -> None:
    """Raise CapacityError, and leave nothing, when `nbytes` do not fit where `target` goes."""
    free_bytes = shutil.disk_usage(target.parent).free
    if nbytes > free_bytes:
        raise CapacityError(
            f"{target.parent}: {target.name} needs {nbytes} bytes of disk space, {free_bytes} are free; "
            "make space or name another folder by PYINFER_CACHE_DIR"
        )


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
