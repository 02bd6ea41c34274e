"""The tokenizer keys of a GGUF file from the tokenizer files of a checkpoint.

What the fast tokenizer of transformers does with tokenizer.json is the truth; tokenizer.model adds scores.
Where there is no tokenizer.json, tokenizer.model or vocab.json with merges.txt stand alone.

Source: the GGUF specification (tokenizer.*); transformers (tokenizer_config.json and its elder companions).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pyinfer import names
from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.gguf_metadata import quoted
from pyinfer.text.vocabulary import SENTENCEPIECE, Kind, read_vocabulary
from pyinfer_convert.vocab_draft import MAX_TOKENS, Draft
from pyinfer_convert.vocab_json import is_sentencepiece_like, read_tokenizer_json, read_vocab_and_merges
from pyinfer_convert.vocab_sentencepiece import read_sentencepiece

if TYPE_CHECKING:
    from pyinfer_convert.checkpoint import Checkpoint

_ROLES = {
    "bos": names.BOS_TOKEN_ID,
    "eos": names.EOS_TOKEN_ID,
    "unk": names.UNKNOWN_TOKEN_ID,
    "sep": names.SEPARATOR_TOKEN_ID,
    "pad": names.PADDING_TOKEN_ID,
    "mask": names.MASK_TOKEN_ID,
}
# How words are cut where there are only vocab.json and merges.txt, by tokenizer_class or model_type.
_PRE_OF_CLASS = {
    "GPT2Tokenizer": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
    "opt": "gpt-2",
    "gpt2": "gpt-2",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
}
_PAD_SCORE = -1e4


def tokenizer_metadata(checkpoint: Checkpoint, rows: int | None = None) -> dict[str, object]:
    """GGUF keys tokenizer.* of a checkpoint, as pyinfer's Tokenizer and llama.cpp read them.

    rows : of the token embedding, else vocab_size of config.json: the tokens are padded to that many
    raises FormatError, UnsupportedError
    """
    try:
        return _Builder(checkpoint).metadata(rows)
    except RecursionError:
        raise FormatError(
            f"{checkpoint.path}: a tokenizer file is nested too deeply; fetch it again"
        ) from None


class _Builder:
    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.settings = checkpoint.json("tokenizer_config.json") or {}
        self.special_map = checkpoint.json("special_tokens_map.json") or {}
        self.spec = checkpoint.json("tokenizer.json")
        self.draft = self._read()
        self._add_tokens()
        self.ids = self.draft.ids()
        for name in self._special_names():
            number = self.ids.get(name)
            if number is not None and self.draft.kinds[number] in (Kind.NORMAL, Kind.USER_DEFINED):
                self.draft.kinds[number] = Kind.CONTROL

    def _read(self) -> Draft:
        checkpoint, spec = self.checkpoint, self.spec
        if spec is not None and not is_sentencepiece_like(spec):
            return read_tokenizer_json(spec, "tokenizer.json")
        model = checkpoint.bytes("tokenizer.model")
        scored = None
        if model is not None:
            scored = read_sentencepiece(model, "tokenizer.model", normalized_elsewhere=spec is not None)
        if spec is not None:
            return read_tokenizer_json(spec, "tokenizer.json", scored)
        if scored is not None:
            if self.settings.get("add_prefix_space") is False:
                scored.add_space_prefix = False
            return scored
        vocab, merges = checkpoint.json("vocab.json"), checkpoint.bytes("merges.txt")
        if (vocab is None) != (merges is None):
            there, missing = ("vocab.json", "merges.txt")[:: 1 if merges is None else -1]
            raise FormatError(
                f"{checkpoint.path}: the folder has {there} but no {missing}, and a tokenizer of byte pairs "
                f"needs both; fetch {missing} too, or tokenizer.json"
            )
        if vocab is None or merges is None:
            raise FormatError(
                f"{checkpoint.path}: the folder has no tokenizer, expected tokenizer.json, tokenizer.model, "
                "or vocab.json with merges.txt; fetch these files too"
            )
        try:
            text = merges.decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"merges.txt: byte {error.start} is no UTF-8; fetch the file again") from None
        if self.settings.get("add_prefix_space"):
            raise UnsupportedError(
                "tokenizer_config.json: add_prefix_space is true, which GGUF's gpt2 vocabularies cannot say"
            )
        return read_vocab_and_merges(vocab, text, self._pre(), "vocab.json")

    def _pre(self) -> str:
        kind = str(self.settings.get("tokenizer_class", "")).removesuffix("Fast")
        for name in (kind, str(self.checkpoint.config.get("model_type"))):
            if name in _PRE_OF_CLASS:
                return _PRE_OF_CLASS[name]
        raise UnsupportedError(
            f"{self.checkpoint.path}: vocab.json does not say how {quoted(kind or 'its tokenizer')} cuts "
            "words; load the tokenizer with transformers and save it, which writes tokenizer.json"
        )

    def _add_tokens(self) -> None:
        """Tokens of the elder files; tokenizer.json has its own already, and is right where they differ."""
        if self.spec is not None:
            return
        listed = self.settings.get("added_tokens_decoder")
        for number, token in (listed if isinstance(listed, dict) else {}).items():
            if not number.isdecimal() or not isinstance(token, dict) or len(number) > 9:
                raise FormatError(f"tokenizer_config.json: added token {quoted(number)} makes no sense")
            self.draft.add_special(int(number), token.get("content"), bool(token.get("special")))
        special = set(self._special_names())
        for text, number in (self.checkpoint.json("added_tokens.json") or {}).items():
            if number not in self.draft.texts:
                self.draft.add_special(number, text, text in special)

    def _special_names(self) -> Iterator[str]:
        """Texts of tokens that have a role."""
        for source in (self.settings, self.special_map):
            for role in (*_ROLES, "cls"):
                name = _content(source.get(f"{role}_token"))
                if name is not None:
                    yield name
            more = source.get("additional_special_tokens") or []
            for each in more if isinstance(more, list) else []:
                name = _content(each)
                if name is not None:
                    yield name

    def _id(self, role: str, count: int) -> int | None:
        """The token of a role: by its text, else as the vocabulary or the configuration say."""
        for source in (self.settings, self.special_map):
            number = self.ids.get(_content(source.get(f"{role}_token")) or "")
            if number is not None and number < count:
                return number
        number = self.draft.specials.get(role)
        for source in (self.checkpoint.config, self.checkpoint.generation_config):
            if number is None:
                given = source.get(f"{role}_token_id")
                number = given[0] if isinstance(given, list) and given else given
        if type(number) is not int or number < 0 or (number >= count and role not in ("bos", "eos")):
            return None
        if number >= count:
            raise FormatError(
                f"{self.checkpoint.path / 'config.json'}: {role}_token_id is {number}, expected one of the "
                f"vocabulary's {count} tokens"
            )
        return number

    def metadata(self, rows: int | None) -> dict[str, object]:
        draft = self.draft
        count = self._count(rows)
        texts = [draft.texts.get(number, f"[PAD{number}]") for number in range(count)]
        kinds = [draft.kinds.get(number, Kind.UNUSED) for number in range(count)]
        found: dict[str, object] = {
            names.TOKENIZER_MODEL: draft.model,
            names.TOKENIZER_PRE: draft.pre,
            names.TOKENS: texts,
            names.TOKEN_TYPE: np.array(kinds, np.int32),
        }
        if draft.model == SENTENCEPIECE:
            scores = [draft.scores.get(number, _PAD_SCORE) for number in range(count)]
            found[names.SCORES] = np.array(scores, np.float32)
            found[names.ADD_SPACE_PREFIX] = draft.add_space_prefix
        else:
            found[names.MERGES] = draft.merges
        for role, key in _ROLES.items():
            number = self._id(role, count)
            if number is not None:
                found[key] = number
        self._add_around(found, count)
        self._add_ends(found, count)
        template = self._chat_template()
        if template is not None:
            found[names.CHAT_TEMPLATE] = template
        read_vocabulary(found)  # what the runtime would refuse is refused before a model is written
        return found

    def _count(self, rows: int | None) -> int:
        """How many tokens the file gets: one for each row of the embedding."""
        last = max(self.draft.texts, default=-1) + 1
        given = rows if rows is not None else self.checkpoint.config.get("vocab_size", last)
        if type(given) is not int or not 0 < given <= MAX_TOKENS:
            raise FormatError(
                f"{self.checkpoint.path / 'config.json'}: vocab_size is {given}, expected a count"
            )
        beyond = [number for number in self.draft.texts if number >= given]
        # Additions that were never trained have no row; a model cannot lack rows of its own vocabulary.
        lost = [
            number for number in beyond if self.draft.kinds[number] not in (Kind.CONTROL, Kind.USER_DEFINED)
        ]
        if lost:
            raise FormatError(
                f"{self.checkpoint.path}: the tokenizer has {last} tokens, but the embedding has {given} "
                f"rows ({quoted(self.draft.texts[lost[0]])} has id {lost[0]}); fetch the files of one model"
            )
        return given

    def _add_around(self, found: dict[str, object], count: int) -> None:
        """Whether begin and end tokens are put around a text, and which."""
        draft = self.draft
        generic = self.settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
        for side, role, key in (
            (draft.before, "bos", names.ADD_BOS_TOKEN),
            (draft.after, "eos", names.ADD_EOS_TOKEN),
        ):
            setting = self.settings.get(f"add_{role}_token")
            if isinstance(setting, bool) and not (generic and side is not None):
                found[key] = setting and _ROLES[role] in found
            elif side is None:
                found[key] = role == "bos" and draft.model == SENTENCEPIECE and _ROLES[role] in found
            else:
                found[key] = bool(side)
            if found[key] and side:
                if len(side) > 1 or not 0 <= side[0] < count:
                    raise UnsupportedError(
                        f"{draft.where}: tokens {side[:8]} are put around every text, expected one of the "
                        "vocabulary"
                    )
                found[_ROLES[role]] = side[0]

    def _add_ends(self, found: dict[str, object], count: int) -> None:
        """Further tokens that end a text, where the generation configuration lists some."""
        given = self.checkpoint.generation_config.get("eos_token_id")
        listed = given if isinstance(given, list) else [given]
        known = read_vocabulary(found).end_ids
        more = [
            number for number in listed if type(number) is int and 0 <= number < count and number not in known
        ]
        for key, number in zip((names.EOT_TOKEN_ID, names.EOM_TOKEN_ID), more):
            found[key] = number

    def _chat_template(self) -> str | None:
        data = self.checkpoint.bytes("chat_template.jinja")
        if data is not None:
            try:
                return data.decode()
            except UnicodeDecodeError as error:
                raise FormatError(
                    f"chat_template.jinja: byte {error.start} is no UTF-8; fetch it again"
                ) from None
        for source in (self.settings, self.checkpoint.json("chat_template.json") or {}):
            template = source.get("chat_template")
            if isinstance(template, list):
                templates = {
                    each.get("name"): each.get("template") for each in template if isinstance(each, dict)
                }
                template = templates.get("default")
            if isinstance(template, str):
                return template
        return None


def _content(token: Any) -> str | None:
    """A token as configuration files write it: its text, or an object with it."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
