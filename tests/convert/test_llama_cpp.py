"""Plain GGUF stays plain: what we write of dense families, llama.cpp loads and continues alike.

Needs llama-cpp-python (extra [peers]), which takes minutes to build; without it this file is skipped, and
tests/models/test_families.py compares the same checkpoints with transformers' stored logits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hf_checkpoints import golden_logits

from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer_convert import cli

pytest.importorskip("llama_cpp", reason="the extra [peers] is built natively, minutes long")

HF = Path(__file__).parents[1] / "golden" / "hf"
DENSE = ("llama", "llama_bias", "llama_rope_llama3", "qwen2", "qwen3", "gemma3", "falcon_7b", "minicpm")
TOKENS = 24


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0"])
def test_llama_cpp_continues_alike(name, quant, tmp_path):
    """Greedy tokens are equal up to the first near-tie; the logits of the prompt are close."""
    from pyinfer_tools.llama_cpp import Peer

    out = tmp_path / "model.gguf"
    done = CliRunner().invoke(cli.main, [str(HF / name), "-o", str(out), "--quant", quant])
    assert done.exit_code == 0, done.stderr
    prompt = [int(token) for token in golden_logits(name)[0][:8]]
    with Peer(out, n_ctx=64, n_threads=2, exact=True) as peer:
        theirs = peer.greedy(prompt, TOKENS)
    with load_model(out) as model:
        session = Session(model, 64, 2)
        logits, ours, gaps = session.prefill(prompt), [], []
        for _ in range(TOKENS):
            best = np.sort(logits)[-2:]
            ours.append(int(logits.argmax()))
            gaps.append(float(best[1] - best[0]))
            logits = session.step([ours[-1]], [0])[0]
        session.close()
    scale = float(np.abs(logits).max())
    for step, (our, their) in enumerate(zip(ours, theirs.ids)):
        if our != their:
            assert min(gaps[step], theirs.gaps[step]) < 0.03 * scale, f"token {step}"
            break
    assert ours[0] == theirs.ids[0] or theirs.gaps[0] < 0.03 * scale
