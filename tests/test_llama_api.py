"""Class Llama over a toy model:

shapes of the answers, tokens and logits, threads, cancellation, abandoned streams.
"""

import gc
import json
import math
import threading

import numpy as np
import pytest
from toy_engine import BOS, END, EOS, START, hashed, scripted, toy_llama, toy_tokenizer

import pyinfer
from pyinfer import InputError, Llama, UnsupportedError
from pyinfer.errors import ContextFullError
from pyinfer.runtime.generate import TextOptions
from pyinfer.runtime.sampler import SamplingParams

PATIENCE_SECONDS = 20  # only reached when something is wrong
CHAT = [{"role": "user", "content": "hi"}]
RAW = "say it\n"


def exact_logprobs(logits):
    logits = logits.astype(np.float64)
    return logits - math.log(np.exp(logits).sum())


# -- shapes


def test_completion():
    answer = toy_llama(scripted("hello world"))(RAW, max_tokens=5)
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "toy.gguf"
    assert answer["choices"] == [{"text": "hello", "index": 0, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    json.dumps(answer)


def test_completion_stream():
    llm = toy_llama(scripted("hello"))
    chunks = list(llm.create_completion(RAW, max_tokens=None, stream=True, model="other"))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["model"] for chunk in chunks} == {"other"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]
    assert "usage" not in chunks[0]


@pytest.mark.parametrize("limit", [None, -1])
def test_no_limit(limit):
    choice = toy_llama(scripted("hello world, how are you?"))(RAW, max_tokens=limit)["choices"][0]
    assert choice["text"] == "hello world, how are you?"
    assert choice["finish_reason"] == "stop"


def test_chat_completion():
    answer = toy_llama(scripted("hello")).create_chat_completion(CHAT)
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": "hello"}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    prompt = b"\0user\nhi\0\n\0assistant\n"
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 5,
        "total_tokens": len(prompt) + 5,
    }


def test_chat_completion_stream():
    chunks = list(toy_llama(scripted("hé")).create_chat_completion(CHAT, stream=True))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant"}, {"content": "h"}, {"content": "é"}, {},
    ]  # fmt: skip
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]


def test_chat_uses_the_models_template():
    llm = toy_llama(scripted("x"))
    llm.create_chat_completion([{"role": "system", "content": "be brief"}, *CHAT])
    text = b"".join(bytes([t]) if t < 256 else b"|" for t in llm.session.held[0])
    assert text == b"|system\nbe brief|\n|user\nhi|\n|assistant\nx"


@pytest.mark.parametrize("stop", ["lo", ["zz", "lo"]])
def test_stop(stop):
    choice = toy_llama(scripted("hello"))(RAW, stop=stop)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hel", "stop")


def test_echo():
    llm = toy_llama(scripted("hello"))
    assert llm(RAW, echo=True)["choices"][0]["text"] == RAW + "hello"
    chunks = list(llm(RAW, echo=True, stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [RAW, *"hello", ""]
    assert llm(list(RAW.encode()), echo=True, max_tokens=0)["choices"][0]["text"] == RAW


def hashed_ascii(tokens):
    """Every token has a text of its own, and the text never ends."""
    logits = hashed(tokens)
    logits[128:] = -30
    return logits


def test_completion_logprobs():
    prompt = list(b"abc")
    answer = toy_llama(hashed_ascii)(prompt, max_tokens=4, logprobs=2, temperature=0)
    logprobs = answer["choices"][0]["logprobs"]
    tokens = list(prompt)
    for n in range(4):
        exact = exact_logprobs(hashed_ascii(tokens))
        best = np.argsort(-exact)[:2]
        assert logprobs["token_logprobs"][n] == pytest.approx(exact[best[0]], abs=1e-4)
        assert sorted(logprobs["top_logprobs"][n].values()) == pytest.approx(sorted(exact[best]), abs=1e-4)
        tokens.append(int(best[0]))
    assert logprobs["text_offset"][0] == 3
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(stream):
    prompt = list(np.random.default_rng(1).integers(0, 128, 150))  # more than one chunk
    answer = toy_llama()(prompt, max_tokens=0, echo=True, logprobs=0, stream=stream)
    first = next(iter(answer)) if stream else answer
    scored = first["choices"][0]["logprobs"]
    exact = [exact_logprobs(hashed(prompt[:n]))[prompt[n]] for n in range(1, 150)]
    assert scored["token_logprobs"][0] is None
    assert scored["token_logprobs"][1:] == pytest.approx(exact, abs=1e-4)
    assert scored["text_offset"] == list(range(150))
    assert scored["tokens"] == [chr(t) for t in prompt]


def test_chat_logprobs():
    answer = toy_llama(scripted("é")).create_chat_completion(CHAT, logprobs=True, top_logprobs=1)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9]]
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in content)
    assert all(-0.01 < entry["logprob"] < 0 for entry in content)
    plain = toy_llama(scripted("a")).create_chat_completion(CHAT, logprobs=True)
    assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


# -- arguments


@pytest.mark.parametrize(
    "options", [{"n_ctx": 0}, {"n_ctx": -4}, {"n_threads": 0}, {"seed": -5}, {"n_ctx": "7"}]
)
def test_bad_arguments_are_found_before_the_file_is_opened(options):
    with pytest.raises(InputError, match=f"{next(iter(options))} is .*None"):
        Llama("no such file.gguf", **options)


def test_unknown_and_unsupported_keywords():
    llm = toy_llama(scripted("x"))
    with pytest.raises(TypeError, match=r"temprature.*temperature"):
        llm(RAW, temprature=1)
    with pytest.raises(UnsupportedError, match="suffix"):
        llm(RAW, suffix="end")
    with pytest.raises(UnsupportedError, match="tools"):
        llm.create_chat_completion(CHAT, tools=[{}])
    with pytest.raises(InputError, match="top_p"):
        llm(RAW, top_p=2)
    assert llm(RAW, suffix=None, top_p=None)["choices"][0]["text"] == "x"


def test_empty_and_too_long_prompts():
    llm = toy_llama(scripted("x"), n_ctx=8)
    with pytest.raises(InputError, match="empty"):
        llm("")
    with pytest.raises(ContextFullError, match="9 tokens, the context holds 8"):
        llm("12345678\n")
    assert llm(RAW)["choices"][0]["text"] == "x"
    with_bos = toy_llama(tokenizer=toy_tokenizer(add_bos=True))
    assert with_bos("", max_tokens=1)["usage"]["prompt_tokens"] == 1


def test_control_tokens_in_a_prompt_are_text():
    llm = toy_llama()
    llm("<|im_start|>", max_tokens=0)
    assert llm.session.held[0] == list(b"<|im_start|>")
    assert llm.tokenize("<|im_start|>a", special=True) == [START, ord("a")]


def test_seeds():
    def texts(own_seed, **options):
        llm = toy_llama(seed=own_seed)
        return [llm("abc", max_tokens=8, temperature=2.0, **options)["choices"][0]["text"] for _ in range(2)]

    assert texts(1) == texts(1)
    assert texts(1)[0] != texts(1)[1]
    assert texts(1) != texts(2)
    assert texts(None) != texts(None)
    assert len({*texts(None, seed=5), *texts(3, seed=5)}) == 1


# -- tokens and logits


def test_tokens():
    llm = toy_llama(tokenizer=toy_tokenizer(add_bos=True))
    assert llm.tokenize("hé") == llm.tokenize("hé".encode()) == [BOS, *"hé".encode()]
    assert llm.tokenize(b"h", add_bos=False) == [ord("h")]
    assert llm.detokenize(llm.tokenize("hé")) == "hé".encode()
    assert llm.detokenize([0xC3]) == b"\xc3"
    assert llm.detokenize([START, 97, EOS]) == b"a"
    assert llm.detokenize([START, 97], special=True) == b"<|im_start|>a"
    assert (llm.token_bos(), llm.token_eos(), llm.n_vocab(), llm.n_ctx()) == (BOS, END, 260, 256)
    with pytest.raises(InputError, match="byte 1"):
        llm.tokenize(b"a\xff")


def test_eval_and_logits():
    llm = toy_llama()
    with pytest.raises(InputError, match="eval"):
        _ = llm.scores
    with pytest.raises(InputError, match="eval"):
        _ = llm.last_logits
    llm.eval([1, 2, 3])
    assert np.array_equal(llm.scores, [hashed([1, 2, 3])])
    llm.eval([4, 5], all_logits=True)
    assert np.array_equal(llm.scores, [hashed([1, 2, 3, 4]), hashed([1, 2, 3, 4, 5])])
    assert np.array_equal(llm.last_logits, hashed([1, 2, 3, 4, 5]))
    assert llm.n_tokens == 5
    with pytest.raises(ContextFullError):
        llm.eval([0] * 252)
    with pytest.raises(InputError, match="260"):
        llm.eval([260])
    assert llm.n_tokens == 5
    llm.reset()
    assert llm.n_tokens == llm.session.length() == 0
    llm([7, 8], max_tokens=2, temperature=0)
    assert np.array_equal(llm.last_logits, hashed(llm.session.held[0]))


def test_a_growing_chat_stays_in_the_cache():
    llm = toy_llama(scripted("hello"))
    llm.create_chat_completion(CHAT)
    before, held = llm.session.computed, llm.n_tokens
    messages = [*CHAT, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}]
    usage = llm.create_chat_completion(messages)["usage"]
    assert llm.session.computed - before == usage["total_tokens"] - held
    assert usage["prompt_tokens"] > held


# -- threads


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
    assert (
        llm("abc", max_tokens=2)["choices"][0]["finish_reason"] == "length"
    )  # later calls are not cancelled


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
    with llm as same:
        assert same is llm
        stream = llm(RAW, stream=True)
        next(stream)
    assert llm.session.closed
    llm.close()
    with pytest.raises(InputError, match="closed"):
        next(stream)
    with pytest.raises(InputError, match="closed"):
        llm(RAW)
    with pytest.raises(InputError, match="closed"):
        llm.eval([1])


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

    ended, _ = in_threads([generate, lambda: (begun.wait(PATIENCE_SECONDS), llm.close())])
    assert "closed" in ended or ended == "cancelled"
    assert llm.session.closed


# -- package


def test_public_names():
    assert pyinfer.__all__ == sorted(pyinfer.__all__)
    for name in pyinfer.__all__:
        assert getattr(pyinfer, name) is not None
    assert issubclass(pyinfer.FormatError, pyinfer.PyInferError)
    with pytest.raises(AttributeError, match="nothing"):
        _ = pyinfer.nothing
