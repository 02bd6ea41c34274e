"""Class Llama and `pyinfer-generate` with the real engine and the default model."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from pyinfer import Llama

pytestmark = pytest.mark.model
PATIENCE_SECONDS = 120  # only reached when something is wrong; kernels may have to be compiled
CHAT = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]


@pytest.fixture(scope="module")
def llm(smollm2_path):
    with Llama(smollm2_path, n_ctx=512) as llm:
        yield llm


def process(path, *arguments):
    command = [sys.executable, "-m", "pyinfer", "-m", str(path), "--temp", "0", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)


def test_a_chat_answers(llm):
    answer = llm.create_chat_completion(CHAT, temperature=0, max_tokens=20)
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_streams_threads_and_reuse_give_the_same_text(llm):
    prompts = ["Once upon a time", "Once upon a midnight", "The sea"]

    def text(prompt, stream):
        answer = llm(prompt, max_tokens=12, temperature=0, stream=stream)
        return "".join(chunk["choices"][0]["text"] for chunk in (answer if stream else [answer]))

    alone = []
    for prompt in prompts:
        llm.reset()
        alone.append(text(prompt, stream=False))
    texts = {}
    threads = [
        threading.Thread(target=lambda p=p, s=s: texts.update({(p, s): text(p, s)}), daemon=True)
        for p in prompts
        for s in (False, True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert texts == {(p, s): expected for p, expected in zip(prompts, alone) for s in (False, True)}


def test_logprobs_of_an_echoed_prompt_are_those_of_single_steps(llm):
    tokens = llm.tokenize("The quick brown fox jumps")
    scored = llm(tokens, max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"]
    llm.reset()
    for before, token, logprob in zip(tokens, tokens[1:], scored[1:]):
        llm.eval([before])
        logits = llm.last_logits.astype(np.float64)
        total = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        assert logprob == pytest.approx(logits[token] - total, abs=0.05)  # other kernels, other rounding


def test_the_command_writes_the_answer_and_nothing_else(smollm2_path, llm):
    prompt = CHAT[0]["content"]
    stdout, stderr = process(smollm2_path, prompt, "-n", "20").communicate(timeout=PATIENCE_SECONDS)
    expected = llm.create_chat_completion(CHAT, temperature=0, max_tokens=20)["choices"][0]["message"][
        "content"
    ]
    assert stdout.decode().replace("\r\n", "\n") == expected.rstrip("\n") + "\n"
    assert b"first token after" in stderr.splitlines()[-1]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to a whole console, the test run included")
def test_ctrl_c_in_mid_stream(smollm2_path):
    running = process(
        smollm2_path, "Once upon a time", "--no-chat", "-n", "-1", "--temp", "4", "--top-k", "0"
    )
    begin = running.stdout.read(10)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 130
    assert len(begin) == 10
    assert stdout.endswith(b"\n")
    assert b"Traceback" not in stderr
