"""A conversation with a model: the turns so far, kept within the context, and the loop that a terminal runs.

The history stays in the KV cache because each prompt begins with the previous one. When the context is full
the oldest turns go, never the system message, so the conversation goes on at the price of reading the rest
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from pyinfer.errors import ContextFullError
from pyinfer.llama import Llama
from pyinfer.runtime.generate import Segment, TextOptions
from pyinfer.runtime.sampler import SamplingParams

ANSWER_FRACTION = 1 / 8  # of the context is kept free for the next answer
Writer = Callable[[Iterator[Segment]], Segment]
HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@dataclass
class Conversation:
    """Turns between a person and a model.

    system : message that stands before all turns, or None
    messages : the turns so far as {"role", "content"};  dropped : turns that did not fit the context any more
    """

    llm: Llama
    system: str | None = None
    options: TextOptions = field(default_factory=TextOptions)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    messages: list[dict] = field(default_factory=list)
    dropped: int = 0

    def reset(self) -> None:
        """Forget all turns."""
        self.messages.clear()

    def ask(self, text: str) -> Iterator[Segment]:
        """Stream the answer; what came of it is part of the history, also when the stream is given up.

        Raises ContextFullError when the question alone does not fit; the question is forgotten then.
        """
        self.messages.append({"role": "user", "content": text})
        tokens = self._fitting_tokens()
        answer = []
        try:
            for segment in self.llm.stream_segments(tokens, self.options, self.sampling):
                answer.append(segment.text)
                yield segment
        finally:
            self.messages.append({"role": "assistant", "content": "".join(answer)})

    def _fitting_tokens(self) -> list[int]:
        """Tokens of system message and turns, after the oldest turns were dropped as far as necessary."""
        from pyinfer.text.chat import encode_chat

        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        n_ctx = self.llm.n_ctx()
        while True:
            tokens = encode_chat(self.llm.tokenizer, system + self.messages)
            is_last = len(self.messages) == 1
            if len(tokens) <= n_ctx * (1 if is_last else 1 - ANSWER_FRACTION):
                return tokens
            if is_last:
                self.messages.clear()
                raise ContextFullError(
                    f"the message has {len(tokens)} tokens, the context holds {n_ctx}; write a shorter one"
                )
            del self.messages[:2]  # a question and its answer
            self.dropped += 1


def run_conversation(
    conversation: Conversation,
    read_line: Callable[[], str],
    write: Writer,
    notices: TextIO,
) -> None:
    """Read, answer, repeat, until read_line raises EOFError or /exit is read.

    write : shows the segments of an answer and returns the last one
    notices : gets everything that is not an answer
    """
    notices.write(HELP + "\n")
    while True:
        try:
            text = read_line().strip()
        except EOFError:
            notices.write("\n")
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/help":
            notices.write(HELP + "\n")
        elif text == "/reset":
            conversation.reset()
            notices.write("the conversation is forgotten\n")
        elif text:
            _answer(conversation, text, write, notices)


def _answer(conversation: Conversation, text: str, write: Writer, notices: TextIO) -> None:
    dropped = conversation.dropped
    try:
        last = write(conversation.ask(text))
    except ContextFullError as error:
        notices.write(f"{error}\n")
        return
    if conversation.dropped > dropped:
        n_ctx = conversation.llm.n_ctx()
        notices.write(f"the context of {n_ctx} tokens is full: the oldest turns were forgotten\n")
    if last.finish_reason == "length":
        notices.write(f"the answer was cut after {last.stats.completion_tokens} tokens\n")
