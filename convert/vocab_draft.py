"""A vocabulary while it is put together from several files; ids may still have holes and be added to."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyinfer.errors import FormatError
from pyinfer.gguf_metadata import quoted
from pyinfer.text.vocabulary import SENTENCEPIECE, Kind

MAX_TOKENS = 1 << 22


@dataclass
class Draft:
    """One vocabulary; `where` names its file in errors.

    model : `llama` or `gpt2` as in tokenizer.ggml.model;  pre : tokenizer.ggml.pre
    specials : ids by role (bos, eos, unk, pad) as the file itself says them
    before, after : ids that the file puts around a text; None where it does not say
    """

    where: str
    model: str
    pre: str = "default"
    texts: dict[int, str] = field(default_factory=dict)
    kinds: dict[int, Kind] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    merges: list[str] = field(default_factory=list)
    specials: dict[str, int] = field(default_factory=dict)
    before: list[int] | None = None
    after: list[int] | None = None
    add_space_prefix: bool = False

    def add(self, number: object, text: object, kind: Kind, score: float = 0.0) -> None:
        """A token of the vocabulary itself."""
        self._check(number, text)
        assert isinstance(number, int) and isinstance(text, str)
        if number in self.texts:
            raise FormatError(
                f"{self.where}: tokens {quoted(self.texts[number])} and {quoted(text)} both have id {number}"
            )
        self.texts[number], self.kinds[number], self.scores[number] = text, kind, score

    def add_special(self, number: object, text: object, special: bool) -> None:
        """An added token: a new one, or another view of one that is there."""
        self._check(number, text)
        assert isinstance(number, int) and isinstance(text, str)
        if self.kinds.get(number) not in (Kind.UNKNOWN, Kind.BYTE):
            self.kinds[number] = Kind.CONTROL if special else Kind.USER_DEFINED
        if self.model == SENTENCEPIECE and self.kinds[number] == Kind.USER_DEFINED:
            # Found in the text before its spaces become this character.
            text = text.replace("\u2581", " ")
        self.texts[number] = text
        self.scores.setdefault(number, 0.0)

    def _check(self, number: object, text: object) -> None:
        if type(number) is not int or not 0 <= number < MAX_TOKENS or type(text) is not str:
            found = number if type(number) is int else f"a {type(number).__name__}"
            raise FormatError(
                f"{self.where}: token {quoted(str(text)[:80])} has id {found}, expected 0 to {MAX_TOKENS - 1}"
            )

    def ids(self) -> dict[str, int]:
        """Text -> id."""
        return {text: number for number, text in self.texts.items()}
