r"""How each byte-level BPE vocabulary cuts text into words before merging: one row per `tokenizer.ggml.pre`.

Patterns are applied one after the other, each to what the one before left: a match is a word, and so is what
lies between two matches. They are the patterns the models were trained with; where llama.cpp approximates one
because of its regex engine (tekken, gpt-4o), the original stands here. `\p{..}` and `\s` are Unicode classes.

Source: llama.cpp (llama-vocab.cpp) for names, flags and patterns; the models' `tokenizer.json` for originals.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyinfer import names
from pyinfer.errors import UnsupportedError


@dataclass(frozen=True)
class Pretokenizer:
    """Patterns in order; whether a word that is itself a token is taken whole; default of add_bos_token."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_LETTERS_OTHERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_LLAMA3 = _SUFFIX + _LETTERS_OTHERS % r"\p{N}{1,3}"
_QWEN2 = _SUFFIX + _LETTERS_OTHERS % r"\p{N}"
_QWEN35 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_RAGGED_SPACES = "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
_JAIS2 = _LLAMA3.removesuffix(r"|\s+(?!\S)|\s+") + _RAGGED_SPACES + r"|\s{1}"

# Words that change case once: upper then lower. `suffix` is an English contraction kept with its word.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(suffix: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _SPACES
    )


_TEKKEN = _cased("", _DIGIT)
_GPT4O = _cased(_SUFFIX + "?", r"\p{N}{1,3}")

_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES
)
_HAN_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters that have a case, as DeepSeek-LLM lists them.
_CASED_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d"
    "\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_WIDE_PUNCTUATION = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_YOUTU_CJK = (
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + _CJK
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_EXAONE_MOE = (
    _SUFFIX + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|%s]+"

_ROWS: dict[str, Pretokenizer] = {
    # GPT-2 and its direct heirs (OPT, Phi, OLMo, MPT, EXAONE 4).
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat a.x-4.0 "
    "mellum modern-bert mpt olmo jais trillion granite-docling exaone4": Pretokenizer((_WORDS,)),
    # Digits one by one, then GPT-2.
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Pretokenizer((_DIGIT, _WORDS)),
    "default": Pretokenizer((_PUNCTUATION % "", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    "falcon": Pretokenizer((_PUNCTUATION % "`", _WORDS, "[0-9][0-9][0-9]")),
    # Llama 3 and heirs: digits in threes.
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": Pretokenizer(
        (_LLAMA3,), ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": Pretokenizer((_LLAMA3,)),
    "glm4 glm5": Pretokenizer((_LLAMA3,), ignore_merges=True),
    "jais-2": Pretokenizer((_JAIS2,)),
    "minicpm5": Pretokenizer((r"\p{N}{1,3}", _SUFFIX + _LETTERS_OTHERS % r"\p{N}+"), ignore_merges=True),
    # Qwen 2, 2.5, 3 and heirs: digits one by one.
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": Pretokenizer(
        (_QWEN2,)
    ),
    "qwen35": Pretokenizer((_QWEN35,)),
    "laguna": Pretokenizer((r"[^\n]+|[\n]+", _QWEN2)),
    "ufakzeka": Pretokenizer(((_LETTERS_OTHERS % r"\p{N}").removeprefix("|"),)),
    "seed-coder": Pretokenizer((_SEED,)),
    "bailingmoe bailingmoe2 llada-moe": Pretokenizer((_BAILING,)),
    "exaone-moe": Pretokenizer((_EXAONE_MOE,)),
    # Case-aware words: Mistral's tekken, GPT-4o, Llama 4.
    "tekken": Pretokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Pretokenizer((_GPT4O,)),
    "granite-embed-multi-97m": Pretokenizer((_GPT4O,), ignore_merges=True),
    "tiny_aya cohere2moe": Pretokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    "youtu": Pretokenizer((_YOUTU_CJK, _cased(_SUFFIX + "?", _DIGIT)), ignore_merges=True),
    # DeepSeek's own.
    "deepseek-llm": Pretokenizer(
        (r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", rf"\s?{_WIDE_PUNCTUATION}", r"\s+$", _HAN_HANGUL, r"\p{N}+")
    ),
    "deepseek-coder": Pretokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Pretokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)),
    # Multilingual vocabularies that cut at punctuation only.
    "bloom gpt3-finnish poro-chat": Pretokenizer((_BLOOM,)),
    "viking": Pretokenizer((_BLOOM, r"\p{N}")),
    "chameleon": Pretokenizer(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _WORDS,
        ),
        add_bos=True,
    ),
}

PRETOKENIZERS: dict[str, Pretokenizer] = {name: row for line, row in _ROWS.items() for name in line.split()}


def find_pretokenizer(name: str) -> Pretokenizer:
    """The row of a `tokenizer.ggml.pre` value; UnsupportedError lists the known ones."""
    try:
        return PRETOKENIZERS[name]
    except KeyError:
        known = ", ".join(sorted(PRETOKENIZERS))
        raise UnsupportedError(
            f"{names.TOKENIZER_PRE} is {name[:80]!r}, which pyinfer does not know; it knows {known}"
        ) from None
