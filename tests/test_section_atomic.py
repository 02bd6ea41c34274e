"""A section is the old one or the new one after a crash at any moment, of the program or of the power."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf_samples as samples
import pytest
from section_samples import hash_bytes, load, one, raw_section, same

from pyinfer import section
from pyinfer.section import Section, write_section

SECTOR = 512  # what a disk writes whole or not at all
N_BYTES = 64 + 96 + 1216 + 32  # of one(1, 300): header, directory, array, footer


class CrashError(Exception):
    pass


class Disk:
    """A file that stops for good when `room` bytes were written (a cut or a sync counts as one).

    `kept` is what the last sync made safe; `sectors` those that were written since.
    """

    def __init__(self, handle, room: int) -> None:
        self.handle, self.room = handle, room
        self.kept = self.image()
        self.sectors: set[int] = set()
        self.written = 0

    def image(self) -> bytes:
        self.handle.seek(0)
        return self.handle.read()

    def write(self, data) -> int:
        part = bytes(data[: max(0, self.room - self.written)])
        place = self.handle.tell()
        self.handle.write(part)
        self.sectors.update(range(place // SECTOR, -(-(place + len(part)) // SECTOR)))
        self.written += len(part)
        self._stop(len(part) < len(data))
        return len(part)

    def truncate(self, length: int) -> None:
        self._stop(self.written >= self.room)
        self.handle.truncate(length)
        self.written += 1

    def sync(self) -> None:
        self._stop(self.written >= self.room)
        self.written += 1
        self.kept, self.sectors = self.image(), set()

    def _stop(self, ended: bool) -> None:
        if ended:
            raise CrashError

    def seek(self, *place: int) -> int:
        return self.handle.seek(*place)

    def read(self, n_bytes: int = -1) -> bytes:
        return self.handle.read(n_bytes)

    def readinto(self, buffer) -> int:
        return self.handle.readinto(buffer)

    def fileno(self) -> int:
        return self.handle.fileno()


@contextlib.contextmanager
def crashing(room: int) -> Iterator[list[Disk]]:
    """write_section stops after so many bytes; yields the disk that it wrote to."""
    opened: Callable = section._opened
    disks: list[Disk] = []

    @contextlib.contextmanager
    def broken(path: Path, mode: str):
        with opened(path, mode) as handle:
            if "+" in mode:
                disks.append(Disk(handle, room))
            yield disks[-1] if "+" in mode else handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(section, "_opened", broken)
        patch.setattr(section, "_sync", lambda handle: handle.sync())
        yield disks


def crash(path: Path, new: Section, room: int) -> Disk:
    """Write until the crash, or to the end."""
    with crashing(room) as disks, contextlib.suppress(CrashError):
        write_section(path, new)
    return disks[-1]


def write_whole(path: Path, new: Section) -> int:
    """Bytes written, cuts included."""
    return crash(path, new, 1 << 30).written


def state_none(path: Path) -> None:
    pass


def state_front(path: Path) -> None:
    write_whole(path, one(1, 300))


def state_long(path: Path) -> None:
    write_whole(path, one(1, 5000))


def state_first_broken(path: Path) -> None:
    """The first section ever was being written at the end."""
    crash(path, one(9, 500), 1000)


def state_appending(path: Path) -> None:
    state_front(path)
    crash(path, one(9, 500), 1000)


def state_moving(path: Path) -> None:
    """The new one is whole at the end, the front is torn."""
    crash(path, one(1, 300), 64 + 1 + N_BYTES + 1 + 700)


def state_both(path: Path) -> None:
    crash(path, one(1, 300), 64 + 1 + N_BYTES + 1 + N_BYTES)


STATES = {
    "none": (state_none, (None, 0)),
    "front": (state_front, (1, 300)),
    "long": (state_long, (1, 5000)),
    "first broken": (state_first_broken, (None, 0)),
    "appending": (state_appending, (1, 300)),
    "moving": (state_moving, (1, 300)),
    "both": (state_both, (1, 300)),
}


State = tuple[Path, bytes, tuple[int | None, int]]


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest, tmp_path: Path) -> State:
    """A model in the state that some crash has left: file, tensors, number and length of the live section."""
    path = samples.write_tiny(tmp_path / "model.gguf")
    body = path.read_bytes()
    prepare, live = STATES[request.param]
    prepare(path)
    return path, body, live


def check(path: Path, body: bytes, *expected: tuple[int | None, int]) -> None:
    """One of these (number, length) is live; numbers of None stand for no section."""
    assert path.read_bytes().startswith(body)
    found = load(path)
    number = None if found is None else found.entries["e"].info["n"]
    (length,) = {length for each, length in expected if each == number}
    assert number is None or same(found, one(number, length).entries)


def test_states_are_what_they_say(tmp_path: Path) -> None:
    """How many sections begin behind the tensors, and how many of them are whole."""
    counts = {}
    for name, (prepare, _) in STATES.items():
        path = samples.write_tiny(tmp_path / f"{name}.gguf")
        begin = path.stat().st_size
        prepare(path)
        rest = path.read_bytes()[begin:]
        if name == "both":
            assert rest[:N_BYTES] == rest[-N_BYTES:]
        counts[name] = rest.count(b"PYINFER>"), rest.count(b"<PYINFER")
    assert counts == {
        "none": (0, 0),
        "front": (1, 1),
        "long": (1, 1),
        "first broken": (1, 0),
        "appending": (2, 1),
        "moving": (2, 1),
        "both": (2, 2),
    }


@pytest.mark.parametrize("length", [0, 290, 300, 900])
def test_a_write_that_stops_at_any_byte(state: State, length: int) -> None:
    path, body, live = state
    before = path.read_bytes()
    total = write_whole(path, one(2, length))
    rooms = [*range(0, total, 217), *range(total - 3, total)]
    for room in rooms:
        path.write_bytes(before)
        crash(path, one(2, length), room)
        check(path, body, live, (2, length))
        write_whole(path, one(3, 40))  # and goes on from there
        check(path, body, (3, 40))
        assert path.stat().st_size < len(body) + 600


def test_every_single_byte_of_one_write(tmp_path: Path) -> None:
    path = samples.write_tiny(tmp_path / "model.gguf")
    body = path.read_bytes()
    write_whole(path, one(1, 3))
    before = path.read_bytes()
    seen = set()
    for room in range(write_whole(path, one(2, 5)) + 1):
        path.write_bytes(before)
        crash(path, one(2, 5), room)
        check(path, body, (1, 3), (2, 5))
        seen.add(load(path).entries["e"].info["n"])  # type: ignore[union-attr]
    assert seen == {1, 2}


@pytest.mark.parametrize("length", [290, 2000])
def test_power_fails_at_any_moment(state: State, length: int) -> None:
    """Of what was not synced any sectors may be on the disk, in any order, and the file's length may lag."""
    path, body, live = state
    before = path.read_bytes()
    total = write_whole(path, one(2, length))
    random_ = random.Random(length)
    for _ in range(40):
        path.write_bytes(before)
        disk = crash(path, one(2, length), random_.choice([random_.randrange(total), total - 1]))
        after = path.read_bytes()
        sizes = len(disk.kept), len(after)
        size = random_.choice([*sizes, random_.randint(*sorted(sizes))])
        lasting = bytearray(disk.kept.ljust(len(after), b"\0"))
        for sector in disk.sectors:
            if random_.random() < 0.5:
                place = slice(sector * SECTOR, (sector + 1) * SECTOR)
                lasting[place] = after[place]
        path.write_bytes(lasting[:size])
        check(path, body, live, (2, length))
        write_whole(path, one(3, 40))
        check(path, body, (3, 40))


def test_when_write_returns_it_is_on_the_disk(state: State) -> None:
    path, body, _ = state
    with crashing(1 << 30) as disks:
        write_section(path, one(2, 30))
    (disk,) = disks
    assert disk.kept == path.read_bytes() and len(disk.kept) == len(body) + 64 + 96 + 128 + 32
    with crashing(1 << 30) as disks:
        write_section(path, Section())
    assert disks[0].kept == path.read_bytes() == body


def test_a_file_that_cannot_be_cut_does_not_grow(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to cut a file while it is mapped."""
    path, body, live = state

    def refuse(disk: Disk, length: int) -> None:
        raise OSError("a user-mapped section is open")

    monkeypatch.setattr(Disk, "truncate", refuse)
    for number in range(2, 8):
        before, new = path.read_bytes(), (number, 200 + number)
        for room in range(0, 3000, 501):
            path.write_bytes(before)
            crash(path, one(*new), room)
            check(path, body, live, new)
        path.write_bytes(before)
        write_whole(path, one(*new))
        check(path, body, new)
        live = new
    assert path.stat().st_size < 4096 + 2 * 20100


def test_a_section_that_only_a_stranger_places_is_replaced(tmp_path: Path) -> None:
    """It ends with the file, but too close to the tensors to be moved there."""
    path = samples.write_tiny(tmp_path / "model.gguf")
    body = path.read_bytes()
    foreign = raw_section(b'{"e":{"info":{"n":5},"arrays":{}}}', b"", hash_bytes(path))
    path.write_bytes(body + bytes(32) + foreign)
    assert load(path).entries["e"].info == {"n": 5}  # type: ignore[union-attr]
    write_section(path, one(2))
    check(path, body, (2, 5))
    assert path.read_bytes().startswith(body + b"PYINFER>")


CHILD = """
import sys, numpy as np
from pyinfer.section import Entry, Section, write_section
number = int(sys.argv[2])
while True:
    number += 1
    entry = Entry({"n": number}, {"a": np.full(number % 50 * 1000, number)})
    write_section(sys.argv[1], Section({"e": entry}))
"""
KILLER = """
import os, random, signal, sys, time
import numpy as np
from pyinfer.gguf_file import open_gguf
from pyinfer import section
from pyinfer.section import Entry, Section, read_section, write_section
section._sync = lambda handle: None  # the system outlives us
path, body, kills = sys.argv[1], open(sys.argv[1], "rb").read(), int(sys.argv[2])
random.seed(5)
last = 0
for _ in range(kills):
    child = os.fork()
    if not child:
        for number in range(last + 1, 1 << 30):
            entry = Entry({"n": number}, {"a": np.full(number % 50 * 1000, number)})
            write_section(path, Section({"e": entry}))
    time.sleep(random.uniform(0.002, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(path, "rb") as file:
        assert file.read(len(body)) == body
    with open_gguf(path) as file:
        found = read_section(file)
    if found is not None:
        number, values = found.entries["e"].info["n"], found.entries["e"].arrays["a"]
        assert number >= last and len(values) == number % 50 * 1000 and (values == number).all()
        last = number
print(last)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the next test does the same without fork, slower")
def test_a_program_killed_at_fifty_moments(tmp_path: Path) -> None:
    path = samples.write_tiny(tmp_path / "model.gguf")
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(path), "50"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_a_program_that_is_killed_while_it_writes(tmp_path: Path) -> None:
    path = samples.write_tiny(tmp_path / "model.gguf")
    body = path.read_bytes()
    last = 0
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(last)])
        before = last
        while last == before:
            with contextlib.suppress(PermissionError):  # Windows, while it writes
                found = load(path)
                last = last if found is None else found.entries["e"].info["n"]
        child.kill()
        child.wait()
        found = load(path)
        assert found is not None and found.entries["e"].info["n"] >= last
        last = found.entries["e"].info["n"]
        assert (found.entries["e"].arrays["a"] == last).all()
        assert path.read_bytes().startswith(body)
