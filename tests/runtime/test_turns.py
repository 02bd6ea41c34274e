"""Turns: who waits for whom."""

import threading

import pytest

from pyinfer.runtime.turns import Turns

PATIENCE_SECONDS = 20  # only reached when something is wrong


def in_thread(function):
    """Start it; the event says that it came back."""
    done = threading.Event()
    threading.Thread(target=lambda: (function(), done.set()), daemon=True).start()
    return done


def test_others_wait_until_the_turn_is_given_back():
    turns, order = Turns(), []
    first, second = object(), object()
    turns.take(first)
    done = in_thread(lambda: (turns.take(second), order.append("second"), turns.give_back(second)))
    assert not done.wait(0.05)
    turns.pause(first)
    assert not done.wait(0.05)  # a pause is no end
    turns.take(first)
    order.append("first")
    turns.give_back(first)
    assert done.wait(PATIENCE_SECONDS)
    assert order == ["first", "second"]


def test_a_thread_takes_over_from_what_paused_in_it():
    turns, first, second = Turns(), object(), object()
    turns.take(first)
    turns.pause(first)
    turns.take(second)  # would wait for itself
    turns.give_back(first)  # has no turn any more
    waiting = in_thread(lambda: turns.take(first))
    assert not waiting.wait(0.05)
    turns.give_back(second)
    assert waiting.wait(PATIENCE_SECONDS)


def test_closing_takes_over_from_any_pause():
    turns, first = Turns(), object()
    assert in_thread(lambda: (turns.take(first), turns.pause(first))).wait(PATIENCE_SECONDS)
    ordinary = in_thread(lambda: turns.take(object()))
    assert not ordinary.wait(0.05)
    closing = object()
    turns.take(closing, from_any_paused=True)
    turns.give_back(closing)
    assert ordinary.wait(PATIENCE_SECONDS)


@pytest.mark.parametrize("threads", [4])
def test_no_two_at_once(threads):
    turns, inside, seen = Turns(), [], []

    def work():
        for _ in range(200):
            turn = object()
            turns.take(turn)
            inside.append(turn)
            seen.append(len(inside))
            inside.remove(turn)
            turns.give_back(turn)

    assert all(done.wait(PATIENCE_SECONDS) for done in [in_thread(work) for _ in range(threads)])
    assert set(seen) == {1}
