"""The team of threads: every item once, barriers that order, workers that sleep, wake and end."""

from __future__ import annotations

import os
import threading
import time

import numba
import numpy as np
import pytest

from pyinfer.errors import CapacityError, InputError
from pyinfer.jit import team as team_module
from pyinfer.jit.atomics import atomic_add
from pyinfer.jit.kernel import SIGNATURE
from pyinfer.jit.memory import i64_at
from pyinfer.jit.team import DYNAMIC, EVERY_THREAD, FIELDS, STATIC, Team, _Size

WAIT_SECONDS = 60


@numba.cfunc(SIGNATURE, nopython=True)
def count_items(operands, step, first, last, thread):
    """Adds 1 to the counter of every item, and to the counter behind them of this thread."""
    given = i64_at(operands)
    for item in range(first, last):
        atomic_add(given[0] + 8 * item, 1)
    atomic_add(given[1] + 8 * thread, 1)


@numba.cfunc(SIGNATURE, nopython=True)
def reverse(operands, step, first, last, thread):
    """target[i] = 3 source[n - 1 - i] + 1: reads what other threads wrote."""
    given = i64_at(operands)
    source, target, n = i64_at(given[0]), i64_at(given[1]), given[2]
    for i in range(first, last):
        target[i] = 3 * source[n - 1 - i] + 1


@numba.cfunc(SIGNATURE, nopython=True)
def add_step(operands, step, first, last, thread):
    """Adds the number in the step block to the counter, once per item."""
    for _ in range(first, last):
        atomic_add(i64_at(operands)[0], i64_at(step)[0])


def program(*instructions) -> np.ndarray:
    """Rows of (kernel, operands, items, mode); a barrier after each."""
    return np.array(
        [
            (kernel.address, operands.ctypes.data, items, mode, 1)
            for kernel, operands, items, mode in instructions
        ],
        np.int64,
    )


@pytest.fixture(params=[1, 2, 3, 4])
def team(request):
    made = Team(request.param)
    yield made
    made.close()


def wait_until(condition) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


NO_STEP = np.zeros(1, np.int64)


@pytest.mark.parametrize("mode", [STATIC, DYNAMIC, EVERY_THREAD])
@pytest.mark.parametrize("items", [0, 1, 2, 3, 7, 64, 1000])
def test_every_item_runs_once(team, mode, items):
    counts, calls = np.zeros(max(items, 1), np.int64), np.zeros(4, np.int64)
    operands = np.array([counts.ctypes.data, calls.ctypes.data], np.int64)
    made = program((count_items, operands, items, mode))
    assert made.shape[1] == FIELDS
    for _ in range(5):
        team.run(made, NO_STEP)
    if mode == EVERY_THREAD:
        assert calls[0] == 5 <= calls.sum() <= 5 * team.n_threads
        np.testing.assert_array_equal(counts[:items], calls.sum())
    else:
        np.testing.assert_array_equal(counts[:items], 5)
    assert not calls[team.n_threads :].any()


@pytest.mark.parametrize("mode", [STATIC, DYNAMIC])
def test_barriers_order_writes(team, mode):
    n, rounds = 257, 40
    buffers = np.random.default_rng(1).integers(0, 1000, (2, n))
    expected = buffers[0].copy()
    for _ in range(rounds):
        expected = 3 * expected[::-1] + 1
    ways = [np.array([buffers[a].ctypes.data, buffers[1 - a].ctypes.data, n], np.int64) for a in (0, 1)]
    team.run(program(*((reverse, ways[k % 2], n, mode) for k in range(rounds))), NO_STEP)
    np.testing.assert_array_equal(buffers[rounds % 2], expected)


def test_thousands_of_short_runs(team):
    total, step = np.zeros(1, np.int64), np.zeros(1, np.int64)
    operands = np.array([total.ctypes.data], np.int64)
    made = program((add_step, operands, 5, DYNAMIC), (add_step, operands, 3, STATIC))
    for number in range(3000):
        step[0] = number
        team.run(made, step)
    assert total[0] == 8 * sum(range(3000))


def _parked(team: Team) -> bool:
    words = [
        (team._address - team._shared.ctypes.data + team_module.WORKERS + 64 * k) // 8
        for k in range(1, team.n_threads)
    ]
    return all(team._shared[word] == team_module.PARKED for word in words)


def test_idle_workers_park_and_wake():
    team = Team(3)
    total, step = np.zeros(1, np.int64), np.ones(1, np.int64)
    operands = np.array([total.ctypes.data], np.int64)
    made = program((add_step, operands, 1, DYNAMIC))
    for number in range(1, 6):
        team.run(made, step)
        assert total[0] == number
        wait_until(lambda: _parked(team))
    team.close()


def test_sleeping_workers_use_no_processor():
    team = Team(2)
    total = np.zeros(1, np.int64)
    operands = np.array([total.ctypes.data], np.int64)
    team.run(program((add_step, operands, 1, DYNAMIC)), np.ones(1, np.int64))
    wait_until(lambda: _parked(team))
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15
    team.close()


def test_callers_from_several_threads_take_turns():
    team, failures = Team(2), []

    def call(number: int) -> None:
        total, step = np.zeros(1, np.int64), np.full(1, number)
        operands = np.array([total.ctypes.data], np.int64)
        made = program((add_step, operands, 4, DYNAMIC))
        for _ in range(200):
            team.run(made, step)
        if total[0] != 200 * 4 * number:
            failures.append((number, int(total[0])))

    callers = [threading.Thread(target=call, args=(number,)) for number in range(1, 5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WAIT_SECONDS)
    assert not any(caller.is_alive() for caller in callers)
    assert not failures
    team.close()


def test_two_teams_run_side_by_side():
    totals = np.zeros((2, 8), np.int64)

    def call(number: int) -> None:
        team = Team(2)
        operands = np.array([totals[number].ctypes.data], np.int64)
        made = program((add_step, operands, 4, DYNAMIC))
        for _ in range(300):
            team.run(made, np.ones(1, np.int64))
        team.close()

    callers = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WAIT_SECONDS)
    assert not any(caller.is_alive() for caller in callers)
    assert totals[:, 0].tolist() == [1200, 1200]


@pytest.mark.parametrize("parked", [True, False])
def test_close_ends_the_threads(parked):
    before = threading.active_count()
    team = Team(4)
    total = np.zeros(1, np.int64)
    operands = np.array([total.ctypes.data], np.int64)
    made = program((add_step, operands, 1, DYNAMIC))
    team.run(made, NO_STEP)
    assert threading.active_count() == before + 3
    if parked:
        wait_until(lambda: _parked(team))
    team.close()
    assert threading.active_count() == before
    team.close()


def test_a_closed_team_says_no():
    """Never a hang, nor a job of before."""
    team = Team(2)
    total, step = np.zeros(1, np.int64), np.ones(1, np.int64)
    operands = np.array([total.ctypes.data], np.int64)
    made = program((add_step, operands, 1, DYNAMIC))
    team.run(made, step)
    team.close()
    with pytest.raises(InputError, match="closed"):
        team.run(made, step)
    assert total[0] == 1


@pytest.mark.parametrize("moment", range(4))
def test_an_interrupt_at_any_moment_leaves_a_team_that_works(moment, monkeypatch):
    """KeyboardInterrupt between any two steps of the caller: the next run is right and ends."""
    team = Team(3)
    total, step = np.zeros(1, np.int64), np.ones(1, np.int64)
    operands = np.array([total.ctypes.data], np.int64)
    made = program((add_step, operands, 1, DYNAMIC))
    team.run(made, step)
    time.sleep(0.3)  # the workers park
    names = ["_keep_awake", "_is_parked", "_lead", "_keep_awake"]
    name, calls, real = names[moment], [], getattr(team_module, names[moment])

    def interrupted(*arguments):
        calls.append(arguments)
        first = len(calls) == (2 if moment == 3 else 1)
        if not first or moment != 2:
            result = real(*arguments)
        if first:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(team_module, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        team.run(made, step)
    monkeypatch.undo()
    before = int(total[0])
    for _ in range(5):
        team.run(made, step)
        time.sleep(0.05)
    assert total[0] == before + 5
    team.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own():
    team = Team(2)
    total, step = np.zeros(1, np.int64), np.ones(1, np.int64)
    operands = np.array([total.ctypes.data], np.int64)
    made = program((add_step, operands, 1, DYNAMIC))
    team.run(made, step)
    child = os.fork()
    if child == 0:
        team.run(made, step)
        os._exit(int(total[0]))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 2
    team.run(made, step)
    assert total[0] == 2
    team.close()


def test_threads_that_cannot_start_are_one_sentence(monkeypatch):
    team, real, started = Team(4), threading.Thread.start, []

    def start(self):
        started.append(self)
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        real(self)

    total, step = np.zeros(1, np.int64), np.ones(1, np.int64)
    operands = np.array([total.ctypes.data], np.int64)
    made = program((add_step, operands, 1, DYNAMIC))
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(CapacityError, match="thread 3 of 4"):
        team.run(made, step)
    monkeypatch.undo()
    team.run(made, step)
    assert total[0] == 1
    team.close()


@pytest.mark.parametrize("n_threads", [0, -1, 256, 10**6])
def test_absurd_numbers_of_threads(n_threads):
    with pytest.raises(InputError, match="expected 1 to 255"):
        Team(n_threads)


# ---- how many threads take part, with a clock of our own ----


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(team_module, "time", made)
    return made


def contend(size: _Size, steps: int, waited: float = 0.3) -> None:
    for _ in range(steps):
        size.choose()
        size.report(waited)


def test_one_slow_step_changes_nothing(clock):
    size = _Size(4)
    for waited in (1.0, 0.0, 0.5, 0.0, 0.9, 0.9 * _Size.CONTENDED, 1.0):
        assert size.choose() == 4
        size.report(waited)
    assert size.choose() == 4


def test_contention_takes_threads_away_down_to_one(clock):
    size = _Size(3)
    contend(size, 2)
    assert size.choose() == 2
    contend(size, 2)
    assert size.choose() == 1
    contend(size, 10)
    assert size.choose() == 1


def test_far_too_many_threads_go_at_once(clock):
    """32 threads on 2 processors wait nine tenths of their time: they need not leave one by one."""
    size = _Size(32)
    contend(size, 2, 0.9)
    assert size.choose() == 3


def test_the_team_grows_back_after_the_hold_time(clock):
    size = _Size(2)
    contend(size, 2)
    clock.now += 0.9 * _Size.FIRST_HOLD
    assert size.choose() == 1
    clock.now += 0.2 * _Size.FIRST_HOLD
    assert size.choose() == 2
    size.report(0)
    assert size.choose() == 2


def test_every_failed_attempt_doubles_the_hold_time_up_to_a_limit(clock):
    size, holds = _Size(2), []
    contend(size, 2)
    for _ in range(8):
        start = clock.now
        while size.choose() == 1:
            clock.now += 0.001
        holds.append(clock.now - start)
        size.report(1)
    expected = [min(_Size.FIRST_HOLD * 2**k, _Size.LAST_HOLD) for k in range(8)]
    np.testing.assert_allclose(holds, expected, atol=0.003)


def test_success_forgets_the_failures_of_before(clock):
    size = _Size(2)
    contend(size, 2)
    for _ in range(3):
        clock.now += 10
        contend(size, 1)
    clock.now += 10
    assert size.choose() == 2
    size.report(0)
    contend(size, 2)
    assert size.choose() == 1
    clock.now += 1.1 * _Size.FIRST_HOLD
    assert size.choose() == 2


def test_a_lone_thread_never_probes(clock):
    size = _Size(1)
    contend(size, 5)
    clock.now += 10
    assert size.choose() == 1
