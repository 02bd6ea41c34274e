"""Tiny checkpoints of every family, converted to F32: the logits of transformers."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from golden_files import reference_logits
from hf_checkpoints import FOLDER, NAMES, converted, golden_logits, write_gguf

from pyinfer import models, names
from pyinfer.errors import FormatError, InputError, PyInferError
from pyinfer.gguf_file import open_gguf
from pyinfer.models import build_program
from pyinfer.models.checkpoint import IGNORED, bind, family_of
from pyinfer.models.hparams import ACTIVATION
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer_convert.checkpoint import open_checkpoint
from pyinfer_tools.tiny_checkpoints import MOST_BYTES, TINY, TOKENS, VOCABULARY, folder_bytes

REFERENCE_TOLERANCE = 1e-5  # of the largest logit; transformers keeps some tables in float32
CPU_TOLERANCE = 1e-4  # found 5e-6; a KV cache of halves would make it 1e-3
MOST_BYTES_IN_ALL = 6_000_000
SPARSE = {
    "relu_llama": "relu",
    "prosparse_llama": "fatrelu:0.01",
    "minicpm_s": "fatrelu:0.02",
    "mistral_drelu": "drelu",
    "falcon_40b_relu": "relu",
    "galactica": "gelu_erf",
}
every_checkpoint = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """file_of(name): a checkpoint as a GGUF, made once."""
    made = {}

    def make(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("families") / f"{name}.gguf"
            with open_checkpoint(FOLDER / name) as checkpoint:
                write_gguf(made[name], *converted(checkpoint))
        return made[name]

    return make


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest deviation, relative to the largest logit."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def cpu_logits(path, tokens) -> np.ndarray:
    with load_model(path) as model:
        session = Session(model, 64, 2)
        try:
            return session.prefill(tokens, all_logits=True)
        finally:
            session.close()


def test_every_family_has_a_checkpoint():
    covered = set()
    for name in NAMES:
        config = json.loads((FOLDER / name / "config.json").read_text(encoding="utf-8"))
        covered.add(family_of(config).__name__.rpartition(".")[2])
    assert covered == set(models.names())


def test_folders_are_those_that_the_tool_makes():
    assert [tiny.name for tiny in sorted(TINY, key=lambda tiny: tiny.name)] == NAMES
    sizes = [folder_bytes(FOLDER / name) for name in NAMES]
    assert max(sizes) <= MOST_BYTES and sum(sizes) <= MOST_BYTES_IN_ALL


@every_checkpoint
def test_logits_are_whole(name):
    tokens, logits = golden_logits(name)
    assert tokens.shape == (TOKENS,) and logits.shape == (TOKENS, VOCABULARY) and logits.dtype == np.float32
    assert np.isfinite(logits).all() and logits.std() > 0.1


@every_checkpoint
def test_reference_equals_transformers(file_of, name):
    tokens, logits = golden_logits(name)
    assert apart(reference_logits(file_of(name), tokens), logits) <= REFERENCE_TOLERANCE


@every_checkpoint
def test_cpu_equals_transformers(file_of, name):
    tokens, logits = golden_logits(name)
    assert apart(cpu_logits(file_of(name), tokens), logits) <= CPU_TOLERANCE


@every_checkpoint
def test_every_tensor_is_used_once_or_ignored(name):
    with open_checkpoint(FOLDER / name) as checkpoint:
        bound = bind(family_of(checkpoint.config).tensors(checkpoint.config), checkpoint)
        sources = [rule.source for rule in bound if rule.source]
        unused = set(checkpoint.names) - set(sources)
    assert len(sources) == len(set(sources)) and len({rule.name for rule in bound}) == len(bound)
    assert all(any(re.fullmatch(pattern, left) for pattern in IGNORED) for left in unused)


@every_checkpoint
def test_only_unusual_activations_are_written(name):
    with open_checkpoint(FOLDER / name) as checkpoint:
        metadata = family_of(checkpoint.config).metadata(checkpoint.config)
    assert metadata.get(ACTIVATION) == SPARSE.get(name)
    assert all(type(value) in (bool, int, float, str) for value in metadata.values())


@pytest.mark.parametrize("name", [name for name in SPARSE if "fatrelu" in SPARSE[name]])
def test_the_threshold_of_fatrelu_matters(tmp_path, name):
    tokens, logits = golden_logits(name)
    with open_checkpoint(FOLDER / name) as checkpoint:
        metadata, tensors = converted(checkpoint)
    write_gguf(tmp_path / "relu.gguf", metadata | {ACTIVATION: "relu"}, tensors)
    assert apart(reference_logits(tmp_path / "relu.gguf", tokens), logits) > 10 * REFERENCE_TOLERANCE


@pytest.mark.parametrize("name", ["relu_llama", "turbosparse_mistral", "falcon_40b_relu", "opt", "minicpm_s"])
def test_neurons_of_down_may_be_rows(tmp_path, name):
    """As PowerInfer's files have it: ffn_down transposed, its bias beside it."""
    tokens, logits = golden_logits(name)
    with open_checkpoint(FOLDER / name) as checkpoint:
        metadata, tensors = converted(checkpoint)
    for old in [each for each in tensors if f".{names.FFN_DOWN}." in each]:
        new = old.replace(names.FFN_DOWN, names.FFN_DOWN_T)
        tensors[new] = tensors.pop(old).T  # of a bias: itself
    path = tmp_path / "down_t.gguf"
    write_gguf(path, metadata, tensors)
    assert apart(reference_logits(path, tokens), logits) <= REFERENCE_TOLERANCE
    assert apart(cpu_logits(path, tokens), logits) <= CPU_TOLERANCE


def test_files_of_powerinfer_say_no_epsilon_for_opt(tmp_path):
    tokens, logits = golden_logits("opt")
    with open_checkpoint(FOLDER / "opt") as checkpoint:
        metadata, tensors = converted(checkpoint)
    del metadata[names.key(names.LAYER_NORM_EPSILON, "opt")]
    write_gguf(tmp_path / "opt.gguf", metadata, tensors)
    assert apart(reference_logits(tmp_path / "opt.gguf", tokens), logits) <= REFERENCE_TOLERANCE


@pytest.mark.parametrize("rows", [66, 34, 2])
def test_learned_positions_bound_the_context(tmp_path, rows):
    """opt's key says 64, two rows of the matrix come before the one of position 0."""
    with open_checkpoint(FOLDER / "opt") as checkpoint:
        metadata, tensors = converted(checkpoint)
    tensors["position_embd.weight"] = tensors["position_embd.weight"][:rows]
    path, positions = tmp_path / "opt.gguf", rows - 2
    write_gguf(path, metadata, tensors)
    if not positions:
        with open_gguf(path) as file, pytest.raises(FormatError, match=r"position_embd\.weight has 2 rows"):
            build_program(file)
        return
    with load_model(path) as model:
        assert model.hparams.context_length == model.program.most_positions == positions
        with pytest.raises(InputError, match=f"at most the {positions} positions"):
            Session(model, positions + 1, 1)
        session = Session(model, positions, 1)
        try:
            assert session.prefill(np.arange(positions)).shape == (VOCABULARY,)
        finally:
            session.close()


def test_old_files_of_minicpm_have_the_scales_of_the_first_models(tmp_path):
    with open_checkpoint(FOLDER / "minicpm") as checkpoint:
        metadata, tensors = converted(checkpoint)
    usual = {
        names.EMBEDDING_SCALE: 12.0,
        names.RESIDUAL_SCALE: 1.4 / np.sqrt(2),
        names.LOGIT_SCALE: 64 / 256,
    }
    given = {names.key(key, "minicpm"): float(value) for key, value in usual.items()}
    write_gguf(tmp_path / "given.gguf", metadata | given, tensors)
    write_gguf(tmp_path / "old.gguf", {k: v for k, v in metadata.items() if k not in given}, tensors)
    tokens, logits = golden_logits("minicpm")
    old, new = (reference_logits(tmp_path / f"{name}.gguf", tokens) for name in ("old", "given"))
    assert apart(old, new) <= REFERENCE_TOLERANCE < apart(old, logits)


# Tensors whose absence is a layout of its own: tied heads, layers without a second or last norm, unscaled
# rotation; predictors serve nobody yet.
MAY_BE_MISSING = (names.OUTPUT, names.ROPE_FREQS, names.FC1, names.FC2, "attn_norm_2", "opt.output_norm")


@every_checkpoint
def test_every_missing_tensor_is_named(file_of, name):
    with open_gguf(file_of(name)) as file:
        for tensor in list(file.tensors):
            stem, kind = tensor.split(".")[-2:]
            if kind == "bias" or {stem, f"{file.architecture}.{stem}"} & set(MAY_BE_MISSING):
                continue
            kept = file.tensors.pop(tensor)
            with pytest.raises(FormatError, match=re.escape(tensor)):
                build_program(file)
            file.tensors[tensor] = kept
        build_program(file)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("llama_bias", "arcee_yarn")])
@pytest.mark.parametrize(
    "value", [None, -1, 0, 3, 2**40, 1.0, 1e-300, 1e300, float("nan"), "x", "yarn", []], ids=repr
)
def test_any_value_of_any_key_builds_or_is_refused(file_of, name, value):
    """What is built has rope tables of numbers, which sessions make."""
    with open_gguf(file_of(name)) as file:
        for key, kept in list(file.metadata.items()):
            if value is None:
                del file.metadata[key]
            else:
                file.metadata[key] = value
            try:
                ropes = {op.params["rope"] for op in build_program(file)[1].ops if op.name == "rope"}
                assert all(np.isfinite(rope.table(np.arange(3))).all() for rope in ropes), key
            except PyInferError as error:
                assert file.path.name in str(error), key
            file.metadata[key] = kept
