"""pyinfer-inspect against what the gguf package reads in the same file."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import gguf_samples as samples
import numpy as np
import pytest
from click.testing import CliRunner
from gguf_samples import pair, raw_gguf, tensor, text

from pyinfer import models
from pyinfer.errors import UnsupportedError
from pyinfer.section import Entry, update_section
from pyinfer_tools.inspect import main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return samples.write_sample(tmp_path / "model.gguf")


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_json_holds_what_the_gguf_package_reads(path: Path) -> None:
    code, out, _ = run(path, "--json")
    found = json.loads(out)
    reader = gguf.GGUFReader(path)
    assert code == 0 and found["bytes"] == path.stat().st_size and found["version"] == 3
    assert [tuple(each.values()) for each in found["tensors"]] == [
        (each.name, each.tensor_type.name, each.shape.tolist(), each.n_bytes) for each in reader.tensors
    ]
    assert sum(total["bytes"] for total in found["types"].values()) == sum(
        each.n_bytes for each in reader.tensors
    )
    assert found["types"]["F32"] == {"tensors": 2, "elements": 64 * 10, "bytes": 4 * 64 * 10}
    metadata = found["metadata"]
    assert list(metadata) == [name for name in reader.fields if not name.startswith("GGUF.")]
    assert metadata["tokenizer.ggml.tokens"] == {"length": len(samples.TOKENS), "first": samples.TOKENS[:6]}
    assert metadata["llama.rope.freq_base"] == 10000.5 and metadata["test.bools"] == [True, False, True]
    assert metadata["test.nested"] == [[1, 2], [3]]


def test_the_report_lines_up_and_abbreviates(path: Path) -> None:
    code, out, err = run(path)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].startswith(f"{path}: GGUF version 3, 5.1 KiB, 18 metadata keys, 8 tensors")
    assert "  general.architecture          llama" in lines
    assert "  tokenizer.ggml.token_type     9 items: [3, 3, 3, 1, 1, 1, ...]" in lines
    assert "  token_embd.weight    F32   64 x 9      2.2 KiB" in lines
    assert "  Q8_0  1 tensor   128 elements  136 B    8.5 bits each" in lines


def test_the_program_is_shown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "program_text", lambda file: f"embed {file.architecture}\nlinear")
    assert run(path)[1].endswith("\nProgram\n  embed llama\n  linear\n")
    assert json.loads(run(path, "--json")[1])["program"] == "embed llama\nlinear"


def test_a_file_without_a_program_is_shown_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(raw_gguf((pair("general.architecture", 8, text("perceptron")),)))
    code, out, _ = run(path)
    assert code == 0 and "Program\n  none: " in out and "perceptron" in out

    def refuse(file: object) -> str:
        raise UnsupportedError("no such family")

    monkeypatch.setattr(models, "program_text", refuse)
    found = json.loads(run(path, "--json")[1])
    assert found["program"] is None and found["program_error"] == "no such family"


def test_the_section_is_shown(path: Path) -> None:
    begin = path.stat().st_size
    assert "Placement section" not in run(path)[1] and json.loads(run(path, "--json")[1])["section"] is None
    counts = Entry(
        {"tokens": 512, "corpus": [{"name": "a\x1b.txt"}]}, {"counts": np.zeros((2, 96), np.int64)}
    )
    update_section(path, profile=counts, **{"placement.8 GiB": Entry({}, {"hot": np.array(True)})})
    out = run(path)[1]
    assert (
        f"\nPlacement section, version 1, from byte {begin} on\n"
        "  profile\n"
        "    tokens  512\n"
        '    corpus  [{"name": "a\\u001b.txt"}]\n'
        "    counts  int64  2 x 96  1.5 KiB\n"
        "  placement.8 GiB\n"
        "    hot  bool  one  1 B\n"
        "\nProgram\n"
    ) in out
    found = json.loads(run(path, "--json")[1])
    assert found["section"]["entries"]["profile"]["info"]["tokens"] == 512
    assert found["section"]["entries"]["profile"]["arrays"]["counts"]["shape"] == [2, 96]
    assert found["section_error"] is None


def test_a_damaged_section_is_one_line(path: Path) -> None:
    update_section(path, profile=Entry())
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = run(path)
    assert code == 0 and "\nPlacement section\n  none: model.gguf: its placement section " in out
    assert "cut off" in json.loads(run(path, "--json")[1])["section_error"]


def test_hostile_texts_stay_on_their_line(tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    evil = "\x1b[2Jred\n" * 50
    nan = pair("nan", 6, b"\x00\x00\xc0\x7f")
    path.write_bytes(raw_gguf((pair(evil, 8, text(evil)), nan), (tensor(evil, (8,)),), b"\0" * 32))
    code, out, _ = run(path)
    assert code == 0 and "\x1b" not in out and "\\x1b[2Jred\\n" in out and "(400 characters)" in out
    metadata = json.loads(run(path, "--json")[1], parse_constant=pytest.fail)["metadata"]
    assert metadata["nan"] == "nan" and metadata[evil] == evil


def test_errors_are_one_sentence_on_stderr(tmp_path: Path, path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-100])
    for file, words in (
        (cut, "cut.gguf: tensor "),
        (tmp_path / "none.gguf", "no such file"),
        (tmp_path, "folder"),
    ):
        code, out, err = run(file)
        assert code == 1 and out == "" and words in err and err.count("\n") == 1 and "Traceback" not in err
