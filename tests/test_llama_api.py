"""Class Llama over a toy model: shapes of the answers, arguments, tokens and logits, public names."""

import json
import math

import numpy as np
import pytest
from toy_engine import BOS, END, EOS, START, hashed, scripted, toy_llama, toy_tokenizer

import pyinfer
from pyinfer import InputError, Llama, ModelNotFoundError, Tokenizer, UnsupportedError, names
from pyinfer.errors import ContextFullError

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


@pytest.mark.parametrize(
    "options",
    [
        {"n_gpu_layers": 0, "n_batch": 512, "use_mmap": True, "verbose": False, "chat_format": None},
        {"logits_all": False, "embedding": False, "use_mlock": False, "tensor_split": None, "n_batch": 64},
    ],
)
def test_keywords_of_llama_cpp_python_that_ask_for_nothing(options):
    with pytest.raises(ModelNotFoundError, match="no such file"):  # the arguments were fine
        Llama("no such file.gguf", **options)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"n_gpu_layers": -1}, "n_gpu_layers=-1 .*no GPU executor yet"),
        ({"embedding": True}, "embedding=True .*no embeddings"),
        ({"logits_all": True}, "logits_all=True .*eval takes"),
        ({"chat_format": "chatml"}, "chat_format='chatml' .*template"),
        ({"lora_path": "x" * 500}, "lora_path='x{79}\\.\\.\\. is"),
    ],
)
def test_keywords_of_llama_cpp_python_that_ask_for_something(option, words):
    with pytest.raises(UnsupportedError, match=words):
        Llama("no such file.gguf", **option)


def test_an_unknown_keyword_of_the_constructor():
    with pytest.raises(TypeError, match=r"n_contxt.*n_ctx"):
        Llama("no such file.gguf", n_contxt=5)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ([10**9], "token 1000000000 at place 0"),
        ([1, -1], "token -1 at place 1"),
        (["a"], "'a' at place 0"),
        ([1, 2.0], "2.0 at place 1"),
        (None, "is None"),
        (7, "is 7"),
        ({1: 2}, "is {1: 2}"),
    ],
)
def test_what_is_no_prompt(prompt, found):
    llm = toy_llama(scripted("x"))
    calls = {
        "the prompt": [llm, lambda ids: llm(ids, stream=True), llm.stream_segments],
        "tokens": [llm.eval, llm.detokenize],
    }
    for what, functions in calls.items():
        for call in functions:
            with pytest.raises(InputError) as caught:
                call(prompt)
            message = str(caught.value)
            assert (
                message.startswith(what)
                and found in message
                and "expected token ids from 0 to 259" in message
            )
    assert llm.n_tokens == 0
    assert llm(np.array([1, 10]))["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("text", [None, 7, ["a"]])
def test_what_is_no_text(text):
    with pytest.raises(InputError, match="expected str or bytes"):
        toy_llama().tokenize(text)


def test_max_tokens_that_is_no_number():
    with pytest.raises(InputError, match="max_tokens is '5'"):
        toy_llama()(RAW, max_tokens="5")


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


@pytest.mark.parametrize("text", [b"a", b" a", b"  a", b"", b"a a"])
def test_the_space_of_sentencepiece_is_no_part_of_the_text(text):
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a", *(f"<0x{byte:02X}>" for byte in range(256))]
    metadata = {
        names.TOKENIZER_MODEL: "llama",
        names.TOKENS: pieces,
        names.TOKEN_TYPE: np.array([2, 3, 3, 1, 1, 1] + [6] * 256, np.int32),
        names.SCORES: np.array([0, 0, 0, -3, -2, -1] + [0] * 256, np.float32),
    }
    llm = toy_llama(tokenizer=Tokenizer.from_metadata(metadata))
    tokens = llm.tokenize(text)
    assert tokens[0] == 1
    assert llm.detokenize(tokens) == text
    if text:
        assert llm.detokenize(tokens[1:]) == b" " + text  # the continuation of something


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


# -- package


def test_public_names():
    assert pyinfer.__all__ == sorted(pyinfer.__all__)
    for name in pyinfer.__all__:
        assert getattr(pyinfer, name) is not None
    assert issubclass(pyinfer.FormatError, pyinfer.PyInferError)
    with pytest.raises(AttributeError, match="nothing"):
        _ = pyinfer.nothing
