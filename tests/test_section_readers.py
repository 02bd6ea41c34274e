"""A model with a placement section is a plain GGUF file to everybody else.

The test with llama.cpp needs llama-cpp-python (extra [peers]), which takes minutes to build.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import gguf_samples as samples
import numpy as np
import pytest

from pyinfer.gguf_file import open_gguf
from pyinfer.section import Entry, Section, read_section, write_section

GOLDEN = Path(__file__).parent / "golden" / "llama.gguf"
SECTION = Section({"profile": Entry({"tokens": 3}, {"counts": np.arange(60_000).reshape(2, -1)})})


@pytest.mark.parametrize("alignment", [32, 256])
def test_the_gguf_package_reads_the_same(tmp_path: Path, alignment: int) -> None:
    path = samples.write_sample(tmp_path / "model.gguf", alignment)
    plain = tmp_path / "plain.gguf"
    shutil.copyfile(path, plain)
    write_section(path, SECTION)
    ours, theirs = gguf.GGUFReader(path), gguf.GGUFReader(plain)
    assert list(ours.fields) == list(theirs.fields) and len(ours.tensors) == len(theirs.tensors) > 5
    for each, other in zip(ours.tensors, theirs.tensors):
        assert each.name == other.name and each.data_offset == other.data_offset
        assert each.data.tobytes() == other.data.tobytes()


def test_pyinfer_reads_the_same_tensors(tmp_path: Path) -> None:
    path = samples.write_sample(tmp_path / "model.gguf")
    with open_gguf(path) as file:
        before = {name: each.data.tobytes() for name, each in file.tensors.items()}
        metadata = list(file.metadata)
    write_section(path, SECTION)
    with open_gguf(path) as file:
        assert {name: each.data.tobytes() for name, each in file.tensors.items()} == before
        assert list(file.metadata) == metadata and read_section(file) is not None
        assert file.file_bytes == path.stat().st_size


def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the extra [peers] is built natively, minutes long")
    from pyinfer_tools.llama_cpp import Peer

    path = tmp_path / "model.gguf"
    shutil.copyfile(GOLDEN, path)
    write_section(path, SECTION)
    answers = []
    for each in (GOLDEN, path):
        with Peer(each, n_ctx=64, n_threads=1, exact=True) as peer:
            answers.append(peer.greedy([1, 2, 3, 4], 16))
    assert answers[0] == answers[1] and len(answers[0].ids) == 16
