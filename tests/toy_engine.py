"""A language model for tests of everything above the engine: a byte vocabulary and a session with a rule for
its logits.

The rule is a function of *all* tokens of the sequence, so that any error in what the KV cache is believed to
hold changes what is generated.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from pyinfer import names
from pyinfer.errors import ContextFullError
from pyinfer.llama import Llama
from pyinfer.text.tokenizer import Tokenizer

BOS, EOS, START, END = 256, 257, 258, 259  # <bos> <eos> <|im_start|> <|im_end|>
VOCABULARY = 260
PREFILL_CHUNK = 8
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Rule = Callable[[Sequence[int]], np.ndarray]


def byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies, from GPT-2's definition."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def toy_tokenizer(template: str | None = CHATML, add_bos: bool = False) -> Tokenizer:
    """Token 0 to 255 is that byte, four control tokens follow."""
    return Tokenizer.from_metadata({
        names.TOKENIZER_MODEL: "gpt2",
        names.TOKENS: [*byte_characters(), "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"],
        names.TOKEN_TYPE: np.array([1] * 256 + [3] * 4, np.int32),
        names.MERGES: [],
        names.BOS_TOKEN_ID: BOS,
        names.EOS_TOKEN_ID: END,
        names.ADD_BOS_TOKEN: add_bos,
        **({names.CHAT_TEMPLATE: template} if template is not None else {}),
    })  # fmt: skip


def hashed(tokens: Sequence[int]) -> np.ndarray:
    """Random logits that depend on every token and its place."""
    seed = zlib.crc32(np.asarray(tokens, np.int32).tobytes())
    return np.random.default_rng(seed).normal(size=VOCABULARY).astype(np.float32) * 2


def scripted(answer: str | bytes) -> Rule:
    """Says `answer`, which has no line break, behind the last line break of the prompt, and then ends."""
    script = answer.encode() if isinstance(answer, str) else answer

    def rule(tokens: Sequence[int]) -> np.ndarray:
        place = 0
        for token in reversed(tokens):
            if token == ord("\n"):
                break
            place += 1
        logits = np.zeros(VOCABULARY, np.float32)
        logits[script[place] if place < len(script) else END] = 20
        return logits

    return rule


class ToySession:
    """The interface of pyinfer.runtime.session.Session; fails when two threads are inside at once."""

    def __init__(self, rule: Rule = hashed, n_ctx: int = 256, step_seconds: float = 0.0) -> None:
        self.rule, self.n_ctx, self.n_vocab, self.n_threads = rule, n_ctx, VOCABULARY, 1
        self.step_seconds = step_seconds
        self.held: dict[int, list[int]] = {}
        self.computed = 0  # tokens that went through the model
        self.closed = False
        self._inside = threading.Lock()

    def length(self, sequence: int = 0) -> int:
        return len(self.held.get(sequence, []))

    def prefill(self, tokens, sequence=0, *, all_logits=False, cancelled=None, progress=None):
        assert self._inside.acquire(blocking=False), "two threads are in one session"
        try:
            assert len(tokens) and not self.closed
            held = self.held.setdefault(sequence, [])
            if len(held) + len(tokens) > self.n_ctx:
                raise ContextFullError("the session is full")
            rows = []
            for begin in range(0, len(tokens), PREFILL_CHUNK):
                if cancelled and cancelled():
                    return None
                for token in tokens[begin : begin + PREFILL_CHUNK]:
                    self._append(held, token)
                    rows.append(self.rule(held))
                if progress:
                    progress(min(begin + PREFILL_CHUNK, len(tokens)), len(tokens))
            return np.stack(rows) if all_logits else rows[-1]
        finally:
            self._inside.release()

    def step(self, tokens, sequences):
        assert self._inside.acquire(blocking=False), "two threads are in one session"
        try:
            assert not self.closed
            for token, sequence in zip(tokens, sequences):
                held = self.held[sequence]
                assert len(held) < self.n_ctx
                self._append(held, token)
            return np.stack([self.rule(self.held[sequence]) for sequence in sequences])
        finally:
            self._inside.release()

    def truncate(self, length: int, sequence: int = 0) -> None:
        held = self.held.setdefault(sequence, [])
        assert 0 <= length <= len(held)
        del held[length:]

    def close(self) -> None:
        self.closed = True

    def _append(self, held: list[int], token: int) -> None:
        assert 0 <= token < self.n_vocab
        held.append(token)
        self.computed += 1
        if self.step_seconds:
            time.sleep(self.step_seconds)


def toy_llama(
    rule: Rule = hashed,
    *,
    n_ctx: int = 256,
    step_seconds: float = 0.0,
    tokenizer: Tokenizer | None = None,
    seed: int | None = None,
) -> Llama:
    """A Llama over the toy session."""
    model = SimpleNamespace(tokenizer=tokenizer or toy_tokenizer(), notices=[], close=lambda: None)
    return Llama._from_model(model, ToySession(rule, n_ctx, step_seconds), "toy.gguf", seed)
