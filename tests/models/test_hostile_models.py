"""Files whose heads were changed at random, taken all the way to logits: an answer or one of our errors."""

from __future__ import annotations

import collections
import random
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from golden_files import load_golden
from hf_checkpoints import FOLDER, converted, write_gguf

from pyinfer import names
from pyinfer.errors import PyInferError
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer_convert.checkpoint import open_checkpoint

N_CTX, MUTANTS, MOST_BYTES = 16, 300, 32 << 20
EXTREMES = (0, 1, 2, 3, 7, 8, 63, 65, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
REALS = (0.0, -1.0, 1.0, 1e-45, 1e-7, 3e38, float("inf"), float("nan"))


@pytest.fixture
def content(request, tmp_path) -> bytes:
    """A golden file, or a checkpoint made into one."""
    kind, name = request.param.split("/")
    if kind == "golden":
        return load_golden(name).path.read_bytes()
    with open_checkpoint(FOLDER / name) as checkpoint:
        write_gguf(tmp_path / "whole.gguf", *converted(checkpoint))
    return (tmp_path / "whole.gguf").read_bytes()


def places(path) -> tuple[list[int], list[int]]:
    """Bytes of the head that say what is there, without the long arrays: all of them, and first bytes of
    numbers, whose change a reader of the format alone cannot notice.
    """
    reader, found, numbers = gguf.GGUFReader(path), set(range(24)), []
    for field in [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]:
        if not field.offset:
            continue
        at = field.offset
        for part in field.parts[:12]:
            found.update(range(at, at + min(60, part.nbytes)))
            if at > field.offset and part.dtype != np.uint8:
                numbers.append(at)
            at += part.nbytes
    return sorted(found), numbers


def mutant(content: bytes, at: int, chance: random.Random) -> bytes:
    kind = chance.randrange(5)
    if kind == 0:
        changed = bytes([content[at] ^ (1 << chance.randrange(8))])
    elif kind == 1:
        changed = bytes([chance.randrange(256)])
    elif kind == 2:
        changed = struct.pack("<f", chance.choice(REALS))
    else:
        size = 4 * (kind - 2)
        changed = (chance.choice(EXTREMES) % 2 ** (8 * size)).to_bytes(size, "little")
    return content[:at] + changed + content[at + len(changed) :]


def run(path) -> None:
    """Everything that a file decides: load, session, logits, tokenizer."""
    with load_model(path) as model:
        session = Session(model, N_CTX, 1)
        try:
            logits = session.prefill(np.arange(5) % session.n_vocab)
        finally:
            session.close()
        assert logits.shape == (session.n_vocab,)
        model.tokenizer.decode(model.tokenizer.encode("Hello, world"))


@pytest.mark.parametrize(
    "content", ["golden/llama", "golden/gemma3", "hf/opt", "hf/falcon_7b", "hf/minicpm"], indirect=True
)
def test_changed_heads_answer_or_are_refused(content, tmp_path):
    path, chance = tmp_path / "model.gguf", random.Random(len(content))
    path.write_bytes(content)
    where, reasons = places(path), collections.Counter()
    tracemalloc.start()
    try:
        for _ in range(MUTANTS):
            path.write_bytes(mutant(content, chance.choice(chance.choice(where)), chance))
            tracemalloc.reset_peak()
            base = tracemalloc.get_traced_memory()[0]
            try:
                run(path)
                reasons["answered"] += 1
            except PyInferError as error:
                reasons[str(error).removeprefix(f"{path.parent}")[:60]] += 1
            assert tracemalloc.get_traced_memory()[1] - base < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert len(reasons) > 50  # they reach many different checks
    assert reasons["answered"] > 10 or names.TOKENS.encode() not in content
