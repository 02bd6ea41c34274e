"""Which row of pyinfer's table of pre-tokenizers (tokenizer.ggml.pre) a tokenizer.json means.

Its steps are written as regular expressions and compared with the table. Where a file spells them otherwise,
both are run over every short string of an alphabet that has a character of each kind the table tells apart.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.gguf_metadata import quoted
from pyinfer.text.pretokenizers import PRETOKENIZERS

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"  # what the tokenizers library calls punctuation

# Letters (upper, lower, without case, mark), digits, other numbers, spaces, signs with a role of their own.
_ALPHABET = "aTÉß中\u0301か15Ⅷ \n\r\t\u3000'!/$`_<.,?|(。\u0964é"
_LONG = (
    "aaaa", "AAAaaaAAaa", "11111111", "a1b22c333d4444", "      x", "x      ", "\n\n\n  \n x", "\r\n\r\n a",
    "'s's'S'LL'll'Ve x", "don't DON'T we'Ll I'dx", "!!!???...", "a!!!\n\n b", " !!!x",
    "中文文本。日本語、テ", "한국어 ㄱㄴ", "Größe ÜBER", "x/y//z\n/", "$1,234.56",
    "://a.b?c=d&e", "\u0301\u0301a\u0301 \u0301", "а б В Г", "ⅧⅨ²³",
    "a  b   c    d", "\u3000\u3000a", "#include <a>\n\t{\n\t\tx;\n\t}\n", "a b c d", "٣٤٥ ٦", "😀😃 👍🏽",
    "IMGIMGABZ <sentinel:3>", "\xa0\xa0x", "_a_b__c", "`a` ``b``", "^~|<=>", "12 345 6789 0",
)  # fmt: skip


def find_pre(spec: dict[str, Any], where: str) -> str:
    """The value for tokenizer.ggml.pre that means what a tokenizer.json says.

    raises UnsupportedError (steps that no GGUF file can say, words that no row cuts), FormatError
    """
    _check_normalizer(spec.get("normalizer"), where)
    patterns = tuple(_patterns(spec.get("pre_tokenizer"), where))
    model = spec.get("model")
    whole_words = bool(isinstance(model, dict) and model.get("ignore_merges"))
    rows = {name: row for name, row in PRETOKENIZERS.items() if row.ignore_merges == whole_words}
    for name, row in rows.items():
        if row.patterns == patterns:
            return name
    found = _find_alike(spec["pre_tokenizer"], list(rows), where)
    if found is None:
        raise UnsupportedError(
            f"{where}: words are cut by {quoted(' then '.join(patterns))}"
            f"{' and looked up whole (ignore_merges)' if whole_words else ''}, which is none of pyinfer's "
            "ways (pyinfer/text/pretokenizers.py); a row there and in llama.cpp would be needed"
        )
    return found


def _check_normalizer(node: Any, where: str) -> None:
    """NFC is left out, as GGUF files have no place for it and texts mostly are in this form."""
    if isinstance(node, dict) and node.get("type") == "Sequence":
        for each in node.get("normalizers") or []:
            _check_normalizer(each, where)
    elif node is not None and (not isinstance(node, dict) or node.get("type") != "NFC"):
        kind = node.get("type") if isinstance(node, dict) else node
        raise UnsupportedError(
            f"{where}: text is normalized by {quoted(str(kind)[:80])}, which GGUF files cannot say; "
            "supported is NFC"
        )


def _patterns(node: Any, where: str) -> Iterator[str]:
    """The steps of a pre-tokenizer as regular expressions whose matches are words."""
    kind = node.get("type") if isinstance(node, dict) else None
    if kind == "Sequence":
        for each in node.get("pretokenizers") or []:
            yield from _patterns(each, where)
    elif kind == "ByteLevel":
        if node.get("add_prefix_space"):
            raise UnsupportedError(
                f"{where}: puts a space in front of a text, which gpt2 vocabularies cannot"
            )
        if node.get("use_regex", True):
            yield _WORDS
    elif kind == "Digits":
        yield r"\p{N}" if node.get("individual_digits") else r"\p{N}+"
    elif kind == "Punctuation" and node.get("behavior", "Isolated") in ("Isolated", "Contiguous"):
        yield _PUNCTUATION if node.get("behavior") == "Contiguous" else _PUNCTUATION.removesuffix("+")
    elif kind == "Split" and isinstance(node.get("pattern"), dict) and _cuts_words(node):
        pattern = node["pattern"].get("Regex")
        if not isinstance(pattern, str):
            raise UnsupportedError(
                f"{where}: text is split at {quoted(str(node['pattern'])[:80])}, expected a Regex"
            )
        yield pattern
    else:
        step = json.dumps(node)[:80] if isinstance(node, dict) else str(node)[:80]
        raise UnsupportedError(
            f"{where}: pre-tokenizer step {quoted(step)} is not known; known are Split, Digits, Punctuation "
            "and ByteLevel"
        )


def _cuts_words(node: dict[str, Any]) -> bool:
    """Whether matches become words; Removed with invert keeps them and drops what no pattern leaves over."""
    return (node.get("behavior"), bool(node.get("invert"))) in (("Isolated", False), ("Removed", True))


def _find_alike(node: dict[str, Any], names: list[str], where: str) -> str | None:
    """The first row that cuts every probe as the file does."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": node}
    try:
        theirs = Tokenizer.from_str(json.dumps(empty)).pre_tokenizer
        probes = ["".join(each) for count in (1, 2, 3) for each in itertools.product(_ALPHABET, repeat=count)]
        wanted = [_spans(theirs, text) for text in (*_LONG, *probes)]
    except BaseException as error:  # the regex engine reports some faults with a panic, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"{where}: the pre-tokenizer cannot be used ({str(error)[:120]})") from None
    for name in names:
        ours = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRETOKENIZERS[name].patterns]
        )
        if all(_spans(ours, text) == spans for text, spans in zip((*_LONG, *probes), wanted)):
            return name
    return None


def _spans(pretokenizer: Any, text: str) -> list[tuple[int, int]]:
    return [span for _, span in pretokenizer.pre_tokenize_str(text)]
