"""The dicts that completions answer with: the shapes of the OpenAI API, as llama-cpp-python has them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from pyinfer.runtime.generate import GenerationStats, Segment, TextOptions
from pyinfer.runtime.sampler import TokenLogprob

Drawn = Sequence[
    tuple[int, "TokenLogprob | None"]
]  # tokens and their figures; the first of a prompt has none


def _usage(stats: GenerationStats) -> dict:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
    }


class _Response:
    """What all dicts of one answer share.

    model : name to show;  token_bytes : token -> bytes, for log-probabilities
    """

    prefix = ""

    def __init__(self, model: str, token_bytes: Callable[[int], bytes]) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4()}", "created": int(time.time()), "model": model}
        self._token_bytes = token_bytes

    def _dict(self, kind: str, choice: dict) -> dict:
        return {"object": kind, **self._head, "choices": [{"index": 0, **choice}]}

    def _text(self, token: int) -> str:
        return self._token_bytes(token).decode("utf-8", "replace")


class CompletionResponse(_Response):
    """Dicts of a text completion.

    `offset` is where its first character lies in prompt and answer together.
    """

    prefix = "cmpl"

    def __init__(self, model: str, token_bytes: Callable[[int], bytes], offset: int = 0) -> None:
        super().__init__(model, token_bytes)
        self._offset = offset

    def chunk(self, text: str, drawn: Drawn | None, finish_reason: str | None) -> dict:
        """One piece of a streamed answer; drawn is None without log-probabilities."""
        choice = {"text": text, "logprobs": self._logprobs(drawn), "finish_reason": finish_reason}
        return self._dict("text_completion", choice)

    def whole(
        self, text: str, drawn: Drawn | None, finish_reason: str | None, stats: GenerationStats
    ) -> dict:
        """The whole answer."""
        return {**self.chunk(text, drawn, finish_reason), "usage": _usage(stats)}

    def _logprobs(self, drawn: Drawn | None) -> dict | None:
        if drawn is None:
            return None
        texts = [self._text(token) for token, _ in drawn]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "text_offset": offsets,
            "token_logprobs": [entry and entry.logprob for _, entry in drawn],
            "top_logprobs": [self._alternatives(entry) for _, entry in drawn],
        }

    def _alternatives(self, entry: TokenLogprob | None) -> dict[str, float] | None:
        if entry is None:
            return None
        pairs = [*entry.top, (entry.token, entry.logprob)]
        texts: dict[str, float] = {}
        for token, logprob in pairs:
            texts.setdefault(self._text(token), logprob)  # of tokens with the same text the most probable
        return texts


class ChatResponse(_Response):
    """Dicts of a chat completion."""

    prefix = "chatcmpl"

    def first(self) -> dict:
        """The piece that says who speaks."""
        return self._chunk({"role": "assistant"}, None, None)

    def chunk(self, text: str, drawn: Drawn | None, finish_reason: str | None) -> dict:
        """One piece of a streamed answer; drawn is None without log-probabilities."""
        return self._chunk({"content": text} if text else {}, drawn, finish_reason)

    def whole(
        self, text: str, drawn: Drawn | None, finish_reason: str | None, stats: GenerationStats
    ) -> dict:
        """The whole answer."""
        message = {"role": "assistant", "content": text}
        choice = {"message": message, "logprobs": self._logprobs(drawn), "finish_reason": finish_reason}
        return {**self._dict("chat.completion", choice), "usage": _usage(stats)}

    def _chunk(self, delta: dict, drawn: Drawn | None, finish_reason: str | None) -> dict:
        choice = {"delta": delta, "logprobs": self._logprobs(drawn), "finish_reason": finish_reason}
        return self._dict("chat.completion.chunk", choice)

    def _logprobs(self, drawn: Drawn | None) -> dict | None:
        if drawn is None:
            return None
        content = []
        for token, entry in drawn:
            logprob, top = (entry.logprob, entry.top) if entry else (None, ())
            content.append(
                {
                    **self._entry(token, logprob),
                    "top_logprobs": [self._entry(*alternative) for alternative in top],
                }
            )
        return {"content": content}

    def _entry(self, token: int, logprob: float | None) -> dict:
        return {"token": self._text(token), "logprob": logprob, "bytes": list(self._token_bytes(token))}


def drawn_tokens(segment: Segment, options: TextOptions) -> Drawn | None:
    """Tokens of a segment with their log-probabilities; None where nobody asked for them."""
    return None if options.logprobs is None else [(entry.token, entry) for entry in segment.logprobs]


def joined(segments: Iterator[Segment], options: TextOptions) -> tuple[str, list | None, Segment]:
    """Text, drawn tokens (None without log-probabilities) and last segment of a stream."""
    parts = list(segments)
    pairs = [pair for part in parts for pair in drawn_tokens(part, options) or ()]
    return "".join(part.text for part in parts), None if options.logprobs is None else pairs, parts[-1]
