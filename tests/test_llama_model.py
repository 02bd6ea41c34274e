"""Class Llama and `pyinfer-generate` with the real engine and SmolLM2."""

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
INTERRUPT_SECONDS = 5  # as long as a person waits for Ctrl-C
no_ctrl_c_on_windows = pytest.mark.skipif(
    os.name == "nt", reason="Windows sends Ctrl-C to a whole console, the test run included"
)
CHAT = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]


@pytest.fixture(scope="module")
def llm(smollm2_path):
    with Llama(smollm2_path, n_ctx=512) as llm:
        yield llm


# Resident megabytes after a first use (what stays: compiled code), with a model open, and after close.
RESIDENT = """
import os, sys
from pyinfer import Llama

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

def use():
    with Llama(sys.argv[1], n_ctx=512) as llm:
        llm("Once", max_tokens=2)
        opened = resident()
    return opened, resident()

print(use()[1], *use())
"""


def process(path, *arguments, **environment):
    command = [sys.executable, "-m", "pyinfer", "-m", str(path), "--temp", "0", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, env={**os.environ, **environment}
    )


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


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux' figures of memory")
def test_memory_goes_back_to_the_system_after_close(smollm2_path):
    command = [sys.executable, "-c", RESIDENT, str(smollm2_path)]
    output = subprocess.run(command, capture_output=True, timeout=PATIENCE_SECONDS, check=True).stdout
    before, opened, after = map(float, output.split())
    assert opened - before > 80  # the weights alone have more
    assert after - before < 0.1 * (opened - before)


def test_a_first_run_says_that_it_compiles(smollm2_path, tmp_path):
    def notices(cache):
        running = process(smollm2_path, "Hi", "-n", "1", PYINFER_CACHE_DIR=str(cache))
        stderr = running.communicate(timeout=PATIENCE_SECONDS)[1].decode()
        assert running.returncode == 0, stderr
        return [line for line in stderr.splitlines() if "kernels" in line]

    (first,) = notices(tmp_path / "cache")
    assert first == "compiling kernels for this processor, once (some seconds)"
    assert notices(tmp_path / "cache") == []
    (tmp_path / "file").write_text("")
    (notice,) = notices(tmp_path / "file")
    assert notice.startswith(str(tmp_path / "file"))
    assert "cannot be written, so kernels are compiled at every start" in notice


ENDLESS = ("Once upon a time", "--no-chat", "-n", "-1", "--temp", "4", "--top-k", "0")


@no_ctrl_c_on_windows
@pytest.mark.parametrize("after_seconds", [1.0, 1.7, 2.4, 3.0])
def test_ctrl_c_in_a_first_run(smollm2_path, tmp_path, after_seconds):
    """Imports, compilation, loading, or the prompt: a second process shares nothing that is compiled."""
    running = process(smollm2_path, *ENDLESS, PYINFER_CACHE_DIR=str(tmp_path))
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(after_seconds)
    running.send_signal(signal.SIGINT)
    try:
        stderr = running.communicate(timeout=INTERRUPT_SECONDS)[1]
    finally:
        running.kill()
    assert running.returncode == 130, stderr
    assert b"Traceback" not in stderr


@no_ctrl_c_on_windows
def test_ctrl_c_in_mid_stream(smollm2_path):
    running = process(smollm2_path, *ENDLESS)
    begin = running.stdout.read(10)
    running.send_signal(signal.SIGINT)
    try:
        stdout, stderr = running.communicate(timeout=INTERRUPT_SECONDS)
    finally:
        running.kill()
    assert running.returncode == 130
    assert len(begin) == 10
    assert stdout.endswith(b"\n")
    assert b"Traceback" not in stderr
