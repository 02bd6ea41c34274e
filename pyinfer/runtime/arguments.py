"""Checks of what callers of class Llama hand over: token ids, and the keywords of llama-cpp-python that ask
for nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import numpy as np

from pyinfer.errors import InputError, UnsupportedError

SHOWN_CHARS = 80  # of a wrong value in an error

# What llama-cpp-python's constructor takes besides ours: values that change nothing here (None is one of
# them everywhere), and what to know about the others. None in place of the values: any, it is a hint about
# speed.
LOAD_KEYWORDS: dict[str, tuple[tuple[object, ...] | None, str]] = {
    "n_batch": (None, ""),
    "n_ubatch": (None, ""),
    "use_mmap": (None, ""),
    "flash_attn": (None, ""),
    "offload_kqv": (None, ""),
    "op_offload": (None, ""),
    "swa_full": (None, ""),
    "no_perf": (None, ""),
    "last_n_tokens_size": (None, ""),
    "n_gpu_layers": ((0,), "there is no GPU executor yet, expected 0"),
    "split_mode": ((0, 1), "there is no GPU executor yet"),
    "main_gpu": ((0,), "there is no GPU executor yet"),
    "tensor_split": ((), "there is no GPU executor yet"),
    "use_mlock": ((False,), "memory is not locked"),
    "numa": ((False, 0), "memory is not placed by node"),
    "n_threads_batch": ((), "one number of threads serves prompts and answers, give n_threads"),
    "vocab_only": ((False,), "pyinfer.Tokenizer is made from metadata alone"),
    "logits_all": ((False,), "eval takes all_logits=True, and log-probabilities need no option"),
    "embedding": ((False,), "there are no embeddings yet"),
    "pooling_type": ((-1, 0), "there are no embeddings yet"),
    "chat_format": ((), "the template of the file is used"),
    "chat_handler": ((), "the template of the file is used"),
    "draft_model": ((), "there is no speculative decoding yet"),
    "tokenizer": ((), "the tokenizer of the file is used"),
    "kv_overrides": (({},), "the metadata of the file is used"),
    "type_k": ((1,), "the weights decide the type of the KV cache"),
    "type_v": ((1,), "the weights decide the type of the KV cache"),
    "lora_path": ((), "there are no adapters"),
    "lora_base": ((), "there are no adapters"),
    "lora_scale": ((1.0,), "there are no adapters"),
    "rope_scaling_type": ((-1,), "positions are scaled as the file says"),
    "rope_freq_base": ((0.0,), "positions are scaled as the file says"),
    "rope_freq_scale": ((0.0,), "positions are scaled as the file says"),
    "yarn_ext_factor": ((-1.0,), "positions are scaled as the file says"),
    "yarn_attn_factor": ((1.0,), "positions are scaled as the file says"),
    "yarn_beta_fast": ((32.0,), "positions are scaled as the file says"),
    "yarn_beta_slow": ((1.0,), "positions are scaled as the file says"),
    "yarn_orig_ctx": ((0,), "positions are scaled as the file says"),
    "spm_infill": ((False,), "there is no infilling"),
}


def check_load_arguments(n_ctx: object, n_threads: object, keywords: Mapping[str, object]) -> None:
    """Let pass what asks for nothing.

    Raises InputError for numbers below 1, UnsupportedError for a keyword of llama-cpp-python with a value
    that would change something, TypeError for one that nobody knows.
    """
    for name, value in (("n_ctx", n_ctx), ("n_threads", n_threads)):
        if value is not None and (not isinstance(value, int | np.integer) or value < 1):
            raise InputError(f"{name} is {shown(value)}, expected 1 or more, or None for the default")
    for name, value in keywords.items():
        if name not in LOAD_KEYWORDS:
            raise TypeError(
                f"unknown keyword {name!r}; a model is opened with n_ctx, n_threads, seed, progress, "
                "sparsity, observe"
            )
        neutral, reason = LOAD_KEYWORDS[name]
        if value is not None and neutral is not None and not any(value == each for each in neutral):
            raise UnsupportedError(f"{name}={shown(value)} is not supported: {reason}; leave it out")


def checked_text(text: object) -> str:
    """A text; bytes must be UTF-8. Raises InputError."""
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"the text is not UTF-8 at byte {error.start}") from None
    if not isinstance(text, str):
        raise InputError(f"the text is {shown(text)}, expected str or bytes")
    return text


def token_ids(tokens: Iterable[int], n_vocab: int, what: str) -> list[int]:
    """Plain token ids, each below `n_vocab`; `what` names the argument.

    Raises InputError for anything else.
    """
    expected = f"expected token ids from 0 to {n_vocab - 1}"
    if isinstance(tokens, str | bytes | Mapping) or not isinstance(tokens, Iterable):
        raise InputError(f"{what} is {shown(tokens)}, {expected}")
    ids: list[int] = []
    for token in tokens:
        try:
            ids.append(operator.index(token))
        except TypeError:
            raise InputError(f"{what} has {shown(token)} at place {len(ids)}, {expected}") from None
        if not 0 <= ids[-1] < n_vocab:
            raise InputError(f"{what} has token {ids[-1]} at place {len(ids) - 1}, {expected}")
    return ids


def shown(value: object) -> str:
    """A value as an error names it."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."
