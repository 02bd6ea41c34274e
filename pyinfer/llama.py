"""Class Llama: a loaded model with one KV cache, and the calls that users of llama-cpp-python know.

The library is quiet: no output, no signal handlers, no state outside the object. Everything that computes
takes a turn (pyinfer.runtime.turns): a generation runs to its end before another thread's begins, and an
abandoned stream gives up its turn. Text of the caller is text: control tokens written in a prompt are not
parsed, `tokenize(text, special=True)` does that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyinfer.errors import InputError
from pyinfer.runtime.arguments import check_load_arguments, checked_text, token_ids
from pyinfer.runtime.generate import CachedSequence, Progress, Segment, TextOptions, stream_text, text_options
from pyinfer.runtime.opening import open_session, release
from pyinfer.runtime.response import ChatResponse, CompletionResponse, Drawn, drawn_tokens, joined
from pyinfer.runtime.sampler import Sampler, SamplingParams
from pyinfer.runtime.turns import Turns

if TYPE_CHECKING:
    from pyinfer.runtime.stats import LayerStats


class Llama:
    """A model that answers.

    model_path : GGUF file (any part of a split one)
    n_ctx : tokens of context, None: the model's, at most 4096
    n_threads : None: as many as this process may use;  seed : makes the whole sequence of calls repeatable
    verbose : accepted for llama-cpp-python's sake, nothing is ever printed
    progress : (bytes done, bytes to do) of loading
    sparsity : which neurons are computed: auto, exact, predicted, cats=SHARE or dense
    observe : "stats" counts for `sparsity_stats`, with predictors at the price of all gates; None: nothing
    others : keywords of llama-cpp-python, such as n_gpu_layers=0, where they ask for nothing

    Raises ModelNotFoundError, FormatError, UnsupportedError, CapacityError for the file and InputError,
    UnsupportedError, TypeError for the arguments. Safe to use from several threads: each generation holds the
    model until it ends (for a stream: until it is exhausted or closed), the others wait; `cancel` may be
    called at any time.

    >>> with Llama("model.gguf") as llm:                                               # doctest: +SKIP
    ...     llm("Once upon a time", max_tokens=8)["choices"][0]["text"]
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        seed: int | None = None,
        verbose: bool = False,
        progress: Progress | None = None,
        sparsity: str = "auto",
        observe: str | None = None,
        **others: Any,
    ) -> None:
        check_load_arguments(n_ctx, n_threads, others)
        SamplingParams(seed=seed)
        model, session = open_session(model_path, n_ctx, n_threads, progress, sparsity, observe)
        self._set_up(model, session, str(model_path), seed)

    @classmethod
    def from_pretrained(
        cls, name: str, *, offline: bool = False, progress: Progress | None = None, **options: Any
    ) -> Llama:
        """Load a model by its registered name, for example "smollm2-135m"; it is fetched once.

        progress : (bytes done, bytes to do) of fetching;  options : those of the class
        """
        from pyinfer.model_store import find_model

        return cls(find_model(name, progress=progress, offline=offline), **options)

    @classmethod
    def _from_model(cls, model: Any, session: Any, name: str = "model", seed: int | None = None) -> Llama:
        """An instance over a model and a session that exist already."""
        llm = cls.__new__(cls)
        llm._set_up(model, session, name, seed)
        return llm

    def _set_up(self, model: Any, session: Any, name: str, seed: int | None) -> None:
        self.model_path = name
        self._open: tuple[Any, Any] | None = (model, session)
        # no reference to self: it also works for an instance that was forgotten
        self._release = weakref.finalize(self, release, session, model)
        self._release.atexit = False  # the threads are daemons
        self._cache = CachedSequence(session)
        self._seeds = None if seed in (None, -1) else np.random.default_rng(seed)
        self._turns = Turns()
        self._cancel_count = 0
        self._scores: np.ndarray | None = None

    # -- turns

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        turn = object()
        self._turns.take(turn)
        try:
            self._check_open()
            yield
        finally:
            self._turns.give_back(turn)

    def _check_open(self) -> tuple[Any, Any]:
        if self._open is None:
            raise InputError(f"the model {self.model_path} is closed, expected an open one")
        return self._open

    @property
    def model(self) -> Any:
        """The pyinfer.runtime.loader.Model; like everything here, InputError once it is closed."""
        return self._check_open()[0]

    @property
    def session(self) -> Any:
        """The pyinfer.runtime.session.Session over it."""
        return self._check_open()[1]

    @property
    def tokenizer(self) -> Any:
        """The pyinfer.text.tokenizer.Tokenizer of the model."""
        return self.model.tokenizer

    @property
    def notices(self) -> list[str]:
        """Sentences for the user: what of the file could not be used, and what is done instead."""
        return list(self.model.notices)

    def sparsity_stats(self) -> list[LayerStats]:
        """Per layer, which shares of its neurons fired and were computed since the session began, or since
        `session.reset_observed()`.

        Raises InputError without observe="stats", or before any token was generated.
        """
        from pyinfer.runtime.stats import layer_stats

        with self._turn():
            return layer_stats(self.session)

    def cancel(self) -> None:
        """From any thread: every generation asked for so far ends, and says "cancelled"."""
        self._cancel_count += 1

    def _cancelled(self) -> Callable[[], bool]:
        count = self._cancel_count
        return lambda: self._cancel_count != count

    def reset(self) -> None:
        """Forget all tokens in the KV cache."""
        with self._turn():
            self._cache.clear()
            self._scores = None

    def close(self) -> None:
        """Cancel what runs, end the threads and free the memory; calling it again does nothing."""
        self.cancel()
        turn = object()
        self._turns.take(turn, from_any_paused=True)
        try:
            if self._open is not None:
                self._open = self._scores = None
                self._cache.detach()
                self._release()
        finally:
            self._turns.give_back(turn)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- tokens and logits

    def n_ctx(self) -> int:
        """How many tokens the context holds."""
        return self.session.n_ctx

    def n_vocab(self) -> int:
        """How many tokens the model knows."""
        return self.session.n_vocab

    def token_bos(self) -> int:
        """The token that begins a text, -1 when the model has none."""
        return -1 if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def token_eos(self) -> int:
        """The token that ends a text, -1 when the model has none."""
        return -1 if self.tokenizer.eos_id is None else self.tokenizer.eos_id

    @property
    def n_tokens(self) -> int:
        """How many tokens are in the KV cache."""
        return len(self._cache.tokens)

    def tokenize(self, text: str | bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Tokens of a text; bytes must be UTF-8.

        add_bos : begin with the token that begins a text, where the model wants one
        special : parse control tokens in the text
        """
        return self.tokenizer.encode(checked_text(text), bos=None if add_bos else False, special=special)

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> bytes:
        """UTF-8 bytes of tokens, also where they end inside of a character.

        special : also write control tokens
        Raises InputError for what is no token of the vocabulary.
        """
        tokens = token_ids(tokens, self.tokenizer.vocab_size, "tokens")
        names, control = self.tokenizer.token_text, self.tokenizer.control_texts
        shown = tokens if special else [token for token in tokens if names(token) not in control]
        text = b"".join(self.tokenizer.token_bytes(token) for token in shown)
        # the space that a begin token calls for is no part of the text
        dropped = text[:1] == b" " and text[1:].decode("utf-8", "replace") == self.tokenizer.decode(tokens)
        return text[1:] if dropped and not special else text

    def eval(self, tokens: Sequence[int], *, all_logits: bool = False) -> None:
        """Compute tokens behind those in the KV cache; then `scores` and `last_logits` are there.

        Raises ContextFullError when they do not fit, InputError for none or unknown ones.
        """
        with self._turn():
            self._scores = self._cache.append(
                token_ids(tokens, self.n_vocab(), "tokens"), all_logits=all_logits
            )

    @property
    def scores(self) -> np.ndarray:
        """Logits of the last `eval`, f32 [T, V] with all_logits, else [1, V] behind its last token."""
        self._check_open()
        if self._scores is None:
            raise InputError("there are no scores yet, expected a call of eval first")
        return self._scores

    @property
    def last_logits(self) -> np.ndarray:
        """Logits f32 [V] behind the last token in the KV cache."""
        self._check_open()
        if self._cache.logits is None:
            raise InputError("there are no logits yet, expected a call of eval first")
        return self._cache.logits

    # -- generation

    def stream_segments(
        self,
        prompt: str | Sequence[int],
        options: TextOptions | None = None,
        sampling: SamplingParams | None = None,
        *,
        progress: Progress | None = None,
        began: float | None = None,
    ) -> Iterator[Segment]:
        """Stream segments of text with tokens and figures: what the completions are made of.

        progress : (tokens done, tokens to do) of the prompt
        began : perf_counter() from which the first token is timed, None: now
        Raises InputError, ContextFullError at the first segment.
        """
        tokens = self._prompt_tokens(prompt)
        began = time.perf_counter() if began is None else began
        cancelled = self._cancelled()
        sampling = sampling or SamplingParams()

        def segments() -> Iterator[Segment]:
            turn = object()
            self._turns.take(turn)
            try:
                self._check_open()
                sampler, chosen = Sampler(self._seeded(sampling)), options or TextOptions()
                stream = stream_text(
                    self._cache, self.tokenizer, tokens, sampler, chosen,
                    cancelled=cancelled, progress=progress, began=began,
                )  # fmt: skip
                for segment in stream:
                    if segment.finish_reason:
                        self._turns.give_back(turn)
                    self._turns.pause(turn)
                    yield segment
                    if segment.finish_reason:
                        return
                    self._turns.take(turn)
                    self._check_open()
            finally:
                self._turns.give_back(turn)

        return segments()

    def _prompt_tokens(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str | bytes):
            return self.tokenize(prompt)
        return token_ids(prompt, self.n_vocab(), "the prompt")

    def _seeded(self, sampling: SamplingParams) -> SamplingParams:
        if sampling.seed is not None or self._seeds is None:
            return sampling
        return dataclasses.replace(sampling, seed=int(self._seeds.integers(2**63)))

    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 16,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        echo: bool = False,
        logprobs: int | None = None,
        **sampling: Any,
    ) -> dict | Iterator[dict]:
        """Continue a text or tokens: a dict of OpenAI's shape, with stream=True an iterator of dicts.

        max_tokens : None or -1 for as many as the context holds;  stop : texts that end the answer
        echo : put the prompt before the answer
        logprobs : report that many most probable tokens at each place
        sampling : the fields of SamplingParams, and model= as the name to show
        Raises InputError, ContextFullError, UnsupportedError; TypeError for unknown keywords.
        """
        model = sampling.pop("model", None) or self.model_path
        params, options = SamplingParams.from_keywords(sampling), text_options(max_tokens, stop, logprobs)
        tokens = self._prompt_tokens(prompt)
        text = prompt if isinstance(prompt, str) else self.detokenize(tokens).decode("utf-8", "replace")
        response = CompletionResponse(model, self.tokenizer.token_bytes, 0 if echo else len(text))
        segments = self.stream_segments(tokens, options, params)

        def chunks() -> Iterator[dict]:
            if echo:
                yield response.chunk(text, self._prompt_logprobs(tokens, logprobs), None)
            for segment in segments:
                yield response.chunk(segment.text, drawn_tokens(segment, options), segment.finish_reason)

        if stream:
            return chunks()
        scored = self._prompt_logprobs(tokens, logprobs) if echo else None
        written, drawn, last = joined(segments, options)
        if echo:
            written, drawn = text + written, None if drawn is None else [*(scored or ()), *drawn]
        return response.whole(written, drawn, last.finish_reason, last.stats)

    __call__ = create_completion

    def create_chat_completion(
        self,
        messages: Sequence[dict],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        logprobs: bool = False,
        top_logprobs: int | None = None,
        **sampling: Any,
    ) -> dict | Iterator[dict]:
        """Answer a conversation [{"role": ..., "content": ...}, ...] with the model's own template.

        A dict, with stream=True an iterator of dicts, of the OpenAI chat shape; parameters and errors as in
        `create_completion`.
        """
        from pyinfer.text.chat import encode_chat

        model = sampling.pop("model", None) or self.model_path
        params = SamplingParams.from_keywords(sampling)
        options = text_options(max_tokens, stop, (top_logprobs or 0) if logprobs else None)
        tokens = encode_chat(self.tokenizer, messages)
        response = ChatResponse(model, self.tokenizer.token_bytes)
        segments = self.stream_segments(tokens, options, params)

        def chunks() -> Iterator[dict]:
            yield response.first()
            for segment in segments:
                yield response.chunk(segment.text, drawn_tokens(segment, options), segment.finish_reason)

        if stream:
            return chunks()
        written, drawn, last = joined(segments, options)
        return response.whole(written, drawn, last.finish_reason, last.stats)

    def _prompt_logprobs(self, tokens: list[int], count: int | None) -> Drawn | None:
        """Each token of a prompt with its log-probability; it is in the KV cache then."""
        if count is None:
            return None
        with self._turn():
            scored = self._cache.score(tokens, count)
        return [(tokens[0], None), *((entry.token, entry) for entry in scored)]
