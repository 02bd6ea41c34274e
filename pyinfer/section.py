"""The placement section of a model's file: what was learned about its neurons, behind its tensors.

Readers of plain GGUF do not see it. It belongs to one model, whose hash it carries, and it is replaced in
place: a crash at any moment leaves the old section or the new one, and the tensors are never touched.

There are two places for it: right behind the tensors ("front"), and ending where the file ends. Of two valid
ones the newer counts. Writing puts the new one at the end of the file, far enough behind that it fits
the front without touching itself; then it goes to the front, and the file is cut behind it.
docs/placement.md has all of it, byte by byte. Of a model in several files the last one holds the section.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pyinfer.errors import CapacityError, FormatError, InputError, PyInferError
from pyinfer.gguf_file import GGUFFile, open_gguf
from pyinfer.section_bytes import (
    ALIGNMENT,
    FOOTER_BYTES,
    HASH_BYTES,
    HEADER_BYTES,
    MAGIC,
    MOST_BYTES,
    VERSION,
    Entry,
    Section,
    decode,
    decode_footer,
    decode_header,
    encode,
    padded,
)

try:
    import fcntl
except ImportError:
    fcntl = None
    import msvcrt

__all__ = [
    "Entry",
    "Section",
    "SectionError",
    "body_bytes",
    "model_hash",
    "read_section",
    "update_section",
    "write_section",
]

_SAMPLE_BYTES = 4096  # of each end of a tensor, for the hash
_MOST_ALIGNMENT = 1 << 20  # of a file that a section is written to: the gap is filled
_WAIT_SECONDS, _POLL_SECONDS = 30.0, 0.01
_LOCK_BYTE = (1 << 62) - 1  # Windows locks bytes, of which this one never exists
_PAGE_BYTES = 4096  # what a disk writes at once must not hold parts of both copies


@dataclass(frozen=True)
class _Found:
    """A valid section: where it begins in the file, and its bytes."""

    begin: int
    sequence: int
    data: bytearray
    section: Section


class SectionError(FormatError):
    """A section that cannot be used.

    found : file and finding, without what to do about it;  newer : it only needs a later pyinfer
    """

    found: str
    newer: bool


class _NewerError(FormatError):
    """A section of a later version of the format, which must not be lost."""


def model_hash(file: GGUFFile) -> str:
    """Identity of a model, 32 hexadecimal digits: everything in front of the tensors, and both ends of each.

    blake2b of 16 bytes over, for each part, the length (u64) and the bytes of its head, then for each of its
    tensors the first and the last 4096 bytes (all of a smaller one, twice).
    """
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for body in file.bodies:
        with _opened(body.path, "rb") as handle:
            head = handle.read(body.begin)
            digest.update(len(head).to_bytes(8, "little"))
            digest.update(head)
            # Reading ahead would fetch 40 times as much, and so would the map.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for tensor in body.tensors:
                size = min(tensor.nbytes, _SAMPLE_BYTES)
                digest.update(_read(handle, tensor.start, size))
                digest.update(_read(handle, tensor.start + tensor.nbytes - size, size))
    return digest.hexdigest()


def body_bytes(file: GGUFFile) -> int:
    """Where a section begins in the model's (last) file: behind its tensors, padded."""
    body = file.bodies[-1]
    return padded(body.end, max(body.alignment, ALIGNMENT))


def read_section(file: GGUFFile) -> Section | None:
    """The section of an open model; None where there is none.

    raises SectionError, one sentence: it is damaged, too large, of a newer version, or of another model
    """
    path, begin = file.bodies[-1].path, body_bytes(file)
    model = bytes.fromhex(model_hash(file))
    with _opened(path, "rb") as handle:
        found, problem = _find(handle, begin, model)
        if problem is not None:  # or it is being written
            with _locked(handle, path, shared=True):
                found, problem = _find(handle, begin, model)
    if found is not None:
        return found.section
    if problem is not None:
        raise _damaged(path, problem)
    return None


def write_section(path: str | os.PathLike[str], section: Section) -> None:
    """Replace the section of a model's file, also a damaged one; one without entries removes it.

    raises FormatError where the file has bytes behind its tensors that are no section, or one of a newer
    version; InputError, CapacityError where it cannot be written
    """
    _edit(path, lambda found, problem: section)


def update_section(path: str | os.PathLike[str], **entries: Entry | None) -> Section:
    """Replace some entries (None removes one), keep the others; the new section.

    raises as `read_section` and `write_section` do
    """

    def change(found: Section | None, problem: FormatError | None) -> Section:
        if problem is not None:
            raise _damaged(Path(path), problem)
        changed = {**(found.entries if found else {}), **entries}
        return Section({name: entry for name, entry in changed.items() if entry is not None})

    return _edit(path, change)


def _edit(
    path: str | os.PathLike[str], change: Callable[[Section | None, FormatError | None], Section]
) -> Section:
    with open_gguf(path) as file:
        target, begin, model = file.bodies[-1].path, body_bytes(file), bytes.fromhex(model_hash(file))
        alignment = file.bodies[-1].alignment
    if alignment > _MOST_ALIGNMENT:
        raise FormatError(
            f"{target.name}: aligns its tensors to {alignment} bytes, "
            f"expected at most {_MOST_ALIGNMENT} to write a section"
        )
    with _opened(target, "r+b") as handle, _locked(handle, target):
        found, problem = _find(handle, begin, model)
        if isinstance(problem, _NewerError):
            raise _damaged(target, problem)
        section = change(found.section if found else None, problem)
        if found is None and problem is None and not _is_free(handle, begin):
            raise FormatError(
                f"{target.name}: the bytes behind the tensors, from byte {begin} on, are none that pyinfer "
                "wrote, expected the end of the file or a placement section; nothing was changed"
            )
        try:
            if section.entries:
                _commit(handle, begin, found, encode(section, found.sequence + 1 if found else 1, model))
            elif found is not None or problem is not None:
                handle.truncate(begin)
                _sync(handle)
        except OSError as error:
            raise CapacityError(
                f"{target.name}: writing the placement section failed ({error.strerror or error}); "
                "the file holds the old one or the new one, and its tensors are untouched"
            ) from error
    return section


def _damaged(path: Path, problem: FormatError) -> SectionError:
    found, newer = f"{path.name}: its placement section {problem}", isinstance(problem, _NewerError)
    remedy = "" if newer else ", and `pyinfer-convert profile --fresh` makes a new one"
    error = SectionError(f"{found}; the model runs without it{remedy}")
    error.found, error.newer = found, newer
    return error


def _find(handle: BinaryIO, begin: int, model: bytes) -> tuple[_Found | None, FormatError | None]:
    """The newest valid section; or what is wrong with the one that is there; or neither."""
    size = handle.seek(0, os.SEEK_END)
    if size <= begin:
        return None, None
    places = []
    if MAGIC.startswith(_read(handle, begin, len(MAGIC))):  # one that is cut off is one, too
        places.append(begin)
    nbytes = None
    if size >= begin + FOOTER_BYTES:
        nbytes = decode_footer(_read(handle, size - FOOTER_BYTES, FOOTER_BYTES))
    if nbytes is not None and size - nbytes not in places:
        places.append(size - nbytes)
    found: list[_Found] = []
    problems: list[FormatError] = []
    for place in places:
        try:
            if place < begin:
                raise FormatError(
                    f"has {nbytes} bytes, expected at most {size - begin}, those behind the tensors"
                )
            found.append(_load(handle, place, size, model))
        except FormatError as error:
            problems.append(error)
        except MemoryError:
            problems.append(FormatError("needs more memory than there is"))
    if found:
        return max(found, key=lambda each: each.sequence), None
    newer = [problem for problem in problems if isinstance(problem, _NewerError)]
    return None, (newer or problems or [None])[0]


def _load(handle: BinaryIO, begin: int, size: int, model: bytes) -> _Found:
    header = decode_header(_read(handle, begin, min(HEADER_BYTES, size - begin)))
    if header.version != VERSION:
        raise _NewerError(
            f"has format version {header.version}, expected {VERSION}; a newer pyinfer wrote it, use that"
        )
    if header.model != model:
        raise FormatError(f"belongs to another model (hash {header.model.hex()}, expected {model.hex()})")
    if not HEADER_BYTES + FOOTER_BYTES <= header.nbytes <= size - begin:
        raise FormatError(
            f"has {header.nbytes} bytes, of which {size - begin} are in the file; it is cut off"
        )
    if header.nbytes > MOST_BYTES:
        raise FormatError(f"has {header.nbytes} bytes, expected at most {MOST_BYTES}")
    if decode_footer(_read(handle, begin + header.nbytes - FOOTER_BYTES, FOOTER_BYTES)) != header.nbytes:
        raise FormatError("has no footer where its header says that it ends")
    data = bytearray(header.nbytes)
    handle.seek(begin)
    done = 0
    while done < len(data):
        count = handle.readinto(memoryview(data)[done:])  # type: ignore[attr-defined]
        if not count:
            raise FormatError(f"ends after {done} bytes, expected {header.nbytes}; it is cut off")
        done += count
    return _Found(begin, header.sequence, data, decode(data, header))


def _is_free(handle: BinaryIO, begin: int) -> bool:
    """Whether what stands behind the tensors may go: nothing, zeros, what a crash left of a first section."""
    handle.seek(begin)
    while block := handle.read(1 << 20):
        if rest := block.lstrip(b"\0"):
            return MAGIC.startswith(rest[: len(MAGIC)])
    return True


def _commit(handle: BinaryIO, begin: int, live: _Found | None, data: bytes) -> None:
    """Put `data` at `begin`, cut the file behind it; what is live stays valid until `data` is."""
    front_end = begin
    if live is not None:
        front_end += len(live.data)
        if live.begin >= front_end:  # a crash came between the two copies: make the one in front, too
            _put(handle, begin, live.data)
            _sync(handle)
    size = handle.seek(0, os.SEEK_END)
    # Behind both, the live one and the place for the new one. Where the file could not be cut it ends later.
    behind = max(padded(max(front_end, begin + len(data)), _PAGE_BYTES), size - len(data))
    if live is None:
        _put(handle, behind, data[:HEADER_BYTES])  # in any order of writing, `_is_free` knows the rest by it
        _sync(handle)
    _put(handle, behind, data)
    _sync(handle)
    _put(handle, begin, data)
    _sync(handle)
    # Windows does not cut a file that is mapped; the copy behind does no harm.
    with contextlib.suppress(OSError):
        handle.truncate(begin + len(data))
        _sync(handle)


def _put(handle: BinaryIO, begin: int, data: bytes | bytearray) -> None:
    handle.seek(begin)
    rest = memoryview(data)
    while len(rest):
        rest = rest[handle.write(rest) :]


def _sync(handle: BinaryIO) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync reaches the disk's cache only
        with contextlib.suppress(OSError):
            fcntl.fcntl(handle.fileno(), fcntl.F_FULLFSYNC)  # type: ignore[union-attr]
            return
    os.fsync(handle.fileno())


def _read(handle: BinaryIO, begin: int, n_bytes: int) -> bytes:
    handle.seek(begin)
    return handle.read(n_bytes)


@contextlib.contextmanager
def _opened(path: Path, mode: str) -> Iterator[BinaryIO]:
    try:
        with open(path, mode, buffering=0) as handle:
            yield handle  # type: ignore[misc]
    except PyInferError:
        raise
    except OSError as error:
        what = "cannot be written, expected a file of your own; copy it" if "+" in mode else "cannot be read"
        raise InputError(f"{path}: {what} ({error.strerror or error})") from None


@contextlib.contextmanager
def _locked(handle: BinaryIO, path: Path, *, shared: bool = False) -> Iterator[None]:
    """One writer at a time. A reader (`shared`) that waits for too long goes ahead."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not (locked := _try_lock(handle, shared)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    if not locked and not shared:
        raise InputError(f"{path.name}: another process is writing its placement section; wait for its end")
    try:
        yield
    finally:
        if locked:
            _unlock(handle)


def _try_lock(handle: BinaryIO, shared: bool) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        else:
            handle.seek(_LOCK_BYTE)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _unlock(handle: BinaryIO) -> None:
    with contextlib.suppress(OSError):
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_UN)
        else:
            handle.seek(_LOCK_BYTE)
            msvcrt.locking(handle.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
