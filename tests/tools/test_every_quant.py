"""The table of all quants of a checkpoint, on a tiny one."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from pyinfer_convert.recipe import QUANTS
from pyinfer_tools import every_quant

HF = Path(__file__).parents[1] / "golden" / "hf"


def test_every_quant_has_its_row(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log " * 20, encoding="utf-8")
    done = CliRunner().invoke(
        every_quant.main, [str(HF / "llama"), "-f", str(text), "--ctx", "32", "--chunks", "2"]
    )
    assert done.exit_code == 0, done.output
    rows = [line.split("|") for line in done.output.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == [
        every_quant.FIRST,
        *(q for q in QUANTS if q != every_quant.FIRST),
    ]
    perplexities = {row[1].strip(): float(row[3].split("+/-")[0]) for row in rows}
    assert abs(perplexities["f16"] / perplexities["f32"] - 1) < 0.01
    sizes = {row[1].strip(): int(row[2]) for row in rows}
    assert sizes["q4_0"] < sizes["q8_0"] < sizes["f16"] < sizes["f32"]
