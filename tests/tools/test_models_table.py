"""The sizes in models.md are those of files that are written and models that are loaded."""

from __future__ import annotations

import json

import pytest
from hf_checkpoints import FOLDER

from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer_convert.pipeline import plan, write
from pyinfer_convert.recipe import QUANTS
from pyinfer_convert.sources import open_source
from pyinfer_tools import models_table

N_CTX = 40


@pytest.mark.parametrize("quant", [*models_table.SHOWN, "f32"])  # f32: its cache has another type
@pytest.mark.parametrize("name", ["falcon_40b", "gemma3", "nemotron", "opt", "prosparse_llama", "qwen2"])
def test_sizes_are_those_of_a_real_conversion(tmp_path, name, quant):
    config = json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))
    entries = models_table.file_entries(config, quant)
    source = open_source(FOLDER / name)
    planned = plan(source, QUANTS[quant])
    assert entries == [each.entry for each in planned.tensors]
    assert models_table.sizes(config, quant)[0] == planned.bytes_after
    write(planned, tmp_path / "model.gguf", n_threads=1)
    source.close()
    with load_model(tmp_path / "model.gguf") as model:
        assert models_table.weight_bytes(entries) == model.weights.nbytes
        session = Session(model, N_CTX, n_threads=1)
        assert models_table.cache_bytes(config, entries, N_CTX) == session.cache_bytes
        session.close()


def test_a_published_size_is_found():
    """llama-2-7b.Q4_0.gguf and the F16 weights, as published, in GB."""
    config = models_table.PUBLISHED["Llama-2-7B"].config
    assert models_table.sizes(config, "q4_0")[0] / 1e9 == pytest.approx(3.83, abs=0.01)
    assert models_table.sizes(config, "f16")[0] / 1e9 == pytest.approx(13.48, abs=0.01)


def test_what_is_written_by_hand_is_left():
    text = f"before\n{models_table.BEGIN}\nold\n{models_table.END}\nafter\n"
    new = models_table.updated(text)
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "\nold\n" not in new
    with pytest.raises(Exception, match=r"models\.md: has not the two lines"):
        models_table.updated("before\n")
