"""The example in docs/placement.md is the section of today, and the dump says what is there."""

from __future__ import annotations

from pathlib import Path

import gguf_samples as samples
import numpy as np
import pytest
from click.testing import CliRunner

from pyinfer.section import Entry, update_section
from pyinfer_tools import section_dump


def bytes_of(dumped: str) -> bytes:
    """What the columns of hexadecimal digits say."""
    return b"".join(bytes.fromhex(line[7:54].strip()) for line in dumped.splitlines())


def test_the_example_is_up_to_date() -> None:
    text = (Path(__file__).parents[2] / section_dump.FILE).read_text(encoding="utf-8")
    assert section_dump.updated(text) == text, "run python -m pyinfer_tools.section_dump"
    assert "example, counts: int64 [2, 3]" in text


def test_the_dump_is_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = samples.write_tiny(tmp_path / "model.gguf")
    begin = path.stat().st_size
    arrays = {"a": np.arange(7, dtype=np.int16), "none": np.zeros((0, 3)), "one": np.array(2.5, np.float32)}
    update_section(path, e=Entry({"x": "y" * 300}, arrays), f=Entry())
    dumped = section_dump.dump(path)
    assert bytes_of(dumped) == path.read_bytes()[begin:]
    offsets = [int(line[:5]) for line in dumped.splitlines()]
    assert offsets == sorted(offsets)
    assert f"length of the section, bytes: {path.stat().st_size - begin}" in dumped


def test_long_arrays_are_cut_short(tmp_path: Path) -> None:
    path = samples.write_tiny(tmp_path / "model.gguf")
    update_section(path, e=Entry({}, {"long": np.arange(10_000)}))
    dumped = section_dump.dump(path)
    assert "e, long: int64 [10000]" in dumped and len(dumped.splitlines()) < 60 and "\n  ...\n" in dumped


@pytest.mark.parametrize("damage", [False, True])
def test_files_without_a_section(tmp_path: Path, damage: bool) -> None:
    path = samples.write_tiny(tmp_path / "model.gguf")
    if damage:
        update_section(path, e=Entry())
        path.write_bytes(path.read_bytes()[:-1])
    done = CliRunner().invoke(section_dump.main, [str(path)])
    assert done.exit_code == 1 and done.stdout == ""
    assert ("cut off" if damage else "has no placement section") in done.stderr and done.stderr.count(
        "\n"
    ) == 1
