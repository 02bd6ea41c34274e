"""Rules for checkpoints: spellings of names and keys, tied heads, orders of rows, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod

import numpy as np
import pytest
from hf_checkpoints import FOLDER, NAMES, converted

from pyinfer import models, names
from pyinfer.errors import FormatError, PyInferError, UnsupportedError
from pyinfer.models import falcon
from pyinfer.models.checkpoint import TensorRule, bind, family_of, load, plus_one, rotated_neighbours
from pyinfer_convert.checkpoint import open_checkpoint
from pyinfer_tools.published_models import PUBLISHED


@dataclass
class Held:
    """A checkpoint in memory; BF16 tensors are uint16."""

    config: dict
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def names(self):
        return self.arrays.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def dtype(self, name: str) -> str:
        return {"float16": "F16", "float32": "F32", "uint16": "BF16"}[self.arrays[name].dtype.name]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self.arrays[name] if rows is None else self.arrays[name][rows]


@pytest.fixture
def held():
    """held(name): a tiny checkpoint in memory, to be changed."""

    def make(name: str) -> Held:
        with open_checkpoint(FOLDER / name) as checkpoint:
            arrays = {each: np.array(checkpoint.read(each)) for each in checkpoint.names}
            return Held(json.loads(json.dumps(checkpoint.config)), arrays)

    return make


def same(found: Held, expected: Held) -> None:
    """Both become the same file."""
    (metadata, tensors), (wanted, arrays) = converted(found), converted(expected)
    assert metadata == wanted and list(tensors) == list(arrays)
    assert all(np.array_equal(tensors[name], arrays[name]) for name in arrays)


def renamed(checkpoint: Held, old: str, new: str) -> Held:
    arrays = {
        new + name.removeprefix(old) if name.startswith(old) else name: array
        for name, array in checkpoint.arrays.items()
    }
    assert arrays.keys() != checkpoint.arrays.keys()
    return Held(checkpoint.config, arrays)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("llama_rope_llama3", "model.", ""),
        ("opt", "model.decoder.", "decoder."),
        ("falcon_7b", "transformer.", ""),
        ("gemma3", "model.", "language_model.model."),
        ("gemma3", "model.", "model.language_model."),
    ],
)
def test_names_have_several_spellings(held, name, old, new):
    same(renamed(held(name), old, new), held(name))


@pytest.mark.parametrize("name", ["llama_rope_llama3", "qwen2_yarn", "arcee", "falcon_11b", "nemotron"])
def test_rotation_has_two_spellings(held, name):
    one, other = held(name), held(name)
    for config, key in ((one.config, "rope_parameters"), (other.config, "rope_scaling")):
        given = dict(config.pop("rope_parameters", None) or config.pop("rope_scaling", None) or {})
        theta = config.pop("rope_theta", None) or given.pop("rope_theta", 1e4)
        if key == "rope_parameters":
            config[key] = {"rope_type": "default", **given, "rope_theta": theta}
        else:
            config["rope_theta"] = theta
            config["partial_rotary_factor"] = given.pop("partial_rotary_factor", None)
            given["type"] = given.pop("rope_type", "default")
            config[key] = given
    same(one, other)


@pytest.mark.parametrize("name", ["llama_rope_llama3", "qwen2_yarn", "arcee", "nemotron"])
def test_both_spellings_that_agree_are_one(held, name):
    both = held(name)
    given = both.config.get("rope_parameters") or both.config.get("rope_scaling") or {}
    theta = both.config.get("rope_theta") or given.get("rope_theta", 1e4)
    both.config["rope_parameters"] = {"rope_type": "default", **given, "rope_theta": theta}
    elder = {key: value for key, value in given.items() if key not in ("rope_theta", "partial_rotary_factor")}
    both.config["rope_scaling"] = {**elder, "type": elder.pop("rope_type", "default"), "unused": None}
    same(both, held(name))


def test_gemma_rotation_has_two_spellings(held):
    old = held("gemma3")
    given = old.config.pop("rope_parameters")
    old.config |= {"rope_theta": given["full_attention"].pop("rope_theta"), "rope_local_base_freq": 10000.0}
    old.config["rope_scaling"] = given["full_attention"]
    old.config["sliding_window_pattern"] = 6
    del old.config["layer_types"]
    same(old, held("gemma3"))


def test_the_first_falcon_releases_count_kv_heads_only(held):
    old = held("falcon_40b")
    for key in ("new_decoder_architecture", "num_kv_heads", "multi_query"):
        del old.config[key]
    old.config["n_head_kv"] = 2
    same(old, held("falcon_40b"))


@pytest.mark.parametrize("name", [name for name, model in PUBLISHED.items() if model.parameters])
def test_rules_ask_for_as_many_parameters_as_published_models_have(name):
    config, parameters = PUBLISHED[name].config, PUBLISHED[name].parameters
    family = family_of(config)
    rules = [rule for rule in family.tensors(config) if rule.source and not rule.optional]
    assert sum(prod(rule.shape) for rule in rules) == parameters
    assert family.metadata(config)[names.ARCHITECTURE] == family.__name__.rpartition(".")[2]


def test_vectors_of_bfloat16_become_float32(held):
    checkpoint = held("llama_bias")
    _, tensors = converted(checkpoint)
    bits = checkpoint.arrays["model.norm.weight"]
    assert bits.dtype == np.uint16
    widened = np.array([bit << 16 for bit in bits.tolist()], np.uint32).view(np.float32)
    assert np.array_equal(tensors["output_norm.weight"], widened)


def test_predictors_of_turbosparse_go_into_the_file(held):
    checkpoint = held("turbosparse_mistral")
    rules = bind(family_of(checkpoint.config).tensors(checkpoint.config), checkpoint)
    shapes = {rule.name: rule.shape for rule in rules if ".fc" in rule.name}
    assert shapes == {
        "blk.0.fc1.weight": (16, 64),
        "blk.0.fc2.weight": (96, 16),
        "blk.1.fc1.weight": (32, 64),
        "blk.1.fc2.weight": (96, 32),
    }


@pytest.mark.parametrize("name", ["opt", "falcon_7b", "qwen2", "minicpm"])
def test_a_tied_head_is_written_only_if_it_differs(held, name):
    checkpoint = held(name)
    embedding = next(each for each in checkpoint.names if "embed_tokens" in each or "word_emb" in each)
    checkpoint.arrays["lm_head.weight"] = checkpoint.arrays[embedding].copy()
    assert names.weight(names.OUTPUT) not in converted(checkpoint)[1]
    checkpoint.arrays["lm_head.weight"][-1, -1] += 1
    assert names.weight(names.OUTPUT) in converted(checkpoint)[1]


def test_rotated_rows_alternate_between_the_halves_of_their_head():
    found = rotated_neighbours(2)(np.arange(12).reshape(12, 1))[:, 0]
    assert found.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert rotated_neighbours(1)(np.arange(6)).tolist() == [0, 3, 1, 4, 2, 5]


def test_fused_rows_come_as_queries_keys_values():
    kv_heads, per_head, size = 2, 3, 2
    labels = [f"{kind}{head}.{row}" for head in range(kv_heads) for kind in ("q0", "q1", "q2", "k", "v")
              for row in range(size)]  # fmt: skip
    order = np.array(labels)[:, None]
    found = falcon._kinds_together(kv_heads, size)(order)[:, 0].tolist()
    queries = [
        f"q{n}{head}.{row}" for head in range(kv_heads) for n in range(per_head) for row in range(size)
    ]
    others = [f"{kind}{head}.{row}" for kind in "kv" for head in range(kv_heads) for row in range(size)]
    assert found == queries + others


def test_rows_of_a_source_and_made_tensors_load():
    checkpoint = Held({}, {"a": np.arange(12, dtype=np.float16).reshape(6, 2)})
    part = bind([TensorRule("part", "a", (2, 2), rows=slice(2, 4))], checkpoint)[0]
    assert load(part, checkpoint).tolist() == [[4, 5], [6, 7]]
    made = TensorRule("made", "", (3,), lambda given: np.full(3, 7, np.float32))
    assert load(bind([made], Held({}))[0], Held({})).tolist() == [7, 7, 7]
    assert plus_one(np.float32([0.5])).tolist() == [1.5]


def test_an_unknown_architecture_lists_the_known():
    with pytest.raises(UnsupportedError) as caught:
        family_of({"architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    assert "'MambaForCausalLM'" in str(caught.value)
    for family in models.names():
        module = __import__(f"pyinfer.models.{family}", fromlist=["HF_ARCHITECTURES"])
        assert all(name in str(caught.value) for name in module.HF_ARCHITECTURES)
    with pytest.raises(UnsupportedError, match="architectures is missing"):
        family_of({})
    with pytest.raises(UnsupportedError, match="LlamaForSequenceClassification"):
        family_of({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"})


def test_checkpoints_with_code_of_their_own_are_known_by_their_type():
    assert family_of({"architectures": ["AnyForCausalLM"], "model_type": "sparsellama"}).__name__.endswith(
        "llama"
    )
    assert family_of({"model_type": "mistral"}).__name__.endswith("llama")


# (checkpoint, what config.json says, error, what the sentence names)
BAD = [
    ("llama", {"hidden_size": None}, FormatError, "hidden_size is missing, expected an integer"),
    ("llama", {"hidden_size": "64"}, FormatError, "hidden_size is '64', expected an integer"),
    ("llama", {"hidden_size": 1 << 40}, FormatError, "hidden_size is 1099511627776"),
    ("llama", {"num_hidden_layers": 0}, FormatError, "num_hidden_layers is 0, expected an integer from 1"),
    ("llama", {"num_hidden_layers": True}, FormatError, "num_hidden_layers is True"),
    ("llama", {"num_attention_heads": 5, "head_dim": None}, FormatError, "hidden_size 64 is no multiple"),
    ("llama", {"num_attention_heads": 8, "head_dim": None}, UnsupportedError, "8 elements.*multiples of 16"),
    ("llama", {"head_dim": 24}, UnsupportedError, "24 elements.*multiples of 16"),
    ("llama", {"num_key_value_heads": 3}, FormatError, "heads is 4, .*no multiple of the 3 kv"),
    ("llama", {"num_key_value_heads": 8}, FormatError, "num_key_value_heads is 8"),
    ("llama", {"rms_norm_eps": "small"}, FormatError, "rms_norm_eps is 'small', expected a number"),
    ("llama", {"rms_norm_eps": float("nan")}, FormatError, "rms_norm_eps is nan"),
    ("llama", {"hidden_act": "mish"}, UnsupportedError, "hidden_act is 'mish'.*silu.*fatrelu"),
    ("llama", {"hidden_act": "fatrelu"}, FormatError, "hidden_act_param is missing"),
    ("llama", {"hidden_act": ["silu"]}, UnsupportedError, "hidden_act is"),
    ("llama", {"attention_bias": "no"}, FormatError, "attention_bias is 'no', expected true or false"),
    ("llama", {"rope_parameters": [1]}, FormatError, "rope_parameters is"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, UnsupportedError, "rope_type is 'longrope'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, FormatError, "factor is missing"),
    *(
        ("llama", {"rope_parameters": one, "rope_scaling": other}, FormatError, f"{message}; remove the one")
        for one, other, message in (
            (
                {"rope_type": "linear", "factor": 4.0},
                {"type": "linear", "factor": 2.0},
                r"rope_scaling is .*'factor': 2\.0.* but rope_parameters is .*'factor': 4\.0}",
            ),
            ({"rope_type": "default", "rope_theta": 1e4}, {"type": "linear", "factor": 2.0}, "'default'.*"),
            ({"rope_theta": 1e4}, {"rope_theta": 5e5, "rope_type": "default"}, r"500000\.0.*10000\.0}"),
            ({"rope_theta": 1e4}, ["linear"], r"rope_scaling is \['linear'\], but .*"),
        )
    ),
    (
        "gemma3",
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        FormatError,
        "rope_scaling is .*3.0.*, but rope_parameters is",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor is 0.5"),
    ("llama", {"quantization_config": {"bits": 4}}, UnsupportedError, "quantization_config"),
    ("llama_rope_llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, FormatError, "low_freq"),
    ("qwen2_yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, FormatError, "original_max"),
    ("mistral", {"sliding_window": -1}, FormatError, "sliding_window is -1"),
    ("qwen2", {"use_sliding_window": True}, UnsupportedError, "use_sliding_window is True"),
    ("bamboo", {"hidden_act": "silu"}, UnsupportedError, "hidden_act is 'silu'"),
    ("minicpm", {"num_experts": 8}, UnsupportedError, "num_experts is 8"),
    ("minicpm", {"scale_depth": 0}, FormatError, "scale_depth is 0"),
    ("nemotron", {"rope_parameters": {"partial_rotary_factor": 0.2}}, FormatError, "rotates 3 of"),
    ("falcon_7b", {"alibi": True}, UnsupportedError, "alibi is True"),
    ("falcon_7b", {"parallel_attn": False}, UnsupportedError, "parallel_attn is False"),
    ("falcon_40b", {"num_kv_heads": 3}, FormatError, "no multiple of the 3 kv heads"),
    ("opt", {"num_attention_heads": 5}, FormatError, "num_attention_heads is 5"),
    ("opt", {"ffn_dim": None}, FormatError, "ffn_dim is missing"),
    ("gemma3", {"final_logit_softcapping": 30.0}, UnsupportedError, "final_logit_softcapping is 30.0"),
    ("gemma3", {"query_pre_attn_scalar": 8}, UnsupportedError, "query_pre_attn_scalar is 8"),
    ("gemma3", {"layer_types": ["full_attention"] * 7}, UnsupportedError, "layer_types"),
    ("gemma3", {"layer_types": None, "sliding_window_pattern": 4}, UnsupportedError, "pattern is 4"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "error", "pattern"), BAD)
def test_bad_configurations_are_refused_in_one_sentence(held, name, changes, error, pattern):
    checkpoint = held(name)
    checkpoint.config |= changes
    family = family_of(checkpoint.config)
    with pytest.raises(error, match=pattern) as caught:
        family.metadata(checkpoint.config)
        family.tensors(checkpoint.config)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [None, "x", -1, [], 1e300, {}])
def test_any_value_of_any_key_is_taken_or_refused(held, name, value):
    checkpoint = held(name)
    for key in checkpoint.config:
        changed = {**checkpoint.config, key: value}
        try:
            family = family_of(changed)
            family.metadata(changed), family.tensors(changed)
        except PyInferError as error:
            assert "config.json: " in str(error), key


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(held, name):
    checkpoint = held(name)
    rules = family_of(checkpoint.config).tensors(checkpoint.config)
    for rule in rules[:: max(1, len(rules) // 7)]:
        if rule.source and not rule.optional:
            arrays = {each: array for each, array in checkpoint.arrays.items() if each != rule.source}
            with pytest.raises(FormatError, match=f"tensor {rule.source} is missing"):
                bind(rules, Held(checkpoint.config, arrays))


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_shape_is_named(held, name):
    checkpoint = held(name)
    checkpoint.config["vocab_size"] += 16
    with pytest.raises(FormatError, match=r"embed\w*\.weight has shape \[272, .*promises \[288, "):
        converted(checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_no_rule_uses_is_named(held, name):
    checkpoint = held(name)
    checkpoint.arrays["model.layers.0.mlp.extra.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.extra\.weight has no place"):
        converted(checkpoint)


def test_tensors_that_a_configuration_implies_are_left_out(held):
    checkpoint = held("llama")
    checkpoint.arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    same(checkpoint, held("llama"))
