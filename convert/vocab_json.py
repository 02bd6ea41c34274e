"""tokenizer.json of the tokenizers library, of bytes or like SentencePiece, and vocab.json with merges.txt.

A file like SentencePiece's lists merges where GGUF's `llama` vocabularies have scores. Both say the same if
every way to put a token together is listed and tokens come one after the other; that is checked, not assumed.

Source: the tokenizers library (tokenizer.json); sentencepiece (bpe_model) for what scores mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.gguf_metadata import quoted
from pyinfer.text.merging import SPACE
from pyinfer.text.vocabulary import BYTE_LEVEL, SENTENCEPIECE, Kind
from pyinfer_convert.vocab_draft import Draft
from pyinfer_convert.vocab_pretokenizer import find_pre

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def is_sentencepiece_like(spec: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json works on characters, not on bytes."""
    return '"ByteLevel"' not in json.dumps(spec.get("pre_tokenizer"))


def read_tokenizer_json(spec: dict[str, Any], where: str, scored: Draft | None = None) -> Draft:
    """The vocabulary of a tokenizer.json.

    scored : the same vocabulary from tokenizer.model, whose scores are taken then
    raises FormatError, UnsupportedError (other algorithms, steps that GGUF files cannot say)
    """
    model = _object(spec, "model", where)
    if model.get("type", "BPE") != "BPE" or "vocab" not in model:
        raise UnsupportedError(
            f"{where}: the model is {quoted(str(model.get('type'))[:40])}, expected BPE, which is all that "
            "pyinfer has"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(f"{where}: {key} is {quoted(str(model[key])[:40])}, expected none")
    if is_sentencepiece_like(spec):
        draft = _read_sentencepiece_like(spec, model, where, scored)
    else:
        draft = Draft(where, BYTE_LEVEL, find_pre(spec, where))
        for text, number in _object(model, "vocab", where).items():
            draft.add(number, text, Kind.NORMAL)
        draft.merges = [f"{left} {right}" for left, right in _merges(model.get("merges"), where)]
    _add_tokens(draft, spec.get("added_tokens") or [])
    draft.before, draft.after = _around(spec.get("post_processor"), where) or ([], [])
    return draft


def read_vocab_and_merges(vocab: dict[str, Any], merges: str, pre: str, where: str) -> Draft:
    """The byte-level vocabulary of vocab.json and merges.txt."""
    draft = Draft(where, BYTE_LEVEL, pre)
    for text, number in vocab.items():
        draft.add(number, text, Kind.NORMAL)
    lines = [line.removesuffix("\r") for line in merges.split("\n")]
    if lines[0].startswith("#version"):
        del lines[0]
    pairs = _merges([line for line in lines if line], where)
    draft.merges = [f"{left} {right}" for left, right in pairs]
    return draft


def _read_sentencepiece_like(
    spec: dict[str, Any], model: dict[str, Any], where: str, scored: Draft | None
) -> Draft:
    draft = Draft(where, SENTENCEPIECE)
    draft.add_space_prefix, whole_text = _read_spaces(spec, where)
    vocab = _object(model, "vocab", where)
    pairs = _merges(model.get("merges"), where)
    added = {each.get("content") for each in spec.get("added_tokens") or [] if isinstance(each, dict)}
    if scored is not None and any(
        text not in added and number not in scored.texts for text, number in vocab.items()
    ):
        scored = None  # a vocabulary that was extended later
    scores = _scores(vocab, pairs, added, where) if scored is None else {}
    unknown = model.get("unk_token")
    for text, number in vocab.items():
        kind = Kind.UNKNOWN if text == unknown else Kind.NORMAL
        if model.get("byte_fallback") and _BYTE.fullmatch(text):
            kind = Kind.BYTE
        draft.add(number, text, kind, scores.get(text, 0.0))
    if not whole_text and any(SPACE in text[1:] for text in vocab if text not in added):
        raise UnsupportedError(
            f"{where}: words are cut at spaces although tokens have spaces inside, which GGUF files cannot "
            "say"
        )
    if unknown is not None and unknown in vocab:
        draft.specials["unk"] = vocab[unknown]
    if scored is not None:
        _take_scores(draft, scored, added)
    return draft


def _take_scores(draft: Draft, scored: Draft, added: set[Any]) -> None:
    """Scores and kinds of tokenizer.model, whose tokens must be the same."""
    for number, text in scored.texts.items():
        ours = draft.texts.get(number)
        if ours is None:
            draft.add(number, text, scored.kinds[number], scored.scores[number])
        elif ours.replace(SPACE, " ") != text.replace(SPACE, " ") and ours not in added:
            raise FormatError(
                f"{draft.where}: token {number} is {quoted(ours)}, but {quoted(text)} in {scored.where}; "
                "fetch the files of one model"
            )
        else:
            draft.kinds[number], draft.scores[number] = scored.kinds[number], scored.scores[number]
            if scored.kinds[number] == Kind.USER_DEFINED:
                draft.texts[number] = text
    for role, number in scored.specials.items():
        draft.specials.setdefault(role, number)


def _read_spaces(spec: dict[str, Any], where: str) -> tuple[bool, bool]:
    """(a space is put in front, a text is one word) from the steps that turn spaces into a character."""
    prefix, escaped, whole_text = False, False, True
    for node in (*_steps(spec.get("normalizer")), *_steps(spec.get("pre_tokenizer"))):
        kind = node.get("type")
        if kind == "Prepend" and node.get("prepend") == SPACE:
            prefix = True
        elif kind == "Replace" and node.get("pattern") == {"String": " "} and node.get("content") == SPACE:
            escaped = True
        elif kind == "Metaspace" and node.get("replacement") == SPACE:
            # It adds no space to a text that begins with one; SentencePiece and llama.cpp always add it.
            escaped = True
            prefix = node.get("prepend_scheme", "always") != "never" and node.get("add_prefix_space", True)
            whole_text = not node.get("split", True)
        elif kind == "Split" and node.get("pattern") == {"String": " "}:
            pass  # Gemma's: it finds none, spaces were replaced before
        else:
            raise UnsupportedError(
                f"{where}: step {quoted(json.dumps(node)[:80])} is not known for a vocabulary of characters; "
                "known are Prepend and Replace of spaces, and Metaspace"
            )
    if not escaped:
        raise UnsupportedError(
            f"{where}: spaces are not replaced by {SPACE!r}, expected a vocabulary as of Llama 2"
        )
    return bool(prefix), whole_text


def _steps(node: Any) -> list[dict[str, Any]]:
    if not isinstance(node, dict):
        return []
    if node.get("type") != "Sequence":
        return [node]
    inner = node.get("normalizers") or node.get("pretokenizers") or []
    return [step for each in inner for step in _steps(each)]


def _scores(
    vocab: dict[str, Any], pairs: list[tuple[str, str]], added: set[Any], where: str
) -> dict[str, float]:
    """Scores that make SentencePiece merge as the list says: minus the place of a token's first merge.

    raises UnsupportedError where no scores do: a way to make a token is not listed, or tokens take turns
    """
    scores: dict[str, float] = {}
    latest = None
    for left, right in pairs:
        text = left + right
        if text in scores and text != latest and text not in added:
            raise _not_scored(where, f"{quoted(text)} is merged at two places of the list")
        scores.setdefault(text, -float(len(scores)))
        latest = text
    listed = set(pairs)
    for text in vocab:
        if text in added or _BYTE.fullmatch(text):
            continue
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair[0] in vocab and pair[1] in vocab and pair not in listed and not added.intersection(pair):
                raise _not_scored(where, f"{quoted(text)} is not merged from {quoted(' and '.join(pair))}")
    return scores


def _not_scored(where: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: the merges are not those of SentencePiece ({reason}), and GGUF files have scores instead "
        "of merges for such a vocabulary; put the model's tokenizer.model beside it"
    )


def _merges(value: Any, where: str) -> list[tuple[str, str]]:
    """Pairs, written as "left right" or as [left, right]."""
    if not isinstance(value, list):
        raise FormatError(f"{where}: has no merges, expected a list of them; a BPE vocabulary needs it")
    pairs = []
    for number, each in enumerate(value):
        pair = (
            tuple(each.split(" ")) if isinstance(each, str) else tuple(each) if isinstance(each, list) else ()
        )
        if len(pair) != 2 or not all(type(part) is str and part and " " not in part for part in pair):
            raise FormatError(f"{where}: merge {number} is {quoted(str(each)[:80])}, expected two tokens")
        pairs.append(pair)
    return pairs


def _add_tokens(draft: Draft, added: Any) -> None:
    if not isinstance(added, list) or not all(isinstance(each, dict) for each in added):
        raise FormatError(f"{draft.where}: added_tokens is no list of objects")
    for each in added:
        draft.add_special(each.get("id"), each.get("content"), bool(each.get("special")))


def _around(node: Any, where: str) -> tuple[list[int], list[int]] | None:
    """Ids that a post-processor puts before and behind a text; None where no step says so."""
    found = None
    for step in _processors(node):
        if step.get("type") != "TemplateProcessing":
            continue
        sides: tuple[list[int], list[int]] = ([], [])
        place = 0
        for piece in step.get("single") or []:
            if not isinstance(piece, dict) or not ("Sequence" in piece or "SpecialToken" in piece):
                raise FormatError(
                    f"{where}: post_processor has {quoted(str(piece)[:80])}, expected a template"
                )
            if "Sequence" in piece:
                place = 1
                continue
            name = _object(piece, "SpecialToken", where).get("id")
            token = _object(step, "special_tokens", where).get(name)
            ids = token.get("ids") if isinstance(token, dict) else None
            if not isinstance(ids, list) or not all(type(each) is int for each in ids):
                raise FormatError(f"{where}: post_processor has no id for {quoted(str(name)[:80])}")
            sides[place].extend(ids)
        found = sides
    return found


def _processors(node: Any) -> list[dict[str, Any]]:
    if not isinstance(node, dict):
        return []
    if node.get("type") != "Sequence":
        return [node]
    return [step for each in node.get("processors") or [] for step in _processors(each)]


def _object(parent: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise FormatError(
            f"{where}: {key} is a {type(value).__name__}, expected an object; fetch the file again"
        )
    return value
