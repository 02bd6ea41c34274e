"""Every string and number that GGUF files write on disk: type ids, metadata keys, tensor names.

The same words are used in code as on disk. Keys of one architecture are templates with `{arch}`, which
`key()` fills in. Tensor names are kept without block number and suffix, which `weight()` and `bias()` add.

Source: the GGUF specification, ggml.h (enum ggml_type), PowerInfer's gguf constants (fc1, fc2, ffn_down_t).
"""

from __future__ import annotations

import enum


class GGMLType(enum.IntEnum):
    """Element type of a tensor; also the ones pyinfer does not read, so that an error can say their name."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q4_2 = 4
    Q4_3 = 5
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    Q4_0_4_4 = 31
    Q4_0_4_8 = 32
    Q4_0_8_8 = 33
    TQ1_0 = 34
    TQ2_0 = 35
    IQ4_NL_4_4 = 36
    IQ4_NL_4_8 = 37
    IQ4_NL_8_8 = 38
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41


# (elements, bytes) of one block. Types without an entry were withdrawn from ggml and have no size any more.
BLOCK: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q8_1: (32, 40),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
    GGMLType.Q8_K: (256, 292),
    GGMLType.IQ2_XXS: (256, 66),
    GGMLType.IQ2_XS: (256, 74),
    GGMLType.IQ3_XXS: (256, 98),
    GGMLType.IQ1_S: (256, 50),
    GGMLType.IQ4_NL: (32, 18),
    GGMLType.IQ3_S: (256, 110),
    GGMLType.IQ2_S: (256, 82),
    GGMLType.IQ4_XS: (256, 136),
    GGMLType.I8: (1, 1),
    GGMLType.I16: (1, 2),
    GGMLType.I32: (1, 4),
    GGMLType.I64: (1, 8),
    GGMLType.F64: (1, 8),
    GGMLType.IQ1_M: (256, 56),
    GGMLType.BF16: (1, 2),
    GGMLType.TQ1_0: (256, 54),
    GGMLType.TQ2_0: (256, 66),
    GGMLType.MXFP4: (32, 17),
    GGMLType.NVFP4: (64, 36),
    GGMLType.Q1_0: (128, 18),
}


class ValueType(enum.IntEnum):
    """Type of a metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


MAGIC = b"GGUF"
MAGIC_POWERINFER = b"PWRI"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

# general.*
ARCHITECTURE = "general.architecture"
TYPE = "general.type"
NAME = "general.name"
ALIGNMENT = "general.alignment"
FILE_TYPE = "general.file_type"
QUANTIZATION_VERSION = "general.quantization_version"

# {arch}.*
VOCAB_SIZE = "{arch}.vocab_size"
CONTEXT_LENGTH = "{arch}.context_length"
EMBEDDING_LENGTH = "{arch}.embedding_length"
BLOCK_COUNT = "{arch}.block_count"
FEED_FORWARD_LENGTH = "{arch}.feed_forward_length"
EXPERT_COUNT = "{arch}.expert_count"
HEAD_COUNT = "{arch}.attention.head_count"
HEAD_COUNT_KV = "{arch}.attention.head_count_kv"
KEY_LENGTH = "{arch}.attention.key_length"
VALUE_LENGTH = "{arch}.attention.value_length"
LAYER_NORM_EPSILON = "{arch}.attention.layer_norm_epsilon"
LAYER_NORM_RMS_EPSILON = "{arch}.attention.layer_norm_rms_epsilon"
ATTENTION_SCALE = "{arch}.attention.scale"
SLIDING_WINDOW = "{arch}.attention.sliding_window"
SLIDING_WINDOW_PATTERN = "{arch}.attention.sliding_window_pattern"
ATTN_LOGIT_SOFTCAPPING = "{arch}.attn_logit_softcapping"
FINAL_LOGIT_SOFTCAPPING = "{arch}.final_logit_softcapping"
LOGIT_SCALE = "{arch}.logit_scale"
RESIDUAL_SCALE = "{arch}.residual_scale"
EMBEDDING_SCALE = "{arch}.embedding_scale"
TENSOR_DATA_LAYOUT = "{arch}.tensor_data_layout"
ROPE_DIMENSION_COUNT = "{arch}.rope.dimension_count"
ROPE_FREQ_BASE = "{arch}.rope.freq_base"
ROPE_FREQ_BASE_SWA = "{arch}.rope.freq_base_swa"
ROPE_SCALE_LINEAR = "{arch}.rope.scale_linear"
ROPE_SCALING_TYPE = "{arch}.rope.scaling.type"
ROPE_SCALING_FACTOR = "{arch}.rope.scaling.factor"
ROPE_SCALING_ATTN_FACTOR = "{arch}.rope.scaling.attn_factor"
ROPE_SCALING_ORIGINAL_CONTEXT_LENGTH = "{arch}.rope.scaling.original_context_length"
ROPE_SCALING_YARN_LOG_MULTIPLIER = "{arch}.rope.scaling.yarn_log_multiplier"
ROPE_SCALING_YARN_EXT_FACTOR = "{arch}.rope.scaling.yarn_ext_factor"
ROPE_SCALING_YARN_ATTN_FACTOR = "{arch}.rope.scaling.yarn_attn_factor"
ROPE_SCALING_YARN_BETA_FAST = "{arch}.rope.scaling.yarn_beta_fast"
ROPE_SCALING_YARN_BETA_SLOW = "{arch}.rope.scaling.yarn_beta_slow"

# split.*
SPLIT_NO = "split.no"
SPLIT_COUNT = "split.count"
SPLIT_TENSORS_COUNT = "split.tensors.count"

# tokenizer.*
TOKENIZER_MODEL = "tokenizer.ggml.model"
TOKENIZER_PRE = "tokenizer.ggml.pre"
TOKENS = "tokenizer.ggml.tokens"
TOKEN_TYPE = "tokenizer.ggml.token_type"
SCORES = "tokenizer.ggml.scores"
MERGES = "tokenizer.ggml.merges"
BOS_TOKEN_ID = "tokenizer.ggml.bos_token_id"
EOS_TOKEN_ID = "tokenizer.ggml.eos_token_id"
EOT_TOKEN_ID = "tokenizer.ggml.eot_token_id"
EOM_TOKEN_ID = "tokenizer.ggml.eom_token_id"
UNKNOWN_TOKEN_ID = "tokenizer.ggml.unknown_token_id"
SEPARATOR_TOKEN_ID = "tokenizer.ggml.seperator_token_id"  # the missing letter is the specification's
PADDING_TOKEN_ID = "tokenizer.ggml.padding_token_id"
MASK_TOKEN_ID = "tokenizer.ggml.mask_token_id"
ADD_BOS_TOKEN = "tokenizer.ggml.add_bos_token"
ADD_EOS_TOKEN = "tokenizer.ggml.add_eos_token"
ADD_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
CHAT_TEMPLATE = "tokenizer.chat_template"

# Not of one architecture: PowerInfer's key, and ours.
POWERINFER_SPARSE_THRESHOLD = "powerinfer.sparse_threshold"
PYINFER_PREFIX = "pyinfer."

# Tensors of the whole model.
TOKEN_EMBD = "token_embd"
OUTPUT_NORM = "output_norm"
OUTPUT = "output"
ROPE_FREQS = "rope_freqs"
ROPE_FACTORS_LONG = "rope_factors_long"
ROPE_FACTORS_SHORT = "rope_factors_short"

# Tensors of one block, written blk.N.<name>.
ATTN_NORM = "attn_norm"
ATTN_QKV = "attn_qkv"
ATTN_Q = "attn_q"
ATTN_K = "attn_k"
ATTN_V = "attn_v"
ATTN_OUTPUT = "attn_output"
ATTN_Q_NORM = "attn_q_norm"
ATTN_K_NORM = "attn_k_norm"
POST_ATTENTION_NORM = "post_attention_norm"
FFN_NORM = "ffn_norm"
FFN_GATE = "ffn_gate"
FFN_UP = "ffn_up"
FFN_DOWN = "ffn_down"
FFN_DOWN_T = "ffn_down_t"
POST_FFW_NORM = "post_ffw_norm"
FC1 = "fc1"
FC2 = "fc2"
FFN_WEIGHTS = (FFN_GATE, FFN_UP, FFN_DOWN, FFN_DOWN_T, FC1, FC2)


def key(template: str, architecture: str) -> str:
    """The metadata key of one architecture: key(BLOCK_COUNT, "llama") is "llama.block_count"."""
    return template.replace("{arch}", architecture)


def weight(name: str, block: int | None = None) -> str:
    """The name on disk of a weight: weight(ATTN_Q, 3) is "blk.3.attn_q.weight"."""
    return f"{name}.weight" if block is None else f"blk.{block}.{name}.weight"


def bias(name: str, block: int | None = None) -> str:
    """The name on disk of a bias: bias(ATTN_Q, 3) is "blk.3.attn_q.bias"."""
    return f"{name}.bias" if block is None else f"blk.{block}.{name}.bias"
