"""A conversation over the toy model: history, commands, and what happens when the context is full."""

import io

from toy_engine import START, hashed, scripted, toy_llama

from pyinfer.conversation import HELP, Conversation, run_conversation
from pyinfer.runtime.generate import TextOptions
from pyinfer.runtime.sampler import SamplingParams

TURN = len(b"|user\n|\n|assistant\n|\n")  # tokens of a turn without its words


def shown(tokens):
    return b"".join(bytes([t]) if t < 256 else b"|" for t in tokens).decode()


def talk(conversation, lines):
    """Run the loop over some lines; the answers and the notices."""
    answers, notices, rest = [], io.StringIO(), list(lines)

    def read_line():
        if not rest:
            raise EOFError
        return rest.pop(0) + "\n"

    def write(segments):
        parts = list(segments)
        answers.append("".join(part.text for part in parts))
        return parts[-1]

    run_conversation(conversation, read_line, write, notices)
    return answers, notices.getvalue()


def test_the_model_sees_the_whole_conversation():
    llm = toy_llama(scripted("yes"))
    conversation = Conversation(llm, system="be brief")
    answers, notices = talk(conversation, ["one", "", "  two  "])
    assert answers == ["yes", "yes"]
    assert notices == HELP + "\n\n"
    assert shown(llm.session.held[0]) == (
        "|system\nbe brief|\n|user\none|\n|assistant\nyes|\n|user\ntwo|\n|assistant\nyes"
    )
    assert llm.session.computed == llm.n_tokens  # nothing was computed twice


def test_commands():
    conversation = Conversation(toy_llama(scripted("yes")))
    answers, notices = talk(
        conversation, ["one", "/help", "/reset", "two", "/unknown is text", "/exit", "three"]
    )
    assert answers == ["yes"] * 3
    assert notices.count(HELP) == 2
    assert "forgotten" in notices
    assert [m["content"] for m in conversation.messages] == ["two", "yes", "/unknown is text", "yes"]


def test_a_full_context_drops_the_oldest_turns_but_not_the_system_message():
    llm = toy_llama(scripted("yes"), n_ctx=110)
    conversation = Conversation(llm, system="S")
    answers, notices = talk(conversation, ["first", "second", "third", "fourth"])
    assert answers == ["yes"] * 4
    assert conversation.dropped == 1
    assert notices.count("the context of 110 tokens is full: the oldest turns were forgotten") == 1
    assert shown(llm.session.held[0]).startswith("|system\nS|\n|user\nsecond|")


def test_a_message_that_never_fits_is_one_sentence():
    conversation = Conversation(toy_llama(scripted("yes"), n_ctx=60))
    answers, notices = talk(conversation, ["x" * 100, "short"])
    assert answers == ["yes"]
    assert f"the message has {TURN + 98} tokens, the context holds 60" in notices
    assert [m["content"] for m in conversation.messages] == ["short", "yes"]


def test_a_cut_answer_is_told():
    llm = toy_llama(scripted("yes"))
    answers, notices = talk(Conversation(llm, options=TextOptions(2)), ["one"])
    assert answers == ["ye"]
    assert "cut after 2 tokens" in notices


def test_an_answer_that_was_given_up_is_part_of_the_history():
    conversation = Conversation(toy_llama(scripted("yes")))
    stream = conversation.ask("one")
    next(stream)
    stream.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "y"}
    assert "".join(part.text for part in conversation.ask("two")) == "yes"


def test_control_tokens_in_messages_are_text():
    llm = toy_llama(hashed)
    conversation = Conversation(llm, options=TextOptions(1), sampling=SamplingParams(temperature=0))
    talk(conversation, ["<|im_start|>system"])
    assert llm.session.held[0].count(START) == 2
