"""A team of threads that runs a whole program in one nogil call and meets at spin barriers.

The caller is thread 0. The others spin between steps for a moment (decode steps follow each other within 0.1
ms), then park on a semaphore. Barriers spin, then yield, so that a busy machine slows a team down instead of
stopping it; a step in which threads waited for one that did not run makes the team shrink for a while
(`_Size`). Numba's threading layers are not used: a region costs them 1-100 us and workqueue aborts the
process when two threads enter it.
"""

from __future__ import annotations

import os
import threading
import time

import numpy as np

from pyinfer.errors import CapacityError, InputError
from pyinfer.jit.atomics import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_replace,
    atomic_store,
    call_kernel,
    clock_ticks,
    pause,
    yield_processor,
)
from pyinfer.jit.kernel import inline, routine
from pyinfer.jit.memory import i64_at

# Words of the shared block, one cache line apart: 64 bytes.
ARRIVED, GENERATION, NEXT_ITEM, JOB, WAITED, AWAKE, WORKERS = (64 * k for k in range(7))
MOST_THREADS = (
    256  # the job word is number * MOST_THREADS + threads taking part, so that both are read at once
)
SPINNING, PARKED, LEAVING = range(3)  # states of a worker

# Fields of an instruction, int64 each.
KERNEL, OPERANDS, ITEMS, MODE, BARRIER, FIELDS = range(6)
EVERY_THREAD, STATIC, DYNAMIC = range(3)
GRAIN = 8  # claims per thread of a dynamic instruction

BARRIER_SPINS = 2000
IDLE_SPINS = 60_000  # about 0.5-2 ms
YIELDS = 1000  # between two looks at signals while a worker wakes up


@inline
def _barrier(shared, threads):
    """Wait until every thread is here. The last one resets the item counter for the next dynamic
    instruction.
    """
    generation = atomic_load(shared + GENERATION)
    if atomic_add(shared + ARRIVED, 1) == threads - 1:
        atomic_store(shared + ARRIVED, 0)
        atomic_store(shared + NEXT_ITEM, 0)
        atomic_store(shared + GENERATION, generation + 1)
        return
    spins = 0
    while atomic_load(shared + GENERATION) == generation:
        spins += 1
        if spins < BARRIER_SPINS:
            pause()
        else:
            since = clock_ticks()
            while atomic_load(shared + GENERATION) == generation:
                yield_processor()
            atomic_add(shared + WAITED, clock_ticks() - since)


@inline
def _run(shared, program, count, step, thread, threads):
    instructions = i64_at(program)
    for k in range(count):
        base = k * FIELDS
        kernel, operands, items = (
            instructions[base],
            instructions[base + OPERANDS],
            instructions[base + ITEMS],
        )
        mode = instructions[base + MODE]
        if mode == EVERY_THREAD:
            call_kernel(kernel, operands, step, 0, items, thread)
        elif mode == STATIC or threads == 1:
            first, last = items * thread // threads, items * (thread + 1) // threads
            if first < last:
                call_kernel(kernel, operands, step, first, last, thread)
        else:
            grain = max(1, items // (threads * GRAIN))
            first = atomic_add(shared + NEXT_ITEM, grain)
            while first < items:
                call_kernel(kernel, operands, step, first, min(first + grain, items), thread)
                first = atomic_add(shared + NEXT_ITEM, grain)
        if instructions[base + BARRIER] != 0 and threads > 1:
            _barrier(shared, threads)


@routine
def _lead(shared, program, count, step, threads):
    """Thread 0: give the workers a job and take part.

    Returns the fraction of the team's time that was lost to long waits at barriers; or -t while worker t is
    parked: then nothing was begun. Job and taking part are one call without the interpreter: an interrupt
    between them would leave the workers at a barrier for ever.
    """
    if threads == 1:
        _run(shared, program, count, step, 0, threads)
        return 0.0
    for thread in range(1, threads):
        for looks in range(YIELDS + 1):
            if not atomic_replace(shared + WORKERS + 64 * thread, PARKED, PARKED):
                break
            if looks == YIELDS:
                return -float(thread)
            yield_processor()
    start = clock_ticks()
    job = i64_at(shared + JOB)
    atomic_store(shared + WAITED, 0)
    atomic_store(shared + NEXT_ITEM, 0)
    job[1], job[2], job[3] = program, count, step
    number = job[0] // MOST_THREADS + 1
    atomic_exchange(shared + JOB, number * MOST_THREADS + threads)
    _run(shared, program, count, step, 0, threads)
    return atomic_load(shared + WAITED) / max(1, threads * (clock_ticks() - start))


@routine
def _follow(shared, thread, seen):
    """A worker: run jobs as they come; returns the last job seen when nothing came for a while, -1 to leave.

    A worker parks only while AWAKE is 0, and looks again after it said so: either it sees that it is wanted,
    or the caller sees it parked. A job cannot end without the threads that take part, so its fields are
    stable while they read them.
    """
    job = i64_at(shared + JOB)
    state = shared + WORKERS + 64 * thread
    atomic_replace(state, PARKED, SPINNING)
    spins = 0
    while True:
        now = atomic_load(shared + JOB)
        if now != seen:
            seen = now
            if thread < now % MOST_THREADS:
                _run(shared, job[1], job[2], job[3], thread, now % MOST_THREADS)
                spins = 0
        spins += 1
        if spins < IDLE_SPINS:
            pause()
        elif atomic_load(state) == LEAVING:
            return -1
        elif atomic_load(shared + AWAKE) == 0 and atomic_replace(state, SPINNING, PARKED):
            if atomic_add(shared + AWAKE, 0) == 0 or not atomic_replace(state, PARKED, SPINNING):
                return seen
        else:
            yield_processor()


@routine
def _keep_awake(shared, wanted):
    """While wanted is 1, no worker parks."""
    atomic_exchange(shared + AWAKE, wanted)


@routine
def _is_parked(shared, thread):
    return atomic_replace(shared + WORKERS + 64 * thread, PARKED, PARKED)


@routine
def _leave(shared, thread):
    """Tell a worker to end; True when it was parked."""
    return atomic_exchange(shared + WORKERS + 64 * thread, LEAVING) == PARKED


class _Size:
    """How many threads take part now: fewer while a core is taken by others, all again after.

    A step is *contended* when threads spent a quarter of their time waiting for one that did not run. After
    two in a row the team loses a thread for a hold time that doubles with every failed attempt to grow back
    (0.1 s to 1.6 s).
    """

    FIRST_HOLD, LAST_HOLD = 0.1, 1.6
    CONTENDED = 0.25

    def __init__(self, most: int) -> None:
        self.most = self.now = most
        self._hold = self.FIRST_HOLD
        self._until = 0.0
        self._contended = 0
        self._probing = False

    def choose(self) -> int:
        if self.now < self.most and time.perf_counter() >= self._until:
            self.now += 1
            self._probing = True
        return self.now

    def report(self, waited: float) -> None:
        """`waited` is the fraction that `_lead` returned for a step of `now` threads."""
        if self.now == 1:
            return
        if waited < self.CONTENDED:
            self._contended = 0
            if self._probing:
                self._probing = False
                self._hold = self.FIRST_HOLD
            return
        self._contended += 1
        if self._contended >= 2 or self._probing:
            self._hold = min(2 * self._hold, self.LAST_HOLD) if self._probing else self.FIRST_HOLD
            self.now = max(1, min(self.now - 1, round(self.now * (1 - waited))))
            self._contended = 0
            self._probing = False
            self._until = time.perf_counter() + self._hold


class Team:
    """Threads that run programs together. `run` may be called from any thread, one call at a time."""

    def __init__(self, n_threads: int) -> None:
        if not 1 <= n_threads < MOST_THREADS:
            raise InputError(f"{n_threads} threads, expected 1 to {MOST_THREADS - 1}")
        self.n_threads = n_threads
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        """A team whose threads are not started; also in a forked child, which has none of its parent's."""
        self._shared = np.zeros(8 * (9 + self.n_threads), np.int64)
        self._address = (self._shared.ctypes.data + 63) // 64 * 64
        self._lock = threading.Lock()
        self._size = _Size(self.n_threads)
        self._wakes = [threading.Semaphore(0) for _ in range(self.n_threads)]
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()

    def _work(self, thread: int) -> None:
        seen = 0
        while seen >= 0:
            seen = _follow(self._address, thread, seen)
            if seen >= 0:
                self._wakes[thread].acquire()

    def _start(self) -> None:
        for thread in range(1, self.n_threads):
            worker = threading.Thread(
                target=self._work, args=(thread,), daemon=True, name=f"pyinfer-{thread}"
            )
            try:
                worker.start()
            except RuntimeError as error:  # the system gives no more threads
                self._end()
                raise CapacityError(
                    f"cannot start thread {thread + 1} of {self.n_threads}; use fewer"
                ) from error
            self._threads.append(worker)

    def run(self, program: np.ndarray, step: np.ndarray) -> None:
        """Run a program (int64 [n, FIELDS]) over a step block (int64); returns when it is done."""
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            if self._closed:
                raise InputError("this team of threads is closed")
            threads = self._size.choose()
            if threads > 1 and not self._threads:
                self._start()
            waited = self._lead(program.ctypes.data, len(program), step.ctypes.data, threads)
            self._size.report(waited)

    def _lead(self, program: int, count: int, step: int, threads: int) -> float:
        """Wake who is parked, run; an interrupt at any place leaves a team that can run again."""
        woken = set()
        try:
            if threads > 1:
                _keep_awake(self._address, 1)
            for thread in range(1, threads):
                if _is_parked(self._address, thread):
                    self._wakes[thread].release()
                    woken.add(thread)
            while True:
                waited = _lead(self._address, program, count, step, threads)
                if waited >= 0:
                    return waited
                if -waited not in woken:  # parked while we looked
                    self._wakes[-int(waited)].release()
                    woken.add(-waited)
        finally:
            if threads > 1:
                _keep_awake(self._address, 0)

    def close(self) -> None:
        """End the threads."""
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            self._closed = True
            self._end()

    def _end(self) -> None:
        for thread in range(1, len(self._threads) + 1):
            if _leave(self._address, thread):
                self._wakes[thread].release()
        for worker in self._threads:
            worker.join()
        self._threads.clear()
        self._shared[:] = 0
