"""Class Llama over a toy model: threads, cancellation, abandoned streams, closing."""

import gc
import math
import threading

import numpy as np
import pytest
from toy_engine import END, scripted, toy_llama

from pyinfer import InputError
from pyinfer.runtime.generate import TextOptions
from pyinfer.runtime.sampler import SamplingParams

PATIENCE_SECONDS = 20  # only reached when something is wrong
RAW = "say it\n"


def in_threads(functions):
    """Run all at once; results in order, errors are raised."""
    results = [None] * len(functions)

    def run(place, function):
        try:
            results[place] = function()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "a thread hangs"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_threads_get_the_answers_of_single_runs():
    prompts = ["one", "two", "three", "four"]
    expected = [toy_llama()(prompt, max_tokens=12, seed=1) for prompt in prompts]
    llm = toy_llama(step_seconds=0.0002)  # the toy session fails when two threads are inside at once

    def streamed(prompt):
        return "".join(c["choices"][0]["text"] for c in llm(prompt, max_tokens=12, seed=1, stream=True))

    def whole(prompt):
        return llm(prompt, max_tokens=12, seed=1)["choices"][0]["text"]

    functions = [lambda p=p, f=f: f(p) for p in prompts for f in (streamed, whole)]
    texts = in_threads(functions)
    assert texts == [answer["choices"][0]["text"] for answer in expected for _ in range(2)]


def test_cancel_from_another_thread():
    llm = toy_llama(n_ctx=100_000, step_seconds=0.001)
    begun = threading.Event()

    def generate():
        texts = []
        for segment in llm.stream_segments("abc", TextOptions(), SamplingParams(logit_bias={END: -math.inf})):
            texts.append(segment)
            begun.set()
        return texts

    def cancel():
        assert begun.wait(PATIENCE_SECONDS)
        llm.cancel()

    segments, _ = in_threads([generate, cancel])
    assert segments[-1].finish_reason == "cancelled"
    later = llm("abc", max_tokens=2)["choices"][0]["finish_reason"]
    assert later in ("length", "stop"), "later calls are not cancelled"


def test_a_stream_asked_for_before_a_cancel_is_cancelled():
    llm = toy_llama(scripted("hello"))
    stream = llm(RAW, stream=True)
    llm.cancel()
    assert [chunk["choices"][0]["finish_reason"] for chunk in stream] == ["cancelled"]


@pytest.mark.parametrize("how", ["close", "delete", "keep"])
def test_an_abandoned_stream_stops_nobody(how):
    llm = toy_llama(scripted("hello"))
    stream = llm(RAW, stream=True)
    next(stream)
    if how == "close":
        stream.close()
    elif how == "delete":
        del stream
        gc.collect()
    others = [lambda: llm(RAW)["choices"][0]["text"]]
    if how == "keep":  # only the thread that keeps it can go on; it would wait for itself
        assert others[0]() == "hello"
    assert in_threads(others) == ["hello"]


def test_an_interrupted_stream_goes_on_after_the_other_generation():
    llm = toy_llama()
    expected = toy_llama()("abc", max_tokens=10, seed=4)["choices"][0]["text"]
    stream = llm("abc", max_tokens=10, seed=4, stream=True)
    chunks = [next(stream)]
    llm("something else", max_tokens=3)
    chunks += stream
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected


def test_a_stream_may_be_read_by_many_threads_in_turn():
    llm = toy_llama(scripted("hello"))
    stream, texts = llm(RAW, stream=True), []
    for _ in range(6):
        texts += in_threads([lambda: next(stream)["choices"][0]["text"]])
    assert "".join(texts) == "hello"
    assert in_threads([lambda: llm(RAW)["choices"][0]["text"]]) == ["hello"]


def test_an_error_gives_the_turn_back():
    llm = toy_llama(lambda tokens: np.full(260, np.nan, np.float32))
    with pytest.raises(InputError, match="nan"):
        llm("abc")
    with pytest.raises(InputError, match="nan"):
        in_threads([lambda: llm("abc")])


# -- closing


def test_close():
    llm = toy_llama(scripted("hello"))
    session = llm.session
    with llm as same:
        assert same is llm
        stream = llm(RAW, stream=True)
        next(stream)
    assert session.closed
    llm.close()
    with pytest.raises(InputError, match="closed"):
        next(stream)
    with pytest.raises(InputError, match="closed"):
        llm(RAW)
    for use in (
        lambda: llm.eval([1]), llm.n_ctx, llm.n_vocab, llm.token_bos, llm.reset,
        lambda: llm.tokenize("a"), lambda: llm.detokenize([1]), lambda: llm.last_logits, lambda: llm.scores,
        lambda: llm.session, lambda: llm.create_chat_completion([{"role": "user", "content": "a"}]),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"toy\.gguf is closed"):
            use()


def test_close_does_not_wait_for_a_stream_that_another_thread_keeps():
    llm = toy_llama(scripted("hello"))
    stream = llm(RAW, stream=True)
    begun, closed = threading.Event(), threading.Event()

    def keep():
        next(stream)
        begun.set()
        assert closed.wait(PATIENCE_SECONDS)

    def close():
        assert begun.wait(PATIENCE_SECONDS)
        llm.close()
        closed.set()

    in_threads([keep, close])
    with pytest.raises(InputError, match="closed"):
        next(stream)


def test_close_ends_a_generation_of_another_thread():
    llm = toy_llama(n_ctx=100_000, step_seconds=0.001)
    begun = threading.Event()

    def generate():
        try:
            for _ in llm("abc", max_tokens=-1, stream=True, logit_bias={END: -math.inf}):
                begun.set()
        except InputError as error:
            return str(error)
        return "cancelled"

    session = llm.session
    ended, _ = in_threads([generate, lambda: (begun.wait(PATIENCE_SECONDS), llm.close())])
    assert "closed" in ended or ended == "cancelled"
    assert session.closed
