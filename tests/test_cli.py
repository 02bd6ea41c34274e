"""`pyinfer-generate` over the toy model: what goes to which stream, prompts, exit codes, interrupts."""

import contextlib
import json
import signal
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from toy_engine import CHATML, END, VOCABULARY, hashed, scripted, toy_llama, toy_tokenizer

from pyinfer.cli import OPTION_NAMES, SAMPLING, main
from pyinfer.errors import InputError, ModelNotFoundError
from pyinfer.model_store import advised_temperature
from pyinfer.runtime.sampler import SamplingParams


def invoke(arguments, rule=None, *, stdin="", template=CHATML, sessions=None, **options):
    """Run the command in this process over a toy model."""

    def open_llama(_):
        llm = toy_llama(rule or scripted("hello"), tokenizer=toy_tokenizer(template), **options)
        if sessions is not None:
            sessions.append(llm.session)
        return llm

    return CliRunner().invoke(main, arguments, obj=open_llama, input=stdin)


def shown(session):
    return b"".join(bytes([t]) if t < 256 else b"|" for t in session.held[0]).decode()


# -- output


def test_text_goes_to_stdout_and_the_summary_to_stderr():
    result = invoke(["Hi there\n", "--no-chat"])
    assert result.exit_code == 0
    assert result.stdout == "hello\n"
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("9 prompt tokens at ")
    assert ", 5 tokens at " in lines[0] and "first token after" in lines[0]


def test_no_second_line_break():
    def rule(tokens):
        following = {ord("x"): ord("!"), ord("!"): ord("\n"), ord("\n"): END}[tokens[-1]]
        return 10 * np.eye(VOCABULARY, dtype=np.float32)[following]

    assert invoke(["x", "--no-chat"], rule).stdout == "!\n"


def test_chat_is_the_default_where_the_model_has_a_template():
    sessions = []
    assert invoke(["Hi", "--system", "be brief"], sessions=sessions).stdout == "hello\n"
    assert shown(sessions[0]) == "|system\nbe brief|\n|user\nHi|\n|assistant\nhello"
    assert sessions[0].closed
    invoke(["Hi\n"], template=None, sessions=sessions)
    assert shown(sessions[1]) == "Hi\nhello"
    invoke(["Hi", "--chat"], template=None, sessions=sessions)
    assert "|user\nHi|" in shown(sessions[2])


def test_json():
    result = invoke(["Hi\n", "--no-chat", "--json", "-n", "3"])
    answer = json.loads(result.stdout)
    assert answer["text"] == "hel"
    assert answer["tokens"] == list(b"hel")
    assert answer["finish_reason"] == "length"
    assert (answer["prompt_tokens"], answer["completion_tokens"]) == (3, 3)
    assert set(answer["timings"]) == {
        "load_seconds", "first_token_seconds", "prefill_seconds", "decode_seconds",
        "prefill_tokens_per_second", "decode_tokens_per_second",
    }  # fmt: skip
    assert all(isinstance(value, float) for value in answer["timings"].values())


def test_stop_strings():
    assert invoke(["Hi\n", "--no-chat", "--stop", "zz", "--stop", "lo"]).stdout == "hel\n"


def test_sampling_options_reach_the_sampler():
    def text(*arguments):
        return invoke(["abc", "--no-chat", "-n", "12", *arguments], hashed).stdout

    assert text("--seed", "3") == text("--seed", "3") != text("--seed", "4")
    assert text("--temp", "0") == text("--top-k", "1") == text("--top-p", "0") == text("--min-p", "1")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--repeat-penalty=1", "aaaa"),
        ("--repeat-penalty=2", "abaa"),
        ("--presence-penalty=1", "abaa"),
        ("--frequency-penalty=1", "abab"),
    ],
)
def test_penalties_reach_the_sampler(option, expected):
    logits = np.zeros(VOCABULARY, np.float32)
    logits[[ord("a"), ord("b")]] = [3.0, 2.5]
    assert (
        invoke(["x", "--no-chat", "--temp", "0", "-n", "4", option], lambda _: logits).stdout
        == expected + "\n"
    )


def test_defaults_are_those_of_the_library():
    defaults = {option.name: option.default for option in main.params}
    assert advised_temperature("toy.gguf") == SamplingParams().temperature
    assert {name: defaults[name] for name in SAMPLING[1:]} == {
        name: getattr(SamplingParams(), name) for name in SAMPLING[1:]
    }


def test_verbose_tells_more():
    stderr = invoke(["Hi", "-v"]).stderr
    assert "toy.gguf: ready after" in stderr
    assert "256 tokens of context" in stderr
    assert "ended by stop" in stderr


# -- the prompt


@pytest.mark.parametrize("arguments", [["-p", "Hi"], ["Hi"], ["-p", "-"], ["-"], []])
def test_ways_to_give_a_prompt(arguments):
    sessions = []
    result = invoke([*arguments, "--no-chat"], stdin="Hi\n", sessions=sessions)
    assert result.exit_code == 0
    assert shown(sessions[0]).startswith("Hi")
    assert sessions[0].held[0][:3] != list(b"Hi\n")  # the line break of echo is none of the prompt's


def test_a_prompt_of_several_lines():
    sessions = []
    invoke(["--no-chat"], stdin="a\r\nb\n\n", sessions=sessions)
    assert shown(sessions[0]).startswith("a\nb\n")


# -- what goes wrong


def one_sentence(result, code):
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.lower().startswith("error: ")
    return line


@pytest.mark.parametrize("arguments", [["-p", ""], [], ["-"]])
def test_an_empty_prompt(arguments):
    assert "the prompt is empty" in one_sentence(invoke(arguments), 1)


def test_a_prompt_longer_than_the_context():
    assert "400 tokens, the context holds 256" in one_sentence(invoke(["x" * 400, "--no-chat"]), 1)


def test_nan_logits():
    result = invoke(["x", "--no-chat"], lambda tokens: hashed(tokens) * float("nan"))
    assert "nan" in result.stderr.splitlines()[-1]
    assert result.exit_code == 1


def test_no_utf8():
    assert "not UTF-8 at byte 1" in one_sentence(invoke([], stdin=b"a\xff"), 1)


def test_system_message_without_a_chat():
    assert "--system needs a chat" in one_sentence(invoke(["Hi", "--system", "x", "--no-chat"]), 1)


def failing(error):
    def open_llama(_):
        raise error

    return open_llama


@pytest.mark.parametrize(
    "error", [ModelNotFoundError("no such model"), OSError("no such model"), MemoryError("no such model")]
)
def test_errors_of_the_model_are_one_sentence(error):
    result = CliRunner().invoke(main, ["Hi"], obj=failing(error))
    assert one_sentence(result, 1) == "error: no such model"
    verbose = CliRunner().invoke(main, ["Hi", "-v"], obj=failing(error))
    assert "Traceback" in verbose.stderr
    assert verbose.exit_code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["-n", "x"],
        ["--nothing"],
        ["a", "b"],
        ["a", "-p", "b"],
        ["--top-k", "1.5"],
        ["-c", "0"],
        ["-t", "0"],
        ["-n", "-2"],
    ],
)
def test_wrong_usage(arguments):
    result = invoke(arguments)
    assert one_sentence(result, 2)
    assert "Usage:" in result.stderr


@pytest.mark.parametrize("arguments", [["--top-p", "3"], ["--temp", "-1"], ["--seed", "-9"], ["--stop", ""]])
def test_values_out_of_range(arguments):
    line = one_sentence(invoke(["Hi", *arguments]), 1)
    assert line.startswith(f"error: {arguments[0]} is ") and "expected" in line


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("n_ctx is 9, a/n_ctx.gguf was made for 8", "--ctx is 9, a/n_ctx.gguf was made for 8"),
        ("n_threads is 999, expected 1 to 255", "--threads is 999, expected 1 to 255"),
        ("no memory: use a smaller n_ctx", "no memory: use a smaller --ctx"),
        ("/n_ctx/seed/x.gguf: stop is temperature", "/n_ctx/seed/x.gguf: stop is temperature"),
        ("n_ctx/x.gguf: bad", "n_ctx/x.gguf: bad"),
    ],
)
def test_errors_name_options_and_not_the_keywords_of_the_library(sentence, expected):
    result = CliRunner().invoke(main, ["Hi"], obj=failing(InputError(sentence)))
    assert one_sentence(result, 1) == f"error: {expected}"


def test_every_parameter_has_the_name_of_an_option():
    options = {name for option in main.params for name in option.opts}
    assert set(OPTION_NAMES.values()) <= options
    assert set(SAMPLING) <= set(OPTION_NAMES)


# -- interrupts


def interrupting(after, *, times=1):
    """Says hello and gets Ctrl-C before the token behind `after` ones."""
    hello = scripted("hello")

    def rule(tokens):
        if bytes(t for t in tokens[-after:] if t < 256) == b"hello"[:after]:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return hello(tokens)

    return rule


def test_ctrl_c_ends_the_answer_between_two_tokens():
    before = signal.getsignal(signal.SIGINT)
    sessions = []
    result = invoke(["x\n", "--no-chat"], interrupting(3), sessions=sessions)
    assert result.exit_code == 130
    assert result.stdout == "hel\n"
    assert "Traceback" not in result.stderr
    assert sessions[0].closed
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_with_json_still_prints_the_object():
    result = invoke(["x\n", "--no-chat", "--json"], interrupting(3))
    assert json.loads(result.stdout)["finish_reason"] == "cancelled"
    assert result.exit_code == 130


def test_a_second_ctrl_c_leaves_at_once():
    sessions = []
    result = invoke(["x\n", "--no-chat"], interrupting(3, times=2), sessions=sessions)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert sessions[0].closed


def test_ctrl_c_before_the_first_token_leaves_at_once():
    def rule(tokens):
        if len(tokens) == 2:
            signal.raise_signal(signal.SIGINT)
        return scripted("hello")(tokens)

    sessions = []
    result = invoke(["x\n", "--no-chat"], rule, sessions=sessions)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert sessions[0].computed == 2 and sessions[0].closed


class Trap:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("when", ["loading", "prompt"])
def test_ctrl_c_in_a_destructor_is_not_lost(when):
    before = sys.unraisablehook, signal.getsignal(signal.SIGINT)

    def rule(tokens):
        if when == "prompt":
            Trap()
        return hashed(tokens)

    def open_llama(_):
        if when == "loading":
            Trap()
        return toy_llama(rule)

    result = CliRunner().invoke(main, ["x\n", "--no-chat"], obj=open_llama)
    assert result.exit_code == 130
    assert result.stdout.strip() == ""
    assert "Traceback" not in result.stderr
    assert (sys.unraisablehook, signal.getsignal(signal.SIGINT)) == before


def test_ctrl_c_while_the_model_loads():
    result = CliRunner().invoke(main, ["Hi"], obj=failing(KeyboardInterrupt()))
    assert result.exit_code == 130
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_dropped_interrupt_that_breaks_a_library_is_an_interrupt():
    """What LLVM's callbacks drop comes out as another exception, later."""

    def opener(_):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("no compiled object yet")

    result = CliRunner().invoke(main, ["Hi"], obj=opener)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
