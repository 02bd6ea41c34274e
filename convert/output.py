"""Writing a large file: in the background, under another name until it is whole, never over another file."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pyinfer.errors import CapacityError, InputError
from pyinfer.progress import format_amount

BUFFERS = 3  # one being filled, one being written, one between
SYNC_BYTES = 256 << 20  # so much is written before the disk is asked to keep it: it works while we compute

_sync = getattr(os, "fdatasync", os.fsync)


def check_target(target: Path, sources: Sequence[Path], force: bool) -> None:
    """Raises InputError where a file must not or cannot be written."""
    if not target.parent.is_dir():
        raise InputError(f"{target}: the folder {target.parent} does not exist; make it first")
    if target.is_dir():
        raise InputError(f"{target}: this is a folder, expected the name of the file to be written")
    if not target.exists():
        return
    # Replacing a file that is being read would be safe on Linux only.
    if any(target.samefile(each) for each in sources):
        raise InputError(f"{target} is the file to be read; give the output another name")
    if not force:
        raise InputError(f"{target} exists already; give another name or --force")


def check_space(target: Path, n_bytes: int) -> None:
    """Raises CapacityError where the disk cannot hold so much more."""
    free = shutil.disk_usage(target.parent).free
    if free < n_bytes:
        needed, found = format_amount(n_bytes, "bytes"), format_amount(free, "bytes")
        raise CapacityError(
            f"{target}: the file will have {needed}, but the disk has {found} left; "
            "free some space or write to another disk"
        )


@contextlib.contextmanager
def replacing(target: Path, force: bool) -> Iterator[BinaryIO]:
    """A file to write to that becomes `target` when the block ends well and vanishes when it does not.

    A process that is killed leaves a file NAME.PID.part at most.
    """
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        file = open(part, "xb", buffering=0)  # noqa: SIM115  closed before it is renamed
    except OSError as error:
        raise InputError(f"{target}: cannot write there: {error.strerror}") from error
    try:
        with file:
            yield file
            os.fsync(file.fileno())
        _publish(part, target, force)
    except OSError as error:
        raise CapacityError(f"{target}: writing failed: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


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
