"""Writing a large file: in the background, under another name until it is whole, never over another file.

A link is followed, so that it stays and what it names is written. A process that is killed leaves its
unfinished file; the next one that writes the same name removes it, if nobody holds its lock any more.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pyinfer.errors import CapacityError, InputError
from pyinfer.progress import format_amount

try:
    import fcntl
except ImportError:  # on Windows a file that is open cannot be removed, which serves as well
    fcntl = None

BUFFERS = 3  # one being filled, one being written, one between
SYNC_BYTES = 256 << 20  # so much is written before the disk is asked to keep it: it works while we compute

_sync = getattr(os, "fdatasync", os.fsync)


def behind_links(target: Path) -> Path:
    """The file that is written: where a link leads to, so that the link stays. Raises InputError."""
    if not target.is_symlink():
        return target
    found = Path(os.path.realpath(target))
    if found.is_symlink():
        raise InputError(f"{target}: this link leads back to itself; remove it or give another name")
    return found


def check_target(target: Path, sources: Sequence[Path], force: bool) -> None:
    """Raises InputError where a file must not or cannot be written."""
    target = behind_links(target)
    if target.is_dir():
        raise InputError(f"{target}: this is a folder, expected the name of the file to be written")
    if not target.parent.is_dir():
        if target.parent.exists():
            raise InputError(f"{target}: {target.parent} is a file, expected a folder")
        raise InputError(f"{target}: the folder {target.parent} does not exist; make it first")
    if target.exists():
        _check_existing(target, sources, force)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{target}: cannot write there: the folder {target.parent} may not be written to; "
            "give a name in another folder"
        )


def _check_existing(target: Path, sources: Sequence[Path], force: bool) -> None:
    if not stat.S_ISREG(target.stat().st_mode):
        raise InputError(
            f"{target}: this is no regular file but a device, pipe or the like, expected the name of the "
            "file to be written"
        )
    # Replacing a file that is being read would be safe on Linux only.
    if any(target.samefile(each) for each in sources):
        raise InputError(f"{target} is the file to be read; give the output another name")
    if not force:
        raise InputError(f"{target} exists already; give another name or --force")


def check_space(target: Path, n_bytes: int) -> None:
    """Raises CapacityError where the disk cannot hold so much more."""
    target = behind_links(target)
    # What killed runs have left goes before anything is written.
    free = shutil.disk_usage(target.parent).free + sum(part.stat().st_size for part in _abandoned(target))
    if free < n_bytes:
        needed, found = format_amount(n_bytes, "bytes"), format_amount(free, "bytes")
        raise CapacityError(
            f"{target}: the file will have {needed}, but the disk has {found} left; "
            "free some space or write to another disk"
        )


@contextlib.contextmanager
def replacing(target: Path, force: bool) -> Iterator[BinaryIO]:
    """A file to write to that becomes `target` when the block ends well and vanishes when it does not.

    A process that is killed leaves a file NAME.PID.part at most, which the next one here removes.
    """
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        file = _create(part)
    except FileExistsError as error:
        raise InputError(
            f"{target}: another process is writing it ({part.name}); wait for its end"
        ) from error
    except OSError as error:
        raise InputError(f"{target}: cannot write there: {error.strerror}") from error
    try:
        with file:
            yield file
            os.fsync(file.fileno())
            if fcntl is not None:
                _publish(part, target, force)  # still locked: nobody removes it before it has its name
        if fcntl is None:
            _publish(part, target, force)
    except OSError as error:
        raise CapacityError(f"{target}: writing failed: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _create(part: Path) -> BinaryIO:
    """A new file, locked as long as it is open."""
    while True:
        file = open(part, "xb", buffering=0)  # noqa: SIM115  closed by the caller
        if fcntl is None:
            return file
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        # Between the two lines above another process may have taken it for abandoned.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                return file
        file.close()


def remove_abandoned(target: Path) -> None:
    """Remove the unfinished files of runs that were killed while they wrote `target`."""
    _abandoned(target, remove=True)


def _abandoned(target: Path, *, remove: bool = False) -> list[Path]:
    pattern = re.compile(re.escape(target.name) + r"\.\d+\.part")
    try:
        names = [name for name in os.listdir(target.parent) if pattern.fullmatch(name)]
    except OSError:
        return []  # a folder that may be written to but not read
    return [part for part in map(target.with_name, names) if _is_abandoned(part, remove)]


def _is_abandoned(part: Path, remove: bool) -> bool:
    """Whether nobody writes this file any more. On Windows every file may be: those in use cannot go."""
    try:
        if not stat.S_ISREG(part.lstat().st_mode):
            return False
        with open(part, "r+b") if fcntl is not None else contextlib.nullcontext() as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if remove:
                part.unlink()
        return True
    except OSError:
        return False


def _publish(part: Path, target: Path, force: bool) -> None:
    if not force:
        # A link fails where a file has appeared under the name meanwhile; not every file system has links.
        with contextlib.suppress(OSError, NotImplementedError):
            if not target.exists():
                os.link(part, target)
                _sync_folder(target.parent)
                return
        if target.exists():
            raise InputError(f"{target} appeared while it was being made; give another name or --force")
    os.replace(part, target)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make a new name outlast a power failure, on systems that open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class BackgroundWriter:
    """Writes buffers in order by a thread of its own. Use it as a context manager."""

    def __init__(self, file: BinaryIO, buffer_bytes: int) -> None:
        self._file = file
        self._free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[np.ndarray, int] | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        for _ in range(BUFFERS):
            self._free.put(np.empty(buffer_bytes, np.uint8))
        self._thread = threading.Thread(target=self._work, daemon=True, name="pyinfer-writer")

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._full.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def buffer(self) -> np.ndarray:
        """An empty buffer, uint8 [buffer_bytes]. Raises OSError when writing has failed."""
        empty = self._free.get()
        if self._error is not None:
            raise self._error
        return empty

    def put(self, buffer: np.ndarray, n_bytes: int) -> None:
        """Write the first bytes of a buffer, which is not the caller's any more."""
        self._full.put((buffer, n_bytes))

    def _work(self) -> None:
        unsynced = 0
        while (job := self._full.get()) is not None:
            buffer, n_bytes = job
            try:
                if self._error is None:
                    _write_all(self._file, memoryview(buffer)[:n_bytes])
                    unsynced += n_bytes
                    if unsynced >= SYNC_BYTES:
                        _sync(self._file.fileno())
                        unsynced = 0
            except OSError as error:
                self._error = error
            self._free.put(buffer)


def _write_all(file: BinaryIO, data: memoryview) -> None:
    """A single write may stop short, at 2 GiB or where the disk ends."""
    while len(data):
        data = data[file.write(data) :]
