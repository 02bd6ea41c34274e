"""The generation loop, in storeys: tokens in a KV cache, a stream of tokens, a stream of text.

Each storey stands on the one below and is useful alone. `CachedSequence` knows which tokens the session
holds, so that a prompt which continues the last one is not computed again; `generate_tokens` knows no text;
`stream_text` adds the detokenizer, stop strings and figures. What a stop string is does not depend on where
the tokens happen to end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pyinfer.errors import ContextFullError, InputError
from pyinfer.runtime.sampler import TokenLogprob, token_logprob

SCORED_TOKENS = 64  # tokens whose logits are in memory at once when a prompt is scored

Cancelled = Callable[[], bool]
Progress = Callable[[int, int], None]


class Session(Protocol):
    """What generation needs of pyinfer.runtime.session.Session."""

    n_ctx: int
    n_vocab: int

    def length(self, sequence: int = 0) -> int: ...
    def prefill(self, tokens, sequence: int = 0, **options) -> np.ndarray | None: ...
    def step(self, tokens, sequences) -> np.ndarray: ...
    def truncate(self, length: int, sequence: int = 0) -> None: ...


class TokenSampler(Protocol):
    """What generation needs of a sampler."""

    def sample(self, logits: np.ndarray) -> int: ...
    def accept(self, token: int) -> None: ...


class CachedSequence:
    """One sequence of a session together with the tokens that its KV cache holds.

    tokens : the tokens in the cache
    logits : f32 [V] behind the last of them, or None when nobody computed them
    """

    def __init__(self, session: Session, sequence: int = 0) -> None:
        self.session = session
        self.sequence = sequence
        self.tokens: list[int] = []
        self.logits: np.ndarray | None = None
        self._writer: object = None

    def clear(self) -> None:
        """Forget everything."""
        self.session.truncate(0, self.sequence)
        self.tokens, self.logits, self._writer = [], None, None

    def detach(self) -> None:
        """Let go of the session, so that a stream which nobody goes on with keeps no memory; for the end."""
        self.tokens, self.logits, self._writer = [], None, None
        del self.session

    def reusable(self, tokens: Sequence[int]) -> int:
        """How many leading tokens need not be computed; the last one only if its logits are there."""
        if self.session.length(self.sequence) != len(self.tokens):  # somebody used the session past us
            self.clear()
        limit = min(len(tokens), len(self.tokens))
        same = next((i for i in range(limit) if tokens[i] != self.tokens[i]), limit)
        if same == len(tokens) and (same < len(self.tokens) or self.logits is None):
            same -= 1
        return max(same, 0)

    def hold(
        self, tokens: Sequence[int], *, cancelled: Cancelled | None = None, progress: Progress | None = None
    ) -> np.ndarray | None:
        """Make the cache hold exactly `tokens`; their last logits f32 [V], or None when cancelled.

        Raises InputError without tokens or for an unknown token, ContextFullError when they do not fit.
        """
        self.check(tokens)
        same = self.reusable(tokens)
        self._writer = None
        if same < len(self.tokens):
            self.session.truncate(same, self.sequence)
            del self.tokens[same:]
            self.logits = None
        if same < len(tokens):
            self.logits = None
            rest = list(tokens[same:])
            logits = self.session.prefill(rest, self.sequence, cancelled=cancelled, progress=progress)
            self.tokens.extend(rest[: self.session.length(self.sequence) - same])
            self.logits = logits
        self._writer = tokens
        return self.logits

    def hold_next(self, history: list[int], *, cancelled: Cancelled | None = None) -> np.ndarray | None:
        """`hold`, faster for a list that only grew by one token since this sequence last saw this very list.

        When another generation used the sequence in between, the tokens are computed again.
        """
        if self._writer is history and len(history) == len(self.tokens) + 1:
            self.logits = None
            self.logits = self.session.step(history[-1:], [self.sequence])[0]
            self.tokens.append(history[-1])
            return self.logits
        return self.hold(history, cancelled=cancelled)

    def append(self, tokens: Sequence[int], *, all_logits: bool = False) -> np.ndarray:
        """Compute `tokens` behind those in the cache; all their logits f32 [T, V], or the last [1, V]."""
        self.check([*self.tokens, *tokens] if tokens else [])
        self._writer = self.logits = None
        logits = self.session.prefill(list(tokens), self.sequence, all_logits=all_logits)
        assert logits is not None, "a prefill that nobody can cancel has logits"
        self.tokens.extend(tokens)
        rows = logits if all_logits else logits[None]
        self.logits = rows[-1]
        return rows

    def score(self, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
        """Compute all of `tokens` from an empty cache; the log-probability of each but the first.

        count : how many of the most probable tokens to report at each place
        """
        self.check(tokens)
        self.clear()
        scored: list[TokenLogprob] = []
        for begin in range(0, len(tokens), SCORED_TOKENS):
            chunk = tokens[begin : begin + SCORED_TOKENS]
            rows = self.append(chunk, all_logits=True)
            following = tokens[begin + 1 : begin + 1 + len(chunk)]
            scored += [token_logprob(row, token, count) for row, token in zip(rows, following)]
        return scored

    def check(self, tokens: Sequence[int]) -> None:
        """Raises InputError without tokens or for an unknown token, ContextFullError when they do not fit."""
        if not tokens:
            raise InputError("the prompt is empty, expected at least one token")
        n_ctx, n_vocab = self.session.n_ctx, self.session.n_vocab
        if len(tokens) > n_ctx:
            raise ContextFullError(
                f"the prompt has {len(tokens)} tokens, the context holds {n_ctx}; "
                "shorten the prompt or raise n_ctx"
            )
        wrong = next((t for t in tokens if not 0 <= t < n_vocab), None)
        if wrong is not None:
            raise InputError(f"the prompt has token {wrong}, expected 0 to {n_vocab - 1}")


def generate_tokens(
    cache: CachedSequence,
    prompt: Sequence[int],
    sampler: TokenSampler,
    *,
    max_tokens: int | None,
    end_ids: Collection[int],
    cancelled: Cancelled | None = None,
    progress: Progress | None = None,
) -> Generator[int, None, str]:
    """Yields tokens that continue `prompt`; the generator's return value is "stop", "length" or "cancelled".

    max_tokens : None for as many as the context holds;  end_ids : tokens that end the text, never yielded
    cancelled : asked between steps and chunks of the prompt
    progress : (tokens done, tokens to do) of the prompt
    The last token may lie outside the KV cache, so n_ctx = 8 and a prompt of 8 still give one token.
    """
    history = list(prompt)
    logits = cache.hold(history, cancelled=cancelled, progress=progress)
    if max_tokens == 0:
        return "length"
    for token in history:
        sampler.accept(token)
    made = 0
    while logits is not None and not (cancelled and cancelled()):
        token = sampler.sample(logits)
        if token in end_ids:
            return "stop"
        sampler.accept(token)
        history.append(token)
        made += 1
        yield token
        if made == max_tokens or len(history) > cache.session.n_ctx:
            return "length"
        if cancelled and cancelled():
            break
        logits = cache.hold_next(history, cancelled=cancelled)
    return "cancelled"


@dataclass
class GenerationStats:
    """Figures of one generation; they grow while it runs, without the time that the consumer takes."""

    prompt_tokens: int
    reused_tokens: int = 0  # of the prompt, found in the KV cache
    completion_tokens: int = 0
    prefill_seconds: float = 0.0  # prompt and the draw of the first token
    decode_seconds: float = 0.0  # the other tokens
    first_token_seconds: float = 0.0  # from the moment that the caller named to the first token

    @property
    def prefill_tokens_per_second(self) -> float:
        """Computed prompt tokens per second; 0 when nothing was computed."""
        return (
            (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0
        )

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens behind the first one per second; 0 when there are none."""
        steps = self.completion_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds else 0.0


@dataclass(frozen=True)
class Segment:
    """A piece of generated text and the tokens drawn for it.

    finish_reason : None, and in the last segment "stop" (end token or stop string), "length" or "cancelled"
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    stats: GenerationStats
    logprobs: tuple[TokenLogprob, ...] = ()


class StopStrings:
    """Cuts a stream of text before the stop string that ends first, and never lets a part of one through.

    Of stop strings that end at the same place the longest counts. So the result depends on the text alone.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise InputError(f"stop is {list(stops)!r}, expected texts of at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that may be shown now; `found` says whether a stop string came."""
        if not self._stops:
            return text
        text = self._held + text
        ends = [(at + len(stop), -len(stop)) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            end, negative_length = min(ends)
            return text[: end + negative_length]
        self._held = text[len(text) - self._possible_start(text) :]
        return text[: len(text) - len(self._held)]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string could begin with."""
        longest = min(max(map(len, self._stops)) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


@dataclass(frozen=True)
class TextOptions:
    """What ends a text and what is told about it.

    max_tokens : None: as many as the context holds;  stop : texts that end the answer and are not part of it
    logprobs : how many most probable tokens to report with each token, None: no log-probabilities
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_tokens", self.max_tokens), ("logprobs", self.logprobs)):
            if value is not None and (not isinstance(value, int | np.integer) or value < 0):
                raise InputError(f"{name} is {value!r}, expected None or an integer of 0 or more")
        StopStrings(self.stop)


def text_options(
    max_tokens: int | None, stop: str | Sequence[str] | None, logprobs: int | None
) -> TextOptions:
    """From the arguments of a completion: a negative max_tokens is no limit, one stop may stand alone."""
    if max_tokens is not None and not isinstance(max_tokens, int | np.integer):
        raise InputError(f"max_tokens is {max_tokens!r}, expected an integer, or None or -1 for no limit")
    limit = None if max_tokens is None or max_tokens < 0 else max_tokens
    return TextOptions(limit, (stop,) if isinstance(stop, str) else tuple(stop or ()), logprobs)


@dataclass
class _Recorder:
    """A sampler that also keeps the log-probabilities of what it drew."""

    sampler: TokenSampler
    count: int
    drawn: list[TokenLogprob] = field(default_factory=list)

    def sample(self, logits: np.ndarray) -> int:
        token = self.sampler.sample(logits)
        self.drawn.append(token_logprob(logits, token, self.count))
        return token

    def accept(self, token: int) -> None:
        self.sampler.accept(token)


def stream_text(
    cache: CachedSequence,
    tokenizer,
    prompt: Sequence[int],
    sampler: TokenSampler,
    options: TextOptions,
    *,
    cancelled: Cancelled | None = None,
    progress: Progress | None = None,
    began: float | None = None,
) -> Iterator[Segment]:
    """Yields segments of text that continue `prompt`; the last one, and only it, has a finish_reason.

    tokenizer : pyinfer.text.tokenizer.Tokenizer (end_ids, stream);  the rest as in `generate_tokens`
    began : time.perf_counter() from which first_token_seconds counts, None: now
    Raises InputError, ContextFullError before the first segment.
    """
    began = time.perf_counter() if began is None else began
    recorder = None
    if options.logprobs is not None:
        sampler = recorder = _Recorder(sampler, options.logprobs)
    stats = GenerationStats(len(prompt), cache.reusable(prompt) if len(prompt) else 0)
    stops, decoder = StopStrings(options.stop), tokenizer.stream()
    pending: list[int] = []
    told = 0
    steps = generate_tokens(
        cache, prompt, sampler, max_tokens=options.max_tokens, end_ids=tokenizer.end_ids,
        cancelled=cancelled, progress=progress,
    )  # fmt: skip
    reason = None
    while reason is None:
        token, reason = _timed_next(steps, stats, began)
        text = ""
        if token is not None:
            pending.append(token)
            text = stops.push(decoder.push(token))
        if reason is not None:
            text = stops.push(decoder.finish())
        if stops.found:
            reason = "stop"
        elif reason is not None:
            text += stops.finish()
        if text or reason is not None:
            drawn = tuple(recorder.drawn[told : told + len(pending)]) if recorder else ()
            told += len(pending)
            yield Segment(text, tuple(pending), reason, stats, drawn)
            pending.clear()
    steps.close()


def _timed_next(
    steps: Generator[int, None, str], stats: GenerationStats, began: float
) -> tuple[int | None, str | None]:
    """The next token, or the reason why there is none; adds its time and itself to the figures."""
    started = time.perf_counter()
    token = reason = None
    try:
        token = next(steps)
    except StopIteration as end:
        reason = end.value
    now = time.perf_counter()
    if not stats.prefill_seconds:
        stats.prefill_seconds, stats.first_token_seconds = now - started, now - began
    elif token is not None:  # the step that drew an end token made no token to be counted
        stats.decode_seconds += now - started
    stats.completion_tokens += token is not None
    return token, reason
