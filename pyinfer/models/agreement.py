"""A file and the program that was built of it have to say the same.

What a program does not do must not stand in the file: a tensor that nobody reads, or a key with another value
than the program's, would give wrong answers without a word.

Source: llama.cpp refuses files with tensors that its graph does not use; its defaults for keys.
"""

from __future__ import annotations

import math
import re

from pyinfer import names
from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.gguf_file import GGUFFile
from pyinfer.gguf_metadata import quoted
from pyinfer.models.hparams import HParams, Keys
from pyinfer.program.program import Program

# Read as hyperparameters, for contexts beyond the original one, or a guess that dense layers do not need.
_WITHOUT_OPERATION = re.compile(
    rf"({names.ROPE_FREQS}|{names.ROPE_FACTORS_LONG}|{names.ROPE_FACTORS_SHORT})\.weight"
    rf"|blk\.\d+\.({names.FC1}|{names.FC2})\.(weight|bias)"
)
_SCALES = (names.EMBEDDING_SCALE, names.RESIDUAL_SCALE, names.LOGIT_SCALE)
_TOKEN_IDS = (names.BOS_TOKEN_ID, names.EOS_TOKEN_ID, names.EOT_TOKEN_ID, names.EOM_TOKEN_ID)
_ANY = 1e30


def check_agreement(file: GGUFFile, hp: HParams, program: Program) -> None:
    """Raises UnsupportedError naming the first tensor or key that the program leaves out, FormatError for a
    vocabulary that is not the embedding's.
    """
    _check_tensors(file, program)
    _check_keys(file, hp, program)
    _check_vocabulary(file, program.vocab_size)


def _check_tensors(file: GGUFFile, program: Program) -> None:
    used = {
        (tensor.whole or tensor).name
        for op in program.ops
        for tensor in (op.weight, op.bias)
        if tensor is not None
    }
    for name in file.tensors:
        if name not in used and not _WITHOUT_OPERATION.fullmatch(name):
            raise UnsupportedError(
                f"{file.path}: tensor {quoted(name)} has no place in architecture {file.architecture}; "
                "without it the model would compute something else"
            )


def _check_keys(file: GGUFFile, hp: HParams, program: Program) -> None:
    scale = next(op.params["scale"] for op in program.ops if op.name == "attend")
    expected = {
        names.ATTENTION_SCALE: (scale, 0.0),
        names.ATTN_LOGIT_SOFTCAPPING: (0.0,),
        names.FINAL_LOGIT_SOFTCAPPING: (0.0,),
        names.ROPE_SCALING_YARN_EXT_FACTOR: (1.0 if hp.rope.scaling_type == "yarn" else 0.0, -1.0),
        names.ROPE_SCALING_YARN_ATTN_FACTOR: (1.0,),
        names.ROPE_SCALING_YARN_LOG_MULTIPLIER: (0.0,),
    }
    for template, value in zip(_SCALES, (hp.embedding_scale, hp.residual_scale, hp.logit_scale)):
        expected[template] = (value, 0.0)  # 0: not set
    keys = Keys(file)
    for template, accepted in expected.items():
        found = keys.number(template, accepted[0], -_ANY, _ANY)
        if not any(math.isclose(found, each, rel_tol=1e-5) for each in accepted):
            raise UnsupportedError(
                f"{file.path}: {keys.name(template)} is {found:g}, supported is {accepted[0]:g}"
            )


def _check_vocabulary(file: GGUFFile, rows: int) -> None:
    tokens = file.get(names.TOKENS)
    if isinstance(tokens, list) and len(tokens) != rows:
        raise FormatError(
            f"{file.path}: {names.TOKENS} lists {len(tokens)} tokens, but token_embd.weight has {rows} rows; "
            "convert the model again"
        )
    for key in _TOKEN_IDS:
        if key in file.metadata:
            Keys(file).integer(key, None, 0, rows - 1)
