"""Metadata and tensors that contradict each other: one sentence with the name, nothing large before it."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from golden_files import NAMES, load_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfer import models
from pyinfer.errors import FormatError, PyInferError, UnsupportedError
from pyinfer.gguf_file import open_gguf
from pyinfer.jit.team import Team
from pyinfer.models import build_program
from pyinfer.names import GGMLType
from pyinfer.runtime.loader import Model

MOST_BYTES = 4_000_000
REQUIRED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
INTEGERS = (
    *REQUIRED[:-1],
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.scaling.original_context_length",
    "expert_count",
)
NUMBERS = (REQUIRED[-1], "rope.freq_base", "rope.scaling.factor", "rope.scaling.attn_factor")


@pytest.fixture
def spoil():
    """spoil(metadata={key without architecture: value or None}, tensors={name: change or None}) -> a file."""
    opened = []

    def change(metadata=None, tensors=None, name="llama"):
        file = open_gguf(load_golden(name).path)
        opened.append(file)
        for key, value in (metadata or {}).items():
            full = f"{file.architecture}.{key}"
            if value is None:
                del file.metadata[full]
            else:
                file.metadata[full] = value
        for tensor, made in (tensors or {}).items():
            old = file.tensors.pop(tensor)
            if made is not None:
                file.tensors[tensor] = made(old)
        return file

    yield change
    for file in opened:
        file.close()


def refused(file, error, pattern: str) -> None:
    """build_program raises this error, with the file and this text, and has not allocated much by then."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=pattern) as raised:
            build_program(file)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert file.path.name in str(raised.value)


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_keys(spoil, key):
    refused(spoil({key: None}), FormatError, f"llama.{key}")


def test_gemma3_needs_its_window(spoil):
    refused(
        spoil({"attention.sliding_window": None}, name="gemma3"),
        FormatError,
        "gemma3.attention.sliding_window",
    )


@pytest.mark.parametrize("key", INTEGERS)
@pytest.mark.parametrize("value", [-1, 2**40, 2**63, "64", 1.5, True, float("nan"), [], ["a", "a"]], ids=repr)
def test_integers_out_of_range_or_of_another_kind(spoil, key, value):
    refused(spoil({key: value}), (FormatError, UnsupportedError), f"llama.{key}")


@pytest.mark.parametrize("key", REQUIRED[:-1])
def test_nothing_at_all(spoil, key):
    refused(spoil({key: 0}), FormatError, f"llama.{key}")


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [-1.0, 1e30, float("nan"), float("inf"), "1.0", True, [1.0]], ids=repr)
def test_numbers_out_of_range_or_of_another_kind(spoil, key, value):
    refused(spoil({key: value}), (FormatError, UnsupportedError), f"llama.{key}")


def test_one_number_per_layer(spoil):
    """As some files have it: taken when all layers agree, refused with a sentence when not."""
    build_program(spoil({"feed_forward_length": np.array([96, 96], np.int32)}))
    refused(
        spoil({"feed_forward_length": np.array([96, 48], np.int32)}),
        UnsupportedError,
        "llama.feed_forward_length",
    )


@pytest.mark.parametrize("architecture", ["", "mamba", "../llama", "hparams", "llama.x", "Llama"])
def test_unknown_architectures_list_the_known(spoil, architecture):
    file = spoil()
    file.metadata["general.architecture"] = architecture
    refused(file, (UnsupportedError, FormatError), "architecture")
    if architecture == "mamba":
        refused(file, UnsupportedError, ", ".join(models.names()))


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"attention.head_count": 3}, "head"),
        ({"attention.head_count": 4, "attention.head_count_kv": 3}, "kv head"),
        ({"attention.key_length": 20}, "20 elements"),
        ({"attention.value_length": 32}, "value_length"),
        ({"expert_count": 8}, "expert"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"rope.scaling.type": 3}, "rope.scaling.type"),
        ({"rope.dimension_count": 64}, "rope.dimension_count"),
    ],
)
def test_what_is_not_supported(spoil, changes, pattern):
    refused(spoil(changes), (UnsupportedError, FormatError), pattern)


def _tensor_names(name: str, needed: bool = False) -> list[str]:
    with open_gguf(load_golden(name).path) as file:
        return [
            tensor
            for tensor in file.tensors
            if not (needed and tensor in ("output.weight", "rope_freqs.weight"))
        ]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_every_missing_tensor_is_named(spoil, name):
    for tensor in _tensor_names(name, needed=True):
        if not tensor.endswith(".bias"):
            refused(spoil(tensors={tensor: None}, name=name), FormatError, tensor)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name != "gemma3_27b"]
)  # as gemma3, with 62 blocks
def test_every_tensor_of_another_shape_is_named(spoil, name):
    def taller(old):
        return replace(old, shape=(*old.shape[:-1], old.shape[-1] + 1))

    def wider(old):
        return replace(old, shape=(2 * old.shape[0], *old.shape[1:]))

    def deeper(old):
        return replace(old, shape=(*old.shape, 2))

    for tensor in _tensor_names(name):
        for change in (taller, wider, deeper):
            if tensor == "token_embd.weight" and change is not wider:
                continue  # its rows are the vocabulary itself
            refused(spoil(tensors={tensor: change}, name=name), FormatError, tensor)


def test_another_vocabulary_than_the_head(spoil):
    changed = {"token_embd.weight": lambda old: replace(old, shape=(old.shape[0], old.shape[1] - 1))}
    refused(spoil(tensors=changed), FormatError, "output.weight")


@pytest.mark.parametrize("tensor", ["output_norm.weight", "blk.1.ffn_norm.weight"])
def test_vectors_are_floats(spoil, tensor):
    refused(spoil(tensors={tensor: lambda old: replace(old, type=GGMLType.Q8_0)}), UnsupportedError, tensor)


@pytest.mark.parametrize("kind", [GGMLType.IQ2_XS, GGMLType.I32, GGMLType.MXFP4], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.0.ffn_up.weight", "output.weight"])
def test_unknown_types_are_refused_before_the_first_token(spoil, tensor, kind):
    file = spoil(tensors={tensor: lambda old: replace(old, type=kind)})
    with pytest.raises(UnsupportedError, match=f"{kind.name}.*q4_0") as raised:
        Model(file, Team(1))
    assert file.path.name in str(raised.value) and tensor in str(raised.value)


def test_the_tensors_of_the_file_bound_the_work(spoil):
    """4,096 blocks are announced, two are there."""
    refused(spoil({"block_count": 4096}), FormatError, "blk.2.attn_norm.weight")


@pytest.mark.parametrize("factors", [[0.0] * 8, [-1.0] * 8, [float("nan")] * 8, [1.0] * 7])
def test_rope_factors(spoil, factors):
    data = np.array(factors, np.float32)
    made = {"rope_freqs.weight": lambda old: replace(old, shape=(len(factors),), mapped=data.view(np.uint8))}
    refused(spoil(tensors=made, name="llama_rope_llama3"), FormatError, "rope_freqs.weight")


def copied(name: str):
    """As a tensor of another name; of the file's first block."""
    return lambda spoiled: replace(spoiled.tensors["blk.0.attn_norm.weight"], name=name)


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.foo.weight",
        "blk.0.attn_norm.bias",
        "blk.0.attn_q_norm.weight",
        "blk.7.attn_norm.weight",
        "output_norm.bias",
        "blk.0.fc3.weight",
        "x\ny" * 99,
    ],
)
@pytest.mark.parametrize("model", ["llama", "gemma3_27b"])
def test_tensors_that_nobody_reads_are_refused(spoil, model, name):
    file = spoil(name=model)
    if name in file.tensors:
        return
    file.tensors[name] = copied(name)(file)
    refused(file, UnsupportedError, "blk.0.foo|norm.bias|q_norm|blk.7|fc3|x.*ny")


@pytest.mark.parametrize(
    "name", ["rope_factors_long.weight", "rope_factors_short.weight", "blk.1.fc1.weight"]
)
def test_predictors_and_factors_for_long_texts_may_be_there(spoil, name):
    file = spoil()
    before = str(build_program(file)[1])
    file.tensors[name] = copied(name)(file)
    assert str(build_program(file)[1]) == before


NEUTRAL = {
    "attention.scale": (0.0, 0.25),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (-1.0, 0.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


@pytest.mark.parametrize("key", NEUTRAL)
def test_keys_that_would_change_the_answer(spoil, key):
    for value in NEUTRAL[key]:
        build_program(spoil({key: value}))
    for value in (0.5, 30.0):
        refused(spoil({key: value}), UnsupportedError, f"llama.{key} is {value:g}, supported is")
    refused(spoil({key: "x"}), FormatError, f"llama.{key}")


def test_yarn_extrapolates_wholly_or_is_refused(spoil):
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}
    build_program(spoil({**yarn, "rope.scaling.yarn_ext_factor": 1.0}))
    refused(spoil({**yarn, "rope.scaling.yarn_ext_factor": 0.0}), UnsupportedError, "yarn_ext_factor")


def test_which_layers_of_gemma3_are_local(spoil):
    with open_gguf(load_golden("gemma3").path) as file:
        blocks = build_program(file)[0].block_count
    usual = [index % 6 != 5 for index in range(blocks)]
    for value in (6, usual, np.array(usual), np.array(usual, np.int32)):
        build_program(spoil({"attention.sliding_window_pattern": value}, name="gemma3"))
    for value in (5, True, 6.5, "6", [], usual[1:], [True] * blocks, np.ones(blocks)):
        file = spoil({"attention.sliding_window_pattern": value}, name="gemma3")
        refused(file, UnsupportedError, "gemma3.attention.sliding_window_pattern")
    refused(spoil({"rope.freq_base_swa": 5000.0}, name="gemma3"), UnsupportedError, "freq_base_swa is 5000")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("rope.freq_base", (1.0,)),
        ("rope.scaling.yarn_beta_fast", (0.0, 1e-300)),
        ("rope.scaling.yarn_beta_slow", (0.0, 1e-300)),
        ("rope.scaling.factor", (1e-300,)),
    ],
)
def test_what_rotation_divides_by_is_above_zero(spoil, key, values):
    for value in values:
        refused(spoil({"rope.scaling.type": "yarn", key: value}), FormatError, f"llama.{key} is {value!r}")


@pytest.mark.parametrize("count", [0, 287, 289])
def test_tokens_and_embedding_are_of_one_length(spoil, count):
    file = spoil()
    file.metadata["tokenizer.ggml.tokens"] = [str(each) for each in range(count)]
    refused(file, FormatError, f"tokenizer.ggml.tokens lists {count} tokens, .* has 288 rows")


@pytest.mark.parametrize("which", ["bos", "eos", "eot", "eom"])
def test_begin_and_end_are_tokens(spoil, which):
    file, key = spoil(), f"tokenizer.ggml.{which}_token_id"
    file.metadata[key] = 287
    build_program(file)
    for value in (288, -1, 2**32 - 1, "</s>", True):
        file.metadata[key] = value
        refused(file, FormatError, f"{key} is {value!r}, expected an integer from 0 to 287")


values = st.one_of(
    st.integers(-(2**63), 2**64),
    st.integers(0, 300),
    st.floats(),
    st.booleans(),
    st.text(max_size=5),
    st.lists(st.integers(0, 100), max_size=3),
    st.builds(np.array, st.lists(st.floats(), max_size=3)),
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["llama", "gemma3"]),
    st.dictionaries(st.sampled_from(INTEGERS + NUMBERS + ("rope.scaling.type",)), values),
)
def test_any_metadata_builds_or_is_refused(name, changes):
    with open_gguf(load_golden(name).path) as file:
        file.metadata.update({f"{file.architecture}.{key}": value for key, value in changes.items()})
        try:
            build_program(file)
        except PyInferError as error:
            assert file.path.name in str(error)
