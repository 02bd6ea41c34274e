"""The file that is written: links, devices, folders that refuse, and what killed writers have left."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyinfer.errors import InputError
from pyinfer_convert import output
from pyinfer_convert.output import check_space, check_target, remove_abandoned, replacing

posix = pytest.mark.skipif(
    os.name == "nt", reason="Windows has no pipes by name, and links for few users only"
)


def put(target: Path, data: bytes, *, force: bool = False) -> None:
    with replacing(output.behind_links(target), force) as file:
        file.write(data)


@posix
def test_a_link_stays_and_what_it_names_is_written(tmp_path):
    (tmp_path / "models").mkdir()
    real, link = tmp_path / "models" / "real.gguf", tmp_path / "link.gguf"
    link.symlink_to(Path("models") / "real.gguf")
    check_target(link, [], force=False)
    put(link, b"first")
    assert link.is_symlink() and real.read_bytes() == b"first" and not real.is_symlink()
    with pytest.raises(InputError, match=r"real\.gguf exists already"):
        check_target(link, [], force=False)
    with pytest.raises(InputError, match="is the file to be read"):
        check_target(link, [real], force=True)
    put(link, b"second", force=True)
    assert link.is_symlink() and real.read_bytes() == b"second"
    assert [path.name for path in real.parent.iterdir()] == ["real.gguf"]


@posix
def test_links_that_lead_nowhere_are_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="leads back to itself"):
        check_target(tmp_path / "loop", [], force=True)
    (tmp_path / "far").symlink_to(Path("absent") / "out.gguf")
    with pytest.raises(InputError, match=r"the folder .*absent does not exist"):
        check_target(tmp_path / "far", [], force=True)


def test_devices_are_not_replaced():
    with pytest.raises(InputError, match="no regular file but a device"):
        check_target(Path(os.devnull), [], force=True)
    assert not stat.S_ISREG(os.stat(os.devnull).st_mode)


@posix
def test_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file but a device, pipe"):
        check_target(tmp_path / "pipe", [], force=True)


def test_folders_that_are_files_or_refuse_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file is a file, expected a folder"):
        check_target(tmp_path / "file" / "out.gguf", [], force=False)
    # Tests may run as one to whom nothing is forbidden.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=r"cannot write there: the folder .* may not be written to"):
        check_target(tmp_path / "out.gguf", [], force=False)


WRITER = """if True:
    import sys
    from pathlib import Path
    from pyinfer_convert.output import replacing
    with replacing(Path(sys.argv[1]), False) as file:
        file.write(b"x" * 5000)
        print("ready", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """writer() -> a process that is in the middle of writing out.gguf, and its unfinished file."""
    started = []

    def start() -> tuple[subprocess.Popen, Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "out.gguf")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline().strip() == b"ready"
        (part,) = tmp_path.glob("out.gguf.*.part")
        return process, part

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, writer):
    process, part = writer()
    process.kill()
    process.wait()
    assert part.stat().st_size == 5000
    others = [tmp_path / name for name in ("out.gguf.12x.part", "out.gguf.part", "other.gguf.12.part")]
    for other in others:
        other.touch()
    remove_abandoned(tmp_path / "out.gguf")
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_what_another_process_still_writes_is_kept(tmp_path, writer):
    process, part = writer()
    remove_abandoned(tmp_path / "out.gguf")
    assert part.stat().st_size == 5000
    process.communicate(b"", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "out.gguf").read_bytes() == b"x" * 5000
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_process_of_the_same_number_is_told(tmp_path):
    part = tmp_path / f"out.gguf.{os.getpid()}.part"
    part.touch()
    with pytest.raises(InputError, match=rf"another process is writing it \({part.name}\)"):
        put(tmp_path / "out.gguf", b"new")
    assert part.exists()
    remove_abandoned(tmp_path / "out.gguf")
    put(tmp_path / "out.gguf", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_space_that_will_be_free_counts(tmp_path, monkeypatch):
    (tmp_path / "out.gguf.7.part").write_bytes(bytes(1000))
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    check_space(tmp_path / "out.gguf", 1100)
    with pytest.raises(MemoryError, match=r"the disk has .* left"):
        check_space(tmp_path / "out.gguf", 1101)
    assert (tmp_path / "out.gguf.7.part").exists()
